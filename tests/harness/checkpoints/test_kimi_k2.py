"""Kimi-K2: DeepSeek-V3 under a model type that transformers does not know, its tokenizer a vocabulary and code."""

import base64
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.backends.vllm_guard import reason_against
from harness.calibration.collect import collect
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import anatomy_of_config, anatomy_of_folder
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.plan import CompressionPlan
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from harness.families.table import FAMILIES, family_of
from tests.brute_force import brute_force_statistics
from tests.harness.checkpoints.compressed import at_layers, compressed_by_hand, logits, merged, pruned
from tests.tiny import save_tiny, tiny_model

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
LAYERS = [1, 2]
GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])
# The published pattern: Chinese characters by themselves, words at a change of case, digits by threes.
PATTERN = [
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'ll)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'ll)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
]
TEXT = (
    "The brownFox doesn't jump,  你好world世界。 XMLParser 12345\n\n  def f(x):\r\n\treturn x+1 "
    "Größe 한국어 日本語テスト \u0301a"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is published: config.json names code that is not there to be run."""
    folder = tmp_path_factory.mktemp("kimi")
    save_tiny(folder, "kimi_k2", max_shard_size="100KB")
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"auto_map": AUTO_MAP}))
    return folder


def stock(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


def test_it_is_deepseek_v3_by_another_name(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    assert config["model_type"] == "kimi_k2" and config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert family_of(config) is FAMILIES["deepseek_v3"]
    model = load_model(folder)
    assert torch.equal(logits(model), logits(tiny_model("kimi_k2"))) and torch.equal(stock(folder), logits(model))
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["model_type"] == "kimi_k2" and torch.equal(stock(tmp_path), logits(model))
    assert "kimi_k2" not in reason_against(config)


def test_statistics_equal_brute_force(folder: Path) -> None:
    texts = [np.random.default_rng(0).integers(0, 256, length) for length in (19, 3, 11)]
    sequences = [TokenSequence(text, (len(text),), ("text",)) for text in texts]
    expected = brute_force_statistics(tiny_model("kimi_k2"), [text.tolist() for text in texts])
    family = family_of(read_config(folder))
    found = collect(load_model(folder), sequences, family, frozenset(STATISTICS), batch_size=2)
    assert list(found.layers) == LAYERS and found.n_group == 1
    for layer, arrays in expected.layers.items():
        for name, want in arrays.items():
            atol = 1e-5 * np.abs(want).max()
            np.testing.assert_allclose(found.layers[layer][name], want, rtol=1e-5, atol=atol, err_msg=f"{layer} {name}")


@pytest.mark.parametrize("plan", [pruned([0, 2, 3, 6, 7], [1, 2, 4, 5, 7]), merged(*GROUPS, permute=True)])
def test_a_compressed_one_keeps_its_name_and_computes_what_it_should(
    folder: Path, tmp_path: Path, plan: CompressionPlan
) -> None:
    plan = at_layers(plan, LAYERS)
    sizes = apply_plan(folder, plan, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config["model_type"], config["auto_map"]) == ("kimi_k2", AUTO_MAP)
    expected = logits(compressed_by_hand(tiny_model("kimi_k2"), plan))
    assert (expected - logits(tiny_model("kimi_k2"))).abs().max() > 1e-2
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    if sizes["layout"] == "plain":
        assert config["n_routed_experts"] == 5
        torch.testing.assert_close(stock(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)


def test_a_dry_run_knows_what_is_stored(folder: Path) -> None:
    config, reader = read_config(folder), CheckpointReader(folder)
    said = anatomy_of_config(config).headers
    assert {name: said.shape(name) for name in said.names()} == {name: reader.shape(name) for name in reader.names()}
    assert anatomy_of_folder(folder, config).headers.total_bytes == said.total_bytes


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def byte_pairs(text: str, count: int) -> dict[bytes, int]:
    """{token: rank} of byte pairs merged over the whole text, whatever boundaries it has."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = [bytes([byte]) for byte in text.encode()]
    while len(ranks) < count:
        pairs = Counter(pair for pair in itertools.pairwise(tokens) if pair[0] + pair[1] not in ranks)
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        joined: list[bytes] = []
        for token in tokens:
            if joined and (joined[-1], token) == (left, right):
                joined[-1] = left + right
            else:
                joined.append(token)
        tokens = joined
    return ranks


RANKS = byte_pairs(TEXT, 380)
SPECIAL = {380: "[BOS]", 381: "[EOS]", 383: "<|im_end|>", 386: "<|tool|>", 388: "[PAD]"}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The tokenizer files of a checkpoint, whose code must not run."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items())
    (tmp_path / "tiktoken.model").write_text("".join(lines))
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "additional_special_tokens": ["<|im_end|>"],
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "added_tokens_decoder": {
            str(number): {
                "content": token, "special": token != "<|tool|>", "normalized": False, "lstrip": False,
                "rstrip": False, "single_word": False,
            }
            for number, token in SPECIAL.items()
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    parts = "".join(f'            r"""{part}""",\n' for part in PATTERN)
    code = f'raise SystemExit("run")\n\n\nclass T:\n    pat_str = "|".join(\n        [\n{parts}        ]\n    )\n'
    (tmp_path / "tokenization_kimi.py").write_text(code)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    return tmp_path


def test_the_tokenizer_gives_the_tokens_that_tiktoken_gives(published: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    special = {SPECIAL.get(number, f"<|reserved_token_{number}|>"): number for number in range(380, 389)}

    def tokens(pattern: str, text: str) -> list[int]:
        encoding = tiktoken.Encoding("kimi", pat_str=pattern, mergeable_ranks=RANKS, special_tokens=special)
        return encoding.encode(text, allowed_special="all")

    tokenizer = load_tokenizer(published)
    for text in (TEXT, "[BOS]hi<|tool|> you<|im_end|>", "世界 你好worldFox 1234567"):
        found = tokenizer(text)["input_ids"]
        assert found == tokens("|".join(PATTERN), text) and tokenizer.decode(found) == text
    assert tokens("|".join(PATTERN), TEXT) != tokens(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}]+", TEXT)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (380, 381, 388)
    assert tokenizer.decode([104, 105, 381], skip_special_tokens=True) == "hi"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|im_end|>"


def test_a_compressed_checkpoint_has_what_its_tokenizer_needs(folder: Path, published: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    whole = tmp_path / "whole"
    save_tiny(whole, "kimi_k2")
    for path in whole.glob("tokenizer*"):
        path.unlink()
    for name in ("tiktoken.model", "tokenizer_config.json", "tokenization_kimi.py"):
        (whole / name).write_bytes((published / name).read_bytes())
    apply_plan(whole, at_layers(pruned([0, 1, 2, 3], [4, 5, 6, 7]), LAYERS), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out")(TEXT)["input_ids"] == load_tokenizer(published)(TEXT)["input_ids"]


def test_a_tokenizer_json_needs_no_code(published: Path) -> None:
    pytest.importorskip("tiktoken")
    first = load_tokenizer(published)
    first.backend_tokenizer.save(str(published / "tokenizer.json"))
    (published / "tokenization_kimi.py").unlink()
    assert load_tokenizer(published)(TEXT)["input_ids"] == first(TEXT)["input_ids"]


def test_code_that_does_not_say_how_to_split_is_refused_by_name(published: Path) -> None:
    pytest.importorskip("tiktoken")
    (published / "tokenization_kimi.py").write_text("pat = 'x'\n")
    with pytest.raises(WinnowError, match=r"no usable tokenizer in .*: tokenization_kimi\.py says no pat_str"):
        load_tokenizer(published)
    (published / "tokenization_kimi.py").unlink()
    with pytest.raises(WinnowError, match=r"tokenization_kimi\.py says no pat_str"):
        load_tokenizer(published)


def test_another_tokenizer_that_is_code_is_refused_by_name(published: Path) -> None:
    (published / "tiktoken.model").rename(published / "vocab.tiktoken")
    with pytest.raises(WinnowError, match=r"no usable tokenizer in .*: tokenization_kimi\.py is not run, as no code"):
        load_tokenizer(published)
