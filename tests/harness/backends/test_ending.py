"""Where a text ends: wherever the end token is declared, and marked as special or not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from harness.backends.ending import before_end, end_marks, end_tokens, end_tokens_of
from harness.backends.hf import HFBackend, open_checkpoint
from harness.backends.tokens import decode, thought_marks
from harness.backends.vllm import VLLMBackend
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.errors import WinnowError
from tests.tiny import byte_tokenizer, save_tiny, tiny_model

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LONG = 40


def chat_tokenizer(template: str = CHAT, special: bool = False, *more: str) -> Any:
    """258 = <|im_end|>, then <|start|> and ``more``; all special or none."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=special) for text in ("<|im_end|>", "<|start|>", *more)], special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([], {256}),
        ([{"eos_token_id": 7}], {256, 7}),
        ([{"eos_token_id": [7, 8]}, {"eos_token_id": 9}], {256, 7, 8, 9}),
        ([{"text_config": {"eos_token_id": [7]}, "eos_token_id": None}], {256, 7}),
        ([{"eos_token_id": -1}, {"eos_token_id": True}, {"eos_token_id": [None, 7]}, {}], {256, 7}),
    ],
)
def test_the_list_has_every_declared_token(configs: list[dict[str, Any]], expected: set[int]) -> None:
    assert end_tokens(byte_tokenizer(), *configs) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT, {258}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", set()),
        ("{% for m in messages %}<|start|>{{ m.content }}{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
        ("{% for m in messages %}{{ m.content }}</think>{% endfor %}", set()),
        ("it says nothing of the messages<|im_end|>", set()),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_list_has_what_the_template_puts_behind_an_answer(template: str, expected: set[int], special: bool) -> None:
    assert end_tokens(chat_tokenizer(template, special, "<|im", "</think>")) == {256} | expected


def test_the_end_of_a_channel_is_no_end_of_text() -> None:
    """gpt-oss ends a thought with <|end|>, and so a template may end earlier answers; text goes on behind it."""
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = chat_tokenizer(template, True, "<|channel|>", "<|message|>", "<|end|>")
    assert end_tokens(tokenizer) == {256}
    without_channels = chat_tokenizer(template, True, "<|message|>", "<|end|>")
    assert end_tokens(without_channels) == {256, 261}


def test_thought_marks_stay_in_the_text_and_other_special_tokens_do_not() -> None:
    tokenizer = chat_tokenizer(CHAT, True, "<think>", "</think>")
    marks = thought_marks(tokenizer)
    assert marks == {260: "<think>", 261: "</think>"}
    text = "<think>a 7 <|start|></think> b"
    assert decode(tokenizer, tokenizer.encode("x"), tokenizer.encode(text), marks) == "<think>a 7 </think> b"
    loop = [260] * 5000
    assert decode(tokenizer, [], loop, marks) == "<think>" * 5000
    assert thought_marks(chat_tokenizer(CHAT, False, "<think>")) == {}, "decoding keeps those that are not special"
    assert thought_marks(byte_tokenizer()) == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[int]]:
    """A checkpoint, a prompt, and tokens that it writes where nothing ends them, text among the first."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    model = save_tiny(folder, "qwen3_moe")
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # text alone, which is never as likely as nothing
    model.save_pretrained(folder)
    prompt = "12 apples and 7"
    given = torch.tensor([byte_tokenizer().encode(prompt)])
    out = model.generate(given, max_new_tokens=LONG, do_sample=False, eos_token_id=999, pad_token_id=257)
    return folder, prompt, out[0, given.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("behind", "marks"),
    [("<|im_end|>", ("<|im_end|>",)), (" </s>\n", ("</s>",)), ("[/ANSWER]", ("[/ANSWER]",)), (" <3 ", ()), ("\n", ())],
)
def test_a_mark_that_is_no_token_ends_a_text_as_a_stop_string(
    monkeypatch: pytest.MonkeyPatch, behind: str, marks: tuple[str, ...]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}{behind}{{% endfor %}}"
    assert end_marks(tokenizer) == marks and end_tokens(tokenizer) == {256}
    answer = f"It is 7.{behind}[user]And now?"
    tokens = tokenizer.encode(answer)
    expected = "It is 7." + (behind[: behind.index(marks[0])] if marks else behind + "[user]And now?")
    assert VLLMBackend(FakeEngine(tokens), tokenizer).generate(["x"], 60) == [expected]
    hf = HFBackend(tiny_model("qwen3_moe"), tokenizer)
    monkeypatch.setattr(hf, "_continue", lambda prompts, *others: [tokens for _ in prompts])
    assert hf.generate(["x"], 60) == [expected]


def in_generation_config(folder: Path, token: int) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, token], "pad_token_id": 257}))


def in_config_alone(folder: Path, token: int) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [256, token]}
    (folder / "config.json").write_text(json.dumps(config))


def in_the_template_alone(folder: Path, token: int) -> None:
    """The token gets the name of a mark, and is no special one."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    old = next(text for text, number in data["model"]["vocab"].items() if number == token)
    data["model"]["vocab"] = {("<|im_end|>" if text == old else text): n for text, n in data["model"]["vocab"].items()}
    added = {"id": token, "content": "<|im_end|>", "single_word": False, "lstrip": False, "rstrip": False}
    data["added_tokens"].append(added | {"normalized": False, "special": False})
    path.write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text(CHAT)


class FakeEngine:
    """Writes ``tokens`` up to and with a stop token, as vLLM does."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.facts = tokens, {"max_length": 256, "max_logprobs": 8}

    def run(self, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        for place, chosen in enumerate(settings):
            ends = [i for i, token in enumerate(self.tokens) if token in chosen["stop_token_ids"]]
            yield place, (self.tokens[: ends[0] + 1 if ends else chosen["max_tokens"]], None)

    def close(self) -> None: ...


@pytest.mark.parametrize("declare", [in_generation_config, in_config_alone, in_the_template_alone])
def test_both_engines_end_before_the_end_token_wherever_it_is_declared(
    written: tuple[Path, str, list[int]], tmp_path: Path, declare: Callable[[Path, int], None]
) -> None:
    source, prompt, tokens = written
    end = next(token for token in tokens[6:] if token not in tokens[:6] and token not in prompt.encode())
    expected = byte_tokenizer().decode(tokens[: tokens.index(end)])
    folder = tmp_path / "model"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    declare(folder, end)
    hf = open_checkpoint(str(folder), "float32", "cpu", 4, 256)
    assert hf.generate([prompt], LONG) == [expected]
    tokenizer = load_tokenizer(folder)
    vllm = VLLMBackend(FakeEngine(tokens), tokenizer, end_tokens_of(folder, tokenizer))
    assert vllm.generate([prompt], LONG) == [expected]
    assert vllm.ends == hf.ends >= {256, end} and vllm.facts["end_tokens"] == sorted(hf.ends)


def test_a_generation_config_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert end_tokens_of(tmp_path, byte_tokenizer()) == {256}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(WinnowError, match=r"generation_config.json is not valid JSON"):
        end_tokens_of(tmp_path, byte_tokenizer())


def test_tokens_before_the_first_end() -> None:
    assert before_end([1, 2, 3, 2], {2, 3}) == [1]
    assert before_end([1, 4], {2, 3}) == [1, 4] and before_end([], {2}) == []


def test_lm_eval_on_transformers_ends_its_texts_there_too(written: tuple[Path, str, list[int]]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from harness.backends.lm_eval import language_model

    folder, prompt, tokens = written
    end = next(token for token in tokens[6:] if token not in tokens[:6])

    backend = HFBackend(load_model(folder, "float32"), load_tokenizer(folder), 4, 256, frozenset({256, end}))
    asked = Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": LONG, "do_sample": False}), 0)
    (text,) = language_model(backend).generate_until([asked], disable_tqdm=True)
    assert text == byte_tokenizer().decode(tokens[: tokens.index(end)]) == backend.generate([prompt], LONG)[0]
