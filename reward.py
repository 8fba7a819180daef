r"""Grade responses to math problems: reward 1 if the boxed answer is right, else 0.

The answer is the last `\boxed{...}` after `</think>`, with the boxes beside it if they are one answer. Equal text
and plain numbers are decided at once, the rest by math-verify in worker processes, which are killed when they take
too long: `9^{9^{9^9}}` never ends. A reward function of your own runs in the same processes (`--reward` of train.py).

Left out: answers without a box, proofs, code. math-verify's judgement is taken as it is: 3 + 4 equals 7, and so do
7\%, y = 7 and 7 \text{ million}; number bases are ignored. docs/reward.md shows how often it agrees with others.

    python reward.py FILE.jsonl                       # rows with "response", "answer" -> "reward", "reason"
    python reward.py FILE.jsonl --no-require-think    # for models that do not think
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import re
import resource
import select
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import groupby, pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from polaris_mini import Problem

Reason = Literal["correct", "wrong", "no_answer", "no_think_end", "truncated", "timeout", "invalid_gold"]
Answers = str | int | float | Sequence[str | int | float]  # the ground truth of a problem, or several
Item = tuple[str, Answers, bool]  # a response, the ground truth, whether the response was cut off
Comparison = list[tuple[str, str]]  # answers with ground truths, where only math-verify can decide

# Over 500 characters, or 11 brackets opened in a row: beyond lies what costs the parser seconds. Of 58,000
# answers in the usual math sets the longest but one has 253 characters, and none is nested over 6 deep.
TOO_BIG = re.compile(r"(?s).{501}|(?:[({[][^](){}[]*){11}")
# What stands between two boxes of one answer: nothing, or a comma, a semicolon, "and" or "or", but no end of sentence.
BETWEEN_BOXES = re.compile(r"\s*|(?=.*(?:[,;]|\b(?:and|or)\b))[^.?!:\n]{0,40}")
STATED = re.compile(r"(?i)final answer is:?\s*\$([^$]+)\$")
SYMBOLS = {"−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ", "∞": r"\infty ",
           "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
           "∅": r"\emptyset ", "±": r"\pm ", "√": r"\sqrt ", "π": r"\pi ", "′": "'"}  # fmt: skip


@dataclass(frozen=True)
class Grade:
    """Hold a reward and its reason: "truncated" was cut off unanswered, "timeout" killed while compared."""

    reward: float
    reason: Reason


# The answer in a response


def after_think(response: str, require_think: bool) -> str | None:
    """Return the text after the last `</think>`; None if there is none and one is required.

    >>> after_think("<think>hm</think> so 4", require_think=True), after_think("4", require_think=False)
    (' so 4', '4')
    """
    _, end, final = response.rpartition("</think>")
    return final if end or not require_think else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Find the complete boxes without a box inside: where each begins, and where its content begins and ends."""
    found: list[tuple[int, int, int]] = []
    opened = []  # for each open brace, where its box begins, or -1 if it opens none, and where its content begins
    # One pass: a search from each box to its end is quadratic when thousands are left open.
    for token in re.finditer(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]", text):
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            opened.append((token.start() if len(token[0]) > 1 else -1, token.end()))
        elif token[0] == "}" and opened and (box := opened.pop())[0] >= 0 and not (found and found[-1][0] > box[0]):
            found.append((*box, token.start()))
    return found


def boxed_answers(text: str) -> list[str]:
    r"""Return what the last complete `\boxed{...}` holds, then, if boxes before it are of one answer with it, all.

    >>> boxed_answers(r"$x = \boxed{2}$ or $x = \boxed{3}$"), boxed_answers(r"\boxed{2}. No: \boxed{\frac{1}{3}}")
    (['3', '2, 3'], ['\\frac{1}{3}'])

    Where "the final answer is $...$" follows the last box, as models of the Minerva format write, that is the answer.
    """
    boxes = _boxes(text)
    if boxes and (stated := STATED.findall(text, boxes[-1][2])):
        return stated[-1:]
    answer = [text[start:end] for _, start, end in boxes[-1:]]
    for (_, start, end), (following, _, _) in reversed(list(pairwise(boxes[-10:]))):
        if not BETWEEN_BOXES.fullmatch(text, end + 1, following):
            break
        answer.insert(0, text[start:end])
    return [*answer[-1:], ", ".join(answer)][: len(answer)]


def _unicode_to_latex(text: str) -> str:
    parts = []
    for kind, characters in groupby(text, lambda c: unicodedata.decomposition(c).partition(" ")[0]):
        plain = unicodedata.normalize("NFKC", "".join(characters))
        if kind in ("<super>", "<sub>"):
            plain = f"{'^' if kind == '<super>' else '_'}{{{plain}}}"
        plain = re.sub("([0-9]+)\N{FRACTION SLASH}([0-9]+)", r"\\frac{\1}{\2}", plain)
        parts.append("".join(SYMBOLS.get(character, character) for character in plain))
    return "".join(parts)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def normalize(text: str) -> str:
    r"""Write an answer as math-verify reads it best: no delimiters, LaTeX for Unicode, 1000 for 1{,}000.

    >>> normalize("$69$,$84$\n"), normalize("2½ − √10²."), normalize(r"0.1\overline{6}")
    ('69,84', '2\\frac{1}{2} - \\sqrt{10}^{2}', '\\frac{15}{90}')
    """
    text = re.sub(r"\\?[$€£¥]|(?<!\\)\\[()\[\]]", "", text)
    text = text if text.isascii() else _unicode_to_latex(text)
    text = re.sub(r"(?<=\d)(?:,\\!|\\!,?|\{,\})\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=[c}])\{\d{1,3}(?:,\d{3})+\}", lambda match: match[0].replace(",", ""), text)  # \frac{1,000}{3}
    text = re.sub(r"(?<!\\)\\[,;:! ]|~|\\q?quad\b", " ", text)
    text = re.sub(r"\\sqrt\s*(?:\(([^()]*)\)|(\d{2,}))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}", _repeating, text)
    return re.sub(r"(?<!\\right)[\s.,;:]+$", "", text.strip())


# Two answers


def _key(text: str) -> str:
    """Return what two ways to write an answer have in common, apart from spaces, size and font."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])", "", text)
    text = re.sub(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")  # 1 1/2 is not 11/2
    return text.lower() if re.fullmatch(r"[A-Za-z'-]{3,}", text) else text  # Even is even, but X is not x


_NUMBER = re.compile(
    r"([+-]?(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.[0-9]*)?)"  # 1,000 or 1 000 or 1000.0
    r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\^)\{?([+-]?[0-9]{1,4})\}?"  # a power of ten: e9 or \times 10^{9}
    r"\s*(?:\\(?:text|mathrm)\{[^{}]*\})?)?"  # and then perhaps a unit
)


def plain_number(text: str) -> Decimal | None:
    r"""Return the value of a plainly written number, else None.

    >>> plain_number("025") == 25, plain_number("1,000.0") == 1000, plain_number("1/2")
    (True, True, None)
    """
    # Powers of ten too: math-verify holds 8.2 \times 10^{-19} and 1.6 \times 10^{-19} equal, 1e-5 for e - 5.
    match = _NUMBER.fullmatch(text)
    return Decimal(re.sub("[ ,]", "", match[1]) + "e" + (match[2] or "0")) if match else None


def rounds_to(value: Decimal, gold: str) -> bool:
    """Tell whether a number is the ground truth once it is rounded to the ground truth's digits.

    Only a ground truth with a fraction or a power of ten, and three or more digits, can have been rounded.

    >>> rounds_to(Decimal(20) / 3, "6.67"), rounds_to(Decimal("0.46"), "0.5"), rounds_to(Decimal("141.96"), "142.0")
    (True, False, False)
    """
    number = plain_number(gold)
    if number is None or len(number.as_tuple().digits) < 3:
        return False
    exponent = int(number.as_tuple().exponent)
    return (exponent > 0 or number != int(number)) and abs(value - number) <= Decimal(5).scaleb(exponent - 1)


def same_text(answer: str, gold: str) -> bool | None:
    """Compare two normalized answers as text and as plain numbers; None: only math-verify can.

    >>> same_text("1000", "1,000.0"), same_text("6.667", "6.67"), same_text("2,5", "2.5"), same_text("x+1", "1+x")
    (True, True, True, None)
    """
    if _key(answer) == _key(gold):
        return True
    value, number = plain_number(answer), plain_number(gold)
    if value is not None and number is not None:
        more_digits = int(value.as_tuple().exponent) < int(number.as_tuple().exponent)
        return value == number or (more_digits and rounds_to(value, gold))
    number = number if value is None else value
    comma = re.fullmatch(r"-?[0-9]+,[0-9]+", answer if value is None else gold)  # 2,5 is two numbers, or 2.5
    return True if comma and number == Decimal(comma[0].replace(",", ".")) else None


def same_mathematics(answer: str, gold: str) -> bool:
    """Compare two normalized answers by math-verify. May take for ever: only for a process that can be killed."""
    from math_verify import LatexExtractionConfig, parse, verify

    if answer.endswith("%") and gold.endswith("%"):
        answer, gold = answer.rstrip(r"\%"), gold.rstrip(r"\%")
    # Both sides in a box: bare text goes by worse rules. Only LaTeX: the reader of bare arithmetic ends in Python's
    # eval. No time-outs, which it would report as False.
    target, truth = (parse(rf"\boxed{{{t}}}", [LatexExtractionConfig()], parsing_timeout=None) for t in (answer, gold))
    if verify(truth, target, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    value: Any = target[0] if target else None
    if plain_number(gold) is None or not getattr(value, "is_number", False) or not value.is_real:
        return False
    with suppress(ArithmeticError, ValueError, TypeError, RecursionError):  # too large, or a limit that sympy lacks
        return rounds_to(Decimal(str(value.evalf(20))), gold)
    return False


# The ground truth


def _read_golds(answers: object) -> tuple[list[str], str]:
    """Return the usable ground truths, normalized, and what is wrong with the last unusable one."""
    golds, fault = [], "is empty"
    for answer in answers if isinstance(answers, list | tuple) else [answers]:
        if isinstance(answer, float) and math.isfinite(answer):
            answer = int(answer) if answer.is_integer() else f"{answer:.15g}"  # 0.30000000000000004 was 0.3
        text = str(answer)  # or a whole solution
        text = [text, *STATED.findall(text)[-1:], *boxed_answers(text)][-1]
        text = text if TOO_BIG.search(text.strip()) else normalize(text)
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            fault = "is no text or finite number"
        elif not re.search(r"[^\W_]|[^\x00-\x7f]|\\\{", text):
            fault = "has nothing to compare with"
        elif TOO_BIG.search(text):
            fault = "is too long or too deeply nested"
        else:
            golds.append(text)
    return golds, fault


def check_answer(answers: object) -> str | None:
    """Say why a ground truth, or every one of a list, is unusable; None if it can be graded against.

    >>> check_answer(" "), check_answer([142.0, ""])
    ("answer ' ' has nothing to compare with: leave the problem out", None)
    """
    golds, fault = _read_golds(answers)
    return None if golds else f"answer {answers!r:.60} {fault}: leave the problem out"


def _decide(item: Item, require_think: bool) -> Grade | Comparison:
    """Grade one response as far as text and plain numbers can."""
    response, answers, truncated = item
    golds, _ = _read_golds(answers)
    if not golds:
        return Grade(0.0, "invalid_gold")
    final = after_think(response, require_think)
    boxed = boxed_answers(final or "")
    readings = [text for text in (text if TOO_BIG.search(text) else normalize(text) for text in boxed) if text]
    if not readings:
        return Grade(0.0, "truncated" if truncated else "no_think_end" if final is None else "no_answer")
    pairs = [(answer, gold) for answer in readings if not TOO_BIG.search(answer) for gold in golds]
    verdicts = [same_text(*pair) for pair in pairs]
    if True in verdicts:
        return Grade(1.0, "correct")
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None] or Grade(0.0, "wrong")


# Worker processes


class RewardPool(AbstractContextManager["RewardPool"]):
    """Grade many responses, with worker processes that no answer can hang.

    A worker starts when text and plain numbers do not decide, and stays until `close`. With `function`, as in
    "module:function", workers call function(response, answer, problem) -> float instead; of several answers, the best
    counts. What it raises ends the run, as a wrong reward would do worse.

    Raises: ValueError. Grading: RuntimeError, if a worker does not start or a function of your own fails.
    """

    def __init__(
        self, workers: int = 2, timeout: float = 3.0, require_think: bool = True, memory_gb: float = 4.0,
        function: str | None = None,
    ) -> None:  # fmt: skip
        for name, value in {"workers": workers, "timeout": timeout, "memory_gb": memory_gb}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a number above 0")
        self.timeout, self.require_think, self.function = timeout, require_think, function
        self._command = [sys.executable, os.path.abspath(__file__), "--worker", str(timeout), str(memory_gb)]
        self._command += [function] if function else []
        self._threads = ThreadPoolExecutor(workers)  # each waits for one worker
        self._running: list[Any] = []  # the workers, Popen objects
        self._idle: list[Any] = [None] * workers  # a stack of those without work; None: yet to start
        if function:
            try:
                self._idle[-1] = self._start()  # so that a name that does not exist is found now
            except RuntimeError as error:
                self.close()
                raise ValueError(f"reward is {function}: {error}: give module:function") from error

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Return one grade for each (response, answers, truncated), in order."""
        futures = [self.submit(item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C above all
            self.close()
            raise

    def submit(self, item: Item, problem: Problem | None = None) -> Future[Grade]:
        """Begin to grade one (response, answers, truncated); a function of your own is given the problem too."""
        if self.function:
            response, answers, truncated = item
            fields = problem and {**asdict(problem), "prompt_tokens": ()}
            return self._threads.submit(self._ask, [response, answers, fields], truncated)
        decided = _decide(item, self.require_think)
        if not isinstance(decided, Grade):
            return self._threads.submit(self._ask, decided)
        known: Future[Grade] = Future()
        known.set_result(decided)
        return known

    def close(self) -> None:
        """End the workers; what they are comparing is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._running):
            worker.kill()  # so that the thread that waits for it returns
        self._threads.shutdown()
        with suppress(IndexError):
            while True:
                _stop(self._running.pop())

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Any:
        # Not multiprocessing, which would import torch again. In its own session, out of reach of Ctrl-C.
        worker = Popen(self._command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
        self._running.append(worker)
        reply = _reply(worker, 60)  # to import sympy takes half a second, more on a busy machine
        if reply != b'"ready"\n':
            shown = f"a reward worker did not start: `{' '.join(self._command)}` shows why"
            raise RuntimeError(json.loads(reply) if reply else shown)
        return worker

    def _ask(self, task: list[Any], truncated: bool = False) -> Grade:
        worker = self._idle.pop()
        if worker is None or worker.poll() is not None:  # or it has died
            worker = self._start()
        with suppress(BrokenPipeError):  # it died this moment, as the empty reply will say
            print(json.dumps(task), file=worker.stdin, flush=True)
        reply = _reply(worker, self.timeout)
        if not reply:
            _stop(worker)
            self._running.remove(worker)
        self._idle.append(worker)
        if not reply:
            return Grade(0.0, "timeout")
        reward = json.loads(reply)
        if isinstance(reward, str):
            raise RuntimeError(f"reward {self.function}: {reward}")
        return Grade(reward, "correct" if reward >= 1 else "truncated" if truncated and reward <= 0 else "wrong")


def _reply(worker: Any, seconds: float) -> bytes:
    """Return a worker's reply, one short line; nothing if it died or is late."""
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    return os.read(worker.stdout.fileno(), 4096) if poll.poll(1000 * seconds) else b""


def _stop(worker: Any) -> None:
    worker.kill()
    worker.communicate()  # wait for it and close its pipes


def grade(response: str, answers: Answers, *, require_think: bool, truncated: bool = False) -> Grade:
    r"""Grade one response; any of several answers suffices. For many, `RewardPool` spares starting workers.

    >>> grade(r"<think>6 * 7</think> \boxed{42}", ["42", "43"], require_think=True)
    Grade(reward=1.0, reason='correct')
    """
    with RewardPool(1, require_think=require_think) as pool:
        return pool.grade([(response, answers, truncated)])[0]


def _work(timeout: float, memory_gb: float, function: str | None = None) -> None:
    """Do the tasks that come on stdin, one JSON line each, until it closes; reply a number, or what failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the parent is gone
    cap, hard = int(memory_gb * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (cap if hard < 0 else min(cap, hard), hard))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a reply

    def reply(result: float | str) -> None:
        os.write(replies, json.dumps(result).encode()[:4000] + b"\n")  # so short that a pipe takes it at once

    if function:
        try:
            work = _own_function(function)
        except Exception as error:  # whatever the user's module raises is for the user to read
            return reply(f"{type(error).__name__}: {error}"[:500])
    else:
        import math_verify

        logging.getLogger(math_verify.__name__).setLevel(logging.CRITICAL)  # it logs whole answers

        def work(*pairs: tuple[str, str]) -> float:
            return float(any(same_mathematics(*pair) for pair in pairs))

    reply("ready")
    for line in sys.stdin:
        # The parent holds the clock; this alarm, deadly even inside C code, is for a worker without a parent.
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)
        try:
            result: float | str = work(*json.loads(line))
        except (MemoryError, RecursionError):
            return None  # ended by an answer, as by the clock
        except Exception as error:  # the run ends with it: a reward that fails must not pass for a reward of 0
            result = f"{type(error).__name__}: {error}"[:500]
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(result)
    return None


def _own_function(name: str) -> Callable[..., float]:
    from polaris_mini import Problem

    sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)

    def best(response: str, answers: Any, fields: dict[str, Any] | None) -> float:
        problem = fields and Problem(**fields)
        choices = answers if isinstance(answers, list) else [answers]
        reward = max(float(function(response, answer, problem)) for answer in choices)
        if not math.isfinite(reward):
            raise ValueError(f"returned {reward}: return a finite number")
        return reward

    return best


def _read_rows(path: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            field = "answer" if isinstance(row.get("response"), str) else "response"
        except (ValueError, RecursionError, AttributeError):
            raise ValueError(f"{path}, line {number}: no JSON object: write one on each line") from None
        if field == "response" or row.get("answer") is None:
            raise ValueError(f"{path}, line {number}: field '{field}' is missing or no text: write it")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade the responses in a JSON-lines file.")
    parser.add_argument("file", help='rows with "response", "answer" and, if known, "id" and "truncated"')
    parser.add_argument("--no-require-think", action="store_true", help="accept a response without </think>")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds for one comparison (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    options = parser.parse_args()
    try:
        rows = _read_rows(options.file)
        pool = RewardPool(options.workers, options.timeout, not options.no_require_think)
    except OSError as error:
        parser.exit(2, f"{options.file}: {error.strerror}: give the path of a JSON-lines file\n")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    with pool:
        grades = pool.grade([(row["response"], row["answer"], bool(row.get("truncated"))) for row in rows])
    for row, result in zip(rows, grades, strict=True):
        print(json.dumps(({"id": row["id"]} if "id" in row else {}) | vars(result)))
    reasons = Counter(result.reason for result in grades).most_common()
    print(f"{len(rows)} responses:", ", ".join(f"{reason} {n}" for reason, n in reasons), file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(float(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
    else:
        main()
