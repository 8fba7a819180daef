"""Load real and broken problem files, encode prompts, walk the sampler through a resume, and cut files short."""
from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import data
from data import ProblemSampler, UserError
from polaris_mini import Common, Config, Problem

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
    with pytest.raises(UserError, match=r"line 46: id is .* line 45: .*--skip-bad-rows"):
        data.load_problems(source)
    assert len(data.load_problems(source, skip_bad_rows=True)) == 38642
    assert "1166 rows left out, first: " in capsys.readouterr().err


@pytest.mark.parametrize(("row", "expected"), [
    ({"problem": "1+1?", "answer": "2\n", "id": "a"}, Problem("a", "1+1?", ("2",))),
    ({"question": "1+1?", "answers": ["2", " two", "2"], "index": 7}, Problem("7", "1+1?", ("2", "two"))),
    ({"problem": "1+1?", "answer": 2.0, "id": 3.0, "pass_rate": 0.25}, Problem("3", "1+1?", ("2",), 0.25)),
    ({"problem": "1+1?", "answer": 0.5, "id": "a", "difficulty": "3/8"}, Problem("a", "1+1?", ("0.5",), 0.375)),
    ({"problem": "1+1?", "answer": 2, "id": "a", "difficulty": 5.0}, Problem("a", "1+1?", ("2",))),
    ({"question": "1+1?", "answer": "1+1 = <<1+1=2>>2 #### no\n#### 2,400\n", "id": "a"},  # GSM8K's
     Problem("a", "1+1?", ("2,400",))),
    ({"question": "1+1?", "answer": ["so 2\n####2", "#### two"], "id": "a"}, Problem("a", "1+1?", ("2", "two"))),
    ({"question": "1+1?", "answer": "#### 2\nno", "id": "a"}, Problem("a", "1+1?", ("#### 2\nno",))),
    ({"question": "1+1?", "answer": "2 ####", "id": "a"}, Problem("a", "1+1?", ("2 ####",))),
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
COLUMNS = r"give problem \(or question\) and answer \(or answers\), or verl's reward_model.ground_truth and prompt"
BAD_ROWS: list[tuple[object, str]] = [  # the row, what the message says after the place
    ('{"problem": ', "not JSON .* write one object per line"),
    ("[1, 2]", r"is \[1, 2\]: give an object"),
    ({"text": "1+1?", "answer": "2"}, f"columns are text, answer: {COLUMNS}"),
    ({"problem": None, "answer": "2"}, f"columns are problem, answer: {COLUMNS}"),
    ({"problem": " \n", "answer": "2"}, r"problem is ' \\n': give a text"),
    ({"problem": ["1+1?"], "answer": "2"}, r"problem is \['1\+1\?'\]: give a text"),
    ('{"problem": "\\ud800", "answer": "2"}', r"problem is '\\ud800': give a text"),
    ({"problem": "1+2?"}, f"columns are problem: {COLUMNS}"),
    ({"problem": "1+2?", "answer": ""}, "answer is '': give a text or a number"),
    ({"problem": "1+2?", "answer": []}, r"answer is \[\]: give"),
    ({"problem": "1+2?", "answer": ["3", None]}, "answer is None: give"),
    ({"problem": "1+2?", "answer": True}, "answer is True: give"),
    ({"problem": "1+2?", "answer": float("nan")}, "answer is nan: give"),
    ({"problem": "1+2?", "answer": {"a": 1}}, "answer is {'a': 1}: give"),
    ({"problem": "1+2?", "answer": "3", "id": "good"}, "id is good, as in .*a.jsonl, line 1: make the ids"),
    ({"problem": "1+2?", "answer": "3", "id": []}, r"id is \[\]: give"),
    ({"problem": "1+2?", "answer": "3", "pass_rate": 1.5}, "pass rate is 1.5: give a share from 0 to 1"),
    ({"problem": "1+2?", "answer": "3", "pass_rate": "3/8"}, "pass rate is '3/8': give"),
    ({"problem": "1+2?", "answer": "3", "difficulty": "9/8"}, "pass rate is 1.125: give"),
    ({"problem": "1+2?", "answer": "3", "system": ["terse"]}, r"system is \['terse'\]: give a text"),
    (verl_row("2", pass_rate=-1), "pass rate is -1: give"),
    (verl_row(None), f"columns are prompt, reward_model, extra_info: {COLUMNS}"),
    (verl_row("2") | {"reward_model": "2"}, f"columns are prompt, reward_model, extra_info: {COLUMNS}"),
    (verl_row("2") | {"prompt": "1+1?"}, COLUMNS),
    (verl_row("2") | {"prompt": [{"role": "user"}]}, COLUMNS),
    (verl_row("2") | {"prompt": [{"role": "user", "content": None}]}, COLUMNS),
    (verl_row("2") | {"prompt": verl_row("2")["prompt"] * 2}, r"prompt \(a user turn, after at most one system turn\)"),
    (verl_row("2", question="1+1?", answer="1+1=2") | {"prompt": []}, COLUMNS),  # a text in extra_info is none to use
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_is_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, message: str
) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(UserError, match=rf"{re.escape(source)}, line 2.*{message}.*--skip-bad-rows$") as caught:
        data.load_problems(source)
    assert "\n" not in str(caught.value)
    assert data.load_problems(source, skip_bad_rows=True) == [Problem("good", "1+1?", ("2",))]
    warning = capsys.readouterr().err
    assert re.match(rf"warning: .*a.jsonl: 1 rows left out, first: .*line 2.*{message}", warning)
    assert warning.count("\n") == 1


def test_same_text_twice_names_both_rows(tmp_path: Path) -> None:
    rows = [{"problem": text, "answer": "2"} for text in ("1+1?", "2?", "1+1?")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 3: id is .* as in .*row 1: .*problem texts.* unique"):
        data.load_problems(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("problems.jsonl", b"", "problems.jsonl: has no row that can be used: give at least one problem"),
    ("problems.jsonl", b"\n \n", "problems.jsonl: has no row"),
    ("problems.json", b"", r"cannot be read \(Expecting value: .*"),
    ("problems.json", b"[]", "problems.json: has no row"),
    ("problems.json", b"5", r"cannot be read .*or .json file \(a list\), a folder .*, or a hub data set"),
    ("problems.json", b'{"a": 1}', "row 1: is 'a': give an object"),
    ("problems.json", b'{"a": 1}\n{"a": 2}\n', r"cannot be read \(Extra data: line 2 column 1 .*give a .jsonl"),
    ("problems.csv", b"a,b\n", "line 1: not JSON"),
    ("problems.parquet", b"PAR1 no", r"cannot be read \(Parquet"),
    ("problems.jsonl.gz", b"no gzip", r"cannot be read \(Not a gzipped file"),
    ("problems.jsonl.gz", gzip.compress(b'{"problem": "1+1?", "answer": 2}\n', mtime=0)[:-9], "cannot be read"),
    ("problems.jsonl", b"\xff\xfe\n", "line 1: not JSON"),
    ("problems.jsonl", b"[" * 100_000, "line 1: not JSON"),
])  # fmt: skip
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        data.load_problems(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_usable_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"a.jsonl: has no row that can be used"):
        data.load_problems(write(tmp_path / "a.jsonl", {"problem": "1?"}, "{"), skip_bad_rows=True)
    assert re.search(r"2 rows left out, first: .*a.jsonl, line 1: columns are problem: ", capsys.readouterr().err)


def test_missing_source(tmp_path: Path) -> None:
    for source, message in [
        (f"{tmp_path}/trian.jsonl", "trian.jsonl: cannot be read .*No such file"),
        ("no/train.jsonl", "no/train.jsonl: cannot be read .*No such file"),  # not taken for a hub data set
        ("no/train.parquet", "no/train.parquet: cannot be read .*No such file"),
        ("nothing", r"^nothing: cannot be read .*: give a .jsonl, .* or a hub data set \(owner/name, owner"),
    ]:
        with pytest.raises(UserError, match=message):
            data.load_problems(source)


def test_answers_in_json_and_parquet_stay_as_they_are(tmp_path: Path) -> None:
    """`datasets` would make the numbers 2.5 and 7 of the second and the third, and dates of the last two."""
    answers = [1, "2.50", "007", "1e3", "2020-01-01", "2020-01-02 00:00:00"]
    (tmp_path / "a.json").write_text(json.dumps([{"problem": f"{a}?", "answer": a} for a in answers]))
    assert [p.answers[0] for p in data.load_problems(str(tmp_path / "a.json"))] == [str(answer) for answer in answers]
    rows = [{"problem": f"{a}?", "answer": str(a)} for a in answers]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [p.answers[0] for p in data.load_problems(str(tmp_path / "a.parquet"))] == [str(a) for a in answers]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        for answer in ("1", "2"):
            row = json.dumps({"problem": "?", "answer": answer})
            (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]")
            assert data.load_problems(str(tmp_path / name))[0].answers == (answer,)


# ------------------------------------------------------------ folders and the hub


def write_shards(folder: Path, *names: str) -> str:
    """Write a folder of files with a problem each: its name is the text, and the first two answers are "2.50" and 1."""
    folder.mkdir()
    for name, answer in zip(names, ["2.50", 1, *range(9)], strict=False):
        row = {"problem": name, "answer": answer}
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([row]), folder / name)
        else:
            text = json.dumps([row] if name.endswith(".json") else row).encode()
            (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return str(folder)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "json"])
def test_shards_of_a_folder(tmp_path: Path, suffix: str) -> None:
    names = [f"part-{i}.{suffix}" for i in (1, 0)]
    folder = write_shards(tmp_path / "a", *names, "README.md", "dataset_infos.json", ".hidden.jsonl", "_SUCCESS")
    assert [(p.text, p.answers) for p in data.load_problems(folder)] == [(names[1], ("1",)), (names[0], ("2.50",))]
    (tmp_path / "a" / names[1]).write_bytes(gzip.compress(b"{") if suffix.endswith("gz") else b"{")
    with pytest.raises(UserError, match=rf"^{folder}/{names[1]}(, line 1: not JSON|: cannot be read)"):
        data.load_problems(folder)


def test_a_split_of_a_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", "train-0.parquet", "train-1.parquet", "test-0.parquet")
    for source in (folder, f"{folder}:train"):  # no problem to test on is trained on
        assert [p.text for p in data.load_problems(source)] == ["train-0.parquet", "train-1.parquet"]
    assert [p.text for p in data.load_problems(f"{folder}:test")] == ["test-0.parquet"]
    write_shards(tmp_path / "b:test", "0.jsonl")  # a colon that is part of the name
    assert [p.text for p in data.load_problems(f"{tmp_path}/b:test")] == ["0.jsonl"]


@pytest.mark.parametrize(("names", "part", "shown"), [
    ([], "", r"\[\]"), (["README.md", "x.csv"], "", r"\['README.md', 'x.csv'\]"),
    (["a.json", "a.jsonl", "b.jsonl"], "", r"\['a.json', 'a.jsonl', 'b.jsonl'\]"),
    (["test-0.parquet", "train.parquet"], ":val", r"\['test-0.parquet', 'train.parquet'\]"),
])  # fmt: skip
def test_a_folder_that_is_not_one_data_set(tmp_path: Path, names: list[str], part: str, shown: str) -> None:
    folder = write_shards(tmp_path / "a", *names)
    with pytest.raises(UserError, match=rf"^{folder}{part}: cannot be read \(a folder needs files of one kind.*, and "
                                        rf"has {shown}\): give "):
        data.load_problems(folder + part)


def test_what_save_to_disk_made(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": f"{i}?", "answer": "2.50"} for i in range(4)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(hard=rows).save_to_disk(tmp_path / "hard")
    for source, count in {"one": 4, "one:train": 4, "two": 4, "two:train": 4, "two:test": 1, "hard:hard": 4}.items():
        problems = data.load_problems(str(tmp_path / source))
        assert (len(problems), problems[-1].text, problems[-1].answers) == (count, "3?", ("2.50",))
    for source, splits in {"one:test": "dataset_info.json", "two:tst": "'test', 'train'", "hard": "'hard'"}.items():
        with pytest.raises(UserError, match=rf"{source}: cannot be read .* has \[.*{splits}.*\]\): give .*with :split"):
            data.load_problems(str(tmp_path / source))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, a cache with one data set of two configurations, and one of one, as after downloads."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name, configuration in [("two", "main"), ("two", "socratic"), ("one", "default")]:
        rows = datasets.Dataset.from_list([{"question": f"{configuration} {i}?", "answer": 142.0} for i in range(4)])
        rows.save_to_disk(tmp_path / "made")
        folder = tmp_path / f"me___{name}" / configuration / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        (tmp_path / "made" / "data-00000-of-00001.arrow").rename(folder / f"{name}-train.arrow")
        splits = {"train": {"name": "train", "num_bytes": 100, "num_examples": 4, "dataset_name": name}}
        info = {"builder_name": "parquet", "dataset_name": name, "config_name": configuration, "splits": splits,
                "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}}
        known = json.loads((tmp_path / "made" / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(known | info))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("source", "first", "count"), [
    ("me/one", "default 0?", 4), ("me/one:train", "default 0?", 4), ("me/one:train[1:3]", "default 1?", 2),
    ("me/one::train", "default 0?", 4), ("me/two:main:train", "main 0?", 4), ("me/two:socratic:", "socratic 0?", 4),
    ("me/two:main:train[3:]", "main 3?", 1),
])  # fmt: skip
def test_hub_data_set(source: str, first: str, count: int) -> None:
    problems = data.load_problems(source)
    assert (problems[0].text, problems[0].answers, len(problems)) == (first, ("142",), count)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("source", "there"), [
    ("me/two", "configurations .*(main, socratic|socratic, main)"), ("me/two:train", "main"),
    ("me/two:man:train", r"'man' Available .*\['main', 'socratic'\]"), ("me/two:main:tst", r'"tst".* \[\'train\'\]'),
    ("me/one:test", r"\['train'\]"), ("nobody/none:test", "nobody/none"), ("nobody/none:main:train", "nobody/none"),
])  # fmt: skip
def test_hub_data_set_that_is_not_there(source: str, there: str) -> None:
    with pytest.raises(UserError, match=rf"^{source}: cannot be read \(.*{there}.*: give .* owner/name:config.*:split"):
        data.load_problems(source)


def test_importing_and_reading_jsonl_stays_light(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD)
    code = ("import data, sys; data.load_problems(sys.argv[1])\n"
            "print({'transformers', 'datasets', 'jinja2', 'torch'} & {*sys.modules})")  # fmt: skip
    answer = subprocess.run([sys.executable, "-c", code, source], text=True, capture_output=True,
                            cwd=Path(data.__file__).parent, check=True)  # fmt: skip
    assert answer.stdout == "set()\n"


# ------------------------------------------------- training and held-out problems


def split(path: Path, problems: list[Problem], **settings: Any) -> tuple[list[Problem], list[Problem]]:
    rows = [{"id": p.id, "problem": p.text, "answers": p.answers} for p in problems]
    settings = {"prompts_per_step": 1, "data": write(path / "split.jsonl", *rows)} | settings
    return data.training_and_held_out(Config(**settings), lambda answers: None)


def test_held_out_problems_share_no_text_and_ignore_the_order(tmp_path: Path) -> None:
    problems = [replace(problem, text=f"What is\n{i % 50}  + 1?") for i, problem in enumerate(numbered(100))]
    training, held_out = split(tmp_path, problems, eval_problems=20, seed=1)
    assert len(held_out) == 20
    assert not {problem.text for problem in training} & {problem.text for problem in held_out}
    assert len({problem.text for problem in training}) + len({problem.text for problem in held_out}) == 50
    shuffled = random.Random(0).sample(problems, 100)
    assert split(tmp_path, shuffled, eval_problems=20, seed=1) == (training, held_out)
    assert split(tmp_path, problems, eval_problems=20, seed=2)[1] != held_out


def test_without_an_evaluation_nothing_is_held_out(tmp_path: Path) -> None:
    assert split(tmp_path, numbered(9), eval_every=-1) == (numbered(9), [])
    assert split(tmp_path, numbered(9), eval_every=-1, eval_data="not read") == (numbered(9), [])


def test_overlap_is_found_despite_suffix_case_and_white_space(tmp_path: Path) -> None:
    rows = [{"id": "0", "problem": f"What is  1 + 1? {Config.prompt_suffix}", "answer": "2"}]
    problems = [Problem("a", "what is 1 + 1?", ("2",)), Problem("b", "What is 1 + 11?", ("12",))]
    training, held_out = split(tmp_path, problems, eval_data=write(tmp_path / "eval.jsonl", *rows))
    assert training == problems[1:]
    assert [problem.id for problem in held_out] == ["0"]


def test_a_batch_must_be_left_to_train_on(tmp_path: Path) -> None:
    assert len(split(tmp_path, numbered(9), eval_problems=5, prompts_per_step=4)[0]) == 4
    for problems, settings, message in [
        (numbered(9), {"eval_problems": 5, "prompts_per_step": 5}, "is 5, but 4 training .* left beside 5 of the"),
        (numbered(5), {"eval_problems": 5}, "prompts_per_step is 1, but 0 training problems .* --eval-problems"),
        (numbered(5), {"eval_problems": 99}, "but 0 training problems .* --eval-problems"),
        ([replace(p, text="same") for p in numbered(5)], {"eval_problems": 1}, "but 0 training problems"),
        (numbered(5), {"eval_data": f"{tmp_path}/split.jsonl"}, "but 0 training problems .* beside 5 of the"),
        (numbered(5), {"eval_every": -1, "prompts_per_step": 6}, "is 6, but 5 training problems .* beside 0 of"),
    ]:
        with pytest.raises(UserError, match=message):
            split(tmp_path, problems, **settings)


def test_answers_are_checked_in_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, {"problem": "2?", "answer": "$$"})
    other = write(tmp_path / "b.jsonl", {"problem": "3?", "answer": "3"})

    def check(answers: Any) -> str | None:
        return "answer is $$: give one that can be graded" if answers == ("$$",) else None

    for settings in ({"data": source, "eval_data": other}, {"data": other, "eval_data": source}):
        config = Config(prompts_per_step=1, **settings)
        with pytest.raises(UserError, match=r"a.jsonl, line 2: answer is \$\$: .*--skip-bad-rows"):
            data.training_and_held_out(config, check)
        both = data.training_and_held_out(replace(config, skip_bad_rows=True), check)
        assert [len(problems) for problems in both] == [1, 1]
        assert "a.jsonl: 1 rows left out, first: " in capsys.readouterr().err


# ---------------------------------------------------------------------------- prompts

TEMPLATE = ("{% for turn in messages %}{{ '<|' + turn.role + '|>' + turn.content + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}")


def small_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Make a tokenizer with a token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=template,
        extra_special_tokens=special[1:4], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def decoded_prompt(problem: Problem, tokenizer: Any, suffix: str = "") -> str:
    [encoded] = data.encode_prompts([problem], tokenizer, Common(prompt_suffix=suffix))
    assert replace(encoded, prompt_tokens=()) == problem
    return tokenizer.decode(encoded.prompt_tokens)


def test_chat_prompt() -> None:
    problem, tokenizer = Problem("a", "3 + 4?", ("7",)), small_tokenizer()
    assert decoded_prompt(problem, tokenizer) == "<|user|>3 + 4?<|end|><|assistant|><think>"
    assert decoded_prompt(replace(problem, system="Add."), tokenizer, "Box it.") == (
        "<|system|>Add.<|end|><|user|>3 + 4? Box it.<|end|><|assistant|><think>")
    assert data.encode_prompts([], tokenizer, Common()) == []


def test_plain_prompt_with_bos_and_no_eos() -> None:
    from tokenizers import processors

    tokenizer = small_tokenizer(template=None)
    problem = Problem("a", "3 + 4?", ("7",), system="Add.")
    text = "Add.\n\nProblem: 3 + 4? Box it.\nSolution:"
    assert decoded_prompt(problem, tokenizer, "Box it.") == text
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    assert decoded_prompt(problem, tokenizer, "Box it.") == text  # has a BOS, but does not use it
    ends = [("<|bos|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    template = processors.TemplateProcessing("<|bos|> $A <|end|>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    assert decoded_prompt(problem, tokenizer, "Box it.") == "<|bos|>" + text
    tokenizer.chat_template = TEMPLATE
    assert decoded_prompt(replace(problem, system=None), tokenizer) == "<|user|>3 + 4?<|end|><|assistant|><think>"


def test_suffix_is_added_once() -> None:
    for text, suffix, content in [("1?", "Box it.", "1? Box it."), ("1? Box it.", "Box it.", "1? Box it."),
                                  ("1?", "", "1?")]:  # fmt: skip
        assert data.chat(text, None, suffix) == [{"role": "user", "content": content}]


def test_long_prompts_are_named_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"short": "1", "long": "1 + 1 + 1", "longer": "1" * 20}
    problems = [Problem(problem_id, text, ("1",)) for problem_id, text in texts.items()]
    tokenizer = small_tokenizer()
    longest = len(data.encode_prompts(problems, tokenizer, Common(prompt_suffix=""))[2].prompt_tokens)
    settings = Common(prompt_suffix="", max_prompt_tokens=longest - 12)
    message = f"2 of 3 prompts have more than {longest - 12} tokens, that of problem longer {longest}: "
    with pytest.raises(UserError, match=f"{message}raise --max-prompt-tokens, or .*--skip-bad-rows"):
        data.encode_prompts(problems, tokenizer, settings)
    assert len(data.encode_prompts(problems, tokenizer, replace(settings, max_prompt_tokens=longest))) == 3
    [kept] = data.encode_prompts(problems, tokenizer, replace(settings, skip_bad_rows=True))
    assert kept.id == "short"
    assert capsys.readouterr().err == f"warning: {message}left out\n"
    with pytest.raises(UserError, match="3 of 3 prompts"):
        data.encode_prompts(problems, tokenizer, Common(max_prompt_tokens=1, skip_bad_rows=True))


def test_chat_template_that_refuses() -> None:
    tokenizer = small_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match=r"refuses the prompts, .* system turn: System role not supported"):
        decoded_prompt(Problem("a", "3 + 4", ("7",), system="Add."), tokenizer)


def test_thinks() -> None:
    assert data.thinks(small_tokenizer())
    assert data.thinks(small_tokenizer({"default": "a", "other": "</think>"}))
    assert not data.thinks(small_tokenizer("a"))
    assert not data.thinks(small_tokenizer(None))


@pytest.mark.skipif(not TOKENIZERS, reason="no real tokenizer in the shared assets")
@pytest.mark.parametrize("folder", TOKENIZERS, ids=str)
def test_real_tokenizer_encodes_as_its_own_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    problem = Problem("a", "What is $1 + 1$?", ("2",))
    turns = [{"role": "user", "content": f"{problem.text} {Config.prompt_suffix}"}]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=True)["input_ids"]
    [encoded] = data.encode_prompts([problem], tokenizer, Common())
    assert encoded.prompt_tokens == tuple(own)
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
        with pytest.raises(UserError, match="not those that this run began with: resume with the same"):
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
    with pytest.raises(UserError, match="prompts_per_step is 9, but only 8 problems"):
        sampler.peek(9)


# ----------------------------------------------------------- files that survive a kill


def test_lines_after_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    assert list(data.read_lines(path)) == []
    for cut in ("", '{"ste', "é" * 100_000):  # more than is looked at in one piece
        with contextlib.suppress(FileNotFoundError), path.open("a") as file:
            file.write(cut)
        data.append_lines(path, ({"step": step, "text": "\ud800\n é"} for step in (1, 2)))
    assert list(data.read_lines(path)) == [{"step": step, "text": "\ud800\n é"} for step in (1, 2)] * 3
    path.write_text("only a cut line")
    assert list(data.read_lines(path)) == []
    data.append_lines(path, [])
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", ["", '{"step": 9'])
@pytest.mark.parametrize("size", [1, 70_000])  # the lines are shorter and longer than what is looked at in one piece
def test_forget_lines(tmp_path: Path, cut: str, size: int) -> None:
    steps = [0, 0, 1, 2, 2, 2, 4]
    lines = [json.dumps({"step": step, "text": "x" * size}) + "\n" for step in steps]
    path = tmp_path / "log.jsonl"
    for last in range(-1, 6):
        path.write_text("".join(lines) + cut)
        node = path.stat().st_ino
        data.forget_lines(path, last)
        assert path.read_text() == "".join(line for line, step in zip(lines, steps, strict=True) if step <= last)
        assert path.stat().st_ino == node
    path.write_text(cut)
    data.forget_lines(path, 9)
    assert path.read_text() == ""
    data.forget_lines(tmp_path / "missing.jsonl", 3)
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_forget_lines_reads_only_what_it_forgets(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as file:
        file.seek(10 << 30)  # 10 GiB of zeros, which take no room
        file.write(b'\n{"step": 1}\n{"step": 2}\n')
    data.forget_lines(path, 1)
    assert path.stat().st_size == (10 << 30) + len(b'\n{"step": 1}\n')


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(name, killed)


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "folder" / "a.json"
    data.write_whole(path, "old é")
    with monkeypatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(Killed):
            data.write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "old é"
    data.write_whole(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    folder = tmp_path / "checkpoints" / "step_1"

    def write_folder(text: str) -> None:
        with data.written_whole(folder) as beside:
            assert list(beside.iterdir()) == []
            (beside / "part").mkdir()
            (beside / "part" / "weights").write_text(text)

    for untidied in (False, True):  # a kill leaves what an error tidies up
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            if untidied:
                patch.setattr("shutil.rmtree", lambda *_, **__: None)
            with pytest.raises(Killed):
                write_folder("in part")
        assert os.listdir(folder.parent) == [".step_1.unfinished"] * untidied
    write_folder("whole")
    assert [path.name for path in folder.parent.rglob("*")] == ["step_1", "part", "weights"]
    assert (folder / "part" / "weights").read_text() == "whole"


def test_a_folder_goes_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step_1"
    for killed in (True, False):
        with data.written_whole(folder) as beside:
            (beside / "weights").write_text("5")
        with monkeypatch.context() as patch:
            if killed:
                kill_at(patch, "shutil.rmtree")
            with contextlib.suppress(Killed):
                data.remove_whole(folder)
        assert os.listdir(tmp_path) == [".step_1.unfinished"] * killed
