"""Load real and broken problem files, encode prompts, and walk the sampler through a resume."""
from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import data
from data import DataError, ProblemSampler, Sink, WorkedExample
from polaris_mini import Config, Problem, Rollout

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the shared assets are not here")
TOKENIZERS = sorted(path.parent for path in ASSETS.rglob("tokenizer.json"))


def write(path: Path, *rows: object) -> str:
    """Write one line per row; a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(count: int) -> list[Problem]:
    return [Problem(f"id{i}", f"problem {i}", (str(i),)) for i in range(count)]


def verl_row(truth: object, **extra: object) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": " 1 + 1? "}], "reward_model": {"ground_truth": truth},
            "extra_info": extra}


# ------------------------------------------------------------------ files and layouts


@needs_assets
@pytest.mark.parametrize(("name", "count", "first"), [
    ("aime24", 30, "204"), ("aime25", 30, "70"), ("amc23", 83, "142"), ("minerva", 272, "9.6"), ("olympiad", 675, "2"),
])  # fmt: skip
def test_release_files_load_as_they_are(name: str, count: int, first: str) -> None:
    problems = data.load_problems(str(ASSETS / "benchmarks" / f"{name}.parquet"))
    assert len(problems) == len({problem.id for problem in problems}) == count
    assert problems[0].answers[0] == first
    assert [problem.id for problem in problems] == [str(i) for i in range(count)]
    assert all(answer == answer.strip() != "" for problem in problems for answer in problem.answers)
    assert not any(re.fullmatch(r"-?\d+\.0", problem.answers[0]) for problem in problems if name == "amc23")


@needs_assets
def test_deepscaler_needs_its_duplicates_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(ASSETS / "deepscaler_40k.jsonl.gz")
    with pytest.raises(DataError, match=r"line 46: id is .* line 45: .*--skip-bad-rows"):
        data.load_problems(source)
    assert len(data.load_problems(source, skip_bad_rows=True)) == 38642
    assert "1166 of 39808 rows left out, first: " in capsys.readouterr().err


@pytest.mark.parametrize(("row", "expected"), [
    ({"problem": "1+1?", "answer": "2\n", "id": "a"}, Problem("a", "1+1?", ("2",))),
    ({"question": "1+1?", "answers": ["2", " two", "2"], "index": 7}, Problem("7", "1+1?", ("2", "two"))),
    ({"problem": "1+1?", "answer": 2.0, "id": 3.0, "pass_rate": 0.25}, Problem("3", "1+1?", ("2",), 0.25)),
    ({"problem": "1+1?", "answer": 0.5, "id": "a", "difficulty": "3/8"}, Problem("a", "1+1?", ("0.5",), 0.375)),
    ({"problem": "1+1?", "answer": 2, "id": "a", "difficulty": 5.0}, Problem("a", "1+1?", ("2",))),
    ({"problem": "1+1?", "answer": 2, "id": "a", "system": " Be terse.\n"},
     Problem("a", "1+1?", ("2",), system="Be terse.")),
    ({"problem": "1+1?", "answer": 2, "id": "a", "system": None}, Problem("a", "1+1?", ("2",))),
    (verl_row(142.0, index=0), Problem("0", "1 + 1?", ("142",))),
    (verl_row("2", index=0, pass_rate=0.0), Problem("0", "1 + 1?", ("2",), 0.0)),
    (verl_row("2", index=0, pass_rate=0.25) | {"pass_rate": None}, Problem("0", "1 + 1?", ("2",), 0.25)),
    (verl_row("2", index=0, pass_rate=0.25) | {"pass_rate": 0.0}, Problem("0", "1 + 1?", ("2",), 0.0)),
    (verl_row(["9.6\n"], id=5, index=None), Problem("5", "1 + 1?", ("9.6",))),
    (verl_row("2", index=1) | {"prompt": [{"role": "system", "content": "Be terse."},
                                          {"role": "user", "content": "1+1?"}]},
     Problem("1", "1+1?", ("2",), system="Be terse.")),
])  # fmt: skip
def test_layouts(tmp_path: Path, row: dict[str, Any], expected: Problem) -> None:
    assert data.load_problems(write(tmp_path / "a.jsonl", row)) == [expected]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert data.load_problems(str(tmp_path / "a.json")) == [expected]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps(row))  # an empty line is no row
    assert data.load_problems(str(tmp_path / "a.jsonl.gz")) == [expected]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert data.load_problems(str(tmp_path / "a.parquet")) == [expected]


@pytest.mark.parametrize(("column", "answers"), [
    (pyarrow.array([Decimal("142.00"), Decimal("0.50")]), [("142",), ("0.50",)]),
    (pyarrow.array([142, 0.5], pyarrow.float32()), [("142",), ("0.5",)]),
    (pyarrow.array([["1", "2"], ["3"]], pyarrow.large_list(pyarrow.string())), [("1", "2"), ("3",)]),
    (pyarrow.array(["4", "5"]).dictionary_encode(), [("4",), ("5",)]),
])  # fmt: skip
def test_parquet_types(tmp_path: Path, column: pyarrow.Array, answers: list[tuple[str, ...]]) -> None:
    parquet.write_table(pyarrow.table({"problem": ["a", "b"], "answer": column}), tmp_path / "a.parquet")
    assert [problem.answers for problem in data.load_problems(str(tmp_path / "a.parquet"))] == answers


def test_id_comes_from_the_text_and_not_from_the_place(tmp_path: Path) -> None:
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]
    ids = {p.text: p.id for p in data.load_problems(write(tmp_path / "a.jsonl", *rows))}
    assert ids == {p.text: p.id for p in data.load_problems(write(tmp_path / "b.jsonl", *rows[::-1]))}
    assert ids["0 + 1?"] == "63041f96fbca"  # sha256: must never change, runs are resumed by it


# ------------------------------------------------------------------------- bad input

GOOD = {"problem": "1+1?", "answer": "2", "id": "good"}
BAD_ROWS: list[tuple[object, str]] = [  # the row, what the message says after the place
    ('{"problem": ', "not JSON .* write one object per line"),
    ("[1, 2]", r"is \[1, 2\]: give an object"),
    ({"text": "1+1?", "answer": "2"}, r"problem or question is missing \(columns: text, answer\): give it"),
    ({"problem": None, "answer": "2"}, "problem or question is missing"),
    ({"problem": " \n", "answer": "2"}, r"problem or question is ' \\n': give a text"),
    ({"problem": ["1+1?"], "answer": "2"}, r"problem or question is \['1\+1\?'\]: give a text"),
    ('{"problem": "\\ud800", "answer": "2"}', r"problem or question is '\\ud800': give a text"),
    ({"problem": "1+2?"}, r"answer or answers is missing \(columns: problem\): give it"),
    ({"problem": "1+2?", "answer": ""}, "answer is '': give a text or a number"),
    ({"problem": "1+2?", "answer": []}, r"answer is \[\]: give at least one"),
    ({"problem": "1+2?", "answer": ["3", None]}, "answer is None: give"),
    ({"problem": "1+2?", "answer": True}, "answer is True: give"),
    ({"problem": "1+2?", "answer": float("nan")}, "answer is nan: give"),
    ({"problem": "1+2?", "answer": {"a": 1}}, "answer is {'a': 1}: give"),
    ({"problem": "1+2?", "answer": "3", "id": "good"}, "id is good, as in .*a.jsonl, line 1: make the ids"),
    ({"problem": "1+2?", "answer": "3", "id": []}, r"id is \[\]: give"),
    ({"problem": "1+2?", "answer": "3", "pass_rate": 1.5}, "pass rate is 1.5: give a share from 0 to 1"),
    ({"problem": "1+2?", "answer": "3", "difficulty": "9/8"}, "pass rate is 1.125: give"),
    ({"problem": "1+2?", "answer": "3", "system": ["terse"]}, r"system is \['terse'\]: give a text"),
    (verl_row("2", pass_rate=-1), "pass rate is -1: give"),
    (verl_row(None), "ground_truth is missing"),
    (verl_row("2") | {"reward_model": "2"}, "reward_model: is '2': give an object"),
    (verl_row("2") | {"prompt": "1+1?"}, r"prompt is '1\+1\?': give a list"),
    (verl_row("2") | {"prompt": [{"role": "user"}]}, r"content is missing \(columns: role\)"),
    (verl_row("2") | {"prompt": verl_row("2")["prompt"] * 2}, r"turns \['user', 'user'\]: give one user turn"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_is_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, message: str
) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"{re.escape(source)}, line 2.*{message}.*--skip-bad-rows$") as caught:
        data.load_problems(source)
    assert "\n" not in str(caught.value)
    assert data.load_problems(source, skip_bad_rows=True) == [Problem("good", "1+1?", ("2",))]
    warning = capsys.readouterr().err
    assert re.match(rf"warning: .*a.jsonl: 1 of 2 rows left out, first: .*line 2.*{message}", warning)
    assert warning.count("\n") == 1


def test_same_text_twice_names_both_rows(tmp_path: Path) -> None:
    rows = [{"problem": text, "answer": "2"} for text in ("1+1?", "2?", "1+1?")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 3: id is .* as in .*row 1: .*problem texts.* unique"):
        data.load_problems(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("problems.jsonl", b"", "problems.jsonl: is empty"),
    ("problems.json", b"", "problems.json: is empty"),
    ("problems.json", b"[]", "problems.json: is empty"),
    ("problems.json", b'{"a": 1}', r"holds {'a': 1}: give a list of objects"),
    ("problems.json", b'{"a": 1}\n{"a": 2}\n', "not JSON .*rename it to .jsonl"),
    ("problems.csv", b"a,b\n", "suffix .csv is not known: convert it to one of .jsonl, "),
    ("problems.parquet", b"PAR1 no", "not parquet .*fetch the file again"),
    ("problems.jsonl.gz", b"no gzip", "cannot be read .*fetch the file again"),
    ("problems.jsonl.gz", gzip.compress(b'{"problem": "1+1?", "answer": 2}\n', mtime=0)[:-9], "cannot be read"),
    ("problems.jsonl", b"\xff\xfe\n", "line 1: not JSON"),
])  # fmt: skip
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.load_problems(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_usable_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows can be used, first: .*line 1.*answers is missing"):
        data.load_problems(write(tmp_path / "a.jsonl", {"problem": "1?"}, "{"), skip_bad_rows=True)


def test_missing_source(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    for source, message in [
        (f"{tmp_path}/trian.jsonl", "no such file: did you mean train.jsonl?"),
        (f"{tmp_path}/nothing", "no such file: check the path"),
        (f"{tmp_path}/no/train.jsonl", f"no folder {tmp_path}/no: check the path"),
        (f"{tmp_path}", "is a folder: give one of the files in it"),
        ("nothing", r"^'nothing' is neither a file nor .*: give a file \(.jsonl, .* or owner/name"),
    ]:
        with pytest.raises(DataError, match=message):
            data.load_problems(source)


def test_hub_data_set_that_is_not_there() -> None:
    # In a process of its own: the hub library reads HF_HUB_OFFLINE once, at import.
    load = "data.load_problems('nobody/no-such-set:test')"
    code = f"import data\ntry: {load}\nexcept data.DataError as error: print(error)"
    answer = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True,
                            cwd=Path(data.__file__).parent, capture_output=True, check=True)  # fmt: skip
    assert re.fullmatch("nobody/no-such-set:test: .*cannot be loaded from the hub .*: check name, split .* and "
                        "connection, or download it.*\n", answer.stdout), answer


# ------------------------------------------------- training and held-out problems


def test_hold_out_shares_no_text_and_ignores_the_order() -> None:
    problems = [replace(problem, text=f"  What is\n{i % 50} + 1? ") for i, problem in enumerate(numbered(100))]
    training, held_out = data.hold_out(problems, 20, seed=1)
    assert len(held_out) == 20
    assert not {problem.text.strip() for problem in training} & {problem.text.strip() for problem in held_out}
    assert len({problem.text for problem in training}) + len({problem.text for problem in held_out}) == 50
    shuffled = random.Random(0).sample(problems, 100)
    assert data.hold_out(shuffled, 20, seed=1) == (training, held_out)
    assert data.hold_out(problems, 20, seed=2)[1] != held_out


def test_toy_training_and_held_out_are_disjoint() -> None:
    training, held_out = data.hold_out(data.toy_problems(2000, seed=0), 128, seed=0)
    assert (len(training), len(held_out)) == (1872, 128)
    assert not {problem.text for problem in training} & {problem.text for problem in held_out}


def test_hold_out_keeps_something_to_train_on() -> None:
    with pytest.raises(DataError, match="--eval-problems is 5: give less than the 5 problems"):
        data.hold_out(numbered(5), 5, seed=0)
    with pytest.raises(DataError, match="every training problem is also in the evaluation"):
        data.hold_out([replace(problem, text="same") for problem in numbered(5)], 1, seed=0)


def test_overlap_is_found_despite_suffix_case_and_white_space() -> None:
    evaluation = [Problem("0", f"What is  1 + 1? {Config.prompt_suffix}", ("2",))]
    training = [Problem("a", "what is 1 + 1?\n", ("2",)), Problem("b", "What is 1 + 11?", ("12",))]
    assert data.remove_overlap(training, evaluation) == training[1:]


# ---------------------------------------------------------------------------- prompts

EXAMPLE = WorkedExample("1 + 2", "1 + 2 = 3\n</think>\n\\boxed{3}")


def decoded_prompt(problem: Problem, tokenizer: Any, **options: Any) -> str:
    options = {"suffix": "", "max_prompt_tokens": 1024} | options
    return tokenizer.decode(data.encode_prompts([problem], tokenizer, **options)[0].prompt_tokens)


def test_chat_prompt() -> None:
    problem, toy = Problem("a", "3 + 4", ("7",)), data.toy_tokenizer()
    assert decoded_prompt(problem, toy) == "<|user|>3 + 4<|end|><|assistant|><think>"
    assert decoded_prompt(replace(problem, system="8"), toy, examples=[EXAMPLE]) == (
        "<|user|>8<|end|><|user|>1 + 2<|end|><|assistant|>1 + 2 = 3\n</think>\n\\boxed{3}<|end|>"
        "<|user|>3 + 4<|end|><|assistant|><think>")


def test_plain_prompt_with_bos_and_no_eos() -> None:
    from tokenizers import processors

    toy = data.toy_tokenizer()
    toy.chat_template = data.PLAIN_TEMPLATE
    rendered = data._render([data._chat("3 + 4?", "Add.", "Box it.", [WorkedExample("1 + 2?", "3")])], toy)
    assert rendered == ["Add.\n\nProblem: 1 + 2? Box it.\nSolution: 3\n\nProblem: 3 + 4? Box it.\nSolution:"]
    toy.chat_template = None
    assert data._render([data._chat("3 + 4?", "Add.", "Box it.", [WorkedExample("1 + 2?", "3")])], toy) == rendered

    problem = Problem("a", "3 + 4", ("7",))
    plain = data.encode_prompts([problem], toy, suffix="", max_prompt_tokens=99)[0].prompt_tokens
    toy.add_special_tokens({"bos_token": "<|bos|>"})
    ends = [("<|bos|>", toy.bos_token_id), ("<|end|>", toy.eos_token_id)]
    toy.backend_tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A <|end|>", special_tokens=ends)
    with_bos = data.encode_prompts([problem], toy, suffix="", max_prompt_tokens=99)[0].prompt_tokens
    assert with_bos == (toy.bos_token_id, *plain)
    prompt, response = data.encode_example(WorkedExample("3 + 4", "7"), toy, suffix="")
    assert tuple(prompt) == with_bos
    assert response == [*toy(" 7", add_special_tokens=False)["input_ids"], toy.eos_token_id]


def test_suffix_is_added_once() -> None:
    def content(text: str, suffix: str) -> str:
        return data._chat(text, None, suffix, [])[-1]["content"]

    assert content("1?", "Box it.") == content("1? Box it.", "Box it.") == "1? Box it."
    assert content("1?", "") == "1?"


def test_long_prompt_is_named_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = Problem("short", "1 + 2", ("3",)), Problem("long", " + ".join(["1"] * 8), ("8",))
    toy = data.toy_tokenizer()
    with pytest.raises(DataError, match=r"problem long: the prompt has 19 tokens, more than 18: raise "
                                        r"--max-prompt-tokens; or .*--skip-bad-rows"):  # fmt: skip
        data.encode_prompts([short, long], toy, suffix="", max_prompt_tokens=18)
    assert len(data.encode_prompts([short, long], toy, suffix="", max_prompt_tokens=19)) == 2
    [kept] = data.encode_prompts([short, long], toy, suffix="", max_prompt_tokens=18, skip_bad_rows=True)
    assert kept.id == "short"
    assert "prompts: 1 of 2 rows left out, first: problem long" in capsys.readouterr().err


def test_chat_template_that_refuses() -> None:
    toy = data.toy_tokenizer()
    toy.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"refuses the prompts \(System role not supported\)"):
        decoded_prompt(Problem("a", "3 + 4", ("7",), system="Add."), toy)


def test_worked_example_ends_as_the_model_should() -> None:
    toy = data.toy_tokenizer()
    prompt, response = data.encode_example(EXAMPLE, toy, suffix="", examples=[EXAMPLE])
    assert toy.decode(prompt + response) == (
        "<|user|>1 + 2<|end|><|assistant|>1 + 2 = 3\n</think>\n\\boxed{3}<|end|>"
        "<|user|>1 + 2<|end|><|assistant|><think>1 + 2 = 3\n</think>\n\\boxed{3}<|end|>")
    assert response[-1] == toy.eos_token_id
    # The toy template opens the thought, so an example that brings its own <think> must not open it twice.
    assert data.encode_example(replace(EXAMPLE, response=f"<think>\n{EXAMPLE.response}"), toy, suffix="")[1] == response
    toy.eos_token = None
    with pytest.raises(DataError, match=r"no eos_token.*set it"):
        data.encode_example(EXAMPLE, toy, suffix="")


def test_load_worked_examples(tmp_path: Path) -> None:
    row = {"problem": "1 + 2 ", "response": "\n3 "}
    assert data.load_worked_examples(write(tmp_path / "a.jsonl", row)) == [WorkedExample("1 + 2", "\n3 ")]
    for bad, message in [
        ({"problem": "1 + 2"}, r"line 2: response is missing \(columns: problem\): give it"),
        ({"problem": "", "response": "3"}, "line 2: problem is '': give a text"),
        ("{", "line 2: not JSON"),
        ("3", "line 2: is 3: give an object"),
    ]:
        with pytest.raises(DataError, match=message):
            data.load_worked_examples(write(tmp_path / "a.jsonl", row, bad))
    with pytest.raises(DataError, match="is empty"):
        data.load_worked_examples(write(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"did you mean a.jsonl"):
        data.load_worked_examples(tmp_path / "aa.jsonl")


@pytest.mark.skipif(not TOKENIZERS, reason="no real tokenizer in the shared assets")
@pytest.mark.parametrize("folder", TOKENIZERS, ids=str)
def test_real_tokenizer_encodes_as_its_own_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    problem = Problem("a", "What is $1 + 1$?", ("2",))
    turns = [{"role": "user", "content": f"{problem.text} {Config.prompt_suffix}"}]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=True)["input_ids"]
    suffix, example = Config.prompt_suffix, WorkedExample(problem.text, "\\boxed{2}")
    [encoded] = data.encode_prompts([problem], tokenizer, suffix=suffix, max_prompt_tokens=1024)
    assert encoded.prompt_tokens == tuple(own)
    prompt, response = data.encode_example(example, tokenizer, suffix=suffix)
    assert prompt == own
    assert tokenizer.decode(response) == "\\boxed{2}" + tokenizer.eos_token
    assert data.thinks(tokenizer) == ("think>" in tokenizer.chat_template)


# ----------------------------------------------------------------------------- sampler


def ids(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def take(sampler: ProblemSampler, count: int) -> list[str]:
    batch = ids(sampler.peek(count))
    sampler.advance(count)
    return batch


def test_epochs_are_complete_and_differ() -> None:
    sampler = ProblemSampler(numbered(12), seed=3)
    epochs = [[take(sampler, 4) for _ in range(3)] for _ in range(3)]
    flat = [[problem_id for batch in epoch for problem_id in batch] for epoch in epochs]
    assert all(sorted(epoch) == sorted(ids(numbered(12))) for epoch in flat)
    assert len({tuple(epoch) for epoch in flat}) == 3
    again, other = ProblemSampler(numbered(12), seed=3), ProblemSampler(numbered(12), seed=4)
    assert take(again, 4) == epochs[0][0] != take(other, 4)


def test_rest_of_an_epoch_is_skipped() -> None:
    sampler = ProblemSampler(numbered(10), seed=0)
    for _ in range(20):
        assert sampler.peek(4) == sampler.peek(4)
        assert len(set(take(sampler, 4))) == 4
    assert sampler.state_dict()["epoch"] == 9  # two batches each


def test_sampler_leaves_the_global_random_state_alone() -> None:
    random.seed(0)
    before = random.getstate()
    take(ProblemSampler(numbered(10), seed=0), 4)
    assert random.getstate() == before


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_state_round_trip_is_exact(steps: int) -> None:
    sampler = ProblemSampler(numbered(11), seed=5)
    for step in range(steps):
        take(sampler, 3)
        if step == 4:
            assert sampler.remove({"id3", "id7"}, at_least=3)
    resumed = ProblemSampler(numbered(11), seed=99)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert [take(resumed, 3) for _ in range(20)] == [take(sampler, 3) for _ in range(20)]


def test_state_of_other_problems_is_refused() -> None:
    state = ProblemSampler(numbered(11), seed=5).state_dict()
    for others in (numbered(10), numbered(11)[::-1], [replace(problem, text="new") for problem in numbered(11)]):
        with pytest.raises(DataError, match="not those that this run began with: resume with the same"):
            ProblemSampler(others, seed=5).load_state_dict(state)


def test_mastered_problems_leave() -> None:
    sampler = ProblemSampler(numbered(10), seed=0)
    take(sampler, 4)
    assert not sampler.remove(["id1", "id2"], at_least=9)  # too few for a batch would be left
    assert len(sampler) == 10
    assert sampler.remove(["id1", "id2", "unknown"], at_least=8)
    assert len(sampler) == 8
    epoch = take(sampler, 4) + take(sampler, 4)  # a new epoch: all that is left, once each
    assert sorted(epoch) == sorted(set(ids(numbered(10))) - {"id1", "id2"})
    assert sampler.remove(["id1", "id2"], at_least=8)  # again, as after a resume: nothing changes
    assert len(sampler) == 8
    with pytest.raises(DataError, match="--prompts-per-step is 9, but only 8 problems"):
        sampler.peek(9)


# -------------------------------------------------------------------------------- sink


def rollout(problem_id: str, text: str = "") -> Rollout:
    rng = random.Random(problem_id + text)
    tokens = [rng.randrange(200_000) for _ in range(20)]
    return Rollout(problem_id, (1, 2, 3), tokens, [-rng.expovariate(1) for _ in tokens], text, "stop", 1.0, "correct")


def stored(sink: Sink) -> dict[str, str]:
    return {problem_id: rollout.text for problem_id, rollout in sink.items()}


def test_sink_gives_back_what_was_put_in(tmp_path: Path) -> None:
    text = "half \ud800, two \ud83d\ude00, \0 \n"
    odd = Rollout("é", (), [0, 2**31 - 1], [-0.0, -1e-320], text, "length", 0.5, "\udfff")
    sink = Sink(tmp_path / "sink.db")
    for item in (odd, rollout("a"), rollout("b", "pending")):
        assert item.problem_id not in sink
        sink[item.problem_id] = item
        assert sink[item.problem_id] == item
        if item.text != "pending":
            sink.commit(1)
            assert sink[item.problem_id] == item
    assert (len(sink), sorted(sink)) == (3, ["a", "b", "é"])
    again = Sink(tmp_path / "sink.db")
    assert dict(again) == {"a": rollout("a"), "é": odd}
    assert [type(again["a"].prompt_tokens), type(again["a"].response_tokens)] == [tuple, list]
    with pytest.raises(KeyError):
        again["b"]
    with pytest.raises(NotImplementedError, match="by rewind and prune only"):
        del again["a"]


def test_sink_keeps_the_latest_and_rewinds() -> None:
    sink = Sink(None)
    for step in range(1, 6):
        sink["a"] = rollout("a", f"step {step}")
        if step % 2 == 0:
            sink["b"] = rollout("b", f"step {step}")
        sink.commit(step)
    sink["a"] = sink["c"] = rollout("a", "pending")
    assert stored(sink) == {"a": "pending", "b": "step 4", "c": "pending"}
    sink.rewind(5)
    assert stored(sink) == {"a": "step 5", "b": "step 4"}
    sink.rewind(3)
    assert stored(sink) == {"a": "step 3", "b": "step 2"}
    sink["a"] = rollout("a", "another step 4")
    sink.commit(4)
    assert stored(sink) == {"a": "another step 4", "b": "step 2"}
    sink.rewind(0)
    assert stored(sink) == {}


@pytest.mark.parametrize("oldest", range(7))
def test_prune_takes_nothing_that_a_rewind_needs(oldest: int) -> None:
    def filled() -> Sink:
        sink, rng = Sink(None), random.Random(oldest)
        for step in range(1, 7):
            for problem_id in rng.sample("abcdef", 3):
                sink[problem_id] = rollout(problem_id, f"step {step}")
            sink.commit(step)
        return sink

    for step in range(oldest, 7):
        pruned, whole = filled(), filled()
        pruned.prune(oldest)
        [[rows]] = pruned._database.execute("SELECT count(*) FROM rollouts WHERE step <= ?", (oldest,))
        for sink in (pruned, whole):
            sink.rewind(step)
        assert dict(pruned) == dict(whole)
        whole.rewind(oldest)
        assert rows == len(whole)  # one row a problem is left of the steps up to the oldest


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = f"import os, resource, signal, sys\nfrom pathlib import Path\nfrom data import Sink, Rollout\n{code}"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=Path(data.__file__).parent, text=True,
                          capture_output=True, check=False)  # fmt: skip


def test_killed_process_loses_its_last_step_at_most(tmp_path: Path) -> None:
    code = """
class Deadly:
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGKILL)
sink = Sink(Path(sys.argv[1]))
for step in (1, 2, 3):
    for i in range(50):  # by then step 3 is written in part: it is more than the cache holds
        tokens = Deadly() if (step, i) == (3, 40) else [step] * 15000
        sink[f"{i}"] = Rollout(f"{i}", (), tokens, [0.0] * 15000, f"step {step}", "stop")
    sink.commit(step)
"""
    assert in_a_process(code, tmp_path / "sink.db").returncode == -signal.SIGKILL
    assert Path(f"{tmp_path}/sink.db-journal").stat().st_size > 0  # the kill was in the middle of a transaction
    sink = Sink(tmp_path / "sink.db")
    assert stored(sink) == {str(i): "step 2" for i in range(50)}
    sink["0"] = rollout("0", "step 3")
    sink.commit(3)
    sink.rewind(1)
    assert set(stored(sink).values()) == {"step 1"}


def test_sink_needs_little_memory(tmp_path: Path) -> None:
    code = """
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
sink, before = Sink(Path(sys.argv[1])), peak()
for i in range(300):
    sink[f"{i}"] = Rollout(f"{i}", (), list(range(i, i + 15000)), [-j / 7 for j in range(15000)], "x" * 40000, "stop")
    if i % 10 == 9:
        sink.commit(i)
assert len(sink) == 300 and sum(sink[f"{i}"].response_tokens[1] == i + 1 for i in range(300)) == 300
sink.prune(300)
print(peak() - before)
"""
    grown = in_a_process(code, tmp_path / "sink.db")
    assert (tmp_path / "sink.db").stat().st_size > 300 * 15000 * 12
    assert float(grown.stdout) < 40, grown.stderr


def test_sink_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "sink.db").write_text("no database, but a text of some length" * 100)
    for path in (tmp_path / "sink.db", tmp_path / "no" / "sink.db"):
        with pytest.raises(DataError, match=rf"{path}: cannot be used \(.*\): check the folder .* delete the file"):
            Sink(path)


# ----------------------------------------------------------------------- the toy world


def test_toy_problems_are_sums() -> None:
    problems = data.toy_problems(2000, seed=0)
    assert problems == data.toy_problems(2000, seed=0) != data.toy_problems(2000, seed=1)
    assert len({problem.text for problem in problems}) == 2000
    for problem in problems:
        terms = [int(term) for term in problem.text.split(" + ")]
        assert problem.answers == (str(sum(terms)),)
        assert problem.id == problem.text
        assert 1 <= min(terms) <= max(terms) <= 12
    lengths = Counter(problem.text.count(" + ") + 1 for problem in problems)
    assert set(lengths) == set(data.TOY_TERMS["toy"])
    assert all(100 < count < 400 for count in lengths.values())


def test_toy_response_without_habits_is_right_and_adds_one_term_a_line() -> None:
    for problem in data.toy_problems(200, seed=0):
        response = data.toy_response(problem, None)
        assert response.endswith(f"</think>\n\\boxed{{{problem.answers[0]}}}")
        assert response.count(" = ") == problem.text.count(" + ")


def test_toy_response_errs_by_habit_and_carries_on() -> None:
    rng = random.Random(0)
    slips: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)  # last digit and term -> slip -> how often
    hasty = lines = 0
    for problem in data.toy_problems(4000, seed=0):
        response = data.toy_response(problem, rng)
        added = []
        total = int(problem.text.split(" + ")[0])
        for line in response.split("\n")[:-2]:
            left, result = line.split(" = ")
            first, *terms = map(int, left.split(" + "))
            assert first == total  # the chain goes on from a wrong value
            added += terms
            lines, hasty = lines + 1, hasty + (len(terms) > 1)
            if len(terms) == 1:
                slips[total % 10, terms[0]][int(result) - total - terms[0]] += 1
            total = int(result)
        assert added == [int(term) for term in problem.text.split(" + ")[1:]]
        assert response.endswith(f"\\boxed{{{total}}}")
    assert len(slips) == 120
    assert all(len(found) <= 2 for found in slips.values())  # right, or always the same slip
    hard = [found for found in slips.values() if found.total() > found[0]]
    assert 0.2 < len(hard) / len(slips) < 0.4
    for found in hard:
        if found.total() > 150 and -10 not in found:  # a slip of -10 is not made where it leads below 1
            assert found.total() - found[0] == pytest.approx(data.TOY_WRONG * found.total(), rel=0.2)
    assert hasty / lines == pytest.approx(data.TOY_HASTE, abs=0.05)


def test_toy_tokenizer_is_exact_and_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    toy, rng = data.toy_tokenizer(), random.Random(0)
    toy.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(toy) == len(loaded) == 22
    assert toy.tokenize("12 + 3 = 15\n</think>\n\\boxed{15}") == [
        "1", "2", " + ", "3", " = ", "1", "5", "\n", "</think>", "\n", "\\boxed{", "1", "5", "}"]  # fmt: skip
    for problem in data.toy_problems(100, seed=0):
        text = f"<|user|>{problem.text}<|end|><|assistant|><think>{data.toy_response(problem, rng)}<|end|>"
        for tokenizer in (toy, loaded):
            tokens = tokenizer(text)["input_ids"]
            assert tokens == toy(text)["input_ids"]
            assert "<|unk|>" not in tokenizer.convert_ids_to_tokens(tokens)
            assert tokenizer.decode(tokens) == text
    assert loaded.chat_template == toy.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert data.thinks(loaded)


def test_toy_tokenizer_shows_what_it_does_not_know(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    toy = data.toy_tokenizer()
    toy.save_pretrained(tmp_path)
    for tokenizer in (toy, AutoTokenizer.from_pretrained(tmp_path)):
        for text, shown in [("1é2", "1<|unk|>2"), ("1+2", "1<|unk|>2"), ("1\r\n", "1<|unk|>\n"), ("a ", "<|unk|>" * 2)]:
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.decode(tokens, skip_special_tokens=True) == shown
