"""What recovery from calibration text did to the layers: refits of down projections, recalibrated routers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reports.numbers.load import Panel
from reports.tables.formats import MISSING, Table, format_number, format_span
from reports.tables.layers import _span

_NOTE = (
    "Relative squared error of the routed experts' output, sum |m − m̂|² over sum |m|², each layer given what that of "
    "the intact model is given: as the method leaves it, and behind each refit. Of the router, the same of the logits "
    "of its rows, on what the compressed model gives it. Mean over MoE layers (n: {n}), and the lowest and highest "
    "layer; of several seeds, the first. Calibration text ({tokens} tokens) was fitted to, held-out text was not "
    "({heldout} tokens). Gate mass is the mean of what the gate values of a token add up to in the intact model, with "
    "the rows that stay, and with their new values; it is shown where a router does not renormalise. Refitted rows are "
    "repaired by calibration text alone, and are set against each other only.{missing}"
)
_HELD_OUT_MISSING = " Held-out text: {why}."


def recovery_table(panel: Panel, corpus: str) -> Table | None:
    """None where no cell of the corpus was refitted and none has a recalibrated router."""
    rows, tokens, heldout, counts, why = [], set(), set(), set(), set()
    for row in panel.of_corpus(corpus):
        found = row.records[0].recovery
        told = [found[what] for what in ("refit", "router") if what in found]
        if not told:
            continue
        rows.append([f"{row.ratio:g}", row.label, *_refit(found.get("refit")), *_router(found.get("router"))])
        tokens |= {one["tokens"] for one in told}
        heldout |= {one["heldout_tokens"] for one in told}
        counts |= {len(one["layers"]) for one in told}
        why |= {found["heldout"]} if found["heldout"].startswith("not measured") else set()
    if not rows:
        return None
    header = [
        "ratio", "method", "refit", "layer error (%)", "held-out layer error (%)", "logit error (%)",
        "held-out logit error (%)", "gate mass",
    ]  # fmt: skip
    missing = "".join(_HELD_OUT_MISSING.format(why=one) for one in sorted(why))
    spans = {"n": format_span(counts), "tokens": format_span(tokens), "heldout": format_span(heldout)}
    return Table("Recovery from calibration text", header, rows, _NOTE.format(missing=missing, **spans))


def _refit(told: Mapping[str, Any] | None) -> list[str]:
    if told is None:
        return [MISSING] * 3
    fits = ", ".join(f"{fit['objective']} (α {fit['alpha']:g})" for fit in told["fits"])
    return [fits, *_errors(list(told["layers"].values()))]


def _router(told: Mapping[str, Any] | None) -> list[str]:
    if told is None:
        return [MISSING] * 3
    layers = list(told["layers"].values())
    names = ("intact", "as_is", "recalibrated")
    mass = [[layer["gate_mass"][name] for layer in layers] for name in names]
    same = np.allclose(mass[0], mass[1]) and np.allclose(mass[0], mass[2])
    return [*_errors(layers), MISSING if same else " → ".join(format_number(float(np.mean(each)), 3) for each in mass)]


def _errors(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """On calibration text and on held-out text: before → behind each fit."""
    found = []
    for text in ("calibration", "heldout"):
        each = [layer[text] for layer in layers]
        measured = all(errors is not None for errors in each)
        steps = zip(*each, strict=True) if measured else ()
        found.append(" → ".join(_span(step, 1, 100) for step in steps) or MISSING)
    return found
