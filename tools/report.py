"""Write one HTML page about runs: curves, difficulty, temperatures, every rollout.

    python tools/report.py                              # of the newest run in runs/
    python tools/report.py runs/NAME [runs/OTHER...]    # of several, over each other

The page's own code is report.html beside this file; it needs neither a server nor a network.
"""
from __future__ import annotations

import base64
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from difficulty import difficulty_histogram
from polaris_mini import UserError, temperature_zones


@dataclass(frozen=True)
class Report:
    """Write one page about a run, or about several over each other: curves, difficulty, temperatures, every rollout.

    It needs no server and no network.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs. Default: the newest in runs/."""
    out: Path | None = None
    """HTML file to write. Default: report.html in the first folder."""


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Put what the logs of some runs hold into one HTML file, with the code that draws it: report.html.

    Raises: UserError for a folder without metrics.
    """
    from plotly.offline import get_plotlyjs

    packed = gzip.compress(json.dumps([report_of(run) for run in runs]).encode())
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    for place, content in (("/*PLOTLY*/", get_plotlyjs()), ("/*DATA*/", base64.b64encode(packed).decode())):
        page = page.replace(place, content, 1)
    out = out or runs[0] / "report.html"
    data.write_whole(out, page)
    return out


PAGE_BYTES = 100_000_000
"""Of a run's rollouts.jsonl, about, go into its page."""


def report_of(folder: Path) -> dict[str, Any]:
    """Collect what the page shows of a run: of many rollouts those of every N-th step, or no browser could open it."""
    logs = {name: list(data.read_lines(folder / f"{name}.jsonl")) for name in ("metrics", "evaluations", "probes")}
    if not logs["metrics"]:
        raise UserError(f"{folder}: no metrics.jsonl with a step in it; give the folder of a run")
    path = folder / "rollouts.jsonl"
    last, every = logs["metrics"][-1]["step"], 1 + path.stat().st_size // PAGE_BYTES
    logs["rollouts"] = [line for line in data.read_lines(path) if (last - line["step"]) % every == 0]
    for probe in logs["probes"]:
        accuracy, noise = ({float(t): value for t, value in probe[name].items()} for name in ("accuracy", "noise"))
        probe |= asdict(temperature_zones(accuracy, noise))
    stages = {line["stage"]: line["step"] for line in logs["metrics"]}  # stage -> its last step
    begins = dict(zip(stages, [0, *stages.values()], strict=False))
    difficulty = [{"title": f"problems by pass rate, stage {stage}", "counts": {
        "before": known_difficulty(folder, begins[stage]), "after": known_difficulty(folder, last)}}
        for stage, last in stages.items()]
    return {"name": folder.name, "config": json.loads((folder / "config.json").read_text()), "difficulty": difficulty,
            **logs}  # fmt: skip


def known_difficulty(folder: Path, step: int) -> list[int]:
    """Return the histogram of each problem's latest pass rate up to a step, offline ones included."""
    latest = {line["id"]: line["score"] for line in data.read_lines(folder / "scores.jsonl") if line["step"] <= step}
    return difficulty_histogram(latest.values())


def newest_run() -> Path:
    logs = sorted(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise UserError("report needs a run, and runs/ has none: python tools/report.py RUN [RUN...]")
    return logs[-1].parent


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Report, args=arguments, prog="tools/report.py")
    print(write_report(options.runs or (newest_run(),), options.out))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
