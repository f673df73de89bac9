"""Tables as text in cells, and how numbers and tables are written down."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from reports.numbers.statistics import Estimate

MISSING = "–"
# What begins a tag in Markdown: a number may be below another ("p < 0.001").
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "‖": r"$\Vert$",
    "Δ": r"$\Delta$",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "∞": r"$\infty$",
}


@dataclass(frozen=True)
class Table:
    """``bold`` holds (row, column); ``note`` says in plain words how the numbers came about."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str
    bold: set[tuple[int, int]] = field(default_factory=set)


def in_markdown(text: str) -> str:
    """Text that holds names from outside, on one line and without tags, links and images of theirs."""
    return _TAG.sub("&lt;", " ".join(text.split())).replace("](", r"]\(")


def in_csv(text: str) -> str:
    """A name from outside, on one line and such that no spreadsheet takes it for a formula."""
    line = " ".join(text.split())
    return f"'{line}" if text.startswith(_FORMULA) or line.startswith(_FORMULA) else line


def to_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(in_markdown(cell).replace("|", r"\|") for cell in cells) + " |"

    def cell(text: str, row: int, column: int) -> str:
        return f"**{text}**" if (row, column) in table.bold else text

    rule = ["---", "---"] + ["---:"] * (len(table.header) - 2)
    rows = [line(cell(text, r, c) for c, text in enumerate(cells)) for r, cells in enumerate(table.rows)]
    return "\n".join([line(table.header), line(rule), *rows, "", in_markdown(table.note), ""])


def to_latex(table: Table) -> str:
    """A booktabs table, scaled to the line; a thin rule parts the ratios."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (len(table.header) - 2)}}}",
        r"\toprule",
        " & ".join(_tex(name) for name in table.header) + r" \\",
        r"\midrule",
    ]
    for place, cells in enumerate(table.rows):
        if place and cells[0] != table.rows[place - 1][0]:
            lines.append(r"\midrule")
        texts = [
            rf"\textbf{{{_tex(text)}}}" if (place, column) in table.bold else _tex(text)
            for column, text in enumerate(cells)
        ]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def format_value(kind: str, value: float) -> str:
    """Shares in percent with one decimal, perplexities with two until they are large, counts with one,
    other numbers with three.
    """
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isnan(value):
        return "NaN"
    if kind == "share":
        text = f"{100 * value:.1f}"
    elif kind == "count":
        text = f"{value:.1f}"
    elif kind == "perplexity":
        text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"
    else:
        text = f"{value:.3f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−", 1) if value < 0 else text


def format_estimate(kind: str, one: Estimate, signed: bool = False) -> str:
    """``61.2 [57.0, 65.1]``; with a sign where it is a difference."""
    text = format_value(kind, one.value)
    if signed and one.value > 0 and text.strip("0."):
        text = f"+{text}"
    if math.isnan(one.low) or math.isnan(one.high):
        return text
    return f"{text} [{format_value(kind, one.low)}, {format_value(kind, one.high)}]"


def format_number(value: float | None, digits: int, factor: float = 1.0) -> str:
    if value is None:
        return MISSING
    text = f"{value * factor:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−", 1)


def format_span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)}–{max(values)}"


def format_list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _tex(text: str) -> str:
    text = " ".join(text.split())
    return "$^6$".join("".join(_LATEX.get(letter, letter) for letter in part) for part in text.split("^6"))
