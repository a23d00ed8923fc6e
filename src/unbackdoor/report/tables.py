"""A document of tables: what Markdown and HTML are both made from. It knows no method and no benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

OLDER = "\u2020"  # the dagger behind what was measured by older code
LEGEND = f"{OLDER} measured by older code, and in no mean of the current code."
ABSENT = "\u2013"  # where the current code has measured nothing
MOST_ROWS = 2000  # of one table; a browser sorts them at once


class Verbatim(str):
    """Markdown that the project wrote itself: it stands as it is, where other text is escaped."""


@dataclass(frozen=True)
class Column:
    """A column: its name, whether it holds numbers, and how the table is ordered by it."""

    name: str
    number: bool = True
    order: str = ""  # ascending or descending
    long: bool = False  # sentences, which may break anywhere
    group: str = ""  # a page shows and hides the columns of a group together
    hidden: bool = False  # until a reader wants to see its group


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        small: A remark in small print; parts are separated by "; ".
        key: The number that the column is sorted by; None and NaN come last.
        tone: Of its colour: ``good``, ``fair``, ``bad`` or nothing.
        older: Marked with a dagger: it, or the row that it begins, was measured by older code.
        link: Identifier of the entry of its page that it leads to; empty for none. Markdown leaves it out.
    """

    text: str
    small: str = ""
    key: float | None = None
    tone: str = ""
    older: bool = False
    link: str = ""

    @property
    def words(self) -> str:
        """The text with its mark."""
        return f"{self.text} {OLDER}" if self.older else self.text

    @property
    def sort_key(self) -> str:
        """What the table is sorted by; empty for no number, which comes last."""
        return "" if self.key is None or math.isnan(self.key) else f"{self.key:.9g}"


@dataclass(frozen=True)
class Table:
    """A table, with the sentence above it.

    Attributes:
        identifier: Unique in its document.
        heading: Above it; may be empty.
        caption: Says what its numbers are.
        columns: Left to right; the first names the row.
        rows: Of as many cells as there are columns.
        total: Number of rows before it was cut.
        filtered: Whether a page offers a filter of its rows.
        facets: Columns by whose values a page offers to choose rows, beside the filter.
    """

    identifier: str
    heading: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]]
    total: int | None = None
    filtered: bool = False
    facets: tuple[int, ...] = ()

    @property
    def groups(self) -> dict[str, bool]:
        """Groups of its columns, with True for those that are shown at first."""
        return {column.group: not column.hidden for column in self.columns if column.group}

    def values(self, column: int) -> list[str]:
        """Return what stands in a column, each once: in the order of its numbers, or of its words."""
        cells = {row[column].text: row[column].key for row in self.rows}
        return sorted(cells, key=lambda text: (math.inf if cells[text] is None else cells[text], text))

    @property
    def notes(self) -> list[str]:
        """What stands under the table: the legend of its marks, and what was cut."""
        notes = [LEGEND] if any(cell.older for row in self.rows for cell in row) else []
        if self.total is not None and len(self.rows) < self.total:
            notes.append(
                f"These are the first {len(self.rows):,} of {self.total:,} rows; all of them are in the "
                "export (unbackdoor bench export)."
            )
        return notes


@dataclass(frozen=True)
class Entry:
    """What a cell of a table leads to: how it was measured, and the commands that measure it again.

    Attributes:
        identifier: Unique in its document.
        title: What it is of.
        config: Everything that it was measured with, as JSON.
        commands: Lines for a terminal.
    """

    identifier: str
    title: str
    config: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A section: words, charts, tables and terms, in this order.

    Attributes:
        identifier: Unique in its document.
        title: Its heading.
        words: Paragraphs.
        tables: Each with a heading of its own.
        charts: Name and picture; Markdown leaves them out.
        terms: What words mean.
        only_html: Left out of Markdown.
        entries: What cells lead to; a page shows the one that was chosen. Markdown leaves them out.
    """

    identifier: str
    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[tuple[str, Markup], ...] = ()
    terms: tuple[tuple[str, str], ...] = ()
    only_html: bool = False
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Document:
    """A page: title, lead, sections, a last line, and the command that it comes from."""

    title: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]
    colophon: str = ""
    command: str = "unbackdoor bench report"


def columns(*names: str, text: int = 1, **more: Any) -> tuple[Column, ...]:
    """Return columns of numbers after ``text`` columns of words; what else is said holds for all of them."""
    return tuple(Column(name, number=place >= text, **more) for place, name in enumerate(names))
