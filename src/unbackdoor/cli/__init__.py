"""The command line: parse, call, print. Nothing else in the package prints."""

from unbackdoor.cli.app import app, main

__all__ = ["app", "main"]
