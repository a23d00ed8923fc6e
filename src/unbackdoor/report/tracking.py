"""Results in MLflow: parameters and metrics; the report and the repaired model as artifacts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbackdoor import __version__
from unbackdoor.audit.purifying import Purification
from unbackdoor.audit.result import Result
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.files import write_json

_LONGEST = 250  # characters of a parameter; the limit of older servers
_LISTS = 50  # entries of a list whose numbers become metrics


def log_to_mlflow(
    result: Any, *, uri: str | None = None, experiment: str = "unbackdoor", run_name: str | None = None
) -> str:
    """Log a result to MLflow.

    Numbers of the record become metrics, texts parameters, the verdict a tag; the record, the report of a
    scan, a repair or a comparison, and a repaired model become artifacts. Images of the user are in the
    report.

    Args:
        result: What a verb returned.
        uri: Tracking URI; None: that of the environment.
        experiment: Made where it is missing.
        run_name: Of the run; None: the kind of the result.

    Returns:
        The id of the run.

    Raises:
        MissingExtra: Without mlflow.
        InputError: If the result is none, or the server cannot be reached.

    Example:
        >>> unbackdoor.log_to_mlflow(audit, uri="http://127.0.0.1:5000")  # doctest: +SKIP
    """
    try:
        import mlflow
    except ImportError:
        raise MissingExtra("mlflow", "mlflow", "logging to MLflow") from None
    if not hasattr(result, "to_dict"):
        raise InputError("this is no result", expected="what a verb returned", got=type(result).__name__)
    record = result.to_dict()
    numbers, texts = {}, {}
    for name, value in _flat(record):
        if isinstance(value, bool | str):
            texts[name] = str(value)[:_LONGEST]
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[name] = float(value)
    with tempfile.TemporaryDirectory(prefix="unbackdoor-") as name:
        folder = Path(name)
        write_json(folder / "record.json", record)
        if isinstance(result, Result):
            result.save_report(folder / "report")
        if isinstance(result, Purification):
            result.save(folder / "model" / "repaired")
        try:
            if uri is not None:
                mlflow.set_tracking_uri(uri)
            mlflow.set_experiment(experiment)
            with mlflow.start_run(run_name=run_name or type(result).__name__.lower()) as run:
                mlflow.set_tags({"unbackdoor": __version__, "verdict": str(record.get("verdict", ""))})
                mlflow.log_params(texts)
                mlflow.log_metrics(numbers)
                mlflow.log_artifacts(str(folder))
                return str(run.info.run_id)
        except Exception as error:  # the library's own tree of errors, and those of its transport
            lines = str(error).strip().splitlines()
            raise InputError(
                "MLflow did not take the result",
                got=f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
                where=uri or "the tracking URI of the environment",
            ) from error


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values of a record under dotted names; longer lists, such as tensors, are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # What MLflow allows in names.
            plain = "".join(c if c.isalnum() or c in "_-/ " else "_" for c in str(key))
            yield from _flat(inner, f"{prefix}.{plain}" if prefix else plain)
    elif isinstance(value, list | tuple):
        if len(value) <= _LISTS:
            for place, inner in enumerate(value):
                named = inner.get("check") or inner.get("tensor") if isinstance(inner, Mapping) else None
                yield from _flat(inner, f"{prefix}.{named or place}")
    else:
        yield prefix, value
