"""The transformers backend on one and on two (pretend) GPUs: what it writes and scores on the CPU, to the last bit, and
a bounded number of times that the host waits. And models whose weights accelerate keeps elsewhere."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from harness.backends.hf import HFBackend
from harness.contracts.backend import Sampling
from tasks.probes.drift import DriftTask
from tests.harness.backends.test_hf_backend import naive_logprob, naive_tokens, text_model, texts
from tests.pretend import MixedDevicesError, PretendGpus, placed
from tests.tasks.probes.test_drift import samples
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, byte_tokenizer, tiny_model

PROMPTS = ["the baker and 12 apples", "def return", "a story of the sum 40 7 list", "x"]
PAIRS = [(prompt, ending) for prompt in PROMPTS for ending in (" one", " 2", " three!")]
# Times that the host waits for a GPU: for a token that is written, at its choice and where transformers looks at the
# mask, which it does once more for the prompt; for a batch that is scored, at its contexts and their first tokens, and
# at what follows.
WAITS_A_TOKEN, WAITS_A_BATCH = 2, 4
GENERATED = 4  # tokens


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """The one that the pretend GPUs attend with."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def answers(model: PreTrainedModel) -> dict[str, Any]:
    backend = HFBackend(model, byte_tokenizer(), batch_size=3)
    return {
        "greedy": backend.generate(PROMPTS, GENERATED),
        "sampled": backend.generate(PROMPTS, GENERATED, sampling=Sampling(0.9, 0.9, seed=1)),
        "loglikelihood": backend.loglikelihood(PAIRS),
        "rolling": backend.loglikelihood_rolling(PROMPTS),
        "likeliest": repr(backend.token_logprobs(PROMPTS, 5)),
        "distributions": repr(list(backend.distributions(PAIRS[:4], 3))),
    }


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_answers_on_gpus_are_those_of_the_cpu(family: str) -> None:
    expected = answers(tiny_model(family))
    for gpus in (1, 2) if family in FAMILY_NAMES else (2,):
        with PretendGpus(gpus):
            assert answers(placed(tiny_model(family), gpus)) == expected


def test_rows_that_are_picked_on_another_gpu_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: layers on the second GPU whose keys are indexed with what is on the first."""

    def reorder(self: Any, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    monkeypatch.setattr(DynamicLayer, "reorder_cache", reorder)
    for gpus in (1, 2):
        with PretendGpus(gpus):
            backend = HFBackend(placed(tiny_model("qwen3_moe"), gpus), byte_tokenizer())
            if gpus == 1:
                assert backend.loglikelihood(PAIRS)
            else:
                with pytest.raises(MixedDevicesError, match="index.Tensor: tensors on cuda:0, cuda:1"):
                    backend.loglikelihood(PAIRS)


def test_drift_on_gpus_is_that_of_the_cpu() -> None:
    def scores(model: PreTrainedModel, other: PreTrainedModel) -> Any:
        ours, base = (HFBackend(one, byte_tokenizer(), batch_size=2) for one in (model, other))
        task = DriftTask(positions=8)
        result = task.compare(task.observe(ours, samples(PROMPTS), samples(PROMPTS[::-1])), base)
        return result.scores, result.samples

    expected = scores(tiny_model("mixtral"), tiny_model("mixtral", seed=1))
    with PretendGpus(2):
        assert scores(placed(tiny_model("mixtral"), 2), placed(tiny_model("mixtral", seed=1), 2)) == expected


def test_the_host_waits_a_bounded_number_of_times() -> None:
    many = [(prompt, ending + str(i)) for prompt, ending in PAIRS for i in range(4)]
    with PretendGpus() as gpus:
        backend = HFBackend(placed(text_model("qwen3_moe"), 1), byte_tokenizer())

        def waited(work: Any) -> int:
            gpus.waits.clear()
            work()
            return sum(gpus.waits.values())

        assert waited(lambda: backend.generate(PROMPTS, GENERATED)) <= WAITS_A_TOKEN * GENERATED + 1, gpus.waits
        few = waited(lambda: backend.loglikelihood(PAIRS))
        assert few <= WAITS_A_BATCH, gpus.waits
        assert waited(lambda: backend.loglikelihood(many)) == few, "not for each request"
        assert waited(lambda: backend.loglikelihood_rolling(PROMPTS)) <= WAITS_A_BATCH, gpus.waits


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_layers_of_linear_attention_score_and_write_as_one_by_one(family: str) -> None:
    """Their states cannot be picked as keys are: each continuation goes through with its own context."""
    model, tokenizer = text_model(family), byte_tokenizer()
    with torch.no_grad():  # ends at different steps, so that finished sequences leave the batch
        model.lm_head.weight[256] = 1.8 * model.lm_head.weight[50]
        model.lm_head.weight[50] = 0.0
    backend = HFBackend(model, tokenizer)
    prompts = texts(12, seed=3)
    expected = [naive_tokens(model, tokenizer.encode(prompt), 24) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) >= 3
    assert backend.generate(prompts, 24) == [tokenizer.decode(tokens) for tokens in expected]
    scored = [naive_logprob(model, tokenizer.encode(context), tokenizer.encode(text)) for context, text in PAIRS]
    assert [answer.logprob for answer in backend.loglikelihood(PAIRS)] == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_answers_of_an_offloaded_model_are_the_same(family: str, where: str, tmp_path: Path) -> None:
    expected, model = answers(tiny_model(family)), tiny_model(family)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert answers(model) == expected
    assert all(parameter.is_meta for parameter in model.parameters()), "weights stay where they are kept"


def test_a_closed_backend_frees_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def freed(models: list[PreTrainedModel]) -> bool:
        backend = HFBackend(models.pop(), byte_tokenizer())
        backend.loglikelihood(PAIRS)
        weights = weakref.ref(next(backend.model.parameters()))
        backend.close()
        backend.close()
        return weights() is None

    def offloaded() -> PreTrainedModel:
        return cpu_offload(tiny_model("qwen3_moe"), execution_device=torch.device("cpu"))

    gc.disable()  # what is left to the collector is for close() to see to
    try:
        assert freed([tiny_model("qwen3_moe")])
        assert freed([offloaded()])
        with PretendGpus(2):
            assert freed([placed(tiny_model("qwen3_moe"), 2)])
        monkeypatch.setattr(gc, "collect", lambda: 0)
        assert not freed([offloaded()]), "its hooks refer to it in circles"
    finally:
        gc.enable()
