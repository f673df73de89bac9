"""``winnow-sweep``: how a sweep is, and ending what is queued of it."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.claims import is_held
from harness.errors import WinnowError
from harness.files import write_files
from harness.sweeps.state import CANCELLED, OVER, Outcome, note, outcome_of, read_sweep, sweeps_in
from harness.text import aligned

_EVERY = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("winnow-sweep", description="How a sweep is, and ending what is queued of it.")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="jobs with state, host, seconds, memory and what went wrong")
    status.add_argument("--watch", action="store_true", help=f"again every {_EVERY:g} seconds, until all are over")
    cancel = commands.add_parser("cancel", help="end what is queued; jobs at work come to their end")
    for one in (status, cancel):
        one.add_argument("folder", metavar="DIR", type=Path, help="the output_dir of the sweep")
    options = parser.parse_args(arguments)
    try:
        sweep = _latest(options.folder)
        if options.command == "cancel":
            print(f"{cancelled(options.folder, sweep)} jobs cancelled")
            return 0
        while True:
            text, over = told(options.folder, sweep)
            print(text, flush=True)
            if over or not options.watch:
                return 0
            time.sleep(_EVERY)
    except WinnowError as error:
        print(f"winnow-sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def told(root: Path, sweep: Path) -> tuple[str, bool]:
    """The table of the sweep's jobs with a line of totals, and whether all are over."""
    said = read_sweep(sweep)
    outcomes = {job["key"]: _now(root, sweep, job["key"]) for job in said["jobs"]}
    rows: list[Sequence[str]] = [("state", "seconds", "GPU s", "GiB", "host", "job", "")]
    for job in said["jobs"]:
        one = outcomes[job["key"]]
        measured = (
            (f"{one.seconds:.0f}", f"{one.gpu_seconds:.0f}", f"{one.peak_memory_gib:.1f}") if one.seconds else ("",) * 3
        )
        rows.append((one.state, *measured, one.host, job["label"], one.message))
    counts: dict[str, int] = {}
    for one in outcomes.values():
        counts[one.state] = counts.get(one.state, 0) + 1
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    seconds, gpu = sum(o.seconds for o in outcomes.values()), sum(o.gpu_seconds for o in outcomes.values())
    refused = [f"refused: {line}" for line in said.get("refused", ())]
    last = f"{sweep.name}, launcher {said['launcher']}: {total}; {seconds:.0f} s, {gpu / 3600:.1f} GPU hours"
    return "\n".join([aligned(rows), *refused, last]), all(one.state in OVER for one in outcomes.values())


def _now(root: Path, sweep: Path, key: str) -> Outcome:
    """What was noted last; of a job that is noted as running and that nobody holds: lost."""
    noted = outcome_of(sweep, key)
    if noted.state == "running" and not is_held(root / "claims" / f"{key}.claim"):
        noted = outcome_of(sweep, key)  # it may have come to its end just now
        if noted.state == "running":
            return Outcome("failed", "it was killed; the same command goes on", noted.host, noted.started)
    return noted


def cancelled(root: Path, sweep: Path) -> int:
    """Ends the jobs of the sweep that have not begun; returns how many."""
    said = read_sweep(sweep)
    write_files({sweep / CANCELLED: b""})  # whatever begins from now on ends at once
    waiting = [
        (job["key"], outcome)
        for job in said["jobs"]
        if (outcome := outcome_of(sweep, job["key"])).state in ("waiting", "queued")
    ]
    if said["launcher"] == "slurm":
        from harness.sweeps.on_slurm import cancel

        cancel([outcome.engine_id for _, outcome in waiting if outcome.engine_id])
    for key, outcome in waiting:
        note(sweep, key, Outcome("cancelled", "cancelled by winnow-sweep", engine_id=outcome.engine_id))
    return len(waiting)


def _latest(root: Path) -> Path:
    found = sweeps_in(root)
    if not found:
        raise WinnowError(f"no sweep in {root}: give the output_dir of one")
    return found[-1]


if __name__ == "__main__":
    sys.exit(main())
