"""The command-line application; here errors become messages and exit codes.

A command is imported when it is called, or when something looks at its options: the version, the help and the
first line of a command do not wait for what the others need.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from unbackdoor import __version__
from unbackdoor.cli.output import Invocation, complain, emit_failure, invocation
from unbackdoor.errors import UnbackdoorError, UnsupportedModel

SUCCESS = 0
CHECK_FAILED = 1  # a check was not passed, a backdoor was found, or a file would execute code
ERROR = 2
UNSUPPORTED = 3
INTERRUPTED = 130

EPILOG = """\
[bold]Exit codes[/bold]

  0    done
  1    a check was not passed, or a backdoor was found, or a file would execute code
  2    an error: wrong usage, or a file or a method that did not work
  3    the model is of a kind that the method cannot work on
  4    purify: it is not shown that the model is repaired
  130  interrupted with Ctrl-C or SIGTERM; no half-written file is left behind

Interrupted, audit, scan and verify print and write the checks that had ended.

Results go to standard output; progress and errors go to standard error."""


@dataclass(frozen=True)
class Place:
    """Where a command is written.

    Attributes:
        address: Module of this room, and the function or the group in it.
        summary: First paragraph of its help, for the list of all commands; empty where it is hidden.
    """

    address: str
    summary: str = ""

    def load(self) -> Any:
        """Import the function, or the typer application of a group."""
        module, _, name = self.address.partition(":")
        return getattr(import_module(f"unbackdoor.cli.{module}"), name)


COMMANDS = {
    "demo": Place(
        "demo:demo", "Plant a backdoor in a small network, remove it, and write a report with pictures."
    ),
    "audit": Place(
        "audit:audit",
        "Audit a model that somebody else trained: inspect, scan, recover the trigger, repair, verify.",
    ),
    "inspect": Place(
        "inspect:inspect",
        "Tell what a model file is: its format, what loading it would execute, its tensors, its "
        "architecture.",
    ),
    "scan": Place("scan:scan", "Look for a backdoor in a model that somebody else trained."),
    "purify": Place("purify:purify", "Remove a backdoor from a model with a few clean images."),
    "verify": Place("verify:verify", "Compare two models without trusting whoever made the second."),
    "screen": Place("screen:screen", "Look for triggered images among images of unknown origin."),
    "train": Place("train:train", "Train a network with a planted backdoor and measure it."),
    "evaluate": Place("evaluate:evaluate", "Measure ACC, ASR and RA of a model whose attack is on record."),
    "import-backdoorbench": Place(
        "import_backdoorbench:import_backdoorbench",
        "Turn an attack result of BackdoorBench into a model and a judged test set.",
    ),
    "list": Place(
        "listing:listing",
        "Show attacks, defenses, scanners, screeners, architectures, recipes and data sets, with options.",
    ),
    "unlearn": Place("unlearn:unlearn"),
    "patch": Place("patch:patch", "Make, apply and revert repairs as small files."),
    "statement": Place(
        "statement:statement", "Sign what was done, check what somebody signed, and write bills of materials."
    ),
    "bench": Place("bench:bench", "Run suites of attacks and defenses, and report the rows."),
}


class _Commands(Mapping[str, Any]):
    """All commands by name, each imported when it is looked up."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _parser_of(name, COMMANDS[name].load())
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _parser_of(name: str, command: Any) -> Any:
    """Return the parser of a command or of a group of them."""
    around = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    if isinstance(command, typer.Typer):
        around.add_typer(command, name=name)
    elif COMMANDS[name].summary:
        around.command(name, help=_flowing(command.__doc__))(command)
    else:  # it says what to call in its place, whatever follows it
        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        around.command(name, hidden=True, context_settings=anything)(command)
    return typer.main.get_group(around).commands[name]


class _Guarded(TyperGroup):
    """The group of all commands, whose errors are one paragraph."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(Any, _Commands())

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # The list shows names and summaries: no command is imported for it.
        commands = self.commands
        try:
            self.commands = {
                name: TyperCommand(name, help=place.summary)
                for name, place in COMMANDS.items()
                if place.summary
            }
            super().format_help(ctx, formatter)
        finally:
            self.commands = commands

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        words = [*(sys.argv[1:] if args is None else args)]
        invocation.__dict__.update(vars(_invocation(self, words)))
        failure: Exception | None = None
        try:
            with _terminable(), _warnings_in_words():
                code = super().main(words, *rest, **kwargs)
        except UnbackdoorError as error:
            code, failure = _explain(error), error
        except OSError as error:
            code, failure = _file_trouble(error), error
        except Exception as error:  # noqa: BLE001  the last stop before the user
            usage = _usage(error)
            code, failure = usage or _defect(), None if usage else error
        code = code if isinstance(code, int) else SUCCESS
        if code != SUCCESS:
            emit_failure(failure, code)
        sys.exit(code)


def _invocation(group: Any, words: Sequence[str]) -> Invocation:
    """Return which command was called and whether with ``--json``, however wrong the words are."""
    words = words[: words.index("--")] if "--" in words else words
    names: list[str] = []
    commands: dict[str, Any] = group.commands
    before = ""
    for word in words:
        if word in commands and before != "--config":
            names.append(word)
            commands = getattr(commands[word], "commands", {})
        before = word
    return Invocation(" ".join(names), "--json" in words)


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that temporary files are removed and child processes ended."""
    usual = threading.current_thread() is threading.main_thread()
    if not usual or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:  # else a command has set a handler of its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Print warnings as plain messages, without the file and the line that they came from."""
    default_handler = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:  # ours; warnings of libraries for developers keep their form
            complain(f"mind: {message}")
        else:
            default_handler(message, category, *rest, **more)

    warnings.showwarning = say
    try:
        yield
    finally:
        warnings.showwarning = default_handler


def _explain(error: UnbackdoorError) -> int:
    if _state["debug"]:
        traceback.print_exc()
    complain(f"error: {error}")
    return UNSUPPORTED if isinstance(error, UnsupportedModel) else ERROR


def _file_trouble(error: OSError) -> int:
    if error.filename is None:
        return _defect()
    if _state["debug"]:
        traceback.print_exc()
    complain(f"error: {error.strerror} ({error.filename})")
    return ERROR


def _usage(error: Exception) -> int | None:
    # Recognised by its method, because its class has moved between the versions of typer.
    if not hasattr(error, "format_message"):
        return None
    problem = str(error.format_message()).strip()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "unbackdoor"
    if problem:  # without a command, the help has been shown already
        stop = "" if problem[-1] in ".?!" else "."
        complain(f"error: {problem}{stop} Try: {command} --help")
    return ERROR


def _defect() -> int:
    traceback.print_exc()
    complain("error: this is a defect of unbackdoor. Please report it with the lines above.")
    return ERROR


_state = {"debug": False}

app = typer.Typer(
    name="unbackdoor",
    cls=_Guarded,
    help="Find backdoors in image classifiers, remove them with a handful of clean images, and prove what "
    "was done.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"unbackdoor {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of options, with a table for each command; what is typed counts more.",
            show_default="unbackdoor.toml, or [tool.unbackdoor] of pyproject.toml, in the working folder",
        ),
    ] = None,
) -> None:
    from unbackdoor.cli.settings import read_settings

    _state["debug"] = debug
    settings = read_settings(config, context.command)
    if settings is None:
        return
    context.default_map = settings.defaults
    used = settings.of(invocation.command)
    invocation.as_json = invocation.as_json or used.get("as_json", False)
    if used and config is None:  # a file that nobody named cannot silence this
        facts = ", ".join(f"{name.replace('_', '-')} = {value}" for name, value in used.items())
        complain(f"Options from {settings.path}: {facts}")


def _flowing(documentation: str | None) -> str:
    # The lines of a paragraph are joined, because the terminal wraps them.
    paragraphs = cleandoc(documentation or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def main() -> None:
    """Run the command line."""
    app()
