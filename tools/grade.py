"""Grade a file of responses: print a line for each with its reward and the reason. The reasons are counted on stderr.

Use it to try the grader, or a reward function of your own, on responses that you know before a run trains on it.

    python tools/grade.py FILE.jsonl                       # rows with "response" and "answer"
    python tools/grade.py FILE.jsonl --no-require-think    # for a model that does not think
    python tools/grade.py FILE.jsonl --reward countdown:score
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward import RewardError, RewardPool


def read_rows(path: str) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file. Raises ValueError with the line of the first that cannot be graded."""
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
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    parser = Parser(description="Grade the responses in a JSON-lines file. Print the reward of each and the reason. "
                                "Use it to try the grader, or a reward function of your own, on responses you know.")
    parser.add_argument("file", help='rows with "response", "answer" and, if known, "id" and "truncated"')
    parser.add_argument("--no-require-think", action="store_true", help="accept a response without </think>")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds for one comparison (default 3)")
    parser.add_argument("--reward", help="module:function of your own; its problem has no text here")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    options = parser.parse_args()
    for name in ("workers", "timeout"):
        if not 0 < (value := getattr(options, name)) < math.inf:
            parser.error(f"{name} is {value}: give a number above 0")
    try:
        rows = read_rows(options.file)
    except OSError as error:
        parser.error(f"{options.file}: {error.strerror}: give the path of a JSON-lines file")
    except ValueError as error:
        parser.error(str(error))
    think = not options.no_require_think
    try:
        with RewardPool(options.workers, options.timeout, think, function=options.reward) as pool:
            grades = pool.grade([(row["response"], row["answer"], bool(row.get("truncated"))) for row in rows])
    except RewardError as error:
        parser.error(str(error))
    for row, grade in zip(rows, grades, strict=True):
        print(json.dumps(({"id": row["id"]} if "id" in row else {}) | vars(grade)))
    reasons = Counter(grade.reason for grade in grades).most_common()
    print(f"{len(rows)} responses:", ", ".join(f"{reason} {n}" for reason, n in reasons), file=sys.stderr)


if __name__ == "__main__":
    main()
