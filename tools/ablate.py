"""Measure what a mechanism is worth: a regime in which the reason for it holds, runs with it and without it.

    python tools/ablate.py               # list the regimes
    python tools/ablate.py rescue        # run one: each variant with six seeds, two runs side by side
    python tools/ablate.py all           # run every one
    python tools/ablate.py rescue --variant 'stored: --rescue --rescue-ratio stored'    # and a variant of yours

Called again, it goes on where it stopped; after a change of the code give another --out. All runs of a regime begin
with one model. A seed has its own training problems and its own chance, and a difference is one between runs of the
same seed.
"""
from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_problems, read_lines, write_whole
from difficulty import write_problems
from polaris_mini import Config, UserError, mean_and_interval, read_config, saved_config
from toy import World, make_world, toy_problems

ROOT = Path(__file__).resolve().parents[1]
# -------------------------------------------------------------------------- the regimes
PLAIN = ("--preset toy --device cpu --no-rescue --no-substitute --mastered-above 1 --prompts-per-step 16 --eval-every "
         "20 --eval-rollouts 4 --eval-temperature 1 --checkpoint-every 40 --keep-checkpoints 1 --reward-workers 1")
"""Plain GRPO by the preset toy, for every run. The options of a regime and of a variant come after these."""
POOL, HELD_OUT = 4096, 256
"""Problems that are measured, for regimes to choose from, and problems for the evaluations of all runs."""
WORLDS = {  # with short sums, so that a run takes a minute or two
    "toy": World(terms=(2, 6)),  # with the model that is shipped
    "stubborn": World(terms=(2, 6), hard=0.4, wrong=0.97, warmup_steps=1000),
    "careful": World(terms=(2, 6), hard=0.4, wrong=0.97, haste=0.0, warmup_steps=1000),
    "sure": World(terms=(2, 4), hard=0.3, wrong=0.97, haste=0.0, warmup_steps=2000),
    "rambling": World(terms=(2, 6), hard=0.2, ramble=0.7, warmup_steps=1500),
}
SAMPLING = shlex.split("--device cpu --prompt-suffix= --max-response-tokens 128 --rollouts-per-batch 512")
FINAL, PASS, SPEED = "held-out avg@4 at the end, %", "held-out pass@4 at the end, %", "held-out avg@4 over the run, %"
STEPS, TOKENS = "steps to the target", "generated to the target, k tokens"
INFORMATIVE, SKIPPED = "informative groups at the end, %", "steps without an update, %"
GENERATED, UPDATED = "generated, k tokens", "updated, k tokens"


@dataclass(frozen=True)
class Regime:
    """A setting in which the reason for a mechanism holds, and what is compared there."""

    reason: str
    problems: Mapping[str, int]
    """How many training problems, by how many of 8 responses of the first model are right, as in "0-1"."""
    options: str
    """Options of train.py, of all variants."""
    variants: Mapping[str, str]
    """Name and options; the first is without the mechanism. {filtered}: the problems but those solved 8 times of 8."""
    metrics: tuple[str, ...]
    """What the table shows. The first decides."""
    target: float = 0.75
    """Held-out pass rate; steps and tokens until a run reaches it are compared."""
    world: str = "toy"
    temperatures: tuple[float, ...] = ()
    """At these the last policy is evaluated too, with 8 responses to each held-out problem."""


REGIMES = {
    "rescue": Regime(
        "few hard problems, visited over and over: most groups have no correct response",
        {"0": 64}, "--stages 100:1.0:64", {"off": "", "on": "--rescue"},
        (FINAL, PASS, "training pass rate at the end, %", "problems ever solved, %", INFORMATIVE), world="stubborn",
    ),
    "rescue-sound": Regime(
        "the same without haste: what leads to a right answer is mostly right",
        {"0": 64}, "--stages 100:1.0:64", {"off": "", "on": "--rescue"},
        (FINAL, PASS, "training pass rate at the end, %", "problems ever solved, %", INFORMATIVE), world="careful",
    ),
    "temperature": Regime(
        "a long run that must find what the model hardly ever does: diversity and informative groups run out",
        {"0-8": 256}, "--stages 60:1.0:64 60:1.0:64 60:1.0:64",
        {"always 1": "", "chosen once": "--stages 180:auto:64",
         "chosen, then raised": "--stages 60:auto:64 60:auto:64 60:auto:64"},
        ("avg@8 at T = 1, %", "avg@8 at T = 0.6, %", "pass@8 at T = 1, %", "pass@8 at T = 0.6, %",
         "distinct-4 at T = 1", INFORMATIVE, "temperature at the end"),
        world="stubborn", temperatures=(0.6, 1.0),
    ),
    "filter": Regime(
        "the model always solves seven in ten problems",
        {"8": 350, "0-7": 150}, "--stages 60:1.0:64 --eval-every 10", {"off": "", "on": "--data {filtered}"},
        (TOKENS, STEPS, SPEED, FINAL, INFORMATIVE), world="sure",
    ),
    "substitution": Regime(
        "many problems are solved always or never; Adam undoes a constant factor of the gradient",
        {"0": 110, "8": 110, "1-7": 36}, "--stages 60:1.0:64 --eval-every 10",
        {"off": "", "on": "--substitute"}, (TOKENS, STEPS, SPEED, FINAL, INFORMATIVE, SKIPPED),
    ),
    "substitution-sgd": Regime(
        "the same with SGD, whose step shrinks with the share of informative groups",
        {"0": 110, "8": 110, "1-7": 36}, "--stages 60:1.0:64 --eval-every 10 --optimizer sgd --lr 0.05",
        {"off": "", "on": "--substitute"}, (TOKENS, STEPS, SPEED, FINAL, INFORMATIVE, SKIPPED), target=0.6,
    ),
    "substitution-poor": Regime(
        "hardly a third of the groups is informative, so that substitution's rule leaves out updates",
        {"0": 32, "8": 48, "1": 80, "2-7": 96}, "--stages 60:1.0:64 --eval-every 10",
        {"off": "", "on": "--substitute"}, (TOKENS, STEPS, SPEED, FINAL, INFORMATIVE, SKIPPED), world="sure",
    ),
    "length": Regime(
        "responses ramble, many of them to the limit",
        {"0-8": 256}, "--stages 100:1.0:128",
        {"always 128": "", "64, then 128": "--stages 50:1.0:64 50:1.0:128",
         "too short: 32, then 128": "--stages 50:1.0:32 50:1.0:128"},
        (TOKENS, STEPS, SPEED, FINAL, "tokens of a response at the end"), target=0.5, world="rambling",
    ),
    "mastered": Regime(
        "easy problems, several stages: ever more problems are always solved",
        {"3-8": 96, "0-2": 32}, "--stages 32:1.0:64 32:1.0:64 32:1.0:64 32:1.0:64",
        {"off": "", "on": "--mastered-above 0.9"}, (TOKENS, STEPS, SPEED, FINAL, INFORMATIVE), target=0.9,
    ),
    "clip-high": Regime(
        "several updates per batch: ratios leave 1, and the clip stops what becomes likelier",
        {"0-8": 256}, "--stages 100:1.0:64 --updates-per-batch 4",
        {"off": "--clip-high 0.2", "on": "--clip-high 0.28"},
        (FINAL, PASS, SPEED, "entropy at the end, nats", "clipped tokens, %"),
    ),
    "tis": Regime(
        "the sampler differs: decoding in bfloat16 rounds otherwise than the update does",
        {"0-8": 256}, "--stages 100:1.0:64 --dtype bfloat16", {"off": "--mismatch ignore", "on": "--mismatch tis"},
        (FINAL, SPEED, "mismatch KL, 1e-6 nats"),
    ),
    "polaris": Regime(
        "all of it: problems that are never or always solved, responses that ramble, a long run",
        {"0": 120, "8": 33, "1-7": 103}, "--stages 60:1.0:128 60:1.0:128 60:1.0:128",
        {"plain GRPO": "", "all mechanisms": "--data {filtered} --rescue --substitute --mastered-above 0.9 "
         "--stages 60:auto:64 60:auto:128 60:auto:128"},
        (FINAL, PASS, SPEED, TOKENS, STEPS, INFORMATIVE, SKIPPED), target=0.5, world="rambling",
    ),
}  # fmt: skip


# -------------------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Ablate:
    """Say which regime to run, and how often."""

    regime: Annotated[str, tyro.conf.Positional] = ""
    """One of the list, or all."""
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A variant of yours, as 'NAME: OPTIONS' with options of train.py; it is compared with the regime's first one. Give
    it several times for several variants."""
    options: str = ""
    """Options of train.py for every variant, as in --options='--lr 1e-4', but none that a variant sets."""
    out: Path = Path("runs/ablation")
    """Folder of runs, tables and figures. What is finished in it is not done again."""
    seeds: int = 6
    """Runs of each variant."""
    seed: int = 0
    """The first seed; the others follow it."""
    jobs: int = 2
    """Runs side by side, with one thread each."""

    def __post_init__(self) -> None:
        if self.regime not in ("", "all", *REGIMES):
            raise UserError(f"regime is {self.regime}: give all or one of {', '.join(REGIMES)}")
        if self.seeds < 1 or self.jobs < 1:
            raise UserError(f"seeds is {self.seeds}, jobs {self.jobs}: give at least 1")
        for name, words in self.own_variants.items():
            if not name or not words.startswith("--"):
                raise UserError(f"variant is {name}: give 'NAME: OPTIONS', as 'stored: --rescue --rescue-ratio stored'")
        if clash := names_of(self.options) & {"seed", "model", "eval-data", "run-dir"}:
            raise UserError(f"options has {', '.join(clash)}: the regime sets it for every run; leave it out")

    @property
    def own_variants(self) -> dict[str, str]:
        split = (variant.partition(":") for variant in self.variant)
        return {name.strip(): words.strip() for name, _, words in split}


def names_of(options: str) -> set[str]:
    """Name the options in a text: --no-X as X, and what changes all stages as stages.

    >>> sorted(names_of("--lr 1e-4 --no-rescue --stages=5:1.0:64"))
    ['lr', 'rescue', 'stages']
    """
    words = (word for word in shlex.split(options) if word.startswith("--"))
    names = {word.removeprefix("--").removeprefix("no-").partition("=")[0].replace("_", "-") for word in words}
    return {"stages" if name in ("steps", "temperature", "max-response-tokens") else name for name in names}


@dataclass(frozen=True)
class Start:
    """What the runs of a regime begin with."""

    world: str
    folder: Path
    model: Path
    pool: Path  # problems with the model's pass rates
    held_out: Path

    @classmethod
    def of(cls, world: str, out: Path) -> Start:
        folder = out / f"world-{world}"
        made = ROOT / "tools" / "toy_world" if world == "toy" else folder / "made"
        return cls(world, folder, made / "model", folder / "pool.jsonl", folder / "held_out.jsonl")

    def prepare(self) -> None:
        """Make what is missing: the model, problems, and the model's pass rate of each."""
        settings, problems = WORLDS[self.world], self.folder / "problems.jsonl"
        if not self.model.exists():
            print(f"making {self.model.parent}: minutes", flush=True)
            make_world(replace(settings, out=self.model.parent))
        if not problems.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            drawn = toy_problems(HELD_OUT + POOL, f"laboratory {self.world}", settings.numbers_of_terms)
            write_problems(drawn[:HELD_OUT], self.held_out)
            write_problems(drawn[HELD_OUT:], problems)
        if len(list(read_lines(self.pool))) < len(list(read_lines(problems))):
            measure = ["tools/evaluate.py", "measure", *SAMPLING, "--temperature", "1", "--model", str(self.model),
                       "--data", str(problems), "--out", str(self.pool)]
            run_side_by_side([Job(f"pass rates of {POOL} problems", measure, self.folder / "measure.log")], 1)


def choose_problems(start: Start, wanted: Mapping[str, int], seed: int, folder: Path) -> None:
    """Choose a seed's training problems by pass rate: problems.jsonl, and filtered.jsonl, without those of 8/8."""
    if (folder / "filtered.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool, chosen, rng = load_problems(str(start.pool)), [], random.Random(f"ablation {seed}")
    for borders, count in wanted.items():
        low, _, high = borders.partition("-")
        fitting = [p for p in pool if p.pass_rate is not None and int(low) <= 8 * p.pass_rate <= int(high or low)]
        if len(fitting) < count:
            raise UserError(f"{start.pool}: {len(fitting)} problems have {borders} right of 8, and {count} are wanted")
        chosen += rng.sample(fitting, count)
    rng.shuffle(chosen)
    write_problems(chosen, folder / "problems.jsonl")
    write_problems([p for p in chosen if p.pass_rate != 1], folder / "filtered.jsonl")


@dataclass(frozen=True)
class Job:
    """A script of this project with its options, and where its output goes."""

    name: str
    command: Sequence[str]
    log: Path


def run_side_by_side(jobs: Sequence[Job], count: int) -> None:
    """Run `count` jobs at a time, with one thread each. Raises: UserError if one fails; the others are then stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting, running = list(jobs), dict[subprocess.Popen[bytes], tuple[Job, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job = waiting.pop(0)
                with open(job.log, "ab") as log:
                    command = [sys.executable, str(ROOT / job.command[0]), *job.command[1:]]
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[process] = job, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                if process.returncode:
                    said = job.log.read_text().strip().splitlines()
                    raise UserError(f"{job.name} ended with {process.returncode}: {said[-1] if said else job.log}")
                print(f"{job.name}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        for process in running:  # a trainer then saves its checkpoint; behind a shell's & it would ignore SIGINT
            process.terminate()
        for process in running:
            process.wait()


@dataclass(frozen=True)
class Run:
    """One run of train.py with its settings, and the options with which it begins."""

    variant: str
    seed: int
    folder: Path
    config: Config
    words: Sequence[str]

    @property
    def begun(self) -> bool:
        return (self.folder / "config.json").exists()

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step_{self.config.total_steps:06d}"

    @property
    def complete(self) -> bool:
        steps = [line["step"] for line in read_lines(self.folder / "evaluations.jsonl")]
        return self.config.total_steps in steps and self.last_checkpoint.is_dir()

    def job(self, regime: str) -> Job:
        words = ["--resume", str(self.folder)] if self.begun else [*self.words, "--run-dir", str(self.folder)]
        name = f"{regime}, seed {self.seed}, {self.variant}"
        return Job(name, ["train.py", *words], self.folder.with_suffix(".log"))


def plan_runs(name: str, start: Start, options: Ablate) -> list[Run]:
    """Return all runs of a regime. Raises: UserError if their options would compare unequal runs."""
    regime, variants = REGIMES[name], {**REGIMES[name].variants, **options.own_variants}
    folders = {variant: re.sub("[^a-z0-9.]+", "-", variant.lower()) for variant in variants}
    if len({"problems", *folders.values()}) < 1 + len(regime.variants) + len(options.variant):
        raise UserError(f"variant is {', '.join(options.own_variants)}: give each a name of its own, other than "
                        f"problems, {', '.join(regime.variants)}")
    if clash := names_of(options.options) & set().union(*map(names_of, variants.values())):
        raise UserError(f"options has {', '.join(clash)}: a variant sets it too; leave it out, or give --variant")
    runs = []
    for seed, (variant, own) in itertools.product(range(options.seed, options.seed + options.seeds), variants.items()):
        folder, problems = options.out / name / f"{folders[variant]}-{seed}", options.out / name / f"problems-{seed}"
        words = shlex.split(f"{PLAIN} {regime.options} --seed {seed}")
        words += ["--model", str(start.model), "--data", str(problems / "problems.jsonl"), "--eval-data",
                  str(start.held_out), *shlex.split(f"{options.options} {own}")]  # fmt: skip
        words = [word.replace("{filtered}", str(problems / "filtered.jsonl")) for word in words]
        run = Run(variant, seed, folder, read_config(words), words)
        if run.config.eval_every < 0:
            raise UserError(f"eval_every is {run.config.eval_every}: evaluations are compared; give 0 or more")
        if run.begun and saved_config(folder) != run.config:
            raise UserError(f"out is {options.out}: {folder} has other settings; give another --out, or delete it")
        runs.append(run)
    return runs


def run_regime(name: str, options: Ablate) -> dict[str, list[Path]]:
    """Do the runs of a regime that are missing, and return the folders of all: variant -> one for each seed."""
    regime, start = REGIMES[name], Start.of(REGIMES[name].world, options.out)
    runs = plan_runs(name, start, options)
    start.prepare()
    for seed in {run.seed for run in runs}:
        choose_problems(start, regime.problems, seed, options.out / name / f"problems-{seed}")
    run_side_by_side([run.job(name) for run in runs if not run.complete], options.jobs)
    if stopped := [run.folder for run in runs if not run.complete]:
        raise UserError(f"{stopped[0]} was stopped before its end: the same command goes on with it")
    evaluate_runs(runs, start, regime.temperatures, options.jobs)
    folders: dict[str, list[Path]] = {}
    for run in runs:
        folders.setdefault(run.variant, []).append(run.folder)
    return folders


def evaluate_runs(runs: Sequence[Run], start: Start, temperatures: Sequence[float], jobs: int) -> None:
    """Draw 8 responses to each held-out problem at each temperature, with the last policy of each run."""
    evaluations = [
        Job(f"{run.folder} at T = {t}", ["tools/evaluate.py", "eval", *SAMPLING, "--top-k", "0", "--rollouts", "8",
            "--temperature", str(t), "--model", str(run.last_checkpoint), "--data", str(start.held_out),
            "--out", str(run.folder / f"eval-{t:g}")], run.folder.with_suffix(".log"))
        for run in runs for t in temperatures if not (run.folder / f"eval-{t:g}" / "results.json").exists()
    ]  # fmt: skip
    run_side_by_side(evaluations, jobs)


# -------------------------------------------------------------------------- what is compared
def measure_run(run: Path, regime: Regime) -> dict[str, float | None]:
    """Return what is compared of a run, by its title. None: the target was not reached. At the end: the last tenth."""
    lines = list(read_lines(run / "metrics.jsonl"))
    evaluations = list(read_lines(run / "evaluations.jsonl"))
    last = lines[-max(1, len(lines) // 10) :]
    points = [(e["step"], e["avg_at_k"]) for e in evaluations]
    steps = 0.0 if points[0][1] >= regime.target else None
    area = 0.0
    for (s0, rate0), (s1, rate1) in itertools.pairwise(points):
        area += (s1 - s0) * (rate0 + rate1) / 2
        if steps is None and rate0 < regime.target <= rate1:
            steps = s0 + (s1 - s0) * (regime.target - rate0) / (rate1 - rate0)
    ever: dict[str, bool] = {}
    for line in read_lines(run / "scores.jsonl"):
        if line["step"] > 0:
            ever[line["id"]] = ever.get(line["id"], False) or line["score"] > 0

    def mean(metric: str, lines: Sequence[Mapping[str, Any]], scale: float = 1) -> float:
        values = [line[metric] for line in lines if line[metric] is not None]
        return scale * statistics.fmean(values) if values else math.nan

    def to_target(metric: str) -> float | None:
        return None if steps is None else sum(
            line[metric] * min(1.0, max(0.0, steps - line["step"] + 1)) for line in lines) / 1000

    found = {
        FINAL: 100 * points[-1][1], PASS: 100 * evaluations[-1]["pass_at_k"][-1], SPEED: 100 * area / points[-1][0],
        STEPS: steps, TOKENS: to_target("tokens/rollout"),
        "training pass rate at the end, %": mean("reward/mean", last, 100),
        "problems ever solved, %": 100 * statistics.fmean(ever.values()),
        INFORMATIVE: mean("batch/informative", last, 100),
        SKIPPED: 100 * statistics.fmean(line["policy/loss"] is None for line in lines),
        "entropy at the end, nats": mean("policy/entropy", last),
        "clipped tokens, %": mean("policy/clip_fraction", lines, 100),
        "mismatch KL, 1e-6 nats": mean("mismatch/kl", lines, 1e6),
        "tokens of a response at the end": mean("response/tokens_mean", last),
        "temperature at the end": lines[-1]["sampling/temperature"],
        GENERATED: sum(line["tokens/rollout"] for line in lines) / 1000,
        UPDATED: sum(line["tokens/update"] for line in lines) / 1000,
    }  # fmt: skip
    for t in regime.temperatures:
        of_data = json.loads((run / f"eval-{t:g}" / "results.json").read_text())["results"]
        (result,) = (of_variant["plain"] for of_variant in of_data.values())
        found |= {f"avg@8 at T = {t:g}, %": 100 * result["avg_at_k"], f"distinct-4 at T = {t:g}": result["distinct_4"],
                  f"pass@8 at T = {t:g}, %": 100 * result["pass_at_k"][-1]}
    return found


@dataclass(frozen=True)
class Comparison:
    """One metric of one variant beside the variant without the mechanism."""

    metric: str
    off: Sequence[float | None]  # one for each seed, as in `on`
    on: Sequence[float | None]

    def cells(self) -> list[str]:
        """Return off, on, and their difference with its 95 % interval, paired by seed."""
        reached = []
        for side in (self.off, self.on):
            known = [value for value in side if value is not None]
            count = f" (reached by {len(known)} of {len(side)})" * (len(known) < len(side))
            reached.append(f"{self.shown(statistics.fmean(known)) if known else ''}{count}".strip())
        pairs = [b - a for a, b in zip(self.off, self.on, strict=True) if a is not None and b is not None]
        if not pairs:
            return [*reached, ""]
        difference, interval = mean_and_interval(pairs)
        text = self.shown(difference, "+") + f" ± {self.shown(interval)}" * (len(pairs) > 1)
        return [*reached, text + f" ({len(pairs)} of {len(self.off)} seeds)" * (len(pairs) < len(self.off))]

    def shown(self, value: float, sign: str = "") -> str:
        digits = 1 if "%" in self.metric else 0 if "tokens" in self.metric or self.metric == STEPS else 3
        return format(value, f"{sign},.{digits}f")


def compare(runs: Mapping[str, Sequence[Path]], regime: Regime) -> dict[str, list[Comparison]]:
    """Compare every variant with the first: variant -> metrics, then the cost."""
    found = {variant: [measure_run(run, regime) for run in several] for variant, several in runs.items()}
    first, *others = found
    return {variant: [Comparison(metric, [m[metric] for m in found[first]], [m[metric] for m in found[variant]])
                      for metric in (*regime.metrics, GENERATED, UPDATED)] for variant in others}  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def regime_table(name: str, runs: Mapping[str, Sequence[Path]]) -> str:
    regime = REGIMES[name]
    compared, (first, *_) = compare(runs, regime), runs
    rows = []
    for of_variants in zip(*compared.values(), strict=True):
        cells = [comparison.cells() for comparison in of_variants]
        rows.append([of_variants[0].metric, cells[0][0], *itertools.chain(*(others for _, *others in cells))])
    heads = ["metric", first, *itertools.chain(*((variant, "difference") for variant in compared))]
    seeds = len(runs[first])
    return table(f"{name}: {regime.reason} ({seeds} seeds; target {regime.target:.0%})", heads, rows)


def summary_table(runs: Mapping[str, Mapping[str, Sequence[Path]]]) -> str:
    """Show each regime's deciding metric and cost, one row for each of its variants."""
    rows = []
    for name, of_variants in runs.items():
        for variant, comparisons in compare(of_variants, REGIMES[name]).items():
            decides, *_, generated, updated = comparisons
            costs = [" → ".join(cost.cells()[:2]) for cost in (generated, updated)]
            rows.append([f"{name}: {variant}", decides.metric, *decides.cells(), *costs])
    return table("Each regime's deciding metric", ["regime: variant", "metric", "off", "on", "difference", GENERATED,
                                                   UPDATED], rows)  # fmt: skip


def draw_regimes(runs: Mapping[str, Mapping[str, Sequence[Path]]], path: Path) -> None:
    """Draw the held-out pass rate over generated tokens: each variant's mean over seeds, and each seed thin."""
    from matplotlib.figure import Figure

    columns = min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes: list[Any] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(runs) :]:
        axis.set_visible(False)
    for axis, (name, of_variants) in zip(axes, runs.items(), strict=False):
        for number, (variant, several) in enumerate(of_variants.items()):
            curves = []
            for run in several:
                tokens = [0.0, *itertools.accumulate(line["tokens/rollout"] / 1e6
                                                     for line in read_lines(run / "metrics.jsonl"))]
                points = [(tokens[e["step"]], 100 * e["avg_at_k"]) for e in read_lines(run / "evaluations.jsonl")]
                curves.append(points)
                axis.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=0.5, alpha=0.5)
            means = [[statistics.fmean(values) for values in zip(*same, strict=True)]
                     for same in zip(*curves, strict=True)]
            axis.plot(*zip(*means, strict=True), color=f"C{number}", linewidth=2, marker=".", label=variant)
        axis.set(title=name, xlabel="generated tokens, millions", ylabel="held-out avg@4, %")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def list_regimes() -> None:
    for name, regime in REGIMES.items():
        problems = ", ".join(f"{count} problems with {right}/8" for right, count in regime.problems.items())
        print(f"{name}: {regime.reason}\n    decides: {regime.metrics[0]} (target {regime.target:.0%})\n"
              f"    world {regime.world}, {problems}; {regime.options}")
        for variant, options in regime.variants.items():
            print(f"      {variant}: {options or 'plain GRPO'}")
    for world, settings in WORLDS.items():
        print(f"world {world}: {settings}")
    print(f"\nplain GRPO: {PLAIN}\nrun one: python tools/ablate.py NAME; all of them: python tools/ablate.py all")


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Ablate, args=arguments, prog="tools/ablate.py", description=__doc__)
    if not options.regime:
        list_regimes()
        return
    runs = {}
    for name in REGIMES if options.regime == "all" else [options.regime]:
        runs[name] = run_regime(name, options)
        text = regime_table(name, runs[name])
        write_whole(options.out / name / "table.md", text)
        draw_regimes({name: runs[name]}, options.out / name / "curves.png")
        print(f"\n{text}\n{options.out / name}/table.md, curves.png", flush=True)
    if options.regime == "all":
        write_whole(options.out / "table.md", text := summary_table(runs))
        draw_regimes(runs, options.out / "curves.png")
        print(f"\n{text}\n{options.out}/table.md, curves.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped")
        sys.exit(130)
