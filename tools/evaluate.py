"""Measure a model: avg@k and pass@k on benchmarks, accuracy and diversity over temperature, each problem's pass rate.

    python tools/evaluate.py eval --model M --data FILE [FILE...]       # avg@k, pass@k, by length, with YaRN if asked
    python tools/evaluate.py probe --model M --data FILE                # accuracy and diversity over temperature
    python tools/evaluate.py measure --model M --data FILE --out SCORES # each problem's pass rate
    python tools/evaluate.py eval --help                                # every option

Every command keeps its responses in a file as they come, and goes on with it when it is called again.
"""
from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import DataError
from polaris_mini import (
    Common, Problem, Zones, mean_and_interval, pick_temperature, require, temperature_grid, temperature_zones,
    yarn_config,
)
from reward import RewardError
from rollout import (
    Engine, Evaluation, HFEngine, Measured, ModelError, Outcome, ProbeCurves, Sampling, VLLMEngine, base_model,
    encode_prompts, load_model, load_problems, load_tokenizer, refuse_torchrun, resolve_device, resolve_dtype,
    reward_pool, sample_groups, set_rewards, uses_vllm,
)


def by_length(measured: Sequence[Measured], bounds: Sequence[int]) -> list[tuple[float, int]]:
    """Return accuracy and number of the responses of up to each bound's tokens (and above the one before); nan: none.

    Source: blog, accuracy by response length (16K, 32K, beyond).
    """
    outcomes = [outcome for problem in measured for outcome in problem.outcomes]
    buckets = []
    for above, up_to in zip([-1, *bounds], [*bounds, math.inf], strict=True):
        correct = [outcome.correct for outcome in outcomes if above < outcome.tokens <= up_to]
        buckets.append((statistics.fmean(correct) if correct else math.nan, len(correct)))
    return buckets


def by_limit(measured: Sequence[Measured], limits: Sequence[int]) -> list[float]:
    """Return the accuracy if responses had been cut at each limit of tokens. Source: blog, accuracy by context."""
    outcomes = [outcome for problem in measured for outcome in problem.outcomes]
    return [statistics.fmean(o.correct and o.tokens <= limit for o in outcomes) for limit in limits]


# -------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Command(Common):
    """What the commands have in common."""

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


def _rising(numbers: Sequence[int]) -> bool:
    return all(0 <= below < above for below, above in pairwise([0, *numbers]))


@dataclass(frozen=True)
class Measure(Command):
    """Measure each problem's pass rate: its difficulty for this very model."""

    data: str = "toy"
    """Problems: a jsonl, json or parquet file, a hub data set (owner/name, or owner/name:split), or toy."""
    out: str = "scores.jsonl"
    """Where the pass rates go, one line a problem. What is in it already is not measured again."""
    rollouts: int = 8
    """Rollouts per problem. Source: blog (8)."""
    temperature: float = 0.6
    """Sampling temperature. Source: blog (0.6 in its analysis; that of its filter is not published)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.temperature < math.inf, "temperature", "give a value above 0")


@dataclass(frozen=True)
class Probe(Command):
    """Measure accuracy and diversity over temperatures, and choose one."""

    data: str = "toy"
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


@dataclass(frozen=True)
class Eval(Command):
    """Evaluate a model: avg@k, pass@k, by length and by limit. The defaults are the published settings."""

    data: tuple[str, ...] = ("toy",)
    """Files of problems or hub data sets, each evaluated by itself."""
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
    """YaRN's attention scale: 1 leaves attention as it is; the release in effect had 1.0405."""
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
            require(self, _rising(getattr(self, name)), name, "give rising numbers of tokens")


class Session:
    """Draws and grades rollouts for a command, into a file that a second call goes on with."""

    def __init__(self, options: Command, path: Path) -> None:
        refuse_torchrun(type(options).__name__.lower())
        self.options, self.path = options, path
        self.device, self.vllm = resolve_device(options.device), uses_vllm(options)
        self.model = toy_folder() if options.model == "toy" else options.model
        self.tokenizer = load_tokenizer(self.model, trust_remote_code=options.trust_remote_code)
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise DataError(f"{path} cannot be made, as {above} is no folder: give another --out")
        self.pool = reward_pool(options, self.tokenizer)
        self._engine_with: tuple[str, HFEngine | VLLMEngine] | None = None  # its rope, as a key
        self._longest_prompt = 0
        self._done: dict[tuple[str, str], Measured] = {}
        try:
            for line in data.read_lines(path):
                outcomes = tuple(Outcome(**outcome) for outcome in line.pop("outcomes"))
                found = Measured(**{**line, "answers": tuple(line["answers"])}, outcomes=outcomes)
                self._done[_key(found.settings), found.id] = found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: exists and is not a file of this command: give another --out") from error

    def problems(self, source: str) -> list[Problem]:
        problems = encode_prompts(self.options, load_problems(self.options, source), self.tokenizer)
        if 0 < self.options.problems < len(problems):
            problems = data.hold_out(problems, self.options.problems, self.options.seed)[1]
        self._longest_prompt = max(self._longest_prompt, *(len(problem.prompt_tokens) for problem in problems))
        return problems

    def measure(
        self, source: str, problems: Sequence[Problem], rollouts: int, temperature: float,
        yarn: Mapping[str, Any] | None = None, keep_text: bool = True,
    ) -> list[Measured]:
        """Return every problem with its outcomes; sample those that the file does not hold yet, and append them."""
        options = self.options
        settings: dict[str, Any] = {
            "model": self.model, "data": source, "rollouts": rollouts, "temperature": temperature,
            "top_p": options.top_p, "top_k": options.top_k, "max_response_tokens": options.max_response_tokens,
            "yarn": dict(yarn) if yarn else None, "prompt_suffix": options.prompt_suffix,
            "prompt_examples": options.prompt_examples, "require_think": options.require_think,
            "reward": options.reward, "seed": options.seed,
        }
        key = _key(settings)
        others = {other for other, _ in self._done} - {key}
        if not keep_text and others:
            raise DataError(f"{self.path}: holds pass rates with other settings, {others.pop()}: give another --out")
        for problem in problems:
            found = self._done.get((key, problem.id))
            if found is not None and (found.problem, found.answers) != (problem.text, problem.answers):
                raise DataError(f"{self.path}: problem {problem.id} has changed in {source} since: give another --out")
        missing = [problem for problem in problems if (key, problem.id) not in self._done]
        # Continuous batching idles only at the end of a chunk, so vLLM's are longer. The chunks are those of the whole
        # list, so that an interrupted measurement draws the same responses.
        size = max(1, options.rollouts_per_batch * (8 if self.vllm else 1) // rollouts)
        chunks = [problems[i : i + size] for i in range(0, len(problems), size)]
        chunks = [chunk for chunk in chunks if any((key, problem.id) not in self._done for problem in chunk)]
        fits = options.rollouts_per_batch
        with self._progress(f"{source}, T = {temperature:g}", len(missing)) as (on_problems, on_tokens):
            for chunk in chunks:
                seed = random.Random(f"{options.seed}:{temperature}:{chunk[0].id}").getrandbits(63)
                sampling = Sampling(temperature, options.max_response_tokens, seed, options.top_p, options.top_k)
                groups, gradings = sample_groups(
                    self._engine(yarn), self.tokenizer, self.pool, chunk, rollouts, sampling, on_tokens
                )
                set_rewards(gradings)
                fresh = [Measured.of(group, settings, keep_text) for group in groups]
                fresh = [found for found in fresh if (key, found.id) not in self._done]
                data.append_lines(self.path, [asdict(found) for found in fresh])
                self._done |= {(key, found.id): found for found in fresh}
                on_problems(len(fresh))
                if self._engine(yarn).rollouts_per_batch < fits:
                    fits = self._engine(yarn).rollouts_per_batch
                    print(f"memory ran out; what fits, for next time: --rollouts-per-batch {fits}", file=sys.stderr)
        return [self._done[key, problem.id] for problem in problems]

    def _engine(self, yarn: Mapping[str, Any] | None) -> Engine:
        """Load the model when the first response is needed; another rope means another model, in place of the last."""
        name, options = _key(yarn), self.options
        if self._engine_with is None or self._engine_with[0] != name:
            self.close_engine()
            rope = None if yarn is None else yarn_config(**yarn)

            def load(device: torch.device) -> PreTrainedModel:
                return load_model(self.model, dtype=resolve_dtype(options, self.device), device=device, rope=rope,
                                  trust_remote_code=options.trust_remote_code,
                                  allow_pickled_weights=options.allow_pickled_weights)

            if self.vllm:
                base, longest = base_model(self.model), self._longest_prompt + options.max_response_tokens
                adapter = base != self.model
                engine: HFEngine | VLLMEngine = VLLMEngine(base, self.tokenizer, options, max_tokens=longest, rope=rope,
                                                           weights="policy" if adapter else "disk")
                if adapter:
                    engine.wake(load(torch.device("cpu")))
            else:
                engine = HFEngine(load(self.device), self.tokenizer, options)
            self._engine_with = name, engine
        return self._engine_with[1]

    def close_engine(self) -> None:
        if self._engine_with is not None:
            self._engine_with[1].close()
            self._engine_with = None  # before the next one is loaded

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.close_engine()

    @contextlib.contextmanager
    def _progress(self, title: str, total: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                      TextColumn("{task.fields[tokens]:,} tokens"), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(title, total=total, tokens=0)
            tokens = 0

            def on_tokens(count: int) -> None:
                nonlocal tokens
                tokens += count
                progress.update(task, tokens=tokens)

            yield lambda count: progress.advance(task, count), on_tokens


def _key(settings: Mapping[str, Any] | None) -> str:
    return json.dumps(settings, sort_keys=True)


def toy_folder() -> str:
    """Return the toy model that `python train.py` used last."""
    folders = sorted(data.toy_cache().glob("toy-*"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        raise ModelError("model is toy: there is none yet; run python train.py once, or give the folder of a model")
    return str(folders[-1])


def run_measure(options: Measure) -> None:
    session = Session(options, Path(options.out))
    problems = session.problems(options.data)
    with session:
        measured = session.measure(options.data, problems, options.rollouts, options.temperature, keep_text=False)
    mean, interval = mean_and_interval([found.pass_rate for found in measured])
    print(f"{options.out}: {len(measured)} problems, mean pass rate {mean:.1%} +- {interval:.1%}")
    print(f"next: python tools/difficulty.py histogram {options.out}; "
          f"python tools/difficulty.py filter --scores {options.out} --out FILE")


def run_probe(options: Probe) -> None:
    grid = temperature_grid(options.temperatures)
    folder = Path(options.out)
    session = Session(options, folder / "responses.jsonl")
    problems = session.problems(options.data)
    with session:
        measured = {t: session.measure(options.data, problems, options.rollouts, t) for t in grid}
    curves = ProbeCurves.of(measured, options.diversity_words)
    zones = temperature_zones(curves.accuracy, curves.noise)
    print(f"{len(problems)} problems x {options.rollouts} rollouts\n")
    print("temperature  accuracy  (noise)  distinct-4  fixed length  zone")
    for t in grid:
        zone = ("robust generation" if t <= zones.robust_until else
                "controlled exploration" if t <= zones.exploration_until else "performance collapse")
        print(f"{t:11g}  {curves.accuracy[t]:8.1%}  {curves.noise[t]:7.1%}  {curves.distinct_4[t]:10.3f}"
              f"  {curves.distinct_4_fixed[t]:12.3f}  {zone}")
    chosen = {"first stage": pick_temperature(curves.accuracy, curves.distinct_4, noise=curves.noise)}
    if options.match_diversity is not None:
        chosen["later stage"] = pick_temperature(
            curves.accuracy, curves.distinct_4, match=options.match_diversity, noise=curves.noise
        )
    for name, temperature in chosen.items():
        print(f"\n{name}: {temperature:g}", end="")
    if zones.exploration_until == grid[-1]:
        print(f"\nno collapse up to {grid[-1]:g}: try higher --temperatures", end="")
    plot = folder / "probe.png"
    plot_probe(curves, zones, plot)
    results = {"settings": asdict(options), "curves": asdict(curves), "zones": asdict(zones), "temperature": chosen}
    write_results(folder / "probe.json", results)
    print(f"\n\n{plot}, {folder / 'probe.json'}")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write json; nan, which json does not know, becomes null."""
    known = json.loads(json.dumps(results), parse_constant=lambda nan: None)
    data.write_whole(path, json.dumps(known, indent=2) + "\n")


def plot_probe(curves: ProbeCurves, zones: Zones, path: Path) -> None:
    from matplotlib.figure import Figure

    grid = list(curves.accuracy)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(grid, list(curves.accuracy.values()), yerr=list(curves.noise.values()), marker="o", capsize=3,
                  label="accuracy, with the standard error of its distance to the best")
    axis.plot(grid, list(curves.distinct_4.values()), marker="s", label="distinct-4")
    axis.plot(grid, list(curves.distinct_4_fixed.values()), "--", label="distinct-4 at fixed length")
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


PUBLISHED_ROLLOUTS = {"aime24": 32, "aime25": 32, "amc23": 8, "minerva": 4, "olympiad": 4}
"""k of avg@k by data set. Source: release."""


def run_eval(options: Eval) -> None:
    folder = Path(options.out)
    session = Session(options, folder / "responses.jsonl")
    sources = {source: session.problems(source) for source in options.data}  # all are checked before anything is drawn
    variants: dict[str, Mapping[str, Any] | None] = {"plain": None}
    if options.yarn_factor != 1.0:
        positions = options.original_max_positions or max_positions(session.model, options.trust_remote_code)
        variants[f"YaRN {options.yarn_factor:g}"] = {
            "factor": options.yarn_factor, "original_max_positions": positions,
            "attention_scale": options.yarn_attention_scale,
        }
    results: dict[str, Any] = {}
    with session:
        for variant, yarn in variants.items():
            for source, problems in sources.items():
                k = options.rollouts or PUBLISHED_ROLLOUTS.get(Path(source).name.partition(".")[0], 8)
                found = session.measure(source, problems, k, options.temperature, yarn)
                results.setdefault(source, {})[variant] = asdict(Evaluation.of(found)) | {
                    "by_length": by_length(found, options.length_bounds), "by_limit": by_limit(found, options.limits),
                }
    path = folder / "results.json"
    write_results(path, {"settings": asdict(options), "results": results})
    print_evaluations(results, options)
    print(path)


def max_positions(model: str, trust_remote_code: bool) -> int:
    settings = AutoConfig.from_pretrained(base_model(model), trust_remote_code=trust_remote_code)
    return settings.get_text_config().max_position_embeddings


def print_evaluations(results: Mapping[str, Any], options: Eval) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, heads: Sequence[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        shown = Table(title=title)
        for head in ("data", "", *heads):
            shown.add_column(head, no_wrap=True)
        for source, variants in results.items():
            for variant, result in variants.items():
                shown.add_row(Path(source).stem, variant, *cells(result))
        console.print(shown)

    console = Console(soft_wrap=True, width=max(110, Console().width))  # cells are never cut
    table("accuracy", ("problems", "k", "avg@k", "95 % interval", "pass@k", "tokens", "truncated", "distinct-4"),
          lambda e: [str(e["problems"]), str(e["k"]), f"{e['avg_at_k']:.1%}", f"+- {e['interval']:.1%}",
                     f"{e['pass_at_k'][-1]:.1%}", f"{e['tokens_mean']:.0f}", f"{e['truncated']:.1%}",
                     f"{e['distinct_4']:.3f}"])
    most = max(e["k"] for variants in results.values() for e in variants.values())
    tries = [2**i for i in range(most.bit_length())]
    table("pass@k", [f"k = {k}" for k in tries],
          lambda e: [f"{e['pass_at_k'][k - 1]:.1%}" if k <= e["k"] else "" for k in tries])
    bounds = options.length_bounds
    heads = [*(f"up to {bound}" for bound in bounds), f"above {bounds[-1]}"] if bounds else ["all"]
    table("accuracy by response length in tokens (share of responses)", heads,
          lambda e: ["-" if not count else f"{accuracy:.1%} ({count / (e['problems'] * e['k']):.0%})"
                     for accuracy, count in e["by_length"]])
    limits = [limit for limit in options.limits if limit < options.max_response_tokens]
    table("accuracy by response limit in tokens", [*map(str, limits), str(options.max_response_tokens)],
          lambda e: [*(f"{accuracy:.1%}" for accuracy in e["by_limit"][: len(limits)]), f"{e['avg_at_k']:.1%}"])


COMMANDS: dict[str, tuple[type[Command], Callable[[Any], None]]] = {
    "measure": (Measure, run_measure), "probe": (Probe, run_probe), "eval": (Eval, run_eval),
}


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        if arguments and arguments[0] not in ("-h", "--help"):
            raise DataError(f"command is {arguments[0]}: give one of {', '.join(COMMANDS)}")
        return
    transformers_logging.disable_progress_bar()
    options_class, command = COMMANDS[arguments[0]]
    command(data.read_options(options_class, arguments[1:], f"tools/evaluate.py {arguments[0]}"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RewardError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
