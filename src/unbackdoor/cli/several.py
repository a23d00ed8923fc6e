"""Commands on several models: a folder, a pattern, or several names; one answer for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor.cli import options
from unbackdoor.cli.output import complain, emit, say, table
from unbackdoor.errors import InputError, UnbackdoorError, UnsupportedModel

ERROR, UNSUPPORTED, INTERRUPTED = 2, 3, 130
_WORST_LAST = (0, UNSUPPORTED, ERROR, 1)  # an accusation weighs more than a question that is open


def models_of(given: Sequence[Path]) -> tuple[tuple[Path, ...], bool]:
    """Return the models that the arguments of a command mean, and whether each gets an entry of its own.

    A single file, or a single folder that is a model, is answered as ever.

    Raises:
        InputError: If an argument means no model.
    """
    from unbackdoor.weights.model_files import is_several, model_files

    if len(given) == 1 and not is_several(options.existing_model(given[0])):
        return tuple(given), False
    found = [path for argument in given for path in model_files(options.existing_model(argument))]
    return tuple(dict.fromkeys(found)), True


def worst(codes: Sequence[int]) -> int:
    """Return the exit code of the worst of several results."""
    return max(codes, key=_WORST_LAST.index, default=0)


def one_by_one(
    paths: Sequence[Path],
    work: Callable[[Path], tuple[Mapping[str, Any], str, int]],
    *,
    as_json: bool,
    failed: Callable[[Path, str], None] = lambda path, why: None,
) -> int:
    """Answer for each of several models, print all, and return the exit code of the worst.

    Args:
        paths: The models.
        work: Returns the record, one line in words and the exit code of one; what it raises is the answer
            for that one, and the others are gone on with.
        as_json: Whether the records are printed, and not the lines.
        failed: Called with a model and why there is no answer for it.

    Raises:
        KeyboardInterrupt: If one was interrupted; what had ended by then is printed.
    """
    from unbackdoor.report.json_output import error_facts

    entries: list[dict[str, Any]] = []
    lines: list[tuple[str, str]] = []
    interrupted = False
    try:
        for path in paths:
            try:
                record, line, code = work(path)
                entry: dict[str, Any] = {"path": str(path), "exit_code": code, "result": dict(record)}
            except UnbackdoorError as error:
                code = UNSUPPORTED if isinstance(error, UnsupportedModel) else ERROR
                line = f"error: {error}"
                entry = {"path": str(path), **error_facts(error, exit_code=code)}
            except OSError as error:
                if error.filename is None:
                    raise
                line, code = f"error: {error.strerror} ({error.filename})", ERROR
                entry = {"path": str(path), **error_facts(InputError(line), exit_code=code)}
            if "error" in entry:
                failed(path, line)
                complain(f"{path}: {line}")
            entries.append(entry)
            lines.append((str(path), line.partition(". ")[0]))
            if code == INTERRUPTED:
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    codes = [entry["exit_code"] for entry in entries if entry["exit_code"] != INTERRUPTED]
    code = INTERRUPTED if interrupted else worst(codes)
    if as_json:
        emit({"models": entries, "exit_code": code})
    else:
        table(f"{len(entries)} of {len(paths)} models", ("model", "result"), lines)
        say(f"Exit code of the worst: {worst(codes)}")
    if interrupted:
        raise KeyboardInterrupt
    return code
