"""Layer diagnostics: what a plan does to each MoE layer by itself, measured on calibration text and set against theory.

Every layer of the compressed model is given what the layer of the original model is given, so no layer sees the errors
of those before it. The numbers lie beside the records, in ``diagnostics/CELL.json``: they need the plan and the
original model only, so cells that are finished already get them as well. The weights are those that the plan leaves,
not yet quantised.
"""

import gc
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from hydra.utils import get_method
from torch import Tensor
from transformers import PreTrainedModel

from harness import progress
from harness.calibration.batches import _batches
from harness.calibration.drive import _check_fit, _forward
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.load import load_model
from harness.contracts.intervals import bootstrap_mean
from harness.contracts.record import Score
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.files import write_files
from harness.layers import theory as measures
from harness.layers.theory import Estimated, GroupSums
from harness.records.store import RecordStore

log = logging.getLogger(__name__)

TASK = "layers"
DIAGNOSTICS_VERSION = 2  # 2: left_out, pairs and sample
_ELEMENTS = 2**24  # of the outputs of all experts that are held at once
_CHUNK = 1024  # tokens that a block is given at once


@dataclass
class Passed:
    """What went through the routed experts of one layer, token by token.

    ``hidden`` (T, H) is what the block was given, ``indices`` (T, k) are stored experts, ``gates`` (T, k) multiply
    their outputs, ``output`` (T, H) is the sum.
    """

    hidden: Tensor
    indices: Tensor
    gates: Tensor
    output: Tensor

    @staticmethod
    def joined(parts: Sequence["Passed"]) -> "Passed":
        names = ("hidden", "indices", "gates", "output")
        return Passed(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def dense_gates(self, experts: int) -> np.ndarray:
        """(T, E), 0 where an expert is not chosen; gate values that lead to one expert are added up."""
        dense = torch.zeros(len(self.gates), experts, dtype=torch.float64)
        return dense.scatter_add_(1, self.indices, self.gates.double()).numpy()


@dataclass
class Outputs:
    """Of all experts on all tokens: ``spread`` (T,), ``square_norms`` (T, E), and ``gram`` (E, E), the mean inner
    products."""

    spread: np.ndarray
    square_norms: np.ndarray
    gram: np.ndarray


@dataclass
class Original:
    """What is kept of a layer of the original model."""

    passed: Passed
    outputs: Outputs
    groups: dict[int, GroupSums] = field(default_factory=dict)


def diagnose_cell(
    config: Any, cell: Any, plan: Callable[[], Any], sequences: Callable[[], Sequence[TokenSequence]], root: Path
) -> None:
    """Writes ``diagnostics/CELL.json`` in ``root`` unless it is there; one process at a time works on it."""
    store, settings, model = RecordStore(root, "diagnostics"), config.diagnostics, config.model
    with store.claim(cell.id) as ours:
        if not ours:
            log.info("diagnostics of %s are there: skipped", cell.id)
            return
        found = diagnose(
            cell.model,
            plan(),
            sample(sequences(), settings.tokens),
            root / "cells" / cell.id / "diagnosed",
            lambda folder: load_model(folder, model.dtype, model.device),
            settings.pairs,
            config.calibration.batch_size,
        )
        told = {"version": DIAGNOSTICS_VERSION, "cell": cell.id, "corpus": config.calibration.name, **found}
        write_files({store.path(cell.id): json.dumps(told, indent=1).encode()})
        log.info("diagnostics: %s", store.path(cell.id))


def sample(sequences: Sequence[TokenSequence], tokens: int, seed: int = 0) -> list[TokenSequence]:
    """Whole sequences drawn at random until they have ``tokens``, or all; in the order of the corpus."""
    if type(tokens) is not int or tokens < measures.FOLDS:
        raise WinnowError(f"diagnostics.tokens must be a whole number of at least {measures.FOLDS}, not {tokens}")
    chosen, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(sequences)):
        if total >= tokens:
            break
        chosen.append(int(index))
        total += len(sequences[index].input_ids)
    return [sequences[index] for index in sorted(chosen)]


def diagnose(
    model: Path,
    plan: Any,
    sequences: Sequence[TokenSequence],
    scratch: Path,
    load: Callable[[Path], PreTrainedModel],
    pairs: int = 32,
    batch_size: int = 8,
) -> dict[str, Any]:
    """``tokens``, ``sample``, ``layers`` (layer -> its numbers) and ``scores`` of what ``plan`` does to the checkpoint
    ``model``. Numbers of one fold are of the same tokens wherever ``sample`` is the same.

    ``scratch`` holds the compressed checkpoint meanwhile. The two models are in memory one after the other; what the
    layers were given stays: tokens x layers x 2 H numbers. Raises WinnowError where a layer computes NaN or infinity.
    """
    family = family_of(read_config(model))
    reader = expert_weights_reader(model, family)
    sequences = sorted(sequences, key=lambda sequence: -len(sequence.input_ids))  # the order of batches
    folds = measures.folds_of([length for sequence in sequences for length in sequence.lengths])
    with progress.bar("layers before and after", 2 * len(plan.layers)) as bar:
        loaded = load(model)
        passed = observe(loaded, family, sequences, batch_size)
        before = {}
        for layer in plan.layers:
            before[layer.layer] = survey_original(
                _experts(loaded, family, layer.layer), passed[layer.layer], layer, folds
            )
            bar.update()
        del loaded
        gc.collect()
        try:
            apply_plan(model, plan, scratch, "compact", lower_top_k=True)
            compressed = load(scratch)
        finally:
            rmtree(scratch, ignore_errors=True)
        layers: dict[str, Any] = {}
        scores: list[Score] = []
        for layer in plan.layers:
            experts = _experts(compressed, family, layer.layer)
            original = before.pop(layer.layer)
            block = compressed.get_submodule(family.block.format(layer=layer.layer))
            after = replay(block, experts, original.passed.hidden)
            # Padding beside what is stored would count as an expert otherwise.
            outputs = survey(experts, original.passed.hidden, len(layer.experts))
            numbers = _layer(layer, original, after, outputs, folds)
            weights = _weights(layer, partial(reader, layer.layer), pairs)
            layers[str(layer.layer)] = numbers | weights
            scores += _scores(str(layer.layer), numbers | weights, len(after.gates))
            bar.update()
    tokens = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    known = {"tokens": len(tokens), "sample": hashlib.sha256(tokens.tobytes()).hexdigest()[:12]}
    return known | {"layers": layers, "scores": [asdict(score) for score in scores]}


# -- running the layers ------------------------------------------------------------------------------------------


def _experts(model: PreTrainedModel, family: Family, layer: int) -> Any:
    return model.get_submodule(family.block.format(layer=layer)).get_submodule(family.experts)


@contextmanager
def watching(experts: Any, real: Callable[[], Tensor | slice] = lambda: slice(None)) -> Iterator[list[Passed]]:
    """Meanwhile what goes through ``experts`` is kept, of the flat positions ``real()``."""
    parts: list[Passed] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept = real()
        hidden, indices, gates = args  # after any pre-hook: rows have been led to the stored experts
        # Copies: blocks add their shared experts to the same memory.
        parts.append(Passed(*(tensor[kept].detach().cpu().clone() for tensor in (hidden, indices, gates, output))))

    handle = experts.register_forward_hook(keep)
    try:
        yield parts
    finally:
        handle.remove()


@torch.inference_mode()
def observe(
    model: PreTrainedModel, family: Family, sequences: Sequence[TokenSequence], batch_size: int
) -> dict[int, Passed]:
    """What went through every MoE layer, padding left out; the same order of tokens in all layers."""
    _check_fit(model, sequences, family, batch_size)
    layers = family.moe_layers(model.config.to_dict())
    real = torch.zeros(0, dtype=torch.bool)
    with ExitStack() as stack:
        found = {layer: stack.enter_context(watching(_experts(model, family, layer), lambda: real)) for layer in layers}
        sources = sorted({source for sequence in sequences for source in sequence.sources})
        for batch in _batches(sequences, sources, batch_size):
            real = batch.layout.real
            _forward(model, batch)
    return {layer: Passed.joined(of_layer) for layer, of_layer in found.items()}


@torch.inference_mode()
def replay(block: Any, experts: Any, hidden: Tensor) -> Passed:
    """What goes through the experts when their block, router and all, is given ``hidden`` (T, H)."""
    device = experts.down_proj.device
    with watching(experts) as parts:
        for chunk in hidden.split(_CHUNK):
            block(chunk.unsqueeze(0).to(device))
    return Passed.joined(parts)


@torch.inference_mode()
def all_outputs(experts: Any, hidden: Tensor, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(tokens, outputs (count, n, H)) of every expert, chosen or not, a few tokens at a time; float64."""
    step = max(1, _ELEMENTS // (count * hidden.shape[1]))
    for start in range(0, len(hidden), step):
        chunk = hidden[start : start + step].to(experts.down_proj.device)
        gate = chunk.new_ones(len(chunk), 1)
        outputs = [
            experts.forward(chunk, torch.full((len(chunk), 1), expert, device=chunk.device), gate).double().cpu()
            for expert in range(count)
        ]
        yield slice(start, start + len(chunk)), torch.stack(outputs).numpy()


def survey(
    experts: Any,
    hidden: Tensor,
    count: int,
    visit: Callable[[slice, np.ndarray], None] = lambda tokens, outputs: None,
) -> Outputs:
    """``Outputs`` of ``count`` experts; ``visit`` sees all outputs on the way."""
    found = Outputs(np.zeros(len(hidden)), np.zeros((len(hidden), count)), np.zeros((count, count)))
    for tokens, outputs in all_outputs(experts, hidden, count):
        found.spread[tokens] = measures.spread(outputs)
        found.square_norms[tokens] = np.einsum("eth,eth->te", outputs, outputs)
        flat = outputs.reshape(count, -1)
        found.gram += flat @ flat.T / len(hidden)
        visit(tokens, outputs)
    return found


def survey_original(experts: Any, passed: Passed, layer: Any, folds: np.ndarray) -> Original:
    """``layer`` is the layer of the plan, whose merged groups are followed token by token; ``folds`` (T,)."""
    count = len(layer.route)
    gates = passed.dense_gates(count)
    groups = {new: GroupSums.empty(len(rows)) for new, rows in _rows(layer).items() if len(rows) > 1}

    def visit(tokens: slice, outputs: np.ndarray) -> None:
        for new, sums in groups.items():
            rows = _rows(layer)[new]
            sums.add(gates[tokens][:, rows], outputs[rows], folds[tokens])

    return Original(passed, survey(experts, passed.hidden, count, visit), groups)


# -- numbers of a layer ------------------------------------------------------------------------------------------


def _rows(layer: Any) -> dict[int, list[int]]:
    """New expert -> the old router rows that lead to it."""
    return {new: [row for row, to in enumerate(layer.route) if to == new] for new in range(len(layer.experts))}


def _is_predictable(layer: Any) -> bool:
    """The theory knows experts that are merged or removed, not channels that go."""
    rows = _rows(layer)
    return all(
        new.channels is None and set(rows[index]) <= {source.expert for source in new.sources}
        for index, new in enumerate(layer.experts)
    )


def _layer(layer: Any, before: Original, after: Passed, outputs: Outputs, folds: np.ndarray) -> dict[str, Any]:
    passed, rows = before.passed, _rows(layer)
    tokens = len(passed.gates)
    gates = passed.dense_gates(len(layer.route))
    error = (passed.output.double() - after.output.double()).pow(2).sum(1).numpy()
    if not np.isfinite(error).all():
        raise WinnowError(f"diagnostics: layer {layer.layer} computes NaN or infinity: check the model's weights")
    energy = measures.by_fold(passed.output.double().pow(2).sum(1).numpy(), folds)

    def estimate(name: str, function: Callable[[np.ndarray], float]) -> None:
        value, left_out = measures.leave_one_out(function, folds)
        found[name], found["left_out"][name] = measures.estimated(value, left_out), left_out

    found: dict[str, Any] = {
        "error_square": float(error.mean()),
        "output_square": float(energy.sum()) / tokens,
        "spread_before": float(before.outputs.spread.mean()),
        "spread_after": float(outputs.spread.mean()),
        "explained_before": measures.explained(before.outputs.gram),
        "explained_after": measures.explained(outputs.gram),
        "load_entropy_before": measures.load_entropy(np.bincount(passed.indices.reshape(-1).numpy())),
        "load_entropy_after": measures.load_entropy(np.bincount(after.indices.reshape(-1).numpy())),
        "singleton_share": float(np.mean([len(of_new) == 1 for of_new in rows.values()])),
        "largest_group": max(map(len, rows.values())),
        "rows": len(layer.route),
        "experts": len(layer.experts),
        "kept": [row for row, new in enumerate(layer.route) if new is not None] if layer.is_pruning else None,
        "left_out": {},  # without one fold at a time, in the order of the folds
    }
    estimate("measured_error", measures.ratio_of(measures.by_fold(error, folds), energy))
    spreads = (measures.by_fold(one.spread, folds) for one in (outputs, before.outputs))
    estimate("spread_ratio", measures.ratio_of(*spreads))
    total = float(energy.sum()) or 1.0
    everything = np.ones(measures.FOLDS)
    found["groups"] = []
    for new, sums in before.groups.items():
        covariance, gram = sums.moments(everything)
        found["groups"].append(
            {
                "rows": rows[new],
                "mass_square": float(sums.mass_square.sum()) / tokens,
                "policy_variability": measures.policy_variability(covariance),
                "functional_gap": measures.functional_gap(gram),
                "predicted_error": sums.error(everything) / total,
            }
        )
    if _is_predictable(layer):
        removed = [row for row, new in enumerate(layer.route) if new is None]
        lost = measures.by_fold(
            measures.pruning_error(gates[:, removed], before.outputs.square_norms[:, removed]), folds
        )
        estimate(
            "predicted_error",
            lambda use: (
                (float(use @ lost) + sum(sums.error(use) for sums in before.groups.values()))
                / (float(use @ energy) or 1.0)
            ),
        )
    return found


def _weights(layer: Any, reader: Callable[[int], ExpertWeights], count: int) -> dict[str, Any]:
    """Weight distances and overlaps: of merged experts and the one that weighs most, and of average pairs.

    ``pairs`` names the former: [new expert, old expert that weighs most, other old expert].
    """
    grouped, of_group = [], []
    for place, new in enumerate(layer.experts):
        first = max(new.sources, key=lambda source: source.weight).expert
        others = [source.expert for source in new.sources if source.expert != first]
        grouped += [(first, other) for other in others]
        of_group += [place] * len(others)
    if not grouped:
        return {}
    align = get_method("methods.alignment.align_channels")
    read = lru_cache(maxsize=2)(reader)
    average = measures.random_pairs(len(layer.route), count)
    compared = {
        f"{kind}{name}": values
        for kind, chosen in (("", grouped), ("average_", average))
        for name, values in measures.compare_pairs(read, chosen, align).items()
    }
    return compared | {"pairs": [[group, *pair] for group, pair in zip(of_group, grouped, strict=True)]}


_ESTIMATED = ("measured_error", "predicted_error", "spread_ratio")
_COUNTED = ("singleton_share", "largest_group")
_OF_PAIRS = tuple(f"{kind}{name}" for kind in ("", "average_") for name in ("distance", "aligned_distance", "overlap"))


def _scores(layer: str, numbers: Mapping[str, Any], tokens: int) -> list[Score]:
    """``n`` is tokens, pairs of experts, or (of counts, which have no error) groups."""
    scores = [
        Score(TASK, name, *_with_n(numbers[name], tokens), domain=layer, higher_is_better=name == "spread_ratio")
        for name in _ESTIMATED
        if name in numbers
    ]
    for name in _COUNTED:
        value = float(numbers[name])
        scores.append(Score(TASK, name, value, numbers["experts"], value, value, layer))
    for name in _OF_PAIRS:
        if values := numbers.get(name):
            interval = bootstrap_mean(values)
            better = name.endswith("overlap")
            scores.append(Score(TASK, name, float(np.mean(values)), len(values), *interval, layer, better))
    return [score for score in scores if math.isfinite(score.value)]


def _with_n(estimated: Estimated, n: int) -> tuple[float, int, float, float]:
    value, low, high = estimated
    return value, n, low, high
