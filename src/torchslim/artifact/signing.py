"""Ed25519 signatures of an artifact's manifest: the public key verifies who saved it.

A signature covers the manifest's digest, and through it the hash of every file. `cryptography` is an extra:
pip install 'torchslim[sign]'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchslim.errors import ArtifactError, RuntimeUnavailable

Key = Any
"""The path of a PEM file, its bytes, or a key object of `cryptography`."""
PREFIX = b"torchslim-artifact-1:"


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise RuntimeUnavailable("signatures need the package cryptography: pip install 'torchslim[sign]'") from error
    return ed25519


def sign(digest: str, key: Key) -> str:
    """The signature of a manifest's digest by a private key, as hex.

    Raises:
        ArtifactError: `key` is no unencrypted private key of Ed25519.
        RuntimeUnavailable: `cryptography` is not installed.
    """
    private = _ed25519().Ed25519PrivateKey
    if not isinstance(key, private):
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = _loaded(key, "key", lambda data: load_pem_private_key(data, password=None))
    if not isinstance(key, private):
        raise ArtifactError(
            f"key must be a private key of Ed25519, got {type(key).__name__}; make one with openssl genpkey "
            "-algorithm ed25519"
        )
    return bytes(key.sign(PREFIX + digest.encode())).hex()


def verify(digest: str, signature: str | None, public_key: Key, what: str) -> None:
    """Check the signature of a manifest's digest.

    Raises:
        ArtifactError: the manifest is not signed, or signed by another key.
        RuntimeUnavailable: `cryptography` is not installed.
    """
    public = _ed25519().Ed25519PublicKey
    if not isinstance(public_key, public):
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        public_key = _loaded(public_key, "public_key", load_pem_public_key)
    if not isinstance(public_key, public):
        raise ArtifactError(
            f"public_key must be a public key of Ed25519, got {type(public_key).__name__}; openssl pkey -pubout makes "
            "it from the private one"
        )
    from cryptography.exceptions import InvalidSignature

    if signature is None:
        raise ArtifactError(f"{what} is not signed; load it without public_key if you trust where it comes from")
    try:
        public_key.verify(bytes.fromhex(signature), PREFIX + digest.encode())
    except InvalidSignature as error:
        raise ArtifactError(f"{what} is not signed by this key; ask who saved it for the right public key") from error


def _loaded(key: Key, name: str, load: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    if isinstance(key, (str, Path)):
        try:
            key = Path(key).read_bytes()
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{name} {key} cannot be read: {getattr(error, 'strerror', error)}") from error
    if type(key).__module__.startswith("cryptography."):
        return key  # a key of another kind: the caller raises, and names its type
    if not isinstance(key, bytes):
        raise ArtifactError(
            f"{name} must be the path or the bytes of a PEM file, or a key object, got {type(key).__name__}"
        )
    try:
        return load(key)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: the key is encrypted
        raise ArtifactError(
            f"{name} is no unencrypted PEM of the right kind: {str(error).splitlines()[0]}; decrypt it, or give the "
            "key object"
        ) from error
