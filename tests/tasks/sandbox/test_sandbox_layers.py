"""Each layer of the sandbox on its own: what holds when the others are not to be had on a system."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.sandbox import run as sandbox
from tasks.sandbox.run import Failed, Limits, run_function

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are those of Linux")
OFF = {
    "namespaces": "_enter_namespaces = lambda libc: []",
    "landlock": "_restrict_files = lambda libc: False",
    "seccomp": "_filter_syscalls = lambda libc: False",
    "limits": "_limit_resources = lambda limits: []",
    "audit": "_watch = lambda scratch: None",
    "identity": "_drop_identity = lambda libc: False",
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
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Call it with the layers to leave on; every other one is taken out of the child's script."""

    text = sandbox.CHILD.read_text()

    def leave(*layers: str) -> None:
        changes = "\n".join(change for layer, change in OFF.items() if layer not in layers)
        child = tmp_path / "child.py"
        child.write_text(text.replace('if __name__ == "__main__":', f'{changes}\nif __name__ == "__main__":'))
        monkeypatch.setattr(sandbox, "CHILD", child)
        sandbox._nurseries.clear()  # the interpreter that forks programs has the old script

    yield leave
    sandbox._nurseries.clear()


def needs(layer: str) -> None:
    if not any(layer in name for name in sandbox.capabilities()):
        pytest.skip(f"no {layer} on this system")


def failed(source: str, argument: object = None) -> bool:
    outcome = run_function(source, "f", [[argument]], Limits(cpu_seconds=1, wall_seconds=3))
    return outcome.status == "ok" and isinstance(outcome.outputs[0], Failed)


def processes_named(script: Path) -> int:
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += str(script) in file.read_text(errors="replace")
        except OSError:
            continue
    return count


def test_seccomp_alone_denies_forks_sockets_and_signals(only: Callable[..., None]) -> None:
    needs("seccomp")
    only("seccomp")
    assert run_function(FORK, "f", [[0]]).outputs == [-1]
    assert failed(SOCKET)
    assert failed(f"import os\ndef f(x):\n    os.kill({os.getpid()}, 0)")
    assert failed("import os\ndef f(x):\n    os.chmod('.', 0o777)")
    assert failed("import os\ndef f(x):\n    os.execv('/bin/true', ['true'])")
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


def test_namespaces_alone_cut_the_network_and_end_every_process(only: Callable[..., None]) -> None:
    needs("pid_namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        only()
        assert not failed(CONNECT, server.getsockname()[1]), "without any layer the server is reached"
        only("namespaces")
        assert failed(CONNECT, server.getsockname()[1])
    assert run_function(DAEMON, "f", [[0]]).outputs == [1]
    assert processes_named(sandbox.CHILD) == 1  # the interpreter that forks
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
        "open(x, 'w')",
        "open('/proc/self/environ')",
        "__import__('ctypes').CDLL(None).fork()",
    ):
        assert failed(f"def f(x):\n    return {action}", str(victim)), action
    assert victim.read_text() == "precious"
    assert run_function(
        "def f(x):\n    open('a', 'w').write('b')\n    return open('a').read()", "f", [[0]]
    ).outputs == ["b"]


def test_with_no_layer_at_all_every_process_is_still_ended(only: Callable[..., None]) -> None:
    only()
    started = time.monotonic()
    assert run_function(DAEMON, "f", [[0]], Limits(wall_seconds=1)).status == "timeout"
    assert processes_named(sandbox.CHILD) == 1  # the interpreter that forks
    assert run_function("def f(x):\n    while True: pass", "f", [[0]], Limits(wall_seconds=0.5)).status == "timeout"
    assert time.monotonic() - started < 5
