"""Stands in for ``harness.backends.vllm_engine``: an engine with one worker, that starts or ends as ``how`` says.

Both take no notice of SIGTERM. ``options["told"]`` is a file for the worker's number and for what else is to be known.
"""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def serve(connection: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _, options = connection.recv()
    how, told = options["how"], Path(options["told"])
    worker = subprocess.Popen([sys.executable, "-c", WORKER])
    told.write_text(str(worker.pid))
    if how == "fails":
        print("(Worker_TP1 pid=7) ERROR 12-01: ValueError: Free memory on device cuda:1 (3.1/139 GiB) is too little")
        print("(EngineCore pid=6) ERROR 12-01: RuntimeError: worker 1 has failed", flush=True)
        connection.send(("failed", "RuntimeError: Engine core initialization failed. See root cause above. {}"))
        return
    if how == "never starts":
        time.sleep(600)
    connection.send(("ready", {"max_length": 8}))
    with suppress(EOFError):
        connection.recv()
    if how == "is stuck":
        time.sleep(600)
    if how == "is slow":
        time.sleep(1.5)
        worker.kill()
        worker.wait()
        told.write_text("ended by itself")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
