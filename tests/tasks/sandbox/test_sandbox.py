"""Programs that try to break out, forge a verdict or use up the machine."""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.sandbox import run as sandbox
from tasks.sandbox.run import Failed, Limits, Outcome, Program, run_function, run_many, same

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
SHORT = Limits(cpu_seconds=1, wall_seconds=1.5)


def call(body: str, limits: Limits = SHORT, argument: object = None, before: str = "") -> Outcome:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return run_function(f"{before}\ndef f(x):\n{lines}\n", "f", [[argument]], limits)


def processes_of(script: Path) -> list[str]:
    """The command lines of what a copy of the sandbox's script still runs."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return [line for line in found if str(script) in line]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every program no process of it is left and no scratch folder.

    The script is a copy of its own, so that other sandboxes on the machine are not mistaken for this one.
    """
    folder = Path(tempfile.mkdtemp(prefix="winnow-test-"))
    folder.chmod(0o711)
    script, scratch = folder / "sandbox_child.py", folder / "scratch"
    shutil.copy(sandbox.CHILD, script)
    scratch.mkdir(0o711)
    monkeypatch.setattr(sandbox, "CHILD", script)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    sandbox._nurseries.clear()
    yield
    assert list(scratch.iterdir()) == []
    assert len(processes_of(script)) <= 1, "none but the interpreter that forks"
    sandbox._nurseries.clear()
    deadline = time.monotonic() + 20
    while processes_of(script) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_of(script) == []
    shutil.rmtree(folder)


@pytest.fixture
def victim(nothing_left: None) -> Iterator[Path]:
    """A file outside that anyone may reach and change, as far as its own modes go."""
    folder = Path(tempfile.mkdtemp(dir=sandbox.CHILD.parent))
    folder.chmod(0o777)
    file = folder / "victim"
    file.write_text("precious")
    file.chmod(0o666)
    yield file


def test_values_come_back_with_their_types() -> None:
    values = [
        None, True, 1, 1.0, -(2**80), "é\n", [1, [2]], (1, "a"), {"a": 1}, {1: (2,)}, {1, 2}, frozenset({3}),
        [], {"dict": 1}, float("inf"),
    ]  # fmt: skip
    outcome = run_function("def f(x):\n    return x", "f", [[value] for value in values])
    assert outcome.status == "ok"
    assert all(same(actual, value) for actual, value in zip(outcome.outputs, values, strict=True))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(True, 1), (1, 1.0), ((1,), [1]), ([True], [1]), ({1: 2}, {True: 2}), ({"a": 1}, {"a": 1.0}),
     ({1}, {True}), ("1", 1), ([1, 2], [2, 1]), ([1], [1, 1]), (Failed("x"), Failed("x")), (None, 0)],
)  # fmt: skip
def test_equal_is_not_the_same(actual: object, expected: object) -> None:
    assert not same(actual, expected)
    assert expected is None or isinstance(expected, Failed) or same(expected, expected)


def test_order_of_dicts_does_not_count_but_their_values_do() -> None:
    assert same({"a": [1], "b": 2}, {"b": 2, "a": [1]})
    assert not same({"a": [1], "b": 2}, {"b": 2, "a": [2]})


def test_several_arguments_and_a_raise_in_one_call_only() -> None:
    outcome = run_function("def f(a, b):\n    return a // b", "f", [[6, 3], [1, 0], [9, 2]])
    assert [outcome.outputs[0], outcome.outputs[2]] == [2, 4]
    assert isinstance(outcome.outputs[1], Failed) and "ZeroDivisionError" in outcome.outputs[1].message


def test_the_standard_library_is_there() -> None:
    if "standard_library" not in sandbox.capabilities():
        pytest.skip("this Python is out of the reach of others")
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
    if "return" in body and "landlock" not in sandbox.capabilities():
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
    if "scratch_in_memory" in sandbox.capabilities():
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
    for value in ("Sly(3)", "[Sly(3)]", "{'a': Plain()}", "Plain()", "int", "iter([])", "10**5000"):
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


def test_capabilities_name_the_layers() -> None:
    layers = sandbox.capabilities()
    assert {"rlimit_cpu", "audit_hook"} <= set(layers)


def test_a_sandbox_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CHILD", sandbox.CHILD.with_name("missing.py"))
    sandbox.capabilities.cache_clear()
    with pytest.raises(WinnowError, match="does not start"):
        sandbox.capabilities()

    def dead(*_: object) -> None:  # its end was there before our request
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(sandbox._Nursery, "fork", dead)
    with pytest.raises(WinnowError, match="does not start"):
        sandbox.capabilities()
    sandbox.capabilities.cache_clear()


def test_a_program_is_run_once_unless_it_was_stopped(monkeypatch):
    started = []

    def counting(source, *rest):
        started.append(source)
        return run_function(source, *rest)

    monkeypatch.setattr("tasks.sandbox.run.run_function", counting)
    once = Program("def f(n):\n    return n + 41", "f", [[1]])
    stopped = Program("def f(n):\n    while True: pass", "f", [[1]])
    for _ in range(2):
        right, again, late = run_many([once, once, stopped], Limits(cpu_seconds=1))
        assert right == again == Outcome("ok", [42]) and late.status == "timeout"
    assert sorted(started) == sorted([once.source, stopped.source, stopped.source])
    assert run_many([Program(once.source, "f", [[2]])])[0].outputs == [43], "other inputs are another program"
    assert len(started) == 4


def test_complex_numbers_go_in_and_come_back() -> None:
    outcome = run_function("def f(x):\n    return {'z': x * 1j}", "f", [[2 + 1j]])
    assert outcome.outputs == [{"z": (2 + 1j) * 1j}] and not same(1 + 0j, 1.0)


def test_keys_that_share_a_hash_do_not_keep_the_caller_busy() -> None:
    body = "import os, json\nkeys = [(2**61 - 1) * i for i in range(30000)]\nfor d in range(3, 30):\n"
    body += "    try: os.write(d, json.dumps("
    for form in (
        "{'outputs': [{'value': {'set': keys}}]}",
        "{'outputs': [{'value': {'dict': [[k, 0] for k in keys]}}]}",
    ):
        started = time.monotonic()
        outcome = call(
            f"{body}{form}).encode())\n    except OSError: pass\nos._exit(0)", Limits(cpu_seconds=5, wall_seconds=20)
        )
        assert outcome.status == "crashed" and time.monotonic() - started < 20
    assert len(call("return {str(i) for i in range(5000)}").outputs[0]) == 5000


def test_outcomes_of_programs_with_many_inputs_are_not_kept() -> None:
    sandbox._known.clear()
    few = Program("def f(n):\n    return n", "f", [[1]])
    many = Program("def f(n):\n    return n", "f", [[i] for i in range(sandbox.KNOWN_INPUTS + 1)])
    outcomes = run_many([few, many, many])
    assert [len(outcome.outputs) for outcome in outcomes] == [1, len(many.inputs), len(many.inputs)]
    assert len(sandbox._known) == 1
