"""Switch each mechanism off in turn and compare: a table with intervals, a figure over time.

    python tools/ablate.py                     # in the toy world, over an hour
    python tools/ablate.py --seeds 1 --out DIR     # and every option of training

Called again, it goes on where it stopped.
"""
from __future__ import annotations

import itertools
import logging
import math
import sqlite3
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import DataError
from difficulty import Filter, filter_problems, write_problems
from evaluate import Measure, run_measure
from polaris_mini import Common, Config, mean_and_interval
from reward import RewardError
from rollout import ModelError, out_of_memory, refuse_torchrun
from train import (
    ConfigError, Display, Run, end_by, load_data, read_config, run_training, saved_config, toy_model_folder,
)


@dataclass(frozen=True)
class Ablate:
    """Train with every mechanism, with each one off in turn and with all of them off (plain GRPO), and compare.

    Every other option is one of training (python train.py --help) and holds for all runs.
    """

    out: Path = Path("runs/ablation")
    """Folder of the runs, the table and the figure. What is finished in it is not done again."""
    seeds: int = 3
    """Runs of each variant: each seed has problems, a toy model and chance of its own."""
    target: float = 0.5
    """Held-out pass rate; how many steps and tokens it takes to get there is compared."""


def ablation_variants(config: Config, filtered: str, unfiltered: str) -> dict[str, Config]:
    """Name the variants of a run and configure them."""
    off: dict[str, dict[str, Any]] = {
        "difficulty filter": {"data": unfiltered},
        "rescue": {"rescue": False},
        "substitution": {"substitute": False},
        "removal of mastered problems": {"mastered_above": 1.0},
        "rising temperature": {"temperature": config.stages[0].temperature},  # from a probe each, if it is auto
        "growing length": {"max_response_tokens": config.stages[-1].max_response_tokens},
    }
    config = replace(config, data=filtered)
    plain = {name: value for change in off.values() for name, value in change.items()}
    variants = {f"no {name}": replace(config, **change) for name, change in off.items()}
    # With one stage, say, nothing rises or grows: such a variant would be the same run again.
    different = {name: variant for name, variant in variants.items() if variant != config}
    return {"all mechanisms": config, **different, "plain GRPO": replace(config, **plain)}


def run_ablation(options: Ablate, config: Config, display: Display) -> int:
    """Do the runs that are missing, then compare all of them; return the number of the signal that ended it, or 0."""
    if options.seeds < 1 or not 0 < options.target < 1:
        raise ConfigError(f"seeds is {options.seeds}, target {options.target}: give at least 1, and a pass rate")
    if config.resume or config.run_dir or config.eval_every < 0 or config.track != "none":
        raise ConfigError("resume, run_dir, eval_every -1 or track is set: ablate makes and resumes runs of its own in "
                          "--out, and compares their evaluations")
    runs: dict[str, list[Run]] = defaultdict(list)  # variant -> one run per seed
    for seed in range(config.seed, config.seed + options.seeds):
        seeded = replace(config, seed=seed)
        scores, filtered, held_out = measured_problems(seeded, options.out / f"data-{seed}", display)
        for name, variant in ablation_variants(seeded, str(filtered), str(scores)).items():
            run = Run(options.out / f"{name.replace(' ', '-')}-{seed}")
            runs[name].append(run)
            variant = replace(variant, eval_data=str(held_out), run_dir=str(run.folder))
            if (run.folder / "config.json").exists():
                if replace(saved_config(run.folder), resume=None) != variant:
                    raise ConfigError(f"out is {options.out}: its runs have other settings; give another --out")
                variant = replace(variant, resume=str(run.folder))
            if run.last_step() >= config.total_steps:
                continue
            display.note(f"\nseed {seed}, {name}")
            _, stopped_by = run_training(variant, Display(show_rows=False))
            if stopped_by:
                display.note("the same command goes on where it stopped")
                return stopped_by
    table = ablation_table(runs, options.target)
    data.write_whole(options.out / "table.md", table)
    display.note(f"\n{table}\n{draw_ablation(runs, options.out / 'ablation.png')}, {options.out / 'table.md'}")
    return 0


def measured_problems(config: Config, folder: Path, display: Display) -> tuple[Path, Path, Path]:
    """Write down what all variants of a seed share: problems with pass rates, those not always solved, held-out ones.

    The pass rates are those of the model to be trained, as `evaluate.py measure` and `difficulty.py filter` give them.
    """
    problems, filtered, held_out, scores = (
        folder / f"{name}.jsonl" for name in ("problems", "filtered", "held_out", "scores")
    )
    training, evaluation = load_data(config)
    write_problems(training, problems)
    write_problems(evaluation, held_out)
    model = str(toy_model_folder(config, evaluation, display)) if config.model == "toy" else config.model
    common = {field.name: getattr(config, field.name) for field in fields(Common)}
    run_measure(Measure(**{**common, "model": model}, data=str(problems), out=str(scores),
                        max_response_tokens=config.stages[-1].max_response_tokens))
    if not filtered.exists():
        filter_problems(Filter(str(scores), filtered))
    return scores, filtered, held_out


@dataclass(frozen=True)
class RunSummary:
    """What the ablation compares of one run."""

    final: float
    """Held-out pass rate at the end."""
    steps: float | None
    """Steps to the target, interpolated between evaluations; None if it was not reached."""
    generated: float | None
    """Tokens generated in them."""
    forwarded: float | None
    """Tokens forwarded by their updates."""
    informative: float
    """Mean share of informative groups."""
    distinct_4: float
    """Of the last tenth of the steps."""

    @classmethod
    def of(cls, run: Run, target: float) -> RunSummary:
        lines = list(data.read_lines(run.folder / "metrics.jsonl"))
        points = [(e["step"], e["avg_at_k"]) for e in data.read_lines(run.folder / "evaluations.jsonl")]
        steps = 0.0 if points[0][1] >= target else None
        for (s0, rate0), (s1, rate1) in itertools.pairwise(points):
            if steps is None and rate0 < target <= rate1:
                steps = s0 + (s1 - s0) * (target - rate0) / (rate1 - rate0)

        def spent(metric: str) -> float | None:
            return None if steps is None else sum(
                line[metric] * min(1.0, max(0.0, steps - line["step"] + 1)) for line in lines
            )

        return cls(
            points[-1][1], steps, spent("tokens/rollout"), spent("tokens/update"),
            statistics.fmean(line["batch/informative"] for line in lines),
            statistics.fmean(line["diversity/distinct_4"] for line in lines[-max(1, len(lines) // 10) :]),
        )


def ablation_table(runs: dict[str, list[Run]], target: float) -> str:
    """Compare the variants in Markdown: means over seeds, with the 95 % interval where there are several.

    A seed has problems and a model of its own, so a variant is compared with all mechanisms seed by seed.
    """
    summaries = {name: [RunSummary.of(run, target) for run in several] for name, several in runs.items()}
    complete = summaries["all mechanisms"]

    def shown(found: list[RunSummary], metric: str, form: str, scale: float) -> str:
        values, others = ([getattr(summary, metric) for summary in several] for several in (found, complete))
        if None in values:
            return f"reached by {len(values) - values.count(None)} of {len(values)}"
        mean, interval = mean_and_interval([value * scale for value in values])
        text = format(mean, form)
        if found is not complete and None not in others:
            difference, interval = mean_and_interval(
                [(value - other) * scale for value, other in zip(values, others, strict=True)]
            )
            text += f" ({difference:+{form}}" + (")" if math.isnan(interval) else f" ± {interval:{form}})")
        elif not math.isnan(interval):
            text += f" ± {interval:{form}}"
        return text

    columns = (
        ("held-out at the end, %", "final", ".1f", 100), (f"steps to {target:.0%}", "steps", ".0f", 1),
        ("generated, k tokens", "generated", ".0f", 1e-3), ("updated, k tokens", "forwarded", ".0f", 1e-3),
        ("informative, %", "informative", ".0f", 100), ("distinct-4 at the end", "distinct_4", ".3f", 1),
    )  # fmt: skip
    rows = [["variant (against all mechanisms)", *(title for title, *_ in columns)], ["---"] * (1 + len(columns))]
    rows += [[name, *(shown(found, *column[1:]) for column in columns)] for name, found in summaries.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_ablation(runs: dict[str, list[Run]], path: Path) -> Path:
    """Draw the variants over time, each as its mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for number, (name, several) in enumerate(runs.items()):
        metrics = [list(data.read_lines(run.folder / "metrics.jsonl")) for run in several]
        evaluations = [list(data.read_lines(run.folder / "evaluations.jsonl")) for run in several]
        style: dict[str, Any] = {"color": f"C{number}", "linewidth": 2.5 if number == 0 else 1.2, "label": name}

        def mean(lines: Sequence[Sequence[dict[str, Any]]], metric: str) -> list[float]:
            return [statistics.fmean(line[metric] for line in same) for same in zip(*lines, strict=False)]

        tokens = [0.0, *itertools.accumulate(mean(metrics, "tokens/rollout"))]
        held_out, steps = mean(evaluations, "avg_at_k"), [e["step"] for e in evaluations[0]]
        axes[0, 0].plot(steps, held_out, marker=".", **style)
        axes[0, 1].plot([tokens[step] / 1e6 for step in steps], held_out, marker=".", **style)
        for axis, metric in ((axes[1, 0], "batch/informative"), (axes[1, 1], "diversity/distinct_4")):
            values = mean(metrics, metric)
            smooth = [statistics.fmean(values[max(0, i - 4) : i + 5]) for i in range(len(values))]
            axis.plot(range(1, len(values) + 1), smooth, **style)
    for axis, x, y in ((axes[0, 0], "step", "held-out pass rate"),
                       (axes[0, 1], "million generated tokens", "held-out pass rate"),
                       (axes[1, 0], "step", "share of informative groups"), (axes[1, 1], "step", "distinct-4")):
        axis.set(xlabel=x, ylabel=y)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that is not needed
    refuse_torchrun("ablate")
    options, others = data.read_options(Ablate, arguments, "tools/ablate.py", return_unknown_args=True)
    end_by(run_ablation(options, read_config(others), Display()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, ModelError, ConfigError, RewardError, OSError, sqlite3.Error, SafetensorError) as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"ablate.py: error: memory ran out ({error}): ask python tools/plan.py what fits", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ablate.py: ended at once; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
