"""What the command line imports before it says something: counted modules, not the clock."""

from __future__ import annotations

import subprocess
import sys
from inspect import cleandoc

import pytest
import typer

from unbackdoor import __version__
from unbackdoor.__main__ import _SLOW
from unbackdoor.cli.app import COMMANDS, app

LARGE = {"torch", "pydantic", "numpy", "jinja2", "unbackdoor.registry", "unbackdoor.types"}
PARSER = {"typer", "rich"}


def imported(words: list[str], *, first_line: bool = False) -> tuple[set[str], str, str]:
    """Return the modules that are there at the end, or when the parser is imported, and both outputs."""
    code = f"""
import atexit, sys
class Stop(list):
    def find_spec(self, name, path=None, target=None):
        if name == "unbackdoor.cli":
            raise SystemExit(0)
atexit.register(lambda: print("\\n--", *sorted(sys.modules), flush=True))
if {first_line}:
    sys.meta_path.insert(0, Stop())
sys.argv = ["unbackdoor", *{words!r}]
from unbackdoor.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out, _, modules = done.stdout.rpartition("\n-- ")
    return set(modules.split()), out, done.stderr


def test_the_version_waits_for_nothing() -> None:
    modules, out, _ = imported(["--version"])
    assert out.strip() == f"unbackdoor {__version__}"
    assert not modules & (LARGE | PARSER)


def test_the_help_waits_for_no_command_and_no_method() -> None:
    """It imported every command and the registry, with pydantic, for a list of names."""
    modules, out, _ = imported(["--help"])
    assert not modules & LARGE
    assert not modules & {f"unbackdoor.cli.{place.address.split(':')[0]}" for place in COMMANDS.values()}
    assert [line for line in COMMANDS if f" {line} " not in out] == ["unlearn"]


def test_the_help_of_a_command_waits_for_no_other_one_and_no_method() -> None:
    modules, _, _ = imported(["inspect", "--help"])
    assert "unbackdoor.cli.inspect" in modules
    # The parser itself takes pydantic where it looks at options.
    large = LARGE - {"pydantic"}
    assert not modules & (large | {"unbackdoor.cli.bench", "unbackdoor.cli.demo", "unbackdoor.cli.train"})


@pytest.mark.parametrize("command", sorted(_SLOW))
def test_the_first_line_waits_for_no_large_import(command: str) -> None:
    """It took half a second and more: typer, pydantic, rich and torch were imported before it."""
    modules, _, told = imported([command, "m.pth"], first_line=True)
    assert not modules & (LARGE | PARSER)
    assert told == f"unbackdoor {command}: starting\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scan", "m.pth", "-q"], ""),
        (["scan", "m.pth", "--quiet"], ""),
        (["audit", "--help"], ""),
        (["list"], ""),
        ([], ""),
        (["--debug", "--config", "scan", "purify", "m.pth"], "unbackdoor purify: starting\n"),
    ],
)
def test_only_what_is_slow_and_not_quiet_has_a_first_line(words: list[str], line: str) -> None:
    assert imported(words, first_line=True)[2] == line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    summary, command = COMMANDS[name].summary, COMMANDS[name].load()
    if isinstance(command, typer.Typer):
        assert summary == command.info.help
    elif summary:
        assert summary == " ".join(cleandoc(command.__doc__ or "").split("\n\n")[0].split())
    parser = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert parser.name == name and parser.hidden != bool(summary)


def test_every_slow_command_exists() -> None:
    assert set(COMMANDS) >= _SLOW
