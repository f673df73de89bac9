"""Carve a dense model into an MoE that computes the same: ``python -m harness.tools.carve DENSE OUT --experts 8``.

DENSE is a checkpoint folder of a Llama, Mistral or Qwen2 model, or a GGUF file of one (``pip install gguf``). The
neurons of each MLP are dealt to the E experts of a Qwen2-MoE layer, whose router is zeros and chooses all of them
(top-k = E): every gate value is 1/E, and the down projections are E times what they were. The shared expert that the
architecture wants is zeros. The logits are the dense model's up to rounding; where E is a power of two, no weight is
rounded.

A real language model to try benchmarks and pruning of channels on. Of experts it teaches nothing: they share no neuron,
every token uses them all, and with top-k = E none can be removed or merged.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig
from transformers.utils import logging as transformers_logging

from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.writer import copy_companions, written_atomically
from harness.errors import WinnowError
from harness.families.dense import check_dense
from harness.families.table import family_of

SHARED_WIDTH = 8
_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# What --check compares the two models on.
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
)


@dataclass(frozen=True)
class Source:
    """A dense model on disk: ``options`` are what transformers needs besides the folder to read it."""

    folder: Path
    options: Mapping[str, Any]

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options

    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder, **self.options)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, **self.options, dtype=torch.float32)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint: of a folder as they are stored, of a GGUF file in float32."""
        if self.is_gguf:
            model = self.model()
            tied = model.config.tie_word_embeddings
            return {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
        reader = CheckpointReader(self.folder)
        return {name: reader.tensor(name) for name in reader.names() if not name.endswith("rotary_emb.inv_freq")}

    def copy_tokenizer(self, target: Path) -> None:
        """Tokenizer, chat template and whatever else lies beside the weights."""
        if self.is_gguf:
            AutoTokenizer.from_pretrained(self.folder, **self.options).save_pretrained(target)
        else:
            copy_companions(self.folder, target)


def source_at(path: Path) -> Source:
    """Raises WinnowError where there is no dense model at ``path``, or what reads it is not installed."""
    if path.is_file() and path.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise WinnowError(f"{path} needs the package gguf: pip install gguf")
        return Source(path.parent, {"gguf_file": path.name})
    read_config(path)
    return Source(path, {})


def carved_config(config: Any, experts: int) -> Qwen2MoeConfig:
    """The Qwen2-MoE settings for a dense model with this config.

    Raises WinnowError for an architecture, or a setting of one, that Qwen2-MoE cannot compute.
    """
    check_dense(config)
    neurons, heads = config.intermediate_size, config.num_attention_heads
    if experts < 1 or neurons % experts:
        fitting = [str(count) for count in range(2, 65) if neurons % count == 0]
        raise WinnowError(f"{neurons} neurons do not divide among {experts} experts; of 2 to 64: {', '.join(fitting)}")
    if (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads != config.hidden_size:
        raise WinnowError(f"cannot carve it: its {heads} attention heads are not {config.hidden_size} wide together")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise WinnowError(f"cannot carve it: Qwen2-MoE has no attention like its sliding_window={window}")
    return Qwen2MoeConfig(
        **{name: getattr(config, name) for name in _SETTINGS},
        num_experts=experts,
        num_experts_per_tok=experts,
        moe_intermediate_size=neurons // experts,
        shared_expert_intermediate_size=SHARED_WIDTH,
        norm_topk_prob=False,
    )


def carved_weights(dense: Mapping[str, Tensor], config: Qwen2MoeConfig, seed: int | None = None) -> dict[str, Tensor]:
    """The tensors of the carved model, named as on the hub, in the dense one's dtype.

    ``seed``: the neurons are dealt in random order, another in each layer; None: expert e gets the e-th block of them.
    Raises WinnowError for a tensor that Qwen2-MoE has no place for (biases but those of queries, keys and values).
    """
    carved = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    homeless = [n for n in dense if n.endswith(("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"))]
    if homeless:
        raise WinnowError(f"cannot carve it: Qwen2-MoE has no place for its {homeless[0]}")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj"):
            weight = dense[f"{prefix}self_attn.{projection}.weight"]
            # vLLM's Qwen2-MoE has these biases whatever the config says.
            carved.setdefault(f"{prefix}self_attn.{projection}.bias", weight.new_zeros(len(weight)))
        gate, up, down = (dense[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        shuffle = None if seed is None else torch.Generator().manual_seed(seed * 10_000 + layer)
        experts = _experts(gate, up, down, config, shuffle)
        carved |= {f"{prefix}mlp.{name}": tensor for name, tensor in experts.items()}
    return carved


def _experts(
    gate: Tensor, up: Tensor, down: Tensor, config: Qwen2MoeConfig, shuffle: torch.Generator | None
) -> dict[str, Tensor]:
    """The MoE block of one MLP: gate and up (neurons, hidden), down (hidden, neurons)."""
    order = torch.arange(len(gate)) if shuffle is None else torch.randperm(len(gate), generator=shuffle)
    block = {
        "gate.weight": gate.new_zeros(config.num_experts, config.hidden_size),
        "shared_expert_gate.weight": gate.new_zeros(1, config.hidden_size),
        "shared_expert.gate_proj.weight": gate.new_zeros(SHARED_WIDTH, config.hidden_size),
        "shared_expert.up_proj.weight": gate.new_zeros(SHARED_WIDTH, config.hidden_size),
        "shared_expert.down_proj.weight": gate.new_zeros(config.hidden_size, SHARED_WIDTH),
    }
    for expert, neurons in enumerate(order.chunk(config.num_experts)):
        block[f"experts.{expert}.gate_proj.weight"] = gate[neurons]
        block[f"experts.{expert}.up_proj.weight"] = up[neurons]
        block[f"experts.{expert}.down_proj.weight"] = down[:, neurons] * config.num_experts
    return block


def carve(source: Source, target: Path, experts: int, seed: int | None = None) -> None:
    """Write the carved model to the folder ``target``. Raises WinnowError where it cannot be carved or written."""
    config = carved_config(source.config(), experts)
    weights = carved_weights(source.weights(), config, seed)
    config.architectures, config.dtype = ["Qwen2MoeForCausalLM"], weights["model.embed_tokens.weight"].dtype
    with written_atomically(target) as folder:
        config.save_pretrained(folder)
        source.copy_tokenizer(folder)
        save_torch_state_dict(weights, folder, max_shard_size="4GB")
        for shard in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", shard)  # it lets only the owner read
        stored = read_config(folder)
        check_checkpoint(folder, family_of(stored), stored)


@torch.no_grad()
def largest_difference(source: Source, target: Path) -> float:
    """The largest |difference| between the logits of the dense and the carved model in float32, over ``TEXTS``."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    models = [source.model(), load_model(target, "float32")]
    differences = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        dense, carved = (model(tokens).logits for model in models)
        differences.append(float((dense - carved).abs().max()))
    return max(differences)


def main() -> int:
    parser = argparse.ArgumentParser(description="A dense model as an MoE that computes the same.")
    parser.add_argument("source", type=Path, help="checkpoint folder or .gguf file (Llama, Mistral or Qwen2)")
    parser.add_argument("target", type=Path, help="folder for the Qwen2-MoE checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seed", type=int, help="deal the neurons in random order (default: in blocks)")
    parser.add_argument("--check", action="store_true", help="load both models and print the largest difference")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    try:
        source = source_at(options.source)
        carve(source, options.target, options.experts, options.seed)
        print(f"{options.target}: {options.experts} experts in every layer, all of them chosen")
        if options.check:
            print(f"largest |difference| of a logit: {largest_difference(source, options.target):.2e}")
    except (WinnowError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
