"""Calibration reads texts as evaluation does: the same first token, and chat templates that refuse what they refuse."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.backends.tokens import encode, prompt_text
from harness.calibration.tokens import tokenize
from harness.data.rows import Document
from harness.errors import WinnowError

WORDS = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3, "a": 4, "[UNK]": 5, "user": 6, "Be": 7, "brief": 8}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<s>user {{ m.content }}{% endfor %}"
)


def tokenizer(begins: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]", chat_template=template
    )


def ids(documents: list[Document], made: PreTrainedTokenizerFast, **settings) -> list[list[int]]:
    return [sequence.input_ids.tolist() for sequence in tokenize(documents, made, 8, **settings)]


def test_a_plain_text_begins_as_in_evaluation():
    made, document = tokenizer(), Document("hello world")
    assert ids([document], made) == encode(made, [prompt_text(made, "hello world", {})]) == [[0, 2, 3]]
    assert ids([document], made, bos=False) == [[2, 3]]
    assert ids([Document("<s>hello")], made) == [[0, 2]]  # not twice
    assert ids([document], tokenizer(begins=False)) == [[2, 3]]


def test_every_document_of_a_packed_block_begins_so():
    assert ids([Document("hello"), Document("world")], tokenizer(), packing=True) == [[0, 2, 0, 3]]


def test_an_empty_document_stays_empty():
    with pytest.raises(WinnowError, match="none of its 1 documents has a token"):
        tokenize([Document("")], tokenizer(), 8)


def test_a_system_turn_that_the_template_refuses_begins_the_users(caplog: pytest.LogCaptureFixture):
    said = Document("", messages=(("system", "Be brief"), ("user", "hello")))
    assert ids([said, Document("a")], tokenizer(template=NO_SYSTEM), chat_template=True) == [[0, 6, 7, 8, 2], [0, 4]]
    assert "no place for system turns: those of 1 documents" in caplog.text


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "{{ messages[7].content.strip() }}", "{{ 1 / 0 }}"]
)
def test_a_document_that_the_template_refuses_is_named(template: str):
    said = Document("", messages=(("user", "hello"),), where="corpus.jsonl, line 7")
    with pytest.raises(WinnowError, match="corpus.jsonl, line 7: the tokenizer's chat template refuses it"):
        tokenize([said], tokenizer(template=template), 8, chat_template=True)


def test_an_unknown_beginning_is_refused():
    with pytest.raises(WinnowError, match="calibration.bos must be auto or false, not 'yes'"):
        tokenize([Document("a")], tokenizer(), 8, bos="yes")
