"""Measure a model: avg@k and pass@k on benchmarks, accuracy and diversity over temperature, each problem's pass rate.

    python tools/evaluate.py eval --model M --data FILE [FILE...]           # avg@k, pass@k, by length; YaRN if asked
    python tools/evaluate.py probe --model M --data FILE                    # which temperature to train at
    python tools/evaluate.py measure --model M --data FILE --out SCORES     # how difficult each problem is for it
    python tools/evaluate.py measure --prompt-suffix "" --model tools/toy_world/model \\
        --data tools/toy_world/held_out.jsonl --max-response-tokens 128     # the toy world, on any machine

Every command keeps its responses (measure: their rewards) in a file as they come. Called again, it goes on there.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import UserError
from polaris_mini import (
    Common, Group, Problem, Rollout, Zones, mean_and_interval, mean_distinct_n, pick_temperature, require,
    temperature_grid, temperature_zones,
)
from reward import RewardError, RewardPool, check_answer
from rollout import (
    Engine, Evaluation, HFEngine, ProbeCurves, Sampling, VLLMEngine, base_model, check_model, load_model,
    load_tokenizer, resolve_device, resolve_dtype, sample_groups, set_rewards, uses_vllm,
)

# --------------------------------------------------------------------------- the options


@dataclass(frozen=True, kw_only=True)
class Command(Common):
    """What the commands have in common."""

    model: str = field()
    """A folder or hub name of a Hugging Face causal language model."""
    problems: int = 0
    """How many problems to take, chosen by the seed; 0: all."""
    top_p: float = 1.0
    """Nucleus sampling; 1: off."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: off."""
    max_response_tokens: int = 32768
    """Response limit in tokens."""
    rollouts: int | None = 8
    """Rollouts per problem."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.problems >= 0, "problems", "give a number, or 0 for all")
        require(self, 0 < self.top_p <= 1, "top_p", "give a share above 0, 1 at most")
        require(self, self.top_k >= 0, "top_k", "give a number of tokens, or 0 for all")
        require(self, self.max_response_tokens >= 1, "max_response_tokens", "give at least 1")
        require(self, self.rollouts is None or self.rollouts >= 1, "rollouts", "give at least 1")


@dataclass(frozen=True, kw_only=True)
class Measure(Command):
    """Measure each problem's pass rate: its difficulty for this very model."""

    data: str
    """Problems: a jsonl, json or parquet file, a folder, or a hub data set (owner/name:configuration:split)."""
    out: str = "scores.jsonl"
    """Where the pass rates go, one line a problem. What is in it already is not measured again."""
    rollouts: int = 8
    """Rollouts per problem. Source: blog (8)."""
    temperature: float = 0.6
    """Sampling temperature. Source: blog (0.6 in its analysis; that of its filter is not published)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.temperature < math.inf, "temperature", "give a value above 0")


@dataclass(frozen=True, kw_only=True)
class Probe(Command):
    """Measure accuracy and diversity over temperatures, and choose one."""

    data: str
    """Training problems; `problems` of them are probed. Not a benchmark that you report."""
    out: str = "probe"
    """Folder for probe.json, probe.png and the responses. What is in it already is not sampled again."""
    problems: int = 64
    """How many problems to take, chosen by the seed; 0: all."""
    rollouts: int = 8
    """Rollouts per problem. Diversity can be compared only at the same number."""
    temperatures: str = "0.2:1.8:0.2"
    """START:END:STEP, end included, or a list: 0.6,1.0,1.4."""
    match_diversity: float | None = None
    """For a later stage: the distinct-4 to restore, that of the first stage's temperature before training."""
    diversity_words: int = 500
    """Words of each response that the fixed-length diversity looks at."""


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Evaluate a model: avg@k, pass@k, by length and by limit. The defaults are the published settings."""

    data: tuple[str, ...]
    """Files, folders or hub data sets of problems, each evaluated by itself."""
    out: str = "eval"
    """Folder for results.json and the responses. What is in it already is not sampled again."""
    rollouts: int | None = None
    """k of avg@k. Default, as published, by file name: 32 for aime24 and aime25, 4 for minerva and olympiad, else 8."""
    temperature: float = 1.4
    """Sampling temperature. Source: release (1.4)."""
    top_k: int = 20
    """Sample from the k likeliest tokens only; 0: off. Source: release (20)."""
    max_response_tokens: int = 90000
    """Response limit in tokens. Source: release (90000)."""
    yarn_factor: float = 1.0
    """Also evaluate with positions stretched by this factor. Source: blog (1.5); 1: off."""
    original_max_positions: int | None = None
    """Positions that YaRN stretches. Default: max_position_embeddings of the model; not published."""
    yarn_attention_scale: float = 1.0
    """YaRN's attention scale: 1 leaves attention as it is; the blog's setting gave 1.0405."""
    length_bounds: tuple[int, ...] = (16384, 32768)
    """Borders of the buckets of response length, in tokens. Source: blog."""
    limits: tuple[int, ...] = (32768, 49152, 65536, 81920)
    """Response limits, in tokens, for which the accuracy is given too. Source: blog (of the context)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.temperature < math.inf, "temperature", "give a value above 0")
        require(self, 1 <= self.yarn_factor < math.inf, "yarn_factor", "give 1 (off) or more")
        require(self, 0 < self.yarn_attention_scale < math.inf, "yarn_attention_scale", "give a value above 0")
        for name in ("length_bounds", "limits"):
            rising = all(0 <= below < above for below, above in pairwise([0, *getattr(self, name)]))
            require(self, rising, name, "give rising numbers of tokens")


PUBLISHED_ROLLOUTS = {"aime24": 32, "aime25": 32, "amc23": 8, "minerva": 4, "olympiad": 4}
"""k of avg@k by data set. Source: release."""


# ----------------------------------------------------------------------- what is computed


def yarn_config(factor: float, original_max_positions: int, *, attention_scale: float = 1.0) -> dict[str, Any]:
    """Make the rope settings that stretch a model's positions by `factor`, at inference, for both engines.

    >>> yarn_config(1.5, 65536)["attention_factor"]
    1.0

    Source: YaRN (arXiv 2309.00071); blog (factor 1.5, at inference only, without attention scaling).
    Differs from the blog: its attn_factor of 1.0 was multiplied by 0.1 ln(1.5) + 1 = 1.0405 in the vLLM of its time
    and is ignored by today's and by transformers, so YaRN's scaling of attention stayed on.
    """
    return {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_max_positions,
        "attention_factor": attention_scale,
    }  # fmt: skip


def by_length(groups: Sequence[Group], bounds: Sequence[int]) -> list[tuple[float, int]]:
    """Return accuracy and number of the responses of up to each bound's tokens (and above the one before); nan: none.

    Source: blog, accuracy by response length (16K, 32K, beyond).
    """
    buckets = []
    for above, up_to in pairwise([-1, *bounds, math.inf]):
        correct = [rollout.correct for group in groups for rollout in group.rollouts
                   if above < len(rollout.response_tokens) <= up_to]  # fmt: skip
        buckets.append((statistics.fmean(correct) if correct else math.nan, len(correct)))
    return buckets


def by_limit(groups: Sequence[Group], limits: Sequence[int]) -> list[float]:
    """Return the accuracy if responses had been cut at each limit of tokens. Source: blog, accuracy by context."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [statistics.fmean(r.correct and len(r.response_tokens) <= limit for r in rollouts) for limit in limits]


def fixed_length_distinct_4(groups: Sequence[Group], words: int) -> float:
    """Average distinct-4 of each response's first `words` words, over the problems whose responses all have as many.

    Longer responses repeat more, so distinct-4 at different lengths cannot be compared. nan: no problem has as many.
    """
    split = [[rollout.text.split() for rollout in group.rollouts] for group in groups]
    cut = [[" ".join(text[:words]) for text in texts] for texts in split if min(map(len, texts)) >= words]
    return mean_distinct_n(cut) if cut else math.nan


# ------------------------------------------------------------------- drawing, and the file


class Session:
    """Draws and grades rollouts for a command, into a file that a second call goes on with."""

    def __init__(self, options: Command, path: Path) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"torchrun started {os.environ['WORLD_SIZE']} processes, but this tool runs on one GPU: "
                            "start it with python")
        self.options, self.path = options, path
        self.tokenizer = load_tokenizer(options.model, options)
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{path} cannot be made, as {above} is no folder: give another --out")
        self.done: dict[tuple[str, str], Group] = {}  # by settings and problem id
        try:
            for line in data.read_lines(path):
                self.done[as_key(line["settings"]), line["id"]] = from_line(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: exists and is not a file of this command: give another --out") from error
        self.pool = RewardPool(options.reward_workers, options.reward_timeout,
                               options.require_think and data.thinks(self.tokenizer), function=options.reward)
        self.engine: Engine | None = None
        self.engine_yarn: Mapping[str, Any] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.close_engine()

    def problems(self, source: str) -> list[Problem]:
        options = self.options
        check = (lambda answers: None) if options.reward else check_answer  # a function of the user's reads its own
        loaded = data.load_problems(source, check_answers=check, skip_bad_rows=options.skip_bad_rows)
        problems = data.encode_prompts(loaded, self.tokenizer, options)
        if 0 < options.problems < len(problems):  # chosen by the seed and the id, wherever in the file it stands
            problems.sort(key=lambda problem: hashlib.sha256(f"{options.seed}:{problem.id}".encode()).digest())
            problems = problems[: options.problems]
        check_model(options.model, options, problems, options.max_response_tokens)
        return problems

    def measure(
        self, source: str, problems: Sequence[Problem], rollouts: int, temperature: float,
        yarn: Mapping[str, Any] | None = None,
    ) -> list[Group]:
        """Return a group for every problem; draw those that the file does not hold yet, and append them."""
        options = self.options
        only_rates = isinstance(options, Measure)  # its file is to be used as data: of one setting, without texts
        settings: dict[str, Any] = {
            "model": options.model, "data": source, "rollouts": rollouts, "temperature": temperature,
            "top_p": options.top_p, "top_k": options.top_k, "max_response_tokens": options.max_response_tokens,
            "yarn": yarn, "prompt_suffix": options.prompt_suffix, "require_think": options.require_think,
            "reward": options.reward, "seed": options.seed,
        }
        key = as_key(settings)
        others = {other for other, _ in self.done} - {key}
        if only_rates and others:
            raise UserError(f"{self.path}: holds pass rates with other settings, {others.pop()}: give another --out")
        for problem in problems:
            known = self.done.get((key, problem.id))
            if known and (known.problem.text, known.problem.answers) != (problem.text, problem.answers):
                raise UserError(f"{self.path}: problem {problem.id} has changed in {source} since: give another --out")
        # Continuous batching idles only at the end of a chunk, so vLLM's are longer. The chunks are those of the whole
        # list, so that an interrupted measurement draws the same responses.
        size = max(1, options.rollouts_per_batch * (8 if uses_vllm(options) else 1) // rollouts)
        with tqdm(total=len(problems), desc=f"{source}, T = {temperature:g}", unit="problem", disable=None) as progress:
            for chunk in (problems[i : i + size] for i in range(0, len(problems), size)):
                if not all((key, problem.id) in self.done for problem in chunk):
                    seed = random.Random(f"{options.seed}:{temperature}:{chunk[0].id}").getrandbits(63)
                    sampling = Sampling(temperature, options.max_response_tokens, seed, options.top_p, options.top_k)
                    drawn = sample_groups(self.start_engine(yarn), self.pool, chunk, rollouts, sampling)
                    fresh = [g for g in set_rewards(*drawn) if (key, g.problem.id) not in self.done]
                    data.append_lines(self.path, [to_line(g, settings, keep_text=not only_rates) for g in fresh])
                    self.done |= {(key, g.problem.id): g for g in fresh}
                progress.update(len(chunk))
        return [self.done[key, problem.id] for problem in problems]

    def start_engine(self, yarn: Mapping[str, Any] | None) -> Engine:
        """Load the model when the first response is needed. One with other positions takes the last one's place."""
        if self.engine is not None and self.engine_yarn == yarn:
            return self.engine
        self.close_engine()
        options, rope = self.options, yarn and yarn_config(**yarn)
        dtype = resolve_dtype(options, resolve_device(options.device))
        if uses_vllm(options):
            base, longest = base_model(options.model), options.max_prompt_tokens + options.max_response_tokens
            if base == options.model:
                self.engine = VLLMEngine(base, self.tokenizer, options, longest, rope=rope)
            else:  # an adapter, which is merged into its base in CPU memory
                merged = load_model(options.model, replace(options, device="cpu"), dtype, rope=rope)
                self.engine = VLLMEngine(base, self.tokenizer, options, longest, rope=rope, policy=merged)
                self.engine.wake(merged)
        else:
            self.engine = HFEngine(load_model(options.model, options, dtype, rope=rope), self.tokenizer, options)
        self.engine_yarn = yarn
        return self.engine

    def close_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None  # before the next one is loaded


def as_key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def to_line(group: Group, settings: Mapping[str, Any], *, keep_text: bool) -> dict[str, Any]:
    """Describe a graded group and all settings that decided about it. The line is also a problem for training."""
    problem = group.problem
    outcomes = [{"reward": rollout.reward, "reason": rollout.reason, "tokens": len(rollout.response_tokens),
                 "truncated": rollout.truncated, "text": rollout.text if keep_text else ""}
                for rollout in group.rollouts]  # fmt: skip
    return {"id": problem.id, "problem": problem.text, "answers": problem.answers, "system": problem.system,
            "pass_rate": group.pass_rate, "outcomes": outcomes, "settings": settings}  # fmt: skip


def from_line(line: Mapping[str, Any]) -> Group:
    """Make a group of what `to_line` has kept of it: not which tokens a response has, but how many."""
    problem = Problem(line["id"], line["problem"], tuple(line["answers"]), line["pass_rate"], line["system"])
    rollouts = [
        Rollout(problem.id, (), [0] * o["tokens"], [], o["text"], "length" if o["truncated"] else "stop",
                o["reward"], o["reason"]) for o in line["outcomes"]
    ]  # fmt: skip
    return Group(problem, rollouts)


# -------------------------------------------------------------------------- the commands


def run_measure(options: Measure) -> None:
    with Session(options, Path(options.out)) as session:
        problems = session.problems(options.data)
        groups = session.measure(options.data, problems, options.rollouts, options.temperature)
    mean, interval = mean_and_interval([group.pass_rate for group in groups])
    print(f"{options.out}: {len(groups)} problems, mean pass rate {mean:.1%} +- {interval:.1%}")
    print(f"next: python tools/difficulty.py histogram {options.out}; "
          f"python tools/difficulty.py filter --scores {options.out} --out FILE")


def run_probe(options: Probe) -> None:
    grid = temperature_grid(options.temperatures)
    folder = Path(options.out)
    with Session(options, folder / "responses.jsonl") as session:
        problems = session.problems(options.data)
        measured = {t: session.measure(options.data, problems, options.rollouts, t) for t in grid}
    curves = ProbeCurves.of(measured)
    fixed = {t: fixed_length_distinct_4(groups, options.diversity_words) for t, groups in measured.items()}
    zones = temperature_zones(curves.accuracy, curves.noise)
    rows = []
    for t in grid:
        zone = ("robust generation" if t <= zones.robust_until else
                "controlled exploration" if t <= zones.exploration_until else "performance collapse")
        rows.append([f"{t:g}", f"{curves.accuracy[t]:.1%}", f"{curves.noise[t]:.1%}", f"{curves.distinct_4[t]:.3f}",
                     f"{fixed[t]:.3f}", zone])  # fmt: skip
    print_table(f"{len(problems)} problems x {options.rollouts} rollouts",
                ["temperature", "accuracy", "(noise)", "distinct-4", "fixed length", "zone"], rows)
    chosen = {"first stage": pick_temperature(curves.accuracy, curves.distinct_4, noise=curves.noise)}
    if options.match_diversity is not None:
        chosen["later stage"] = pick_temperature(
            curves.accuracy, curves.distinct_4, match=options.match_diversity, noise=curves.noise
        )
    print()
    for name, temperature in chosen.items():
        print(f"{name}: {temperature:g}")
    if zones.exploration_until == grid[-1]:
        print(f"no collapse up to {grid[-1]:g}: try higher --temperatures")
    results = {"settings": asdict(options), "curves": asdict(curves) | {"distinct_4_fixed": fixed},
               "zones": asdict(zones), "temperature": chosen}  # fmt: skip
    write_results(folder / "probe.json", results)
    plot_probe(curves, fixed, zones, folder / "probe.png")
    print(f"\n{folder / 'probe.png'}, {folder / 'probe.json'}")


def plot_probe(curves: ProbeCurves, fixed: Mapping[float, float], zones: Zones, path: Path) -> None:
    from matplotlib.figure import Figure

    grid = list(curves.accuracy)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(grid, list(curves.accuracy.values()), yerr=list(curves.noise.values()), marker="o", capsize=3,
                  label="accuracy, with the standard error of its distance to the best")
    axis.plot(grid, list(curves.distinct_4.values()), marker="s", label="distinct-4")
    axis.plot(grid, list(fixed.values()), "--", label="distinct-4 at fixed length")
    borders = [grid[0], zones.robust_until, zones.exploration_until, grid[-1]]
    for name, colour, (start, end) in zip(
        ("robust generation", "controlled exploration", "performance collapse"), ("green", "orange", "red"),
        pairwise(borders), strict=True,
    ):
        if start < end:
            axis.axvspan(start, end, color=colour, alpha=0.1, label=name)
    axis.set(xlabel="temperature", ylim=(0, 1))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def run_eval(options: Eval) -> None:
    folder = Path(options.out)
    results: dict[str, Any] = {}
    with Session(options, folder / "responses.jsonl") as session:
        sources = {source: session.problems(source) for source in options.data}  # all are checked before any is drawn
        variants: dict[str, Mapping[str, Any] | None] = {"plain": None}
        if options.yarn_factor != 1.0:
            positions = max_positions(options)
            variants[f"YaRN {options.yarn_factor:g}"] = {
                "factor": options.yarn_factor, "original_max_positions": positions,
                "attention_scale": options.yarn_attention_scale,
            }
        for variant, yarn in variants.items():
            for source, problems in sources.items():
                k = options.rollouts or PUBLISHED_ROLLOUTS.get(Path(source).name.partition(".")[0], 8)
                groups = session.measure(source, problems, k, options.temperature, yarn)
                results.setdefault(source, {})[variant] = asdict(Evaluation.of(groups)) | {
                    "by_length": by_length(groups, options.length_bounds), "by_limit": by_limit(groups, options.limits),
                }
    path = folder / "results.json"
    write_results(path, {"settings": asdict(options), "results": results})
    print_evaluations(results, options)
    print(f"\n{path}")


def max_positions(options: Eval) -> int:
    """Return how many positions YaRN stretches. Raises: UserError if they are not rotary ones, alike in all layers."""
    config = AutoConfig.from_pretrained(base_model(options.model), trust_remote_code=options.trust_remote_code)
    text = config.get_text_config()
    if "rope_type" not in (getattr(text, "rope_parameters", None) or {}) or getattr(text, "alibi", False):
        raise UserError(f"yarn_factor is {options.yarn_factor:g}: {options.model} ({config.model_type}) has no rotary "
                        "positions, alike in all layers, that YaRN could stretch; leave --yarn-factor out")
    return options.original_max_positions or text.max_position_embeddings


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write json; nan, which json does not know, becomes null."""
    known = json.loads(json.dumps(results), parse_constant=lambda nan: None)
    data.write_whole(path, json.dumps(known, indent=2) + "\n")


def short_names(sources: Collection[str]) -> dict[str, str]:
    """Name each source by the shortest end of its path, at best without its suffix, that no other source has."""
    def ends(source: str) -> list[str]:
        path = Path(source)
        return [path.stem, *(str(Path(*path.parts[-n:])) for n in range(1, len(path.parts) + 1))]

    taken = Counter(end for source in sources for end in set(ends(source)))
    return {source: next((end for end in ends(source) if taken[end] == 1), source) for source in sources}


def print_evaluations(results: Mapping[str, Any], options: Eval) -> None:
    names = short_names(results)
    named = {(names[source], variant): found for source, of in results.items() for variant, found in of.items()}
    print_table("accuracy",
                ["data", "", "problems", "k", "avg@k", "95 % interval", "pass@k", "tokens", "truncated", "distinct-4"],
                [[*name, str(e["problems"]), str(e["k"]), f"{e['avg_at_k']:.1%}", f"+- {e['interval']:.1%}",
                  f"{e['pass_at_k'][-1]:.1%}", f"{e['tokens_mean']:.0f}", f"{e['truncated']:.1%}",
                  f"{e['distinct_4']:.3f}"] for name, e in named.items()])  # fmt: skip
    tries = [2**i for i in range(max(e["k"] for e in named.values()).bit_length())]
    print_table("pass@k", ["data", "", *(f"k = {k}" for k in tries)],
                [[*name, *(f"{e['pass_at_k'][k - 1]:.1%}" if k <= e["k"] else "" for k in tries)]
                 for name, e in named.items()])  # fmt: skip
    bounds = options.length_bounds
    heads = [*(f"up to {bound}" for bound in bounds), f"above {bounds[-1]}"] if bounds else ["all"]
    print_table("accuracy by response length in tokens (share of responses)", ["data", "", *heads],
                [[*name, *(f"{accuracy:.1%} ({count / (e['problems'] * e['k']):.0%})" if count else "-"
                           for accuracy, count in e["by_length"])] for name, e in named.items()])  # fmt: skip
    limits = [limit for limit in options.limits if limit < options.max_response_tokens]
    heads = [*map(str, limits), str(options.max_response_tokens)]
    print_table("accuracy by response limit in tokens", ["data", "", *heads],
                [[*name, *(f"{accuracy:.1%}" for accuracy in e["by_limit"][: len(limits)]), f"{e['avg_at_k']:.1%}"]
                 for name, e in named.items()])  # fmt: skip


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (heads, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    commands: Any = Eval | Probe | Measure
    options = tyro.cli(commands, args=arguments, prog="tools/evaluate.py", description=__doc__)
    run: Any = {Eval: run_eval, Probe: run_probe, Measure: run_measure}[type(options)]
    run(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RewardError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
