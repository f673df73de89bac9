"""Programs that would pass for right where they are not, and right ones that look odd: for HumanEval and MBPP."""

from dataclasses import dataclass, field
from typing import Any

from tasks.published.program_tests import judge

SECRET = "the answer is 7341"  # what a test expects, and nobody tells the program


def humaneval(name: str, prompt: str, solution: str, test: str) -> dict[str, Any]:
    test = "\n".join(f"    {line}" for line in test.strip().splitlines())
    return {
        "id": f"HumanEval/{name}", "prompt": prompt, "entry_point": "f", "canonical_solution": f"    {solution}\n",
        "test": f"def check(candidate):\n{test}\n",
    }  # fmt: skip


def mbpp(number: int, solution: str, tests: list[str], setup: str = "") -> dict[str, Any]:
    return {
        "id": str(number), "text": "What is asked.", "code": solution, "test_list": tests, "test_setup_code": setup
    }  # fmt: skip


ECHO = humaneval(
    "echo", 'def f(x):\n    """ What is asked. """\n', f"return {SECRET!r}",
    f"assert candidate(1) == {SECRET!r}\nassert candidate([2]) == {SECRET!r}",
)  # fmt: skip
ECHO_MBPP = mbpp(
    1, f"def f(x):\n    return {SECRET!r}\n", [f"assert f(1) == {SECRET!r}", f"assert f([2]) == {SECRET!r}"]
)
NEAR = humaneval(
    "near", 'def f(x):\n    """ A third of x. """\n', "return x / 3",
    "assert abs(candidate(1) - 1 / 3) < 1e-6\nassert abs(candidate(2) - .6667) < 1e-3",
)  # fmt: skip
WHETHER = humaneval(
    "whether", 'def f(x):\n    """ Whether x begins with an a. """\n', "return x[0] == 'a'",
    "assert candidate('ab')\nassert not candidate('b')",
)  # fmt: skip
IDENTITY = humaneval(
    "identity", 'def f(x):\n    """ Whether x begins with an a. """\n', "return x[0] == 'a'",
    "assert candidate('ab') is True\nassert candidate('b') is False",
)  # fmt: skip
LOOP = humaneval(
    "loop", 'def shift(s):\n    return s[1:] + s[:1]\n\n\ndef f(s):\n    """ The inverse of shift. """\n',
    "return s[-1:] + s[:-1]",
    """
from random import choice, randint
for _ in range(50):
    s = ''.join(choice('abcdef') for _ in range(randint(4, 9)))
    assert candidate(shift(s)) == s
""",
)  # fmt: skip
SORTS = mbpp(
    2, "def f(x):\n    return sorted(x)\n",
    ["assert f([3, 1]) == [1, 3]", "assert set(f([2, 2])) == set([2])", "assert len(f([])) == 0",
     "assert f([math.pi, 1])[0] == 1", "assert f([1]) != f([2])"], "import math",
)  # fmt: skip
COUNTS = mbpp(3, "def f(x):\n    return {c: x.count(c) for c in x}\n", ["assert f('aab') == {'a': 2, 'b': 1}"])
NODES = """
class Node:
    def __init__(self, v):
        self.v, self.left = v, None

def f(t):
    return 1 + f(t.left) if t else 0
"""
TREE = mbpp(4, NODES, ["assert f(root) == 2", "assert f(root.left) == 1"], "root = Node(1)\nroot.left = Node(2)")


@dataclass(frozen=True)
class Forgery:
    """A program for the problem ``row`` of HumanEval or MBPP, and whether it is right."""

    name: str
    source: str
    right: bool = False
    row: dict[str, Any] = field(default_factory=lambda: ECHO)

    def holds(self) -> bool:
        (verdict,) = judge("mbpp" if "test_list" in self.row else "humaneval", [self.row], [self.source], 2)
        return verdict is not None and verdict.right is self.right


SUBCLASS = """
class Sly({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Sly()
"""
WRITES = """
import os
for d in range(3, 32):
    try:
        os.write(d, {answer!r})
    except OSError:
        pass
os._exit(0)
"""
FORGED = {
    "equals everything": """
class All:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return All()
""",
    "mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a mock": "from unittest.mock import MagicMock\ndef f(x): return MagicMock(__eq__=lambda *a: True)",
    "a text that equals everything": SUBCLASS.format(base="str"),
    "a list that equals everything": SUBCLASS.format(base="list"),
    "a class that lies": """
class M(type):
    __eq__ = __instancecheck__ = lambda *a: True
    __hash__ = type.__hash__
class C(metaclass=M): pass
def f(x): return C
""",
    "another exec": "import builtins\nbuiltins.exec = lambda *a, **k: None\ndef f(x): return 0",
    "another compile": """
import builtins
real = builtins.compile
builtins.compile = lambda *a, **k: real('pass', 'test', 'exec')
def f(x): return 0
""",
    "another eval": "import builtins\nbuiltins.eval = lambda *a: 'the answer'\ndef f(x): return 0",
    "another AssertionError": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "no parser": "import ast\nast.parse = ast.unparse = lambda *a, **k: None\ndef f(x): return 0",
    "an exit": "import os\ndef f(x): os._exit(0)",
    "an exit at once": "import sys\nsys.exit(0)",
    "a trace": """
import sys
def trace(frame, event, argument):
    frame.f_locals['passed'] = 99
    return trace
sys.settrace(trace)
def f(x): return 0
""",
    "frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name in list(frame.f_globals):
            if name in ('encode', 'same', 'answer', 'plain'):
                frame.f_globals[name] = lambda *a, **k: ['value', True]
        frame = frame.f_back
    return 0
""",
    "a search for the answer": """
import gc, sys
def f(x):
    found = []
    def look(o, depth=0):
        if isinstance(o, str):
            if 'answer is' in o and len(o) < 40 and o != 'answer' + ' is': found.append(o)
        elif depth < 6 and isinstance(o, dict):
            for inner in list(o.values()): look(inner, depth + 1)
        elif depth < 6 and isinstance(o, (list, tuple)):
            for inner in list(o): look(inner, depth + 1)
    frame = sys._getframe()
    while frame:
        look(frame.f_locals)
        look(frame.f_globals)
        frame = frame.f_back
    for o in gc.get_objects(): look(o)
    return next(text for text in found if text[-4:].isdigit())
""",
    "an answer written by itself": WRITES.format(
        answer=b'{"outputs": [{"value": ["value", true]}, {"value": ["value", true]}]}'
    ),
    "an answer of another form": WRITES.format(answer=b'{"outputs": [{"value": 1}, {"value": ["truth", [1]]}]}'),
    "a function that is none": "f = None",
    "another name": f"def g(x): return {SECRET!r}",
    "a check of its own": "def check(candidate): return True\ndef f(x): return 0",
}
FORGERIES = [
    Forgery("the right one", f"def f(x): return {SECRET!r}", True),
    Forgery("the right one of MBPP", f"def f(x): return {SECRET!r}", True, ECHO_MBPP),
    Forgery("a wrong one", "def f(x): return x"),
    *(Forgery(f"{name} (HumanEval)", source, False, ECHO) for name, source in FORGED.items()),
    *(Forgery(f"{name} (MBPP)", source, False, ECHO_MBPP) for name, source in FORGED.items()),
    Forgery("always near", """
class N(float):
    __sub__ = __rsub__ = __abs__ = lambda *a: N()
    __lt__ = __gt__ = lambda *a: True
def f(x): return N(9)
""", False, NEAR),
    Forgery("near", "def f(x): return x * .333333333", True, NEAR),
    Forgery("not a number", "def f(x): return float('nan')", False, NEAR),
    Forgery("true and true", "def f(x): return [1]", False, WHETHER),
    Forgery("one for true", "def f(x): return int(x[0] == 'a')", False, IDENTITY),
    Forgery("true itself", "def f(x): return x[0] == 'a'", True, IDENTITY),
    Forgery("a helper of its own", "def shift(s): return s\ndef f(s): return s", False, LOOP),
    Forgery("the inverse", LOOP["prompt"] + LOOP["canonical_solution"], True, LOOP),
    Forgery("draws like the test", """
import random
random.choice, random.randint = lambda s: 'a', lambda a, b: 4
def f(s): return 'aaaa'
""", False, LOOP),
    Forgery("a constant", "def f(x): return [1, 3]", False, SORTS),
    Forgery("no such class", "def f(t): return 2", False, TREE),
]  # fmt: skip
RIGHT = [
    Forgery("sorted in place", "def f(x):\n    x.sort()\n    return x", True, SORTS),
    Forgery("names of builtins", """
list = str = set = len = type = isinstance = compile = exec = None
dict = 5
def f(x): return sorted(x)
""", True, SORTS),
    Forgery("a Counter", "from collections import Counter as f", True, COUNTS),
    Forgery("a defaultdict", """
from collections import defaultdict
def f(x):
    d = defaultdict(int)
    for c in x: d[c] += 1
    return d
""", True, COUNTS),
    Forgery("a text of a subclass", f"""
import enum
class A(str, enum.Enum): B = {SECRET!r}
def f(x): return A.B
""", True),
    Forgery("a match", "import re\ndef f(x): return re.match('a', x)", True, WHETHER),
    Forgery("true and false in turn", """
class B:
    n = 0
    def __bool__(self):
        B.n += 1
        return B.n % 2 == 1
b = B()
def f(x): return b
""", True, WHETHER),
    Forgery("classes of its own", """
class Node:
    def __init__(self, v):
        self.v = v
        self.left = None
def f(t):
    n = 0
    while t: n, t = n + 1, t.left
    return n
""", True, TREE),
    Forgery("a fraction", "from fractions import Fraction\ndef f(x): return Fraction(x, 3)", True, NEAR),
    Forgery("much printed", f"def f(x):\n    print('x' * 10**6)\n    return {SECRET!r}", True),
    Forgery("a deep recursion", f"""
import sys
sys.setrecursionlimit(10**5)
def g(n): return n and 1 + g(n - 1)
def f(x): return g(5000) and {SECRET!r}
""", True),
]  # fmt: skip
