"""Keep the problems that a model can learn from, and draw how difficult problems are for it.

    python tools/evaluate.py measure --model M --data D --out scores.jsonl    # first: each problem's pass rate
    python tools/difficulty.py filter --scores scores.jsonl --out hard.jsonl
    python tools/difficulty.py histogram scores.jsonl hard.jsonl              # how difficult, before and after
"""
from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import UserError, chat, load_problems, write_whole
from polaris_mini import Config, Problem


def difficulty_histogram(pass_rates: Iterable[float], rollouts: int = 8) -> list[int]:
    """Count problems by correct rollouts: (rollouts + 1,), from none correct to all. Pass rates go to the nearest."""
    counts = Counter(math.floor(rate * rollouts + 0.5) for rate in pass_rates)
    return [counts[k] for k in range(rollouts + 1)]


def histogram_verdict(counts: Sequence[int]) -> Literal["mirrored J", "J", "U", "flat"]:
    """Name a histogram's shape: mirrored J (most mass at 0) is what a model can learn from, J is too easy for it.

    An end counts if it is a quarter above the mean of the bins between, and leads if it is a quarter above the other
    end. Where all-correct problems were removed, the next bin is the upper end.

    >>> histogram_verdict([13828, 3751, 2972, 2845, 2789, 2469, 2564, 2816, 6107])
    'mirrored J'

    Source: blog, the histograms of its section on data difficulty; the margins are ours.
    """
    if counts[-1] == 0:
        counts = counts[:-1]
    low, *between, high = counts
    middle = statistics.fmean(between)
    if low > 1.25 * max(middle, high):
        return "mirrored J"
    if high > 1.25 * max(middle, low):
        return "J"
    return "U" if min(low, high) > 1.25 * middle else "flat"


@dataclass(frozen=True)
class Filter:
    """Keep the problems whose pass rate is in a range, by default all but those that were always solved."""

    scores: str
    """Problems with pass rates: what measure wrote, or any file or hub set with pass_rate or difficulty ("3/8")."""
    out: Path
    """File to write: .jsonl or .parquet."""
    min_pass_rate: float = 0.0
    """Lowest pass rate to keep."""
    max_pass_rate: float = 0.999
    """Highest pass rate to keep. The default removes 8/8 only. Source: blog, data difficulty."""
    layout: Literal["plain", "verl"] = "plain"
    """plain: columns id, problem, answers, pass_rate. verl: as the released data, which the original trainer reads."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used (and say how many) instead of ending with an error."""


@dataclass(frozen=True)
class Histogram:
    """Count the problems by pass rate, 0/8 to 8/8, and draw the counts of all files beside each other."""

    files: tuple[str, ...]
    """Problems with pass rates, as for filter: one file, or several to compare."""
    out: Path | None = None
    """PNG to write. Default: beside the first file, with its name; of a hub data set or folder:split: here."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used (and say how many) instead of ending with an error."""


def filter_problems(options: Filter) -> None:
    """Write the problems in the range of pass rates, and show the histograms before and after."""
    low, high, out = options.min_pass_rate, options.max_pass_rate, options.out
    if not 0 <= low <= high <= 1:
        raise UserError(f"--min-pass-rate is {low}, --max-pass-rate {high}: give shares, 0 <= min <= max <= 1")
    check_output(out, ".jsonl", ".parquet")
    if out.exists():
        raise UserError(f"--out {out}: exists already: give another name, or delete it first")
    scored = load_scored(options.scores, options.skip_bad_rows)
    rates = list(scored.values())
    kept = {problem: rate for problem, rate in scored.items() if low <= rate <= high}
    if not kept:
        raise UserError(f"{options.scores}: no problem has a pass rate from {low} to {high}: widen the range")
    write_problems(list(kept), out, options.layout)
    print(f"{out}: kept {len(kept)} of {len(rates)} problems, removed {sum(rate < low for rate in rates)} below {low} "
          f"and {sum(rate > high for rate in rates)} above {high}")
    show_histogram("before", difficulty_histogram(rates))
    show_histogram("after", difficulty_histogram(kept.values()))


def write_problems(
    problems: Sequence[Problem], path: Path, layout: Literal["plain", "verl"] = "plain",
    suffix: str = Config.prompt_suffix,
) -> None:  # fmt: skip
    """Write problems to a .jsonl or .parquet file that `load_problems` reads; verl's prompts have the suffix."""
    rows = output_rows(problems, layout, suffix)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        beside = path.with_name(f".{path.name}.unfinished")  # as in write_whole
        parquet.write_table(pyarrow.Table.from_pylist(rows), beside)
        os.replace(beside, path)
    else:
        write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def output_rows(problems: Sequence[Problem], layout: Literal["plain", "verl"], suffix: str) -> list[dict[str, Any]]:
    # A parquet column has one type and is there in every row: one row with a second answer makes lists of all.
    if layout == "plain":
        system = any(problem.system for problem in problems)
        return [{"id": p.id, "problem": p.text, "answers": p.answers, "pass_rate": p.pass_rate}
                | ({"system": p.system} if system else {}) for p in problems]  # fmt: skip
    numbers = all(re.fullmatch("0|[1-9][0-9]{0,17}", problem.id) for problem in problems)
    lists = any(len(problem.answers) > 1 for problem in problems)
    return [
        {"data_source": "",  # as in released files: the original trainer then takes its default reward
         "prompt": [dict(sorted(turn.items())) for turn in chat(p.text, p.system, suffix)],
         "ability": "math",
         "reward_model": {"ground_truth": p.answers if lists else p.answers[0], "style": "rule"},
         "extra_info": {"index": int(p.id) if numbers else p.id, "pass_rate": p.pass_rate, "split": "train"}}
        for p in problems
    ]  # fmt: skip


def draw_histograms(options: Histogram) -> None:
    """Show the histogram of each file, and draw all of them into one PNG."""
    from matplotlib.figure import Figure

    if not options.files:
        raise UserError("histogram has no file: give one, or several to compare")
    first = Path(options.files[0])
    out = options.out or (first if first.exists() else Path(first.name)).with_suffix(".png")
    check_output(out, ".png")
    named = {file: difficulty_histogram(load_scored(file, options.skip_bad_rows).values()) for file in options.files}
    for name, counts in named.items():
        show_histogram(name, counts)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    plot_histograms(figure.subplots(), named)
    figure.savefig(out, dpi=110)
    print(f"\n{out}")


def plot_histograms(axis: Any, named: Mapping[str, Sequence[int]]) -> None:
    """Draw difficulty histograms (name -> counts of problems, from none correct to all) as bars beside each other."""
    width = 0.8 / len(named)
    for i, (name, counts) in enumerate(named.items()):
        places = [k + (i + 0.5) * width - 0.4 for k in range(len(counts))]
        shares = [count / max(1, sum(counts)) for count in counts]
        axis.bar(places, shares, width, label=f"{sum(counts)} problems: {name}")
        axis.set_xticks(range(len(counts)), [f"{k}/{len(counts) - 1}" for k in range(len(counts))])
    axis.set(xlabel="correct rollouts", ylabel="share of problems")
    axis.legend()


def show_histogram(name: str, counts: Sequence[int]) -> None:
    print(f"\n{name}, {sum(counts)} problems: {histogram_verdict(counts)}")
    for k, count in enumerate(counts):
        bar = "#" * round(50 * count / max(counts))
        print(f"{k}/{len(counts) - 1} {count:8} {count / sum(counts):6.1%} {bar}".rstrip())


def load_scored(source: str, skip_bad_rows: bool) -> dict[Problem, float]:
    scored = {}
    for problem in load_problems(source, skip_bad_rows=skip_bad_rows):
        if problem.pass_rate is None:
            raise UserError(f"{source}: problem {problem.id} has no pass rate: measure first "
                            "(python tools/evaluate.py measure)")
        scored[problem] = problem.pass_rate
    return scored


def check_output(path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise UserError(f"--out {path}: give a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}: make it first")


def main(arguments: Sequence[str]) -> None:
    commands: Any = Filter | Annotated[Histogram, tyro.conf.PositionalRequiredArgs]
    options = tyro.cli(commands, args=arguments, prog="tools/difficulty.py", description=__doc__)
    if isinstance(options, Filter):
        filter_problems(options)
    else:
        draw_histograms(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"difficulty.py: error: {error}", file=sys.stderr)
        sys.exit(2)
