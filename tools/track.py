"""Send a run's metrics to a tracker, while the run goes on or after it.

    python tools/track.py runs/NAME --to wandb                # what is in its logs
    python tools/track.py runs/NAME --to trackio --follow     # and what comes, until the run ends
    python tools/track.py runs/NAME --to tensorboard          # into runs/NAME/NAME

The tracker has to be installed. Its names are those of accelerate: wandb, trackio, tensorboard, comet_ml, mlflow, ...
"""
from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from polaris_mini import UserError


@dataclass(frozen=True)
class Track:
    """Send a run's metrics to a tracker: a line of metrics.jsonl for each step, the held-out pass rates beside it."""

    run: Annotated[Path, tyro.conf.Positional]  # Folder of the run.
    to: str = "tensorboard"  # The tracker: wandb, trackio, tensorboard, or another that accelerate knows.
    follow: bool = False  # Go on with what comes, until the run ends.


def read_steps(run: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of each step, with the evaluation that was made after it."""
    steps = {line["step"]: line for line in data.read_lines(run / "metrics.jsonl")}
    for line in data.read_lines(run / "evaluations.jsonl"):
        found = {"eval/avg_at_k": line["avg_at_k"], "eval/pass_at_k": line["pass_at_k"][-1]}
        steps[line["step"]] = {**steps.get(line["step"], {}), **found}
    return dict(sorted(steps.items()))


def is_running(run: Path) -> bool:
    """Tell whether a process trains in the run's folder: it has locked log.txt."""
    with (run / "log.txt").open("a") as log_file:
        try:
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def track(options: Track) -> int:
    """Send every step that is in the logs, and with `follow` those that come; return how many."""
    if not (options.run / "config.json").is_file():
        raise UserError(f"run is {options.run}: there is no run in it (no config.json)")
    kind: Any = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}.get(options.to)
    if kind is None:
        raise UserError(f"to is {options.to}: give one of {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    os.environ.setdefault("WANDB_DIR", str(options.run))
    where = {"logging_dir": options.run} if kind.requires_logging_directory else {}
    tracker = kind(options.run.name if where else "polaris-mini", **where)
    tracker.start()
    tracker.store_init_configuration(
        {name: value if isinstance(value, (int, float, str, bool)) else str(value)
         for name, value in json.loads((options.run / "config.json").read_text()).items()}
    )  # fmt: skip
    sent = -1
    while True:
        runs_on = options.follow and is_running(options.run)  # asked before reading: what comes after is read next time
        steps = read_steps(options.run)
        newest = max(steps, default=-1)
        for step, metrics in steps.items():
            if step > sent and (step < newest or not runs_on):  # the newest may still get its evaluation
                numbers = {name: value for name, value in metrics.items() if value is not None and name != "step"}
                tracker.log(numbers, step=step)
                sent = step
        if not runs_on:
            tracker.finish()
            return len(steps)
        time.sleep(5)


if __name__ == "__main__":
    try:
        options = tyro.cli(Track, description=__doc__)
        print(f"{options.run}: {track(options)} steps sent to {options.to}")
    except (UserError, OSError) as error:
        print(f"track.py: error: {error}", file=sys.stderr)
        sys.exit(2)
