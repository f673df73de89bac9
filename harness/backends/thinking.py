"""Thinking on and off in the terms of a model's chat template. Free of torch and of vLLM."""

import re
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes

from harness.backends.tokens import THOUGHT_MARKS, has_chat_template, prompt_text
from harness.errors import WinnowError, first_line

# What templates call the switch, and its values for on and off: Qwen3, GLM, Hunyuan, ERNIE and others; DeepSeek-V3.1,
# Granite and others; Seed-OSS (a number of tokens, -1 for any). The last one has words.
SWITCHES = {"enable_thinking": (True, False), "thinking": (True, False), "thinking_budget": (-1, 0)}
EFFORT, EFFORTS = "reasoning_effort", {"on": ("medium", "high"), "off": ("none", "no_think")}
# Tags that transformers knows and jinja2 does not; they mark what an assistant wrote.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def thinking_options(tokenizer: Any, wanted: str) -> dict[str, Any]:
    """What the chat template is to be given so that the model thinks aloud first (``wanted`` "on") or does not ("off");
    nothing for "auto", which leaves it to the template.

    "on" needs nothing where every answer begins in an opened thought. Raises WinnowError where the template has no
    switch for it.
    """
    if wanted == "auto":
        return {}
    if not has_chat_template(tokenizer):
        raise WinnowError(f"thinking={wanted}: the model's tokenizer has no chat template: take thinking=auto")
    try:
        variables, words = _mentioned(tokenizer.get_chat_template())
    except (TemplateError, ValueError) as error:
        raise WinnowError(f"the model's chat template cannot be read ({first_line(error)}): take chat=false") from error
    for name, (on, off) in SWITCHES.items():
        if name in variables:
            return {name: on if wanted == "on" else off}
    effort = next((word for word in EFFORTS[wanted] if word in words), None)
    if EFFORT in variables and effort is not None:
        return {EFFORT: effort}
    if wanted == "on" and opened_thought(prompt_text(tokenizer, [{"role": "user", "content": "?"}], {})):
        return {}
    known = ", ".join((*SWITCHES, EFFORT))
    raise WinnowError(
        f"thinking={wanted}: the model's chat template has no switch for it (of {known}): take thinking=auto"
    )


def opened_thought(prompt: str) -> str:
    """The mark of a thought that the prompt itself opens for the answer; "" where it opens none."""
    end = prompt.rstrip()
    return next((mark for mark in THOUGHT_MARKS if end.endswith(mark)), "")


@lru_cache(maxsize=8)
def _mentioned(template: str) -> tuple[set[str], set[str]]:
    """The variables that a chat template may be given, and the words that it holds."""
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    words = {constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)}
    return meta.find_undeclared_variables(tree), words
