"""The text that a refit is measured on, and never fitted to: no item of a task, no text of the calibration corpus."""

import logging
from dataclasses import dataclass

from harness.calibration.token_cache import tokenized
from harness.calibration.tokens import TokenSequence
from harness.cells.cell import TOKENIZING, Cell
from harness.data.corpora import held_out
from harness.errors import WinnowError

log = logging.getLogger(__name__)

_DOCUMENTS = 64  # of another draw


@dataclass(frozen=True)
class HeldOut:
    """``origin`` says where the text is from, or why there is none."""

    sequences: list[TokenSequence]
    origin: str


def held_out_text(cell: Cell) -> HeldOut:
    """Of a cell that refits nothing there is none, nor where the corpus has no other text.

    Raises WinnowError where the file calibration.heldout has no text beside that of the corpus.
    """
    if not cell.recovers:
        return HeldOut([], "")
    settings = cell.config["calibration"]
    path = settings["heldout"]
    try:
        documents = held_out(settings["corpus"], cell.documents, path, _DOCUMENTS)
    except WinnowError as error:
        if path is not None:
            raise
        return _none(f"another draw of the corpus cannot be had ({error})")
    if not documents:
        if path is not None:
            raise WinnowError(f"calibration.heldout={path}: all its texts are in the calibration corpus")
        return _none("the corpus has no other text; calibration.heldout=FILE names some")
    origin = "another draw of the corpus" if path is None else "calibration.heldout"
    return HeldOut(tokenized(documents, cell.model, {name: settings[name] for name in TOKENIZING}), origin)


def _none(why: str) -> HeldOut:
    log.info("refit: errors on held-out text are not measured: %s", why)
    return HeldOut([], f"not measured: {why}")
