"""The batched backend against loops that take one text at a time, without a cache and without padding."""

import random

import pytest
import torch
from transformers import PreTrainedModel

from harness import progress
from harness.backends.decoding import StopStrings, prompt_batches
from harness.backends.hf import HFBackend
from harness.backends.tokens import cut
from harness.contracts.backend import Sampling
from harness.errors import WinnowError
from tests.tiny import FAMILY_NAMES, byte_tokenizer, tiny_model

WORDS = [
    "the",
    "and",
    "def",
    "return",
    "list",
    "sum",
    "story",
    "baker",
    "apples",
    "12",
    "7",
    "40",
    "é",
    "##",
    "\n",
]


def texts(count: int, seed: int = 0, longest: int = 14) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def naive_tokens(model: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding by running the whole text again for every token; stops at the end-of-text token."""
    new: list[int] = []
    while len(new) < count:
        with torch.no_grad():
            chosen = int(model(input_ids=torch.tensor([tokens + new])).logits[0, -1].argmax())
        if chosen == 256:
            break
        new.append(chosen)
    return new


def naive_logprob(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(continuation))


def text_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model that writes ASCII, so that its text says which tokens it chose."""
    model = tiny_model(family, seed=seed)
    printable = byte_tokenizer().encode("".join(map(chr, range(32, 127))))
    others = [token for token in range(300) if token not in printable]
    with torch.no_grad():
        model.lm_head.weight[others] = 0.0
    return model


def watch(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """A list that grows by the shape of the tokens of every pass through the decoder."""
    shapes: list[tuple[int, ...]] = []
    model.base_model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_generation_equals_decoding_one_by_one(family: str) -> None:
    model, tokenizer = text_model(family), byte_tokenizer()
    prompts = texts(7)
    expected = [tokenizer.decode(naive_tokens(model, tokenizer.encode(p), 16)) for p in prompts]
    assert len(set(expected)) == 7 and "\ufffd" not in "".join(map(str, expected))
    for batch_size in (1, 3, 128):
        assert HFBackend(model, tokenizer, batch_size).generate(prompts, 16) == expected


def test_answers_end_at_the_end_token_while_others_go_on() -> None:
    model, tokenizer = text_model("qwen3_moe"), byte_tokenizer()
    with torch.no_grad():
        # Makes end of text likely enough that sequences end at different steps.
        model.lm_head.weight[256] = 1.8 * model.lm_head.weight[50]
        model.lm_head.weight[50] = 0.0
    prompts = texts(12, seed=3)
    expected = [naive_tokens(model, tokenizer.encode(p), 24) for p in prompts]
    assert len({len(tokens) for tokens in expected}) >= 4, "sequences must end at different steps"
    shapes = watch(model)
    answers = HFBackend(model, tokenizer).generate(prompts, 24)
    assert answers == [tokenizer.decode(tokens) for tokens in expected]
    batches = [shape[0] for shape in shapes]
    assert batches[0] == 12 and batches[-1] <= 9, "finished sequences leave the batch"


def test_stop_strings_cut_where_they_first_occur() -> None:
    model, tokenizer = text_model("olmoe"), byte_tokenizer()
    prompts = texts(8, seed=1)
    free = HFBackend(model, tokenizer).generate(prompts, 40)
    stops = [free[0][10:12], free[1][5], free[2][20:23]]
    expected = [text[: min((text.find(s) for s in stops if s in text), default=len(text))] for text in free]
    assert HFBackend(model, tokenizer).generate(prompts, 40, stops) == expected
    assert sum(map(len, expected)) < sum(map(len, free))


def test_a_stop_string_ends_the_work_too() -> None:
    model, tokenizer = text_model("mixtral"), byte_tokenizer()
    (free,) = HFBackend(model, tokenizer).generate(["once upon"], 40)
    shapes = watch(model)
    HFBackend(model, tokenizer).generate(["once upon"], 40, [free[3:6]])
    assert len(shapes) < 12


def test_stop_strings_over_several_tokens_and_inside_one_character() -> None:
    tokenizer = byte_tokenizer()
    stops = StopStrings(tokenizer, ["\n\n", "né"])
    tokens = tokenizer.encode("a né")
    assert [stops.reached(tokens[: i + 1]) for i in range(len(tokens))] == [False] * (len(tokens) - 1) + [True]
    tokens = tokenizer.encode("x\ny\n\n")
    assert stops.reached(tokens) and not stops.reached(tokens[:-1])
    assert cut("x\ny\n\nz né", ["\n\n", "né"]) == "x\ny" and cut("none", ["\n\n"]) == "none"


def test_log_likelihoods_equal_those_one_by_one() -> None:
    tokenizer = byte_tokenizer()
    contexts = [text.rstrip() for text in texts(5, seed=2)]
    endings = texts(6, seed=5, longest=5)
    pairs = [(contexts[i % 5], " " + endings[i % 6]) for i in range(12)] + [(contexts[0], "x"), ("", "abc")]
    for family in FAMILY_NAMES:
        model = tiny_model(family)
        expected = [naive_logprob(model, tokenizer.encode(c) or [256], tokenizer.encode(t)) for c, t in pairs]
        for batch_size in (1, 3, 128):
            results = HFBackend(model, tokenizer, batch_size).loglikelihood(pairs)
            assert [r.logprob for r in results] == pytest.approx(expected, abs=1e-4)
            assert [r.tokens for r in results] == [len(tokenizer.encode(t)) for _, t in pairs]


def test_one_context_is_computed_once_for_its_continuations() -> None:
    model, tokenizer = tiny_model("qwen3_moe"), byte_tokenizer()
    shapes = watch(model)
    HFBackend(model, tokenizer).loglikelihood([("a long context " * 9 + "so", x) for x in ("abc", "de", "f", "ghij")])
    assert sorted(shapes) == [(1, 137), (3, 3)]


def test_spaces_after_the_context_are_scored_with_the_continuation() -> None:
    backend = HFBackend(tiny_model("qwen3_moe"), byte_tokenizer())
    moved, plain = backend.loglikelihood([("Answer: ", "7"), ("Answer:", " 7")])
    assert moved == plain and plain.tokens == 2


def test_a_context_too_long_loses_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = text_model("qwen3_moe"), byte_tokenizer()
    backend = HFBackend(model, tokenizer, max_length=16)
    long = "abcdefghijklmnopqrstuvwxyz"
    (result,) = backend.loglikelihood([(long, "XYZ")])
    # 16 tokens go in; the last one scored is only predicted.
    context = tokenizer.encode(long)[-14:]
    assert result.logprob == pytest.approx(naive_logprob(model, context, tokenizer.encode("XYZ")), abs=1e-4)
    answer, _ = backend.generate([long, "short"], 6)
    assert answer == tokenizer.decode(naive_tokens(model, tokenizer.encode(long)[-10:], 6))
    assert [record.message for record in caplog.records] == [
        "1 of 2 prompts lose their beginning: 26 tokens and an answer of 6 are more than the model's 16"
    ]


@pytest.mark.parametrize("max_length", [2, 7, 16, 2048])
def test_rolling_windows_score_every_token_but_the_first_once(max_length: int) -> None:
    model, tokenizer = tiny_model("qwen3_moe"), byte_tokenizer()
    documents = [*texts(2, seed=8), "x", "", "a" * 17, "ab" * 8]
    results = HFBackend(model, tokenizer, batch_size=3, max_length=max_length).loglikelihood_rolling(documents)
    for document, result in zip(documents, results, strict=True):
        tokens = tokenizer.encode(document)
        expected = 0.0
        for start in range(0, max(0, len(tokens) - 1), max_length):
            window = tokens[start : start + max_length + 1]
            expected += naive_logprob(model, window[:1], window[1:])
        assert result.logprob == pytest.approx(expected, abs=1e-4 * max(1, len(tokens)))
        assert result.tokens == max(0, len(tokens) - 1)


def test_long_prompts_shrink_the_batch_and_keep_short_ones_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 40, 38, 6, 41, 40]
    assert list(prompt_batches(lengths, 8, 128)) == [[4, 1, 5, 2, 3, 0]]
    assert list(prompt_batches(lengths, 8, 2)) == [[4, 1], [5, 2], [3, 0]]
    monkeypatch.setattr("harness.backends.decoding.PADDING", 10)
    assert list(prompt_batches(lengths, 8, 128)) == [[4, 1, 5, 2], [3, 0]]
    monkeypatch.setattr("harness.backends.decoding.CACHED_TOKENS", 100)
    assert list(prompt_batches(lengths, 8, 128)) == [[4, 1], [5, 2], [3, 0]]
    assert list(prompt_batches([200, 3], 8, 128)) == [[0], [1]], "one prompt is always a batch"
    assert list(prompt_batches([], 8, 128)) == []
    model, tokenizer = text_model("qwen3_moe"), byte_tokenizer()
    prompts = ["a" * length for length in lengths]
    shapes = watch(model)
    answers = HFBackend(model, tokenizer).generate(prompts, 8)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 41), (2, 40), (2, 6)]
    assert answers == [tokenizer.decode(naive_tokens(model, tokenizer.encode(p), 8)) for p in prompts]


def test_large_vocabularies_are_scored_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is asked for meets the head, and the batches of the decoder do not shrink."""
    model, tokenizer = tiny_model("granitemoe"), byte_tokenizer()  # which scales its logits behind the head
    shapes, slices = watch(model), []
    model.lm_head.register_forward_pre_hook(lambda _, given: slices.append(given[0].shape[1]))
    documents = texts(12, seed=4)
    pairs = [(document, " " + document) for document in documents]
    backend = HFBackend(model, tokenizer)

    def scored() -> list[float]:
        answers = [*backend.loglikelihood_rolling(documents), *backend.loglikelihood(pairs)]
        found = [answer.logprob for answer in answers]
        found += [value for answer in backend.token_logprobs(documents, 3) for value in answer.logprobs]
        found += [value for answer in backend.token_logprobs(documents, 3) for value in answer.top_logprobs.ravel()]
        for _, answer in sorted(backend.distributions(pairs, 9), key=lambda pair: pair[0]):
            found += [*answer.logprobs, *answer.expected.ravel()]
        return found

    whole, before = scored(), list(shapes)
    shapes.clear()
    slices.clear()
    monkeypatch.setattr("harness.backends.scoring.LOGITS", 300 * 7)
    assert scored() == pytest.approx(whole, abs=1e-4)
    assert shapes == before and max(slices) == 7
    shapes.clear()
    monkeypatch.setattr("harness.backends.scoring.CPU_TOKENS", 100)
    assert scored() == pytest.approx(whole, abs=1e-4)
    assert len(shapes) > len(before) and all(rows == 1 or rows * width <= 100 for rows, width in shapes)


def test_progress_is_shown_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    backend = HFBackend(tiny_model("qwen3_moe"), byte_tokenizer())
    backend.generate(["a"], 2, progress="code: writing")
    backend.loglikelihood([("a", "b")], progress="choices")
    backend.loglikelihood_rolling(["ab"], progress="perplexity")
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("code: writing", "choices", "perplexity"))
    backend.generate(["a"], 2)
    with progress.showing(False):
        backend.generate(["a"], 2, progress="code: writing")
    assert capsys.readouterr().err == "", "without a name, and with progress=false, nothing is shown"


def test_nothing_asked_is_nothing_answered() -> None:
    backend = HFBackend(tiny_model("qwen3_moe"), byte_tokenizer())
    assert backend.generate([], 4) == backend.loglikelihood([]) == backend.loglikelihood_rolling([]) == []


def test_requests_that_cannot_be_served_say_why() -> None:
    model, tokenizer = tiny_model("qwen3_moe"), byte_tokenizer()
    backend = HFBackend(model, tokenizer, max_length=8)
    with pytest.raises(WinnowError, match="max_new_tokens=8"):
        backend.generate(["a"], 8)
    with pytest.raises(WinnowError, match="max_new_tokens=0"):
        backend.generate(["a"], 0)
    with pytest.raises(WinnowError, match="longer than max_length=8"):
        backend.loglikelihood([("a", "123456789")])
    with pytest.raises(WinnowError, match="continuation to score is empty"):
        backend.loglikelihood([("a", "")])
    with pytest.raises(WinnowError, match="empty stop string"):
        backend.generate(["a"], 2, [""])
    with pytest.raises(WinnowError, match="batch_size=0"):
        HFBackend(model, tokenizer, batch_size=0)
    tokenizer.eos_token = None
    with pytest.raises(WinnowError, match="neither"):
        HFBackend(model, tokenizer).generate([""], 2)


def test_each_prompt_may_have_its_own_stop_strings() -> None:
    backend, prompts = HFBackend(text_model("olmoe"), byte_tokenizer()), texts(3, seed=1)
    free = backend.generate(prompts, 30)
    stops = [[free[0][9:11]], [], [free[2][4], free[2][1]]]
    expected = [
        text[: min((text.find(s) for s in own if s in text), default=99)] for text, own in zip(free, stops, strict=True)
    ]
    assert backend.generate(prompts, 30, stops) == expected


def test_draws_follow_the_distribution_and_depend_on_nothing_but_seed_and_place() -> None:
    model, tokenizer = text_model("qwen3_moe"), byte_tokenizer()
    prompt, count = "ab", 4000
    drawn = HFBackend(model, tokenizer, 1000).generate([prompt] * count, 1, sampling=Sampling(0.7, 0.8, seed=3))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].double()
    # The distribution by hand: softmax at temperature 0.7, the fewest likeliest tokens that hold 0.8, renormalised.
    expected: dict[str, float] = {}
    held = 0.0
    for probability, token in sorted(zip((logits / 0.7).softmax(-1).tolist(), range(300), strict=True), reverse=True):
        if held >= 0.8:
            break
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + probability
        held += probability
    assert set(drawn) <= set(expected)
    for text, probability in expected.items():
        share = probability / held
        assert drawn.count(text) / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5 + 1e-3)
    sampling = Sampling(1.0, seed=1)
    prompts = texts(5)
    together = HFBackend(model, tokenizer, 128).generate(prompts, 12, sampling=sampling)
    assert HFBackend(model, tokenizer, 2).generate(prompts, 12, sampling=sampling) == together
    assert HFBackend(model, tokenizer).generate(prompts, 12, sampling=Sampling(1.0, seed=2)) != together
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(WinnowError, match="temperature="):
            Sampling(**wrong)


def test_log_probabilities_of_given_tokens_and_of_the_likeliest() -> None:
    model, tokenizer = tiny_model("mixtral"), byte_tokenizer()
    documents = ["once upon a time", "x", "", "12 apples and 7"]
    results = HFBackend(model, tokenizer, batch_size=2).token_logprobs(documents, top=5)
    for document, result in zip(documents, results, strict=True):
        tokens = tokenizer.encode(document)
        assert result.tokens.tolist() == tokens[1:]
        assert result.top_tokens.shape == result.top_logprobs.shape == (max(0, len(tokens) - 1), 5)
        if len(tokens) > 1:
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
            own, best = expected[range(len(tokens) - 1), tokens[1:]], expected.topk(5).values
            assert result.logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-4)
            assert result.top_logprobs.ravel().tolist() == pytest.approx(best.ravel().tolist(), abs=1e-4)
            assert (expected.gather(1, torch.tensor(result.top_tokens)) - best).abs().max() < 1e-4
    with pytest.raises(WinnowError, match="top=0"):
        HFBackend(model, tokenizer).token_logprobs(["ab"], top=0)
    with pytest.raises(WinnowError, match="at most 9"):
        HFBackend(model, tokenizer, max_length=8).token_logprobs(["a" * 10], top=1)
