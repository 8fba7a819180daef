"""Problems in, prompts out: load and check problems, encode prompts, walk over epochs, and keep files whole in a kill.

A wrong row is reported before training, with its place, value and fix: two problems with one id, say, would teach
nonsense without an error. Left out: mixing of data sets, streaming, images, tool calls, conversations of several turns.
"""
from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import mmap
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TYPE_CHECKING, TextIO

from polaris_mini import Common, Config, Problem, Rollout, UserError

if TYPE_CHECKING:  # importing transformers takes seconds, which a typo in a file name should not cost
    from transformers import PreTrainedTokenizerBase

HUB = re.compile(r"([\w-][\w.-]*/[^/:]+)(?::([^:[]*)(?=:))?(?::(.*))?")  # owner/name:configuration:split
SHARD = re.compile(r"(?!dataset_(?:dict|infos?)\.)[^._].*\.(?:parquet|jsonl?|jsonl\.gz)")
SPLIT = re.compile(r"(?:(?:train|test|validation|val|dev|eval)(?![A-Za-z]))?")
CheckAnswers = Callable[[Sequence[str]], str | None]  # says why answers cannot be graded; None if they can


# ----------------------------------------------------------- files that survive a kill
def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jsonl file of our own, without a last line that a kill cut short. A missing file has no lines."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append to a jsonl file of our own, in place of a last line that a kill cut short, and wait for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_lines(path)
    with path.open("ab") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    sync(path)


def forget_lines(path: Path, last: float = math.inf, order: str = "step") -> None:
    """Cut a log, whose lines are in order of step, back to the last one to keep; drop a line that a kill cut short."""
    if not path.exists() or path.stat().st_size == 0:  # an empty file has no map
        return
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as text:
        end = text.rfind(b"\n") + 1
        while last < math.inf and end > 0:  # backwards from the end, as a log can have gigabytes
            start = text.rfind(b"\n", 0, end - 1) + 1
            if json.loads(text[start:end])[order] <= last:
                break
            end = start
        file.truncate(end)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Let the caller fill a folder beside, then rename it, so that a folder of this name is always complete."""
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)  # a kill may have left it
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in [*beside.rglob("*"), beside]:
            sync(path)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # where the disk is full, perhaps
    sync(folder.parent)


def remove_whole(folder: Path) -> None:
    """Rename a folder and delete it, so that a folder of this name is never there in part."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.unfinished")))


def open_locked(path: Path) -> TextIO:
    """Open a file to append to, and keep other processes out of a run's folder as long as it is open."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run folder {path.parent}: another process is training in it; end that first") from None
    return file


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ------------------------------------------------------------------- loading problems
def load_problems(source: str, *, check_answers: CheckAnswers = lambda answers: None,
                  skip_bad_rows: bool = False) -> list[Problem]:  # fmt: skip
    """Load the problems of a file or a hub data set. Raises: UserError; skip_bad_rows warns of bad rows instead."""
    found: dict[str, tuple[Problem, str]] = {}  # by id, each with its place
    errors: list[UserError] = []
    for place, record in read_records(source):
        try:
            problem = to_problem(record, place)
            fault = check_answers(problem.answers)
            if problem.id in found:
                fault = (f"id is {problem.id}, as in {found[problem.id][1]}: "
                         "make the ids (or, where none are given, the problem texts) unique")
            if fault is not None:
                raise UserError(f"{place}: {fault}")
            found[problem.id] = problem, place
        except UserError as error:
            if not skip_bad_rows:
                raise UserError(f"{error}; or leave such rows out with --skip-bad-rows") from None
            errors.append(error)
    if errors:
        print(f"warning: {source}: {len(errors)} rows left out, first: {errors[0]}", file=sys.stderr)
    if not found:
        raise UserError(f"{source}: has no row that can be used: give at least one problem")
    return [problem for problem, _ in found.values()]


def read_records(source: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, a folder or a hub data set (as the error says) with places; of jsonl as bytes."""
    name, _, split = source.rpartition(":") if ":" in source and not Path(source).exists() else (source, "", "")
    path = Path(name if Path(name).is_dir() else source)
    try:
        saved = path / (split or "train") if (path / "dataset_dict.json").exists() else path
        if (saved / "state.json").exists() and (saved != path or split in ("", "train")):  # by save_to_disk
            from datasets import load_from_disk
            rows = load_from_disk(saved)
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if SHARD.fullmatch(file.name))
            named = {file: SPLIT.findall(file.name)[0] for file in files}
            rows = [f for f in files if named[f] == (split or "train")] or [f for f in files if not (split or named[f])]
            if len({file.suffix for file in rows}) != 1:
                raise ValueError(f"a folder needs files of one kind{f' that begin with {split}' * bool(split)}"
                                 f", and has {sorted(file.name for file in path.iterdir())!s:.200}")
        elif path.suffix == ".parquet":
            from pyarrow import parquet
            rows = parquet.ParquetFile(path).read().to_pylist()
        elif path.suffix == ".json":  # not by `datasets`: beside an answer 1 it reads "2.50" as the number 2.5
            rows = list(json.loads(path.read_bytes()))
        elif path.exists() or path.suffix in (".jsonl", ".gz") or not (hub := HUB.fullmatch(source)):
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                rows = list(file)
        else:
            from datasets import load_dataset
            rows = load_dataset(hub[1], hub[2] or None, split=hub[3] or "train")
    except Exception as error:  # each library has its own
        raise UserError(f"{source}: cannot be read ({' '.join(str(error).split())}): give a .jsonl, .jsonl.gz, .parquet"
                        " or .json file (a list), a folder of them or of save_to_disk (perhaps with :split), or a hub "
                        "data set (owner/name, owner/name:split or owner/name:configuration:split)") from error
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Path):
            yield from read_records(str(row))
        elif not isinstance(row, bytes) or row.strip():  # an empty line is no record
            yield f"{source}, {'line' if isinstance(row, bytes) else 'row'} {number}", row


def to_problem(record: Any, place: str) -> Problem:
    """Make a problem of a record, or raise a UserError that names the place, the field, its value and the fix.

    Optional are `id` (or `index`), `system`, and `pass_rate` or `difficulty` ("3/8"), also in verl's `extra_info`. An
    id that is missing is made of the text, so that it stays the same when a file is sorted or cut.
    """
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}): write one object per line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: is {record!r:.80}: give an object with named fields")
    text = record.get("problem") or record.get("question")
    truth = record.get("answers") if record.get("answer") is None else record["answer"]
    system = record.get("system") or None
    match record:  # verl's layout
        case {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": truth}}:
            pass
        case {"prompt": [{"role": "system", "content": system}, {"role": "user", "content": text}],
              "reward_model": {"ground_truth": truth}}:
            pass
    if text is None or truth is None:
        raise UserError(f"{place}: columns are {', '.join(record)}: give problem (or question) and answer (or answers),"
                        " or verl's reward_model.ground_truth and prompt (a user turn, after at most one system turn)")
    extra = record["extra_info"] if isinstance(record.get("extra_info"), dict) else {}
    details = {name: value for part in (extra, record) for name, value in part.items() if value is not None}
    share = re.fullmatch(r"(\d+)/([1-9]\d*)", str(details.get("difficulty")))  # MATH's difficulty, a level, is none
    rate = details.get("pass_rate", int(share[1]) / int(share[2]) if share else None)
    if rate is not None and not (isinstance(rate, (int, float)) and 0 <= rate <= 1):
        raise UserError(f"{place}: pass rate is {rate!r:.80}: give a share from 0 to 1, or difficulty as \"3/8\"")
    text = _text(text, f"{place}: problem")
    truths = truth if isinstance(truth, list) and truth else [truth]
    texts = [_text(answer, f"{place}: answer") for answer in truths]  # of GSM8K's solutions only the last line counts
    answers = tuple(dict.fromkeys(re.split(r"####(?=[^\n]+\Z)", text)[-1].strip() for text in texts))
    system = None if system is None else _text(system, f"{place}: system")
    problem_id = details.get("id", details.get("index", hashlib.sha256(text.encode()).hexdigest()[:12]))
    return Problem(_text(problem_id, f"{place}: id"), text, answers, rate, system)


def _text(value: Any, field: str) -> str:
    """Return a text, or a number as text: 142.0 is "142" (the release's AMC file has floats), 0.5 is "0.5"."""
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        value = str(int(value) if value == int(value) else value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
        raise UserError(f"{field} is {value!r:.80}: give a text or a number")  # no file takes half a surrogate pair
    return value.strip()


def training_and_held_out(config: Config, check_answers: CheckAnswers) -> tuple[list[Problem], list[Problem]]:
    """Load the problems to train on and those of the evaluation, which share no text, however often it is there."""
    def normalise(text: str) -> str:  # the release's benchmarks have the suffix in the text, its training data does not
        return " ".join(text.replace(Config.prompt_suffix, "").casefold().split())

    checks: dict[str, Any] = {"check_answers": check_answers, "skip_bad_rows": config.skip_bad_rows}
    training, held_out = load_problems(config.data, **checks), []
    if config.eval_every >= 0 and config.eval_data is not None:
        held_out = load_problems(config.eval_data, **checks)
    elif config.eval_every >= 0:  # a problem is held out by the seed and its id, wherever in the file it stands
        training.sort(key=lambda problem: hashlib.sha256(f"{config.seed}:{problem.id}".encode()).digest())
        held_out, training = training[: config.eval_problems], training[config.eval_problems :]
    known = {normalise(problem.text) for problem in held_out}
    training = [problem for problem in training if normalise(problem.text) not in known]
    if len(training) < config.prompts_per_step:
        raise UserError(f"prompts_per_step is {config.prompts_per_step}, but {len(training)} training problems are left"
                        f" beside {len(held_out)} of the evaluation: lower it, or --eval-problems, or give more data")
    return training, held_out


# ---------------------------------------------------------------------------- prompts
PLAIN_TEMPLATE = (  # for a base model, whose tokenizer has no chat template
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ turn.content + '\n\n' }}"
    "{% else %}{{ 'Problem: ' + turn.content + '\nSolution:' }}{% endif %}{% endfor %}")


def encode_prompts(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, settings: Common) -> list[Problem]:
    """Return the problems with their prompt_tokens: system, problem and suffix in the chat template, thinking on."""
    if not problems:
        return []
    plain = tokenizer.chat_template is None
    turns = [chat(problem.text, problem.system, settings.prompt_suffix) for problem in problems]
    try:
        texts = tokenizer.apply_chat_template(turns, chat_template=PLAIN_TEMPLATE if plain else None, tokenize=False,
                                              add_generation_prompt=True, enable_thinking=True)
    except Exception as error:  # whatever is wrong in the template
        raise UserError(f"the model's chat template refuses the prompts, perhaps their system turn: {error}") from error
    token_lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # A chat template writes its own BOS. Without one, add BOS alone: some tokenizers would add EOS as well.
    bos = [tokenizer.bos_token_id] if plain and tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id else []
    encoded = [replace(p, prompt_tokens=(*bos, *tokens)) for p, tokens in zip(problems, token_lists, strict=True)]
    fitting = [problem for problem in encoded if len(problem.prompt_tokens) <= settings.max_prompt_tokens]
    if len(fitting) < len(encoded):
        longest = max(encoded, key=lambda problem: len(problem.prompt_tokens))
        fault = (f"{len(encoded) - len(fitting)} of {len(encoded)} prompts have more than {settings.max_prompt_tokens} "
                 f"tokens, that of problem {longest.id} {len(longest.prompt_tokens)}")
        if not settings.skip_bad_rows or not fitting:
            raise UserError(f"{fault}: raise --max-prompt-tokens, or leave such rows out with --skip-bad-rows")
        print(f"warning: {fault}: left out", file=sys.stderr)
    return fitting


def chat(problem_text: str, system: str | None, suffix: str) -> list[dict[str, str]]:
    """Return the turns of a prompt. The suffix is added unless the text has it, as the release's benchmarks do."""
    user = problem_text if suffix in problem_text else f"{problem_text} {suffix}"  # an empty suffix is in every text
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the model thinks before it answers: its chat template, or one of several, knows `<think>`."""
    return re.search("</?think>", str(tokenizer.chat_template)) is not None


# ----------------------------------------------------------- the order of the problems
class ProblemSampler:
    """Walk over the problems in batches, in a new order each epoch; no batch holds a problem twice.

    What is left of an epoch and too small for a batch is skipped. A resumed sampler neither repeats nor skips a batch.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = list(problems)
        self._seed = seed
        self._epoch = self._position = 0
        self._removed: set[str] = set()
        texts = json.dumps([(problem.id, problem.text) for problem in problems])
        self._fingerprint = hashlib.sha256(texts.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.problems())

    def problems(self) -> list[Problem]:
        """Return the problems that have not left."""
        return [problem for problem in self._problems if problem.id not in self._removed]

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
        dropped = {problem.id for problem in self.problems() if problem.id in ids}
        if len(self) - len(dropped) < at_least:
            return False
        if dropped:
            self._removed |= dropped
            self._epoch, self._position = self._epoch + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON can hold it."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position,
                "removed": sorted(self._removed), "problems": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler over the same problems was; a UserError if the problems differ."""
        if state["problems"] != self._fingerprint:
            raise UserError("the problems are not those that this run began with: resume with the same data files and "
                            "the same options of data, prompts and held-out problems (also --eval-every -1)")
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._removed = set(state["removed"])

    def _next_start(self, count: int) -> tuple[int, int]:
        if count > len(self):
            raise UserError(f"prompts_per_step is {count}, but only {len(self)} problems are there: give more data")
        return (self._epoch, self._position) if self._position + count <= len(self) else (self._epoch + 1, 0)


class Sink:
    """Keep the latest correct rollout of each problem for `polaris_mini.rescue`, in a JSON file per problem.

    The trainer saves `changes` in its checkpoint, then calls `write`; a resume writes them again. So no file is later
    than the checkpoint, and a step that is repeated after a kill finds what it found the first time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changes: dict[str, Rollout] = {}

    def __setitem__(self, problem_id: str, rollout: Rollout) -> None:
        self.changes[problem_id] = rollout

    def get(self, problem_id: str) -> Rollout | None:
        """Return the rollout of a problem, or None if it never had a correct one."""
        if problem_id in self.changes:
            return self.changes[problem_id]
        path = self._path(problem_id)
        if not path.exists():
            return None
        fields = json.loads(path.read_bytes())
        return Rollout(**fields | {"prompt_tokens": tuple(fields["prompt_tokens"])})

    def write(self) -> None:
        """Write the changes to their files."""
        for problem_id, rollout in self.changes.items():
            write_whole(self._path(problem_id), json.dumps(asdict(rollout)))
        self.changes = {}

    def _path(self, problem_id: str) -> Path:
        return self.folder / f"{hashlib.sha256(problem_id.encode()).hexdigest()}.json"
