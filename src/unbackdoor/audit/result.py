"""What all verbs return has in common: it becomes a record, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Result:
    """What came of a verb. Records and pages are made by the rooms above, through the public names."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        import unbackdoor

        return unbackdoor.record(self)  # type: ignore[arg-type]

    def save_report(self, folder: Path | str, *, force: bool = False, command: str = "") -> Path:
        """Write page, record and recovered triggers; see :func:`unbackdoor.save_report`."""
        import unbackdoor

        return unbackdoor.save_report(self, folder, force=force, command=command)  # type: ignore[arg-type]
