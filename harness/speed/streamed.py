"""Calibration one layer at a time: what it costs, and a model that is larger than memory.

``python -m harness.speed.streamed``: time of a streamed pass against that of a whole model, weights in memory, and its
peak memory against that of what it holds, on a random Qwen3-MoE that fits. Exits with status 1 where a bar is missed.

``python -m harness.speed.streamed --gib 29``: a random checkpoint of Qwen3-30B-A3B's shape, with as many layers as make
so many GiB in bf16, goes through calibration, decision, rewriting and quantisation, and what comes out is compared.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
import transformers
from omegaconf import OmegaConf

from harness import progress
from harness.apart import apart
from harness.calibration.calibrate import to_statistics
from harness.calibration.collect import collect
from harness.calibration.streamed import Model, StreamedModel, open_for_pass
from harness.calibration.tokens import TokenSequence
from harness.checkpoints import packed_weights as packed
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.footprint import anatomy_of_config
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.writer import Output, write_shards
from harness.contracts.plan import CompressionPlan
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from harness.speed.calibration import COVERAGE, report
from harness.speed.memory import Peak, peak_memory
from methods.prune_experts import ExpertPruning

MAX_TIME_RATIO = 1.15
MAX_MEMORY_RATIO = 1.3
MAX_RESIDENT_GIB = 6.0
_GIB = 2**30
_FAMILY = FAMILIES["qwen3_moe"]
_REAP = ExpertPruning("reap", "reap")
_STATISTICS = COVERAGE | _REAP.requires
_SMALL: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 2048,
    "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 512, "tie_word_embeddings": False,
    "dtype": "float32",
}  # fmt: skip
_LARGE = Path(__file__).parents[2] / "conf" / "model" / "qwen3_30b_a3b.yaml"
_LENGTH = 512
_SHARD = 4 * 10**9  # bytes, about as large as those of the hub


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of calibration one layer at a time.")
    parser.add_argument("--gib", type=float, help="calibrate, prune and quantise a model of so many GiB")
    parser.add_argument("--folder", type=Path, help="where its files go meanwhile (default: TMPDIR)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; the medians are compared")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        holder = tempfile.TemporaryDirectory(prefix="winnow-streamed-", dir=options.folder)
        with progress.showing(False), holder as scratch:
            passed = cost(Path(scratch), options.repeats) if options.gib is None else proof(Path(scratch), options.gib)
    except WinnowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(passed) else 1


# --- time and memory on a model that fits -----------------------------------------------------------------------------


def cost(scratch: Path, repeats: int) -> list[bool]:
    """20 x 512 tokens, float32. The whole model comes first: streaming sets how the process takes memory
    (``harness.checkpoints.heap``), which would make a whole model slower as well."""
    write_random(scratch / "model", _SMALL)
    sequences = random_tokens(20, _SMALL["vocab_size"])
    held, peak = apart("memory of a streamed pass", _held_and_peak, scratch / "model", sequences)
    parts = ", ".join(f"{name} {_mb(size)} MB" for name, size in held.items())
    print(f"memory: {parts}; peak of the process {_mb(peak)} MB more than before (own memory, without mapped files)")
    whole = open_for_pass(scratch / "model", "float32", stream="never")
    work: dict[str, Callable[[], Model]] = {
        "whole": lambda: whole,
        "streamed": lambda: open_for_pass(scratch / "model", "float32", stream="always", state=scratch / "state"),
    }
    median = {name: statistics.median(_seconds(opened, sequences, repeats)) for name, opened in work.items()}
    print(
        f"time: whole model {median['whole']:.2f} s, its weights in memory; streamed {median['streamed']:.2f} s, with "
        f"opening, reading and saving (median of {repeats}, {len(sequences) * _LENGTH} tokens, "
        f"{_SMALL['num_hidden_layers']} layers, {torch.get_num_threads()} threads)"
    )
    return [
        report("streamed pass, time", median["streamed"] / median["whole"], MAX_TIME_RATIO, "x whole model"),
        report(
            "streamed pass, peak memory", peak / sum(held.values()), MAX_MEMORY_RATIO,
            "x (one layer + embedding + hidden states)",
        ),
    ]  # fmt: skip


def _seconds(opened: Callable[[], Model], sequences: Sequence[TokenSequence], repeats: int) -> list[float]:
    """Of passes behind a first one, which loads what is loaded once."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        collect(opened(), sequences, _FAMILY, _STATISTICS)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def _held_and_peak(folder: Path, sequences: Sequence[TokenSequence]) -> tuple[dict[str, int], int]:
    """Bytes of what a streamed pass holds, and its peak: in batches of one sequence, which take little besides.

    Runs in a process of its own, which has freed nothing before that could be taken again.
    """

    def calibrate(some: Sequence[TokenSequence]) -> StreamedModel:
        model = open_for_pass(folder, "float32", stream="always")
        assert isinstance(model, StreamedModel)
        collect(model, some, _FAMILY, _STATISTICS, 1)
        return model

    calibrate(sequences[:1])  # what any first pass loads stays out of the numbers
    gc.collect()
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        model = calibrate(sequences).model
    hidden = sum(len(one.input_ids) for one in sequences) * _SMALL["hidden_size"] * 4
    held = {"a layer": model.layer_bytes(), "embedding": model.other_bytes(), "hidden states": hidden}
    return held, peak.own - before.own


# --- a model that is larger than memory -------------------------------------------------------------------------------


def proof(scratch: Path, gib: float) -> list[bool]:
    config = {**_architecture(), "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    config["num_hidden_layers"] = _layers_for(config, int(gib * _GIB))
    total = _bytes(config)
    needed, free = 2 * total, disk_usage(scratch).free  # the model, half of it, and the quantised half
    if needed > free:
        raise WinnowError(
            f"{needed / _GIB:.1f} GiB of disk are needed, and {scratch.parent} has {free / _GIB:.1f}: free some, or "
            "give another --folder"
        )
    memory = _memory()
    print(
        f"{time.strftime('%Y-%m-%d')}: Qwen3-30B-A3B's shape, {config['num_hidden_layers']} layers, "
        f"{total / _GIB:.1f} GiB in bf16; the machine has {memory / _GIB:.1f} GiB of memory; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    peaks: dict[str, Peak] = {}
    with _stage("write at random", peaks):
        write_random(scratch / "model", config)
    sequences = random_tokens(16, int(config["vocab_size"]))
    with _stage("calibrate", peaks):
        model = open_for_pass(scratch / "model", "bfloat16", memory_gib=5, state=scratch / "state")
        print(f"  calibration.stream=auto: {'one layer at a time' if isinstance(model, StreamedModel) else 'whole'}")
        collected = collect(model, sequences, _FAMILY, _STATISTICS, batch_size=2)
        del model
    print(
        f"  {collected.tokens} tokens, {len(collected.layers)} layers, {len(collected.names)} statistics: "
        f"{', '.join(sorted(collected.names))}"
    )
    with _stage("decide", peaks):
        weights = expert_weights_reader(scratch / "model", _FAMILY)
        plan = _REAP.decide(to_statistics(collected, weights), Fraction(1, 2), 0).plan
    with _stage("apply", peaks):
        sizes = apply_plan(scratch / "model", plan, scratch / "pruned")
    print(f"  {sizes['weight_bytes_before'] / _GIB:.1f} -> {sizes['weight_bytes'] / _GIB:.1f} GiB")
    with _stage("quantise", peaks):
        told = quantize_checkpoint(scratch / "pruned", scratch / "int4", Quantization("int4", 4))
    print(f"  {sizes['weight_bytes'] / _GIB:.1f} -> {told['weight_bytes'] / _GIB:.1f} GiB")
    with _stage("compare", peaks):
        ends = (0, int(config["num_hidden_layers"]) - 1)
        same = [
            compare(scratch / "model", plan, ModelByLayer(scratch / name, "bfloat16"), ends, lambda tensor: tensor)
            if name == "pruned"
            else compare(scratch / "model", plan, ModelByLayer(scratch / name, "bfloat16"), ends, _rounded)
            for name in ("pruned", "int4")
        ]
    print(f"  first and last layer, {same[0]} and {same[1]} tensors: those that the plan names, bit by bit")
    return [
        report(f"{name}, resident memory", peaks[name].own / _GIB, MAX_RESIDENT_GIB, "GiB (RssAnon + RssShmem)")
        for name in ("calibrate", "decide", "apply", "quantise", "compare")
    ]


def compare(
    source: Path,
    plan: CompressionPlan,
    result: ModelByLayer,
    layers: Sequence[int],
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> int:
    """How many tensors of ``layers`` are what ``plan`` makes of ``source``; raises WinnowError where one is not.

    ``stored`` is what becomes of an expert's matrix as it is stored.
    """
    reader, compared = CheckpointReader(source), 0

    def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal compared
        if not torch.equal(found, expected):
            raise WinnowError(f"{result.folder}: {name} is not what the plan says")
        compared += 1

    for layer in result.layers(layers):
        block = moe_block(result.skeleton, _FAMILY, layer)
        of = next(each for each in plan.layers if each.layer == layer)
        kept = [row for row, new in enumerate(of.route) if new is not None]
        prefix = f"model.layers.{layer}"
        check("router", block.router.weight, reader.tensor(f"{prefix}.mlp.gate.weight")[kept])
        for new, expert in enumerate(of.experts):
            (old,) = expert.sources
            names = (f"{prefix}.mlp.experts.{old.expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
            gate, up, down = (stored(reader.tensor(name)) for name in names)
            check(f"expert {new} of layer {layer}", block.experts.gate_up_proj[new], torch.cat([gate, up]))
            check(f"expert {new} of layer {layer}", block.experts.down_proj[new], down)
        query = block.decoder_layer.self_attn.q_proj.weight
        check("attention", query, reader.tensor(f"{prefix}.self_attn.q_proj.weight"))
        reader.let_go()
    return compared


def _rounded(matrix: torch.Tensor) -> torch.Tensor:
    scheme = packed.Scheme(4, True, 32)
    return packed.unpacked(packed.packed_parts(matrix, scheme), scheme)


@contextmanager
def _stage(name: str, peaks: dict[str, Peak]) -> Iterator[None]:
    gc.collect()
    started = time.perf_counter()
    with peak_memory() as peaks[name]:
        yield
    own, resident = peaks[name].own / _GIB, peaks[name].resident / _GIB
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.0f} s, at most {own:.2f} GiB of its own, {resident:.2f} with mapped files", flush=True)


# --- checkpoints and tokens at random ---------------------------------------------------------------------------------


def random_tokens(count: int, vocabulary: int) -> list[TokenSequence]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, _LENGTH))
    return [TokenSequence(row, (_LENGTH,), ("random",)) for row in ids]


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of ``config``, matrices of deviation 0.02 and norms of 1, a shard after the other."""
    shapes = anatomy_of_config(config).headers.shapes
    dtype = getattr(torch, config["dtype"])
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        if len(shape) == 1:
            return lambda: torch.ones(shape, dtype=dtype)
        return lambda: torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)

    shards: list[list[Output]] = [[]]
    room = _SHARD
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD
        room -= size
        shards[-1].append(Output(name, name, made(shape)))
    folder.mkdir(parents=True)
    told = {**config, "architectures": ["Qwen3MoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    write_shards(folder, shards, "")


def _architecture() -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(_LARGE))
    assert isinstance(found, dict)
    return dict(found["architecture"])


def _bytes(config: dict[str, Any]) -> int:
    return anatomy_of_config(config).headers.total_bytes


def _layers_for(config: dict[str, Any], size: int) -> int:
    """As many layers as come nearest to ``size`` bytes."""
    one, two = (_bytes({**config, "num_hidden_layers": count}) for count in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def _memory() -> int:
    told = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(told.split()[1]) * 1024


def _mb(size: int) -> str:
    return f"{size / 10**6:.0f}"


if __name__ == "__main__":
    # By the name that another process can import: what runs in one cannot lie in the main module.
    from harness.speed import streamed

    sys.exit(streamed.main())
