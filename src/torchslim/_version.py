"""The version of the package; nothing else imports the package itself for it."""

__version__ = "0.2.0"
