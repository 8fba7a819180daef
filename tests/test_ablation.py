"""Switching mechanisms off: what is left is plain GRPO, and what tools/ablate.py makes of the comparison."""
from __future__ import annotations

import random
import shutil
import types
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
from polaris_mini import PRESETS, advantages, read_config, saved_config
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


def test_each_variant_differs_from_all_mechanisms_in_one_setting():
    config = PRESETS["toy"]
    variants = ablate.ablation_variants(config, "filtered.jsonl", "scores.jsonl")
    complete = variants.pop("all mechanisms")
    plain = variants.pop("plain GRPO")
    changed = [name for variant in variants.values() for name in vars(variant)
               if getattr(variant, name) != getattr(complete, name)]
    assert sorted(changed) == ["data", "mastered_above", "rescue", "stages", "stages", "substitute"]
    assert all(variant.total_steps == config.total_steps for variant in variants.values())
    assert not plain.rescue
    assert not plain.substitute
    assert plain.mastered_above == 1
    assert {(stage.temperature, stage.max_response_tokens) for stage in plain.schedule} == {
        (config.schedule[0].temperature, config.schedule[-1].max_response_tokens)}  # fmt: skip


def test_a_run_of_one_stage_has_no_variants_without_a_rise():
    one_stage = replace(PRESETS["toy"], stages=PRESETS["toy"].stages[:1])
    assert list(ablate.ablation_variants(one_stage, "filtered.jsonl", "scores.jsonl")) == [
        "all mechanisms", "no difficulty filter", "no rescue", "no substitution", "no removal of mastered problems",
        "plain GRPO"]  # fmt: skip


def made_up_run(folder: Path, rates: dict[int, float], tokens: int = 1000) -> Path:
    steps = range(1, max(rates) + 1)
    data.append_lines(folder / "metrics.jsonl", [
        {"step": step, "tokens/rollout": tokens, "tokens/update": 10, "batch/informative": 0.5,
         "diversity/distinct_4": 1 / step} for step in steps
    ])
    data.append_lines(folder / "evaluations.jsonl", [{"step": step, "avg_at_k": rate} for step, rate in rates.items()])
    return folder


def test_summary_interpolates_the_steps_and_tokens_to_the_target(tmp_path):
    run = made_up_run(tmp_path / "rising", {0: 0.2, 10: 0.4, 20: 0.6})
    summary = ablate.RunSummary.of(run, target=0.45)
    assert summary.steps == pytest.approx(12.5)
    assert summary.generated == pytest.approx(12_500)
    assert summary.forwarded == pytest.approx(125)
    assert (summary.final, summary.informative) == (0.6, 0.5)
    assert summary.distinct_4 == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert ablate.RunSummary.of(run, target=0.7).steps is None
    assert ablate.RunSummary.of(run, target=0.1).steps == 0


def test_table_pairs_seeds_and_says_which_runs_did_not_reach_the_target(tmp_path):
    runs = {
        "all mechanisms": [made_up_run(tmp_path / f"all{i}", {0: 0.0, 10: end}) for i, end in enumerate((0.8, 0.6))],
        "plain GRPO": [made_up_run(tmp_path / f"plain{i}", {0: 0.0, 10: end}) for i, end in enumerate((0.7, 0.4))],
    }
    head, _, complete, plain = ablate.ablation_table(runs, target=0.5).splitlines()
    assert "steps to 50%" in head
    assert complete.startswith("| all mechanisms | 70.0 ± ")
    assert "| 55.0 (-15.0 ± 63.5) | reached by 1 of 2 |" in plain  # t(1) = 12.71; differences -10 and -20


def test_seeds_share_a_model_and_data_that_are_given(tmp_path):
    config = replace(PRESETS["toy"], data="sums.jsonl", seed=1)
    assert ablate.in_world(config, tmp_path / "world") == config
    assert not (tmp_path / "world").exists()


def test_ablate_runs_every_variant_once_and_goes_on_where_it_stopped(run_train, tmp_path):
    out = tmp_path / "out"
    # the seed's world as ablate makes it, but for its size
    toy.make_world(toy.World(out=out / "world-4", seed=4, problems=16, held_out=4, warmup_steps=3))
    options = ["--out", out, "--seed", 4, "--seeds", 1, *SMALL, "--stages", "2:1.0:24", "--eval-rollouts", 2,
               "--target", 0.5]
    result = run_train(*options, script="tools/ablate.py")
    assert result.returncode == 0, result.stderr
    table = (out / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 6
    assert table in result.stdout
    assert (out / "ablation.png").stat().st_size > 20_000
    steps = {path.parent.name: len(lines(path)) for path in out.glob("*/metrics.jsonl")}
    assert len(steps) == 6
    assert set(steps.values()) == {2}
    config = saved_config(out / "no-rescue-4")
    assert (config.seed, config.model, config.rescue) == (4, str(out / "world-4" / "model"), False)

    shutil.rmtree(out / "plain-GRPO-4")  # as if the command had ended before it
    cut = out / "no-substitution-4"  # and this one had been killed before its last step
    shutil.rmtree(cut / "checkpoints" / "step_000002")
    for name in ("metrics", "evaluations"):
        first, *_ = (cut / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (cut / f"{name}.jsonl").write_text(first)
    (out / "table.md").unlink()
    result = run_train(*options, script="tools/ablate.py")
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("seed ")] == [
        "seed 4, no substitution", "seed 4, plain GRPO"]
    assert (out / "table.md").read_text() == table

    result = run_train(*options, "--lr", "1e-3", script="tools/ablate.py")
    assert (result.returncode, "other settings" in result.stderr) == (2, True)
