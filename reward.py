r"""Grade responses to math problems: reward 1 if the boxed answer is right, else 0.

The answer is the last `\boxed{...}` after `</think>`. Equal text and plain numbers are decided at once, the
rest by math-verify in worker processes, which are killed when they take too long: `9^{9^{9^9}}` never ends.

Left out: partial credit, answers without a box, proofs, code. math-verify's judgement is taken as it is:
3 + 4 equals 7, and so do 7\%, y = 7 and 7 \text{ million}; number bases are ignored.

    python reward.py FILE.jsonl                       # rows with "response", "answer" -> "reward", "reason"
    python reward.py FILE.jsonl --no-require-think    # for models that do not think
"""

import argparse
import json
import logging
import math
import os
import re
import resource
import select
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Literal

Reason = Literal["correct", "wrong", "no_answer", "no_think_end", "truncated", "timeout", "invalid_gold"]
Answers = str | int | float | Sequence[str | int | float]  # the ground truth of a problem, or several
Item = tuple[str, Answers, bool]  # a response, the ground truth, whether the response was cut off
Comparison = tuple[str, list[str]]  # an answer, and the ground truths that only math-verify can decide on

# Over 500 characters, or 11 brackets opened in a row: beyond lies what costs the parser seconds. Of 58,000
# answers in the usual math sets the longest but one has 253 characters, and none is nested over 6 deep.
TOO_BIG = re.compile(r"(?s).{501}|(?:[({[][^](){}[]*){11}")


@dataclass(frozen=True)
class Grade:
    """Hold a reward and its reason: "truncated" was cut off unanswered, "timeout" killed while compared."""

    reward: float
    reason: Reason


def after_think(response: str, require_think: bool) -> str | None:
    """Return the text after the last `</think>`; None if there is none and one is required.

    >>> after_think("<think>hm</think> so 4", require_think=True), after_think("4", require_think=False)
    (' so 4', '4')
    """
    _, end, final = response.rpartition("</think>")
    return final if end or not require_think else None


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds; a box whose brace never closes is none.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{1}, no: \boxed{2")
    ('\\frac{1}{2}', '1')
    """
    start, end = -1, -1
    opened = []  # for each open brace, where its box's content starts, or -1 if it opens no box
    # One pass: a search from each box to its end is quadratic when thousands are left open.
    for token in re.finditer(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]", text):
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            opened.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and opened and (content := opened.pop()) > start:
            start, end = content, token.start()
    return text[start:end] if start >= 0 else None


def strip_delimiters(text: str) -> str:
    r"""Return the text without math delimiters and outer white space.

    >>> strip_delimiters("$69$,$84$\n"), strip_delimiters(r"\(x\)")
    ('69,84', 'x')
    """
    return re.sub(r"(?<!\\)(?:\$|\\[()\[\]])", "", text).strip()


_NUMBER = re.compile(
    r"([+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.[0-9]*)?)"  # 1,000 or 1 000 or 1000.0
    r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\^)\{?([+-]?[0-9]{1,4})\}?"  # a power of ten: e9 or \times 10^{9}
    r"(?:\\[,;]|[~\s])*(?:\\(?:text|mathrm)\{[^{}]*\})?)?"  # and then perhaps a unit
)


def plain_number(text: str) -> Decimal | None:
    r"""Return the value of a plainly written number, else None.

    >>> plain_number("025") == 25, plain_number("1,000.0") == 1000, plain_number("1/2")
    (True, True, None)
    """
    # Powers of ten too: math-verify holds 8.2 \times 10^{-19} and 1.6 \times 10^{-19} equal, 1e-5 for e - 5.
    match = _NUMBER.fullmatch(re.sub(r"\\!|^\\\$", "", text.replace("{,}", ",")))
    return Decimal(re.sub("[ ,]", "", match[1]) + "e" + (match[2] or "0")) if match else None


def _read_golds(answers: object) -> tuple[list[str], str]:
    """Return the usable ground truths as bare text, and what is wrong with the last unusable one."""
    golds, fault = [], "is empty"
    for answer in answers if isinstance(answers, list | tuple) else [answers]:
        if isinstance(answer, float) and math.isfinite(answer):
            answer = int(answer) if answer.is_integer() else f"{answer:.15g}"  # 0.30000000000000004 was 0.3
        boxed = last_boxed(str(answer)) if str(answer).count(r"\boxed") == 1 else None
        text = strip_delimiters(str(answer) if boxed is None else boxed)
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
    answer = strip_delimiters(last_boxed(final) or "") if final is not None else ""
    if not answer:
        return Grade(0.0, "truncated" if truncated else "no_think_end" if final is None else "no_answer")
    if TOO_BIG.search(answer):
        return Grade(0.0, "wrong")
    value = plain_number(answer)
    if answer in golds or (value is not None and value in map(plain_number, golds)):
        return Grade(1.0, "correct")
    undecided = [gold for gold in golds if value is None or plain_number(gold) is None]
    return (answer, undecided) if undecided else Grade(0.0, "wrong")


class RewardPool(AbstractContextManager["RewardPool"]):
    """Grade many responses, with worker processes that no answer can hang.

    A worker starts when text and plain numbers do not decide, and stays until `close`.
    """

    def __init__(
        self, workers: int = 2, timeout: float = 3.0, require_think: bool = True, memory_gb: float = 4.0
    ) -> None:
        for name, value in {"workers": workers, "timeout": timeout, "memory_gb": memory_gb}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a number above 0")
        self.timeout, self.require_think = timeout, require_think
        self._command = [sys.executable, os.path.abspath(__file__), "--worker", str(timeout), str(memory_gb)]
        self._threads = ThreadPoolExecutor(workers)  # each waits for one worker
        self._running: list[Any] = []  # the workers, Popen objects
        self._idle: list[Any] = [None] * workers  # a stack of those without work; None: yet to start

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Return one grade for each (response, answers, truncated), in order."""
        futures = [self.submit(item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C above all
            self.close()
            raise

    def submit(self, item: Item) -> Future[Grade]:
        """Begin to grade one (response, answers, truncated)."""
        decided = _decide(item, self.require_think)
        if not isinstance(decided, Grade):
            return self._threads.submit(self._compare, decided)
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

    def _compare(self, comparison: Comparison) -> Grade:
        worker = self._idle.pop()
        if worker is None or worker.poll() is not None:  # or it has died
            # Not multiprocessing, which would import torch again. In its own session, out of reach of Ctrl-C.
            worker = Popen(self._command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
            self._running.append(worker)
            if not _reply(worker, 60):  # to import sympy takes half a second, more on a busy machine
                raise RuntimeError(f"a reward worker did not start: `{' '.join(self._command)}` shows why")
        with suppress(BrokenPipeError):  # it died this moment, as the empty reply will say
            print(json.dumps(comparison), file=worker.stdin, flush=True)
        reply = _reply(worker, self.timeout)
        if not reply:
            _stop(worker)
            self._running.remove(worker)
        self._idle.append(worker)
        right = reply == b"1\n"
        return Grade(float(right), "correct" if right else "wrong" if reply else "timeout")


def _reply(worker: Any, seconds: float) -> bytes:
    """Return a worker's reply, one short line; nothing if it died or is late."""
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    return os.read(worker.stdout.fileno(), 64) if poll.poll(1000 * seconds) else b""


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


def _work(timeout: float, memory_gb: float) -> None:
    """Compare what comes on stdin, one JSON line each, until it closes; reply "1" or "0" on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the parent is gone
    cap, hard = int(memory_gb * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (cap if hard < 0 else min(cap, hard), hard))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a reply
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole answers
    latex = [LatexExtractionConfig()]  # only: math-verify's reader of bare arithmetic ends in Python's eval
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        # The parent holds the clock; this alarm, deadly even inside C code, is for a worker without a parent.
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)
        answer, golds = json.loads(line)
        # Both sides in a box: bare text goes by worse rules. No time-outs, which it would report as False.
        target, *parsed = [parse(rf"\boxed{{{t}}}", latex, parsing_timeout=None) for t in (answer, *golds)]
        right = any(verify(gold, target, timeout_seconds=None) for gold in parsed)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1\n" if right else b"0\n")


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
    _work(*map(float, sys.argv[2:])) if sys.argv[1:2] == ["--worker"] else main()
