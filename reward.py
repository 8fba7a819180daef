r"""Grade responses to math problems: reward 1 if the boxed answer is right, else 0.

The answer is the last `\boxed{...}` after `</think>`, with the boxes beside it if they are one answer. Equal text
and plain numbers are decided at once, the rest by math-verify in worker processes, which are killed when they take
too long: `9^{9^{9^9}}` never ends. A reward function of your own runs in the same processes (`--reward` of train.py).

Left out: answers without a box (a search for them rewards guesses), proofs and code (`--reward` takes a function for
these). math-verify's judgement is taken as it is: 3 + 4 equals 7, and so do
7\%, y = 7 and 7 \text{ million}; number bases are ignored. docs/reward.md shows how often it agrees with others.

    python reward.py FILE.jsonl                       # rows with "response", "answer" -> "reward", "reason"
    python reward.py FILE.jsonl --no-require-think    # for models that do not think
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import logging
import math
import os
import pickle
import re
import resource
import signal
import sys
import threading
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby, pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Literal, NamedTuple, NoReturn

Reason = Literal["correct", "wrong", "no_answer", "no_think_end", "truncated", "timeout", "invalid_gold"]
Answers = str | int | float | Sequence[str | int | float]  # the ground truth of a problem, or several
Item = tuple[str, Answers, bool]  # a response, the ground truth, whether the response was cut off
Comparison = list[tuple[str, str]]  # answers with ground truths, where only math-verify can decide

# Over 500 characters, or 11 brackets opened in a row: beyond lies what costs the parser seconds. Of 58,000
# answers in the usual math sets the longest but one has 253 characters, and none is nested over 6 deep.
TOO_BIG = re.compile(r"(?s).{501}|(?:[({[][^](){}[]*){11}")
# What may stand between two boxes of one answer: punctuation on the same lines, or some words with "and" or "or".
BETWEEN_BOXES = re.compile(
    r"(?!\s*\n\s*\n)(?:[\s,;$]|\\[()\[\]]|\\q?quad)*+"
    r"|(?=.*\b(?:and|or)\b)(?!.*\b(?:so|thus|hence|then|therefore|not?|but|wait)\b)[^.?!:\n]{0,40}"
)
STATED = re.compile(r"(?i)final answer is:?\s*\$(?=[^$]*[^\s$])((?:[^$\n.]|\.(?!\s))+)\$")
SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "±": r"\pm ", "√": r"\sqrt ", "π": r"\pi ", "′": "'", "ℝ": r"\mathbb{R}", "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
})  # fmt: skip


class RewardError(RuntimeError):
    """Workers that do not start, or a reward function of your own that cannot be loaded or fails."""


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


def boxed_answer(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds, together with the boxes just before it that go with it.

    >>> boxed_answer(r"$x = \boxed{2}$ or $x = \boxed{3}$"), boxed_answer(r"\boxed{2}? No: \boxed{\frac{1}{3}}")
    ('2, 3', '\\frac{1}{3}')

    Where "the final answer is $...$" follows the last box, as models of the Minerva format write, that is the answer.
    """
    boxes = _boxes(text)
    if boxes and (stated := STATED.findall(text, boxes[-1][2])):
        return str(stated[-1])
    answer = [text[start:end] for _, start, end in boxes[-1:]]
    for (_, start, end), (following, _, _) in reversed(list(pairwise(boxes[-10:]))):
        if not BETWEEN_BOXES.fullmatch(text, end + 1, following):
            break
        answer.insert(0, text[start:end])
    return ", ".join(dict.fromkeys(answer)) if answer else None  # the same box twice is one answer


def _unicode_to_latex(text: str) -> str:
    parts = []
    for kind, characters in groupby(text.translate(SYMBOLS), lambda c: unicodedata.decomposition(c).partition(" ")[0]):
        plain = unicodedata.normalize("NFKC", "".join(characters))
        if kind in ("<super>", "<sub>"):
            plain = f"{'^' if kind == '<super>' else '_'}{{{plain}}}"
        parts.append(re.sub("([0-9]+)\N{FRACTION SLASH}([0-9]+)", r"\\frac{\1}{\2}", plain))
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
    # currency and math delimiters, but not \\[2pt], the end of a row
    text = re.sub(r"\\?[$€£¥]|(?<!\\)\\[()\[\]]", "", text)
    text = text if text.isascii() else _unicode_to_latex(text)
    # thousands: 1,\!000 and 1{,}000; \frac{1,000}{3}
    text = re.sub(r"(?<=\d)(?:,\\!|\\!,?|\{,\})\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=[ct}])\{\d{1,3}(?:,\d{3})+\}", lambda match: match[0].replace(",", ""), text)
    # spaces, sizes, the distance after a row
    text = re.sub(r"(?<!\\)\\[,;:! ]|~|\\q?quad\b", " ", text)
    text = re.sub(r"\\(?:[bB]igg?[lrm]?|displaystyle)(?![A-Za-z])|(?<=\\\\)\[\d+\w*\]", "", text)
    # \sqrt(2) and √10, whose 10 LaTeX would split; other names; 0.1\overline{6}; the end of a sentence
    text = re.sub(r"\\sqrt\s*(?:\(([^()]*)\)|(\d[\d.]*\d))", r"\\sqrt{\1\2}", text)
    text = text.replace(r"\degree", r"^\circ").replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}", _repeating, text)
    return re.sub(r"(?<!\\right)[\s.,;:]+$", "", text.strip())


# Two answers


def _plain_font(text: str) -> str:
    return re.sub(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}", r"\1", text)


def _key(text: str) -> str:
    """Return what two ways to write an answer have in common, apart from spaces, size and font."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", _plain_font(re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)))
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

    Rounded can only be a ground truth of three or more digits, at least two of them behind the point or with a power of
    ten, that is no multiple of 1/8: 0.375 and 12.5 are exact.

    >>> rounds_to(Decimal(20) / 3, "6.67"), rounds_to(Decimal("0.374"), "0.375"), rounds_to(Decimal("12.46"), "12.5")
    (True, False, False)
    """
    number = plain_number(gold)
    if number is None or len(number.as_tuple().digits) < 3:
        return False
    exponent = int(number.as_tuple().exponent)
    rounded = exponent > 0 or (exponent < -1 and 8 * number != int(8 * number))
    return rounded and abs(value - number) <= Decimal(5).scaleb(exponent - 1)


def _names_several(text: str) -> bool:
    """Tell whether an answer lists several, outside of brackets."""
    text, inner = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _plain_font(text)), ""
    while text != inner:
        inner, text = text, re.sub(r"\([^()]*\)|\[[^][]*\]|\{[^{}]*\}", "", text)
    return bool(re.search(r"[,;]|\b(?:and|or)\b", text))


def _same_amount(answer: str, gold: str) -> bool:
    """Compare where one may have a percent sign that the other lacks, or a decimal comma for its point: 2,5 is 2.5."""
    for one, other in ((answer, gold), (gold, answer)):
        number = plain_number(other)
        comma = one.replace(",", ".") if re.fullmatch(r"-?[0-9]+,[0-9]+", one) else ""
        if number is not None and number in (plain_number(one.rstrip(r" \%")), plain_number(comma)):
            return True
    return False


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
    if _same_amount(answer, gold):
        return True
    # What math-verify would let pass: "3 cm, 4 cm" for 3, "1, 2, ..." for 1, 2, and BADC for ABCD, a product.
    one_gold = not re.search(r"[,;<>&]|\\(?:pm|mp|cup|[lg]eq?|[lg]t|mid)(?![a-z])|\b(?:and|or)\b", gold)
    dots = [bool(re.search(r"\\[lc]?dots|\.\.\.", text)) for text in (answer, gold)]
    letters = all(re.fullmatch(r"[A-Z]{3,}", _plain_font(text)) for text in (answer, gold))
    return False if (one_gold and _names_several(answer)) or dots[0] != dots[1] or letters else None


def _decimal(parsed: list[Any]) -> Decimal | None:
    with suppress(ArithmeticError, ValueError, TypeError):  # too large, or a limit that sympy cannot take
        if parsed and getattr(parsed[0], "is_number", False) and parsed[0].is_real:
            return Decimal(str(parsed[0].evalf(20)))
    return None


def same_mathematics(answer: str, gold: str) -> bool:
    """Compare two normalized answers by math-verify. May take for ever: only for a process that can be killed."""
    from math_verify import LatexExtractionConfig, parse, verify

    if answer.endswith("%") and gold.endswith("%"):
        answer, gold = answer.rstrip(r"\%"), gold.rstrip(r"\%")
    # Both sides in a box: bare text goes by worse rules. Only LaTeX: the reader of bare arithmetic ends in Python's
    # eval. No time-outs, which it would report as False.
    target, truth = (parse(rf"\boxed{{{t}}}", [LatexExtractionConfig()], parsing_timeout=None) for t in (answer, gold))
    equal = bool(verify(truth, target, timeout_seconds=None, allow_set_relation_comp=True))
    if "." not in answer + gold or "%" in answer + gold:
        return equal
    value, number = _decimal(target), _decimal(truth)
    if equal and value is not None and number is not None:  # in six places, where 0.0 is 10^{-8}
        return abs(value - number) <= abs(number) / 10_000
    return equal or (value is not None and rounds_to(value, gold))


# The ground truth


def _read_golds(answers: object) -> tuple[list[str], str]:
    """Return the usable ground truths, normalized, and what is wrong with the last unusable one."""
    golds, fault = [], "is empty"
    for answer in answers if isinstance(answers, list | tuple) else [answers]:
        if isinstance(answer, float) and math.isfinite(answer):
            answer = int(answer) if answer.is_integer() else f"{answer:.15g}"  # 0.30000000000000004 was 0.3
        text = str(answer)  # or a whole solution
        boxed = boxed_answer(text)
        text = [text, *STATED.findall(text)][-1] if boxed is None else boxed
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
    answer = boxed_answer(final or "") or ""
    if TOO_BIG.search(answer):
        return Grade(0.0, "wrong")
    answer = normalize(answer)
    if not answer:
        return Grade(0.0, "truncated" if truncated else "no_think_end" if final is None else "no_answer")
    verdicts = {gold: same_text(answer, gold) for gold in golds}
    if True in verdicts.values():
        return Grade(1.0, "correct")
    undecided = [(answer, gold) for gold, verdict in verdicts.items() if verdict is None]
    return undecided or Grade(0.0, "wrong")


# Worker processes


class RewardPool(AbstractContextManager["RewardPool"]):
    """Grade many responses, with worker processes that no answer can hang.

    A worker starts when text and plain numbers do not decide, and stays until `close`. With `function`, as in
    "module:function", workers call function(response, answer, problem) -> float instead, for each of several ground
    truths, and the highest reward counts.

    Raises: ValueError for other settings; RewardError for the function, and for what it raises while it grades.
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
        self._closed = False
        self._threads = ThreadPoolExecutor(workers)  # each waits for one worker
        self._running: list[Any] = []  # the workers, Popen objects
        self._idle: list[Any] = [None] * workers  # a stack of those without work; None: yet to start
        if function:
            try:
                self._idle[-1] = self._start()  # so that a name that does not exist is found now
            except RewardError as error:
                self.close()
                place = "give module:function, of a file in this folder or of a package"
                raise RewardError(f"reward is {function}: {error}: {place}") from error

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Return one grade for each (response, answers, truncated), in order."""
        futures = [self.submit(item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C above all
            self.close()
            raise

    def submit(self, item: Item, problem: object = None) -> Future[Grade]:
        """Begin to grade one (response, answers, truncated); a function of your own is given the problem too."""
        if self.function:
            response, answers, truncated = item
            pickled = base64.b64encode(pickle.dumps(problem)).decode()  # so that its class need not be known here
            return self._threads.submit(self._ask, [response, answers, pickled], truncated)
        decided = _decide(item, self.require_think)
        if not isinstance(decided, Grade):
            return self._threads.submit(self._ask, decided)
        known: Future[Grade] = Future()
        known.set_result(decided)
        return known

    def close(self) -> None:
        """End the workers; what they are comparing is dropped."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._running):
            _kill(worker)  # so that the thread that waits for it returns
        self._threads.shutdown()
        while self._running:
            self._stop(self._running[-1])

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, again: bool = True) -> Any:
        # Not multiprocessing, which would import torch again. In its own session, out of reach of Ctrl-C.
        worker = Popen(self._command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
        self._running.append(worker)
        reply, _ = _talk(worker, "", 60)  # to import sympy takes half a second, more on a busy machine
        if reply == '"ready"\n':
            return worker
        self._stop(worker)
        if worker.returncode < 0 and again and not self._closed:  # killed by someone else
            return self._start(again=False)
        shown = f"a reward worker did not start: `{' '.join(self._command)}` shows why"
        raise RewardError(json.loads(reply) if reply else shown)

    def _stop(self, worker: Any) -> None:
        _kill(worker)
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with suppress(BrokenPipeError):  # of a task that was not read to its end
                pipe.close()
        self._running.remove(worker)

    def _ask(self, task: list[Any], truncated: bool = False) -> Grade:
        line, worker = json.dumps(task) + "\n", self._idle.pop()
        try:
            for again in (True, False):
                if worker is None or worker.poll() is not None:  # or it has died
                    worker = None
                    worker = self._start()
                reply, late = _talk(worker, line, self.timeout)
                if reply:
                    break
                self._stop(worker)
                killed, worker = worker.returncode < 0 and not late, None  # by someone else: once more
                if not (killed and again) or self._closed:
                    return Grade(0.0, "timeout")
        finally:
            self._idle.append(worker)
        reward = json.loads(reply)
        if isinstance(reward, str):
            raise RewardError(f"reward is {self.function}: it raised {reward}: mend it, or let it return 0")
        return Grade(reward, "correct" if reward >= 1 else "truncated" if truncated and reward <= 0 else "wrong")


def _talk(worker: Any, line: str, seconds: float) -> tuple[str, bool]:
    """Send a worker a line; return its reply, nothing if it died, and whether it was killed for being late."""
    late = threading.Event()

    def expire() -> None:
        late.set()
        _kill(worker)

    clock = threading.Timer(seconds, expire)
    clock.start()
    try:
        with suppress(BrokenPipeError):  # it died this moment, as the empty reply will say
            worker.stdin.write(line)
            worker.stdin.flush()
        return worker.stdout.readline(), late.is_set()
    finally:
        clock.cancel()


def _kill(worker: Any) -> None:
    if worker.returncode is None:  # else its number may be another's
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # with what it may have started


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
    tasks, replies = os.fdopen(os.dup(0)), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a library reads is no task
    os.dup2(2, 1)  # and what it prints is no reply

    def reply(result: float | str) -> None:
        os.write(replies, json.dumps(result).encode() + b"\n")  # under 4,096 bytes, which a pipe takes at once

    if function:
        try:
            work = _own_function(function)
        except (Exception, SystemExit) as error:  # whatever the user's module raises is for the user to read
            return reply(f"{type(error).__name__}: {error}"[:300])
    else:
        import math_verify

        logging.getLogger(math_verify.__name__).setLevel(logging.CRITICAL)  # it logs whole answers

        def work(*pairs: tuple[str, str]) -> float:
            return float(any(same_mathematics(*pair) for pair in pairs))

    reply("ready")
    for line in tasks:
        # The parent holds the clock; this alarm, deadly even inside C code, is for a worker without a parent.
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)
        try:
            result: float | str = work(*json.loads(line))
        except MemoryError:
            return None  # ended by an answer, as by the clock
        except (Exception, SystemExit) as error:  # it ends the run: a reward that fails must not pass for 0
            place = traceback.extract_tb(error.__traceback__)[-1]
            result = f"{type(error).__name__}: {error}"[:300] + f" ({Path(place.filename).name}, line {place.lineno})"
            if not function:  # but that sympy fails on a strange answer only says that it is not right
                print(f"reward: {result} in the comparison of {line[:200]}", file=sys.stderr)
                result = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(result)
    return None


class NoProblem(NamedTuple):
    """What a function of your own is given where only the answers are known: by this file's command."""

    answers: tuple[Any, ...]
    id: str = ""
    text: str = ""
    system: None = None


def _own_function(name: str) -> Callable[..., float]:
    sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
        raise TypeError(f"{function!r:.60} is no function")

    def best(response: str, answers: Any, pickled: str) -> float:
        choices = answers if isinstance(answers, list) else [answers]
        problem = pickle.loads(base64.b64decode(pickled)) or NoProblem(tuple(choices))
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
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: no JSON object: write one on each line")
        if not isinstance(row.get("response"), str):
            raise ValueError(f"{path}, line {number}: field 'response' is missing or no text: write it")
        if row.get("answer") is None:
            raise ValueError(f"{path}, line {number}: field 'answer' is missing: write it")
        rows.append(row)
    return rows


class Parser(argparse.ArgumentParser):
    """Errors of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    parser = Parser(description="Grade the responses in a JSON-lines file.")
    parser.add_argument("file", help='rows with "response", "answer" and, if known, "id" and "truncated"')
    parser.add_argument("--no-require-think", action="store_true", help="accept a response without </think>")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds for one comparison (default 3)")
    parser.add_argument("--reward", help="module:function of your own; its problem has no text here")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    options = parser.parse_args()
    try:
        rows = _read_rows(options.file)
        pool = RewardPool(options.workers, options.timeout, not options.no_require_think, function=options.reward)
    except OSError as error:
        parser.error(f"{options.file}: {error.strerror}: give the path of a JSON-lines file")
    except (ValueError, RewardError) as error:
        parser.error(str(error))
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
