"""The commands in one application, and the one place where errors become words and exit codes."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unbackdoor import __version__
from unbackdoor.cli.demo import demo
from unbackdoor.cli.evaluate import evaluate
from unbackdoor.cli.listing import listing
from unbackdoor.cli.output import complain
from unbackdoor.cli.purify import purify
from unbackdoor.cli.train import train
from unbackdoor.errors import UnbackdoorError, UnsupportedModel

SUCCESS = 0
NOT_KEPT = 1  # a check was not passed, or a backdoor was found
ERROR = 2
UNSUPPORTED = 3
INTERRUPTED = 130

EPILOG = """\
[bold]Exit codes[/bold]

  0    done
  1    a check was not passed, or a backdoor was found
  2    an error: wrong usage, or a file, an option or a method that did not work
  3    the model is of a kind that the method cannot work on
  130  interrupted with Ctrl-C; no half-written file is left behind

Results go to standard output; progress and errors go to standard error."""


class _Guarded(TyperGroup):
    """A group of commands whose errors are one paragraph."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except UnbackdoorError as error:
            code = _explain(error)
        except KeyboardInterrupt:
            complain("interrupted")
            code = INTERRUPTED
        except Exception as error:  # the last stop before the user
            code = _usage(error) or _defect()
        sys.exit(code if isinstance(code, int) else SUCCESS)


def _explain(error: UnbackdoorError) -> int:
    if _state["debug"]:
        traceback.print_exc()
    complain(f"error: {error}")
    return UNSUPPORTED if isinstance(error, UnsupportedModel) else ERROR


def _usage(error: Exception) -> int | None:
    # By its method and not by its class, which has moved between the versions of typer.
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "unbackdoor"
    complain(f"error: {error.format_message()} Try: {command} --help")
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
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"unbackdoor {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    _state["debug"] = debug


app.command("demo")(demo)
app.command("train")(train)
app.command("purify")(purify)
app.command("evaluate")(evaluate)
app.command("list")(listing)


def main() -> None:
    """Run the command line."""
    app()
