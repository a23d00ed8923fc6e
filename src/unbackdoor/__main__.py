"""``unbackdoor`` and ``python -m unbackdoor``: the command line, and its first line before all imports.

What the command line is made of takes several tenths of a second to import, and torch some seconds.
"""

import sys

_SLOW = frozenset({"audit"})
_SILENT = frozenset({"--quiet", "-q", "--help"})


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    command = next((word for word in words if not word.startswith("-")), "")
    if command in _SLOW and not _SILENT & set(words):
        sys.stderr.write(f"unbackdoor {command}: starting\n")
        sys.stderr.flush()
    from unbackdoor.cli import main as run

    run()


if __name__ == "__main__":
    main()
