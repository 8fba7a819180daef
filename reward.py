r"""Grade responses to math problems: reward 1 if the boxed answer is right, else 0.

The answer is the last `\boxed{...}` after `</think>`. Boxes just before it belong to it if they are one answer. Equal
text and plain numbers are decided at once. math-verify decides the rest in worker processes, which end themselves when
an answer takes too long: `9^{9^{9^9}}` never ends. A reward function of your own (`--reward`) runs there, too.

math-verify rounds, and leaves words and digits out. What it calls equal is therefore compared again: exact values
exactly, and what was left out. 3 + 4 equals 7, and so do 7\%, y = 7 and 7 \text{ million}. Left out: answers without a
box (a search for them rewards guesses), proofs and code. docs/reward.md has the rules, and how often others agree.
"""
import faulthandler
import importlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from difflib import SequenceMatcher
from itertools import groupby, pairwise, starmap
from subprocess import PIPE, Popen
from threading import get_ident
from types import SimpleNamespace
from typing import Any, Literal

Reason = Literal["correct", "wrong", "no_answer", "no_think_end", "truncated", "timeout", "invalid_gold"]
Answers = str | int | float | Sequence[str | int | float]  # the ground truth of a problem, or several
Item = tuple[str, Answers, bool]  # a response, the ground truth, whether the response was cut off
START_SECONDS = 60.0  # to import sympy takes half a second, more on a busy machine

# Over 500 characters, or 11 brackets opened in a row: beyond lies what costs the parser seconds. Of 58,000
# answers in the usual math sets the longest but one has 253 characters, and none is nested over 6 deep.
TOO_BIG = re.compile(r"(?s).{501}|(?:[({[][^](){}[]*){11}")
BETWEEN_BOXES = re.compile(  # two boxes of one answer: punctuation on the same lines, or some words with "and" or "or"
    r"(?!\s*\n\s*\n)(?:[\s,;$]|\\[()\[\]]|\\q?quad)*+"
    r"|(?=.*\b(?:and|or)\b)(?!.*\b(?:so|thus|hence|then|therefore|not?|but|wait)\b)[^.?!:\n]{0,40}")
STATED = re.compile(r"(?i)final answer is:?\s*\$(?=[^$]*[^\s$])((?:[^$\n.]|\.(?!\s))+)\$")
FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
NUMBER = re.compile(
    r"([+-]?(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.[0-9]*)?)"  # 1,000 or 1 000 or 1000.0
    r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\^)\{?([+-]?[0-9]{1,4})\}?"  # a power of ten: e9 or \times 10^{9}
    r"\s*(?:\\(?:text|mathrm)\{[^{}]*\})?)?")  # and then perhaps a unit
# What math-verify misreads: 3 1/2 as (3 + 1)/2, 2(\frac{1}{2}) as 2.5, 2 years 3 months as a product; \{x \mid x > 1\}
MIXED = re.compile(r"(?<![\d.,/^_\\])([1-9]\d*)\s+([1-9]\d*)\s*/\s*([1-9]\d*)(?![\d.,]*\d)")
FACTORS = re.compile(r"(?<![_^]\d)(?<=\d)\s*(?=(?:\\left)?\s*\(\s*\\[dt]?frac)|(?<=\d\))\s*(?=\\[dt]?frac)")
DURATION = re.compile(r"\d+\s+[a-z]{3,}(?:,?\s+(?:and\s+)?\d+\s+[a-z]{3,})+")
SET_OF = re.compile(r"\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|[|:])(.*?)(?:\\right)?\s*\\\}")
UNIT = re.compile(r"(?:[\^_]\s*\{?\s*-?|[a-z])\d+")  # its exponent
CLOCK = re.compile(r"\s*(\d\d?(?:\s*\{?:\}?\s*[0-5]\d)*)([A-Za-z.~\s]*)")  # 3:30 p.m.
CHOICE = re.compile(r"(?s)\(?([A-J])(?:\)|\.(?=\s)|$)[.:]?\s*((?!.*(?<![A-Za-z\\])[A-J](?![A-Za-z])).*)")  # (C) 42
IDLE = {"and", "or", "the", "a", "an", "is", "are", "of", "e", "square", "sq", "cubic", "unit", "units", "degrees"}
SYMBOLS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "√": r"\sqrt ", "π": r"\pi ", "′": "'", "ℝ": r"\mathbb{R}",
    "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"})  # fmt: skip


class RewardError(RuntimeError):
    """Workers that do not start, or a reward function of your own that cannot be loaded or fails."""


@dataclass(frozen=True)
class Grade:
    """Hold a reward and its reason: "truncated" was cut off unanswered, "timeout" took too long or too much memory."""

    reward: float
    reason: Reason


# ---- The answer in a response ----
def after_think(response: str, require_think: bool) -> str | None:
    """Return the text after the last `</think>`; None if there is none and one is required.

    >>> after_think("<think>hm</think> so 4", require_think=True), after_think("4", require_think=False)
    (' so 4', '4')
    """
    _, end, final = response.rpartition("</think>")
    return final if end or not require_think else None


def boxed_answer(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds, together with the boxes just before it that go with it.

    >>> boxed_answer(r"$x = \boxed{2}$ or $x = \boxed{3}$"), boxed_answer(r"\boxed{2}? No: \boxed{\frac{1}{3}}")
    ('2 or 3', '\\frac{1}{3}')
    """
    boxes: list[tuple[int, int, int]] = []  # without a box inside: where it begins, where its content begins and ends
    opened = []  # for each open brace, where its box begins, or -1 if it opens none, and where its content begins
    for token in re.finditer(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]", text):  # in one pass: box by box is quadratic
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            opened.append((token.start() if len(token[0]) > 1 else -1, token.end()))
        elif token[0] == "}" and opened and (box := opened.pop())[0] >= 0 and not (boxes and boxes[-1][0] > box[0]):
            boxes.append((*box, token.start()))
    if boxes and (stated := STATED.findall(text, boxes[-1][2])):  # after the last box, as Minerva's format has it
        return str(stated[-1])
    answer, word = [text[start:end] for _, start, end in boxes[-1:]], ", "
    for (_, start, end), (following, _, _) in reversed(list(pairwise(boxes[-10:]))):
        if not BETWEEN_BOXES.fullmatch(text, end + 1, following):
            break
        word = " or " if re.search(r"\bor\b", text[end:following]) else word
        answer.insert(0, text[start:end])
    return word.join(dict.fromkeys(answer)) if answer else None  # the same box twice is one answer


def _unicode_to_latex(text: str) -> str:
    parts = []
    for kind, characters in groupby(text.translate(SYMBOLS), lambda c: unicodedata.decomposition(c).partition(" ")[0]):
        plain = unicodedata.normalize("NFKC", "".join(characters))
        plain = {"<super>": f"^{{{plain}}}", "<sub>": f"_{{{plain}}}"}.get(kind, plain)
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
    text = re.sub(r"\\?[$€£¥]|(?<!\\)\\[()\[\]]", "", text)  # currency, delimiters; not \\[2pt], the end of a row
    text = text if text.isascii() else _unicode_to_latex(text)
    text = re.sub(rf"^\s*{FONT.pattern}[.\s]*$", lambda m: m[1] if re.search(r"\d", m[1]) else m[0], text)
    text = re.sub(r"(?<=\d)(?:,\\!|\\!,?|\{,\})\s*(?=\d{3}(?!\d))", "", text)  # 1,\!000 and 1{,}000
    text = re.sub(r"(?<=[ct}])\{\d{1,3}(?:,\d{3})+\}", lambda match: match[0].replace(",", ""), text)  # \frac{1,000}{3}
    text = re.sub(r"(?<!\\)\\[,;:! ]|~|\\q?quad\b", " ", text)
    text = re.sub(r"\\(?:[bB]igg?[lrm]?|displaystyle)(?![A-Za-z])|(?<=\\\\)\[\d+\w*\]", "", text)  # sizes, [2pt]
    text = re.sub(r"\\sqrt\s*(?:\(([^()]*)\)|(\d[\d.]*\d))", r"\\sqrt{\1\2}", text)  # √10 would be \sqrt{1}0
    text = text.replace(r"\degree", r"^\circ").replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}", _repeating, text)
    text = re.sub(r"\\(?:lor|vee)\b|\\(?:text\w*|mbox|mathrm)\s*\{[\s,]*or\s*\}", r"\\text{ or }", text)
    text = re.sub(r"\\(?:land|wedge)\b|\\(?:text\w*|mbox|mathrm)\s*\{[\s,]*and\s*\}", r"\\text{ and }", text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", FACTORS.sub(r" \\cdot ", text))
    text = re.sub(r"(?<!\\right)[\s.,;:]+$", "", text.strip())  # the end of a sentence
    if DURATION.fullmatch(text):
        text = re.sub(r"(?<=\d)\s+([a-z]+)", r" \\text{ \1}", text)
    return described[1].strip() if (described := SET_OF.fullmatch(text.removeprefix(r"\left"))) else text


# ---- Two answers ----
def _canonical(text: str) -> str:
    """Return what two ways to write an answer have in common, apart from spaces, size and font."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", FONT.sub(r"\1", re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)))
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")  # 1 1/2 is not 11/2
    return text.lower() if re.fullmatch(r"[A-Za-z'-]{3,}", text) else text  # Even is even, but X is not x


def plain_number(text: str) -> Decimal | None:
    r"""Return the value of a plainly written number, else None.

    >>> plain_number("025") == 25, plain_number("1,000.0") == 1000, plain_number("1/2")
    (True, True, None)
    """
    match = NUMBER.fullmatch(text)  # also 8 \times 10^{-19}, to math-verify equal to 10^{-19}, and 1e-5, to it e - 5
    return Decimal(re.sub("[ ,]", "", match[1]) + "e" + (match[2] or "0")) if match else None


def rounds_to(value: Decimal, gold: str) -> bool:
    """Tell whether a number is the ground truth once it is rounded to the ground truth's digits.

    A rounded ground truth has three digits or more. It has a power of ten, or two decimals and no multiple of 1/8.

    >>> rounds_to(Decimal(20) / 3, "6.67"), rounds_to(Decimal("0.374"), "0.375"), rounds_to(Decimal("12.46"), "12.5")
    (True, False, False)
    """
    number = plain_number(gold)
    if number is None or len(number.as_tuple().digits) < 3:
        return False
    exponent = int(number.as_tuple().exponent)
    rounded = exponent > 0 or (exponent < -1 and 8 * number != int(8 * number))
    return rounded and abs(value - number) <= Decimal(5).scaleb(exponent - 1)


def _without_letter(answer: str, gold: str) -> tuple[str, str]:
    """Return what to compare of two answers that may be choices, as (C) 42: the letters, or else the values."""
    matches = (CHOICE.fullmatch(FONT.sub(r"\1", text).strip()) for text in (answer, gold))
    (letter, value), (right, truth) = (match.groups() if match else ("", "") for match in matches)
    if letter and right and not (letter == right and value and truth):
        return letter, right
    return value or answer, truth or gold


def same_text(answer: str, gold: str) -> bool | None:
    """Compare two normalized answers as text and as plain numbers; None: only math-verify can.

    >>> same_text("1000", "1,000.0"), same_text("6.667", "6.67"), same_text("2,5", "2.5"), same_text("x+1", "1+x")
    (True, True, True, None)
    """
    if _canonical(answer) == _canonical(gold):
        return True
    clock, gold_clock = (CLOCK.fullmatch(FONT.sub(r"\1", text)) for text in (answer, gold))
    if clock and gold_clock and ":" in answer + gold:  # else math-verify's ratio
        hours = [[*map(int, re.findall(r"\d+", match[1])), 0, 0][:3] for match in (clock, gold_clock)]
        return hours[0] == hours[1] and _same_words(_left_out(clock[2])[0], _left_out(gold_clock[2])[0])
    value, number = plain_number(answer), plain_number(gold)
    if value is not None and number is not None:
        more_digits = int(value.as_tuple().exponent) < int(number.as_tuple().exponent)
        equal = value == number or (more_digits and rounds_to(value, gold))
        return equal and _same_words(_left_out(answer)[0], _left_out(gold)[0])
    # One may have a percent sign that the other lacks, or a decimal comma for its point: 2,5 is 2.5.
    for one, other in ((answer, number), (gold, value)):
        comma = one.replace(",", ".") if re.fullmatch(r"-?[0-9]+,[0-9]+", one) else ""
        if other is not None and other in (plain_number(one.rstrip(r" \%")), plain_number(comma)):
            return True
    products = all(re.fullmatch(r"[A-Z]{3,}", FONT.sub(r"\1", text)) for text in (answer, gold))
    return False if products else None  # to math-verify BADC is ABCD


def _left_out(text: str, read: str = "") -> tuple[list[str], list[str]]:
    """Return the words of an answer, and its digits and commas, that are not in the part that math-verify has read."""
    tokens: list[list[str]] = []
    for part in (text, read):
        part = re.sub(r"\\[lc]?dots|\.{3}", "…", UNIT.sub("", part))
        part = re.sub(r"\\[A-Za-z]+", " ", re.sub(r"(?<=[A-Za-z])\.", "", part)).lower()
        tokens.append(re.findall(r"\d|[,;…]|[a-z]+", re.sub("(?<=[a-z])/(?=[a-z])", " per ", part)))
    edits = SequenceMatcher(None, tokens[0], tokens[1], autojunk=False).get_opcodes()
    left = [token for kind, start, end, *_ in edits if kind in ("delete", "replace") for token in tokens[0][start:end]]
    return [x for x in left if x.isalpha() and x not in IDLE], [x for x in left if not x.isalpha()]


def _same_words(ones: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether the fewer words are among the more, as they are, or a plural, or abbreviated: cm for centimeters."""
    def same(one: str, other: str) -> bool:
        short, long = sorted((one, other), key=len)
        shortens = 2 * len(short) - 1 <= min(7, len(long)) and len(long) > 2 and re.match(".*".join(short), long)
        return bool(shortens) or long == short or (len(short) > 1 and long in (short + "s", short + "es"))

    few, many = sorted((ones, others), key=len)
    among = all(any(same(word, other) for other in many) for word in few)
    return ("not" in few) == ("not" in many) and (among or same("".join(few), "".join(many)))


def _as_set(parsed: Any, joints: set[str]) -> Any:
    """Return the set that inequalities in one variable describe, perhaps joined by "or" or "and"; all else as it is."""
    import sympy
    chain = [parsed] if isinstance(parsed, sympy.And) and not parsed.atoms(sympy.Eq) else []
    parts = parsed.args if isinstance(parsed, sympy.FiniteSet) and len(joints) == 1 else chain
    with suppress(NotImplementedError):  # \sin x < 1
        if parts and all(isinstance(x, sympy.Rel | sympy.And) for x in parts) and len(parsed.free_symbols) == 1:
            found = (sympy.Union if "or" in joints else sympy.Intersection)(*(part.as_set() for part in parts))
            return parsed if found.is_empty else found  # p < 1 and p > 3 are two lists
    return parsed


def _agree(one: Any, other: Any, braces: bool) -> bool | None:
    """Compare what math-verify takes for equal again: exact values, floats to a ten-thousandth, sets in braces."""
    import sympy
    if isinstance(one, sympy.Rel) and isinstance(other, sympy.Rel) and one.lhs != other.lhs:
        return None
    one, other = pair = [x.rhs if isinstance(x, sympy.Rel) else x for x in (one, other)]
    if all(isinstance(x, sympy.FiniteSet | sympy.Tuple | sympy.Interval | sympy.MatrixBase) for x in pair):
        parts = [x.args[:2] if isinstance(x, sympy.Interval) else list(x) for x in pair]
        found = [{_agree(x, y, braces) for y in parts[1]} for x in parts[0]]
        mixed = braces and isinstance(one, sympy.FiniteSet) != isinstance(other, sympy.FiniteSet)
        return not mixed and all(True in verdicts or False not in verdicts for verdicts in found)
    if not all(isinstance(x, sympy.Expr) for x in pair) or one == other or one.free_symbols != other.free_symbols:
        return one == other or None
    tolerance = sympy.Rational(1, 10_000 if one.has(sympy.Float) or other.has(sympy.Float) else 10**40)
    at = {symbol: sympy.Rational(17 + 10 * i, 10) for i, symbol in enumerate(sorted(one.free_symbols, key=str))}
    one, other = (x.evalf(60, subs=at) if at else x.doit() for x in pair)
    with suppress(TypeError, ValueError, ArithmeticError):  # no number
        gap = one - other
        return bool(gap == 0) if gap.is_Rational else not abs(gap.evalf()) > tolerance * abs(other.evalf())
    return None


def same_mathematics(answer: str, gold: str) -> bool:
    """Compare two normalized answers by math-verify. May take for ever: only for a process that can be killed."""
    from math_verify import LatexExtractionConfig, parse, verify
    if answer.endswith("%") and gold.endswith("%"):
        answer, gold = answer.rstrip(r"\%"), gold.rstrip(r"\%")
    answer, gold = (re.sub(r"^0?\.5$", "0.50", text) for text in (answer, gold))  # 0.5 would be read as \frac{1}{2}
    # In a box: bare text goes by worse rules. Only LaTeX: bare arithmetic ends in eval. A time-out would be a False.
    target, truth = (parse(rf"\boxed{{{t}}}", [LatexExtractionConfig()], parsing_timeout=None) for t in (answer, gold))
    if not (target and truth):
        return False
    (words, digits), (gold_words, gold_digits) = _left_out(answer, target[-1]), _left_out(gold, truth[-1])
    if digits != gold_digits or not _same_words(words, gold_words):
        return False
    one, other = read = [target[0], truth[0]]
    joints = [{*re.findall(r"\b(?:or|and)\b", text)} for text in (answer, gold)]
    sets = [_as_set(*pair) for pair in zip(read, joints, strict=True)]
    lists = sets[1] is other or (sets[0] is one and joints[0] in (joints[1], set()))  # "and" is not "or"
    exact = "%" not in answer + gold
    for x, y in [sets, read] if lists and sets != read else [sets]:
        if verify(y, x, timeout_seconds=None, allow_set_relation_comp=True):
            return not exact or _agree(x, y, r"\{" in answer + gold) is not False
    with suppress(ArithmeticError, ValueError, TypeError):  # too large for sympy, or infinite
        if "." in answer + gold and exact and getattr(one, "is_number", False) and one.is_real:
            return rounds_to(Decimal(str(one.evalf(20))), gold)
    return False


# ---- The ground truth ----
def _prose(text: str) -> int:
    """Count words, but no letters between operators, which are a product, and no condition after mathematics."""
    text = re.sub(r"\\[A-Za-z]+", " ", FONT.sub(r" \1 ", text))
    head = re.split(r",?\s*\b(?:where|for|with|if|when)\b", text)[0]
    parts = ([re.findall(r"\b(?!and\b)[A-Za-z]['a-z]+", x) for x in re.split(r"[-+*/=^<>\d]", y)] for y in (head, text))
    before, words = (sum(len(found) for found in part if len(found) > 1) for part in parts)
    return words if before or not head.strip() else 0


def _read_golds(answers: object) -> tuple[list[str], str]:
    """Return the usable ground truths, normalized, and what is wrong with the last unusable one."""
    golds: list[str] = []
    fault = "is empty"
    for answer in answers if isinstance(answers, list | tuple) else [answers]:
        if isinstance(answer, float) and math.isfinite(answer):
            answer = int(answer) if answer.is_integer() else f"{answer:.15g}"  # 0.30000000000000004 was 0.3
        full = re.split(r"####(?=[^\n]+\Z)", str(answer))[-1]  # of a whole solution; or it boxes or states its answer
        text = [part for part in (full, *STATED.findall(full), boxed_answer(full)) if part is not None][-1]
        text += "}" * (len(re.findall(r"(?<!\\)\{", text)) - len(re.findall(r"(?<!\\)\}", text)))  # as in a box
        text = text if TOO_BIG.search(text.strip()) else normalize(text)
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            fault = "is no text or finite number"
        elif not re.search(r"[^\W_]|[^\x00-\x7f]|\\\{", text):
            fault = "has nothing to compare with"
        elif TOO_BIG.search(text):
            fault = "is too long or too deeply nested"
        elif _prose(text) > 5 and not CHOICE.fullmatch(FONT.sub(r"\1", text)):
            fault = "is no mathematics, choice or text of at most five words"
        else:
            golds += dict.fromkeys([text, *re.split(r"\s*\\text\s*\{\s*OR\s*\}\s*", text)])
    return golds, fault


def check_answer(answers: object) -> str | None:
    """Say why a ground truth, or every one of a list, is unusable; None if it can be graded against.

    >>> check_answer(" "), check_answer([142.0, ""])
    ("answer ' ' has nothing to compare with: leave the problem out", None)
    """
    golds, fault = _read_golds(answers)
    return None if golds else f"answer {answers!r:.60} {fault}: leave the problem out"


def _decide(item: Item, require_think: bool) -> Grade | list[tuple[str, str]]:
    """Grade one response by text and plain numbers; else return (answer, ground truth) pairs for math-verify."""
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
    verdicts = {pair: same_text(*pair) for pair in (_without_letter(answer, gold) for gold in golds)}
    if True in verdicts.values():
        return Grade(1.0, "correct")
    return [pair for pair, verdict in verdicts.items() if verdict is None] or Grade(0.0, "wrong")


# ---- Worker processes ----
class RewardPool(AbstractContextManager["RewardPool"]):
    """Grade many responses in worker processes that no answer can hang.

    A worker starts when text and plain numbers do not decide, and stays until `close`. It ends itself when one answer
    takes it more than `timeout` seconds or `memory_gb`. That answer gets 0, the next one a new worker.
    With `function`, as in "module:function", workers call function(response, answer, problem) -> float instead, once
    for each of several ground truths. The highest reward counts. An error that the function raises is a RewardError.
    """

    def __init__(self, workers: int = 2, timeout: float = 3.0, require_think: bool = True, memory_gb: float = 4.0,
                 function: str | None = None) -> None:  # fmt: skip
        self._require_think, self._function, self._closed = require_think, function, False
        self._command = [sys.executable, __file__, "--worker", str(timeout), str(memory_gb), function or ""]
        self._threads = ThreadPoolExecutor(workers)
        self._workers: dict[int, Any] = {}  # each thread's Popen object
        if function:
            self._threads.submit(self._start).result()  # a name that does not exist is found here

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Return one grade for each (response, answers, truncated), in order."""
        futures = [self.submit(item) for item in items]
        return [future.result() for future in futures]

    def submit(self, item: Item, problem: Any = None) -> Future[Grade]:
        """Begin to grade one (response, answers, truncated). The problem, a dataclass or dict, is for the function."""
        if self._function:
            fields = problem if problem is None or isinstance(problem, dict) else asdict(problem)
            return self._threads.submit(self._ask, [item[0], item[1], fields], item[2])
        decided = _decide(item, self._require_think)
        if not isinstance(decided, Grade):
            return self._threads.submit(self._ask, decided)
        known: Future[Grade] = Future()
        known.set_result(decided)
        return known

    def close(self) -> None:
        """End the workers and what they started. What is not graded yet is cancelled."""
        self._closed = True
        for worker in list(self._workers.values()):
            worker.kill()  # so that the thread that waits for it returns
        self._threads.shutdown(cancel_futures=True)
        for thread in list(self._workers):
            self._stop(thread)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, task: list[Any], truncated: bool = False) -> Grade:
        thread = get_ident()
        for _ in range(2):  # once more if somebody else kills the worker
            if thread in self._workers and self._workers[thread].poll() is not None:  # it was killed while idle
                self._stop(thread)
            worker = self._workers.get(thread) or self._start()
            with suppress(BrokenPipeError):  # it died this moment, as the missing reply will say
                worker.stdin.write(json.dumps(task) + "\n")
                worker.stdin.flush()
            reply = json.loads(worker.stdout.readline() or "null")
            if isinstance(reply, str):
                raise RewardError(reply)
            if reply is not None:
                return Grade(reply, "correct" if reply >= 1 else "truncated" if truncated and reply <= 0 else "wrong")
            if self._stop(thread):
                break
        return Grade(0.0, "timeout")

    def _start(self, tries: int = 5) -> Any:
        # Not multiprocessing, which would import torch again. In a session of its own, which Ctrl-C does not reach.
        worker: Any = Popen(self._command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
        self._workers[get_ident()] = worker
        if self._closed:
            worker.kill()  # close may have missed it
        reply = json.loads(worker.stdout.readline() or "null")
        if reply == "ready":
            return worker
        if not (self._stop(get_ident()) or reply or self._closed) and tries > 1:  # somebody else killed it
            return self._start(tries - 1)
        shown = f"a reward worker did not start: `{' '.join(self._command)}` shows why"
        raise CancelledError() if self._closed else RewardError(reply or shown)

    def _stop(self, thread: int) -> bool:
        """Kill a thread's worker and what it started. Return whether the worker had ended itself before."""
        worker = self._workers.pop(thread)
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()  # closes its pipes and waits
        return worker.returncode >= 0 or worker.returncode == -signal.SIGALRM


def _work(timeout: float, memory_gb: float, function: str = "") -> None:
    """Do the tasks that come on stdin, one JSON line each, until it closes. Reply with a number, or what failed."""
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)  # shows where an import hangs
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # deadly even inside C code
    cap, hard = int(memory_gb * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (cap if hard < 0 else min(cap, hard), hard))
    tasks, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a library reads is no task
    os.dup2(2, 1)  # and what it prints is no reply
    os.register_at_fork(after_in_child=replies.close)  # or the parent would wait for what a function forks
    if function:
        sys.path.insert(0, os.getcwd())
        module, _, name = function.partition(":")
        try:
            score = getattr(importlib.import_module(module), name)
            if not callable(score):
                raise TypeError(f"{score!r:.60} is no function")
        except (Exception, SystemExit) as error:  # whatever the user's module raises is for the user to read
            why = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(f"reward is {function}: {why}: give module:function, here or in a package"), file=replies)
            return
    else:
        logging.disable()  # math-verify logs whole answers
        same_mathematics("x", "x")  # so that it is imported
    faulthandler.cancel_dump_traceback_later()
    print('"ready"', file=replies)
    for line in tasks:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        if function:  # which may set an alarm of its own in place of this one, as math-verify's time-out does
            faulthandler.dump_traceback_later(timeout + 1, exit=True)
        try:
            task = json.loads(line)
            reply: float | str = _highest(score, *task) if function else float(any(starmap(same_mathematics, task)))
        except MemoryError:
            return
        except (Exception, SystemExit) as error:  # it ends the run: a reward that fails must not pass for 0
            file, number, *_ = traceback.extract_tb(error.__traceback__)[-1]
            shown = f"{type(error).__name__}: {error}"[:300] + f" ({os.path.basename(file)}, line {number})"
            reply = f"reward is {function}: it raised {shown}: mend it, or let it return 0"
            if not function:  # that sympy fails on a strange answer only says that the answer is not right
                print(f"reward: {shown} in the comparison of {line[:200]}", file=sys.stderr)
                reply = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies)


def _highest(score: Callable[..., float], response: str, answers: Any, fields: dict[str, Any] | None) -> float:
    choices = answers if isinstance(answers, list) else [answers]
    problem = SimpleNamespace(**(fields or {"id": "", "text": "", "answers": choices, "system": None}))
    reward = max(float(score(response, answer, problem)) for answer in choices)
    if not math.isfinite(reward):
        raise ValueError(f"returned {reward}: return a finite number")
    return reward


if __name__ == "__main__":  # as a worker; tools/grade.py grades a file
    with suppress(BrokenPipeError):  # of a parent that is gone
        _work(float(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
