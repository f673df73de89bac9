"""The program in an answer: forms that answers have, what of them is kept, the same for all sets, and bounds."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.published.code import CodeBenchmark
from tasks.published.program_text import take_out
from tasks.published.programs import programs
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ The sum of xs. """\n'
RIGHT = "def total(xs: List[int]) -> int:\n    found = 0\n    for x in xs:\n        found += x\n    return found\n"
BODY = RIGHT.partition("\n")[2]


def value(source: str, name: str = "total", argument: Any = (1, 2, 3)) -> Any:
    """What the function gives; the name of what is raised where that fails."""
    names: dict[str, Any] = {"List": list}
    try:
        exec(source, names)
        return names[name](argument)
    except Exception as error:
        return type(error).__name__


def in_chat(answer: str) -> str:
    return take_out(answer, "", PROMPT, ["total"])


def as_base(answer: str) -> str:
    return take_out(answer, PROMPT, "", ["total"])


# Ways in which a chat model may say a function ({code}), whose body alone is {body}.
CHAT = {
    "plain": "{code}",
    "closing the prompt's fence": "{code}```\nThis works because it adds.",
    "its own fence": "```python\n{code}```\n",
    "python3": "Sure!\n\n```python3\n{code}```\nDone.",
    "py": "```py\n{code}```",
    "Python": "```Python\n{code}```",
    "no tag": "Here you are:\n```\n{code}```\nDone.",
    "another tag": "```text\n{code}```",
    "tildes": "~~~python\n{code}~~~\n",
    "four backticks": "````python\n{code}````\n",
    "space before the tag": "``` python\n{code}```\n",
    "never closed": "```python\n{code}",
    "prose alone": "The function adds all of them.\n\n{code}\nIt is linear: each one is seen once.",
    "prose that reads like code": "import is not needed.\nNote: fine\nfrom here on it is easy.\n\n{code}",
    "heading": "# Solution\n\n{code}",
    "windows lines": "```python\r\n{code}```\r\n",
    "body alone": "{body}```\nThis works.",
    "body in a fence": "```python\n{body}```\nThis works.",
    "body without its first spaces": "found = {zero}\n    for x in xs:\n        found += x\n    return found\n",
    "block in a list": "1. Write it:\n\n   ```python\n{deeper}   ```\n2. Done.",
    "all indented": "{deeper}",
    "tabs": "```python\n{tabs}```",
    "use in a second block": "```python\n{code}```\nUse:\n```python\nprint(total([1, 2]))\nassert total([1]) == 7\n```",
    "shell in a first block": "```bash\npip install nothing\n```\n```python\n{code}```",
    "output in a last block": "```python\n{code}```\nIt prints\n```\n6\n```\n",
    "stub, then all": "```python\ndef total(xs):\n    pass\n```\nNow with a body:\n```python\n{code}```",
    "wrong, then right": "```python\ndef total(xs):\n    return 77\n```\nNo, that is wrong:\n```python\n{code}```",
    "right, then cut": "```python\n{code}```\nShorter:\n```python\ndef total(xs):\n    return sum(x for x in",
    "repeated": "```python\n{code}```\nIn all:\n```python\n{code}```",
    "fence in a docstring": '```python\n{head}    """Adds.\n\n    ```python\n    total([1])\n    ```\n    """\n'
    "{body}```\nDone",
    "fence at the margin of a docstring": '```python\n{head}    """Adds.\n\n```\ntotal([1])\n```\n    """\n'
    "{body}```\nDone",
    "input": "```python\nn = int(input())\n{code}print(total([n]))\n```",
    "bare input": "{code}\ninput()\n",
    "own asserts": "{code}\nassert total([1, 2]) == 3\nassert total([]) == 9, 'wrong'\n",
    "exit": "import sys\n{code}\nsys.exit()\n",
    "quit": "{code}\nquit()\nexit(1)\nraise SystemExit\n",
    "unittest": "import unittest\n{code}\nclass T(unittest.TestCase):\n    def test_it(self):\n"
    "        self.assertEqual(total([1]), 5)\n\nunittest.main()\n",
    "guard": "{code}\nif __name__ == '__main__':\n    import doctest\n    doctest.testmod()\n    1 / 0\n",
    "loop at the margin": "{code}\nwhile True:\n    x = input()\n    print(total([x]))\n",
    "package that is not needed": "import numpy as np\nimport pandas\n{code}",
    "package that may be missing": "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n{code}",
    "helper in a block of its own": "```python\ndef helper(x):\n    return x\n```\nand then\n```python\n"
    "def total(xs):\n    return sum(map(helper, xs)) + {zero}\n```",
    "table filled by a loop": "T = [0] * 9\nfor i in range(9):\n    T[i] = i\ndef total(xs):\n"
    "    return sum(T[x] for x in xs) + {zero}\n",
    "constant": "ZERO = {zero}\ndef total(xs):\n    return ZERO + sum(xs)\n",
    "cache": "import functools\ndef total(xs):\n    return sum(xs) + {zero}\ntotal = functools.lru_cache()(total)\n",
    "decorator": "from functools import wraps\ndef same(f):\n    @wraps(f)\n    def g(*a):\n        return f(*a)\n"
    "    return g\n@same\ndef total(xs):\n    return sum(xs) + {zero}\n",
    "lambda": "total = lambda xs: sum(xs) + {zero}\n",
    "class": "class Adder:\n    def add(self, xs): return sum(xs) + {zero}\nadder = Adder()\n"
    "def total(xs):\n    return adder.add(xs)\n",
    "annotations": "from __future__ import annotations\n\n{code}",
    "deep recursion": "import sys\nsys.setrecursionlimit(5000)\n{code}",
    "two on a line": "a = {zero}; b = a\ndef total(xs): return sum(xs) + b\n",
    "broken tail": "{code}\n\ndef other(x:\n    return",
    "loop behind it": "{code}\nx = 1" + "+1" * 3000 + "\n",
    "byte order mark": "\ufeff{code}",
}  # fmt: skip
# Ways in which a base model goes on with the prompt, which is behind it.
BASE = {
    "body": "{body}",
    "body and prose": "{body}\nThis function adds all of them, and 'so on.",
    "body and fence": "{body}```\n\nIt works.",
    "body and next": "{body}\n\ndef other(xs):\n    return 1 / 0\n\n\ndef total(xs):\n    return 77\n",
    "three spaces": "   found = {zero}\n    for x in xs:\n        found += x\n    return found\n",
    "all again": "{code}",
    "all again in a fence": "\nSure:\n```python\n{code}```\n",
    "body in a fence": "```python\n{body}```\n",
    "asserts": "{body}\n\nassert total([1]) == 4\nprint(total(1, 2))\n",
    "tabs": "{tabbed_body}",
}


def filled(form: str, right: bool) -> str:
    zero = "0" if right else "1"
    code = RIGHT.replace("found = 0", f"found = {zero}")
    head, _, body = code.partition("\n")
    deeper = "".join(f"   {line}\n" for line in code.splitlines())
    tabs = code.replace("    ", "\t")
    for name, text in {"code": code, "head": f"{head}\n", "body": body, "zero": zero, "deeper": deeper, "tabs": tabs,
                       "tabbed_body": tabs.partition("\n")[2]}.items():  # fmt: skip
        form = form.replace(f"{{{name}}}", text)
    return form


@pytest.mark.parametrize("form", CHAT)
def test_a_right_program_is_right_in_every_form(form: str) -> None:
    source = in_chat(filled(CHAT[form], right=True))
    assert value(source) == 6, source
    assert value(in_chat(filled(CHAT[form], right=False))) == 7
    assert not re.search(r"input\(|assert |exit\(|unittest\.main|print\(|pandas", source)


@pytest.mark.parametrize("form", BASE)
def test_a_completion_goes_on_with_its_prompt(form: str) -> None:
    source = as_base(filled(BASE[form], right=True))
    assert value(source) == 6 and source.startswith(PROMPT), source
    assert value(as_base(filled(BASE[form], right=False))) == 7


def test_the_prompt_gives_what_a_chat_answer_leaves_out() -> None:
    prompt = "import math\n\ndef half(x):\n    return x / 2\n\ndef total(xs):\n    '''Sums halves.'''\n"
    source = take_out("def total(xs):\n    return math.floor(sum(map(half, xs)))\n", "", prompt, ["total"])
    assert value(source) == 3
    own = take_out("def half(x):\n    return x\ndef total(xs):\n    return sum(map(half, xs))", "", prompt, ["total"])
    assert value(own) == 6 and "math" not in own


def test_what_tests_name_is_kept() -> None:
    answer = "class Node:\n    pass\nclass Other:\n    pass\ndef total(xs):\n    return sum(xs)\n"
    assert take_out(answer, "", "", ["total", "Node"]) == answer.replace("class Other:\n    pass\n", "")


def test_comments_and_order_stay() -> None:
    code = "# Adds.\nimport math\n\n# All of them.\ndef total(xs):\n    # one by one\n    return math.fsum(xs)\n"
    assert in_chat(f"```python\n{code}```") == code


@pytest.mark.parametrize(
    "answer",
    ["", "No.", "def other(xs):\n    return 6\n", "```python\ndef total(xs)\n    return 6\n```", "total is a function"],
)
def test_what_holds_no_such_function_stays_as_it_stands(answer: str) -> None:
    assert in_chat(answer) == answer and as_base(answer) in (PROMPT + answer, f"{PROMPT}")


LOOPS = {
    "sum": "1+" * 50_000, "sum in a statement": "x = " + "1+" * 50_000 + "1\n", "brackets": "[" * 100_000,
    "opening lines": "(\n" * 3000, "assignments": "x = (\n" * 3000, "headers": "def total(xs):\n" * 3000,
    "functions": "def total(xs):\n    return 5\n" * 3000, "nested": "if x:\n " * 1000, "prose": "Note: fine\n" * 9000,
    "quotes": '"""\n' * 5001, "fences": "```python\n" * 5000, "strings": "'" * 50_001, "backslashes": "\\\n" * 9000,
    "decorators": "@a\n" * 5000, "lambdas": "f = " + "lambda: " * 20_000 + "0\n", "null": "\0" * 9000,
    "indents": "".join(" " * depth + "if x:\n" for depth in range(150)), "surrogates": "\ud800" * 9000,
    "not": "x = " + "not " * 30_000 + "1\n", "attributes": "x = a" + ".b" * 40_000 + "\n",
}  # fmt: skip


@pytest.mark.parametrize("form", LOOPS)
def test_an_answer_that_loops_is_bounded_and_ends_nothing(form: str) -> None:
    started = time.monotonic()
    loop, after = programs(
        [LOOPS[form], f"```python\n{RIGHT}```\n{LOOPS[form]}"], [""] * 2, [PROMPT] * 2, [["total"]] * 2
    )
    assert time.monotonic() - started < 60
    assert value(after) == (5 if form == "functions" else 6)
    assert isinstance(loop, str)


def test_an_answer_that_cannot_be_taken_out_stays_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "def take_out(*all):\n    while True: pass\n"
    monkeypatch.setattr("tasks.published.programs.SOURCE", broken)
    monkeypatch.setattr("tasks.published.programs.LIMITS", programs.__globals__["Limits"](cpu_seconds=1))
    assert programs(["answer"], ["begun "], [""], [["total"]]) == ["begun answer"]


def evalplus_takes_out(answer: str) -> str:
    from evalplus.sanitize import sanitize

    return str(sanitize(answer.replace("\t", "    "), "total"))


def test_what_evalplus_reads_right_is_right_here() -> None:
    pytest.importorskip("evalplus")
    short = {name: form for name, form in CHAT.items() if name not in ("loop behind it", "byte order mark")}
    theirs = {name for name, form in short.items() if value(evalplus_takes_out(filled(form, True))) == 6}
    assert len(theirs) > 20
    assert all(value(in_chat(filled(CHAT[name], True))) == 6 for name in theirs)


# --- the same for all sets --------------------------------------------------------------------------------------------

PROBLEMS = [
    ("total", "xs", "sum(xs)", [[[1, 2, 3]], [[]], [[5, -5]]]),
    ("twice", "x", "2 * x", [[2], [-3], [0]]),
    ("joined", "words", "'-'.join(words)", [[["a", "b"]], [[]]]),
]
WAYS = ["{code}", "```\n{code}```", "Sure:\n```py\n{code}```\nDone", "{code}\nassert {name}(1) == 77\nprint({name})\n",
        "{body}```\n", "import sys\n{code}\ninput()\nsys.exit()\n", "```python\nimport numpy\n{code}```\n```\n6\n```",
        "<think>\ndef {name}(x):\n    return None\n</think>\n```python\n{code}```", "I cannot.", "{code}{code}",
        "```python\n{code}```\n" + "1+" * 3000, "def other():\n    pass\n", "```python\ndef {name}(:\n\n{code}```",
        "x = int(input())\n{code}", "<think>\n{code}"]  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
def test_humaneval_and_humaneval_plus_agree_on_the_base_tests(chat: bool, tmp_path: Path) -> None:
    pytest.importorskip("evalplus")
    base, plus, answers, hoped = [], [], {}, {}
    for name, argument, expression, inputs in PROBLEMS:
        for way in WAYS:
            for right in (True, False):
                number = len(base)
                head = f"def {name}({argument}):\n"
                body = f"    return {expression if right else 'None'}\n"
                prompt = f'{head}    """Case {number}."""\n'
                calls = "".join(
                    f"    assert candidate(*{one!r}) == {_value(expression, argument, one)!r}\n" for one in inputs
                )
                row = {"id": f"HumanEval/{1000 + number}", "prompt": prompt, "entry_point": name}
                row |= {"canonical_solution": f"    return {expression}\n"}
                base.append(row | {"test": f"def check(candidate):\n{calls}"})
                plus.append(
                    row | {"task_id": row["id"], "contract": "", "base_input": inputs, "plus_input": [], "atol": 0}
                )
                text = way.replace("{code}", head + body).replace("{body}", body).replace("{name}", name)
                answers[f"Case {number}."] = text if chat or way.startswith(("{body}", "I ")) else body + text
                hoped[row["id"]] = right and (not chat or "{" in way and not way.startswith("<think>\n{"))

    def write(prompt: str) -> str:
        return answers[re.findall(r"Case \d+\.", prompt)[0]]

    scores = []
    for name, rows in (("humaneval", base), ("humaneval_plus", plus)):
        backend = ScriptedBackend(write, has_chat_template=chat)
        result = CodeBenchmark(name, name, stage(tmp_path / name, name, rows), cpu_seconds=4).run(backend)
        scores.append([sample for sample in result.samples if sample.task == name])
    ours, theirs = scores
    assert len(ours) == len(theirs) == len(base) == 90
    assert [one.detail["program"] for one in ours] == [one.detail["program"] for one in theirs]
    assert [one.score == 1.0 for one in ours] == [one.detail["base_right"] for one in theirs]
    if chat:
        assert {one.item: one.score == 1.0 for one in ours} == hoped
    assert 20 < sum(one.score for one in ours) < 46


def _value(expression: str, argument: str, given: list[Any]) -> Any:
    return eval(expression, {argument: given[0]})
