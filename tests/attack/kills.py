"""A sweep that is killed at random moments, and goes on: its records have to be those of one that ran undisturbed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.records.store import RecordStore
from tests.tiny import save_tiny

WINNOW = str(Path(sys.executable).with_name("winnow"))
TEXTS = ["def add(a, b):\n    return a + b\n", "Tom has 3 apples and buys 4 more.", "The mill stood by the river."]
# Seconds and what is kept of how a record came about differ from run to run.
UNSTABLE = ("timings", "samples_sha256")


def make_inputs(folder: Path) -> None:
    save_tiny(folder / "model", "qwen3_moe")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def sweep(folder: Path, out: str) -> list[str]:
    return [
        WINNOW, "-m", "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=reference", "suite.items=2",
        *(f"~suite.tasks.{task}" for task in ("code", "writing", "perplexity")), "backend=hf",
        "method=reap,hc_smoe,frequency", "ratio=0.25,0.5", f"output_dir={folder / out}", "progress=false",
        "keep_checkpoint=false",
    ]  # fmt: skip


def told(root: Path) -> dict[str, Any]:
    """What the records and baselines in a folder say, but for what differs from run to run, and their samples."""
    found = {}
    for kind in ("records", "baseline"):
        store = RecordStore(root, kind)
        for name in store.ids():
            said = {key: value for key, value in store.read(name).to_json().items() if key not in UNSTABLE}
            said["config"] = {key: value for key, value in said["config"].items() if key != "output_dir"}
            found[f"{kind}/{name}"] = said, store.read_samples(name)
    return found


def undisturbed(folder: Path, out: str) -> dict[str, Any]:
    done = subprocess.run(sweep(folder, out), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a sweep that nobody killed ended with {done.returncode}:\n{done.stderr}")
    return told(folder / out)


def killed(folder: Path, kills: int, seed: int = 0) -> bool:
    """Kills a sweep at work so many times, each time after it has gone on for a while: whether the records at the end
    are those of a sweep that nobody killed."""
    make_inputs(folder)
    started = time.monotonic()
    truth = undisturbed(folder, "truth")
    whole, draw, met = time.monotonic() - started, random.Random(seed), 0
    store = RecordStore(folder / "killed")
    while met < kills:  # a sweep that has ended before its kill does not count
        for name in store.ids():  # else the sweep would soon be finished
            if draw.random() < 0.7:
                store.path(name).unlink()
        process = subprocess.Popen(
            sweep(folder, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(draw.uniform(0.2, 0.9) * whole)
        except subprocess.TimeoutExpired:
            met += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    return undisturbed(folder, "killed") == truth
