"""Every model config: what it says of its checkpoint is what was published, and what it recommends is what is used."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import conf
from harness import cli  # noqa: F401 (the resolvers of the configuration)
from harness.checkpoints.footprint import anatomy_of_config
from harness.families.table import family_of

# Those of the panel are trained here (tests/harness/sweeps/test_panel.py).
NAMES = sorted(
    path.stem for path in Path(conf.__file__).parent.glob("model/*.yaml") if not path.stem.startswith(("_", "panel_"))
)
# Published: parameters and those active for a token in billions, experts, top-k, MoE layers (model cards and reports).
PUBLISHED = {
    "deepseek_v2_lite": (15.7, 2.4, 64, 6, 26),
    "deepseek_v3_1": (671, 37, 256, 8, 58),
    "dots_llm1": (142.8, 14, 128, 6, 61),
    "ernie_4_5_21b_a3b": (21.8, 3.0, 64, 6, 27),
    "glm_4_5_air": (106.9, 12, 128, 8, 45),
    "glm_4_6": (352.8, 32, 160, 8, 89),
    "gpt_oss_120b": (116.8, 5.1, 128, 4, 36),
    "gpt_oss_20b": (20.9, 3.6, 32, 4, 24),
    "hunyuan_a13b": (80.4, 13, 64, 8, 32),
    "kimi_k2": (1026, 32, 384, 8, 60),
    "lfm2_8b_a1b": (8.34, 1.5, 32, 4, 22),
    "minimax_m2": (228.7, 10, 256, 8, 62),
    "mixtral_8x22b": (140.6, 39, 8, 2, 56),
    "mixtral_8x7b": (46.7, 12.9, 8, 2, 32),
    "olmoe_1b_7b": (6.92, 1.3, 64, 8, 16),
    "phi_3_5_moe": (41.9, 6.6, 16, 2, 32),
    "qwen2_57b_a14b": (57.4, 14, 64, 8, 28),
    "qwen3_235b_a22b": (235.1, 22, 128, 8, 94),
    "qwen3_30b_a3b": (30.53, 3.3, 128, 8, 48),
    "qwen3_coder_30b_a3b": (30.53, 3.3, 128, 8, 48),
    "qwen3_coder_480b_a35b": (480.2, 35, 160, 8, 62),
    "qwen3_next_80b_a3b": (79.7, 3, 512, 10, 48),
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_each_is_published_or_local() -> None:
    assert set(NAMES) == PUBLISHED.keys() | {"local", "reference", "reference_top1"}
    assert sum(20 <= parameters <= 1100 for parameters, *_ in PUBLISHED.values()) >= 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_it_says_of_its_checkpoint_was_published(name: str) -> None:
    config = composed(f"model={name}", "calibration=evol_codealpaca")
    node = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(node, dict)
    assert node.keys() == {"name", "path", "dtype", "device", "chat_template", "calibration", "architecture"}
    assert node["path"].count("/") == 1 and isinstance(getattr(torch, node["dtype"]), torch.dtype)
    model = anatomy_of_config(node["architecture"])
    parameters, active, experts, top_k, moe_layers = PUBLISHED[name]
    assert model.headers.parameters / 1e9 == pytest.approx(parameters, rel=0.003)
    embeddings = 2 * model.config["vocab_size"] * model.config["hidden_size"] / 1e9  # which some cards leave out
    assert 0.9 * active <= model.active_parameters / 1e9 <= 1.1 * active + embeddings
    assert (model.num_experts, model.top_k) == (experts, top_k)
    assert len(family_of(model.config).moe_layers(model.config)) == moe_layers
    assert config.calibration.max_length <= model.config["max_position_embeddings"]


def test_a_corpus_takes_the_size_and_template_that_the_model_recommends() -> None:
    node = composed("model=qwen3_235b_a22b", "calibration=evol_codealpaca").calibration
    assert (node.num_sequences, node.max_length, node.chat_template) == (12228, 16384, True)
    assert node.corpus.num_sequences == 12228
    node = composed("model=olmoe_1b_7b", "calibration=c4", "calibration.num_sequences=7").calibration
    assert (node.corpus.num_sequences, node.max_length) == (7, 2048)
    node = composed("model=local", "model.path=x", "calibration=local").calibration
    assert (node.num_sequences, node.max_length, node.chat_template) == (None, 2048, "auto")
    assert composed("~model", "+model.path=x", "calibration=c4").calibration.max_length == 2048


@pytest.mark.parametrize("corpus", ["code", "knowledge", "math", "mixed", "real_text", "writing"])
def test_the_reference_corpora_are_what_they_were(corpus: str) -> None:
    node = composed(f"calibration={corpus}").calibration
    sizes = (None if corpus == "mixed" else 1000, 512, False)
    assert (node.num_sequences, node.max_length, node.chat_template) == sizes
