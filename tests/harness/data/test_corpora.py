import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.calibration.tokens import corpus_fingerprint, tokenize
from harness.data.corpora import hub_dataset, load_documents, local_files, mixture
from harness.data.rows import Document
from harness.data.schema import DATA_SETS
from harness.errors import WinnowError
from tests.tiny import byte_tokenizer

ROWS = [
    {"text": f"text {i}", "origin": "odd" if i % 2 else "even", "question": f"q{i}", "answer": f"a{i}"}
    for i in range(20)
]
TURNS = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
TOOL_TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "fix it"}, {"type": "image"}]},
    {"role": "assistant", "content": "look", "tool_calls": [{"function": {"name": "ls", "arguments": "{}"}}]},
    {"role": "tool", "content": "a.py"},
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set as the hub has it, in a local folder; with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    return str(folder)


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def texts(documents):
    return [document.text for document in documents]


def test_jsonl_gives_all_documents_in_file_order(tmp_path):
    documents = local_files(write_jsonl(tmp_path / "a.jsonl", ROWS), source_column="origin")
    assert texts(documents) == [row["text"] for row in ROWS]
    assert [d.source for d in documents[:2]] == ["even", "odd"]


def test_parquet_and_text_and_a_folder_of_all(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("one whole\n\ndocument\n")
    write_jsonl(tmp_path / "a.jsonl", ROWS[2:3])
    (tmp_path / "notes.md").write_text("not a corpus")
    assert texts(local_files(str(tmp_path / "b.parquet"), text_column="answer")) == ["a0", "a1"]
    assert texts(local_files(str(tmp_path / "c.txt"))) == ["one whole\n\ndocument\n"]
    assert texts(local_files(str(tmp_path))) == ["text 2", "text 0", "text 1", "one whole\n\ndocument\n"]


def test_local_sample_is_set_by_the_seed_and_in_file_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    first = texts(local_files(path, num_sequences=8, seed=1))
    assert first == texts(local_files(path, num_sequences=8, seed=1))
    assert first != texts(local_files(path, num_sequences=8, seed=2))
    assert len(first) == 8
    numbers = [int(text.split()[1]) for text in first]
    assert numbers == sorted(numbers)


def test_messages_become_the_text_where_there_is_none(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    (document,) = local_files(write_jsonl(tmp_path / "a.jsonl", rows))
    assert document.text == "hi\n\nyes"
    assert document.messages == (("user", "hi"), ("assistant", "yes"))


def test_messages_may_be_json_and_may_call_tools(tmp_path):
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "ls"}}]}]
    rows = [{"messages": TOOL_TURNS}, {"messages": json.dumps(TOOL_TURNS)}, {"messages": calls}]
    listed, as_json, called = local_files(write_jsonl(tmp_path / "a.jsonl", rows))
    assert listed == as_json
    assert listed.messages == (
        ("user", "fix it"), ("assistant", 'look\n{"name": "ls", "arguments": "{}"}'), ("tool", "a.py"),
    )  # fmt: skip
    assert called.messages == (("assistant", '{"name": "ls"}'),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '["x"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", '{"body": "x"}\n', "no text in column 'text'; columns: body"),
        ("a.jsonl", '{"text": 3}\n', "no text in column 'text'"),
        ("a.jsonl", '{"messages": "not json"}\n', "'messages' is not a list of {role, content}"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}\n', "'messages' is not a list"),
        ("a.jsonl", '{"messages": ["x"]}\n', "'messages' is not a list of {role, content}"),
        ("a.parquet", "not parquet", "not a valid parquet file"),
        ("a.csv", "x", "expected a file named .jsonl"),
    ],
)
def test_bad_local_files_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(WinnowError, match=message):
        local_files(str(tmp_path / name))


def test_bad_number_of_documents(tmp_path):
    with pytest.raises(WinnowError, match="num_sequences must be at least 1"):
        local_files(write_jsonl(tmp_path / "a.jsonl", ROWS), num_sequences=-1)


def test_missing_or_empty_or_binary_corpus(tmp_path):
    with pytest.raises(WinnowError, match="does not exist"):
        local_files(str(tmp_path / "none.jsonl"))
    with pytest.raises(WinnowError, match=r"no .jsonl, .json, .txt, .parquet \(or these with .gz or .zst\) file"):
        local_files(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WinnowError, match="is not UTF-8 text"):
        local_files(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_draws_by_seed(hub_folder, streaming):
    def draw(seed):
        return texts(hub_dataset(hub_folder, "train", 6, seed, text_column="text", streaming=streaming))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(draw(1)) == 6
    assert set(draw(1)) <= {row["text"] for row in ROWS}
    every = hub_dataset(hub_folder, "train", text_column="text", streaming=streaming)
    assert sorted(texts(every)) == sorted(row["text"] for row in ROWS)


def test_hub_dataset_template_and_chat(hub_folder):
    documents = hub_dataset(
        hub_folder,
        "train",
        3,
        template="{question}={answer}",
        chat={"user": "question", "assistant": "answer"},
    )
    for document in documents:
        number = document.text.split("=a")[1]
        assert document.text == f"q{number}=a{number}"
        assert document.messages == (("user", f"q{number}"), ("assistant", f"a{number}"))


def test_bad_hub_datasets_say_what_is_wrong(hub_folder, tmp_path):
    with pytest.raises(WinnowError, match="template needs column 'nothing'; columns: text, origin"):
        hub_dataset(hub_folder, "train", template="{nothing}")
    with pytest.raises(WinnowError, match="no text in column 'body'"):
        hub_dataset(hub_folder, "train", text_column="body")
    with pytest.raises(WinnowError, match="cannot load the data set .*split test"):
        hub_dataset(hub_folder, "test", text_column="text")
    with pytest.raises(WinnowError, match="without a network: winnow-data stage --calibration mine --to DIR"):
        hub_dataset(hub_folder, "test", text_column="text", staged_as="mine")
    with pytest.raises(WinnowError, match="chat needs column 'nothing'"):
        hub_dataset(hub_folder, "train", text_column="text", chat={"user": "nothing"})
    with pytest.raises(WinnowError, match="num_sequences must be at least 1"):
        hub_dataset(hub_folder, "train", 0, text_column="text")
    with pytest.raises(WinnowError, match="not both"):
        hub_dataset(hub_folder, "train", text_column="text", template="{text}")
    with pytest.raises(WinnowError, match="cannot load the data set"):
        hub_dataset(str(tmp_path / "nowhere"), "train", text_column="text")


@pytest.fixture
def hydra_conf(tmp_path):
    folder = tmp_path / "conf" / "calibration"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(9)])
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\nnum_sequences: null\nseed: 0\ncorpus:\n  _target_: harness.data.corpora.local_files\n"
            f"  path: {path}\n  num_sequences: ${{calibration.num_sequences}}\n"
            "  seed: ${calibration.seed}\n  source: ${calibration.name}\n"
        )
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        yield


@pytest.mark.usefixtures("hydra_conf")
def test_mixture_takes_its_parts_from_other_configs():
    documents = mixture(["one:4", "two:2"], seed=3)
    assert [d.source for d in documents] == ["one"] * 4 + ["two"] * 2
    assert all(d.text.startswith(d.source) for d in documents)
    assert texts(documents) != texts(mixture(["one:4", "two:2"], seed=4))


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["three:4"], "unknown calibration corpus 'three'; known: one, two"),
        (["one"], "'one' is not NAME:NUMBER"),
        (["one:none"], "is not NAME:NUMBER"),
        (["one:0"], "is not NAME:NUMBER"),
        ([], "the mixture has no parts"),
    ],
)
def test_bad_mixtures_say_what_is_wrong(parts, message):
    with pytest.raises(WinnowError, match=message):
        mixture(parts)


def test_errors_reach_the_user_through_hydra(tmp_path):
    with pytest.raises(WinnowError, match="nowhere does not exist"):
        load_documents(calibration_conf("local", f"calibration.path={tmp_path}/nowhere").corpus)
    with pytest.raises(WinnowError, match="lacks a value: set calibration.path"):
        load_documents(calibration_conf("local").corpus)
    conf = calibration_conf("mixture", "calibration.parts=[code]")
    with pytest.raises(WinnowError, match="'code' is not NAME:NUMBER"):
        load_documents(conf.corpus)


def test_every_calibration_config_is_whole():
    from pathlib import Path

    import harness

    folder = Path(harness.__file__).parents[1] / "conf" / "calibration"
    names = [path.stem for path in folder.glob("[!_]*.yaml")]
    assert {"agentic", "air_gapped", "xlam_function_calling"} <= set(names)
    for name in names:
        node = calibration_conf(name, *(["calibration.path=x"] if name == "local" else []))
        assert node.name == name
        if name in ("agentic", "air_gapped"):
            assert {part.split(":")[0] for part in node.parts} <= set(names)
        corpus = OmegaConf.to_container(node.corpus, resolve=True)
        assert corpus.get("staged_as", name) == name
        if corpus["_target_"] == "harness.data.corpora.staged_corpus":
            assert corpus["name"] == name
            assert DATA_SETS[name].kind == "corpus"


def test_mixture_without_hydra_says_so():
    with pytest.raises(WinnowError, match="needs Hydra"):
        mixture(["one:1"])


def calibration_conf(*overrides):
    from pathlib import Path

    import harness

    name, *rest = overrides
    with initialize_config_dir(str(Path(harness.__file__).parents[1] / "conf"), version_base="1.3"):
        return compose(f"calibration/{name}", overrides=[*rest, "+data.root=null"]).calibration


def test_local_config_reads_any_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    node = calibration_conf("local", f"calibration.path={path}", "calibration.max_length=256")
    assert texts(load_documents(node.corpus)) == [row["text"] for row in ROWS]
    assert (node.max_length, node.packing, node.chat_template) == (256, False, "auto")


@pytest.mark.parametrize(
    ("name", "columns", "text"),
    [
        ("evol_codealpaca", {"instruction": "do", "output": "done"}, "do\n\ndone"),
        ("writing_prompts", {"prompt": "who", "body": "story"}, "who\n\nstory"),
        ("c4", {"text": "web", "url": "u"}, "web"),
        (
            "math_sft",
            {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
            "1+1\n\n2",
        ),
        ("mixture_of_thoughts_math", {"messages": TURNS, "num_tokens": 2, "source": "s"}, "1+1\n\n2"),
        (
            "xlam_function_calling",
            {"id": 0, "query": "Rain?", "tools": '[{"name": "rain"}]', "answers": '[{"name": "rain"}]'},
            '[{"name": "rain"}]\n\nRain?\n\n[{"name": "rain"}]',
        ),
        (
            "swe_smith",
            {"messages": json.dumps([*TOOL_TURNS]), "instance_id": "i", "resolved": True},
            'fix it\n\nlook\n{"name": "ls", "arguments": "{}"}\n\na.py',
        ),
    ],
)
def test_hub_configs_read_a_local_folder_with_their_columns(tmp_path, monkeypatch, name, columns, text):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    split = "tool" if name == "swe_smith" else "train"
    files = {split: write_jsonl(tmp_path / "data" / f"{split}.jsonl", [columns] * 3)}
    load = datasets.load_dataset
    if name == "swe_smith":  # a folder of files has no split of this name by itself
        monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **rest: load(path, data_files=files, **rest))
    overrides = [f"calibration.corpus.path={tmp_path / 'data'}", "calibration.num_sequences=2"]
    if name in ("c4", "mixture_of_thoughts_math"):
        overrides.append("calibration.corpus.name=null")
    documents = load_documents(calibration_conf(name, *overrides).corpus)
    assert texts(documents) == [text] * 2
    assert {d.source for d in documents} == {name}


def test_unpacked_documents_are_cut_on_the_right_without_special_tokens(tokenizer):
    sequences = tokenize([Document("abcdef", "x"), Document("", "x"), Document("gh", "y")], tokenizer, 4)
    expected = [tokenizer.convert_tokens_to_ids(list(text)) for text in ("abcd", "gh")]
    assert [s.input_ids.tolist() for s in sequences] == expected
    assert [s.lengths for s in sequences] == [(4,), (2,)]
    assert [s.sources for s in sequences] == [("x",), ("y",)]


def test_packed_blocks_hold_all_tokens_in_order(tokenizer):
    documents = [Document("abcde", "x"), Document("fg", "y"), Document("hijklmnopq", "z")]
    sequences = tokenize(documents, tokenizer, 6, packing=True)
    assert [s.lengths for s in sequences] == [(5, 1), (1, 5), (5,)]
    assert [s.sources for s in sequences] == [("x", "y"), ("y", "z"), ("z",)]
    ids = np.concatenate([s.input_ids for s in sequences]).tolist()
    assert ids == tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopq"))
    assert [s.lengths for s in tokenize(documents, tokenizer, 6, packing=True, max_blocks=2)] == [
        (5, 1),
        (1, 5),
    ]


def test_chat_template_is_used_where_there_is_one(tokenizer, caplog):
    document = Document("plain", messages=(("user", "hi"), ("assistant", "yes")))

    def text(chat_template):
        (sequence,) = tokenize([document], tokenizer, 99, chat_template=chat_template)
        return tokenizer.decode(sequence.input_ids)

    with caplog.at_level("WARNING"):
        assert text(chat_template="auto") == "plain"
    assert "1 documents with messages are plain text" in caplog.text
    with pytest.raises(WinnowError, match="no chat template: set it to false"):
        text(chat_template=True)
    with pytest.raises(WinnowError, match="must be true, false or auto, not 'yes'"):
        text(chat_template="yes")
    tokenizer.chat_template = TEMPLATE
    assert text(chat_template=True) == text(chat_template="auto") == "<user>hi<assistant>yes"
    assert text(chat_template=False) == "plain"
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(WinnowError, match="no such role.*chat_template=false"):
        text(chat_template=True)


def test_bad_tokenisation_says_what_is_wrong(tokenizer):
    with pytest.raises(WinnowError, match="it has no documents"):
        tokenize([], tokenizer, 8)
    with pytest.raises(WinnowError, match="none of its 2 documents has a token"):
        tokenize([Document(""), Document("")], tokenizer, 8)
    with pytest.raises(WinnowError, match="max_length must be at least 1"):
        tokenize([Document("a")], tokenizer, 0)
    with pytest.raises(WinnowError, match="max_blocks"):
        tokenize([Document("a")], tokenizer, 8, max_blocks=4)


def test_fingerprint_tells_corpora_apart(tokenizer):
    def fingerprint(*documents, **options):
        return corpus_fingerprint(tokenize(documents, tokenizer, 4, **options))

    base = fingerprint(Document("ab"), Document("cd"))
    assert base == fingerprint(Document("ab"), Document("cd"))
    others = [
        fingerprint(Document("ab"), Document("ce")),
        fingerprint(Document("abc"), Document("d")),
        fingerprint(Document("ab"), Document("cd"), packing=True),
        fingerprint(Document("ab", "x"), Document("cd")),
    ]
    assert len({base, *others}) == 5
