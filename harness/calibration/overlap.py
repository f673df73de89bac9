"""How near a model with fewer experts comes to the intact one: what a searched budget asks for, and what is kept of it.

The model stays whole and in memory; its routers answer as if rows were gone. All that is asked for at once goes through
behind the intact model, batch by batch. Of the intact model the hidden states before its last matrix are kept in the
host's memory; logits are made from them in slices, and never kept.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from harness import progress
from harness.backends.scoring import LOGITS, WholeModel
from harness.calibration.batches import Batch, in_batches
from harness.calibration.cache import content_key
from harness.calibration.drive import check_fit
from harness.calibration.routers import RoutersOf
from harness.calibration.streamed import Model, StreamedModel
from harness.calibration.tokens import TokenSequence, corpus_fingerprint
from harness.claims import claimed
from harness.contracts.search import Kept, Overlap
from harness.errors import WinnowError
from harness.families.family import Family
from harness.files import write_files

log = logging.getLogger(__name__)

TOO_LARGE = (
    "allocation=evoesap runs the whole model again and again, which does not fit the memory of its device and would be "
    "read one layer at a time: take more or larger devices (model.device=auto), a smaller model.dtype, or "
    "allocation=uniform; calibration.stream=never tries it all the same"
)


def spaced(sequences: Sequence[TokenSequence], samples: int) -> list[TokenSequence]:
    """At most ``samples`` of them, evenly spaced, the first one among them."""
    count = min(samples, len(sequences))
    return [sequences[place * len(sequences) // count] for place in range(count)]


class Comparison:
    """The intact ``model`` and the same with fewer experts, on ``sequences``.

    Raises WinnowError where these do not fit the model, and for one that is read layer by layer.
    """

    def __init__(self, model: Model, family: Family, sequences: Sequence[TokenSequence], batch_size: int) -> None:
        check_fit(model, family, sequences, batch_size)
        if isinstance(model, StreamedModel):
            raise WinnowError(TOO_LARGE)
        self._decoder, self._routers = WholeModel(model.eval()), RoutersOf(model, family)
        self._batches = list(in_batches(sequences, batch_size))
        self.tokens = sum(batch.layout.tokens for batch in self._batches)
        self._intact: list[Tensor] = []  # of each batch (n, H), once it has been through

    @torch.inference_mode()
    def overlaps(self, asked: Sequence[Kept], advance: Callable[[int], object] = lambda tokens: None) -> list[float]:
        """Of each of ``asked``: the mean over all tokens of sum over the vocabulary of min(p, q).

        p and q are a softmax in float32 (of a float64 model float64), 0 counts where p is not finite. ``advance`` is
        told how many tokens are through. Raises WinnowError where the intact model's numbers are not finite.
        """
        sums = [0.0] * len(asked)
        for place, batch in enumerate(self._batches):
            if place == len(self._intact):
                self._intact.append(self._hidden(batch).cpu())
            with_fewer = []
            for kept in asked:
                with self._routers.keeping(kept):
                    with_fewer.append(self._hidden(batch))
            for part in self._slices(len(self._intact[place])):
                intact = self._probabilities(self._intact[place][part].to(with_fewer[0].device))
                if not intact.isfinite().all():
                    raise WinnowError(
                        "the model's logits are not finite: check its weights, or set model.dtype=float32"
                    )
                for number, hidden in enumerate(with_fewer):
                    shared = torch.minimum(intact, self._probabilities(hidden[part])).sum(-1)
                    sums[number] += float(shared.nan_to_num(0.0).cpu().double().sum())
            advance(batch.layout.tokens)
        return [found / self.tokens for found in sums]

    def _slices(self, positions: int) -> Iterator[slice]:
        at_once = max(1, LOGITS // self._decoder.vocabulary)
        return (slice(start, start + at_once) for start in range(0, positions, at_once))

    def _hidden(self, batch: Batch) -> Tensor:
        """(n, H): behind the decoder, without padding."""
        hidden = self._decoder.forward(**batch.inputs(self._decoder.device), use_cache=False)
        flat = hidden.flatten(0, 1)
        return flat[batch.layout.real.to(flat.device)] if batch.layout.padded else flat

    def _probabilities(self, hidden: Tensor) -> Tensor:
        logits = self._decoder.logits(hidden)
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)


@contextmanager
def remembered(
    comparison: Callable[[], Comparison],
    folder: Path,
    of: Mapping[str, Any],
    sequences: Sequence[TokenSequence],
    evaluations: int,
) -> Iterator[Overlap]:
    """``Comparison.overlaps``, where what has been looked at once is read from a file in ``folder``.

    ``of`` is what the numbers hang on besides ``sequences``, by content; ``comparison`` is made when it is needed. The
    file is written when all that was asked for at once is through, so an interrupted search goes on from there. A bar
    counts ``evaluations`` and shows the best so far.
    """
    told = {**of, "corpus": corpus_fingerprint(sequences), "versions": [torch.__version__, transformers.__version__]}
    file = folder / f"{content_key(told)}.json"
    known, best, opened = _read(file), 0.0, list[Comparison]()
    with progress.bar("search", evaluations) as bar:

        def overlap(asked: Sequence[Kept]) -> list[float]:
            nonlocal best
            before, tokens = bar.n, 0

            def advance(more: int) -> None:
                nonlocal tokens
                tokens += more
                bar.update(before + len(new) * tokens // opened[0].tokens - bar.n)

            names = [_name(kept) for kept in asked]
            new = {name: kept for name, kept in zip(names, asked, strict=True) if name not in known}
            if new:
                opened.extend([comparison()] if not opened else [])
                known.update(zip(new, opened[0].overlaps([*new.values()], advance), strict=True))
                _write(file, told, known)
            found = [known[name] for name in names]
            best = max(best, *found)
            bar.set_postfix_str(f"best {best:.6f}")
            bar.update(before + len(asked) - bar.n)
            return found

        yield overlap


def _name(kept: Kept) -> str:
    text = json.dumps({str(layer): list(map(int, experts)) for layer, experts in kept.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text())["overlaps"]
        return {name: float(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s): the search looks at everything anew", file, error)
        return {}


def _write(file: Path, told: Mapping[str, Any], known: dict[str, float]) -> None:
    """With what other searches on the same text have written meanwhile."""
    with claimed(file.with_suffix(".claim"), str(file)):
        known |= _read(file) | known
        write_files({file: json.dumps({"of": told, "overlaps": known}, indent=1).encode()})
