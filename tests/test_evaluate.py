"""Measure, probe and evaluate a tiny model; cut the files short and go on; stretch its positions; make mistakes."""
from __future__ import annotations

import gzip
import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from conftest import lines, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import data
import difficulty
import evaluate
import rollout
import toy
from data import UserError
from evaluate import PUBLISHED_ROLLOUTS, Eval, by_length, by_limit, fixed_length_distinct_4, short_names, yarn_config
from polaris_mini import Common, Group, Problem, Rollout
from reward import RewardPool
from rollout import Evaluation, ProbeCurves

TOY_WORLD = Path(toy.__file__).parent / "toy_world"
BENCHMARKS = Path(__file__).parents[2] / "shared" / "assets" / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the shared assets are not here")
TOKENIZER = toy.toy_tokenizer()
SUMS = ["1 + 1", "1 + 2", "2 + 1", "3 + 4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has learned, in a second, to answer every problem with 2 or 3, at random."""
    folder = tmp_path_factory.mktemp("model")
    policy = tiny_model("qwen3", tied=True)
    policy.set_attn_implementation("sdpa")
    texts = [f"<|user|>{text}<|end|><|assistant|><think>1 + 2 = {n}\n</think>\n\\boxed{{{n}}}<|end|>"
             for text in SUMS for n in "23"]  # fmt: skip
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    tokens = torch.tensor(rows)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(60):
        loss = policy(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"id": text, "problem": text, "answer": str(sum(map(int, text.split(" + "))))} for text in SUMS]
    return write(tmp_path / "sums.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(name: str, model: Path, *arguments: object) -> None:
    evaluate.main([name, "--model", str(model), "--max-response-tokens", "16", "--rollouts-per-batch", "8",
                   "--prompt-suffix", "", *map(str, arguments)])  # fmt: skip


def strict(path: Path) -> dict[str, Any]:
    """Read json as other programs do, which know no NaN."""
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def group(rewards: list[float], tokens: list[int] | None = None, texts: list[str] | None = None) -> Group:
    """Make rollouts with so many tokens each; those with 100 or more were cut."""
    tokens, texts = tokens or [10] * len(rewards), texts or [""] * len(rewards)
    return Group(Problem("p", "1?", ("1",)), [
        Rollout("p", (), [7] * n, [-1.0] * n, text, "length" if n >= 100 else "stop", reward)
        for reward, n, text in zip(rewards, tokens, texts, strict=True)
    ])  # fmt: skip


# ---------------------------------------------------------------------- what is computed


def test_evaluation_of_known_outcomes():
    found = [group([1, 0, 0, 0], [10, 20, 30, 100], ["a b c d e", "a b c d f", "", ""]), group([1] * 4),
             group([0] * 4), group([1, 1, 0, 0])]  # fmt: skip
    result = Evaluation.of(found)
    rates = [0.25, 1, 0, 0.5]
    assert (result.problems, result.k, result.avg_at_k) == (4, 4, pytest.approx(0.4375))
    # pass@2 of 1 of 4: 1 - C(3,2)/C(4,2); of 2 of 4: 1 - 1/6
    assert result.pass_at_k == pytest.approx([0.4375, (0.5 + 1 + 0 + 5 / 6) / 4, (0.75 + 1 + 0 + 1) / 4, 0.75])
    assert result.interval == pytest.approx(3.18 * statistics.stdev(rates) / 2)  # Student's t of 4 problems
    assert (result.tokens_mean, result.truncated) == (17.5, 1 / 16)
    assert result.distinct_4 == 0.75 / 4


def test_interval_is_over_problems_not_rollouts():
    """Rollouts of a problem are not independent: more of the same ones make the interval no narrower."""
    few, many = ([group([1] * k), group([0] * k), group([1] * k)] for k in (2, 64))
    assert Evaluation.of(many).interval == Evaluation.of(few).interval > 0.5
    assert math.isnan(Evaluation.of(few[:1]).interval)


def test_by_length_counts_every_response_once():
    found = [group([1, 0, 1], [5, 10, 11]), group([0, 1, 1], [10, 20, 100])]
    assert by_length(found, (10, 20)) == [(pytest.approx(1 / 3), 3), (1.0, 2), (1.0, 1)]
    assert by_length(found, ()) == [(pytest.approx(4 / 6), 6)]
    [(_, count), (accuracy, none)] = by_length(found, (200,))
    assert (count, none) == (6, 0)
    assert math.isnan(accuracy)


def test_by_limit_counts_what_is_cut_as_wrong():
    found = [group([1, 0, 1], [5, 10, 11]), group([0, 1, 1], [10, 20, 100])]
    assert by_limit(found, (4, 5, 11, 99, 100)) == [0, *(pytest.approx(n / 6) for n in (1, 2, 3, 4))]


def test_probe_curves_of_known_outcomes():
    varied = ["a b c d e", "f g h i j"]
    found = {0.5: [group([1, 1], texts=["a b c d e"] * 2), group([1, 0], texts=["a b c d e"] * 2)],
             1.0: [group([1, 0], texts=varied), group([0, 0], texts=["a b c", "d"])]}  # fmt: skip
    curves = ProbeCurves.of(found)
    assert curves.accuracy == {0.5: 0.75, 1.0: 0.25}
    assert curves.noise == {0.5: 0, 1.0: 0}  # both problems differ by the same: that pair says more than two means
    assert curves.distinct_4 == {0.5: 0.5, 1.0: 0.5}
    found[1.0][1] = group([1, 0])
    assert ProbeCurves.of(found).noise[1.0] == pytest.approx(statistics.stdev([0.5, 0]) / 2**0.5)


def test_distinct_4_at_a_fixed_length_looks_at_long_enough_responses_only():
    groups = [group([0, 0], texts=["a b c d e x x x", "a b c d e y"]), group([0, 0], texts=["a b c d e", "b c d e"])]
    assert fixed_length_distinct_4(groups[:1], 5) == 0.5  # the same two 4-grams twice
    assert fixed_length_distinct_4(groups, 5) == 0.5  # without the problem of short responses
    assert fixed_length_distinct_4(groups, 4) == 0.75
    assert math.isnan(fixed_length_distinct_4(groups, 7))


# ------------------------------------------------------------------------------ measure


def test_measure_writes_pass_rates_that_load(model: Path, sums: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "scores.jsonl"
    run("measure", model, "--data", sums, "--out", out)
    problems = {problem.id: problem for problem in data.load_problems(str(out))}
    assert list(problems) == SUMS
    for row in lines(out):
        problem, outcomes = problems[row["id"]], row["outcomes"]
        assert (problem.text, list(problem.answers)) == (row["problem"], row["answers"])
        assert problem.pass_rate == row["pass_rate"] == sum(o["reward"] for o in outcomes) / 8
        assert len(outcomes) == 8
        assert all(o["text"] == "" and o["tokens"] <= 16 for o in outcomes)
        assert row["settings"]["temperature"] == 0.6
    rates = [problem.pass_rate for problem in problems.values()]
    assert rates[3] == 0  # the model never says 7
    assert any(0 < rate < 1 for rate in rates[:3])
    assert f"4 problems, mean pass rate {statistics.fmean(rates):.1%}" in capsys.readouterr().out
    difficulty.main(["filter", "--scores", str(out), "--out", str(tmp_path / "kept.jsonl"), "--min-pass-rate", "0.1"])
    kept = data.load_problems(str(tmp_path / "kept.jsonl"))
    assert [problem.id for problem in kept] == [text for text in SUMS if problems[text].pass_rate]


def test_measure_of_some_problems(model: Path, tmp_path: Path):
    some = ("measure", model, "--data", TOY_WORLD / "held_out.jsonl", "--problems", 4, "--rollouts", 2, "--out")
    run(*some, tmp_path / "new" / "scores.jsonl")
    found = [row["id"] for row in lines(tmp_path / "new" / "scores.jsonl")]
    assert len(set(found)) == 4
    run(*some, tmp_path / "other.jsonl", "--seed", 1)
    assert {row["id"] for row in lines(tmp_path / "other.jsonl")} != set(found)  # the seed chooses


def test_measure_refuses_a_file_with_other_settings(model: Path, sums: Path, tmp_path: Path):
    out = tmp_path / "scores.jsonl"
    run("measure", model, "--data", sums, "--rollouts", 2, "--out", out)
    before = out.read_bytes()
    for other in (["--rollouts", 4], ["--rollouts", 2, "--temperature", 1.0], ["--rollouts", 2, "--top-k", 5]):
        with pytest.raises(UserError, match=r"scores.jsonl: holds pass rates with other settings.* another --out"):
            run("measure", model, "--data", sums, "--out", out, *other)
    assert out.read_bytes() == before


def test_problems_that_have_changed_are_refused(model: Path, sums: Path, tmp_path: Path):
    out = tmp_path / "scores.jsonl"
    run("measure", model, "--data", sums, "--rollouts", 2, "--out", out)
    sums.write_text(sums.read_text().replace('"answer": "7"', '"answer": "3"'))
    with pytest.raises(UserError, match=r"scores.jsonl: problem 3 \+ 4 has changed in .*: give another --out"):
        run("measure", model, "--data", sums, "--rollouts", 2, "--out", out)


@pytest.mark.parametrize("content", ['{"problem": "1 + 1", "answer": "2"}\n', "notes\n", "[1]\n", '"text"\n'])
def test_a_file_of_something_else_is_left_alone(model: Path, sums: Path, tmp_path: Path, content: str):
    out = tmp_path / "mine.jsonl"
    out.write_text(content)
    with pytest.raises(UserError, match=r"mine.jsonl: exists and is not a file of this command: give another --out"):
        run("measure", model, "--data", sums, "--out", out)
    assert out.read_text() == content


# --------------------------------------------------------- interrupted commands go on

COMMANDS: dict[str, tuple[list[object], str, list[str]]] = {
    "measure": (["--rollouts", 4], "", []),
    "probe": (["--rollouts", 4, "--temperatures", "0.5:1.5:0.5", "--problems", 0], "responses.jsonl", ["probe.json"]),
    "eval": (["--rollouts", 4, "--yarn-factor", 1.5], "responses.jsonl", ["results.json"]),
}
CUTS: list[Callable[[bytes], int]] = [
    lambda whole: 0,  # killed before the first line
    lambda whole: len(whole.splitlines(keepends=True)[0]) // 2,  # inside the first line
    lambda whole: len(whole.splitlines(keepends=True)[0]),  # between the two problems that were sampled together
    lambda whole: int(0.6 * len(whole)),
    lambda whole: len(whole) - 1,  # only the last line end is missing
]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_interrupted_command_goes_on(model: Path, sums: Path, tmp_path: Path, name: str):
    more, file, results = COMMANDS[name]
    out = tmp_path / "out"
    arguments = (name, model, "--data", sums, *more, "--out", out)
    run(*arguments)
    whole, written = (out / file).read_bytes(), [strict(out / result) for result in results]
    rows = lines(out / file)
    assert len({(row["id"], json.dumps(row["settings"])) for row in rows}) == len(rows) >= 4
    for cut in CUTS:
        (out / file).write_bytes(whole[: cut(whole)])
        run(*arguments)
        assert (out / file).read_bytes() == whole  # what was lost is drawn again, the same; the rest stays as it was
        assert [strict(out / result) for result in results] == written


@pytest.mark.parametrize("name", list(COMMANDS))
def test_nothing_is_sampled_twice(model: Path, sums: Path, tmp_path: Path, name: str):
    """A second call does without the weights."""
    more, file, _ = COMMANDS[name]
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, folder)
    arguments = (name, folder, "--data", sums, *more, "--out", out)
    run(*arguments)
    whole = (out / file).read_bytes()
    (folder / "model.safetensors").unlink()
    run(*arguments)
    assert (out / file).read_bytes() == whole
    with pytest.raises(UserError, match="it does not load"):
        run(name, folder, "--data", sums, *more, "--out", tmp_path / "other")


# -------------------------------------------------------------------------------- probe


def test_probe_measures_the_whole_grid(model: Path, sums: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "probe"
    run("probe", model, "--data", sums, "--out", out, "--temperatures", "0.2:1.4:0.4", "--rollouts", 4,
        "--diversity-words", 2, "--match-diversity", 0.0)  # fmt: skip
    found = strict(out / "probe.json")
    grid = ["0.2", "0.6", "1.0", "1.4"]
    assert [list(curve) for curve in found["curves"].values()] == [grid] * 4
    rows = lines(out / "responses.jsonl")
    assert [row["settings"]["temperature"] for row in rows] == [t for t in map(float, grid) for _ in SUMS]
    for t in grid:
        rates = [row["pass_rate"] for row in rows if row["settings"]["temperature"] == float(t)]
        assert found["curves"]["accuracy"][t] == statistics.fmean(rates)
    assert any(o["text"] for row in rows for o in row["outcomes"])
    assert found["curves"]["accuracy"]["0.2"] > 0
    assert found["temperature"] == {"first stage": found["zones"]["robust_until"], "later stage": 0.2}
    assert found["settings"]["temperatures"] == "0.2:1.4:0.4"
    image = matplotlib.image.imread(out / "probe.png")
    assert image.min() < 0.5 < image.max()
    shown = capsys.readouterr().out
    assert re.search(r"^ +1\.4 +\d+\.\d% ", shown, re.MULTILINE)
    assert ("no collapse up to 1.4" in shown) == (found["zones"]["exploration_until"] == 1.4)


def test_probe_in_which_nothing_is_correct_says_so(model: Path, tmp_path: Path):
    hard = write(tmp_path / "hard.jsonl", [{"problem": "3 + 4", "answer": "7"}])
    with pytest.raises(ValueError, match="accuracy is 0 at every temperature"):
        run("probe", model, "--data", hard, "--temperatures", "1.0", "--rollouts", 2, "--out", tmp_path)


def test_probe_of_one_temperature(model: Path, sums: Path, tmp_path: Path):
    """No response has 500 words: the diversity at that length is unknown, in the file null."""
    run("probe", model, "--data", sums, "--problems", 0, "--temperatures", "1.0", "--rollouts", 4, "--out", tmp_path)
    found = strict(tmp_path / "probe.json")
    assert found["curves"]["distinct_4_fixed"] == {"1.0": None}
    assert found["zones"] == {"robust_until": 1.0, "exploration_until": 1.0}


# --------------------------------------------------------------------------------- eval


def test_eval_of_two_files_plain_and_stretched(model: Path, sums: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "minerva.jsonl").write_text(sums.read_text().replace('"7"', '["7", "2"]'))
    sources = [str(sums), str(tmp_path / "minerva.jsonl")]
    run("eval", model, "--data", *sources, "--out", tmp_path / "eval", "--yarn-factor", 1.5, "--length-bounds", 4, 13,
        "--limits", 4, 12, 32)  # fmt: skip
    found = strict(tmp_path / "eval" / "results.json")
    rows = lines(tmp_path / "eval" / "responses.jsonl")
    stretched = {"factor": 1.5, "original_max_positions": 256, "attention_scale": 1.0}
    assert list(found["results"]) == sources
    for source, k in zip(sources, (8, 4), strict=True):  # k as published, by file name
        assert list(found["results"][source]) == ["plain", "YaRN 1.5"]
        for variant, yarn in (("plain", None), ("YaRN 1.5", stretched)):
            result = found["results"][source][variant]
            these = [r for r in rows if (r["settings"]["data"], r["settings"]["yarn"]) == (source, yarn)]
            assert [row["id"] for row in these] == SUMS
            assert all(len(row["outcomes"]) == k for row in these)
            assert result["k"] == k == len(result["pass_at_k"])
            assert result["avg_at_k"] == pytest.approx(statistics.fmean(row["pass_rate"] for row in these))
            assert result["pass_at_k"][0] == pytest.approx(result["avg_at_k"])
            assert sum(count for _, count in result["by_length"]) == 4 * k
            assert result["by_limit"][0] == 0
            assert result["by_limit"][2] == result["avg_at_k"] > 0
    settings = rows[0]["settings"]
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (1.4, 1.0, 20)  # as published
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(json.dumps(row["settings"]["yarn"]), []).extend(o["text"] for o in row["outcomes"])
    assert len(set(map(tuple, texts.values()))) == 2  # stretched positions, other responses
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("minerva", "YaRN 1.5", "up to 13", "above 13", "pass@k", "k = 8"))


def test_two_files_of_one_name_are_told_apart(model: Path, sums: Path, tmp_path: Path, capsys: Any):
    sources = [tmp_path / folder / "test.jsonl" for folder in "ab"]
    for source in sources:
        source.parent.mkdir()
        source.write_text(sums.read_text())
    run("eval", model, "--data", *sources, sums, sources[0], "--problems", 1, "--rollouts", 2, "--out", tmp_path)
    accuracy = capsys.readouterr().out.split("\n\n")[1]
    assert [line.split()[0] for line in accuracy.splitlines()[1:]] == ["a/test.jsonl", "b/test.jsonl", "sums"]
    assert list(strict(tmp_path / "results.json")["results"]) == [*map(str, sources), str(sums)]
    assert [row["settings"]["data"] for row in lines(tmp_path / "responses.jsonl")] == [*map(str, sources), str(sums)]


@pytest.mark.parametrize(("sources", "names"), [
    (["x/a.jsonl"], ["a"]), (["a.jsonl", "x/a.jsonl"], ["a.jsonl", "x/a.jsonl"]),
    (["x/a.jsonl", "x/a.parquet"], ["a.jsonl", "a.parquet"]), (["/x/t/a", "/y/t/a"], ["x/t/a", "y/t/a"]),
    (["a.jsonl", "./a.jsonl"], ["a.jsonl", "./a.jsonl"]),
    (["o/n:main:test", "o/n:socratic:test"], ["n:main:test", "n:socratic:test"]),
])  # fmt: skip
def test_short_names(sources: list[str], names: list[str]):
    assert list(short_names(sources).values()) == names


def test_eval_of_one_problem_without_buckets(model: Path, sums: Path, tmp_path: Path):
    """One problem has no interval: null in the file."""
    run("eval", model, "--data", sums, "--problems", 1, "--rollouts", 2, "--out", tmp_path, "--length-bounds",
        "--limits")  # fmt: skip
    result = strict(tmp_path / "results.json")["results"][str(sums)]["plain"]
    assert (result["problems"], result["interval"], len(result["by_length"]), result["by_limit"]) == (1, None, 1, [])


@pytest.mark.parametrize(("file", "k"), [
    *((f"{name}.jsonl", k) for name, k in PUBLISHED_ROLLOUTS.items()), ("aime24.jsonl.gz", 32), ("other.jsonl", 8),
])  # fmt: skip
def test_published_k_by_file_name(model: Path, sums: Path, tmp_path: Path, file: str, k: int):
    (tmp_path / file).write_bytes(gzip.compress(sums.read_bytes()) if file.endswith(".gz") else sums.read_bytes())
    run("eval", model, "--data", tmp_path / file, "--problems", 1, "--out", tmp_path / "eval")
    assert strict(tmp_path / "eval" / "results.json")["results"][str(tmp_path / file)]["plain"]["k"] == k


def test_published_settings():
    assert PUBLISHED_ROLLOUTS == {"aime24": 32, "aime25": 32, "amc23": 8, "minerva": 4, "olympiad": 4}
    assert (Eval.temperature, Eval.top_p, Eval.top_k, Eval.max_response_tokens) == (1.4, 1.0, 20, 90000)


@needs_benchmarks
def test_eval_of_the_benchmarks(tmp_path: Path):
    """The released files as they are, with list and float answers, all problems of them read and two of each drawn."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<|end|>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(tmp_path / "model")
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, eos_token_id=256, bos_token_id=None, pad_token_id=None,
    )).save_pretrained(tmp_path / "model")  # fmt: skip
    files = [BENCHMARKS / f"{name}.parquet" for name in PUBLISHED_ROLLOUTS]
    evaluate.main(["eval", "--model", str(tmp_path / "model"), "--data", *map(str, files), "--problems", "2",
                   "--max-prompt-tokens", "8192", "--max-response-tokens", "2", "--out", str(tmp_path)])  # fmt: skip
    found = strict(tmp_path / "results.json")["results"]
    assert {Path(source).stem: result["plain"]["k"] for source, result in found.items()} == PUBLISHED_ROLLOUTS
    options = Common(max_prompt_tokens=8192)
    tokenizer = rollout.load_tokenizer(str(tmp_path / "model"), options)
    for file, count in zip(files, (30, 30, 83, 272, 675), strict=True):
        problems = data.encode_prompts(data.load_problems(str(file)), tokenizer, options)
        assert len(problems) == count
        assert all(tokenizer.decode(p.prompt_tokens).count(options.prompt_suffix) == 1 for p in problems)
        with RewardPool(require_think=False) as pool:  # every right answer is graded as one
            rng = random.Random(0)
            shown = [(f"\\boxed{{{p.answers[0]}}}", p.answers, False) for p in rng.sample(problems, 10)]
            assert [grade.reward for grade in pool.grade(shown)] == [1] * 10


# --------------------------------------------------------------------------------- YaRN


def frequencies(head_dim: int, base: float, factor: float, original: int) -> list[float]:
    """(head_dim/2,) of the YaRN paper: as they are beyond 32 rotations in the original length, divided below 1."""
    rotations_at = lambda r: head_dim * math.log(original / (r * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    low, high = max(math.floor(rotations_at(32)), 0), min(math.ceil(rotations_at(1)), head_dim - 1)
    found = []
    for i in range(head_dim // 2):
        frequency, ramp = base ** (-2 * i / head_dim), min(max((i - low) / (high - low), 0), 1)
        found.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return found


@pytest.mark.parametrize(("factor", "scale"), [(1.5, 1.0), (1.5, 1.0405), (4.0, 0.5)])
def test_yarn_stretches_the_low_frequencies_only(tmp_path: Path, factor: float, scale: float):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=64,
                         num_key_value_heads=1, intermediate_size=32, max_position_embeddings=4096)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)

    def load(rope: dict[str, Any] | None) -> Any:
        return rollout.load_model(str(tmp_path), Common(device="cpu"), torch.float32, rope=rope)

    base = config.rope_parameters["rope_theta"]
    plain, off = load(None), load(yarn_config(1.0, 4096))
    stretched = load(yarn_config(factor, 4096, attention_scale=scale))
    was, found = (m.model.rotary_emb.inv_freq for m in (plain, stretched))
    torch.testing.assert_close(found, torch.tensor(frequencies(64, base, factor, 4096)), rtol=1e-5, atol=0)
    torch.testing.assert_close(was, torch.tensor(frequencies(64, base, 1.0, 4096)), rtol=1e-5, atol=0)
    assert found[0] == was[0]
    assert found[-1] == pytest.approx(float(was[-1]) / factor)
    assert stretched.model.rotary_emb.attention_scaling == scale
    assert stretched.config.max_position_embeddings == 4096 * factor
    tokens = torch.randint(50, (1, 200))
    with torch.no_grad():
        logits, same, other = (m(input_ids=tokens).logits for m in (plain, off, stretched))
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-6)
    assert (other - logits).abs().max() > 1e-4
    assert (other - logits)[0, 0].abs().max() < (1e-6 if scale == 1.0 else 1)  # position 0 is not rotated


# For vLLM, tests/test_vllm.py compares the two engines' log-probs.
@pytest.mark.parametrize("scale", [1.0, 1.0405, 0.5])
@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_yarn_sets_the_attention_scale_of_transformers(factor: float, scale: float):
    rope = yarn_config(factor, 40960, attention_scale=scale)
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", factor, 40960)
    config = Qwen3Config(max_position_embeddings=round(40960 * factor), rope_parameters={**rope, "rope_theta": 1e6})
    _, found = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert found == pytest.approx(scale)


def test_yarn_of_the_release_leaves_attention_scaling_on():
    """Source: blog, attn_factor 1.0 at factor 1.5 was to switch it off; its neutral value was 0.9610."""
    released = {"attn_factor": 1.0, "factor": 1.5, "rope_type": "yarn", "original_max_position_embeddings": 65536}
    config = Qwen3Config(max_position_embeddings=98304, rope_parameters={**released, "rope_theta": 1e6})
    _, found = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert found == pytest.approx(1.0405, abs=1e-4)
    assert 1 / found == pytest.approx(0.9610, abs=1e-4)


# ------------------------------------------------------------------------------ mistakes


def test_several_processes_are_refused(model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun started 2 processes, but this tool runs on one GPU"):
        run("eval", model, "--data", sums, "--out", tmp_path / "eval")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"python tools/evaluate.py {name} --model" in shown for name in ("eval", "probe", "measure"))
