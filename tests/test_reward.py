"""What reward.py and tools/grade.py must do: the rules, hostile answers, killed workers, the command."""

import doctest
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
from conftest import grade
from polaris_mini import Problem
from reward import (
    Grade, RewardError, RewardPool, boxed_answer, check_answer, normalize, plain_number, same_mathematics, same_text,
)

REPOSITORY = Path(__file__).parents[1]
ASSETS = REPOSITORY.parent / "shared" / "assets"
TOWER = "9^{9^{9^9}} + x"
VERDICTS = [json.loads(line) for line in (REPOSITORY / "tests" / "verdicts.jsonl").read_text("utf-8").splitlines()]


def boxed(answer: str) -> str:
    return rf"<think>hm</think> So the answer is \boxed{{{answer}}}."


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(workers=2, timeout=10) as shared_pool:
        yield shared_pool


@pytest.fixture(scope="module")
def pool_without_think() -> Iterator[RewardPool]:
    with RewardPool(workers=1, timeout=10, require_think=False) as shared_pool:
        yield shared_pool


def is_gone(pid: int, seconds: float = 15.0) -> bool:
    """Wait for a process to end; one that nobody has reaped yet counts as ended."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        try:
            os.kill(pid, 0)
            status = Path(f"/proc/{pid}/stat")
            if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def worker_pids(some_pool: RewardPool, at_least: int = 1) -> list[int]:
    """Wait until a pool that is grading in another thread has started its workers."""
    give_up = time.monotonic() + 30
    while len(some_pool._workers) < at_least and time.monotonic() < give_up:
        time.sleep(0.01)
    return [worker.pid for worker in list(some_pool._workers.values())]


def appears(file: Path, seconds: float = 60.0) -> bool:
    give_up = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    return file.exists()


# The rules


def test_the_docstrings_tell_the_truth() -> None:
    result = doctest.testmod(reward)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("204", "204"),
        ("204.0", "204"),
        ("204", 204),
        ("142", 142.0),
        ("25", "025"),
        ("-4", -4.0),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        (r"10,\!000", "10000"),
        ("1 000", "1000"),
        (r"\$1,000.99", "1000.99"),
        ("12.", "12"),
        (".5", "0.50"),
        ("0.3", 0.1 + 0.2),
        ("9.6", "9.6\n"),
        ("9.6", ["9.6\n"]),
        ("0.02", ["0.01\n", "0.02\n"]),
        (r"4.5 \times 10^{33}", "4.5e33\n"),
        ("0.00001", "1e-5"),
        (r"3.89 \times 10^{-10} \text{ m}", "3.89e-10"),
        (r"6.43 \cdot 10^{16}", r"6.43 \times 10^{16} \text{ cm}"),
        ("$5$", "5"),
        (r"\(5\)", "$5$"),
        ("337", r"\(\boxed{337}\)"),
        ("B", "B"),
        (r"\frac{1}{2}", "\\[\n\\boxed{\\frac{1}{2}}\n\\]"),
        ("2", r"\sqrt{4} = \boxed{2}"),
        ("1,22", "1.22"),
        ("0.111", "0,111"),
        ("6.667", "6.67"),
        ("4.4677e14", r"4.47 \times 10^{14}"),
        ("monday", r"\text{Monday}"),
        (r"\left( 1, \dfrac{1}{2} \right)", r"(1,\frac{1}{2})"),
        (r"3\text{ cm}.", r"3 \mathrm{~cm}"),
        ("$19", r"\$19"),
        ("€ 1,000.99", "1000.99"),
        (r"10:30\text{ a.m.}", "10:30 a.m."),
    ],
)
def test_equal_text_and_numbers_need_no_worker(answer: str, gold: Any) -> None:
    with RewardPool() as fresh:
        assert fresh.grade([(boxed(answer), gold, False)]) == [Grade(1.0, "correct")]
        assert fresh._workers == {}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("6.66", "6.67"),
        ("6.7", "6.67"),
        ("0.46", "0.5"),
        ("0.496", "0.50"),
        ("141.96", "142.0"),
        ("99.6", "100"),
        ("1.3351e-27", r"1.325 \times 10^{-27}"),
        ("205", "204"),
        ("2040", "204"),
        ("10000000001", "10000000000"),
        ("0.00000001", "0.00000002"),
        (r"1.6 \times 10^{-19}", r"8.224 \times 10^{-19}"),
        (r"1.6 \times 10^{-19} \mathrm{~J}", r"8.224 \times 10^{-19}"),
        ("7", ["5", "6"]),
    ],
)
def test_unequal_numbers_need_no_worker(answer: str, gold: Any) -> None:
    with RewardPool() as fresh:
        assert fresh.grade([(boxed(answer), gold, False)]) == [Grade(0.0, "wrong")]
        assert fresh._workers == {}


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"204 \text{ cm}", "204", True),
        ("x = 5", "5", True),
        ("5", "x=5", True),
        (r"x^2 + 2x + 1", r"(x+1)^2", True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\text{Monday}", "Monday", True),
        (r"\textbf{(C)}", "C", True),
        ("84, 69", "$69$,$84$", True),
        (r"[0, 1) \cup (2, 3)", r"(2,3)\cup[0,1)", True),
        (r"\frac{\pi}{4}", "\\[\n\\boxed{\\frac{\\pi}{4}}\n\\]", True),
        ("5²", "25", True),
        ("½", r"\frac12", True),
        ("2√3", r"2\sqrt{3}", True),
        ("√10", r"\sqrt{10}", True),
        ("√(x+1)", r"\sqrt{x+1}", True),
        ("90°", r"90^\circ", True),
        ("x ∈ [0, ∞)", r"[0, \infty)", True),
        ("３·５", "15", True),
        ("x₁ + x₂", "x_1 + x_2", True),
        (r"136.\overline{1}", r"\frac{1225}{9}", True),
        (r"-0.1\overline{6}", r"-\frac{1}{6}", True),
        (r"0.\overline{3}", "0.333", True),
        (r"\frac{1}{29,322,216}", r"\frac{1}{29322216}", True),
        (r"x \ge 2", r"[2, \infty)", True),
        (r"\frac{100}{3}\%", r"33\frac{1}{3}\%", True),
        (r"\frac{20}{3}", "6.67", True),
        (r"\frac{20}{3}", "6.66", False),
        ("12.46", "12.5", False),
        (r"\frac{1}{8.02}", "0.125", False),
        ("0.0", r"\frac{1}{29322216}", False),
        ("0.000000", "10^{-8}", False),
        (r"3 \text{ m}, 4 \text{ m}", "3", False),
        (r"1,234\text{ m}", "1234", True),
        ("ABCD", "BADC", False),
        ("xy", "yx", True),
        (r"1, 2, \ldots", "1, 2", False),
        ("x = 3, y = 4", "(3, 4)", True),
        ("ℝ", r"\mathbb{R}", True),
        (r"12.5\%", "12.5", True),
        (r"12.5\%", "0.125", True),
        (r"50\%", "50", True),
        (r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"x = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"(3,4)\text{ OR }(4,3)", r"(3, 4) \text{ OR } (4, 3)", True),
        (r"\emptyset", r"\varnothing", True),
        ("√12.5", r"\sqrt{12.5}", True),
        (r"30\degree", r"30^\circ", True),
        (r"\sqrt{1,000}", r"10\sqrt{10}", True),
        (r"\bigl(1, 2\bigr)", "(1, 2)", True),
        (r"4\sqrt{10}", "12.649", True),
        (r"4\sqrt{10}", "12.65", True),
        (r"\frac{1}{2}", "0.46", False),
        ("6.67", r"\frac{20}{3}", False),
        ("1 1/2", "11/2", False),
        ("12", "1,2", False),
        ("X", "x^2", False),
        ("y^2 + 1", ["x^2 + 1", "y^2+1"], True),
        ("x^2-y^2=1", "x^2+y^2=1", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("2, 3", "2, 3, 7", False),
        ("3 or 4", "3", False),
        ("2", r"\boxed{1} and \boxed{2}", False),
        ("x", "7", False),
    ],
)
def test_math_verify_decides_the_rest(pool: RewardPool, answer: str, gold: Any, right: bool) -> None:
    expected = Grade(1.0, "correct") if right else Grade(0.0, "wrong")
    assert pool.grade([(boxed(answer), gold, False)]) == [expected]


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in VERDICTS}))
def test_verdicts(pool_without_think: RewardPool, kind: str) -> None:
    rows = [row for row in VERDICTS if row["kind"] == kind]
    grades = pool_without_think.grade([(row["response"], row["answer"], False) for row in rows])
    assert [row for row, graded in zip(rows, grades, strict=True) if (graded.reward == 1) != row["right"]] == []


def test_the_cases_of_users_of_other_trainers(pool_without_think: RewardPool) -> None:
    if not (path := ASSETS.parent / "cases" / "grader.jsonl").exists():
        pytest.skip(f"no {path.name} beside the repository")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    grades = pool_without_think.grade([(row["response"], row["answer"], False) for row in rows])
    assert [row for row, graded in zip(rows, grades, strict=True) if (graded.reward == 1) != row["expected"]] == []


def test_a_bare_gold_in_any_form_equals_itself(pool: RewardPool) -> None:
    golds = ["$n=2$", r"\(\frac{1}{2}\)", r"$$x^2$$", r"\boxed{2, 3, 7}", "(1,2)\n", r"\{1, 2\}", "∅"]
    assert {g.reason for g in pool.grade([(boxed(gold), gold, False) for gold in golds])} == {"correct"}


@pytest.mark.parametrize(
    ("response", "truncated", "reason"),
    [
        (r"<think>\boxed{4}", False, "no_think_end"),
        (r"\boxed{4}", False, "no_think_end"),
        (r"<think>\boxed{4}</think>", False, "no_answer"),
        (r"<think>\boxed{4}</think> It is 4.", False, "no_answer"),
        (r"</think> \boxed{4", False, "no_answer"),
        (r"</think> \boxed{}", False, "no_answer"),
        (r"</think> \boxed{ $ $ }", False, "no_answer"),
        (r"</think> boxed{4}", False, "no_answer"),
        ("", False, "no_think_end"),
        (r"<think>\boxed{4}", True, "truncated"),
        (r"</think> so \boxed{4", True, "truncated"),
        (r"</think> \boxed{4} and on and", True, "correct"),
        (r"</think> \boxed{5} and on and", True, "wrong"),
        (r"</think> \boxed{4}", False, "correct"),
        (r"</think> \boxed{5}, no, \boxed{4}", False, "correct"),
        (r"</think> \boxed{4}, no, \boxed{5}", False, "wrong"),
        (r"</think> \boxed{5} </think> \boxed{4}", False, "correct"),
        (r"</think> \boxed{5} </think> 4", False, "no_answer"),
    ],
)
def test_only_a_closed_box_after_the_thought_counts(response: str, truncated: bool, reason: str) -> None:
    graded = grade(response, "4", require_think=True, truncated=truncated)
    assert graded == Grade(float(reason == "correct"), reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3", True),
        (r"$$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$$", "(2, 2), (6, 2)", True),
        (r"\boxed{k = 45}, \boxed{n = 2}", "k = 45, n = 2", True),
        (r"\boxed{1}\boxed{2}", r"\{1, 2\}", True),
        (r"\boxed{1} and \boxed{2} and \boxed{3}", r"\boxed{3}, \boxed{2}, \boxed{1}", True),
        (r"$y_1 = \boxed{2}$ and $y_2 = \boxed{3}$", "2, 3", True),
        (r"\boxed{2} and \boxed{3}", "3", False),  # or boxing several guesses would pay
        (r"\boxed{2} and \boxed{3}", "2", False),
        (r"\boxed{3\text{ cm}} or \boxed{4\text{ cm}}", "3", False),
        (r"\boxed{3\text{ cm}} or \boxed{4\text{ cm}}", "4", False),
        (r"\boxed{2}, not \boxed{3}", "2, 3", False),
        (r"\boxed{2} and so \boxed{3}", "3", True),
        ("\\boxed{3}\n\n\\boxed{4}", "4", True),
        (r"\boxed{3}, that is \boxed{3}", "3", True),
        (r"\boxed{3}, \boxed{3}", "3", True),
        (r"\boxed{2}. Then 5, so \boxed{3}", "2, 3", False),
        (r"\boxed{2} is what we found for the first of the two numbers, and \boxed{3}", "2, 3", False),
        (r"\boxed{255} is interest. The final answer is $10,455$. I hope it is correct.", "10455", True),
        (r"\boxed{255} is interest. The final answer is $10,455$. I hope it is correct.", "255", False),
        (r"The final answer is $10,455$.", "10455", False),
        (r"\boxed{42}. The final answer is $42. She paid $8 more.", "42", True),
        (r"\boxed{42}. The final answer is $ $", "42", True),
    ],
)
def test_boxes_of_one_answer_and_a_stated_answer(
    pool_without_think: RewardPool, response: str, gold: str, right: bool
) -> None:
    assert pool_without_think.grade([(response, gold, False)])[0].reward == right


CONNECTORS = [", ", "; ", " and ", " or ", r" \text{ or } ", r" \lor ", r" \mid ", " | ", r" \to ", r"\\", "/", " ",
              r" \quad ", r"\boxed{}", " (", ":", r" \pm ", "}, \\boxed{", "} or \\boxed{", " not "]  # fmt: skip


def test_naming_several_answers_is_right_for_one_of_them_at_most(pool: RewardPool) -> None:
    """Or a policy would learn to list what might be right."""
    pairs = [("3", "4"), (r"\frac{1}{2}", r"\frac{3}{4}"), ("x+1", "y"), ("A", "B"), (r"\sqrt{2}", "7")]
    items = [(boxed(a + connector + b), gold, False) for connector in CONNECTORS for a, b in pairs for gold in (a, b)]
    grades = pool.grade(items)
    for first, second, item in zip(grades[::2], grades[1::2], items[::2], strict=True):
        assert first.reward + second.reward <= 1, item


def test_without_require_think_the_whole_response_counts() -> None:
    assert grade(r"\boxed{4}", "4", require_think=False).reason == "correct"
    assert grade(r"<think>\boxed{4}</think> 4", "4", require_think=False).reason == "no_answer"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {4}", "4"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"{ unclosed, then \boxed{4}", "4"),
        (r"} \boxed{4} }", "4"),
        (r"\\\boxed{4}", "4"),
        (r"\\boxed{4}", "4"),
        (r"\boxed{1 \\ {2}}", r"1 \\ {2}"),
        (r"\boxed{1 \\{2}}", r"1 \\{2}"),
        (r"\boxed{\boxed{4}", "4"),
        ("\\boxed{4\n}", "4\n"),
        (r"\boxed 4", None),
        (r"\boxed{4\}", None),
    ],
)
def test_the_last_box_by_brace_matching(text: str, content: str | None) -> None:
    assert boxed_answer(text) == content


@settings(database=None, deadline=None)
@given(st.text(st.sampled_from("\\\\{}$[](),.+-1 2eé") | st.characters(), max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    content = boxed_answer(text + r". \boxed{1}" + text)
    assert content is not None
    assert boxed_answer(r"\boxed{" + content + "}") == content
    plain_number(text)
    check_answer(text)


def test_numbers_that_are_not_plain() -> None:
    signs = ["", ".", "-", "x", "5%", "٣", r"5\$6", "inf", "nan"]
    for text in [*signs, "e5", "1/2", "1,00", "1,22", "1 2", "3+4", "1e99999"]:
        assert plain_number(text) is None, text


def test_unusable_ground_truths_are_named() -> None:
    empty: list[Any] = ["", " \n", "$$", r"\boxed{}", "?", [], ["", " "]]
    for answer in [*empty, None, {}, True, float("nan"), float("inf")]:
        fault = check_answer(answer)
        assert repr(answer)[:20] in (fault or ""), answer
        assert grade(boxed("1"), answer, require_think=True) == Grade(0.0, "invalid_gold")
    for big in ["1" * 501, "{" * 11 + "1" + "}" * 11]:
        assert "too long or too deeply nested" in (check_answer(big) or "")
    for prose in ["one two three four five six", "He packs 6*7 = 42 rolls and with the rest that makes 47 rolls.",
                  r"\text{It is even, as was to be shown}"]:
        assert "is no mathematics, choice or text of at most five words" in (check_answer(prose) or "")
    read: list[Any] = ["one two three four five", "ab + bc + cd + de + ef + fa",
                       r"(C) The mean rises, the median falls",
                       r"f(x)=cx \text{ for all real numbers x, where c is any constant}", "so 6 + 1 boxes\n#### 7"]
    assert [check_answer(answer) for answer in read] == [None] * len(read)
    usable: list[Any] = ["0", 0, 0.0, -1.5, "x", "∅", r"\{\}", ["", "7"], (1, 2), "$C$\n", "9" * 500]
    assert [check_answer(answer) for answer in usable] == [None] * len(usable)


def test_a_ground_truth_without_its_last_brace_is_completed(pool: RewardPool) -> None:
    assert pool.grade([(boxed(r"\frac{1}{2}"), r"\frac{1}{2", False)]) == [Grade(1.0, "correct")]


def test_the_fast_path_agrees_with_math_verify() -> None:
    """On plain numbers in every form but powers of ten, which math-verify misreads, and on text that is the same."""
    chance = random.Random(0)

    def written(value: int) -> str:
        forms = [f"{value}", f"{value:,}", f"{value}.0", f"{value:+d}", f"{value}.", f"{value:,}.50", f"{value:,}$"]
        return normalize(chance.choice(forms))

    values = [chance.choice([1, -1]) * chance.randrange(10 ** chance.randrange(1, 9)) for _ in range(100)]
    pairs = [(written(a), written(b)) for a in values for b in (a, a, a + 1, -a, chance.choice(values))]
    fast = [same_text(answer, gold) for answer, gold in pairs]
    assert fast == [same_mathematics(answer, gold) for answer, gold in pairs]
    assert 100 < sum(map(bool, fast)) < 400
    same = [r"\frac{1}{2}", "x^2+1", "[0,1)", r"\{1,2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\text{Even}", "(1,2)"]
    assert all(same_text(text, text) and same_mathematics(text, text) for text in same)


# Hostile answers

HOSTILE = [
    (TOWER, "x+1"),
    ("9^{9^{9^9}}", r"\sqrt{2}"),
    ("10^7!", r"\pi x"),
    ("(10^7)!", r"\frac{x}{2}"),
    ("2^{10^9}", r"\sqrt{3}"),
    ("{" * 100_000 + "1" + "}" * 100_000, "x"),
    ("{" * 10 + "1" + "}" * 10, "x"),
    ("(" * 400, "x"),
    (r"\[" * 240, "x"),
    ("9" * 400, "x+1"),
    ("9" * 100_000, "x+1"),
    ("1," * 249, "x"),
    ("5\x00", "x"),
    ("\x00", "x"),
    ("\ud800", "x"),
    ("5\ud800", "5x"),
    ("__import__('os').system('touch hacked')", "x"),
    ("eval(exit(0))", "x"),
    ('"; print("1")', "x"),
    (r"\text{\input{/etc/passwd}}", "x"),
    ("1\n1\n", "x"),
    ("½²√２", "x"),
    ("9^{9^9}", "6.67"),
    ("10^{10^{20}}", "6.67"),
    ("10^{-10^{20}}", "0.0667"),
    (r"10^{10^{20}} + 0.5 i", "6.67"),
    (r"\sum_{k=1}^{\infty} (-1)^k", "6.67"),
    (r"\sqrt{-2}", "6.67"),
    (r"\frac{1}{0}", "6.67"),
    ("%s %d {0}", "x"),
]


def test_hostile_answers_end_and_earn_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with RewardPool(workers=2, timeout=0.5) as pool:
        grades = pool.grade([(boxed(answer), gold, False) for answer, gold in HOSTILE])
        assert pool.grade([(boxed("x+1"), "1+x", False)]) == [Grade(1.0, "correct")]
    assert [g.reward for g in grades] == [0.0] * len(HOSTILE)
    assert grades[0].reason == "timeout"
    assert time.monotonic() - started < 60
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_gold_ends_too() -> None:
    with RewardPool(workers=1, timeout=0.5) as pool:
        assert pool.grade([(boxed("x"), [TOWER, "x+1"], False)]) == [Grade(0.0, "timeout")]


@pytest.mark.parametrize(
    "filler",
    ["{", "}", r"\boxed{", r"\boxed {", "\\", "$", " ", r"\boxed{1} ", "</think>", "x + 1 \n"],
)
def test_two_megabytes_are_read_in_time(filler: str) -> None:
    started = time.monotonic()
    long = filler * (2_000_000 // len(filler))
    assert grade(long + r"</think> \boxed{4}", "4", require_think=True).reason == "correct"
    assert grade(r"</think> \boxed{" + long, "4", require_think=True).reward == 0.0
    assert time.monotonic() - started < 20


def test_memory_is_capped() -> None:
    with RewardPool(workers=1, timeout=3.0, memory_gb=0.4) as pool:
        bomb = (boxed("x^{10^7}+1"), "(x+1)^{10^7}", False)
        assert [g.reward for g in pool.grade([bomb, (boxed("x+1"), "1+x", False)])] == [0.0, 1.0]


# Processes


def test_a_killed_worker_gives_its_task_to_a_new_one_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, monkeypatch, "logged", """
import os, signal, time
def score(response, answer, problem):
    with open("calls", "a") as file: file.write(response + " ")
    if response == "hang":
        open("hanging", "w").close()
        time.sleep(60)
    if response == "dies": os.kill(os.getpid(), signal.SIGKILL)
    return 1
""")
    responses = ["a", "b", "hang", "c", "dies", "d"]
    with RewardPool(workers=1, timeout=2.0, function="logged:score") as pool:
        futures = [pool.submit((response, "", False)) for response in responses]
        assert appears(tmp_path / "hanging")
        os.kill(worker_pids(pool)[0], signal.SIGKILL)
        assert [future.result().reason for future in futures] == ["correct"] * 2 + ["timeout", "correct"] * 2
    assert (tmp_path / "calls").read_text().split() == ["a", "b", "hang", "hang", "c", "dies", "dies", "d"]


def test_workers_killed_at_random_lose_nothing() -> None:
    chance = random.Random(0)
    stop = threading.Event()
    items = [(boxed(f"x + {n}"), f"{n + n % 2} + x", False) for n in range(300)]
    with RewardPool(workers=2, timeout=30.0) as pool:
        started = time.monotonic()
        pool.grade(items[:2])
        start_seconds = time.monotonic() - started

        def kill_now_and_then() -> None:
            while not stop.wait(chance.uniform(0.2, 3.0) * start_seconds):  # also while one is starting
                for worker in list(pool._workers.values())[-1:]:
                    os.kill(worker.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            grades = pool.grade(items)
        finally:
            stop.set()
            killer.join()
        assert pool.grade(items[:4]) == grades[:4]
    # One that was killed twice is given up.
    wrong = [n for n, g in enumerate(grades) if g.reward != (n % 2 == 0)]
    assert all(grades[n].reason == "timeout" for n in wrong)
    assert len(wrong) <= 3


def test_what_a_reward_starts_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, monkeypatch, "forks", """
import os, subprocess, sys, time
def score(response, answer, problem):
    if response == "leave": sys.exit("no")
    if response == "read": return len(sys.stdin.read())
    child = subprocess.Popen(["sleep", "600"])
    open("child", "w").write(str(child.pid))
    if os.fork() == 0: time.sleep(600)
    time.sleep(600)
""")
    started = time.monotonic()
    with RewardPool(workers=1, timeout=1.0, function="forks:score") as pool:
        assert pool.grade([("fork", "", False), ("read", "", False)]) == [Grade(0, "timeout"), Grade(0, "wrong")]
        with pytest.raises(RewardError, match="SystemExit: no"):
            pool.submit(("leave", "", False)).result()
    assert time.monotonic() - started < 15
    assert is_gone(int((tmp_path / "child").read_text()))


def test_what_a_reward_leaves_running_ends_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its worker was killed meanwhile."""
    module(tmp_path, monkeypatch, "leaves", """
import os, subprocess
def score(response, answer, problem):
    open(response, "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
    if os.fork() == 0: return 0.5  # and so runs on in this worker's code, which must not reply twice
    return 1
""")
    for killed in (False, True):
        with RewardPool(workers=1, function="leaves:score") as pool:
            assert pool.grade([("one", "", False), ("two", "", False)]) == [Grade(1.0, "correct")] * 2
            if killed:
                os.kill(worker_pids(pool)[0], signal.SIGKILL)
        assert [is_gone(int((tmp_path / name).read_text())) for name in ("one", "two")] == [True, True]


@pytest.mark.parametrize("hang", ["9**9**9", "time.sleep(60)"])
def test_a_reward_that_unsets_the_alarm_ends_too(hang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As math-verify does, whose own time-outs are alarms."""
    module(tmp_path, monkeypatch, "unsets", f"""
import signal, time
def score(response, answer, problem):
    signal.alarm(0)
    {hang}
""")
    with RewardPool(workers=1, timeout=0.5, function="unsets:score") as pool:
        assert pool.grade([("", "", False)]) == [Grade(0, "timeout")]


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    item = (boxed("x+1"), "1+x", False)
    with RewardPool(workers=1) as pool:
        assert pool.grade([item]) == [Grade(1.0, "correct")]
        for worker in list(pool._workers.values()):
            worker.kill()
            worker.wait()
        assert pool.grade([item, item]) == [Grade(1.0, "correct")] * 2


def test_a_worker_killed_while_it_starts_is_started_again() -> None:
    with RewardPool(workers=1) as pool:
        future = pool.submit((boxed("x+1"), "1+x", False))
        os.kill(worker_pids(pool)[0], signal.SIGKILL)
        assert future.result() == Grade(1.0, "correct")


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with RewardPool(workers=2, memory_gb=0.001) as pool, pytest.raises(RewardError, match="did not start"):
        pool.grade([(boxed("x+1"), "1+x", False)] * 5)
    assert pool._workers == {}


def test_a_start_that_hangs_is_an_error_that_shows_where(tmp_path: Path) -> None:
    code = (REPOSITORY / "reward.py").read_text().replace("START_SECONDS = 60.0", "START_SECONDS = 1.0")
    (tmp_path / "reward.py").write_text(code)
    (tmp_path / "loops.py").write_text("while True: pass\n")
    command = [sys.executable, "-c", "import reward; reward.RewardPool(function='loops:score')"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert 'loops.py", line 1' in ended.stderr
    assert "RewardError: a reward worker did not start: " in ended.stderr.splitlines()[-1]


def test_close_leaves_no_process_and_cancels_the_rest() -> None:
    pool = RewardPool(workers=2, timeout=60.0)
    futures = [pool.submit((boxed(TOWER), "x", False)) for _ in range(4)]
    pids = worker_pids(pool, at_least=2)
    time.sleep(1)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 10
    assert [is_gone(pid) for pid in pids] == [True, True]
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()
    pool.close()  # twice does no harm


@pytest.mark.parametrize("last_signal", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(last_signal: signal.Signals) -> None:
    script = (
        "import threading, time; from reward import RewardPool\n"
        "pool = RewardPool(workers=2, timeout=1.0)\n"
        "def report():\n"
        "    while len(pool._workers) < 2: time.sleep(0.01)\n"
        "    time.sleep(1); print(*(worker.pid for worker in pool._workers.values()), flush=True)\n"
        "threading.Thread(target=report, daemon=True).start()\n"
        f"with pool: pool.grade([(r'</think>\\boxed{{{TOWER}}}', 'x', False)] * 40)\n"
    )
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, text=True, **pipes)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(last_signal)
    parent.wait(15)
    parent.stdout.close()
    assert [is_gone(pid) for pid in pids] == [True, True]


def test_two_pools_in_two_threads() -> None:
    results: dict[int, list[Grade]] = {}

    def grade_some(shift: int) -> None:
        with RewardPool(workers=1) as pool:
            items = [(boxed(f"x+{n}"), f"{n + n % 2 * shift}+x", False) for n in range(40)]
            results[shift] = pool.grade(items)

    threads = [threading.Thread(target=grade_some, args=(shift,)) for shift in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [g.reward for g in results[0]] == [1.0] * 40
    assert [g.reward for g in results[1]] == [1.0, 0.0] * 20


def test_order_is_kept(pool: RewardPool) -> None:
    answers = [(str(n), n % 3 == 0) if n % 2 else (f"{n}x", n % 3 == 0) for n in range(60)]
    golds = [("x" if "x" in a else "") for a, _ in answers]
    items = [
        (boxed(a), (f"{n}{x}" if right else f"{n + 1}{x}"), False)
        for n, ((a, right), x) in enumerate(zip(answers, golds, strict=True))
    ]
    assert [g.reward for g in pool.grade(items)] == [float(right) for _, right in answers]


# A reward of one's own


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)


def test_countdown_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (REPOSITORY / "docs" / "reward.md").read_text().partition("```python\n# countdown.py")[2].partition("```")[0]
    module(tmp_path, monkeypatch, "countdown", code)
    answer = "[[3, 5, 8], 19]"
    responses = {
        r"</think> \boxed{3 * (5 + 8) - 20}": 0.0,  # 20 is not among the numbers
        r"</think> \boxed{8 + 3 * 5}": 0.0,
        r"</think> \boxed{8 * 3 - 5}": 1.0,
        r"</think> \boxed{8 - 5 * -3}": 0.0,
        r"<think> \boxed{8 * 3 - 5} </think> none": 0.0,
        r"</think> \boxed{8 / (5 - 5) + 3}": 0.0,
        r"</think> \boxed{__import__('os').getcwd()}": 0.0,
        r"</think> \boxed{9**9**9}": 0.0,
        "</think> \\boxed{8 * 3 - 5\x00}": 0.0,
        "</think> \\boxed{\ud800}": 0.0,
        "</think> nothing": 0.0,
        r"<think> \boxed{8 * 3 - 5}": 0.0,
        r"</think> \boxed{" + "-" * 50_000 + "8}": 0.0,
        r"</think> \boxed{" + "(" * 300 + "8 * 3 - 5" + ")" * 300 + "}": 0.0,
    }
    with RewardPool(function="countdown:score") as pool:
        grades = pool.grade([(response, answer, False) for response in responses])
        exact = (r"</think> \boxed{8 / (3 - 8 / 3)}", "[[3, 3, 8, 8], 24]", False)
        assert [g.reward for g in pool.grade([exact])] == [1.0]  # which floats miss
    assert [g.reward for g in grades] == list(responses.values())


def test_own_reward_gets_the_problem_and_keeps_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, monkeypatch, "mine", """
import time
def score(response, answer, problem):
    if response == "hang": time.sleep(60)
    if response == "fill": x = "x" * 10**11
    if response == "print": print("1.0")
    if response == "deep": score(response, answer, problem)
    if response == "fail": 1 / 0
    assert answer in problem.answers
    if problem.text: assert (problem.id, problem.prompt_tokens, problem.system) == ("7", [1, 2], None)
    else: assert vars(problem) == {"id": "", "text": "", "answers": [answer], "system": None}
    return len(problem.text) + float(answer)
""")
    problem = Problem("7", "abc", ("0.25", "0.5"), prompt_tokens=(1, 2))
    with RewardPool(workers=2, timeout=1.0, function="mine:score") as pool:
        futures = [pool.submit((text, problem.answers, text == "cut"), problem)
                   for text in ("fine", "hang", "fill", "print", "cut", "fine")]
        grades = [future.result() for future in futures]
        fine = Grade(3.5, "correct")  # of several answers the best counts
        assert grades == [fine, Grade(0, "timeout"), Grade(0, "timeout"), fine, fine, fine]
        with pytest.raises(RewardError, match=r"mine:score: it raised ZeroDivisionError: .* \(mine.py, line 8\)"):
            pool.submit(("fail", "1", False)).result()
        with pytest.raises(RewardError, match="RecursionError"):
            pool.submit(("deep", "1", False)).result()
        assert pool.submit(("fine", "1", False)).result() == Grade(1.0, "correct")  # with an empty problem
        assert pool.submit(("fine", 1, False), vars(replace(problem, answers=(1,)))).result() == Grade(4.0, "correct")

        def ask(answer: str, truncated: bool = False) -> Grade:
            return pool.submit(("fine", answer, truncated), replace(problem, answers=(answer,))).result()

        assert ask("1") == Grade(4.0, "correct")
        assert ask("-3", truncated=True) == Grade(0.0, "truncated")
        assert ask("-2.5", truncated=True) == Grade(0.5, "wrong")
        with pytest.raises(RewardError, match="could not convert string to float"):
            ask("\N{GRINNING FACE}" * 1000)
        with pytest.raises(RewardError, match="returned nan"):
            ask("nan")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere:score", "No module named 'nowhere'"), ("mine:scores", "has no attribute 'scores'"),
     ("mine:__name__", "TypeError: 'mine' is no function"),
     ("mine", "give module:function"), ("broken:score", "SyntaxError")],
)  # fmt: skip
def test_own_reward_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    module(tmp_path, monkeypatch, "mine", "def score(response, answer, problem): return 1\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    with pytest.raises(RewardError, match=f"reward is {name}: .*{message}"):
        RewardPool(function=name)


# The command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "grade.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_the_command_grades_a_file(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "response": boxed("x+1"), "answer": "1+x"},
        {"id": 7, "response": boxed("5"), "answer": [4, "5"]},
        {"response": r"\boxed{5}", "answer": 5.0},
        {"response": "<think> and on", "answer": "5", "truncated": True},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_command(str(file))
    assert result.returncode == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"id": "a", "reward": 1.0, "reason": "correct"},
        {"id": 7, "reward": 1.0, "reason": "correct"},
        {"reward": 0.0, "reason": "no_think_end"},
        {"reward": 0.0, "reason": "truncated"},
    ]
    assert result.stderr == "4 responses: correct 2, no_think_end 1, truncated 1\n"
    result = run_command(str(file), "--no-require-think", "--timeout", "5", "--workers", "1")
    assert json.loads(result.stdout.splitlines()[2]) == {"reward": 1.0, "reason": "correct"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"response": "", "answer": "1"}\nnot json\n', ["line 2", "JSON"]),
        (b"[1, 2]\n", ["line 1", "JSON object"]),
        (b"\xff\xfe\n", ["line 1", "JSON"]),
        (b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
        (b'{"answer": "1"}\n', ["line 1", "'response'"]),
        (b'{"response": 5, "answer": "1"}\n', ["line 1", "'response'"]),
        (b'{"response": "a"}\n', ["line 1", "'answer'"]),
        (b'{"response": "a", "answer": null}\n', ["line 1", "'answer'"]),
        (None, ["No such file"]),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(
    tmp_path: Path, content: bytes | None, words: list[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    result = run_command(str(file))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert all(word in result.stderr for word in [str(file), *words])


def test_the_command_grades_by_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, monkeypatch, "mine", "def score(response, answer, problem): return len(response) / len(answer)\n")
    (tmp_path / "rows.jsonl").write_text('{"response": "ab", "answer": ["abcd", "abc"]}\n')
    result = run_command("rows.jsonl", "--reward", "mine:score")
    assert json.loads(result.stdout) == {"reward": 2 / 3, "reason": "wrong"}
    for wrong in ("mine:scores", "json:loads"):  # the latter cannot be called like this
        result = run_command("rows.jsonl", "--reward", wrong)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert wrong in result.stderr


def test_the_command_says_what_it_is_for() -> None:
    shown = " ".join(run_command("--help").stdout.split())
    assert "Grade the responses in a JSON-lines file" in shown
    assert "try the grader, or a reward function of your own" in shown


def test_the_command_refuses_bad_settings(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, value in [("timeout", "0.0"), ("timeout", "nan"), ("workers", "0")]:
        result = run_command(str(tmp_path / "empty.jsonl"), f"--{name}", value)
        assert (result.returncode, result.stderr) == (2, f"grade.py: error: {name} is {value}: give a number above 0\n")
    result = run_command(str(tmp_path / "empty.jsonl"))
    assert (result.returncode, result.stdout) == (0, "")


# Agreement with other verifiers' own cases and with judged model outputs


@pytest.mark.parametrize(
    ("name", "least"), [("verifier_cases.jsonl", 105), ("verifier_real_outputs.jsonl", 396)]
)
def test_agreement_with_judged_answers(name: str, least: int) -> None:
    if not (ASSETS / name).exists():
        pytest.skip(f"no {name} beside the repository")
    rows = [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]
    with RewardPool(timeout=10, require_think=False) as pool:
        grades = pool.grade([(row["prediction"], row["gold"], False) for row in rows])
    agreed = [g.reward == row["expected_equal"] for g, row in zip(grades, rows, strict=True)]
    # Plain math-verify agrees on 102 of 106. The one left is a wrong label: 1 - 1/e is not 1 + 1/e.
    assert sum(agreed) >= least
    assert all(g.reason != "timeout" for g in grades)


@pytest.mark.parametrize(
    ("answer", "gold"), [(r"\dfrac{1}{2}", "0.5"), ("x=5", "5"), (r"28\%", "28"), ("(1,2)", "(1, 3)")]
)
def test_deepscaler_rules_are_as_published(answer: str, gold: str) -> None:
    """They are only measured against; docs/reward.md says how they were compared with the published code."""
    pytest.importorskip("pylatexenc", reason="not among the requirements: see tests/benchmark_reward.py")
    from deepscaler_rules import equal

    assert equal(answer, gold) == (gold != "(1, 3)")
