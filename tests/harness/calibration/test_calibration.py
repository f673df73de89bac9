import logging
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from harness.calibration.batches import BatchLayout
from harness.calibration.calibrate import calibrate, to_statistics
from harness.calibration.collect import collect, wanted_statistics
from harness.calibration.collected import Part
from harness.calibration.collectors.table import collectors_for
from harness.calibration.recorder import Recorder
from harness.calibration.tokens import TokenSequence, tokenize
from harness.contracts.statistics import BY_ID, NOVICES, RELEASED, SAMPLED, STATISTICS
from harness.data.rows import Document
from harness.errors import WinnowError
from harness.families.moe_block import MoeBlock, moe_block
from harness.families.table import FAMILIES
from tests.brute_force import SIGMOID, brute_force_statistics, routed_documents
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, byte_tokenizer, save_tiny, tiny_model

ALL = frozenset(STATISTICS)
ORDER_FREE = ALL - RELEASED - SAMPLED  # packing puts the documents of the pass into another order


def documents(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, length).tolist() for length in lengths]


def sequence(*pieces, sources=None):
    return TokenSequence(
        np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]),
        tuple(len(piece) for piece in pieces),
        tuple(sources or ["text"] * len(pieces)),
    )


def run(model, sequences, names=ALL, batch_size=8):
    return collect(model, sequences, FAMILIES[model.config.model_type], names, batch_size)


def recorder(layer, names, router_output=()):
    """Of 48 tokens of one source."""
    return Recorder(layer, router_output, partial(collectors_for, names, 1, Part(0, 48), 300))


def assert_close(actual, expected, names=ALL, rtol=1e-5):
    """Relative to the largest number of each array: elements near zero are differences of large ones."""
    assert actual.keys() == expected.keys()
    for layer in expected:
        for name in names:
            want = expected[layer][name]
            got = actual[layer][name]
            assert got.shape == want.shape, name
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max(), err_msg=f"{layer} {name}")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_statistic_equals_brute_force(family):
    model = tiny_model(family)
    texts = documents([17, 3, 25, 1, 9])
    expected = brute_force_statistics(model, texts)
    actual = run(model, [sequence(text) for text in texts], batch_size=2)
    assert_close(actual.layers, expected.layers)
    assert (actual.tokens, actual.sequences) == (55, 5)
    statistics = to_statistics(actual, expected.expert_weights)
    assert (statistics.num_experts, statistics.top_k, statistics.tokens) == (8, 2, 55)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_scores_of_a_router_are_its_own(family):
    """Softmax of all logits or sigmoid, token by token: of a sigmoid router, gate values are in proportion to it."""
    model, names = tiny_model(family), frozenset({"router_score_sum", "top1_score_sum", "top1_frequency"})
    texts = documents([17, 3, 25])
    actual = run(model, [sequence(text) for text in texts], names, batch_size=2)
    assert FAMILIES[family].sigmoid_router == (family in SIGMOID)
    for layer, seen in routed_documents(model, texts).items():
        want = {name: np.zeros(8) for name in names}
        for document in seen:
            for logits, gates, indices in zip(document.logits, document.gates, document.indices, strict=True):
                softmax = np.exp(logits) / np.exp(logits).sum()
                score = 1 / (1 + np.exp(-logits)) if family in SIGMOID else softmax
                best = indices[gates.argmax()]
                if family in SIGMOID:
                    ratio = gates / score[indices]
                    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
                want["router_score_sum"] += score
                want["top1_score_sum"][best] += score[best]
                want["top1_frequency"][best] += 1
        assert_close({layer: actual.layers[layer]}, {layer: want}, names)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_batching_with_padding_changes_nothing(family):
    model = tiny_model(family)
    sequences = [sequence(text) for text in documents(range(1, 41, 3))]
    one, eight = (run(model, sequences, batch_size=size) for size in (1, 8))
    assert_close(eight.layers, one.layers)
    for layer, arrays in eight.layers.items():
        assert arrays["frequency"].sum() == 2 * eight.tokens, layer
        np.testing.assert_array_equal(arrays["frequency"], one.layers[layer]["frequency"])
    assert eight.usage == one.usage


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_documents_see_nothing_of_each_other(family):
    model = tiny_model(family)
    pieces = documents([5, 20, 7, 1, 1, 30, 14, 6], seed=1)
    packed = run(model, [sequence(*pieces[:3]), sequence(*pieces[3:6]), sequence(*pieces[6:])], batch_size=3)
    alone = run(model, [sequence(piece) for piece in pieces], batch_size=1)
    assert_close(packed.layers, alone.layers, ORDER_FREE)


def test_tokenised_and_packed_corpus_gives_the_statistics_of_its_documents():
    model, tokenizer = tiny_model("olmoe"), byte_tokenizer()
    corpus = [Document("def f(x):\n    return x"), Document("x = 1"), Document("for a in b: pass")]
    unpacked = run(model, tokenize(corpus, tokenizer, 64))
    packed = run(model, tokenize(corpus, tokenizer, 64, packing=True))
    assert (unpacked.sequences, packed.sequences) == (3, 1)
    assert_close(packed.layers, unpacked.layers, ORDER_FREE)


def test_only_what_is_asked_for_is_computed():
    model = tiny_model("qwen3_moe")
    sequences = [sequence(text) for text in documents([12, 7])]
    everything = run(model, sequences)
    for name in STATISTICS:
        alone = run(model, sequences, frozenset({name}))
        assert alone.names == {name, "frequency"}
        assert_close(alone.layers, everything.layers, alone.names)


def test_usage_is_counted_by_source():
    model = tiny_model("mixtral")
    code, math = documents([20, 30], seed=3)
    together = run(model, [sequence(code, math, sources=["code", "math"])])
    apart = {name: run(model, [sequence(text, sources=[name])]) for name, text in (("code", code), ("math", math))}
    assert together.usage == {name: result.usage[name] for name, result in apart.items()}
    assert sum(together.usage["math"]["1"]) == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_computes_the_same_while_it_is_recorded(family, dtype):
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation("grouped_mm")
    ids = torch.tensor(documents([24, 24]))
    real, source = torch.ones(48, dtype=torch.bool), torch.zeros(48).long()
    layout = BatchLayout(real, ((0, 24), (24, 48)), source, 48, ids.reshape(-1))
    recorders = [recorder(layer, ALL, FAMILIES[family].router_output) for layer in (0, 1)]
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        with ExitStack() as stack:
            for each in recorders:
                stack.enter_context(each.watching(moe_block(model, FAMILIES[family], each.layer)))
                each.start_batch(layout)
            during = model(ids, use_cache=False).logits
        after = model(ids, use_cache=False).logits
    assert torch.equal(during, before)
    assert torch.equal(after, before)
    assert [each.arrays["frequency"].sum() for each in recorders] == [96, 96]
    for layer in model.model.layers:
        assert "forward" not in vars(layer.mlp.experts)
        assert not layer.mlp.gate._forward_hooks and not layer._forward_hooks


def test_experts_with_biases_and_transposed_weights():
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, gates = torch.randn(10, 32), torch.rand(10, 2)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    real = torch.arange(10) < 7
    found = recorder(0, frozenset({"output_mean", "ean_sum"}))
    with torch.no_grad():
        with found.watching(MoeBlock(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity(), experts)):
            found.start_batch(BatchLayout(real, ((0, 7),), torch.zeros(10).long(), 7, torch.arange(10)))
            result = experts(x, indices, gates)
        expected = grouped_mm_experts_forward(experts, x, indices, gates)
        one = torch.ones(7, 1)
        every = torch.stack([grouped_mm_experts_forward(experts, x[:7], torch.full((7, 1), j), one) for j in range(4)])
    torch.testing.assert_close(result[:7], expected[:7])
    assert not result[7:].any()
    arrays = found.arrays
    np.testing.assert_allclose(arrays["output_mean"], every.mean(1).numpy(), rtol=1e-5, atol=1e-6)
    norms = every.norm(dim=2)
    routed = [sum(float(norms[j, t]) for t in range(7) if j in indices[t]) for j in range(4)]
    np.testing.assert_allclose(arrays["ean_sum"], routed, rtol=1e-5)


def test_experts_without_tokens_are_warned_of_once(caplog):
    result = run(tiny_model("olmoe"), [sequence([7])])
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1
    assert "12 of 16 experts were never routed to (6 in layer 0, 6 in layer 1)" in messages[0]
    unused = result.layers[0]["frequency"] == 0
    assert (result.layers[0]["ean_sum"][unused] == 0).all()


def test_broken_expert_weights_name_layer_and_statistic():
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = float("nan")
    with pytest.raises(WinnowError, match=r"NaN or infinite expert outputs in layer 1 .*ean_sum"):
        run(model, [sequence(text) for text in documents([9])])
    with torch.no_grad():  # a model that cannot run leaves no hooks behind
        assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_an_expert_that_no_token_chose_is_found_broken_too():
    model = tiny_model("qwen3_moe")
    sequences = [sequence([7])]
    usage = run(model, sequences).layers[1]["frequency"]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[int(usage.argmin()), 0, 0] = float("inf")
    with pytest.raises(WinnowError, match="NaN or infinite output_mean in layer 1"):
        run(model, sequences)


def test_broken_router_names_layer():
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = float("inf")
    with pytest.raises(WinnowError, match="NaN or infinite router logits in layer 0"):
        run(model, [sequence(text) for text in documents([9])], frozenset({"frequency"}))


@pytest.mark.parametrize(
    ("sequences", "names", "batch_size", "message"),
    [
        ([], ALL, 8, "the calibration corpus is empty"),
        ([sequence([1, 300])], ALL, 8, "token 300 is outside the model's vocabulary of 300"),
        ([sequence([1] * 2049)], ALL, 8, "set calibration.max_length=2048"),
        ([sequence([1])], ALL, 0, "batch_size must be at least 1"),
        ([sequence([1])], frozenset({"ean"}), 8, "unknown statistic 'ean'; known: frequency"),
    ],
)
def test_bad_input_says_what_is_wrong(sequences, names, batch_size, message):
    with pytest.raises(WinnowError, match=message):
        run(tiny_model("olmoe"), sequences, names, batch_size)


def test_what_a_setting_asks_for():
    needed = frozenset({"frequency"})
    assert wanted_statistics("all", needed) == ORDER_FREE - BY_ID - NOVICES
    assert wanted_statistics("all", RELEASED | SAMPLED | BY_ID | NOVICES) == ALL
    assert wanted_statistics("needed", needed) == needed
    assert wanted_statistics("auto", needed) == needed
    assert wanted_statistics("auto", needed, also=frozenset({"gate_sum"})) == {"frequency", "gate_sum"}
    assert wanted_statistics("needed", needed, also=frozenset({"gate_sum"})) == needed
    assert wanted_statistics(["ean_sum"], needed) == {"ean_sum", "frequency"}
    with pytest.raises(WinnowError, match="auto, needed, all or a list"):
        wanted_statistics("some", needed)
    with pytest.raises(WinnowError, match="unknown statistic 'some'"):
        wanted_statistics(["some"], needed)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_calibrate_passes_once_and_reads_weights_from_disk(tmp_path, caplog, family):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "model"
    model = save_tiny(folder, family)
    loads = []

    def load():
        loads.append(1)
        return model

    sequences = tokenize([Document("a calibration text", "prose")], byte_tokenizer(), 32)

    def go(*names):
        return calibrate(folder, load, sequences, frozenset(names), tmp_path / "cache", corpus="prose")

    first, _ = go("ean_sum", "frequency")
    second, again = go("frequency")
    assert len(loads) == 1
    assert "calibration pass over prose (1 sequences, 18 tokens)" in caplog.text
    assert "reusing calibration statistics" in caplog.text
    np.testing.assert_array_equal(first.get(1, "frequency"), second.get(1, "frequency"))
    assert again.usage["prose"]["1"] == first.get(1, "frequency").tolist()
    fused = model.model.layers[1].mlp.experts
    weights = first.expert_weights(1, 3)
    np.testing.assert_array_equal(np.concatenate([weights.gate, weights.up]), fused.gate_up_proj[3].detach().numpy())
    np.testing.assert_array_equal(weights.down, fused.down_proj[3].detach().numpy())
    go("output_mean")
    assert len(loads) == 2
