"""What the results of all verbs have in common: a record and a report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unbackdoor.result_views import Viewed


class Result(Viewed):
    """The result of a verb. The layers above make records and pages; they are called by public names."""

    def __post_init__(self) -> None:
        """Keep when it was made, so that every record of it has the same date."""
        object.__setattr__(self, "_date", datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def date(self) -> str:
        """When it was made, in UTC, as in ISO 8601."""
        return str(self.__dict__["_date"]).replace("+00:00", "Z")

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        import unbackdoor

        return unbackdoor.record(self)  # type: ignore[arg-type]

    def save_report(self, folder: Path | str, *, force: bool = False, command: str = "") -> Path:
        """Write page, record and recovered triggers; see :func:`unbackdoor.save_report`."""
        import unbackdoor

        return unbackdoor.save_report(self, folder, force=force, command=command)  # type: ignore[arg-type]
