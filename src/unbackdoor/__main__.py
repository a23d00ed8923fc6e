"""``unbackdoor`` and ``python -m unbackdoor``: the command line, and its first line before all imports.

What the command line is made of takes several tenths of a second to import, and torch some seconds.
"""

import os
import sys

# Commands that open a model, or train one: seconds go by before they have something to show.
_SLOW = frozenset({"audit", "scan", "purify", "inspect", "verify", "screen", "evaluate", "train"})
_SILENT = frozenset({"--quiet", "-q", "--help"})


def main() -> None:
    """Run the command line."""
    # Threads that wait for each other by spinning take the processor from those that they wait for wherever
    # something else runs as well (benchmarks/waiting.py). Whoever sets it otherwise is heard.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        from unbackdoor import __version__

        sys.stdout.write(f"unbackdoor {__version__}\n")
        return
    command = _command(words)
    if command in _SLOW and not _SILENT & set(words):
        sys.stderr.write(f"unbackdoor {command}: starting\n")
        sys.stderr.flush()
    from unbackdoor.cli import main as run

    run()


def _command(words: list[str]) -> str:
    """Return the first word that is neither an option nor the file of ``--config``."""
    before = ""
    for word in words:
        if not word.startswith("-") and before != "--config":
            return word
        before = word
    return ""


if __name__ == "__main__":
    main()
