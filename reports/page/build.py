"""The page: one HTML file with its style, script and data inside, which asks the network for nothing.

The charts are drawn by the page's own script (``page.js``, and ``cell.js`` and ``measured.js`` for the view of one
cell): a plotting library would add megabytes to every page. Texts that models wrote are hostile until shown otherwise:
they travel as JSON in which no tag can end or begin, the script puts them on the page as text only, and the page's own
security policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from reports.numbers.measures import Results
from reports.page.data import page_data
from reports.page.embed import CLAIMS_FILE, embed, embed_text

SCRIPTS = ("page.js", "cell.js", "measured.js")


def report_page(folder: Path, out: Path, all_results: Sequence[Results], opening: str) -> bytes:
    """The page of the records in ``folder``, with the claims that ``winnow-report claims`` left in ``out``, if any."""
    claims = out / CLAIMS_FILE
    found = claims.read_text(encoding="utf-8") if claims.is_file() else "null"
    page = build_page(folder.resolve().name, page_data(folder, all_results, opening), found)
    return page.encode("utf-8", "replace")


def build_page(title: str, data: Mapping[str, Any], claims: str = "null") -> str:
    """The whole page. ``data`` is from ``reports.page.data``, ``claims`` the JSON of ``winnow-report claims``."""
    style, script = _read("page.css"), "".join(map(_read, SCRIPTS))
    return Template(_read("template.html")).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embed(data),
        claims=embed_text(claims),
    )


def _read(name: str) -> str:
    return files("reports.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a security policy names a script or style that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
