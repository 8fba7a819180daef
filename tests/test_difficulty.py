"""Filter by pass rate into both layouts, read them back, draw histograms, make every mistake of the command line."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pyarrow
import pytest
from matplotlib.figure import Figure
from pyarrow import parquet

import data
import difficulty
from data import UserError
from difficulty import difficulty_histogram, histogram_verdict
from polaris_mini import Config, Problem

BENCHMARKS = Path(__file__).parents[2] / "shared" / "assets" / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the shared assets are not here")


def run(*arguments: object) -> None:
    difficulty.main([*map(str, arguments)])


def scores(path: Path, correct: list[int], **more: Any) -> Path:
    """Write what `measure` writes, with so many of 8 rollouts correct."""
    path.write_text("".join(json.dumps({
        "id": f"id{i}", "problem": f"What is ${i} + é$?", "answers": [str(i)], "system": None, "pass_rate": k / 8,
        "rollouts": 8, "tokens_mean": 7.5, "truncated": 0, "settings": {"temperature": 1.0}, **more,
    }) + "\n" for i, k in enumerate(correct)))  # fmt: skip
    return path


def without_suffix(problems: list[Problem]) -> list[tuple[object, ...]]:
    return [(p.id, p.text.removesuffix(f" {Config.prompt_suffix}"), p.answers, p.pass_rate, p.system) for p in problems]


# -------------------------------------------------------------------- what is computed


def test_difficulty_histogram_counts_correct_rollouts():
    assert difficulty_histogram([k / 8 for k in range(9) for _ in range(k)]) == list(range(9))
    assert difficulty_histogram([]) == [0] * 9


def test_difficulty_histogram_rounds_to_the_nearest_bin():
    assert difficulty_histogram([0.06, 0.0625, 0.1874, 0.1875, 0.93, 0.94]) == [1, 2, 1, 0, 0, 0, 0, 1, 1]
    assert difficulty_histogram([0.33, 1 / 3, 0.67, 2 / 3, 1.0], rollouts=3) == [0, 2, 2, 1]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        # Source: blog, read off its figures: problems with 0 to 8 of 8 correct
        ([8881, 2590, 2080, 1846, 1859, 1909, 2536, 4520, 14191], "J"),  # R1-Distill-7B on DeepScaleR
        ([13828, 3751, 2972, 2845, 2789, 2469, 2564, 2816, 6107], "mirrored J"),  # R1-Distill-1.5B on the same
        ([7339, 2484, 2200, 2341, 2453, 2994, 3447, 5040, 0], "mirrored J"),  # Qwen3-4B before, without 8 of 8
        ([5170, 2170, 1870, 1827, 1883, 2179, 2531, 3617, 8124], "J"),  # and after training
        ([13163, 5968, 4708, 4354, 4234, 4895, 5256, 6810, 0], "mirrored J"),  # R1-Distill-7B before, without 8 of 8
        ([8202, 4178, 3470, 3222, 3268, 3472, 3978, 5211, 12010], "J"),  # and after training
        # ours
        ([100, 10, 10, 10, 10, 10, 10, 10, 90], "U"),
        ([90, 10, 10, 10, 10, 10, 10, 10, 100], "U"),
        ([100, 10, 10, 10, 10, 10, 10, 90, 0], "U"),  # where all-correct ones were removed, 7 of 8 is the end
        ([20, 10, 10, 10, 10, 10, 10, 90, 0], "J"),
        ([10, 11, 9, 10, 12, 8, 10, 9, 11], "flat"),
        ([1, 20, 20, 20, 20, 20, 20, 20, 1], "flat"),
    ],
)
def test_histogram_verdict_names_the_published_shapes(counts, verdict):
    assert histogram_verdict(counts) == verdict


# ---------------------------------------------------------------------------- filter


@pytest.mark.parametrize(("options", "kept"), [
    ([], [0, 1, 4, 7]),  # the recipe: only what was always solved leaves
    (["--max-pass-rate", "1"], [0, 1, 4, 7, 8]),
    (["--min-pass-rate", "0.125"], [1, 4, 7]),
    (["--min-pass-rate", "0.5", "--max-pass-rate", "0.5"], [4]),
])  # fmt: skip
def test_filter_keeps_the_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], kept: list[int]
) -> None:
    source = scores(tmp_path / "scores.jsonl", [0, 1, 4, 7, 8])
    run("filter", "--scores", source, "--out", tmp_path / "out.jsonl", *options)
    found = data.load_problems(str(tmp_path / "out.jsonl"))
    assert found == [p for p in data.load_problems(str(source)) if p.pass_rate in [k / 8 for k in kept]]
    below, above = sum(k < min(kept) for k in (0, 1, 4, 7, 8)), sum(k > max(kept) for k in (0, 1, 4, 7, 8))
    shown = capsys.readouterr().out
    assert re.match(rf".*out.jsonl: kept {len(kept)} of 5 problems, removed {below} below .* and {above} above", shown)
    assert "\nbefore, 5 problems: U\n" in shown
    assert f"\nafter, {len(kept)} problems: " in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "scores.jsonl"]  # nothing unfinished


def test_filter_shows_histograms_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scores(tmp_path / "scores.jsonl", [0] * 100 + list(range(1, 8)) * 10 + [8] * 200)
    run("filter", "--scores", source, "--out", tmp_path / "out.parquet")
    head, before, after = capsys.readouterr().out.strip().split("\n\n")
    assert head.endswith("kept 170 of 370 problems, removed 0 below 0.0 and 200 above 0.999")
    assert before.splitlines()[:2] == ["before, 370 problems: J", f"0/8      100  27.0% {'#' * 25}"]
    assert before.splitlines()[-1] == f"8/8      200  54.1% {'#' * 50}"
    assert after.splitlines()[0] == "after, 170 problems: mirrored J"
    assert after.splitlines()[-1] == "8/8        0   0.0%"
    assert all(len(line) <= 80 for line in (before + "\n" + after).splitlines())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", ["plain", "verl"])
@pytest.mark.parametrize("answers", [("1",), ("1", "one")])
@pytest.mark.parametrize("ids", [("0", "12"), ("7", "07"), ("7", "x"), ("7", "9" * 30), ("7", "-7")])
@pytest.mark.parametrize("system", [None, "Be terse."])
def test_both_layouts_load_back(
    tmp_path: Path, suffix: str, layout: str, answers: tuple[str, ...], ids: tuple[str, str], system: str | None
) -> None:
    with_suffix = f"2é? {Config.prompt_suffix}"
    rows = [{"id": ids[0], "problem": "1?", "answers": answers, "pass_rate": 1 / 3, "system": None},
            {"id": ids[1], "problem": with_suffix, "answers": ["2"], "pass_rate": 0, "system": system}]
    source, out = tmp_path / "scores.json", tmp_path / f"out{suffix}"
    source.write_text(json.dumps(rows))
    run("filter", "--scores", source, "--out", out, "--layout", layout)
    problems = data.load_problems(str(source))
    assert without_suffix(data.load_problems(str(out))) == without_suffix(problems)
    rows = parquet.read_table(out).to_pylist() if suffix == ".parquet" else map(json.loads, out.open(encoding="utf-8"))
    first, second = rows
    if layout == "plain":
        assert list(first) == ["id", "problem", "answers", "pass_rate"] + (["system"] if system else [])
        assert data.load_problems(str(out)) == problems
        return
    user = {"role": "user", "content": f"1? {Config.prompt_suffix}"}
    number = ids == ("0", "12")
    assert first == {
        "data_source": "", "prompt": [user], "ability": "math",
        "reward_model": {"ground_truth": list(answers) if len(answers) > 1 else "1", "style": "rule"},
        "extra_info": {"index": 0 if number else ids[0], "pass_rate": 1 / 3, "split": "train"},
    }  # fmt: skip
    assert second["prompt"] == [{"role": "system", "content": "Be terse."}] * bool(system) + [
        {"role": "user", "content": with_suffix}]  # fmt: skip
    assert second["extra_info"]["index"] == (12 if number else ids[1])
    assert second["reward_model"]["ground_truth"] == (["2"] if len(answers) > 1 else "2")


def test_published_difficulties_are_pass_rates(tmp_path: Path) -> None:
    rows = [{"problem": f"{k}?", "answer": f"{k}", "difficulty": f"{k}/8"} for k in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "published.parquet")
    run("filter", "--scores", tmp_path / "published.parquet", "--out", tmp_path / "out.jsonl", "--layout", "verl")
    assert [p.pass_rate for p in data.load_problems(str(tmp_path / "out.jsonl"))] == [k / 8 for k in range(8)]


def test_filter_leaves_bad_rows_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scores(tmp_path / "scores.jsonl", [0, 4], id="same")
    with pytest.raises(UserError, match=r"line 2: id is same.*--skip-bad-rows"):
        run("filter", "--scores", source, "--out", tmp_path / "out.jsonl")
    run("filter", "--scores", source, "--out", tmp_path / "out.jsonl", "--skip-bad-rows")
    run("histogram", source, "--skip-bad-rows")
    assert [p.pass_rate for p in data.load_problems(str(tmp_path / "out.jsonl"))] == [0]
    assert capsys.readouterr().err.count("rows left out") == 2


@needs_benchmarks
@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "minerva", "olympiad"])
def test_released_files_keep_their_content(tmp_path: Path, name: str) -> None:
    released = parquet.ParquetFile(BENCHMARKS / f"{name}.parquet").read().to_pylist()
    for row in released:
        row["extra_info"]["pass_rate"] = 0.5
    source, out = tmp_path / "scores.json", tmp_path / "out.parquet"
    source.write_text(json.dumps(released))
    run("filter", "--scores", source, "--out", out, "--layout", "verl")
    assert data.load_problems(str(out)) == data.load_problems(str(source))
    for row, other in zip(parquet.ParquetFile(out).read().to_pylist(), released, strict=True):
        assert row["prompt"] == [{**turn, "content": turn["content"].strip()} for turn in other["prompt"]]
        assert row["ability"] == other["ability"]
        assert row["reward_model"]["style"] == other["reward_model"]["style"]
        assert row["extra_info"]["index"] == other["extra_info"].get("index", other["extra_info"].get("id"))


@needs_benchmarks
def test_verl_schema_is_the_released_one_and_pass_rate(tmp_path: Path) -> None:
    rows = [{"problem": "1?", "answer": "1", "id": 0, "pass_rate": 0.5}]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    run("filter", "--scores", tmp_path / "scores.json", "--out", tmp_path / "out.parquet", "--layout", "verl")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    place, extra = schema.get_field_index("extra_info"), schema.field("extra_info").type
    assert extra.field("pass_rate").type == pyarrow.float64()
    without = pyarrow.struct([field for field in extra if field.name != "pass_rate"])
    released = parquet.read_schema(BENCHMARKS / "aime24.parquet")
    assert schema.set(place, pyarrow.field("extra_info", without)).equals(released, check_metadata=False)


# -------------------------------------------------------------------------- histogram


def test_histograms_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scores(tmp_path / "before.jsonl", [0] * 5 + list(range(9)))
    after = scores(tmp_path / "after.jsonl", [8] * 10_000)
    run("histogram", before, after)
    first, second, png = capsys.readouterr().out.strip().split("\n\n")
    assert first.splitlines()[:2] == [f"{before}, 14 problems: mirrored J", f"0/8        6  42.9% {'#' * 50}"]
    assert second.splitlines()[0] == f"{after}, 10000 problems: J"
    assert second.splitlines()[-1] == f"8/8    10000 100.0% {'#' * 50}"
    assert all(len(line) <= 80 for line in first.splitlines()[1:] + second.splitlines()[1:])
    assert png == str(tmp_path / "before.png")
    image = matplotlib.image.imread(png)
    assert image.shape[:2] == (495, 880)
    assert image.min() < 0.5 < image.max()  # something is drawn
    run("histogram", before, "--out", tmp_path / "other.png")
    assert (tmp_path / "other.png").stat().st_size > 5000


def test_histogram_of_a_split_goes_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    scores(tmp_path / "a" / "b" / "test.jsonl", [0, 8])
    run("histogram", "a/b:test")
    assert (tmp_path / "b:test.png").exists()


def test_bars_stand_beside_each_other() -> None:
    axis = Figure().subplots()
    difficulty.plot_histograms(axis, {"_before": [3, 0, 0, 0, 0, 0, 0, 0, 1], "after": [0] * 9})
    bars = [[(round(bar.get_x(), 3), round(bar.get_width(), 3), bar.get_height()) for bar in group]
            for group in axis.containers]  # fmt: skip
    assert bars[0][0] == (-0.4, 0.4, 0.75)
    assert bars[0][8] == (7.6, 0.4, 0.25)
    assert bars[1] == [(float(k), 0.4, 0) for k in range(9)]  # no problem at all: no error
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"{k}/8" for k in range(9)]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["4 problems: _before", "0 problems: after"]


# ----------------------------------------------------------------------------- errors


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, names in (
        (["--help"], ["evaluate.py measure", "difficulty.py filter --scores", "difficulty.py histogram"]),
        (["filter", "--help"], ["--scores ", "--out ", "--min-pass-rate ", "--max-pass-rate ", "--layout "]),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        shown = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(name in shown for name in names)
