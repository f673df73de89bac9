"""Programs that try to break out, to forge a verdict, to use up the machine or to confuse who reads their results, and
right programs that look odd. Each stands with what must come of it; ``results`` tries all.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.sandbox.run import Failed, Limits, Outcome, Program, judge_many, run_function, same
from tests.attack.forgeries import FORGERIES, RIGHT

PROJECT = Path(__file__).resolve().parents[2]
SHORT = Limits(cpu_seconds=1, wall_seconds=2.0)

Expected = Callable[[Outcome], bool]


@dataclass(frozen=True)
class Attack:
    """``source`` defines ``f``, which is called once with ``argument``. The whole must be over within ``seconds``, and
    this process be busy with what came back for no more than ``busy_seconds`` of CPU time."""

    name: str
    source: str
    expected: Expected
    argument: Any = None
    limits: Limits = SHORT
    seconds: float = 8.0
    busy_seconds: float = 1.0

    def holds(self) -> bool:
        started, used = time.monotonic(), time.process_time()
        outcome = run_function(self.source, "f", [[self.argument]], self.limits)
        quick = time.monotonic() - started < self.seconds and time.process_time() - used < self.busy_seconds
        return quick and self.expected(outcome)


# --- what may come of one ---------------------------------------------------------------------------------------------


def failed(outcome: Outcome) -> bool:
    """The call failed, and only it."""
    return outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


def gave(value: Any) -> Expected:
    return lambda outcome: outcome.status == "ok" and same(outcome.outputs[0], value)


def ended(*statuses: str) -> Expected:
    return lambda outcome: outcome.status in statuses


def either(*some: Expected) -> Expected:
    return lambda outcome: any(one(outcome) for one in some)


def body(text: str, before: str = "") -> str:
    """A program whose function ``f`` of ``x`` is ``text``, with ``before`` above it."""
    return f"{before}\ndef f(x):\n" + "\n".join(f"    {line}" for line in text.strip().splitlines())


# --- escape -----------------------------------------------------------------------------------------------------------

ESCAPES = [
    Attack("read the checker", body("return open(x).read()"), failed, str(PROJECT / "tasks/published/code.py")),
    Attack("import the checker", body("import sys\nsys.path.append(x)\nimport tasks.made"), failed, str(PROJECT)),
    Attack("import what is loaded", body("import sys\nreturn [n for n in sys.modules if 'tasks' in n]"), gave([])),
    Attack("read packages beside the standard library", body("""
import glob, os, sys
places = [f'{s}{d}' for s in [*sys.path, '/usr/lib', '/usr/local/lib'] for d in ('', '/python3*')]
found = [p for s in places for n in ('site-packages', 'dist-packages')
         for p in glob.glob(f'{s}/{n}/**/*', recursive=True)]
read = 0
for path in found:
    try:
        read += len(open(path, 'rb').read())
    except OSError:
        pass
return read
"""), gave(0)),
    Attack("climb out of the root", body("""
import os
os.mkdir('d')
for _ in range(50): os.chdir('..')
return [n for n in ('proc', 'home', 'tmp') if n in os.listdir('.')]
"""), either(failed, gave([]))),
    Attack("chroot", body("import os\nos.mkdir('d')\nos.chroot('d')"), failed),
    Attack("a link out of the folder", body("import os\nos.symlink('/etc/passwd', 'l')\nreturn open('l').read()"),
           failed),
    Attack("a hard link", body("import os\nos.link(os.__file__, 'l')"), failed),
    Attack("a device", body("import os, stat\nos.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\nopen('d')"),
           failed),
    Attack("memory by /proc", body("return open('/proc/self/mem', 'r+b').read(1)"), failed),
    Attack("/proc by a descriptor", body("import os\nreturn os.listdir(os.open('/proc', os.O_RDONLY))"), failed),
    Attack("the C library that is loaded", body("""
import ctypes, gc
found = [o for o in gc.get_objects() if isinstance(o, ctypes.CDLL) and not isinstance(o, ctypes.PyDLL)]
return [o.fork() for o in found if vars(o).get('_handle')]
"""), either(failed, gave([]))),
    Attack("the C library, loaded", body("import ctypes\nreturn ctypes.CDLL(None).getpid()"), failed),
    Attack("Python's C interface", body("import ctypes\nreturn ctypes.pythonapi.Py_IsInitialized()"), failed),
    Attack("a pair of sockets", body("import socket\nreturn len(socket.socketpair())"), failed),
    Attack("an abstract socket", body("import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0w')"), failed),
    Attack("netlink", body("import socket\nsocket.socket(16, 3, 0)"), failed),
    Attack("an event loop", body("import asyncio\nasyncio.run(asyncio.sleep(0))"), failed),
    Attack("raise the limits", body("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))"), failed),
    Attack("priority", body("import os\nos.setpriority(os.PRIO_PROCESS, 0, 19)"), failed),
    Attack("another session", body("import os\nos.setsid()"), failed),
    Attack("another user", body("import os\nos.setuid(0)\nopen(os.__file__, 'a')"), failed),
    Attack("a pickle that runs a command", body("import pickle\npickle.loads(b'cos\\nsystem\\n(S\"true\"\\ntR.')"),
           failed),
    Attack("write into the library", body("import os\nopen(os.__file__, 'a').write('x')"), failed),
    Attack("a file without a name", body("import os\nreturn os.memfd_create('x')"), failed),
    Attack("shared memory", body("from multiprocessing import shared_memory as s\ns.SharedMemory('w', True, 9)"),
           failed),
    Attack("a hook over the hooks", body("import socket\nsocket.socket()",
                                         "import sys\nsys.addaudithook(lambda *a: None)"), failed),
]  # fmt: skip

# --- exhaust ----------------------------------------------------------------------------------------------------------

EXHAUSTING = [
    Attack("threads", body("import _thread, time\nfor _ in range(99): _thread.start_new_thread(time.sleep, (9,))"),
           failed),
    Attack("a thread that outlives", body("""
import threading, time
threading.Thread(target=time.sleep, args=(99,)).start()
return 1
"""), failed),
    Attack("a fork with a terminal", body("import os\nwhile True: os.forkpty()"), failed),
    Attack("deaf to the signal of time", body("""
import signal
for s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
while True: pass
"""), ended("timeout")),
    Attack("stopped", body("import signal\nsignal.raise_signal(signal.SIGSTOP)"), failed),
    Attack("a regular expression", body("import re\nreturn re.match('(a+)+$', 'a' * 64 + 'b')"), ended("timeout")),
    Attack("a pipe that nobody reads", body("import os\n_, w = os.pipe()\nwhile True: os.write(w, b'x' * 9999)"),
           ended("timeout")),
    Attack("a fifo that nobody opens", body("import os\nos.mkfifo('p')\nopen('p').read()"),
           either(failed, ended("timeout"))),
    Attack("much memory at once", body("import mmap\nreturn len(mmap.mmap(-1, 2**34))"), failed),
    Attack("nested brackets", body("import json\nreturn json.loads('[' * 10**6)"), either(failed, ended("crashed"))),
    Attack("nested expressions", body("return eval('(' * 10**5 + ')' * 10**5)"), either(failed, ended("crashed"))),
    Attack("recursion in C", body("""
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
return repr(x)[:9]
"""), either(failed, ended("crashed", "timeout"))),
    Attack("a long integer read", body("return int('9' * 10**6)"), failed),
    Attack("a long integer", body("return 7 ** 9999"), gave(7**9999)),
    Attack("a value of many levels", body("x = []\nfor _ in range(500): x = [x]\nreturn x"), failed),
    Attack("an interpreter that crashes", body("import faulthandler\nfaulthandler._read_null()"), ended("crashed")),
    Attack("code that is none", body(
        "return type(f.__code__)(0, 0, 0, 0, 0, 0, b'd\\x99', (), (), (), '', '', '', 0, b'', b'')()"),
        either(failed, ended("crashed"))),
    Attack("many files", body("for i in range(10**5): open(str(i), 'w').close()"),
           either(failed, ended("timeout", "crashed"))),
    Attack("folders in folders", body("""
import os
os.umask(0o477)
for i in range(990):
    os.mkdir('d')
    os.chdir('d')
"""), either(failed, gave(None), ended("timeout"))),
]  # fmt: skip

# --- confuse the reader of results ------------------------------------------------------------------------------------


def value(text: str) -> str:
    return f'{{"outputs": [{{"value": {text}}}]}}'


def writes(answer: bytes | str, then: str = "os._exit(0)") -> str:
    """A program that writes an answer of its own to every descriptor."""
    data = answer.encode() if isinstance(answer, str) else answer
    return body(
        f"import os, time\nfor d in range(3, 32):\n    try: os.write(d, {data!r})\n    except OSError: pass\n{then}"
    )


def computes(expression: str) -> str:
    """A program that writes such an answer, with the value of an expression in it."""
    return body(f"""
import json, os
for d in range(3, 32):
    left = json.dumps({{'outputs': [{{'value': {expression}}}]}}).encode()
    try:
        while left: left = left[os.write(d, left):]
    except OSError:
        pass
os._exit(0)
""")


PRIME = 2**61 - 1  # integers that differ by it share a hash
ROOMY = Limits(cpu_seconds=5, wall_seconds=20, output_bytes=2**23)
LONG_FRACTION = value(f'{{"fraction": [{10**4200}, {10**4200 - 1}]}}')
MALFORMED: dict[str, str | bytes] = {
    "nothing but a number": "1", "text": '"outputs"', "null": "null", "a list": "[[1]]", "no answer at all": "{}",
    "another kind of outputs": '{"outputs": {"value": 1}}', "a list for an output": '{"outputs": [[]]}',
    "text for an output": '{"outputs": ["value"]}', "two outputs": '{"outputs": [{"value": 1}, {"value": 1}]}',
    "two answers": value("1") * 2, "an answer with an end missing": value("1")[:-1],
    "no text": b"\xff\xfe\x00", "half a character": value('"\xe9"').encode("latin-1"),
    "a mark in front": b"\xef\xbb\xbf" + value("1").encode(), "another encoding": value("1").encode("utf-16"),
    "a set of lists": value('{"set": [[1]]}'), "a list as a key": value('{"dict": [[[], 1]]}'),
    "a dict of threes": value('{"dict": [[1, 2, 3]]}'), "a dict of nothing": value('{"dict": 5}'),
    "another tag": value('{"object": [1]}'), "no tag": value("{}"), "two tags": value('{"set": [], "tuple": []}'),
    "a number that is none": value('{"int": "zz"}'), "a number of a list": value('{"int": []}'),
    "bytes that are none": value('{"bytes": "zz"}'), "a decimal that is none": value('{"decimal": "x"}'),
    "a fraction by nothing": value('{"fraction": [1, 0]}'), "a fraction of texts": value('{"fraction": ["1", "2"]}'),
    "a fraction of long integers": LONG_FRACTION,
    "a complex of lists": value('{"complex": [[], 1]}'), "a complex of one": value('{"complex": [1]}'),
    "an integer of 9,999 digits": value("9" * 9999), "brackets": "[" * 60_000,
    "levels": value("[" * 300 + "]" * 300), "an answer and then nothing": '{"outputs": [',
}  # fmt: skip

CONFUSING = [
    *(Attack(f"no answer: {name}", writes(text), ended("crashed")) for name, text in MALFORMED.items()),
    Attack("an answer for an error", writes('{"error": [[[1]]]}'), ended("error")),
    Attack("a failure that is a list", writes('{"outputs": [{"failed": [[]]}]}'), failed),
    Attack("the last of two keys", writes('{"outputs": 1, "outputs": [{"value": 2, "value": 3}]}'), gave(3)),
    Attack("an answer, and then sleep", writes(value("1"), "time.sleep(99)"), either(gave(1), ended("timeout"))),
    Attack("spaces without end", body("""
import os
while True:
    for d in range(3, 32):
        try: os.write(d, b' ' * 65536)
        except OSError: pass
"""), ended("too_large", "crashed")),
    Attack("keys of which half share a hash", computes(
        f"{{'set': [i if i % 2 else i * {PRIME} for i in range(20000)]}}"), ended("crashed"), limits=ROOMY),
    Attack("keys of dicts that share a hash", computes(
        f"{{'dict': [[i * {PRIME}, 0] for i in range(20000)]}}"), ended("crashed"), limits=ROOMY),
    Attack("tuples that share a hash", computes(
        f"{{'set': [{{'tuple': [i * {PRIME}]}} for i in range(20000)]}}"), ended("crashed"), limits=ROOMY),
    Attack("many sets whose keys share a hash", computes(
        f"[{{'set': [i * {PRIME} for i in range(1000)]}}] * 150"), ended("crashed", "ok"),
        limits=ROOMY, busy_seconds=2.0),
    Attack("a handler at exit", body("""
import atexit, os
atexit.register(lambda: [os.write(d, b'{}') for d in range(3, 32)])
return 5
"""), gave(5)),
    Attack("a finalizer", body("return 5", """
import os
class Late:
    def __del__(self):
        for d in range(3, 32):
            try: os.write(d, b'{}')
            except OSError: pass
kept = Late()
"""), gave(5)),
    Attack("printed answers", body(f"""
import os, sys
for d in (0, 1, 2): os.write(d, {value("1").encode()!r})
sys.__stdout__.write('x' * 10**6)
return 5
"""), gave(5)),
    Attack("builtins that are gone", body("import builtins\nvars(builtins).clear()\nreturn 5"),
           ended("crashed", "ok", "error")),
    Attack("modules that are gone", body("import sys\nsys.modules.clear()\nreturn 5"), gave(5)),
    Attack("a hook that refuses all", body("""
import sys
def hook(*a): raise ValueError
sys.addaudithook(hook)
return 5
"""), either(gave(5), ended("crashed", "error"))),
    Attack("another writer of JSON", body("return 5", f"""
import json
json.dumps = lambda *a, **k: {value("6")!r}
"""), either(gave(6), gave(5))),
    Attack("a text that is none", body("return '\\ud800'"), gave("\ud800")),
    Attack("an error that is no text", body("raise ValueError('\\ud800' * 9)"), failed),
    Attack("a source that is no text", body("return 5", "x = '\ud800'"), ended("error")),
    Attack("a source with a zero", body("return 5", "x = '\0'"), ended("error")),
    Attack("a class that lies about itself", body("return Lie()", """
class Lie:
    __class__ = int
    def __eq__(self, other): return True
    def __hash__(self): return 1
"""), failed),
    Attack("a dict whose keys lie", body("return {Lie('a'): 1}", """
class Lie(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
"""), failed),
    Attack("a number that equals nothing", body("return float('nan')"),
           lambda outcome: not same(outcome.outputs[0], outcome.outputs[0])),
]  # fmt: skip

# --- all together -----------------------------------------------------------------------------------------------------


def large_answers_are_not_kept() -> bool:
    """Forty programs that return 16 MiB each leave this process no larger than four of them do."""
    source = "def f(x): return ['y' * 2**10] * (2**14 - 999) + [x]"
    limits = Limits(cpu_seconds=20, wall_seconds=60, memory_bytes=2**30, output_bytes=2**24 + 2**20)
    programs = [Program(source, "f", [[place]]) for place in range(40)]

    def is_whole(place: int, outcome: Outcome) -> bool:
        return outcome.status == "ok" and bool(outcome.outputs[0][-1] == place)

    whole = all(judge_many(programs[:4], is_whole, limits))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole &= all(judge_many(programs, is_whole, limits))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 2**10
    return whole and grown < 8 * 2**24


ATTACKS: dict[str, Callable[[], bool]] = {
    **{one.name: one.holds for one in [*ESCAPES, *EXHAUSTING, *CONFUSING, *FORGERIES, *RIGHT]},
    "large answers are not kept": large_answers_are_not_kept,
}


def results() -> list[tuple[str, bool]]:
    """Every attack by its name, and whether what came of it is what must."""
    return [(name, holds()) for name, holds in ATTACKS.items()]
