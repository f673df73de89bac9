"""What a model reads: plain texts behind the beginning-of-text token, messages in its chat template."""

import pytest

from harness.backends.hf import HFBackend
from harness.backends.tokens import prompt_text
from harness.errors import WinnowError
from tests.tiny import byte_tokenizer, tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m.role }}]"
    "{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
    "{% if quiet %}(quiet){% endif %}"
)
ASKED = {"role": "user", "content": "Sum?"}


@pytest.fixture
def tokenizer():  # type: ignore[no-untyped-def]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_messages_end_where_the_answer_begins(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert prompt_text(tokenizer, [ASKED], {}) == "[user]Sum?<end>[model]"
    assert prompt_text(tokenizer, [ASKED], {"quiet": True}) == "[user]Sum?<end>[model](quiet)"


def test_a_begun_answer_stays_open_with_its_last_line_break(tokenizer) -> None:  # type: ignore[no-untyped-def]
    begun = {"role": "assistant", "content": "Here:\n```python\n"}
    assert prompt_text(tokenizer, [ASKED, begun], {}) == "[user]Sum?<end>[assistant]Here:\n```python\n"
    assert begun["content"].endswith("\n"), "the message itself is left as it was"


def test_a_plain_text_gets_the_token_that_its_tokenizer_begins_with(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert prompt_text(tokenizer, "Sum?", {}) == "Sum?"
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    assert prompt_text(tokenizer, "Sum?", {}) == "<|endoftext|>Sum?" == prompt_text(tokenizer, "<|endoftext|>Sum?", {})


def test_no_template_and_a_template_that_refuses_are_one_line(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WinnowError, match="no chat template: take chat=false"):
        prompt_text(byte_tokenizer(), [ASKED], {})
    with pytest.raises(WinnowError, match="refuses the task's messages .no system.: take chat=false"):
        prompt_text(tokenizer, [{"role": "system", "content": "x"}], {})


def test_the_backend_says_whether_it_has_a_template(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("qwen3_moe")
    plain, chat = HFBackend(model, byte_tokenizer()), HFBackend(model, tokenizer)
    assert not plain.has_chat_template and chat.has_chat_template
    assert chat.prompt([ASKED]) == "[user]Sum?<end>[model]"
