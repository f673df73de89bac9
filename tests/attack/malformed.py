"""Malformed settings, model folders and corpora. ``results`` runs a cell with each: one clear line must come of it.

As data: the overrides of the command line, or what is spoilt in a tiny model or its calibration text, and words that
the one line must hold.
"""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import cli
from harness.sweeps import plugin
from tests.attack import malformed_settings
from tests.tiny import save_tiny

TEXTS = ["def add(a, b):\n    return a + b\n", "Tom has 3 apples and buys 4 more.", "The mill stood by the river."]
TURNS = {"messages": [{"role": "user", "content": "Add 3 and 4."}, {"role": "assistant", "content": "7"}]}
SCORED = ("suite=reference", "suite.items=2", *(f"~suite.tasks.{one}" for one in ("code", "writing", "perplexity")))

Spoil = Callable[[Path, Path], None]


def _nothing(model: Path, corpus: Path) -> None: ...


@dataclass(frozen=True)
class Malformed:
    """``says``: words of the line. ``spoil`` gets the model's folder and the calibration file."""

    name: str
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    spoil: Spoil = field(default=_nothing)


def setting(text: str, *says: str) -> Malformed:
    """The last of several overrides is the malformed one; the line must name its key."""
    arguments = tuple(text.split(" "))
    key = arguments[-1].partition("=")[0].lstrip("+~")
    return Malformed(text, says or (key,), arguments)


SETTINGS = [setting(*words) for words in malformed_settings.SETTINGS]


def config(**changes: Any) -> Spoil:
    """config.json with these values; ``None`` removes a key."""

    def spoil(model: Path, corpus: Path) -> None:
        path = model / "config.json"
        told = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))

    return spoil


def written(name: str, content: bytes) -> Spoil:
    """A file of the model with this content."""

    def spoil(model: Path, corpus: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).write_bytes(content)

    return spoil


def _truncated(model: Path, corpus: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _unreadable(name: str) -> Spoil:
    """Nobody can read it, not even who may read everything: a link that leads back to itself."""

    def spoil(model: Path, corpus: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(model / name)

    return spoil


def _folder_instead(name: str) -> Spoil:
    def spoil(model: Path, corpus: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return spoil


def _template(text: str) -> Spoil:
    """A chat template of the tokenizer, and a corpus with turns for it."""

    def spoil(model: Path, corpus: Path) -> None:
        (model / "chat_template.jinja").write_text(text)
        corpus.write_text(json.dumps(TURNS) + "\n")

    return spoil


def _text(content: bytes) -> Spoil:
    def spoil(model: Path, corpus: Path) -> None:
        corpus.write_bytes(content)

    return spoil


def _index(model: Path, corpus: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "no-such-file.safetensors"}}')


MODELS = [
    Malformed("config.json is a list", ("config.json",), spoil=written("config.json", b"[]")),
    Malformed("config.json is null", ("config.json",), spoil=written("config.json", b"null")),
    Malformed("config.json is a number", ("config.json",), spoil=written("config.json", b"3")),
    Malformed("config.json is a text", ("config.json",), spoil=written("config.json", b'"model"')),
    Malformed("config.json is not UTF-8", ("config.json", "UTF-8"), spoil=written("config.json", b'{"a": "\xff\xfe"}')),
    Malformed("config.json is empty", ("config.json",), spoil=written("config.json", b"")),
    Malformed("config.json is cut off", ("config.json",), spoil=written("config.json", b'{"model_type": "olm')),
    Malformed("config.json is nested too deep", ("config.json",), spoil=written("config.json", b"[" * 100_000)),
    Malformed("config.json is a folder", ("config.json",), spoil=_folder_instead("config.json")),
    Malformed("config.json is a link to itself", ("config.json",), spoil=_unreadable("config.json")),
    Malformed("no model type", ("model_type",), spoil=config(model_type=None)),
    Malformed("model type is a list", ("model_type",), spoil=config(model_type=["olmoe"])),
    Malformed("top-k is 0", ("num_experts_per_tok",), spoil=config(num_experts_per_tok=0)),
    Malformed("top-k is negative", ("num_experts_per_tok",), spoil=config(num_experts_per_tok=-1)),
    Malformed("top-k is true", ("num_experts_per_tok",), spoil=config(num_experts_per_tok=True)),
    Malformed("top-k is a text", ("num_experts_per_tok",), spoil=config(num_experts_per_tok="two")),
    Malformed("top-k is more than all", ("experts",), spoil=config(num_experts_per_tok=9)),
    Malformed("no experts", ("num_experts",), spoil=config(num_experts=0)),
    Malformed("number of experts is a text", ("num_experts",), spoil=config(num_experts="8")),
    Malformed("no layers", ("num_hidden_layers", "0"), spoil=config(num_hidden_layers=0)),
    Malformed("layers missing", ("num_hidden_layers",), spoil=config(num_hidden_layers=None)),
    Malformed("layers is a text", ("num_hidden_layers",), spoil=config(num_hidden_layers="two")),
    Malformed("more layers than stored", ("model.layers.2",), spoil=config(num_hidden_layers=3)),
    Malformed("width is a text", ("intermediate_size",), spoil=config(intermediate_size="wide")),
    Malformed("another width", ("gate_proj", "shape", "24"), spoil=config(intermediate_size=24)),
    Malformed("hidden size is 0", ("hidden_size",), spoil=config(hidden_size=0)),
    Malformed("heads are 0", ("config.json",), spoil=config(num_attention_heads=0)),
    Malformed("unknown rope type", ("rope",), spoil=config(rope_parameters={"rope_type": "lasso", "rope_theta": 1e4})),
    Malformed("vocabulary too small", ("vocab_size=100", "300"), spoil=config(vocab_size=100)),
    Malformed("unknown activation", ("config.json",), spoil=config(hidden_act="softserve")),
    Malformed("dtype of the config", ("float33",), spoil=config(dtype="float33", torch_dtype=None)),
    Malformed("weights truncated", ("model.safetensors", "truncated"), spoil=_truncated),
    Malformed("weights empty", ("model.safetensors",), spoil=written("model.safetensors", b"")),
    Malformed("weights are text", ("model.safetensors",), spoil=written("model.safetensors", b"not weights" * 9)),
    Malformed("weights are a folder", ("model.safetensors",), spoil=_folder_instead("model.safetensors")),
    Malformed("weights cannot be read", ("model.safetensors",), spoil=_unreadable("model.safetensors")),
    Malformed("shard missing", ("no-such-file.safetensors",), spoil=_index),
    Malformed("index is a list", ("index.json",), spoil=written("model.safetensors.index.json", b"[]")),
    Malformed("index not UTF-8", ("index.json",), spoil=written("model.safetensors.index.json", b'{"\xff')),
    Malformed("tokenizer is a list", ("tokenizer",), spoil=written("tokenizer.json", b"[]")),
    Malformed("tokenizer is null", ("tokenizer",), spoil=written("tokenizer.json", b"null")),
    Malformed("tokenizer is not UTF-8", ("tokenizer",), spoil=written("tokenizer.json", b"\xff\xfe")),
    Malformed("tokenizer config is a list", ("tokenizer",), spoil=written("tokenizer_config.json", b"[]")),
    Malformed("generation config is a list", ("generation_config",), SCORED, written("generation_config.json", b"[]")),
    Malformed(
        "generation config not UTF-8", ("generation_config",), SCORED, written("generation_config.json", b'{"\xff"}')
    ),
    Malformed("template raises", ("chat template",), spoil=_template("{{ raise_exception('no user') }}")),
    Malformed("template divides by zero", ("chat template",), spoil=_template("{{ 1 / 0 }}")),
    Malformed("template is no template", ("chat template",), spoil=_template("{% for %}")),
    Malformed(
        "template calls itself", ("chat template",), spoil=_template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    ),
    Malformed(
        "template loops for ever",
        ("chat template",),
        spoil=_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    Malformed("template writes for ever", ("chat template",), spoil=_template("{{ 'a' * 9999999999999 }}")),
]

CORPORA = [
    Malformed("corpus empty", ("empty",), spoil=_text(b"")),
    Malformed("corpus of empty texts", ("empty",), spoil=_text(b'{"text": ""}\n')),
    Malformed("corpus is a number", ("corpus.jsonl",), spoil=_text(b"3\n")),
    Malformed("corpus cut off", ("corpus.jsonl",), spoil=_text(b'{"text": "a"}\n{"tex')),
    Malformed("corpus not UTF-8", ("corpus.jsonl",), spoil=_text(b'{"text": "\xff\xfe"}\n')),
    Malformed("corpus without text", ("corpus.jsonl",), spoil=_text(b'{"colour": "red"}\n')),
    Malformed("text is a number", ("corpus.jsonl",), spoil=_text(b'{"text": 3}\n')),
    Malformed("messages is a text", ("corpus.jsonl",), spoil=_text(b'{"messages": "hello"}\n')),
]
ALL = [*SETTINGS, *MODELS, *CORPORA]


@dataclass(frozen=True)
class Ending:
    """How the command ended: its exit status, its lines for the person, whether a traceback was printed."""

    status: int
    lines: tuple[str, ...]
    traceback: bool
    left: tuple[str, ...]

    def is_clear(self, one: Malformed) -> bool:
        """One line with the words, exit status 2, no traceback, and no record."""
        words = self.status == 2 and len(self.lines) == 1 and all(word in self.lines[0] for word in one.says)
        return words and not self.traceback and not self.left


def run(one: Malformed, folder: Path) -> Ending:
    """A cell of a tiny model with what is malformed, in this process; ``folder`` is empty."""
    model, corpus, out = folder / "model", folder / "corpus.jsonl", folder / "out"
    save_tiny(model, "olmoe")
    corpus.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS))
    one.spoil(model, corpus)
    options = {
        "model": "local", "model.path": str(model), "calibration": "local", "calibration.path": str(corpus),
        "calibration.max_length": "64", "suite": "none", "output_dir": str(out), "progress": "false",
    }  # fmt: skip
    own = [argument.partition("=") for argument in one.arguments]
    for key, _, _ in own:
        options.pop(key, None)
        if key == "calibration":
            options = {name: value for name, value in options.items() if not name.startswith("calibration")}
        if key == "model":
            options = {name: value for name, value in options.items() if not name.startswith("model.")}
    words = [f"{key}={value}" for key, value in options.items()] + list(one.arguments)
    words.sort(key=lambda word: not word.startswith("-"))
    told = io.StringIO()
    with _as_command(words), contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception as error:  # what would be a traceback
            status = 1
            told.write(f"Traceback: {type(error).__name__}: {error}\n")
    lines = told.getvalue().splitlines()
    left = tuple(str(path.relative_to(folder)) for path in sorted(out.glob("records/*.json")))
    own_lines = tuple(line for line in lines if line.startswith("winnow:"))
    return Ending(status, own_lines, any("Traceback" in line for line in lines), left)


def results(folder: Path) -> dict[str, Ending]:
    """Every malformed input, by its name; ``folder`` is where they run."""
    found = {}
    for place, one in enumerate(ALL):
        (folder / str(place)).mkdir()
        found[one.name] = run(one, folder / str(place))
    return found


def count(folder: Path) -> tuple[int, int]:
    """How many gave one clear line, and of how many."""
    found = results(folder)
    return sum(found[one.name].is_clear(one) for one in ALL), len(ALL)


@contextlib.contextmanager
def _as_command(words: list[str]) -> Iterator[None]:
    """What Hydra leaves in the process is put back; signals stay as they are."""
    arguments, handlers, level = sys.argv, logging.root.handlers[:], logging.root.level
    environment = dict(os.environ)
    sys.argv = ["winnow", *words]
    plugin.failed.clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.captureWarnings(False)
