"""The toy world: sums, bad habits, tokenizer, and the folder that tools/toy.py makes of them."""
from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import toy
import warmup
from data import UserError
from polaris_mini import PRESETS

SHIPPED = Path(toy.__file__).parent / "toy_world"
SMALL = ["--problems", "30", "--held-out", "10", "--terms", "2", "3", "--warmup-steps", "4"]


def total(problem: data.Problem) -> int:
    return sum(map(int, problem.text.split(" + ")))


# --------------------------------------------------------------------------- problems and habits


def test_toy_problems_are_different_sums():
    problems = toy.toy_problems(2000, seed=0)
    assert problems == toy.toy_problems(2000, seed=0) != toy.toy_problems(2000, seed=1)
    assert len({problem.text for problem in problems}) == 2000
    for problem in problems:
        terms = [int(term) for term in problem.text.split(" + ")]
        assert problem.answers == (str(sum(terms)),)
        assert problem.id == problem.text
        assert 1 <= min(terms) <= max(terms) <= 12
    lengths = Counter(problem.text.count(" + ") + 1 for problem in problems)
    assert set(lengths) == set(range(2, 13))
    assert all(100 < count < 400 for count in lengths.values())


def test_toy_response_without_habits_is_right_and_adds_one_term_a_line():
    for problem in toy.toy_problems(200, seed=0):
        response = toy.toy_response(problem, None)
        assert response.endswith(f"</think>\n\\boxed{{{problem.answers[0]}}}")
        assert response.count(" = ") == problem.text.count(" + ")


def slips_and_haste(world: toy.World) -> tuple[dict[tuple[int, int], Counter[int]], float]:
    """Return (last digit, term) -> slip -> how often, and the share of hasty lines where there can be."""
    rng = random.Random(0)
    slips: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    hasty = lines = 0
    for problem in toy.toy_problems(4000, seed=0):
        response = toy.toy_response(problem, rng, world)
        added = []
        value, *to_add = map(int, problem.text.split(" + "))
        for line in response.split("\n")[:-2]:
            left, result = line.split(" = ")
            first, *terms = map(int, left.split(" + "))
            assert first == value  # the chain goes on from a wrong value
            lines, hasty = lines + (len(to_add) - len(added) > 1), hasty + (len(terms) > 1)
            added += terms
            if len(terms) == 1:
                slips[value % 10, terms[0]][int(result) - value - terms[0]] += 1
            value = int(result)
        assert added == to_add
        assert response.endswith(f"\\boxed{{{value}}}")
    assert len(slips) == 120
    return slips, hasty / lines


def test_toy_response_errs_by_habit_and_carries_on():
    slips, haste = slips_and_haste(toy.DEFAULT)
    assert all(len(found) <= 2 for found in slips.values())  # right, or always the same slip
    hard = [found for found in slips.values() if found.total() > found[0]]
    assert 0.2 < len(hard) / len(slips) < 0.4
    whole = [found for found in hard if -10 not in found]  # a slip of -10 is not made where it leads below 1
    assert all(0.4 < 1 - found[0] / found.total() < 0.8 for found in whole)
    slipped = sum(found.total() - found[0] for found in whole)
    assert slipped == pytest.approx(toy.DEFAULT.wrong * sum(found.total() for found in whole), rel=0.05)
    assert haste == pytest.approx(toy.DEFAULT.haste, abs=0.02)


def test_habits_follow_the_worlds_settings():
    slips, haste = slips_and_haste(toy.World(hard=0.8, wrong=0.2, haste=0))
    assert haste == 0
    hard = [found for found in slips.values() if found.total() > found[0]]
    assert 0.6 < len(hard) / len(slips) < 0.9
    assert sum(found.total() - found[0] for found in hard) == pytest.approx(0.2 * sum(f.total() for f in hard), rel=0.1)
    slips, _ = slips_and_haste(toy.World(hard=0))
    assert all(set(found) == {0} for found in slips.values())


def test_rambling_repeats_lines_and_changes_nothing_else():
    world, rng = toy.World(hard=0, haste=0, ramble=0.5), random.Random(0)
    lines = repeated = 0
    for problem in toy.toy_problems(500, seed=0):
        response = toy.toy_response(problem, rng, world).split("\n")
        assert "\n".join(line for line, _ in itertools.groupby(response)) == toy.toy_response(problem, None)
        lines += len(response) - 2
        repeated += sum(a == b for a, b in itertools.pairwise(response))
    assert repeated / lines == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------------- tokenizer


def test_toy_tokenizer_is_exact_and_survives_saving(tmp_path):
    made, rng = toy.toy_tokenizer(), random.Random(0)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) == len(loaded) == 22
    assert made.tokenize("12 + 3 = 15\n</think>\n\\boxed{15}") == [
        "1", "2", " + ", "3", " = ", "1", "5", "\n", "</think>", "\n", "\\boxed{", "1", "5", "}"]  # fmt: skip
    for problem in toy.toy_problems(100, seed=0):
        text = f"<|user|>{problem.text}<|end|><|assistant|><think>{toy.toy_response(problem, rng)}<|end|>"
        for tokenizer in (made, loaded):
            tokens = tokenizer(text)["input_ids"]
            assert tokens == made(text)["input_ids"]
            assert "<|unk|>" not in tokenizer.convert_ids_to_tokens(tokens)
            assert tokenizer.decode(tokens) == text
    assert loaded.chat_template == made.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert data.thinks(loaded)


def test_toy_tokenizer_shows_what_it_does_not_know(tmp_path):
    made = toy.toy_tokenizer()
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        for text, shown in [("1é2", "1<|unk|>2"), ("1+2", "1<|unk|>2"), ("1\r\n", "1<|unk|>\n"), ("a ", "<|unk|>" * 2)]:
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.decode(tokens, skip_special_tokens=True) == shown


# --------------------------------------------------------------------------------- a world's files


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "one"
    toy.main([*SMALL, "--out", str(folder)])
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_world_is_whole(world):
    assert {path.name for path in world.parent.iterdir()} == {"one"}  # nothing half made is left beside it
    problems, held_out = (data.load_problems(str(world / f"{name}.jsonl")) for name in ("problems", "held_out"))
    assert (len(problems), len(held_out)) == (30, 10)
    assert len({problem.text for problem in [*problems, *held_out]}) == 40
    assert all(problem.answers == (str(total(problem)),) for problem in [*problems, *held_out])
    assert {problem.text.count(" + ") + 1 for problem in problems} == {2, 3}
    model, tokenizer = (kind.from_pretrained(world / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.num_parameters() < 700_000


def test_same_seed_makes_the_same_world_to_the_last_bit(world, tmp_path):
    torch.manual_seed(99)  # what was random before has no influence
    toy.main([*SMALL, "--out", str(tmp_path / "again")])
    toy.main([*SMALL, "--out", str(tmp_path / "other"), "--seed", "1"])
    first, again, other = files(world), files(tmp_path / "again"), files(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    for name in ("problems.jsonl", "held_out.jsonl", "model/model.safetensors"):
        assert first[name] != other[name]


def test_warm_start_learns_and_sees_no_problem_of_the_world(world, tmp_path, monkeypatch):
    taught: list[str] = []
    encode = warmup.encode_examples

    def spy(examples, tokenizer, prompt_suffix):
        taught.extend(problem.text for problem, _ in examples)
        return encode(examples, tokenizer, prompt_suffix)

    monkeypatch.setattr(warmup, "encode_examples", spy)
    # 36 of the 144 sums of two terms: among 640 random sums would be nearly all of these
    losses = toy.make_world(toy.World(tmp_path / "w", problems=30, held_out=6, terms=(2, 2), warmup_steps=20))
    known = {p.text for name in ("problems", "held_out") for p in data.load_problems(str(tmp_path / f"w/{name}.jsonl"))}
    assert len(known) == 36
    assert len(taught) == 20 * 32
    assert len(set(taught)) > 90
    assert not known & set(taught)
    assert losses[-1] < 0.8 * losses[0]


def test_world_that_cannot_be(world, capsys):
    with pytest.raises(UserError, match="it exists already"):
        toy.main(["--out", str(world)])
    for options, message in (
        ("--terms 2 2", "problems is 640: with held_out give at most 72"), ("--terms 3 2", "terms is (3, 2): give two"),
        ("--terms 2 13", "give two numbers from 2 to 12"), ("--haste 1", "haste is 1.0: give a share from 0 to below"),
        ("--warmup-steps 0", "warmup_steps is 0: give at least 1"),
    ):
        with pytest.raises(SystemExit):
            toy.main([*options.split(), "--out", str(world / "new")])
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in shown
    assert not (world / "new").exists()


def test_shipped_world_loads_and_its_problems_are_right_sums():
    preset = PRESETS["toy"]
    assert preset.model == str(SHIPPED / "model")
    training, held_out = data.training_and_held_out(preset, lambda answers: None)
    assert (len(training), len(held_out)) == (640, 128)
    assert len({problem.text for problem in [*training, *held_out]}) == 768
    assert all(problem.answers == (str(total(problem)),) for problem in [*training, *held_out])
    texts = [json.loads(line)["problem"] for line in (SHIPPED / "held_out.jsonl").read_text().splitlines()]
    assert texts == [problem.text for problem in toy.toy_problems(768, 0)[:128]]  # made by seed 0
    tokenizer = AutoTokenizer.from_pretrained(preset.model)
    assert tokenizer.get_vocab() == toy.toy_tokenizer().get_vocab()
    assert tokenizer.chat_template == toy.TOY_TEMPLATE
    assert len(data.encode_prompts([*training, *held_out], tokenizer, preset)) == 768
    model = AutoModelForCausalLM.from_pretrained(preset.model)
    assert model.dtype == torch.float32
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 2_600_000
    # it works a sum out: each line follows from the one before, and the box is there
    prompt = tokenizer("<|user|>3 + 4 + 5<|end|><|assistant|><think>", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    lines = tokenizer.decode(written).split("\n")
    assert lines[0].startswith("3 + 4")
    assert lines[-2] == "</think>"
    assert lines[-1] == f"\\boxed{{{lines[-3].split(' = ')[1]}}}<|end|>"
