"""Switching mechanisms off: what is left is plain GRPO, and what tools/ablate.py makes of the comparison."""
from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import even_sums, lines
from transformers import AutoModelForCausalLM

import ablate
import data
import toy
import train
from difficulty import write_problems
from polaris_mini import Config, advantages, read_config, saved_config
from reward import RewardPool
from rollout import HFEngine, Sampling, load_tokenizer, sample_groups, set_rewards

SMALL = ["--prompts-per-step", "8", "--group-size", "4", "--reward-workers", "1"]


def test_with_all_mechanisms_off_training_is_plain_grpo_to_the_bit(tmp_path):
    """A loop that knows sampling, grading, advantages and the update, and nothing else, ends at the same weights."""
    even = even_sums(tmp_path / "even.jsonl", 40)
    options = [*SMALL, "--data", str(even), "--stages", "2:1.0:40", "1:1.0:40", "--eval-every", "-1"]
    off = ["--no-rescue", "--no-substitute", "--mastered-above", "1"]
    train.main([*options, *off, "--run-dir", str(tmp_path / "run")])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_000003").state_dict()

    config = read_config(options)
    tokenizer, policy = load_tokenizer(config.model, config), train.load_policy(config)
    problems = data.encode_prompts(data.load_problems(str(even)), tokenizer, config)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    run = types.SimpleNamespace(
        config=config, policy=policy, optimizer=train.make_optimizer(policy, config),
        scaler=torch.amp.GradScaler("cpu", enabled=False), state=types.SimpleNamespace(temperature=1.0),
    )  # fmt: skip
    engine = HFEngine(policy, tokenizer, config)
    sampler = data.ProblemSampler(problems, config.seed)
    with RewardPool(1, config.reward_timeout, True) as pool:
        for step in range(3):
            seed = random.Random(f"{config.seed}:{step}").getrandbits(63)
            groups = set_rewards(*sample_groups(engine, pool, sampler.peek(8), 4, Sampling(1.0, 40, seed)))
            sampler.advance(8)
            for group in groups:
                values = advantages([rollout.reward for rollout in group.rollouts])
                for rollout, value in zip(group.rollouts, values, strict=True):
                    rollout.advantage = value
            train.update_policy(run, groups)
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(torch.equal(trained[name], value) for name, value in policy.state_dict().items())


FIRST = ["--model", "M", "--data", "problems.jsonl", "--eval-data", "held_out.jsonl"]
SETTING = {
    "rescue": {"rescue"}, "rescue-sound": {"rescue"}, "temperature": {"stages"}, "filter": {"data"},
    "substitution": {"substitute"}, "substitution-sgd": {"substitute"}, "substitution-poor": {"substitute"},
    "length": {"stages"}, "mastered": {"mastered_above"}, "clip-high": {"clip_high"}, "tis": {"mismatch"},
    "polaris": {"data", "rescue", "substitute", "mastered_above", "stages"}}  # fmt: skip
"""What a regime's variants may differ in."""


@pytest.mark.parametrize("name", ablate.REGIMES)
def test_variants_of_a_regime_differ_in_its_mechanism_alone(name):
    regime = ablate.REGIMES[name]

    def config(options: str) -> Config:
        return read_config([*shlex.split(f"{ablate.PLAIN} {regime.options}"), *FIRST, *shlex.split(options)])

    without, *others = (config(options) for options in regime.variants.values())
    assert (without.rescue, without.substitute, without.mastered_above, without.updates_per_batch) == (
        False, False, 1, 4 if name == "clip-high" else 1)  # fmt: skip
    assert len({(stage.temperature, stage.max_response_tokens) for stage in without.schedule}) == 1
    for other in others:
        assert {field for field, value in vars(other).items() if value != getattr(without, field)} == SETTING[name]
        assert other.total_steps == without.total_steps
    assert config(regime.options).longest_response <= 128


def made_up_run(folder: Path, rates: dict[int, float], tokens: int = 1000) -> Path:
    steps = range(1, max(rates) + 1)
    same = {"tokens/rollout": tokens, "tokens/update": 10, "batch/informative": 0.5, "reward/mean": 0.5,
            "response/tokens_mean": 9, "policy/clip_fraction": 0.0, "mismatch/kl": 0.0, "sampling/temperature": 1.0}
    data.append_lines(folder / "metrics.jsonl", [
        {"step": step, **same, "policy/entropy": 1 / step, "policy/loss": None if step == 1 else 0.0} for step in steps
    ])
    data.append_lines(folder / "evaluations.jsonl", [
        {"step": step, "avg_at_k": rate, "pass_at_k": [rate, 1.0]} for step, rate in rates.items()])
    data.append_lines(folder / "scores.jsonl", [
        {"step": step, "id": name, "score": score}
        for step, name, score in ((0, "a", 1.0), (1, "a", 0.0), (1, "b", 0.5), (2, "a", 0.0))])
    return folder


REGIME = ablate.Regime("made up", {"0-8": 4}, "", {"off": "", "on": "--rescue"}, (ablate.STEPS,), target=0.45)


def test_measures_interpolate_the_steps_and_tokens_to_the_target(tmp_path):
    run = made_up_run(tmp_path / "rising", {0: 0.2, 10: 0.4, 20: 0.6})
    found = ablate.measure_run(run, REGIME)
    assert found[ablate.STEPS] == pytest.approx(12.5)
    assert found[ablate.TOKENS] == pytest.approx(12.5)
    assert found[ablate.FINAL] == pytest.approx(60)
    assert found[ablate.SPEED] == pytest.approx(40)
    assert found[ablate.GENERATED] == pytest.approx(20)
    assert found["problems ever solved, %"] == 50  # the score of step 0 was measured before training
    assert found[ablate.SKIPPED] == 5
    assert found["entropy at the end, nats"] == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert ablate.measure_run(run, replace(REGIME, target=0.7))[ablate.STEPS] is None
    assert ablate.measure_run(run, replace(REGIME, target=0.1))[ablate.STEPS] == 0


def test_every_metric_of_a_regime_is_measured(tmp_path):
    run = made_up_run(tmp_path / "run", {0: 0.2, 10: 0.4})
    for t in ("0.6", "1"):
        result = {"avg_at_k": 0.5, "pass_at_k": [0.5, 0.75], "distinct_4": 0.3}
        data.write_whole(run / f"eval-{t}" / "results.json", json.dumps({"results": {"sums": {"plain": result}}}))
    found = ablate.measure_run(run, replace(REGIME, temperatures=(0.6, 1.0)))
    assert found["pass@8 at T = 0.6, %"] == 75
    assert all(set(regime.metrics) <= set(found) for regime in ablate.REGIMES.values())


def test_differences_are_paired_by_seed():
    cells = ablate.Comparison(ablate.FINAL, off=(10.0, 30.0, 50.0), on=(12.0, 32.0, 55.0)).cells()
    assert cells == ["30.0", "33.0", "+3.0 ± 4.3"]  # differences 2, 2, 5: 4.30 * sqrt(3) / sqrt(3)
    cells = ablate.Comparison(ablate.STEPS, off=(10.0, None, 20.0), on=(8.0, 30.0, None)).cells()
    assert cells == ["15 (reached by 2 of 3)", "19 (reached by 2 of 3)", "-2 (1 of 3 seeds)"]
    assert ablate.Comparison(ablate.STEPS, off=(None,), on=(None,)).cells() == ["(reached by 0 of 1)"] * 2 + [""]


def made_up_world(out: Path) -> ablate.Start:
    """Write the toy world's problems with made-up pass rates, in place of 4,096 that are measured."""
    problems = [replace(problem, pass_rate=i % 9 / 8) for i, problem in enumerate(toy.toy_problems(274, 0))]
    (out / "world-toy").mkdir(parents=True)
    for name, part in (("held_out", problems[:4]), ("problems", problems[4:]), ("pool", problems[4:])):
        write_problems(part, out / "world-toy" / f"{name}.jsonl")
    start = ablate.Start.of("toy", out)
    start.prepare()
    return start


def test_a_seeds_problems_have_the_pass_rates_that_the_regime_wants(tmp_path):
    start = made_up_world(tmp_path)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        ablate.choose_problems(start, {"0": 10, "3-5": 20, "8": 5}, seed, tmp_path / name)
    rates = Counter(line["pass_rate"] * 8 for line in lines(tmp_path / "a" / "problems.jsonl"))
    assert (rates[0], rates[3] + rates[4] + rates[5], rates[8], rates.total()) == (10, 20, 5, 35)
    assert not any(line["pass_rate"] == 1 for line in lines(tmp_path / "a" / "filtered.jsonl"))
    texts = [(tmp_path / name / "problems.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(data.UserError, match="30 problems have 8 right of 8, and 31 are wanted"):
        ablate.choose_problems(start, {"8": 31}, 1, tmp_path / "d")


SHORT = "--stages 2:1.0:24 --prompts-per-step 4 --group-size 2 --eval-rollouts 1 --eval-every 1"


def test_a_regime_runs_every_variant_once_and_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path):
    made_up_world(tmp_path / "out")
    regime = replace(REGIME, problems={"0-8": 12}, options=SHORT, metrics=(ablate.FINAL, "pass@8 at T = 1, %"),
                     temperatures=(1.0,))  # fmt: skip
    monkeypatch.setattr(ablate, "REGIMES", {"made-up": regime})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["made-up", "--seeds", "1", "--seed", "4", "--out", str(tmp_path / "out"), "--variant",
                 "slow: --lr 1e-5"]  # fmt: skip
    ablate.main(arguments)
    shown = capsys.readouterr().out
    folder = tmp_path / "out" / "made-up"
    table = (folder / "table.md").read_text()
    assert table in shown
    assert table.splitlines()[2] == "| metric | off | on | difference | slow | difference |"
    assert len(table.splitlines()) == 4 + 4
    assert (folder / "curves.png").stat().st_size > 10_000
    assert {path.parent.name: len(lines(path)) for path in folder.glob("*/metrics.jsonl")} == {
        "off-4": 2, "on-4": 2, "slow-4": 2}  # fmt: skip
    config = saved_config(folder / "slow-4")
    assert (config.seed, config.rescue, config.lr) == (4, False, 1e-5)
    first = [(line["id"], line["response"]) for line in lines(folder / "off-4" / "rollouts.jsonl") if line["step"] == 1]
    same = [(line["id"], line["response"]) for line in lines(folder / "slow-4" / "rollouts.jsonl") if line["step"] == 1]
    assert first == same  # paired: one start, one seed

    cut = folder / "on-4"  # as if it had been killed before its last step
    shutil.rmtree(cut / "checkpoints" / "step_000002")
    shutil.rmtree(cut / "eval-1")
    for name in ("metrics", "evaluations"):
        kept = (cut / f"{name}.jsonl").read_text().splitlines(keepends=True)[:-1]
        (cut / f"{name}.jsonl").write_text("".join(kept))
    ablate.main(["all", *arguments[1:]])
    again = capsys.readouterr().out
    assert [line.partition(":")[0] for line in again.splitlines() if line.endswith(" s")] == [
        "made-up, seed 4, on", f"{cut} at T = 1.0"]  # fmt: skip
    assert (folder / "table.md").read_text() == table
    *_, on, slow = (folder.parent / "table.md").read_text().splitlines()
    assert [on.split(" | ")[0], slow.split(" | ")[0]] == ["| made-up: on", "| made-up: slow"]
    assert (folder.parent / "curves.png").stat().st_size > 10_000

    with pytest.raises(data.UserError, match="off-4 has other settings"):
        ablate.main([*arguments, "--options=--weight-decay 0.1"])


def test_a_signal_stops_the_runs_at_a_checkpoint(environment, tmp_path):
    made_up_world(tmp_path / "out")
    command = [sys.executable, str(ablate.ROOT / "tools" / "ablate.py"), "clip-high", "--seeds", "1", "--out", "out",
               f"--options={SHORT.replace('2:', '2000:').replace('every 1', 'every 0')}"]
    started = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    run = tmp_path / "out" / "clip-high" / "off-0"
    while started.poll() is None and len(list(data.read_lines(run / "metrics.jsonl"))) < 2:
        time.sleep(0.1)
    started.terminate()
    assert "the same command goes on" in started.communicate(timeout=60)[0]
    assert started.returncode == 130
    step = len(lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step_{step:06d}" / "trainer_state.json").exists()
