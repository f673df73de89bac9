"""Each layer of the sandbox on its own: what holds when the others are not to be had on a system."""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.sandbox import nursery
from tasks.sandbox import run as sandbox
from tasks.sandbox.run import Failed, Limits, layers_in_force, run_function

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are those of Linux")
OFF = {
    "own_root": "child.files.enter_own_root = lambda *a: False",
    "namespaces": "child.layers.enter_namespaces = lambda libc: []",
    "landlock": "child.files.landlock_version = lambda libc: 0",
    "seccomp": "child.system_calls.can_filter = lambda: False",
    "limits": "child.layers.limit_resources = lambda limits: []",
    "audit": "child.layers.watch = lambda *a: None",
    "identity": "child.layers.become_nobody = lambda: None; child.layers.drop_capabilities = lambda libc: True",
}
FORK = "import ctypes\ndef f(x):\n    return ctypes.CDLL(None).fork()"
SOCKET = "import socket\ndef f(x):\n    socket.socket()"
CONNECT = "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', x), 1)"
DAEMON = """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        os._exit(0)
    time.sleep(0.1)
    return 1
"""


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Call it with statements that change the child before it starts."""
    before, last = nursery.BOOT.split("child.start(")

    def change(*statements: str) -> None:
        nursery._nurseries.clear()  # the interpreter that forks programs is as it was
        sandbox._layers_in_force.cache_clear()
        text = "\n".join([*statements, f"child.start({last.rstrip()} # {tmp_path}\n"])
        monkeypatch.setattr(nursery, "BOOT", before + text)

    yield change
    nursery._nurseries.clear()
    sandbox._layers_in_force.cache_clear()


@pytest.fixture
def only(boot: Callable[..., None]) -> Callable[..., None]:
    """Call it with the layers to leave on; every other one is taken out."""
    return lambda *layers: boot(*(change for layer, change in OFF.items() if layer not in layers))


def needs(layer: str) -> None:
    if not any(layer in name for name in layers_in_force()):
        pytest.skip(f"no {layer} on this system")


def failed(source: str, argument: object = None) -> bool:
    outcome = run_function(source, "f", [[argument]], Limits(cpu_seconds=1, wall_seconds=3))
    return outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


def processes_named(mark: Path) -> int:
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += f"# {mark}\n" in file.read_text(errors="replace")
        except OSError:
            continue
    return count


def test_seccomp_alone_denies_forks_sockets_and_signals(only: Callable[..., None]) -> None:
    needs("seccomp")
    only("seccomp")
    assert failed("import os\ndef f(x):\n    os.fork()")
    assert failed("import os\ndef f(x):\n    os.execv('/bin/true', ['true'])")
    assert failed(SOCKET)
    assert failed(f"import os\ndef f(x):\n    os.kill({os.getpid()}, 0)")
    assert failed("import os\ndef f(x):\n    os.chmod('.', 0o777)")
    signals = "import fcntl, os\ndef f(x):\n    return fcntl.fcntl(os.pipe()[0], fcntl.{}, {})"
    assert failed(signals.format("F_SETOWN", os.getpid())) and failed(signals.format("F_SETSIG", 9))
    assert run_function(signals.format("F_GETFD", 0), "f", [[0]]).outputs == [1], "the rest of fcntl is there"
    newer = "import ctypes\ndef f(x):\n    libc = ctypes.CDLL(None, use_errno=True)\n"
    newer += "    return [libc.syscall(x), ctypes.get_errno()]"
    assert run_function(newer, "f", [[900]]).outputs == [[-1, 1]], "calls that are not known are not allowed"


def test_landlock_alone_keeps_files(only: Callable[..., None], tmp_path: Path) -> None:
    needs("landlock")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    only("landlock")
    for action in (
        "open(x, 'w')",
        "open(x).read()",
        "__import__('os').remove(x)",
        "open('/proc/self/environ')",
    ):
        assert failed(f"def f(x):\n    {action}", str(victim)), action
    assert victim.read_text() == "precious"
    assert run_function(
        "def f(x):\n    open('a', 'w').write('b')\n    return open('a').read()", "f", [[0]]
    ).outputs == ["b"]


def test_namespaces_alone_cut_the_network_and_end_every_process(only: Callable[..., None], tmp_path: Path) -> None:
    needs("pid_namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        only()
        assert not failed(CONNECT, server.getsockname()[1]), "without any layer the server is reached"
        only("namespaces")
        assert failed(CONNECT, server.getsockname()[1])
    assert run_function(DAEMON, "f", [[0]]).outputs == [1]
    deadline = time.monotonic() + 10
    while processes_named(tmp_path) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the first of the two interpreters ends
    assert processes_named(tmp_path) == 1  # the interpreter that forks
    assert failed(f"import os\ndef f(x):\n    os.kill({os.getpid()}, 0)")


def test_resource_limits_alone_bound_processes_time_and_memory(only: Callable[..., None]) -> None:
    only("limits", "identity")
    assert run_function(FORK, "f", [[0]]).outputs == [-1]
    assert failed("def f(x):\n    return bytearray(2**30)")
    assert run_function("def f(x):\n    while True: pass", "f", [[0]], Limits(cpu_seconds=1)).status == "timeout"


def test_the_audit_hook_alone_refuses_what_the_interpreter_is_asked(only: Callable[..., None], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    only("audit")
    for action in (
        "__import__('socket').socket()",
        "__import__('os').fork()",
        "__import__('os').system('true')",
        "__import__('os').remove(x)",
        "__import__('os').listdir('/')",
        "open(x, 'w')",
        "open(x)",
        "open('/proc/self/environ')",
        "__import__('ctypes').CDLL(None).fork()",
    ):
        assert failed(f"def f(x):\n    return {action}", str(victim)), action
    assert victim.read_text() == "precious"
    assert run_function(
        "def f(x):\n    open('a', 'w').write('b')\n    return open('a').read()", "f", [[0]]
    ).outputs == ["b"]


def test_with_no_layer_at_all_every_process_is_still_ended(only: Callable[..., None], tmp_path: Path) -> None:
    only()
    started = time.monotonic()
    assert run_function(DAEMON, "f", [[0]], Limits(wall_seconds=1)).status == "timeout"
    assert processes_named(tmp_path) == 1  # the interpreter that forks
    assert run_function("def f(x):\n    while True: pass", "f", [[0]], Limits(wall_seconds=0.5)).status == "timeout"
    assert time.monotonic() - started < 5


# --- only the standard library is to be seen --------------------------------------------------------------------------

READ = """
import os
def f(paths):
    seen = []
    for path in paths:
        try:
            seen.append(open(path).read())
        except OSError:
            seen.append(None)
    return seen
"""


@pytest.fixture
def installed(tmp_path: Path) -> tuple[str, list[str]]:
    """A library beside Python's own in which winnow is installed: its folder, a module of it and three files of its
    packages."""
    inside = tmp_path / "lib" / "python3.99"
    files = [inside / "part.py", inside / "site-packages" / "winnow.py", tmp_path / "lib" / "project" / "answers.py"]
    files.append(tmp_path / "lib" / "python3" / "dist-packages" / "winnow.py")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.owner() == Path.home().owner() and not folder.stat().st_mode & 1 and folder != Path.home():
            folder.chmod(folder.stat().st_mode | 0o011)
    return str(tmp_path / "lib"), [str(file) for file in files]


@pytest.mark.parametrize("layers", [("own_root", "namespaces"), ("landlock",), ("audit",), tuple(OFF)])
def test_packages_beside_the_library_are_hidden(
    layers: tuple[str, ...], only: Callable[..., None], boot: Callable[..., None], installed: tuple[str, list[str]]
) -> None:
    for layer in layers:
        if layer in ("own_root", "landlock"):
            needs(layer)
    library, files = installed
    boot(
        *(change for layer, change in OFF.items() if layer not in layers),
        "places, hidden = child.files.library_places, child.files.hidden_places",
        f"child.files.library_places = lambda: [*places(), {library!r}]",
        f"child.files.hidden_places = lambda places, project: hidden(places, {library + '/project'!r})",
    )
    outcome = run_function(READ, "f", [[files]])
    assert outcome.outputs == [["part.py", None, None, None]]


@pytest.mark.parametrize("change", ["", "child.files.MOUNT_SETATTR = 9999"], ids=["now", "before Linux 5.12"])
def test_nothing_else_is_in_a_root_of_its_own(change: str, boot: Callable[..., None]) -> None:
    needs("own_root")
    boot(change, OFF["landlock"], OFF["audit"], OFF["identity"])
    look = "import os\ndef f(x):\n    return sorted(os.listdir('/'))"
    allowed = {"dev", "empty", "etc", "lib", "lib64", "usr", "winnow-work", Path(os.__file__).parts[1]}
    allowed |= {Path(path).parts[1] for path in sys.path if path.startswith(sys.base_prefix)}
    assert set(run_function(look, "f", [[0]]).outputs[0]) <= allowed
    below = "import os\ndef f(x):\n    return os.listdir('/etc') + os.listdir('/usr')"
    assert set(run_function(below, "f", [[0]]).outputs[0]) <= {"ld.so.cache", "localtime", "lib", "lib64", "share",
                                                                 "local"}  # fmt: skip
    assert "own_root" in layers_in_force()
    for path in ("/a", "/dev/a", "/usr/lib/a", os.__file__):
        outcome = run_function("def f(x):\n    open(x, 'a')", "f", [[path]])
        assert isinstance(outcome.outputs[0], Failed) and "Read-only" in outcome.outputs[0].message
    assert run_function("def f(x):\n    return open(x, 'w').write('x')", "f", [["/dev/null"]]).outputs == [1]


# --- the standard library is whole, or the run stops ------------------------------------------------------------------

WIDE = "import sqlite3, json.tool, unittest.mock, xml.dom, decimal\ndef f(x):\n    return x + 1"


@pytest.mark.parametrize(
    "missing",
    [(), ("own_root",), ("own_root", "namespaces"), ("namespaces",)],
    ids=lambda missing: " ".join(missing) or "nothing",
)
def test_the_library_is_whole_though_its_folder_is_closed_to_others(
    missing: tuple[str, ...], boot: Callable[..., None]
) -> None:
    """As root's own Python is: with a root of its own it is shown there, else root is not left for it."""
    needs("landlock")
    off = [OFF[layer] for layer in missing if layer in ("own_root", "namespaces")]
    if missing == ("namespaces",):  # without them there is no root of its own either
        off.append(OFF["own_root"])
    boot(*off, "child.files.library_open_to_others = lambda: False")
    assert run_function(WIDE, "f", [[1]]).outputs == [2]
    assert ("own_root" in layers_in_force()) == (not missing)


def test_it_is_whole_where_the_temporary_folder_is_closed(
    boot: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    monkeypatch.setattr("tempfile.tempdir", str(closed))
    write = "import os\ndef f(x):\n    open(os.path.abspath('a'), 'w').write('b')\n    return open('a').read()"
    for off in ([], [OFF["own_root"]], [OFF["own_root"], OFF["namespaces"]]):
        boot(*off)
        assert run_function(WIDE, "f", [[1]]).outputs == [2]
        assert run_function(write, "f", [[1]]).outputs == ["b"]
        assert layers_in_force()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("watch = child.layers.watch; child.layers.watch = lambda scratch, places, hidden: watch(scratch, [], [])",
         r"cannot import \d+ modules of the standard library"),
        ("child.files.library_places = lambda: []; child.files.enter_own_root = lambda *a: False",
         r"cannot import \d+ modules of the standard library"),
        ("child.files.hidden_places = lambda *a: []; real = child.files.library_places; "
         f"child.files.library_places = lambda: [*real(), {str(nursery.PROJECT)!r}]", "can read"),
        ("child.layers.limit_resources = lambda limits: 1 / 0", "does not work here"),
    ],
    ids=["hook", "places", "project", "fault"],
)  # fmt: skip
def test_where_it_is_not_whole_or_too_much_is_seen_the_run_stops(
    change: str, said: str, boot: Callable[..., None]
) -> None:
    boot(change)
    with pytest.raises(WinnowError, match=said) as stopped:
        sandbox.run_many([sandbox.Program(WIDE, "f", [[1]])])
    assert "\n" not in str(stopped.value) and re.search("run as|install winnow", str(stopped.value))
