r"""Measure reward.py: how often it agrees with others' cases, how fast it is, what strange input does to it.

    pip install pylatexenc==2.10                               # for the DeepScaleR rules, which agreement compares with
    python tests/benchmark_reward.py agreement --files FILE... # rows: "gold", "prediction" with a box, "expected_equal"
    python tests/benchmark_reward.py speed                     # 1,024 responses of 15,000 tokens
    python tests/benchmark_reward.py fuzz --inputs 100000

A hang is a comparison that took more than 10 seconds. Each runs in a process, which is killed then.
"""
import json
import multiprocessing
import random
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward import Grade, RewardPool, boxed_answer, normalize, same_text

HANG = 10.0  # seconds
CLASSES = {  # of a case, by what its ground truth and its answer contain; the first that fits
    "several boxes": r"\\boxed",
    "matrices": r"matrix|\{array\}",
    "percentages": r"%|percent|pct",
    "degrees": r"\\circ|°|degree",
    "equations, relations": r"=|<|>|\\[lg]eq?\b|\\[lg]t\b|\\neq?\b|\\approx",
    "intervals": r"\\cup|\\in\b|\\infty|\[[^]]*,[^]]*[])]|\([^)]*,[^)]*\]",
    "thousands, decimal comma": r"\d(?:,|\{,\}|,\\!| )\s*\d{3}\b|^-?\d+,\d+",
    "sets, tuples, lists": r",|;|\\pm|\band\b|\bor\b",
    "units": r"\d.*\\(?:text|mbox)|\\mathrm\{~|\d +[a-z]{2,}",
    "text": r"\\text|^[A-Za-z ]+$",
    "fractions, decimals": r"frac|/|\.\d",
    "other expressions": "",
}
HOSTILE = [  # answers that keep a verifier busy
    "9^{9^{9^9}}", "9**9**9**9", "2^{10^9}", "(10^7)!", "10^7!", r"\binom{10^7}{5000}", r"\sum_{k=1}^{10^9} k^k",
    r"\int_0^1 x^{10^6} e^{x^2} dx", "9" * 100_000, "0." + "3" * 100_000, "10^{-10^9}", "{" * 1000 + "1" + "}" * 1000,
    "(" * 10_000 + "1" + ")" * 10_000, r"\[" * 50_000, "9 " * 50_000, r"\{" + ",".join(map(str, range(3000))) + r"\}",
    r"\begin{pmatrix}x&1\\1&x\end{pmatrix}^{10^6}", "x^{10^7}+1", "1," * 249, r"\sqrt{" * 9 + "2" + "}" * 9,
    "a" * 400, r"\frac{1}{" * 9 + "x" + "}" * 9, "__import__('os').getcwd()", "x" + "^x" * 100, "1" + "!" * 200,
]  # fmt: skip


def grade_plainly(style: str) -> Callable[[str, str], bool]:
    """Return math-verify's own use: both texts parsed by its defaults, the ground truth bare, in $ or in a box."""
    from math_verify import parse, verify

    def grade(gold: str, prediction: str) -> bool:
        marked = "$" in gold or r"\boxed" in gold
        text = gold if style == "bare" or marked else f"${gold}$" if style == "$" else rf"\boxed{{{gold}}}"
        return bool(verify(parse(text), parse(prediction)))

    return grade


def grade_by_deepscaler(gold: str, prediction: str) -> bool:
    from deepscaler_rules import equal, last_boxed

    answer = last_boxed(prediction)
    return answer is not None and equal(answer, last_boxed(gold) or gold)


VERIFIERS: dict[str, Callable[[], Callable[[str, str], bool]]] = {
    "math-verify, gold bare": lambda: grade_plainly("bare"),
    "math-verify, gold in $": lambda: grade_plainly("$"),
    "math-verify, gold in box": lambda: grade_plainly("box"),
    "DeepScaleR rules": lambda: grade_by_deepscaler,
}


def serve(name: str, pipe: Any) -> None:
    import logging

    logging.disable(logging.CRITICAL)
    grade = VERIFIERS[name]()
    grade("1", r"\boxed{x+1}")  # the imports
    pipe.send(None)
    while True:
        started = time.perf_counter()
        try:
            verdict: bool | str = grade(*pipe.recv())
        except EOFError:
            return
        except Exception as error:  # a verdict of its own: what the trainer would have met
            verdict = type(error).__name__
        pipe.send((verdict, time.perf_counter() - started))


class Other:
    """One of the other verifiers in a process, killed when it hangs."""

    def __init__(self, name: str) -> None:
        self.name, self.process = name, None

    def __call__(self, gold: str, prediction: str) -> tuple[bool | str, float]:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(self.name, theirs), daemon=True)
            self.process.start()
            theirs.close()  # so that the next line fails where that process could not import what it needs
            self.pipe.recv()
        started = time.perf_counter()
        self.pipe.send((gold, prediction))
        if self.pipe.poll(HANG):
            verdict, _ = self.pipe.recv()
            return verdict, time.perf_counter() - started
        self.process.kill()
        self.process = None
        return "hang", HANG


class Ours:
    def __init__(self) -> None:
        self.pool = RewardPool(1, require_think=False)
        self("x", r"\boxed{y+1}")

    def __call__(self, gold: str, prediction: str) -> tuple[bool | str, float]:
        started = time.perf_counter()
        grade = self.pool.grade([(prediction, gold, False)])[0]
        return grade.reward == 1 if grade.reason != "timeout" else "timeout", time.perf_counter() - started


def class_of(row: dict[str, Any]) -> str:
    if "multi_boxed" in (row.get("prediction_kind"), row.get("gold_kind")):
        return "several boxes"
    gold, answer = boxed_answer(row["gold"]) or row["gold"], boxed_answer(row["prediction"]) or ""
    return next(name for name, pattern in CLASSES.items()
                if any(re.search(pattern, text, re.S) for text in (gold, answer)))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def agreement(files: Sequence[Path]) -> None:
    """Print how often each verifier gives the expected verdict, by class, how long it took, and our disagreements."""
    graders: dict[str, Callable[[str, str], tuple[bool | str, float]]] = {"ours": Ours()}
    graders |= {name: Other(name) for name in VERIFIERS}
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        results = {name: [grade(row["gold"], row["prediction"]) for row in rows] for name, grade in graders.items()}
        right = {name: [verdict == row["expected_equal"] for (verdict, _), row in zip(found, rows, strict=True)]
                 for name, found in results.items()}  # fmt: skip
        lines = defaultdict(list)
        for i, row in enumerate(rows):
            lines[class_of(row)].append(i)
        print(f"{file.name}: verdicts as expected\n")
        table(["class", "cases", *graders], [
            *([name, len(lines[name]), *(sum(found[i] for i in lines[name]) for found in right.values())]
              for name in CLASSES if name in lines),
            ["**all**", len(rows), *(f"**{sum(found)}**" for found in right.values())],
        ])  # fmt: skip
        print(f"{file.name}: how long one took, after the imports\n")
        show_times(results)
        for row, (verdict, _), fine in zip(rows, results["ours"], right["ours"], strict=True):
            if not fine:
                print(f"ours: {verdict}, expected: {row['expected_equal']}; gold {row['gold'][:100]!r}, answer",
                      repr(boxed_answer(row["prediction"])), row.get("source", ""))  # fmt: skip
    print("\nhostile answers against the gold 1 + sqrt(x)\n")
    show_times({name: [grade(r"1+\sqrt{x}", rf"\boxed{{{answer}}}") for answer in HOSTILE]
                for name, grade in graders.items()})  # fmt: skip


def show_times(results: dict[str, list[tuple[bool | str, float]]]) -> None:
    rows = []
    for name, found in results.items():
        seconds = sorted(taken for _, taken in found)
        verdicts = Counter(verdict for verdict, _ in found if isinstance(verdict, str))
        failed = [f"{verdict} {n}" for verdict, n in verdicts.items() if verdict not in ("hang", "timeout")]
        shown = (seconds[len(seconds) // 2], seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], seconds[-1])
        rows.append([name, len(found), *(f"{1000 * s:,.1f}" for s in shown), verdicts["hang"], verdicts["timeout"],
                     ", ".join(failed) or 0])  # fmt: skip
    table(["", "pairs", "median ms", "p99 ms", "worst ms", "hangs", "killed in time", "exceptions"], rows)


def speed(responses: int = 1024, tokens: int = 15_000, workers: int = 2, repeats: int = 3) -> None:
    """Time the grading of a batch of long responses: three quarters integers, the rest for math-verify.

    A token is taken as 4 characters. One response in 100 holds a tower of powers when `towers` is printed.
    """
    chance = random.Random(0)
    thought = ("We compute {x} \\cdot 3 and see that \\boxed{12} is not it, for \\frac{a}{b} = \\sqrt{2}.\n" * tokens)
    items = []
    for i in range(responses):
        value = chance.randrange(1000)
        sums = rf"\frac{{{value}}}{{7}}+\sqrt{{2}}", rf"\sqrt{{2}}+\frac{{{value}}}{{7}}"
        answer, gold = [(f"{value}", f"{value}"), (f"{value}", "7"), (f"{value}.0", f"{value}"), sums][i % 4]
        items.append((f"<think>{thought[: 4 * tokens]}</think> So it is \\boxed{{{answer}}}.", gold, False))
    towers = [(r"</think> \boxed{9^{9^{9^9}}+x}", "x", False) if i % 100 == 0 else item for i, item in enumerate(items)]
    with RewardPool(workers) as pool:
        pool.grade(items[:16])  # warm
        for name, batch in {"plain": items, "1 % towers": towers}.items():
            seconds = []
            for _ in range(repeats if name == "plain" else 1):
                started = time.perf_counter()
                grades = pool.grade(batch)
                seconds.append(time.perf_counter() - started)
            found = dict(Counter(grade.reason for grade in grades))
            print(f"{name}: {responses} responses of {tokens:,} tokens, {workers} workers: "
                  f"{statistics.median(seconds):.2f} s (median of {len(seconds)}), {found}", flush=True)  # fmt: skip


PIECES = [*"0123456789xyzaAbB+-*/^_=<>()[]{}|!,.;:$%&~'\" \n\t\\", "\x00", "\ud800", "½", "²", "√", "∞", "３", "é",
          "\u202e", r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\{", r"\}", r"\pm", r"\cup",
          r"\infty", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\sum_{k=1}^{n}", r"\int_0^1", r"\binom{7}{3}",
          r"\circ", r"\%", r"\overline{3}", r"\log", r"\sin", r"\pi", "and", "or", "9^9", "10^{9}", "!",
          "__import__('os')", "eval(", "lambda:0", "</think>", "<think>", "e9", "1,000", r"\times 10^{"]  # fmt: skip


def fuzz(inputs: int = 100_000, workers: int = 2, seed: int = 0) -> None:
    """Grade random answers against random ground truths, and say what was found.

    Half are drawn by hypothesis from pieces of LaTeX and code, half are mutations of real answers. For each: there
    is a grade, in time; an answer equals itself.
    """
    reasons: Counter[str] = Counter()
    batch: list[tuple[str, Any, bool]] = []
    started, worst = time.perf_counter(), 0.0
    chance = random.Random(seed)
    piece = st.sampled_from(PIECES)
    text = st.lists(piece, max_size=40).map("".join) | st.text(max_size=60)

    with RewardPool(workers, require_think=False) as pool:

        def flush() -> None:
            nonlocal worst
            before = time.perf_counter()
            grades = pool.grade(batch)
            worst = max(worst, time.perf_counter() - before)
            assert len(grades) == len(batch)
            reasons.update(grade.reason for grade in grades)
            batch.clear()
            sure = pool.grade([(r"\boxed{x+1}", "1+x", False)])
            assert sure == [Grade(1.0, "correct")], "the pool no longer grades"
            print(f"\r{sum(reasons.values()):,} {dict(reasons)}", end="", flush=True)

        def add(answer: str, gold: str) -> None:
            assert same_text(normalize(answer), normalize(answer)) is True, answer
            batch.append((rf"\boxed{{{answer}}}", gold, chance.random() < 0.1))
            if len(batch) == 2000:
                flush()

        @settings(max_examples=inputs // 2, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(text, text)
        def drawn(answer: str, gold: str) -> None:
            add(answer, gold)

        drawn()
        real = [r"\frac{3}{4}", "1,000", r"x^2+2x+1", r"[0, 1) \cup (2, 3)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
                r"90^\circ", r"28\%", r"x \ge 5", r"\{1, 2\}", r"6 \text{ cm}", r"\sqrt{2}+\sqrt{5}", "(3, -1)",
                "2^{10}", r"\text{Evelyn}", r"\frac{1}{2}\pi", "x=5, y=6", r"0.1\overline{6}",
                r"4.5 \times 10^{33}"]  # fmt: skip
        for _ in range(inputs - inputs // 2):
            letters = list(chance.choice(real))
            for _ in range(chance.randrange(1, 6)):
                place = chance.randrange(len(letters) + 1)
                letters[place : place + chance.randrange(3)] = chance.choice(PIECES) * chance.choice([1, 1, 1, 5, 50])
            add("".join(letters), chance.choice(real))
        flush()
    print(f"\n{sum(reasons.values()):,} inputs in {time.perf_counter() - started:.0f} s; the slowest 2,000 took "
          f"{worst:.1f} s; every one graded, no worker lost but the {reasons['timeout']} that ended early")  # fmt: skip


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"agreement": agreement, "speed": speed, "fuzz": fuzz})
