"""What the results of all verbs have in common: a record and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Result:
    """The result of a verb. The layers above make records and pages; they are called by public names."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        import unbackdoor

        return unbackdoor.record(self)  # type: ignore[arg-type]

    def save_report(self, folder: Path | str, *, force: bool = False, command: str = "") -> Path:
        """Write page, record and recovered triggers; see :func:`unbackdoor.save_report`."""
        import unbackdoor

        return unbackdoor.save_report(self, folder, force=force, command=command)  # type: ignore[arg-type]
