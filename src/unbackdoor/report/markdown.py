"""A document as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from unbackdoor.report.tables import Cell, Document, Section, Table, Verbatim
from unbackdoor.text import printable


def to_markdown(document: Document) -> str:
    """Return a document as Markdown; charts, and sections for HTML alone, are left out."""
    lines = [f"# {_escaped(document.title)}", "", *_paragraphs(document.lead)]
    for section in document.sections:
        if not section.only_html and (section.words or section.tables or section.terms):
            lines += _section(section)
    lines += _paragraphs([document.colophon] if document.colophon else [])
    return "\n".join(lines).rstrip("\n") + "\n"


def table_lines(table: Table) -> list[str]:
    """Return the lines of a table, without its heading and its caption."""
    lines = ["| " + " | ".join(_escaped(column.name) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.number else " --- " for column in table.columns) + "|")
    return [*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows)]


def _section(section: Section) -> list[str]:
    lines = [f"## {_escaped(section.title)}", "", *_paragraphs(section.words)]
    for table in section.tables:
        lines += [f"### {_escaped(table.heading)}", ""] if table.heading else []
        lines += _paragraphs([table.caption] if table.caption else [])
        lines += [*table_lines(table), "", *_paragraphs(table.notes)]
    terms = [f"- **{_escaped(term)}**: {_escaped(text)}" for term, text in section.terms]
    return [*lines, *terms, *([""] if terms else [])]


def _paragraphs(words: Iterable[str]) -> list[str]:
    return [line for text in words for line in (_escaped(text), "")]


def _cell(cell: Cell) -> str:
    return _escaped(f"{cell.words} ({cell.small})" if cell.small else cell.words)


def _escaped(text: str) -> str:
    if isinstance(text, Verbatim):
        return text
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", printable(text, keep="\n"))
