"""The memory that each stage of a cell takes at most, and among how many GPUs it can be shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.backends.decoding import CACHED_TOKENS
from harness.backends.scoring import LOGITS
from harness.backends.vllm import RESERVED
from harness.backends.vllm_guard import reason_against_sharing
from harness.calibration.streamed import MARGIN, STACKING
from harness.cells.search import cost
from harness.checkpoints.config import config_integer
from harness.checkpoints.footprint import (
    Anatomy,
    activation_bytes,
    cache_bytes_per_token,
    dtype_named,
    embedding_bytes,
    expert_bytes_float32,
    layer_bytes,
)
from harness.contracts.layerwise import LayerwiseMethod
from harness.contracts.recovery import Fit, Recalibration
from harness.contracts.search import Search
from harness.layerwise.look import ELEMENTS
from harness.text import human

GPUS = range(1, 9)  # of one machine
USABLE = 0.95  # of a GPU's memory; the driver's context and what the allocator cannot give take the rest
_COPIES_OF_CHUNK = 3  # of the outputs of all experts: the model's own, in float64, and as unit vectors
_COPIES_OF_LOGITS = 4  # of a slice: probabilities of both models, and two on the way to them
STEP = 8192  # tokens that vLLM computes at once, unless it is told otherwise


@dataclass(frozen=True)
class Stage:
    """``spread``: bytes that several GPUs share, in pieces of ``piece``; ``each``: bytes that every one of them takes;
    ``cache``: bytes that up to ``heads`` GPUs share. ``counts``: how many GPUs can share it, none where it takes the
    host's memory alone. ``share``: how much of a GPU's memory it may take. ``parts`` says what it is made of."""

    name: str
    parts: str
    spread: int = 0
    each: int = 0
    cache: int = 0
    heads: int = 1
    piece: int = 0
    counts: Sequence[int] = ()
    share: float = USABLE

    @property
    def bytes(self) -> int:
        return self.spread + self.cache + self.each

    def on_each(self, count: int) -> int:
        """Bytes on the fullest of ``count`` GPUs."""
        shared = self.spread if count == 1 else -(-self.spread // count) + self.piece
        return shared + self.cache // min(count, self.heads) + self.each

    def fewest(self, gigabytes: float) -> int | None:
        """How many GPUs of that size hold it; None where all of a machine do not."""
        room = self.share * gigabytes * 10**9
        return next((count for count in self.counts if self.on_each(count) <= room), None)


def loaded_bytes(model: Anatomy, dtype: str) -> int:
    if dtype == "auto":
        return model.headers.total_bytes
    return model.headers.parameters * dtype_named(dtype).itemsize


def itemsize_of(model: Anatomy, dtype: str) -> int:
    return max(1, round(loaded_bytes(model, dtype) / model.headers.parameters))


def calibration(settings: Mapping[str, Any], model: Anatomy, dtype: str, statistics: int) -> list[Stage]:
    """Of the whole model, and of one layer at a time; which of them calibration.stream allows."""
    loaded, itemsize = loaded_bytes(model, dtype), itemsize_of(model, dtype)
    batch, length = settings["batch_size"], settings["max_length"]
    activations = activation_bytes(model, batch * length, itemsize)
    computed = f"activations at most {human(activations)} ({batch} x {length} tokens), statistics {human(statistics)}"
    layer = layer_bytes(model) * loaded // model.headers.total_bytes
    embedding = embedding_bytes(model, itemsize)
    stacked = int(STACKING * layer)
    whole = Stage(
        "calibration", f"weights {human(loaded)}, {computed}",
        spread=loaded + statistics, each=activations, piece=layer, counts=GPUS,
    )  # fmt: skip
    by_layer = Stage(
        "calibration by layer",
        f"one layer while it is loaded {human(stacked)}, embedding {human(embedding)}, {computed}; "
        f"{_hidden_states(settings, model, itemsize)}",
        each=stacked + embedding + activations + statistics, counts=(1,),
    )  # fmt: skip
    stream = settings.get("stream", "auto")
    return [whole] if stream == "never" else [by_layer] if stream == "always" else [whole, by_layer]


def search(settings: Mapping[str, Any], model: Anatomy, dtype: str, asked: Search) -> Stage:
    """Of a budget that is searched on the whole model; what it costs in forwards."""
    loaded, itemsize = loaded_bytes(model, dtype), itemsize_of(model, dtype)
    layers = len(model.family.moe_layers(model.config))
    positions = settings["batch_size"] * settings["max_length"]
    activations = activation_bytes(model, positions, itemsize)
    hidden = asked.at_once(layers) * positions * config_integer(model.config, "hidden_size") * itemsize
    logits = _COPIES_OF_LOGITS * 4 * min(LOGITS, positions * config_integer(model.config, "vocab_size"))
    parts = (
        f"weights {human(loaded)}, activations at most {human(activations)}, hidden states of {asked.at_once(layers)} "
        f"budgets at most {human(hidden)}, logits {human(logits)}; {cost(asked, layers, asked.samples)} or fewer"
    )
    layer = layer_bytes(model) * loaded // model.headers.total_bytes
    return Stage("search", parts, spread=loaded, each=activations + hidden + logits, piece=layer, counts=GPUS)


def layer_by_layer(settings: Mapping[str, Any], model: Anatomy, dtype: str, method: LayerwiseMethod) -> Stage:
    """Of a method that decides layer by layer: two passes, and every expert on every token of a sample."""
    itemsize, hidden = itemsize_of(model, dtype), config_integer(model.config, "hidden_size")
    layer, fixed = _by_layer(settings, model, dtype)
    chunk = _COPIES_OF_CHUNK * 8 * ELEMENTS
    limit = None if method.every_token else settings.get("all_tokens")
    kept = f"a layer's inputs of {'all' if limit is None else f'{limit:,}'} tokens"
    a_token = (hidden + model.num_experts) * itemsize
    parts = (
        f"{fixed}, every expert on some tokens at once at most {human(chunk)}; on the host {kept} ({human(a_token)} "
        f"each), and {_hidden_states(settings, model, itemsize)}; two passes over the text"
    )
    return Stage("layer by layer", parts, each=layer + chunk, counts=(1,))


def refit(settings: Mapping[str, Any], model: Anatomy, dtype: str, fits: Sequence[Fit]) -> Stage:
    """Of the intact model by layer, whose inputs of one layer stay until it is fitted."""
    itemsize, hidden = itemsize_of(model, dtype), config_integer(model.config, "hidden_size")
    tokens = _fitted_tokens(settings, max(fit.tokens for fit in fits))
    kept = 2 * tokens * hidden * itemsize
    joint = any(fit.name == "joint" for fit in fits)
    outputs = tokens * hidden * (2 * 4 + (8 if joint else 0))
    sums = 8 * model.width * (model.width + 2 * hidden) * (model.num_experts if joint else 1)
    layer, fixed = _by_layer(settings, model, dtype)
    parts = (
        f"{fixed}, outputs of {tokens:,} tokens {human(outputs)}, sums {human(sums)}; on the host hidden states and "
        f"inputs of a layer {human(kept)}"
    )
    return Stage("refit", parts, each=layer + outputs + sums, counts=(1,))


def router(settings: Mapping[str, Any], model: Anatomy, dtype: str, asked: Recalibration) -> Stage:
    """Of the intact and the compressed model side by side, each by layer."""
    itemsize, hidden = itemsize_of(model, dtype), config_integer(model.config, "hidden_size")
    tokens = _fitted_tokens(settings, asked.tokens)
    kept = tokens * (2 * hidden * itemsize + 4 * model.num_experts)
    sums = 2 * 8 * hidden * (hidden + model.num_experts)
    layer, fixed = _by_layer(settings, model, dtype)
    parts = (
        f"twice {fixed}; of {tokens:,} tokens hidden states and logits on the host {human(kept)}; sums {human(sums)}"
    )
    return Stage("router", parts, each=2 * layer + kept + sums, counts=(1,))


def _fitted_tokens(settings: Mapping[str, Any], most: int) -> int:
    """At most; held-out text comes on top."""
    count = settings.get("max_blocks") if settings.get("packing") else settings.get("num_sequences")
    return most if count is None else min(most, count * settings["max_length"])


def _by_layer(settings: Mapping[str, Any], model: Anatomy, dtype: str) -> tuple[int, str]:
    """Bytes of a model that is read one layer at a time, and what they are."""
    loaded, itemsize = loaded_bytes(model, dtype), itemsize_of(model, dtype)
    stacked = int(STACKING * layer_bytes(model) * loaded // model.headers.total_bytes)
    embedding = embedding_bytes(model, itemsize)
    activations = activation_bytes(model, settings["batch_size"] * settings["max_length"], itemsize)
    parts = f"one layer while it is loaded {human(stacked)}, embedding {human(embedding)}, activations at most "
    return stacked + embedding + activations, f"{parts}{human(activations)}"


def where_it_streams(settings: Mapping[str, Any], model: Anatomy, dtype: str) -> str:
    """What calibration.stream makes of the two ways."""
    stream = settings.get("stream", "auto")
    if stream != "auto":
        return f"calibration.stream={stream}"
    least = MARGIN * loaded_bytes(model, dtype)
    return f"calibration.stream=auto: by layer where less than {human(least)} of the devices' memory is free"


def _hidden_states(settings: Mapping[str, Any], model: Anatomy, itemsize: int) -> str:
    count = settings.get("max_blocks") if settings.get("packing") else settings.get("num_sequences")
    limit = "" if settings.get("memory_gib") is None else f" {settings['memory_gib']} GiB"
    if count is None:
        return f"on the host hidden states of parts of the corpus that fit{limit}"
    whole = count * settings["max_length"] * config_integer(model.config, "hidden_size") * itemsize
    return f"on the host hidden states, at most {human(whole)} of the whole corpus or of parts that fit{limit}"


def decide(model: Anatomy, statistics: int) -> Stage:
    expert = expert_bytes_float32(model)
    parts = f"statistics {human(statistics)}, one expert in float32 {human(expert)}"
    return Stage("decide", parts, each=statistics + expert)


def apply(model: Anatomy) -> Stage:
    expert, shard = expert_bytes_float32(model), model.largest_shard
    parts = f"the largest shard {human(shard)}, one expert in float32 {human(expert)}"
    return Stage("apply", parts, each=shard + expert)


def evaluation(name: str, backend: Mapping[str, Any], model: Anatomy, dtype: str, length: int, known: str) -> Stage:
    """``length``: tokens of the longest sequence, ``known`` from where."""
    options = backend["open"]
    on_vllm = backend["name"] == "vllm"
    loaded, itemsize = loaded_bytes(model, dtype), itemsize_of(model, dtype)
    a_token = cache_bytes_per_token(model, itemsize)
    layer = layer_bytes(model) * loaded // model.headers.total_bytes
    if not on_vllm and options.get("stream"):
        stacked, ends = int(STACKING * layer), 2 * embedding_bytes(model, itemsize)
        parts = f"one layer while it is loaded {human(stacked)}, embedding and head {human(ends)}, backend hf by layer"
        return Stage(name, parts, each=stacked + ends, counts=(1,))
    if not on_vllm:
        batch = options.get("batch_size", 1)
        tokens = min(batch * length, max(CACHED_TOKENS, length))
        of = f"{batch} x {length} tokens" if tokens == batch * length else f"{tokens} tokens"
        cache = a_token * tokens
        parts = f"KV cache at most {human(cache)} ({of} of {human(a_token)}; {known})"
        return Stage(
            name, f"weights {human(loaded)}, {parts}, backend {backend['name']}",
            spread=loaded + cache, piece=layer, counts=GPUS,
        )  # fmt: skip
    step = int((options.get("engine") or {}).get("max_num_batched_tokens", STEP))
    activations = activation_bytes(model, step, itemsize)
    if options.get("kv_cache_gib"):
        cache = int(options["kv_cache_gib"] * 2**30)
        parts = f"KV cache {human(cache)}, for {cache // max(a_token, 1):,} tokens"
    else:  # vLLM takes for its cache what its share of the device leaves
        cache = a_token * (length + RESERVED)
        of = f"one sequence of {length + RESERVED} tokens of {human(a_token)}; {known}"
        parts = f"KV cache at least {human(cache)} ({of})"
    return Stage(
        name, f"weights {human(loaded)}, {parts}, activations about {human(activations)}, backend vllm",
        spread=loaded, each=activations, cache=cache, heads=_cache_heads(model),
        counts=[count for count in GPUS if not reason_against_sharing(model.config, count)],
        share=float(options.get("gpu_memory_utilization", 0.9)),
    )  # fmt: skip


def _cache_heads(model: Anatomy) -> int:
    """Among how many GPUs vLLM shares the cache: the key-value heads; latents lie on all of them."""
    if model.family.latent_keys and model.config.get(model.family.latent_keys[0]):
        return 1
    return int(model.config.get("num_key_value_heads") or model.config["num_attention_heads"])
