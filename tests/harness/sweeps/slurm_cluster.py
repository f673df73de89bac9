"""A SLURM cluster of two nodes with a core each, on the loopback address, in a folder of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "sinfo")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
NODES = ("n1", "n2")

CONFIG = """
ClusterName=winnow-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={ports[0]}
SlurmctldParameters=idle_on_node_suspend
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
InactiveLimit=0
KillWait=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """``folder`` holds all of it; ``environment`` is what SLURM's commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | self.environment, start_new_session=True
        )

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the machine had lost its power: the daemon and all that it has started."""
        for process in _family(self.processes.pop(node).pid, self.folder / f"slurmd.{node}.pid", node):
            process.kill()

    def idle(self) -> list[str]:
        told = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %t"], capture_output=True, text=True, env=os.environ | self.environment
        )
        return [line.split()[0] for line in told.stdout.splitlines() if line.split()[1:] == ["idle"]]


def _family(pid: int, pid_file: Path, node: str) -> list[psutil.Process]:
    """The daemon of a node, its step daemons (which are children of nobody) and what they run."""
    steps = [
        process
        for process in psutil.process_iter(["name", "environ"])
        if (process.info["environ"] or {}).get("SLURMD_NODENAME") == node
        or (process.info["name"] == "slurmstepd" and node in " ".join(_words(process)))
    ]
    found = [psutil.Process(pid), *steps]
    return [*found, *(child for one in found for child in one.children(recursive=True))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Meanwhile the cluster runs. Its socket's path must be short, so ``folder`` should be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    ports = [_free_port() for _ in range(3)]
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports, host=host))
    made = Cluster(folder)
    path = made.environment["PATH"]
    subprocess.run(
        ["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True, env=os.environ | {"PATH": path}
    )
    try:
        made.start(
            "munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.sock", f"--pid-file={folder}/munge.pid",
            f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log",
        )  # fmt: skip
        _until(lambda: (folder / "munge.sock").exists(), "munged", folder)
        made.start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            made.start_node(node)
        _until(lambda: len(made.idle()) == 2, "two idle nodes", folder)
        yield made
    finally:
        for node in NODES:
            if node in made.processes:
                made.kill_node(node)
        for process in made.processes.values():
            process.send_signal(signal.SIGKILL)
        for process in made.processes.values():
            process.wait()


def _until(there, what: str, folder: Path, seconds: float = 60) -> None:
    for _ in range(int(seconds * 5)):
        if there():
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"no {what} after {seconds:.0f} s\n{logs}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
