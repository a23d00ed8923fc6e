"""A document as one HTML page that loads nothing; its tables can be sorted and filtered."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from markupsafe import Markup

from unbackdoor.report.page import render
from unbackdoor.report.tables import Document


def to_html(document: Document) -> str:
    """Return a document as HTML. Everything is escaped but its charts."""
    script = files("unbackdoor.report").joinpath("templates/table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return render("document.html", document=document, script=Markup(script), script_hash=digest)
