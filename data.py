"""Problems in, prompts out: load and validate problems, encode prompts, walk over epochs.

A problem comes from a jsonl, json or parquet file, a hub data set or the toy world below. What is wrong with a row is
said at once, with file, row, value and fix: a problem without its answer, or two problems with one id, would train
without an error and teach nonsense.

Left out: models (a tokenizer is all that a prompt needs), grading (`reward.py`), mixing and weighting of data sets,
streaming (40,000 problems fit in memory), images, tool calls, conversations of several turns.
"""
from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import sqlite3
import sys
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

from polaris_mini import Config, Problem, Rollout

if TYPE_CHECKING:  # importing transformers takes seconds, which a typo in a file name should not cost
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Row = TypeVar("Row")
Chat = list[dict[str, str]]


class DataError(ValueError):
    """Say in one line what is wrong with the input, where, and what would be right."""


def read_options(kind: Any, arguments: Sequence[str], program: str, **settings: Any) -> Any:
    """Parse a command line by tyro.

    Raises: DataError that says in one line what is wrong, and which options are meant.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=program, **settings)
    except SystemExit as ended:
        if ended.code == 0:  # --help
            raise
    lines = [line.strip("│| ") for line in said.getvalue().splitlines()[1:-1]]  # in a box, under a title
    end = next((i for i, line in enumerate(lines) if re.match("──|---", line)), len(lines))
    meant = [line for line in lines[end:] if line.startswith("--")]
    raise DataError("; ".join([" ".join(lines[:end]), *meant, f"see python {program} --help"]))


# ----------------------------------------------------------------- loading problems


def load_problems(
    source: str, *, check_answers: Callable[[Sequence[str]], str | None] = lambda answers: None,
    skip_bad_rows: bool = False, seed: int = 0,
) -> list[Problem]:
    """Load the problems of a jsonl, json or parquet file, of a hub data set (`owner/name`, `owner/name:split`), or toy.

    Two layouts are known: columns `problem` (or `question`) and `answer` (or `answers`), with optional `id` or `index`,
    `system` and `pass_rate` or `difficulty` ("3/8"); and verl's `prompt`, `reward_model.ground_truth`, with optional
    `extra_info.index` and `extra_info.pass_rate`. A row without an id gets one from its text, so that it keeps it when
    the file is sorted or cut. `check_answers` says why answers cannot be graded, or None.

    Raises: DataError. With skip_bad_rows, unusable rows are left out and counted on stderr.
    """
    if source in TOY_TERMS:
        return toy_problems(TOY_PROBLEMS, seed, TOY_TERMS[source])
    places: dict[str, str] = {}  # id -> where it was first seen

    def convert(placed_row: tuple[str, object]) -> Problem:
        place, row = placed_row
        problem = _problem(row, place)
        if problem.id in places:
            raise DataError(f"{place}: id is {problem.id}, as in {places[problem.id]}: "
                            "make the ids (or, where none are given, the problem texts) unique")
        places[problem.id] = place
        if (fault := check_answers(problem.answers)) is not None:
            raise DataError(f"{place}: {fault}")
        return problem

    return _convert_all(_rows(source), convert, source, skip_bad_rows)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jsonl file of our own, without a last line that a kill cut short; nothing if there is no file."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append to a jsonl file of our own, in place of a last line that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.tell()
        while end > 0:  # back to the end of the last whole line
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _convert_all(
    rows: Iterable[Row], convert: Callable[[Row], Problem], source: str, skip_bad_rows: bool
) -> list[Problem]:
    problems: list[Problem] = []
    errors: list[DataError] = []
    for row in rows:
        try:
            problems.append(convert(row))
        except DataError as error:
            if not skip_bad_rows:
                raise DataError(f"{error}; or leave such rows out with --skip-bad-rows") from None
            errors.append(error)
    if not problems:
        found = f"none of the {len(errors)} rows can be used, first: {errors[0]}" if errors else "is empty"
        raise DataError(f"{source}: {found}; give at least one problem")
    if errors:
        total = len(problems) + len(errors)
        print(f"warning: {source}: {len(errors)} of {total} rows left out, first: {errors[0]}", file=sys.stderr)
    return problems


def _rows(source: str) -> Iterator[tuple[str, object]]:
    """Yield each row with its place; a row that cannot even be parsed is yielded as its DataError."""
    path = Path(source)
    if path.exists() or source.endswith(tuple(READERS)) or source.startswith((".", "/")):
        return _file_rows(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:\S+)?", source):
        return _hub_rows(source)
    raise DataError(f"{_shown(source)} is neither a file nor the name of a hub data set: give a file "
                    f"({', '.join(READERS)}) or owner/name")


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{source}: is no file, and cannot be loaded from the hub ({_one_line(error)}): check name, "
                        "split (owner/name:split) and connection, or download it and give the file") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    if not path.is_file():
        raise DataError(_what_is_there_instead(path))
    reader = next((read for suffix, read in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise DataError(f"{path}: the suffix {path.suffix or 'is missing and'} is not known: "
                        f"convert it to one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        return
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}): check or fetch the file again") from error


def _what_is_there_instead(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder: give one of the files in it"
    if not path.parent.is_dir():
        return f"{path}: there is no folder {path.parent}: check the path"
    close = difflib.get_close_matches(path.name, os.listdir(path.parent))
    advice = f"did you mean {' or '.join(close)}?" if close else "check the path"
    return f"{path}: there is no such file: {advice}"


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    # As bytes: text mode could stop at a wrong character between two lines, and hides which line it was.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield place, DataError(f"{place}: not JSON ({error}): write one object per line")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): rename it to .jsonl if it has one object per line") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_shown(rows)}: give a list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not parquet ({_one_line(error)}): check or fetch the file again") from error
    for number, row in enumerate(table.to_pylist(), start=1):  # to_pylist: from here on, plain Python values only
        yield f"{path}, row {number}", row


READERS = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _problem(row: object, place: str) -> Problem:
    fields = _fields(row, place)
    if "reward_model" in fields:
        system, text = _chat_prompt(_get(fields, ("prompt",), place), place)
        truth = _get(_fields(fields["reward_model"], f"{place}, reward_model"), ("ground_truth",), place)
    else:
        text = _get_text(fields, ("problem", "question"), place).strip()
        system = _get_text(fields, ("system",), place).strip() if fields.get("system") else None
        truth = _get(fields, ("answer", "answers"), place)
    problem_id = _given_id(fields, place) or hashlib.sha256(text.encode()).hexdigest()[:12]
    return Problem(problem_id, text, _answers(truth, place), _pass_rate(fields, place), system)


def _fields(row: object, place: str) -> dict[str, Any]:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{place}: is {_shown(row)}: give an object with named fields")
    return row


def _get(fields: Mapping[str, Any], names: Sequence[str], place: str) -> Any:
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise DataError(f"{place}: {' or '.join(names)} is missing (columns: {', '.join(fields) or 'none'}): "
                    "give it in every row")


def _get_text(fields: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    value = _get(fields, names, place)
    if not _is_text(value):
        raise DataError(f"{place}: {' or '.join(names)} is {_shown(value)}: give a text")
    return value


def _chat_prompt(turns: object, place: str) -> tuple[str | None, str]:
    """Return the system message, if any, and the user's."""
    if not isinstance(turns, list):
        raise DataError(f"{place}: prompt is {_shown(turns)}: give a list of chat messages")
    messages = [_fields(turn, f"{place}, prompt") for turn in turns]
    roles = [message.get("role") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(f"{place}: prompt has the turns {_shown(roles)}: give one user turn, after at most one system "
                        "turn (worked examples: --prompt-examples)")
    texts = [_get_text(message, ("content",), f"{place}, prompt").strip() for message in messages]
    return (texts[0] if len(texts) == 2 else None), texts[-1]


def _given_id(fields: Mapping[str, Any], place: str) -> str | None:
    extra = fields.get("extra_info")
    # The release's AIME25 file has extra_info.id where the others have extra_info.index.
    for found, name in ((extra, "index"), (extra, "id"), (fields, "id"), (fields, "index")):
        if isinstance(found, dict) and found.get(name) is not None:
            return _as_text(found[name], f"{place}: {name}")
    return None


def _answers(truth: object, place: str) -> tuple[str, ...]:
    values = truth if isinstance(truth, list) else [truth]
    if not values:
        raise DataError(f"{place}: answer is []: give at least one")
    return tuple(dict.fromkeys(_as_text(value, f"{place}: answer") for value in values))


def _as_text(value: object, field: str) -> str:
    """Write an answer or id as text: 142.0 is "142" (the release's AMC file has floats), 0.5 is "0.5"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)
    if _is_text(value):
        return value.strip()
    raise DataError(f"{field} is {_shown(value)}: give a text or a number")


def _is_text(value: object) -> TypeGuard[str]:
    # JSON can hold half a surrogate pair, which neither a tokenizer nor a file takes.
    return isinstance(value, str) and bool(value.strip()) and not re.search(r"[\ud800-\udfff]", value)


def _pass_rate(fields: Mapping[str, Any], place: str) -> float | None:
    extra = fields.get("extra_info")
    value = fields.get("pass_rate")
    if value is None and isinstance(extra, dict):
        value = extra.get("pass_rate")
    share = re.fullmatch(r"(\d+)/(\d+)", str(fields.get("difficulty")))  # MATH's difficulty, a level, is none
    if value is None and share and int(share[2]) > 0:
        value = int(share[1]) / int(share[2])
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise DataError(f"{place}: pass rate is {_shown(value)}: give a share from 0 to 1, or difficulty as \"3/8\"")
    return None if value is None else float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------- training and held-out problems


def hold_out(problems: Sequence[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Split into (training, held-out) problems, which share no text, however often it stands in the data.

    Whether a problem is held out depends on the seed and its id, not on its place in the file.
    """
    if count >= len(problems):
        raise DataError(f"--eval-problems is {count}: give less than the {len(problems)} problems there are")
    by_hash = sorted(problems, key=lambda problem: hashlib.sha256(f"{seed}:{problem.id}".encode()).digest())
    held_out = by_hash[:count]
    return remove_overlap(by_hash[count:], held_out), held_out


def remove_overlap(training: Sequence[Problem], evaluation: Sequence[Problem]) -> list[Problem]:
    """Return the training problems whose text is not in the evaluation."""
    known = {_normalised(problem.text) for problem in evaluation}
    left = [problem for problem in training if _normalised(problem.text) not in known]
    if not left:
        raise DataError("every training problem is also in the evaluation: give another --data or --eval-data")
    return left


def _normalised(text: str) -> str:
    # The release's evaluation files have the suffix in the text, its training files do not.
    return " ".join(text.replace(Config.prompt_suffix, "").casefold().split())


# ---------------------------------------------------------------------------- prompts

PLAIN_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ turn.content + '\n\n' }}"
    "{% elif turn.role == 'user' %}{{ 'Problem: ' + turn.content + '\nSolution:' }}"
    "{% else %}{{ ' ' + turn.content + '\n\n' }}{% endif %}"
    "{% endfor %}"
)  # for a base model, whose tokenizer has no chat template


@dataclass(frozen=True)
class WorkedExample:
    """A problem and a response to it, for the prompt or the warm start.

    The response is what follows the generation prompt: for a model that thinks, "thoughts</think>answer".
    """

    problem: str
    response: str


def load_worked_examples(path: str | Path) -> list[WorkedExample]:
    """Load a jsonl file with the columns `problem` and `response`.

    Raises: DataError.
    """
    examples = []
    for place, row in _file_rows(Path(path)):
        fields = _fields(row, place)
        problem, response = (_get_text(fields, (name,), place) for name in ("problem", "response"))
        examples.append(WorkedExample(problem.strip(), response))
    if not examples:
        raise DataError(f"{path}: is empty; give at least one worked example")
    return examples


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    suffix: str,
    examples: Sequence[WorkedExample] = (),
    max_prompt_tokens: int,
    skip_bad_rows: bool = False,
) -> list[Problem]:
    """Return the problems with their prompt_tokens: system, worked examples, problem and suffix, chat-templated.

    Raises: DataError if a prompt is too long. With skip_bad_rows, such problems are left out and counted on stderr.
    """

    unknown = None
    if tokenizer.chat_template == TOY_TEMPLATE:  # it reads sums, no words
        suffix, unknown = "", tokenizer.convert_tokens_to_ids("<|unk|>")

    def fill_in(encoded: tuple[Problem, list[int]]) -> Problem:
        problem, tokens = encoded
        if unknown in tokens:
            raise DataError(f"problem {problem.id}: is {_shown(problem.text)}, but the toy model reads sums only: "
                            "give another --model, or --data toy")
        if len(tokens) > max_prompt_tokens:
            raise DataError(f"problem {problem.id}: the prompt has {len(tokens)} tokens, more than {max_prompt_tokens}:"
                            " raise --max-prompt-tokens")
        return replace(problem, prompt_tokens=tuple(tokens))

    texts = _render([_chat(problem.text, problem.system, suffix, examples) for problem in problems], tokenizer)
    prompts = _tokenize(texts, tokenizer)
    return _convert_all(zip(problems, prompts, strict=True), fill_in, "prompts", skip_bad_rows)


def encode_example(
    example: WorkedExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    suffix: str,
    examples: Sequence[WorkedExample] = (),
) -> tuple[list[int], list[int]]:
    """Return (prompt tokens, response tokens), the response just as a model would generate it, with its end token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, so a response has no end: set it in tokenizer_config.json")
    text = _render([_chat(example.problem, None, suffix, examples)], tokenizer)[0]
    response = example.response
    if tokenizer.chat_template is None:
        response = " " + response  # as after "Solution:" in the plain template
    elif text.rstrip().endswith("<think>") and response.startswith("<think>"):
        response = response.removeprefix("<think>").lstrip()  # some templates open the thought, others leave it to us
    # The two are tokenized apart, as in generation, where the prompt's last token cannot change any more.
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    return _tokenize([text], tokenizer)[0], [*tokens, tokenizer.eos_token_id]


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the model thinks before it answers: its chat template knows `<think>`."""
    template = str(tokenizer.chat_template)  # None, a text, or several by name
    return "<think>" in template or "</think>" in template


def _chat(text: str, system: str | None, suffix: str, examples: Sequence[WorkedExample]) -> Chat:
    def user(text: str) -> dict[str, str]:
        # The release's evaluation files bring the suffix along. An empty suffix is in every text.
        return {"role": "user", "content": text if suffix in text else f"{text} {suffix}"}

    chat = [{"role": "system", "content": system}] if system else []
    for example in examples:
        chat += [user(example.problem), {"role": "assistant", "content": example.response}]
    return [*chat, user(text)]


def _render(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from jinja2 import TemplateError

    template = PLAIN_TEMPLATE if tokenizer.chat_template is None else None  # None: the tokenizer's own
    try:
        texts = tokenizer.apply_chat_template(
            chats, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses the prompts ({_one_line(error)}): a common reason is a "
                        "system message; take it out of the data") from error
    return cast(list[str], texts)


def _tokenize(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    token_lists = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    # A chat template writes its own BOS. Without one, add BOS alone: some tokenizers would add EOS as well.
    if tokenizer.chat_template is None and tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id:
        return [[tokenizer.bos_token_id, *tokens] for tokens in token_lists]
    return token_lists


# ----------------------------------------------------------- the order of the problems


class ProblemSampler:
    """Walk over the problems in batches, in a new order each epoch; no batch holds a problem twice.

    What is left of an epoch and too small for a batch is skipped. A resumed sampler neither repeats nor skips a batch.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = list(problems)
        self._seed = seed
        self._removed: set[str] = set()
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        return len(self.problems())

    def peek(self, count: int) -> list[Problem]:
        """Return the next batch without moving on."""
        epoch, start = self._next_start(count)
        order = self.problems()
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # depends on nothing else, so a resume can repeat it
        return order[start : start + count]

    def advance(self, count: int) -> None:
        """Move on past the next batch."""
        self._epoch, start = self._next_start(count)
        self._position = start + count

    def remove(self, ids: Collection[str], *, at_least: int) -> bool:
        """Drop problems for good and start a new epoch over the others; False, and no change, if too few are left."""
        if sum(problem.id not in ids for problem in self.problems()) < at_least:
            return False
        dropped = {problem.id for problem in self.problems()} & set(ids)
        if dropped:
            self._removed |= dropped
            self._epoch, self._position = self._epoch + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON can hold it."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position,
                "removed": sorted(self._removed), "problems": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler over the same problems was.

        Raises: DataError if the problems differ.
        """
        if state["problems"] != self._fingerprint():
            raise DataError("the problems are not those that this run began with: resume with the same data files and "
                            "the same --data, --eval-data, --eval-problems and prompt options")
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._removed = set(state["removed"])

    def problems(self) -> list[Problem]:
        """Return the problems that have not left."""
        return [problem for problem in self._problems if problem.id not in self._removed]

    def _next_start(self, count: int) -> tuple[int, int]:
        if count > len(self):
            raise DataError(f"--prompts-per-step is {count}, but only {len(self)} problems are there: lower it or give "
                            "more --data")
        if self._position + count > len(self):
            return self._epoch + 1, 0
        return self._epoch, self._position

    def _fingerprint(self) -> str:
        lines = "\n".join(f"{problem.id}\n{problem.text}" for problem in self._problems)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


class Sink(MutableMapping[str, Rollout]):
    """Keep the latest correct rollout of each problem on disk (None: in memory), where 30,000 long ones have room.

    Rows know their step, so that a run resumed at a checkpoint finds exactly what was there then.
    """

    def __init__(self, path: Path | None) -> None:
        self._pending: dict[str, Rollout] = {}
        try:
            # any thread: a hang is saved by the one that watches for it
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS rollouts (problem_id TEXT, step INTEGER, prompt_tokens BLOB, "
                "response_tokens BLOB, sampler_logprobs BLOB, text BLOB, finish_reason TEXT, reward REAL, reason BLOB, "
                "PRIMARY KEY (problem_id, step))")
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be used ({error}): check the folder and the disk, or, to go on without "
                            "the rollouts in it, delete the file") from error

    def __setitem__(self, problem_id: str, rollout: Rollout) -> None:
        self._pending[problem_id] = rollout

    def __getitem__(self, problem_id: str) -> Rollout:
        if problem_id in self._pending:
            return self._pending[problem_id]
        query = "SELECT * FROM rollouts WHERE problem_id = ? ORDER BY step DESC LIMIT 1"
        row = self._database.execute(query, (problem_id,)).fetchone()
        if row is None:
            raise KeyError(problem_id)
        _, _, prompt, response, logprobs, text, finish_reason, reward, reason = row
        return Rollout(problem_id, tuple(array("i", prompt)), array("i", response).tolist(),
                       array("d", logprobs).tolist(), text.decode(errors="surrogatepass"), finish_reason, reward,
                       reason.decode(errors="surrogatepass"))  # fmt: skip

    def __delitem__(self, problem_id: str) -> None:
        raise NotImplementedError("a sink forgets by rewind and prune only")

    def __iter__(self) -> Iterator[str]:
        stored = self._database.execute("SELECT DISTINCT problem_id FROM rollouts")
        return iter({problem_id for (problem_id,) in stored} | self._pending.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def commit(self, step: int) -> None:
        """Write what was set since the last commit, as of this step: all of it, or nothing if the process dies."""
        rows = (
            (problem_id, step, array("i", r.prompt_tokens).tobytes(), array("i", r.response_tokens).tobytes(),
             array("d", r.sampler_logprobs).tobytes(),  # 64 bits: what comes back is what was put in
             r.text.encode(errors="surrogatepass"), r.finish_reason, r.reward, r.reason.encode(errors="surrogatepass"))
            for problem_id, r in self._pending.items()
        )  # fmt: skip
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self._pending = {}

    def rewind(self, step: int) -> None:
        """Forget what came after this step."""
        self._pending = {}
        with self._database:
            self._database.execute("DELETE FROM rollouts WHERE step > ?", (step,))

    def prune(self, oldest_step: int) -> None:
        """Delete what no rewind to this step or a later one needs: what was replaced up to this step."""
        with self._database:
            self._database.execute(
                "DELETE FROM rollouts WHERE EXISTS (SELECT * FROM rollouts AS newer WHERE newer.problem_id = "
                "rollouts.problem_id AND newer.step > rollouts.step AND newer.step <= ?)", (oldest_step,))


# -------------------------------------------------------------------------- the toy world

TOY_SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOY_THINK = ["<think>", "</think>"]
TOY_WORDS = [*"0123456789", " + ", " = ", "\n", "\\boxed{", "}", "<|unk|>"]
TOY_TEMPLATE = (
    "{% for turn in messages %}"
    "{{ ('<|assistant|>' if turn.role == 'assistant' else '<|user|>') + turn.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


TOY_PROBLEMS = 768
TOY_TERMS = {"toy": range(2, 13), "toy-long": range(13, 19)}
"""Names of data sets -> number of terms of their sums."""
TOY_HARD = 0.3
"""Share of the sums of a last digit and a term that the warm start teaches wrong more often than right."""
TOY_WRONG = 0.65
"""How often it teaches those wrong."""
TOY_HASTE = 0.2
"""How often a line of working adds one term more than it must."""


def toy_cache() -> Path:
    """Return the folder that keeps toy models after their warm start."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polaris-mini"


def toy_problems(count: int, seed: int | str, terms: Sequence[int] = TOY_TERMS["toy"]) -> list[Problem]:
    """Make different sums such as "12 + 3 + 7", of so many terms from 1 to 12; the id is the text."""
    rng = random.Random(f"toy problems {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        numbers = [rng.randint(1, 12) for _ in range(rng.choice(terms))]
        text = " + ".join(map(str, numbers))
        problems[text] = Problem(text, text, (str(sum(numbers)),))
    return list(problems.values())


def toy_response(problem: Problem, rng: random.Random | None) -> str:
    r"""Work a toy problem out line by line, with the bad habits that GRPO is to undo; without them if rng is None.

    Some lines hastily add several terms at once, which a tiny model does worse. Some sums of a last digit and a term
    are mostly taught wrong, always by the same slip: greedy decoding repeats it, sampling now and then does not. So
    problems are 8/8, 0/8 or anything between, depending on the sums that are in them.

    >>> toy_response(Problem("", "12 + 3 + 7 + 4", ("26",)), random.Random(1))
    '12 + 3 + 7 = 22\n22 + 4 = 26\n</think>\n\\boxed{26}'
    """
    def happens(chance: float) -> bool:
        return rng is not None and rng.random() < chance

    total, *terms = map(int, problem.text.split(" + "))
    lines = []
    while terms:
        count = 1
        while count < len(terms) and happens(TOY_HASTE):
            count += 1
        result = total
        for term in terms[:count]:
            habit = random.Random(f"{result % 10} + {term}")
            hard, slip = habit.random() < TOY_HARD, habit.choice((-10, -1, 1, 10))
            wrong = hard and happens(TOY_WRONG) and result + term + slip > 0
            result += term + slip * wrong
        lines.append(f"{' + '.join(map(str, [total, *terms[:count]]))} = {result}\n")
        total, terms = result, terms[count:]
    return f"{''.join(lines)}</think>\n\\boxed{{{total}}}"


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 22 tokens; what it does not know becomes a visible `<|unk|>`, one per character."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*TOY_SPECIAL, *TOY_THINK, *TOY_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    pieces = Regex(r" \+ | = |\\boxed\{|.|\n")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    backend.decoder = decoders.Fuse()  # joins the pieces with nothing between them
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in TOY_SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in TOY_THINK])
    # <|unk|> is not declared here: as a special token it would vanish from decoded text, and 1<|unk|>2 would read 12.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TOY_TEMPLATE,
        extra_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
