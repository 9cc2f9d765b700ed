"""Render pages as single self-contained HTML files that run only their own scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def fill(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """Render a page from its template and scripts; plotly is included if there are scripts.

    The page loads nothing: its Content-Security-Policy forbids all requests, and all scripts except its own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    own = "\n".join((FOLDER / name).read_text("utf-8") for name in scripts)
    texts = [_plotly(), own] if scripts else []
    texts = [text.replace("\r\n", "\n") for text in texts]  # HTML parsers turn CR LF into LF before they hash a script
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        policy=_policy(texts),
        style=Markup((FOLDER / "page.css").read_text("utf-8")),
        scripts=[Markup(text) for text in texts],
        **values,
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def _policy(scripts: Sequence[str]) -> str:
    """Content-Security-Policy that allows only `scripts` and no requests: an unescaped name could do no harm."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def machine_facts(machines: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]], list[tuple[str, str]]]]:
    """Name, facts and package versions of every machine."""
    return [
        (
            name,
            [
                (key.replace("_gib", ", GiB").replace("_", " "), str(value))
                for key, value in machine.items()
                if key != "versions" and value is not None
            ],
            [(package, str(version)) for package, version in machine.get("versions", {}).items()],
        )
        for name, machine in machines.items()
    ]
