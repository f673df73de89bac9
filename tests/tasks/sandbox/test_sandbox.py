"""Programs that try to break out, forge a verdict or use up the machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from harness.errors import WinnowError
from tasks.sandbox import nursery
from tasks.sandbox import run as sandbox
from tasks.sandbox.run import (
    Failed,
    Limits,
    Outcome,
    Program,
    judge_many,
    layers_in_force,
    run_function,
    run_many,
    same,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
SHORT = Limits(cpu_seconds=1, wall_seconds=1.5)


def call(body: str, limits: Limits = SHORT, argument: object = None, before: str = "") -> Outcome:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return run_function(f"{before}\ndef f(x):\n{lines}\n", "f", [[argument]], limits)


def processes_of(mark: str) -> list[str]:
    """The command lines that hold ``mark``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return [line for line in found if mark in line]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files. After every program nothing of it is left there, and no process of it.

    The interpreter's command line is marked, so that other sandboxes on the machine are not mistaken for this one.
    """
    folder = Path(tempfile.mkdtemp(prefix="winnow-test-"))
    mark = f"# {folder.name}"
    monkeypatch.setattr(nursery, "BOOT", nursery.BOOT + mark)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    nursery._nurseries.clear()
    yield folder
    assert [path.name for path in folder.iterdir() if path.name != "victim"] == []
    assert len(processes_of(mark)) <= 1, "none but the interpreter that forks"
    nursery._nurseries.clear()
    wait_until(lambda: not processes_of(mark))
    shutil.rmtree(folder)


@pytest.fixture
def victim(scratch: Path) -> Iterator[Path]:
    """A file outside that anyone may reach and change, as far as its own modes go."""
    folder = scratch / "victim"
    scratch.chmod(0o711)
    folder.mkdir()
    folder.chmod(0o777)
    file = folder / "victim"
    file.write_text("precious")
    file.chmod(0o666)
    yield file


def test_values_come_back_with_their_types() -> None:
    values = [
        None, True, 1, 1.0, -(2**80), "é\n", [1, [2]], (1, "a"), {"a": 1}, {1: (2,)}, {1, 2}, frozenset({3}),
        [], {"dict": 1}, float("inf"), b"\0\xff", 7**9999, Fraction(1, 3), Decimal("1.10"),
    ]  # fmt: skip
    outcome = run_function("def f(x):\n    return x", "f", [[value] for value in values])
    assert outcome.status == "ok"
    assert all(same(actual, value) for actual, value in zip(outcome.outputs, values, strict=True))


def test_several_arguments_and_a_raise_in_one_call_only() -> None:
    outcome = run_function("def f(a, b):\n    return a // b", "f", [[6, 3], [1, 0], [9, 2]])
    assert [outcome.outputs[0], outcome.outputs[2]] == [2, 4]
    assert isinstance(outcome.outputs[1], Failed) and "ZeroDivisionError" in outcome.outputs[1].message


def test_the_standard_library_is_there() -> None:
    outcome = call("import encodings.cp500, math, re, collections, itertools, decimal, heapq\nreturn math.comb(5, 2)")
    assert outcome.outputs == [10]


@pytest.mark.parametrize(
    ("source", "detail"), [("def f(:", "SyntaxError"), ("g = 1", "KeyError"), ("1/0", "ZeroDivisionError")]
)
def test_a_source_that_does_not_run_is_an_error(source: str, detail: str) -> None:
    outcome = run_function(source, "f", [[1]])
    assert outcome.status == "error" and detail in outcome.detail


@pytest.mark.parametrize("body", ["while True:\n    pass", "import time\ntime.sleep(60)", "return 10**10**8"])
def test_endless_work_is_stopped(body: str) -> None:
    started = time.monotonic()
    assert call(body).status == "timeout"
    assert time.monotonic() - started < 5


def test_a_loop_that_catches_everything_is_stopped() -> None:
    body = "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass"
    assert call(body).status == "timeout"


@pytest.mark.parametrize(
    "body",
    [
        "import os\nwhile True:\n    os.fork()",
        "import os, signal\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nreturn 1",
        "import subprocess, sys\nreturn subprocess.run([sys.executable, '-c', 'while True: pass']).pid",
        "import os\nreturn os.system('sleep 9')",
        "import os\nreturn os.posix_spawn('/bin/sleep', ['sleep', '9'], {})",
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()\nreturn 1",
    ],
)
def test_no_process_can_be_started(body: str) -> None:
    outcome = call(body)
    assert outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


@pytest.mark.parametrize(
    "body", ["return len([0] * 10**9)", "x = 'a'\nwhile True:\n    x += x", "return bytearray(10**9)"]
)
def test_memory_is_bounded(body: str) -> None:
    outcome = call(body)
    if outcome.status == "ok":
        assert isinstance(outcome.outputs[0], Failed) and "MemoryError" in outcome.outputs[0].message
    else:
        assert outcome.status in ("crashed", "timeout")


@pytest.mark.parametrize(
    "body",
    [
        "import os\nos.remove(x)",
        "import os\nos.rename(x, x + '2')",
        "import os\nos.symlink('/', os.path.dirname(x) + '/link')",
        "import os\nos.mkdir(os.path.dirname(x) + '/made')",
        "import os\nos.chmod(x, 0)",
        "import os\nos.utime(x, (0, 0))",
        "import os\nos.truncate(x, 0)",
        "import os\nos.close(os.open(x, os.O_WRONLY | os.O_TRUNC))",
        "open(x, 'w').write('gone')",
        "open(x + '2', 'a').write('gone')",
        "import pathlib\npathlib.Path(x).write_text('gone')",
        "import shutil, os\nshutil.rmtree(os.path.dirname(x))",
        "import os\nos.symlink(x, 'link')\nopen('link', 'w').write('gone')",
        "import sqlite3\nsqlite3.connect(x + '.db').execute('create table t (a)')",
        "return open(x).read()",
    ],
)
def test_files_outside_stay_as_they_are(body: str, victim: Path) -> None:
    if "return" in body and "landlock" not in layers_in_force():
        pytest.skip("reading is only refused by Landlock")
    before = victim.stat()
    outcome = call(body, argument=str(victim))
    assert outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)
    after = victim.stat()
    assert victim.read_text() == "precious" and (before.st_mode, before.st_mtime) == (
        after.st_mode,
        after.st_mtime,
    )
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


def test_the_scratch_folder_can_be_used_and_is_bounded() -> None:
    assert call("open('a', 'w').write('hi')\nreturn open('a').read()").outputs == ["hi"]
    full = call("for i in range(50):\n    open(str(i), 'w').write('x' * 10**6)")
    assert full.status == "crashed" or isinstance(full.outputs[0], Failed)
    if "scratch_in_memory" in layers_in_force():
        many = call("for i in range(10**4):\n    open(str(i), 'w').close()\nreturn i")
        assert isinstance(many.outputs[0], Failed) and "No space left" in many.outputs[0].message


def test_nothing_of_our_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_SECRET", "do-not-tell")
    assert call("import os\nreturn [k for k in os.environ if k != 'LC_CTYPE']").outputs == [["PYTHONHASHSEED"]]
    for process in (os.getpid(), "self", 1):
        outcome = call(f"return 'do-not-tell' in open('/proc/{process}/environ').read()")
        assert isinstance(outcome.outputs[0], Failed)


def test_nobody_answers_on_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = call(f"import socket\nreturn socket.create_connection(('127.0.0.1', {port}), 1).fileno()")
        assert isinstance(outcome.outputs[0], Failed)
        with pytest.raises(TimeoutError):
            server.accept()
    low_level = call("import _socket\nreturn _socket.socket(2, 1).fileno()")
    assert isinstance(low_level.outputs[0], Failed)


@pytest.mark.parametrize("body", ["import sys\nsys.exit(0)", "raise SystemExit", "raise KeyboardInterrupt"])
def test_leaving_is_a_failed_call(body: str) -> None:
    outcome = call(body)
    assert outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


@pytest.mark.parametrize(
    "body",
    ["import os\nos._exit(0)", "import os\nos.abort()", "import os\nos.closerange(0, 99)\nwhile True: pass"],
)
def test_ending_the_process_is_no_result(body: str) -> None:
    assert call(body).status == "crashed"


def test_signals_reach_nobody() -> None:
    for target in (os.getpid(), "os.getppid()", -1, 1):
        outcome = call(f"import os\nos.kill({target}, 9)\nreturn 1")
        assert outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


def test_a_printed_verdict_is_not_read() -> None:
    body = 'print(\'{"outputs": [{"value": 42}]}\', flush=True)\nimport sys\nsys.stderr.write("42")\nreturn 0'
    assert call(body).outputs == [0]


def test_a_verdict_written_to_every_descriptor_is_a_wrong_value_at_most() -> None:
    body = 'import os\nfor d in range(99):\n    try: os.write(d, b\'{"outputs": [{"passed": true}]}\')\n'
    body += "    except OSError: pass\nos._exit(0)"
    assert call(body).status == "crashed"
    nested = body.replace('b\'{"outputs": [{"passed": true}]}\'', "b'[' * 60000")
    assert nested != body and call(nested).status == "crashed"


def test_giant_output_is_refused() -> None:
    assert call("print('x' * 10**8)\nreturn 1", Limits()).outputs == [1]
    assert call("return 'x' * 10**7").status == "too_large"
    endless = "import os\nwhile True:\n    for d in range(3, 32):\n        try: os.write(d, b'x' * 65536)\n"
    endless += "        except OSError: pass"
    started = time.monotonic()
    assert call(endless).status in ("too_large", "crashed")
    assert time.monotonic() - started < 1.4


def test_deep_recursion_and_deep_values() -> None:
    assert isinstance(call("return f(x)").outputs[0], Failed)
    assert call("import sys\nsys.setrecursionlimit(10**9)\nreturn f(x)").status in (
        "crashed",
        "ok",
        "timeout",
    )
    deep = call("a = []\nfor _ in range(10**5):\n    a = [a]\nreturn a")
    assert deep.status != "ok" or isinstance(deep.outputs[0], Failed)
    assert isinstance(call("a = []\na.append(a)\nreturn a").outputs[0], Failed)


def test_hostile_objects_are_never_asked() -> None:
    before = (
        "class Sly(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "    def __repr__(self): raise SystemExit\n"
        "class Plain:\n    __eq__ = lambda self, other: True\n    __class__ = int\n"
    )
    for value in ("Sly(3)", "[Sly(3)]", "{'a': Plain()}", "Plain()", "int", "iter([])"):
        outcome = call(f"return {value}", before=before)
        failed = outcome.outputs == [] or isinstance(outcome.outputs[0], Failed)
        assert failed, value
    raising = call("class E(Exception):\n    __str__ = lambda self: 1/0\nraise E")
    assert isinstance(raising.outputs[0], Failed)


def test_changed_modules_change_nothing_outside() -> None:
    body = "import json, os, sys\njson.dumps = lambda *a, **k: '{\"passed\": true}'\nos.write = print\nreturn 1"
    assert call(body).status in ("ok", "crashed", "timeout")
    assert call("return 2").outputs == [2]


def test_sets_are_ordered_alike_every_time() -> None:
    source = "def f(x):\n    return ''.join(set('abcdefghij'))"
    assert len({run_function(source, "f", [[0]]).outputs[0] for _ in range(3)}) == 1


def test_many_programs_keep_their_order_and_are_quick() -> None:
    programs = [Program(f"def f(x):\n    return x + {i}", "f", [[1]]) for i in range(40)]
    started = time.monotonic()
    assert [outcome.outputs for outcome in run_many(programs)] == [[i + 1] for i in range(40)]
    assert time.monotonic() - started < 10


def test_the_layers_in_force_are_named() -> None:
    layers = layers_in_force()
    assert {"rlimit_cpu", "audit_hook"} <= set(layers)


def test_a_sandbox_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._layers_in_force.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(nursery, "BOOT", "raise SystemExit(1)")
        with pytest.raises(WinnowError, match="does not start here"):
            layers_in_force()

    def dead(*_: object) -> None:  # its end was there before our request
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(nursery._Nursery, "fork", dead)
    with pytest.raises(WinnowError, match="ends when it is used"):
        layers_in_force()
    wait_until(lambda: not processes_of(nursery.BOOT.splitlines()[-1]))


def test_an_interpreter_that_was_killed_is_started_anew() -> None:
    assert call("return 1").outputs == [1]
    os.kill(nursery._nurseries[0]._process.pid, signal.SIGKILL)
    nursery._nurseries[0]._process.wait()
    assert call("return 2").outputs == [2]


def test_a_program_is_run_once_unless_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    layers_in_force()
    started = []

    def counting(request: bytes, *rest: Any) -> tuple[bytes, int]:
        started.append(json.loads(request)["source"])
        return nursery.talk(request, *rest)

    monkeypatch.setattr(sandbox, "talk", counting)
    once = Program("def f(n):\n    return n + 41", "f", [[1]])
    stopped = Program("def f(n):\n    while True: pass", "f", [[1]])
    for _ in range(2):
        right, again, late = run_many([once, once, stopped], Limits(cpu_seconds=1))
        assert right == again == Outcome("ok", [42]) and late.status == "timeout"
    assert sorted(started) == sorted([once.source, stopped.source, stopped.source])
    assert run_many([Program(once.source, "f", [[2]])])[0].outputs == [43], "other inputs are another program"
    driver = "def call(program, n):\n    return -program['f'](n)"
    assert run_many([Program(once.source, "f", [[2]], driver)])[0].outputs == [-43], "and another driver too"
    assert len(started) == 5


def test_complex_numbers_go_in_and_come_back() -> None:
    outcome = run_function("def f(x):\n    return {'z': x * 1j}", "f", [[2 + 1j]])
    assert outcome.outputs == [{"z": (2 + 1j) * 1j}] and not same(1 + 0j, 1.0)


def test_a_set_of_many_members_comes_back() -> None:
    assert len(call("return {str(i) for i in range(5000)}").outputs[0]) == 5000
    assert len(call("return set(range(50000))").outputs[0]) == 50000


def test_long_answers_are_not_remembered() -> None:
    sandbox._known.clear()
    short, long = (Program(f"def f(n):\n    return 'x' * {size}", "f", [[1]]) for size in (9, sandbox.KNOWN_BYTES))
    outcomes = run_many([short, long, long])
    assert [len(outcome.outputs[0]) for outcome in outcomes] == [9, sandbox.KNOWN_BYTES, sandbox.KNOWN_BYTES]
    assert len(sandbox._known) == 1


def test_outcomes_are_judged_as_they_come_each_in_its_place() -> None:
    one = Program("def f(n):\n    return n", "f", [[1]])
    other = Program("def f(n):\n    return n", "f", [[2]])
    assert judge_many([one, other, one], lambda place, outcome: (place, outcome.outputs)) == [
        (0, [1]), (1, [2]), (2, [1])
    ]  # fmt: skip


def test_a_driver_calls_with_builtins_that_the_program_has_not_changed() -> None:
    driver = "def call(program, x):\n    return [len(x), program['f'](x), sorted(program)[:1]]"
    program = "import builtins\nbuiltins.len = builtins.sorted = None\nlen = 5\ndef f(x):\n    return len"
    outcome = run_function(program, "f", [["abc"]], driver=driver)
    assert outcome.outputs == [[3, 5, ["__builtins__"]]]
    assert run_function("g = 1", "f", [["abc"]], driver=driver).status == "error"
