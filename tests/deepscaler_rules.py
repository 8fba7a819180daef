"""The rules by which the release graded, written anew: what reward.py is measured against.

Two answers are equal if they are the same text once normalized as for the MATH data set (Hendrycks et al., 2021), or
if sympy finds no difference after the normalization of PRM800K (Lightman et al., 2023). Needs pylatexenc.

Source: github.com/agentica-project/deepscaler, rewards/math_utils, which the release carries; both sets of rules are
also in verl (utils/reward_score/prime_math), whose functions gave the same verdicts on every pair tried.
"""
import contextlib
import re

import sympy
from pylatexenc.latex2text import LatexNodes2Text
from sympy.parsing import sympy_parser

UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
TOO_HARD = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")


def normalize_math(answer: str) -> str:
    """Normalize as for MATH; what these rules cannot read stays as it is."""
    answer = answer.strip()
    inside = re.search(r"^\\text\{(.+?)\}$", answer)
    text = answer = inside[1].strip() if inside else answer
    for old, new in [("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""),
                     (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")]:  # fmt: skip
        text = text.replace(old, new)
    if text.count(r"\text{ ") > 1:
        return answer
    text = text.partition(r"\text{ ")[0].replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = re.sub(r"^\.", "0.", text)
    left, equals, right = text.partition("=")
    text = right if equals and "=" not in right and len(left) <= 2 else text
    if re.search(r"\\sqrt$", text):
        return answer
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    parts = text.split(r"\frac")
    if "" in parts[1:]:
        return answer
    if all(part[0] == "{" or len(part) > 1 for part in parts[1:]):
        text = parts[0] + "".join(r"\frac" + re.sub(r"^([^{])(\{|.)", _braces, part) for part in parts[1:])
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)$", r"\\frac{\1}{\2}", text)


def _braces(match: re.Match[str]) -> str:
    return f"{{{match[1]}}}" + (match[2] if match[2] == "{" else f"{{{match[2]}}}")


def normalize_sympy(answer: str) -> str:
    """Normalize as for PRM800K, to something that sympy may read."""
    inside = re.search(r"^\\text\{(.+?)\}$", answer)
    text = inside[1] if inside else answer
    for old, new in [(r"\%", ""), (r"\$", ""), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "),
                     ("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12")]:  # fmt: skip
        text = text.replace(old, new)
    for unit in UNITS.split():
        text = re.sub(rf"{unit}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text and text[0] == "{" and text[-1] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if (value := _number(text)) is not None and _whole(value):
        text = str(round(value))
    if "\\" in text:
        with contextlib.suppress(Exception):
            text = _latex_to_text(text)
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text).replace(" ", "")
    text = text.replace("{", "").replace("}", "").lower()
    return str(int(float(text.replace(",", "")))) if _is_integer(text) else text


def _latex_to_text(text: str) -> str:
    text = text.replace(r"\tfrac", r"\frac").replace(r"\dfrac", r"\frac").replace(r"\frac", r" \frac")
    text = LatexNodes2Text().latex_to_text(text)
    for old, new in [("√", "sqrt"), ("π", "pi"), ("∞", "inf"), ("∪", "U"), ("·", "*"), ("×", "*")]:
        text = text.replace(old, new)
    return text.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(value: float) -> bool:
    try:
        return abs(value - round(value)) <= 1e-7
    except (OverflowError, ValueError):
        return False


def _join_thousands(text: str) -> str:
    while (joined := re.sub(r"(\d)(,)(\d\d\d)($|\D)", r"\1\3\4", text)) != text:
        text = joined
    return text


def _is_integer(text: str) -> bool:
    value = _number(_join_thousands(text))
    return value is not None and _whole(value)


def _elements(text: str) -> list[str]:
    text = _join_thousands(text)
    in_brackets = len(text) > 2 and text[0] in "()[]" and text[-1] in "()[]"
    if in_brackets and not re.search(r"[()[\]]", text[1:-1]):
        return [element.strip() for element in text[1:-1].split(",")]
    return [text] if text else []


def _no_difference(gold: str, answer: str) -> bool:
    difference = f"({gold})-({answer})"
    letters = {c for c in difference.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2 or TOO_HARD.search(difference):
        return False
    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    with contextlib.suppress(Exception):
        parsed = sympy_parser.parse_expr(difference.replace("^", "**"), transformations=rules)
        return bool(sympy.simplify(parsed) == 0)
    return False


def equal(answer: str, gold: str) -> bool:
    """Compare an answer with a ground truth. May take for ever, and runs what sympy's parser makes of the text."""
    if normalize_math(answer) == normalize_math(gold):
        return True
    one, other = normalize_sympy(gold), normalize_sympy(answer)
    if one == other or not other:
        return one == other
    golds, answers = _elements(one), _elements(other)
    if len(golds) != len(answers) or (len(golds) > 1 and (one[0] != other[0] or one[-1] != other[-1])):
        return False
    fraction = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
    for true, given in zip(golds, answers, strict=True):
        if fraction.search(true) and fraction.search(given):
            same = true == given  # so that a fraction must be reduced
        else:
            same = _is_integer(true) == _is_integer(given) and _no_difference(true, given)
        if not same:
            return False
    return bool(golds)


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, complete or not."""
    start = text.rfind(r"\boxed")
    if start < 0:
        return None
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[start + 7 : i] if text.startswith(r"\boxed{", start) else None
    return None
