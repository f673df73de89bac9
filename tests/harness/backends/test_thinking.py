"""Thinking on and off in the terms of chat templates: each below has the switch of a model family, and its shape."""

import pytest

from harness.backends.hf import HFBackend
from harness.backends.thinking import opened_thought, thinking_options
from harness.errors import WinnowError
from tests.tiny import byte_tokenizer, tiny_model

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
QWEN = (
    TURNS
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
GRANITE = "{%- if thinking %}Think first. {% endif %}" + TURNS + "{% endif %}"
SEED = (
    "{% if not thinking_budget is defined %}{% set thinking_budget = -1 %}{% endif %}"
    + TURNS
    + "{% if thinking_budget == 0 %}<seed:think><seed:budget>{% endif %}{% endif %}"
)
GPT_OSS = (
    "{% macro system() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "Reasoning: {{ reasoning_effort }}. {% endmacro %}{{ system() }}" + TURNS + "{% endif %}"
)
WORDS = (
    "{% if reasoning_effort not in ['high', 'low', 'none'] %}{% set reasoning_effort = 'high' %}{% endif %}"
    "{{ reasoning_effort }} " + TURNS + "{% endif %}"
)
ALWAYS = TURNS + "<think>\n{% endif %}"
PLAIN = "{# thinking, enable_thinking #}thinking: {% set thinking = 1 %}{{ thinking }}" + TURNS + "{% endif %}"


def tokenizer_with(template: str):  # type: ignore[no-untyped-def]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "on", "off"),
    [
        (QWEN, {"enable_thinking": True}, {"enable_thinking": False}),
        (DEEPSEEK, {"thinking": True}, {"thinking": False}),
        (GRANITE, {"thinking": True}, {"thinking": False}),
        (SEED, {"thinking_budget": -1}, {"thinking_budget": 0}),
        (GPT_OSS, {"reasoning_effort": "medium"}, None),
        (WORDS, {"reasoning_effort": "high"}, {"reasoning_effort": "none"}),
        (ALWAYS, {}, None),
        (PLAIN, None, None),
        ("{% generation %}" + QWEN + "{%- endgeneration -%}", {"enable_thinking": True}, {"enable_thinking": False}),
    ],
)
def test_the_switch_is_the_templates_own(template: str, on: dict[str, object] | None, off: object) -> None:
    tokenizer = tokenizer_with(template)
    assert thinking_options(tokenizer, "auto") == {}
    for wanted, expected in (("on", on), ("off", off)):
        if expected is None:
            with pytest.raises(WinnowError, match=f"thinking={wanted}: the model's chat template has no switch"):
                thinking_options(tokenizer, wanted)
        else:
            assert thinking_options(tokenizer, wanted) == expected


def test_what_the_switch_does_to_the_prompt() -> None:
    backend = HFBackend(tiny_model("qwen3_moe"), tokenizer_with(DEEPSEEK))
    asked = [{"role": "user", "content": "Sum?"}]
    assert backend.prompt(asked) == backend.prompt(asked, **backend.thinking_options("auto"))
    assert backend.prompt(asked, **backend.thinking_options("on")) == "[user]Sum?[assistant]<think>"
    assert backend.prompt(asked, **backend.thinking_options("off")) == "[user]Sum?[assistant]</think>"


def test_a_model_without_a_template_or_with_a_broken_one_is_one_line() -> None:
    assert thinking_options(byte_tokenizer(), "auto") == {}
    with pytest.raises(WinnowError, match="thinking=off: the model's tokenizer has no chat template"):
        thinking_options(byte_tokenizer(), "off")
    with pytest.raises(WinnowError, match=r"cannot be read \(.*\): take chat=false"):
        thinking_options(tokenizer_with("{% if %}"), "on")
    with pytest.raises(WinnowError, match=r"cannot be read \(.*\): take chat=false"):
        thinking_options(tokenizer_with({"tools": QWEN}), "on")  # type: ignore[arg-type]


def test_a_prompt_that_opens_a_thought() -> None:
    assert opened_thought("[assistant]<think>\n") == "<think>"
    assert opened_thought("[assistant][THINK]") == "[THINK]"
    assert opened_thought("[assistant]<think>\n\n</think>\n\n") == opened_thought("say <think> first") == ""
