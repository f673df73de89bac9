"""Layer diagnostics: what a plan does to each MoE layer by itself, measured on calibration text and set against theory.

Every layer of the compressed model is given what the layer of the original model is given, so no layer sees the errors
of those before it. The weights are those that the plan leaves, not yet quantised.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from harness import progress
from harness.calibration.batches import in_order_of_pass
from harness.calibration.drive import drive, visit
from harness.calibration.streamed import Model, StreamedModel
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.contracts.plan import CompressionPlan
from harness.contracts.record import Score
from harness.errors import WinnowError
from harness.families.moe_block import MoeBlock
from harness.families.table import family_of
from harness.layers.numbers import output_numbers, scores, weight_numbers
from harness.layers.theory import FOLDS, Align, folds_of
from harness.layers.watch import Watch, replay, survey


def sample(sequences: Sequence[TokenSequence], tokens: int, seed: int = 0) -> list[TokenSequence]:
    """Whole sequences drawn at random until they have ``tokens``, or all; in the order of the corpus."""
    if type(tokens) is not int or tokens < FOLDS:
        raise WinnowError(f"diagnostics.tokens must be a whole number of at least {FOLDS}, not {tokens}")
    chosen, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(sequences)):
        if total >= tokens:
            break
        chosen.append(int(index))
        total += len(sequences[index].input_ids)
    return [sequences[index] for index in sorted(chosen)]


def diagnose(
    model: Path,
    plan: CompressionPlan,
    sequences: Sequence[TokenSequence],
    scratch: Path,
    load: Callable[[Path], Model],
    align: Align,
    pairs: int = 32,
    batch_size: int = 8,
) -> dict[str, Any]:
    """``tokens``, ``sample``, ``layers`` (layer -> its numbers) and ``scores`` of what ``plan`` does to the checkpoint
    ``model``. Numbers of one fold are of the same tokens wherever ``sample`` is the same.

    ``scratch`` holds the compressed checkpoint meanwhile. The two models are in memory one after the other; what the
    layers were given stays: tokens x layers x 2 H numbers. Where ``load`` gives the original model one layer at a time,
    each layer is compared while it is there, and only its own tokens stay. ``align`` gives the best order of one
    expert's channels beside another's; ``pairs`` of experts are compared at random. Raises WinnowError where a layer
    computes NaN or infinity.
    """
    family = family_of(read_config(model))
    reader = expert_weights_reader(model, family)
    sequences = in_order_of_pass(sequences)
    folds = folds_of([length for sequence in sequences for length in sequence.lengths])
    layers: dict[str, Any] = {}
    found: list[Score] = []
    watches: dict[int, Watch] = {}

    def look(index: int, block: MoeBlock) -> None:
        watch = watches[index]
        layer, original = watch.plan, watch.original
        after = replay(block, original.passed.hidden)
        # Padding beside what is stored would count as an expert otherwise.
        standins = getattr(block.experts, "standins", None)
        count = len(layer.experts) if standins is None else standins.experts
        outputs = survey(block.experts, original.passed.hidden, count)
        numbers = output_numbers(layer, original, after, outputs, folds)
        numbers |= weight_numbers(layer, partial(reader, index), align, pairs)
        layers[str(index)] = numbers
        found.extend(scores(index, numbers, len(after.gates)))
        del watch.original  # what the layer was given takes the most memory
        bar.update()

    @contextmanager
    def compressed() -> Iterator[Model]:
        try:
            apply_plan(model, plan, scratch, "compact", lower_top_k=True)
            yield load(scratch)
        finally:
            rmtree(scratch, ignore_errors=True)

    def watch_all(before: Model, done: Callable[[int], object]) -> None:
        watches.update({layer.layer: Watch(layer, folds, partial(done, layer.layer)) for layer in plan.layers})
        drive(before, family, sequences, list(watches.values()), batch_size)

    with progress.bar("layers before and after", 2 * len(plan.layers)) as bar:
        before = load(model)
        if isinstance(before, StreamedModel):
            with compressed() as after:

                def compare(index: int) -> None:
                    bar.update()
                    visit(after, family, [index], look)

                watch_all(before, compare)
        else:
            watch_all(before, lambda index: bar.update())
            del before
            gc.collect()
            with compressed() as after:
                visit(after, family, list(watches), look)
    tokens = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    known = {"tokens": len(tokens), "sample": hashlib.sha256(tokens.tobytes()).hexdigest()[:12]}
    return known | {"layers": layers, "scores": [asdict(score) for score in found]}
