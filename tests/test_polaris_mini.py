"""The recipe's functions against their published rules and numbers."""
from __future__ import annotations

import random

import pytest
import torch

from polaris_mini import (
    PRESETS, Config, Group, Problem, Rollout, Stage, advantages, distinct_n, mastered, mean_and_interval, pass_at_k,
    policy_loss, rescue, substitute,
)


def group(name: str, rewards: list[float]) -> Group:
    rollouts = [Rollout(name, (1,), [2, 3], [-1.0, -1.0], f"{name}{i}", "stop", r) for i, r in enumerate(rewards)]
    return Group(Problem(name, name, ("1",)), rollouts)


def with_pass_rate(name: str, rate: float) -> Group:
    return group(name, [1.0] * round(4 * rate) + [0.0] * (4 - round(4 * rate)))


# ------------------------------------------------------------------ advantages


def test_advantages_one_of_eight_correct():
    """Release: (r - mean) / (std + 1e-6), std with n - 1: +2.475 and -0.354."""
    values = advantages([1.0] + [0.0] * 7)
    assert values[0] == pytest.approx(2.475, abs=1e-3)
    assert values[1:] == pytest.approx([-0.354] * 7, abs=1e-3)


def test_advantages_of_equal_rewards_are_zero():
    assert advantages([1.0] * 8) == advantages([0.0] * 8) == [0.0] * 8


def test_advantages_dr_grpo_does_not_divide():
    assert advantages([1.0, 0.0, 0.0, 0.0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]


# ----------------------------------------------------------------- policy_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the gradient of the log-prob is -advantage
        (1.0, -2.0, 2.0, 2.0),
        (1.27, 1.0, -1.27, -1.27),  # inside clip-high
        (1.5, 1.0, -1.28, 0.0),  # beyond it: no more encouragement
        (0.5, 1.0, -0.5, -0.5),  # a good token that became unlikely is still pushed up
        (0.5, -1.0, 0.8, 0.0),  # beyond clip-low: no more discouragement
        (2.0, -1.0, 2.0, 2.0),  # a bad token that became likely is pushed down
        (5.0, -1.0, 3.0, 0.0),  # until dual clip
    ],
)
def test_policy_loss_clips(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    value, clipped = policy_loss(logprobs, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]),
                                 clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (gradient == 0.0)


# ---------------------------------------------------------------------- rescue


def test_rescue_borrows_a_correct_rollout_for_a_failed_group():
    sink: dict[str, Rollout] = {}
    rng = random.Random(0)
    first = rescue([group("a", [0, 1, 0, 0]), group("b", [0, 0, 0, 0])], sink, rng)
    assert [g.pass_rate for g in first] == [0.25, 0.0]  # nothing to borrow yet
    assert set(sink) == {"a"}
    later = rescue([group("a", [0, 0, 0, 0])], sink, rng)
    assert later[0].informative
    (borrowed,) = [r for r in later[0].rollouts if r.rescued]
    assert (borrowed.text, borrowed.reward) == ("a1", 1.0)
    assert not sink["a"].rescued


def test_rescue_keeps_the_latest_correct_rollout_and_leaves_its_input_alone():
    sink: dict[str, Rollout] = {}
    rng = random.Random(0)
    rescue([group("a", [1, 0])], sink, rng)
    newer = group("a", [0, 1])
    rescue([newer], sink, rng)
    assert sink["a"] is newer.rollouts[1]
    failed = group("a", [0, 0])
    rescue([failed], sink, rng)
    assert failed.pass_rate == 0.0


# ------------------------------------------------------------------ substitute


def test_substitute_trains_six_groups_where_the_release_trained_fewer():
    """Facts, section 0.1: pass rates .5 .25 .75 .5 1 0 must train six informative groups."""
    groups = [with_pass_rate(str(i), rate) for i, rate in enumerate([0.5, 0.25, 0.75, 0.5, 1.0, 0.0])]
    batch = substitute(groups, random.Random(0))
    assert sum(g.weight for g in batch) == 6
    assert all(g.informative for g in batch)
    assert [g.problem.id for g in batch] == ["0", "1", "2", "3"]
    assert max(g.weight for g in batch) == 2  # enough informative groups: no one twice
    assert all(g.weight == 1 for g in groups)


def test_substitute_repeats_only_when_it_must():
    groups = [with_pass_rate("a", 0.5), with_pass_rate("b", 0.5), *(with_pass_rate(str(i), 0) for i in range(3))]
    batch = substitute(groups, random.Random(0))
    assert sum(g.weight for g in batch) == 5


@pytest.mark.parametrize(("informative", "trained"), [(0, 0), (1, 0), (2, 0), (3, 6)])
def test_substitute_needs_more_than_a_third(informative, trained):
    groups = [with_pass_rate(str(i), 0.5 if i < informative else 1.0) for i in range(6)]
    assert sum(g.weight for g in substitute(groups, random.Random(0))) == trained


# -------------------------------------------------------------------- measures


def test_mastered_is_strictly_above_and_spares_the_unvisited():
    scores = {"a": [1.0, 0.875], "b": [0.9], "c": [], "d": [1.0]}
    assert mastered(scores, 0.9) == {"a", "d"}
    assert mastered(scores, 1.0) == set()


def test_distinct_n_pools_the_texts_of_a_problem():
    assert distinct_n(["a b c d"] * 4) == 0.25
    assert distinct_n(["a b c d", "e f g h"]) == 1.0
    assert distinct_n(["too short", ""]) == 0.0


def test_pass_at_k_is_unbiased():
    """The mean over all ways to choose k of n rollouts."""
    from itertools import combinations

    outcomes = [1, 1, 0, 0, 0, 0, 0, 1]
    for k in range(1, 9):
        chosen = [any(c) for c in combinations(outcomes, k)]
        assert pass_at_k(3, 8, k) == pytest.approx(sum(chosen) / len(chosen))


def test_mean_and_interval_covers_the_mean_19_times_in_20():
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        mean, half = mean_and_interval([rng.random() for _ in range(50)])
        hits += abs(mean - 0.5) < half
    assert 930 < hits < 970


# ---------------------------------------------------------------------- config


def test_stages_follow_each_other():
    config = Config(stages=(Stage(2, 1.0, 10), Stage(3, 1.2, 20)))
    assert [config.stage_number(step) for step in range(6)] == [1, 1, 2, 2, 2, 3]
    assert config.stage_at(2) == Stage(3, 1.2, 20)
    assert config.stage_at(5) is None
    assert config.total_steps == 5


def test_steps_cut_or_extend_the_stages():
    stages = (Stage(2, 1.0, 10), Stage(3, 1.2, 20))
    assert [s.steps for s in Config(stages=stages, steps=1).stages] == [1]
    assert [s.steps for s in Config(stages=stages, steps=4).stages] == [2, 2]
    assert [s.steps for s in Config(stages=stages, steps=9).stages] == [2, 7]
    assert Config(stages=stages, temperature=0.7, max_response_tokens=5).stages == (Stage(2, 0.7, 5), Stage(3, 0.7, 5))


def test_recipe_preset_has_the_released_values():
    """Facts, section 4."""
    c = PRESETS["recipe"]
    assert (c.prompts_per_step, c.group_size, c.updates_per_batch, c.lr) == (128, 8, 1, 1e-6)
    assert (c.beta1, c.beta2, c.weight_decay, c.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)
    assert (c.clip_low, c.clip_high, c.dual_clip, c.mastered_above, c.max_prompt_tokens) == (0.2, 0.28, 3.0, 0.9, 1024)


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", 1), ("temperature", 0.0), ("temperature", float("nan")), ("steps", 0), ("max_response_tokens", 0),
     ("prompts_per_step", 0), ("lr", 0.0), ("clip_low", 1.0), ("clip_high", -0.1), ("dual_clip", 1.0), ("beta2", 1.0),
     ("mastered_above", 1.5), ("updates_per_batch", 129), ("eval_every", -2), ("lora_rank", -1), ("stages", ())],
)
def test_config_refuses_bad_values_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}.* is .*: "):
        Config(**{field: value})
