"""Switch each mechanism off in turn and compare: a table with intervals, a figure over time.

    python tools/ablate.py                              # each seed in a toy world of its own, over an hour
    python tools/ablate.py --model MODEL --data DATA    # all seeds with these; and every option of training

Called again, it goes on where it stopped. What a run prints is in its log.txt.
"""
from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from difficulty import Filter, filter_problems, write_problems
from evaluate import Measure, run_measure
from polaris_mini import PRESETS, Common, Config, UserError, mean_and_interval, read_config, saved_config
from reward import RewardError, check_answer
from toy import World, make_world


@dataclass(frozen=True)
class Ablate:
    """Train with every mechanism, with each one off in turn and with all of them off (plain GRPO), and compare.

    Every other option is one of training (python train.py --help) and holds for all runs.
    """

    out: Path = Path("runs/ablation")
    """Folder of the runs, the table and the figure. What is finished in it is not done again."""
    seeds: int = 3
    """Runs of each variant. Without --model and --data each seed has problems and a toy model of its own."""
    target: float = 0.5
    """Held-out pass rate; how many steps and tokens it takes to get there is compared."""


def ablation_variants(config: Config, filtered: str, unfiltered: str) -> dict[str, Config]:
    """Name the variants of a run and configure them."""
    off: dict[str, dict[str, Any]] = {
        "difficulty filter": {"data": unfiltered},
        "rescue": {"rescue": False},
        "substitution": {"substitute": False},
        "removal of mastered problems": {"mastered_above": 1.0},
        "rising temperature": {"temperature": config.schedule[0].temperature},  # from a probe each, if it is auto
        "growing length": {"max_response_tokens": config.schedule[-1].max_response_tokens},
    }
    config = replace(config, data=filtered)
    plain = {name: value for change in off.values() for name, value in change.items()}
    variants = {f"no {name}": replace(config, **change) for name, change in off.items()}
    # With one stage, say, nothing rises or grows: such a variant would be the same run again.
    different = {name: variant for name, variant in variants.items() if variant != config}
    return {"all mechanisms": config, **different, "plain GRPO": replace(config, **plain)}


def run_ablation(options: Ablate, config: Config, stop: train.StopSignal) -> None:
    """Do the runs that are missing, then compare all of them."""
    if options.seeds < 1 or not 0 < options.target < 1:
        raise UserError(f"seeds is {options.seeds}, target {options.target}: give at least 1, and a pass rate")
    if config.resume or config.run_dir or config.eval_every < 0:
        raise UserError("resume, run_dir or eval_every -1 is set: ablate makes and resumes runs of its own in --out, "
                        "and compares their evaluations")
    runs: dict[str, list[Path]] = defaultdict(list)  # variant -> one folder per seed
    for seed in range(config.seed, config.seed + options.seeds):
        with stop.at_once():
            seeded = in_world(replace(config, seed=seed), options.out / f"world-{seed}")
            seeded, scores, filtered = measure_difficulty(seeded, options.out / f"data-{seed}")
        for name, variant in ablation_variants(seeded, str(filtered), str(scores)).items():
            folder = options.out / f"{name.replace(' ', '-')}-{seed}"
            runs[name].append(folder)
            begun = (folder / "config.json").exists()
            if begun and saved_config(folder) != variant:
                raise UserError(f"out is {options.out}: its runs have other settings; give another --out")
            if not is_complete(folder, config.total_steps):
                print(f"seed {seed}, {name}", flush=True)
                path = str(folder)
                train_variant(replace(variant, resume=path) if begun else replace(variant, run_dir=path), stop)
    table = ablation_table(runs, options.target)
    data.write_whole(options.out / "table.md", table)
    print(f"\n{table}\n{draw_ablation(runs, options.out / 'ablation.png')}, {options.out / 'table.md'}")


def in_world(config: Config, folder: Path) -> Config:
    """Let a run of the preset's toy world have one of its own, by its seed: a model, problems, held-out problems."""
    toy = PRESETS["toy"]
    if (config.model, config.data) != (toy.model, toy.data):
        return config
    if not folder.exists():
        print(f"making {folder}", flush=True)
        make_world(World(out=folder, seed=config.seed))
    return replace(config, model=str(folder / "model"), data=str(folder / "problems.jsonl"),
                   eval_data=str(folder / "held_out.jsonl"))  # fmt: skip


def measure_difficulty(config: Config, folder: Path) -> tuple[Config, Path, Path]:
    """Write down what all variants of a seed share; return them with held-out problems, and two files of problems.

    The first has the pass rates of the model to be trained, as `evaluate.py measure` gives them. The second leaves out
    those that it always solved, as `difficulty.py filter` does.
    """
    problems, held_out, scores, filtered = (
        folder / f"{name}.jsonl" for name in ("problems", "held_out", "scores", "filtered")
    )
    folder.mkdir(parents=True, exist_ok=True)
    check = (lambda answers: None) if config.reward else check_answer
    for path, part in zip((problems, held_out), data.training_and_held_out(config, check), strict=True):
        write_problems(part, path)
    common = {field.name: getattr(config, field.name) for field in fields(Common)}
    run_measure(Measure(**common, data=str(problems), out=str(scores), max_response_tokens=config.longest_response))
    if not filtered.exists():
        filter_problems(Filter(str(scores), filtered))
    return replace(config, eval_data=str(held_out)), scores, filtered


def is_complete(run: Path, steps: int) -> bool:
    evaluated = any(line["step"] == steps for line in data.read_lines(run / "evaluations.jsonl"))
    return evaluated and (run / "checkpoints" / f"step_{steps:06d}").is_dir()


def train_variant(config: Config, stop: train.StopSignal) -> None:
    """Train, in silence; KeyboardInterrupt when a signal ends it."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run = train.set_up(config)
        with run.pool, run.log_file or contextlib.nullcontext():
            try:
                train.train(run, stop)
            except KeyboardInterrupt:
                train.save_checkpoint(run)
                raise
            run.engine.close()


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
    def of(cls, run: Path, target: float) -> RunSummary:
        lines = list(data.read_lines(run / "metrics.jsonl"))
        points = [(e["step"], e["avg_at_k"]) for e in data.read_lines(run / "evaluations.jsonl")]
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


def ablation_table(runs: Mapping[str, Sequence[Path]], target: float) -> str:
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


def draw_ablation(runs: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Draw the variants over time, each as its mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for number, (name, several) in enumerate(runs.items()):
        metrics = [list(data.read_lines(run / "metrics.jsonl")) for run in several]
        evaluations = [list(data.read_lines(run / "evaluations.jsonl")) for run in several]
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
    options, others = tyro.cli(Ablate, args=arguments, prog="tools/ablate.py", return_unknown_args=True)
    config, stop = read_config(others), train.StopSignal()
    try:
        run_ablation(options, config, stop)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped")
        sys.exit(0 if stop.number == signal.SIGINT else 128 + stop.number)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RewardError, OSError) as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
