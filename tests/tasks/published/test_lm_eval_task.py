"""lm-eval tasks on local files: the numbers against a computation by hand, and our adapter against lm-eval's class."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from harness.backends.hf import HFBackend
from harness.backends.tokens import cut, prompts_that_fit, stops_by_prompt
from harness.contracts import intervals
from harness.contracts.backend import Sampling
from harness.contracts.record import Record, Score
from harness.errors import WinnowError
from harness.records.store import RecordStore
from tasks.published.domains import domain_of
from tasks.published.lm_eval_task import LmEvalTask
from tasks.published.lm_eval_values import interval_of
from tests.tiny import byte_tokenizer, save_tiny, tiny_model

QUESTIONS = [
    {"question": f"What is {a} plus {b}?", "choices": [str(a), f"it is {a + b}", "none"], "answer": (a + b) % 3}
    for a, b in [(1, 2), (3, 9), (20, 4), (7, 7), (5, 13), (8, 1)]
]
TEXTS = [{"text": text} for text in ("The baker sold\nten apples.", "é is a letter", "one two three four five", "x")]
PROMPTS = [{"prompt": f"Say {word}:", "target": "never"} for word in ("sun", "moon", "stars and planets")]
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "choices",
    "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
ROLLING = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}  # fmt: skip
WRITE = {
    "output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target",
    "generation_kwargs": {"until": ["e", "Q"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "lower", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ],
}  # fmt: skip
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)


class BruteForce:
    """The interface of ``VLLMBackend`` on a transformers model, a sequence at a time."""

    name = "vllm"

    def __init__(self, model: torch.nn.Module, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.prompts: list[str] = []
        self.sampling: list[Sampling | None] = []

    def _logprobs(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    def score_tokens(self, sequences: list[list[int]], top: int, progress: str = "") -> list[list[dict[int, float]]]:
        assert max(map(len, sequences)) < self.max_length
        answers = []
        for tokens in sequences:
            logprobs = self._logprobs(tokens)
            best = logprobs.topk(top, dim=-1).indices.tolist()
            places = enumerate(tokens[1:])
            answers.append([{t: float(logprobs[i, t]) for t in (token, *best[i])} for i, token in places])
        return answers

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        self.prompts += prompts
        self.sampling.append(sampling)
        encoded = prompts_that_fit(self.tokenizer, prompts, max_new_tokens, self.max_length)
        answers = []
        for tokens, stops in zip(encoded, stops_by_prompt(stop, len(prompts)), strict=True):
            new: list[int] = []
            while len(new) < max_new_tokens and (not new or new[-1] != self.tokenizer.eos_token_id):
                new.append(int(self._logprobs(tokens + new)[-1].argmax()))
            answers.append(cut(self.tokenizer.decode(new, skip_special_tokens=True), stops))
        return answers


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model that writes printable ASCII."""
    model = tiny_model("qwen3_moe")
    printable = byte_tokenizer().encode("".join(map(chr, range(32, 127))))
    with torch.no_grad():
        others = [token for token in range(300) if token not in printable]
        model.lm_head.weight[others] = model.lm_head.weight[printable[: len(others)]].mean(0) * 0.5
        model.lm_head.weight[printable] *= 3
    return model


@pytest.fixture(scope="module")
def backend(model: Any) -> HFBackend:
    return HFBackend(model, byte_tokenizer(), batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backend: HFBackend) -> str:
    """Task files: choice (and its second half, more), rolling, write, and the groups both and even."""
    folder = tmp_path_factory.mktemp("tasks")
    written = backend.generate([p["prompt"] for p in PROMPTS], 12, ["e", "Q", "<|endoftext|>"])
    assert written[0] and written[0] != written[0].lower()
    prompts = [PROMPTS[0] | {"target": written[0]}, PROMPTS[1] | {"target": written[1].lower()}, PROMPTS[2]]

    def task(name: str, documents: list[dict[str, Any]], config: dict[str, Any]) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | source | config))

    task("choice", QUESTIONS[:4], CHOICE)
    task("more", QUESTIONS[4:], CHOICE)
    task("rolling", TEXTS, ROLLING)
    task("write", prompts, WRITE)
    for name, by_size in (("both", True), ("even", False)):
        group = {"group": name, "task": ["choice", "more"]}
        mean = {"aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]}
        (folder / f"{name}.yaml").write_text(json.dumps(group | mean))
    return str(folder)


def by_name(scores: Sequence[Score]) -> dict[tuple[str, str], Score]:
    return {(score.part, score.metric): score for score in scores}


def right(backend: HFBackend, questions: list[dict[str, Any]]) -> tuple[list[float], list[float], list[list[float]]]:
    """``acc`` and ``acc_norm`` of each question and the log-likelihoods of its choices, by our own backend."""
    plain, normed, logprobs = [], [], []
    for q in questions:
        pairs = [(f"Q: {q['question']}\nA:", f" {choice}") for choice in q["choices"]]
        own = [result.logprob for result in backend.loglikelihood(pairs)]
        by_length = [value / len(choice) for value, choice in zip(own, q["choices"], strict=True)]
        plain.append(float(own.index(max(own)) == q["answer"]))
        normed.append(float(by_length.index(max(by_length)) == q["answer"]))
        logprobs.append(own)
    return plain, normed, logprobs


def test_multiple_choice_and_groups_by_hand(backend: HFBackend, folder: str, tmp_path: Path) -> None:
    result = LmEvalTask("lm", ("both",), folder).run(backend)
    scores = by_name(result.scores)
    assert set(scores) == {("choice", "acc"), ("choice", "acc_norm"), ("more", "acc"), ("more", "acc_norm")} | {
        ("both", "acc")
    }
    plain, normed, logprobs = right(backend, QUESTIONS)
    assert 0 < sum(plain[:4]) < 4
    for metric, outcomes in (("acc", plain), ("acc_norm", normed)):
        for name, own in (("choice", outcomes[:4]), ("more", outcomes[4:])):
            low, high = intervals.wilson(sum(own), len(own))
            expected = Score("lm", metric, sum(own) / len(own), len(own), low, high, name, kind="choice")
            assert scores[(name, metric)] == replace(expected, domain="knowledge")
    assert [sample.score for sample in result.samples] == plain
    assert [sample.domain for sample in result.samples] == ["choice"] * 4 + ["more"] * 2
    for sample, own, norm, question in zip(result.samples, logprobs, normed, QUESTIONS, strict=True):
        assert sample.detail["logprobs"] == pytest.approx(own, abs=1e-4)
        assert sample.detail["metrics"]["acc_norm"] == norm and sample.detail["target"] == question["answer"]
    both, parts = scores[("both", "acc")], [scores[("choice", "acc")], scores[("more", "acc")]]
    assert both.value == pytest.approx(sum(plain) / 6) and both.n == 6
    squares = [(w * (p.value - p.low)) ** 2 for w, p in zip((4 / 6, 2 / 6), parts, strict=True)]
    assert both.low == pytest.approx(both.value - math.sqrt(sum(squares))) and both.low <= both.value <= both.high
    even = by_name(LmEvalTask("lm", ("even",), folder).run(backend).scores)[("even", "acc")]
    assert even.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    cell = {"id": "x", "method": "none", "ratio": 0.0, "seed": 0}
    record = Record(cell, {}, {}, {}, [], {}, {})
    store = RecordStore(tmp_path)
    store.write(record, result.samples)
    assert [s.item for s in store.read_samples("x") or []] == [s.item for s in result.samples]


def test_items_are_the_same_in_every_cell_and_limit_takes_the_first(backend: HFBackend, folder: str) -> None:
    other = HFBackend(tiny_model("qwen3_moe", seed=1), byte_tokenizer())
    items = [sample.item for sample in LmEvalTask("lm", ("choice",), folder).run(other).samples]
    first = [sample.item for sample in LmEvalTask("lm", ("choice",), folder, limit=2).run(backend).samples]
    assert len(set(items)) == 4 and first == items[:2] and items[0].startswith("choice-")


def test_rolling_by_hand_in_windows_of_the_models_length(model: Any, folder: str) -> None:
    for max_length in (2048, 9):
        backend = HFBackend(model, byte_tokenizer(), max_length=max_length)
        result = LmEvalTask("lm", ("rolling",), folder).run(backend)
        scores = by_name(result.scores)
        texts = [document["text"] for document in TEXTS]
        nll = [-rolled(model, text, max_length) for text in texts]
        words, size = [len(text.split()) for text in texts], [len(text.encode()) for text in texts]
        for metric, weights in (("word_perplexity", words), ("byte_perplexity", size)):
            low, high = intervals.bootstrap_perplexity(nll, weights)
            score = scores[("rolling", metric)]
            assert (score.value, score.low, score.high) == pytest.approx(
                (math.exp(sum(nll) / sum(weights)), low, high), rel=1e-4
            )
            assert not score.higher_is_better and score.n == 4
        bits = scores[("rolling", "bits_per_byte")]
        assert bits.value == pytest.approx(sum(nll) / sum(size) / math.log(2), rel=1e-5)
        assert bits.low <= bits.value <= bits.high
        assert [s.score for s in result.samples] == pytest.approx(nll, rel=1e-5)
        assert [s.weight for s in result.samples] == words


def rolled(model: Any, text: str, max_length: int) -> float:
    """Log-likelihood of a text after the end-of-text token; the last window is a whole one with some context."""
    tokens = [256, *byte_tokenizer().encode(text)]
    total, done = 0.0, 1
    while done < len(tokens):
        end = min(done + max_length, len(tokens))
        start = max(0, end - 1 - max_length) if done > 1 else 0
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens[start : end - 1]])).logits[0].double().log_softmax(-1)
        total += sum(float(logprobs[i - 1 - start, tokens[i]]) for i in range(done, end))
        done = end
    return total


def test_exact_match_with_filters_by_hand(backend: HFBackend, folder: str) -> None:
    result = LmEvalTask("lm", ("write",), folder).run(backend)
    written = backend.generate([p["prompt"] for p in PROMPTS], 12, ["e", "Q", "<|endoftext|>"])
    assert [sample.output.split("e")[0].split("Q")[0] for sample in result.samples] == written
    scores = by_name(result.scores)
    exact = {name: scores[("write", f"exact_match,{name}")] for name in ("whole", "lower")}
    as_written = [True, written[1] == written[1].lower(), False]
    assert exact["whole"].value == pytest.approx(sum(as_written) / 3)
    assert exact["lower"].value == pytest.approx(1 / 3) and exact["lower"].n == 3
    assert [sample.score for sample in result.samples] == as_written
    assert result.samples[1].detail["metrics"]["exact_match,lower"] == 1.0


def test_kinds_are_those_of_what_lm_eval_asks_and_domains_may_be_given(backend: HFBackend, folder: str) -> None:
    def said(**options: Any) -> set[tuple[str, str, str]]:
        scores = LmEvalTask("lm", ("both", "rolling", "write"), folder, **options).run(backend).scores
        return {(score.part, score.kind, score.domain) for score in scores}

    choices = {(name, "choice", "knowledge") for name in ("choice", "more", "both")}
    about = {"rolling": "language", "write": "code"}
    assert said(domains=about) == choices | {("rolling", "perplexity", "language"), ("write", "generative", "code")}
    assert {domain for *_, domain in said(domain="law")} == {"law"}


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("gsm8k_cot", "math"), ("minerva_math_algebra", "math"), ("lambada_openai", "language"), ("humaneval", "code"),
        ("mmlu_college_mathematics", "knowledge"), ("mathematical", "knowledge"), ("c4", "language"),
    ],
)  # fmt: skip
def test_known_sets_have_their_domain_and_others_are_about_knowledge(name: str, domain: str) -> None:
    assert domain_of(name) == domain


@pytest.mark.parametrize("max_length", [2048, 34])
def test_the_adapter_gives_the_numbers_of_lm_evals_own_class(model: Any, folder: str, max_length: int) -> None:
    """Also where texts are cut. The engine's longest prompt is two tokens shorter than that of transformers."""
    own = HFBackend(model, byte_tokenizer(), batch_size=2, max_length=max_length)
    scoring = LmEvalTask("lm", ("choice", "more", "rolling"), folder, num_fewshot=1)
    writing = LmEvalTask("lm", ("write",), folder, num_fewshot=1)
    for task, other_length in ((scoring, max_length + 2), (writing, max_length)):
        theirs = task.run(own)
        ours = task.run(BruteForce(model, byte_tokenizer(), other_length))  # type: ignore[arg-type]
        for a, b in zip(theirs.scores, ours.scores, strict=True):
            assert (a.metric, a.part, a.n, a.higher_is_better) == (b.metric, b.part, b.n, b.higher_is_better)
            assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-4)
        for x, y in zip(theirs.samples, ours.samples, strict=True):
            assert (x.item, x.output) == (y.item, y.output)
            assert x.detail["logprobs"] == pytest.approx(y.detail["logprobs"], rel=1e-4, abs=1e-4)


def test_the_numbers_are_those_of_simple_evaluate(backend: HFBackend, folder: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from harness.backends.lm_eval import language_model

    manager = TaskManager(include_path=folder, include_defaults=False)
    options: dict[str, Any] = {"task_manager": manager, "num_fewshot": 2, "bootstrap_iters": 0}
    theirs = simple_evaluate(language_model(backend), tasks=["both", "rolling"], **options)
    ours = LmEvalTask("lm", ("both", "rolling"), folder, num_fewshot=2).run(backend)
    assert len(ours.scores) == 8
    for score in ours.scores:
        assert score.value == pytest.approx(theirs["results"][score.part][f"{score.metric},none"], rel=1e-6)
    rows = [row for name in ("choice", "more", "rolling") for row in theirs["samples"][name]]
    for sample, row in zip(ours.samples, rows, strict=True):
        answers = [answer for (answer,) in row["resps"]]
        assert sample.detail["logprobs"] == [a[0] if isinstance(a, tuple) else a for a in answers]


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_the_adapter_tells_greedy_answers_and_empty_contexts(model: Any, backend: HFBackend) -> None:
    from harness.backends.lm_eval import language_model

    pairs = [("Say", backend.generate(["Say"], 3)[0]), ("Say", "zzz"), ("", "abc"), ("x  ", "y")]
    requests = [request(*pair) for pair in pairs]
    ours = language_model(BruteForce(model, byte_tokenizer(), 64)).loglikelihood(requests, disable_tqdm=True)
    theirs = language_model(backend).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [True, False, False, False]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-4)
    with pytest.raises(WinnowError, match="needs 1 to 6 at max_length=8"):
        language_model(BruteForce(model, byte_tokenizer(), 8)).loglikelihood([request("a", "b" * 7)])


def test_the_adapter_follows_generation_settings_and_fills_the_cache(model: Any) -> None:
    from harness.backends.lm_eval import language_model

    engine = BruteForce(model, byte_tokenizer(), 64)
    lm = language_model(engine)
    kept: list[Any] = []
    lm.cache_hook.add_partial = lambda kind, key, answer: kept.append((kind, key, answer))
    requests = [
        request("one", {"until": "e", "max_gen_toks": 3}),
        request("two", {"until": [], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 3}),
        request("three", {"until": ["a"], "max_gen_toks": 3, "temperature": 0.0, "num_beams": 1, "top_k": 5}),
        request("four", {"do_sample": True, "max_gen_toks": 3}),
    ]
    answers = lm.generate_until(requests)
    assert engine.prompts == ["one", "three", "two", "four"]
    assert engine.sampling == [None, Sampling(0.5, 0.9), Sampling(1.0)]
    assert {key[0]: answer for _, key, answer in kept} == dict(
        zip(("one", "two", "three", "four"), answers, strict=True)
    )
    lm.loglikelihood([request("a", "b")], disable_tqdm=True)
    lm.loglikelihood_rolling([request("ab")])
    assert [kind for kind, *_ in kept[4:]] == ["loglikelihood", "loglikelihood_rolling"]
    with pytest.raises(WinnowError, match="cannot follow the task's setting repetition_penalty"):
        lm.generate_until([request("x", {"repetition_penalty": 1.1})])


def test_the_adapter_gives_the_beginning_of_text_that_the_tokenizer_would(model: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    from harness.backends.lm_eval import language_model

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    engine = BruteForce(model, tokenizer, 64)
    lm = language_model(engine)
    lm.generate_until([request("hi", {"max_gen_toks": 1}), request("<|endoftext|>hi", {"max_gen_toks": 1})])
    assert engine.prompts == ["<|endoftext|>hi"] * 2
    assert lm.tok_encode("hi") == lm.tok_encode("<|endoftext|>hi") == [256, *byte_tokenizer().encode("hi")]


def test_chat_templates(model: Any, folder: str) -> None:
    tokenizer = byte_tokenizer()
    task = LmEvalTask("lm", ("write",), folder, chat_template=True, limit=1)
    with pytest.raises(WinnowError, match="no chat template"):
        task.run(HFBackend(model, tokenizer))
    tokenizer.chat_template = CHAT
    engine = BruteForce(model, tokenizer, 256)
    ours = task.run(engine)  # type: ignore[arg-type]
    assert engine.prompts == ["[user]Say sun:[model]"]
    theirs = task.run(HFBackend(model, tokenizer, max_length=256))
    assert ours.samples[0].output == theirs.samples[0].output


def test_what_is_wrong_is_said_in_one_line(model: Any, backend: HFBackend, folder: str, tmp_path: Path) -> None:
    for make, words in (
        (lambda: LmEvalTask("lm", ("chioce",), folder).run(backend), "no task 'chioce': did you mean choice?"),
        (lambda: LmEvalTask("lm", "choice"), "give a list"),  # type: ignore[arg-type]
        (lambda: LmEvalTask("lm", ("choice",), str(tmp_path / "absent")), "no such folder"),
        (lambda: LmEvalTask("lm", ("choice",), folder).run(SimpleNamespace(name="odd")), "not odd"),  # type: ignore[arg-type]
        (lambda: LmEvalTask("lm", ("write",), folder).run(HFBackend(model, byte_tokenizer(), max_length=12)), "12"),
    ):
        with pytest.raises(WinnowError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
    lost = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lost.jsonl")}}}
    (tmp_path / "lost.yaml").write_text(json.dumps({"task": "lost", "test_split": "test"} | lost | CHOICE))
    with pytest.raises(WinnowError, match="cannot load lost"):
        LmEvalTask("lm", ("lost",), str(tmp_path)).run(backend)
    broken = tiny_model("qwen3_moe")
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(WinnowError, match="of 4 of 4 items of choice are not finite"):
        LmEvalTask("lm", ("choice",), folder).run(HFBackend(broken, byte_tokenizer()))


def test_intervals_of_other_metrics() -> None:
    from lm_eval.api import metrics

    assert interval_of(metrics.mean, [0.2, 0.4, 0.9], 0) == intervals.bootstrap_mean([0.2, 0.4, 0.9])
    assert interval_of(metrics.perplexity, [-1.0, -2.0], 0) == intervals.bootstrap_perplexity([1.0, 2.0], [1.0, 1.0])
    low, high = interval_of(metrics.median, [1, 2, 3, 4, 5], 0)
    assert 1 <= low < 3 < high <= 5


def test_lm_eval_opens_a_checkpoint_by_the_name_winnow(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    from harness.backends import lm_eval as lm_eval_models

    save_tiny(tmp_path, "qwen3_moe")
    lm = get_model("winnow").create_from_arg_string(
        f"pretrained={tmp_path},backend=hf,max_length=99", {"batch_size": 4, "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(lm, lm_eval_models.TransformersLM) and (lm.max_length, lm.batch_size) == (99, 4)
    with pytest.raises(WinnowError, match="choose auto, hf or vllm"):
        lm_eval_models.open_model(str(tmp_path), backend="onnx")


def test_tokens_to_write_are_counted_for_tasks_that_write(folder: str) -> None:
    assert LmEvalTask("lm", ("choice", "rolling"), folder).tokens_to_write() == 0
    assert LmEvalTask("lm", ("choice", "write"), folder).tokens_to_write() == 12 * len(PROMPTS)
    assert LmEvalTask("lm", ("write",), folder, limit=2).tokens_to_write() == 24
