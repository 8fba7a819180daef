"""The recipe's functions against their published rules and numbers."""
from __future__ import annotations

import copy
import math
import random
from dataclasses import fields

import pytest
import torch

from polaris_mini import (
    PRESETS, UNSOLVED, Config, Group, Problem, Rollout, Stage, Zones, advantages, batch_metrics,
    distinct_n, health, mastered, mean_and_interval, mean_distinct_n, pass_at_k, pick_temperature,
    policy_loss, rescue, set_advantages, substitute, temperature_grid, temperature_zones, truncated_ratio,
)


def group(name: str, rewards: list[float]) -> Group:
    rollouts = [Rollout(name, (1,), [2, 3], [-1.0, -1.0], f"{name}{i}", "stop", r) for i, r in enumerate(rewards)]
    return Group(Problem(name, name, ("1",)), rollouts)


def with_pass_rate(name: str, rate: float) -> Group:
    return group(name, [1.0] * round(4 * rate) + [0.0] * (4 - round(4 * rate)))


# ---------------------------------------------------- rewards below 1


def test_a_reward_below_1_counts_as_unsolved_but_makes_a_group_informative():
    partly = group("a", [0.5, 0.0, 0.0, 0.0])
    assert (partly.pass_rate, partly.informative) == (0.0, True)
    assert (group("a", [1.0, 0.5]).pass_rate, group("a", [0.5, 0.5]).informative) == (0.5, False)
    sink: dict[str, Rollout] = {}
    rescue([partly], sink, random.Random(0))
    assert sink == {}  # a response that earned something for effort rescues nobody


# ------------------------------------------------------------------ advantages


def test_advantages_one_of_eight_correct():
    """Source: release, (r - mean) / (std + 1e-6), std with n - 1."""
    values = advantages([1.0] + [0.0] * 7)
    assert values[0] == pytest.approx(2.475, abs=1e-3)
    assert values[1:] == pytest.approx([-0.354] * 7, abs=1e-3)


def test_advantages_of_equal_rewards_are_zero():
    assert advantages([1.0] * 8) == advantages([0.0] * 8) == [0.0] * 8


def test_advantages_dr_grpo_does_not_divide():
    assert advantages([1.0, 0.0, 0.0, 0.0], "dr_grpo") == [0.75, -0.25, -0.25, -0.25]


def test_set_advantages_compares_inside_each_group():
    groups = [group("a", [1.0, 0.0]), group("b", [1.0, 1.0, 0.5])]
    set_advantages(groups, "dr_grpo")
    assert [[r.advantage for r in g.rollouts] for g in groups] == [[0.5, -0.5], pytest.approx([1 / 6, 1 / 6, -1 / 3])]


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


def test_truncated_ratio_is_capped_and_has_no_gradient():
    """Source: truncated importance sampling (fengyao.notion.site/off-policy-rl; cap 2)."""
    ratios = torch.tensor([0.1, 1.0, 1.9, 2.1, 50.0], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    weight = truncated_ratio(logprobs, torch.zeros(5, dtype=torch.float64))
    assert weight.tolist() == pytest.approx([0.1, 1.0, 1.9, 2.0, 2.0])
    assert not weight.requires_grad
    assert truncated_ratio(logprobs, torch.zeros(5), cap=3.0).tolist() == pytest.approx([0.1, 1.0, 1.9, 2.1, 3.0])


def test_truncated_ratio_stays_finite():
    assert truncated_ratio(torch.zeros(1), torch.tensor([-1000.0]), cap=math.inf).isfinite().all()


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


class Copies:
    """A sink that, like one on disk, gives and takes rollouts, no more, and returns another object each time."""

    def __init__(self) -> None:
        self.stored: dict[str, Rollout] = {}

    def get(self, key: str) -> Rollout | None:
        return copy.deepcopy(self.stored.get(key))

    def __setitem__(self, key: str, value: Rollout) -> None:
        self.stored[key] = copy.deepcopy(value)


def test_rescue_asks_a_sink_for_no_more_than_to_give_and_take():
    batches = [[group("a", [0, 1, 1, 0]), group("b", [0, 0, 0, 0])], [group(name, [0, 0, 0, 0]) for name in "ab"]]
    results, copies, plain = [], Copies(), {}
    for sink in (plain, copies):
        rng = random.Random(0)
        results.append([rescue(batch, sink, rng) for batch in batches])
    assert list(copies.stored) == list(plain) == ["a"]
    assert results[0] == results[1]
    assert [g.pass_rate for g in results[1][1]] == [0.25, 0.0]


# ------------------------------------------------------------------ substitute


def test_substitute_trains_six_groups_where_the_release_trained_fewer():
    """There the copies were graded against the wrong problem's answer, until August 2025."""
    groups = [with_pass_rate(str(i), rate) for i, rate in enumerate([0.5, 0.25, 0.75, 0.5, 1.0, 0.0])]
    batch = substitute(groups, random.Random(0))
    assert sum(g.places for g in batch) == 6
    assert all(g.informative for g in batch)
    assert [g.problem.id for g in batch] == ["0", "1", "2", "3"]
    assert max(g.places for g in batch) == 2  # enough informative groups: no one twice
    assert all(g.places == 1 for g in groups)


def test_substitute_repeats_only_when_it_must():
    groups = [with_pass_rate("a", 0.5), with_pass_rate("b", 0.5), *(with_pass_rate(str(i), 0) for i in range(3))]
    batch = substitute(groups, random.Random(0))
    assert sum(g.places for g in batch) == 5


@pytest.mark.parametrize(("informative", "trained"), [(0, 0), (1, 0), (2, 0), (3, 6)])
def test_substitute_needs_more_than_a_third(informative, trained):
    groups = [with_pass_rate(str(i), 0.5 if i < informative else 1.0) for i in range(6)]
    assert sum(g.places for g in substitute(groups, random.Random(0))) == trained


# -------------------------------------------------------------------- mastered


def test_mastered_is_strictly_above_and_spares_the_unvisited():
    scores = {"a": [1.0, 0.875], "b": [0.9], "c": [], "d": [1.0]}
    assert mastered(scores, 0.9) == {"a", "d"}
    assert mastered(scores, 1.0) == set()


# ----------------------------------------------------------------- temperature

# Source: blog, read off the figures of its section on temperature: accuracy and distinct-4, both in percent
QWEN3_4B = {0.1: 70, 0.6: 73.8, 0.8: 74.2, 1.4: 74, 1.45: 73.2, 1.5: 70.2, 1.55: 67.8, 1.6: 50, 1.7: 32.7}
QWEN3_4B_DIVERSITY = {0.1: 28, 0.4: 38, 0.6: 42, 0.8: 45, 1.0: 47, 1.2: 55, 1.4: 63, 1.6: 84}
R1_7B = {0.4: 52, 0.6: 55, 0.7: 56, 0.8: 53, 1.0: 47, 1.2: 11}
R1_7B_DIVERSITY = {0.4: 48, 0.6: 58, 0.7: 59, 0.8: 62, 1.0: 80, 1.2: 91}
R1_7B_STEP_400 = {0.4: 57, 0.6: 61, 0.7: 60, 0.8: 58, 1.0: 55, 1.2: 38}
R1_7B_STEP_400_DIVERSITY = {0.4: 45, 0.6: 50, 0.7: 52, 0.8: 55, 1.0: 64, 1.2: 83}
R1_7B_STEP_800 = {0.4: 61, 0.6: 64.5, 0.7: 66, 0.8: 63, 1.0: 62, 1.2: 54}
R1_7B_STEP_800_DIVERSITY = {0.4: 40, 0.6: 44, 0.7: 47, 0.8: 50, 1.0: 54, 1.2: 70}


def test_temperature_zones_have_the_published_borders():
    """Source: blog, Qwen3-4B: robust to 1.4, controlled exploration to 1.55; R1-Distill-7B: to 0.7 and 1.0."""
    assert temperature_zones(QWEN3_4B) == Zones(robust_until=1.4, exploration_until=1.55)
    assert temperature_zones(R1_7B) == Zones(robust_until=0.7, exploration_until=1.0)


def test_temperature_zones_after_800_steps_where_we_differ():
    """Source: blog, R1-Distill-7B after 800 steps: robust to 1.0, controlled exploration to 1.3.

    At 1.0 the published curve is 4 points below its best, so that only a noise of 4 points makes it as good for us.
    The second border lies beyond the curve's last temperature, 1.2.
    """
    assert temperature_zones(R1_7B_STEP_800) == Zones(robust_until=0.7, exploration_until=1.2)
    noise = dict.fromkeys(R1_7B_STEP_800, 4.0)
    assert temperature_zones(R1_7B_STEP_800, noise) == Zones(robust_until=1.0, exploration_until=1.2)


def test_noise_widens_only_the_robust_zone():
    assert temperature_zones(R1_7B, dict.fromkeys(R1_7B, 3.0)) == Zones(0.8, 1.0)
    assert temperature_zones(R1_7B, {1.0: 9.0}) == Zones(1.0, 1.0)  # each temperature has its own
    assert temperature_zones(R1_7B, dict.fromkeys(R1_7B, 50.0)) == Zones(1.0, 1.0)  # 1.2 has collapsed all the same
    assert temperature_zones(QWEN3_4B, dict.fromkeys(QWEN3_4B, 0.0)) == temperature_zones(QWEN3_4B)  # 1 % remains
    assert pick_temperature(R1_7B, R1_7B_DIVERSITY, noise=dict.fromkeys(R1_7B, 3.0)) == 0.8


def test_a_lucky_point_beyond_the_fall_is_in_no_zone():
    """A probe of few problems, where 12 % and 8 % hardly differ: its own noise makes every temperature as good."""
    accuracy = {0.9: 0.13, 1.0: 0.12, 1.1: 0.15, 1.2: 0.13, 1.3: 0.08, 1.4: 0.13, 1.5: 0.06}
    assert temperature_zones(accuracy, dict.fromkeys(accuracy, 0.04)) == Zones(1.2, 1.2)
    assert temperature_zones({t: 0.15 if t == 1.4 else value for t, value in accuracy.items()}) == Zones(1.1, 1.2)


def test_first_stage_has_the_published_temperature():
    """Source: blog and release, 1.4 for Qwen3-4B and 0.7 for R1-Distill-Qwen-7B."""
    assert pick_temperature(QWEN3_4B, QWEN3_4B_DIVERSITY) == PRESETS["polaris-4b"].schedule[0].temperature == 1.4
    assert pick_temperature(R1_7B, R1_7B_DIVERSITY) == PRESETS["polaris-7b"].schedule[0].temperature == 0.7


def test_later_stages_restore_the_diversity_of_the_first():
    """The published choices, 1.0 and 1.1, overshoot the exact match of the published curves, 0.89 and 1.06."""
    match = R1_7B_DIVERSITY[0.7]
    second = pick_temperature(R1_7B_STEP_400, R1_7B_STEP_400_DIVERSITY, match=match)
    third = pick_temperature(R1_7B_STEP_800, R1_7B_STEP_800_DIVERSITY, match=match)
    assert second == pytest.approx(0.89, abs=0.005)
    assert third == pytest.approx(1.06, abs=0.005)


@pytest.mark.parametrize(
    ("match", "temperature"),
    [
        (48, 0.4),  # the lowest temperature is already as diverse
        (62, 0.8),  # met exactly
        (71, 0.9),  # between 62 at 0.8 and 80 at 1.0
        (85, 1.0),  # reached only beyond controlled exploration
        (99, 1.0),  # never reached
    ],
)
def test_later_stages_do_not_leave_controlled_exploration(match, temperature):
    assert pick_temperature(R1_7B, R1_7B_DIVERSITY, match=match) == temperature


def test_probe_curves_need_no_order():
    def backwards(curve):
        return dict(reversed(curve.items()))

    assert pick_temperature(backwards(R1_7B), backwards(R1_7B_DIVERSITY), match=71) == 0.9
    assert temperature_zones(backwards(QWEN3_4B)) == temperature_zones(QWEN3_4B)


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("0.4:1.6:0.1", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]),
        ("1.4:1.55:0.05", [1.4, 1.45, 1.5, 1.55]),
        ("0.1:0.7:0.2", [0.1, 0.3, 0.5, 0.7]),
        ("0.5:1:0.2", [0.5, 0.7, 0.9]),  # the end is not on the grid
        ("1:1:0.1", [1.0]),
        ("0.7, 1.0,1.1", [0.7, 1.0, 1.1]),
        ("1", [1.0]),
    ],
)
def test_temperature_grid_includes_its_end(text, grid):
    """The release's grid lost its end point to integer truncation."""
    assert temperature_grid(text) == grid


@pytest.mark.parametrize(
    "text",
    ["", "warm", "1:2", "1:2:3:4", "0:1:0.1", "-0.5", "1:0.5:0.1", "0.5:1:0", "0.5:1:-0.1", "0.5:inf:0.1",
     "0.5:1:nan", "nan", "inf", "0.7,0.7", "1.0,0.7", "0.7,", "1000"],
)
def test_temperature_grid_refuses(text):
    with pytest.raises(ValueError, match="START:END:STEP"):
        temperature_grid(text)


# -------------------------------------------------------------------- measures


def test_distinct_n_pools_the_texts_of_a_problem():
    assert distinct_n(["a b c d"] * 4) == 0.25
    assert distinct_n(["a b c d", "e f g h"]) == 1.0
    assert distinct_n(["too short", ""]) == 0.0


def test_mean_distinct_n_averages_over_problems():
    long, same = ["a b c d a b c d"], ["a b c d", "a b c d"]
    assert mean_distinct_n([long, same]) == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert mean_distinct_n(iter([["a a a b"]]), n=2) == pytest.approx(2 / 3)


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


@pytest.mark.parametrize(
    ("n", "t"),  # Source: the two-sided 95 % column of any table of Student's t, n - 1 degrees of freedom
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (7, 2.447), (8, 2.365), (9, 2.306), (10, 2.262),
     (11, 2.228), (12, 2.201), (13, 2.179), (16, 2.131), (21, 2.086), (31, 2.042), (61, 2.000), (1001, 1.962)],
)
def test_mean_and_interval_follows_student(n, t):
    values = [i % 2 for i in range(n - n % 2)] + [0.5] * (n % 2)
    std = math.sqrt(sum((value - 0.5) ** 2 for value in values) / (n - 1))
    mean, half = mean_and_interval(values)
    assert mean == 0.5
    assert half * math.sqrt(n) / std == pytest.approx(t, abs=0.015)


def test_one_value_has_no_interval():
    mean, half = mean_and_interval([0.25])
    assert mean == 0.25
    assert math.isnan(half)


def test_batch_metrics_of_what_was_drawn_and_what_is_trained():
    half, none, full = group("a", [1, 1, 0, 0]), group("b", [0, 0, 0, 0]), group("c", [1, 1, 1, 1])
    half.rollouts[3].finish_reason, half.rollouts[3].response_tokens = "length", [2] * 10
    for rollout, reason in zip(none.rollouts, ["no_think_end", "no_answer", "truncated", "timeout"], strict=True):
        rollout.reason, rollout.text = reason, "w x y z"
    groups = [half, none, full]
    borrowed = Rollout("b", (1,), [2], [-1.0], "", "stop", 1.0, rescued=True)
    batch = [Group(half.problem, half.rollouts, places=2), Group(none.problem, [*none.rollouts[1:], borrowed])]
    found = batch_metrics(groups, batch)
    assert found == {
        "reward/mean": 0.5, "reward/solve_none": 1 / 3, "reward/solve_all": 1 / 3,
        "reward/no_think_end": 1 / 12, "reward/no_answer": 1 / 12, "reward/timeout": 1 / 12,
        "reward/truncated": 1 / 12, "reward/wrong": 0,
        "batch/informative": 1 / 3, "batch/rescued": 1, "batch/substituted": 1,
        "response/tokens_mean": 32 / 12, "response/tokens_max": 10, "response/truncated": 1 / 12,
        "diversity/distinct_4": pytest.approx((0 + 1 / 4 + 0) / 3), "tokens/rollout": 32,
    }  # fmt: skip
    assert found["reward/mean"] == batch_metrics(groups, [])["reward/mean"]  # an update that is skipped hides nothing


# ---------------------------------------------------------------------- health

HEALTHY = {"policy/entropy": 0.3, "response/tokens_mean": 900.0, "reward/solve_none": 0.4, "reward/solve_all": 0.2,
           "reward/timeout": 0.0, "reward/no_think_end": 0.0, "reward/no_answer": 0.1, "response/truncated": 0.1,
           "reward/truncated": 0.1, "reward/wrong": 0.2,
           "mismatch/kl": 0.001}


def after(change: dict[str, float | None], steps: int = 10) -> dict[str, str]:
    return health([HEALTHY] * 10 + [{**HEALTHY, **change}] * steps)


@pytest.mark.parametrize(("name", "change", "below"), [
    ("entropy", {"policy/entropy": 0.02}, {"policy/entropy": 0.04}),
    ("length", {"response/tokens_mean": 200.0}, {"response/tokens_mean": 300.0}),
    ("solved", {"reward/solve_all": 1.0}, {"reward/solve_all": 0.99}),
    ("unsolved", {"reward/solve_none": 1.0}, {"reward/solve_none": 0.99}),
    ("timeouts", {"reward/timeout": 0.3}, {"reward/timeout": 0.2}),
    ("truncated", {"response/truncated": 0.3}, {"response/truncated": 0.2}),
    ("mismatch", {"mismatch/kl": 0.1}, {"mismatch/kl": 0.04}),
])  # fmt: skip
def test_health_names_what_goes_wrong_and_only_that(name, change, below):
    assert list(after(change)) == [name]
    (metric, value), = change.items()
    assert metric in after(change)[name]
    assert f"{value:.3g}" in after(change)[name]
    assert after(below) == {}


@pytest.mark.parametrize("reason", UNSOLVED)
def test_health_says_which_reason_prevails_where_nothing_is_right(reason):
    change = {"reward/solve_none": 1.0, "response/truncated": 0.9, f"reward/{reason}": 0.24}  # the others have less
    assert f"; no gradient; 24% are graded {reason}: {UNSOLVED[reason]}" in after(change)["unsolved"]
    assert "unsolved" not in after({**change, "reward/solve_none": 0.9})
    assert "--no-require-think" in UNSOLVED["no_think_end"]


def test_health_looks_at_ten_steps_and_at_what_they_have():
    assert after({"reward/solve_all": 1.0}, steps=9) == {}  # one step in ten was well
    assert health([{**HEALTHY, "reward/solve_all": 1.0}] * 9) == {}  # too few steps to tell
    assert after({"policy/entropy": None, "mismatch/kl": None}) == {}  # steps without an update


# ---------------------------------------------------------------------- config


@pytest.mark.parametrize(("text", "stage"), [
    ("450:1.4:39936", Stage(450, 1.4, 39936)),
    ("2:auto:10", Stage(2, "auto", 10)),
    ("150:1.45:48128:reset", Stage(150, 1.45, 48128, reset_optimizer=True)),
])  # fmt: skip
def test_stage_is_a_text_and_back(text, stage):
    assert Stage.parse(text) == stage
    assert str(stage) == text


@pytest.mark.parametrize("text", ["", "450", "450:1.4", "450:1.4:", "a:1.4:80", "4:warm:80", "4.5:1.4:80", "4:1.4:80:",
                                  "4:1.4:80:now", "4:1.4:80:reset:reset"])  # fmt: skip
def test_stage_refuses_other_texts(text):
    with pytest.raises(ValueError, match=rf"stages has {text}: give STEPS:TEMPERATURE:TOKENS"):
        Stage.parse(text)


def test_schedule_is_what_the_stages_say():
    config = Config(stages=("2:1.0:10", "3:1.2:20:reset"))
    assert config.schedule == (Stage(2, 1.0, 10), Stage(3, 1.2, 20, reset_optimizer=True))
    assert (config.total_steps, config.longest_response) == (5, 20)


def test_temperature_may_be_auto():
    stages = ("2:auto:10", "3:1.2:20")
    assert [s.temperature for s in Config(stages=stages).schedule] == ["auto", 1.2]
    assert [s.temperature for s in Config(stages=stages, temperature="auto").schedule] == ["auto", "auto"]
    assert [s.temperature for s in Config(stages=stages, temperature=0.7).schedule] == [0.7, 0.7]
    with pytest.raises(ValueError, match=r"^temperature is -1\.0: give auto or a value above 0"):
        Config(stages=("2:auto:10", "3:-1:20"))
    with pytest.raises(ValueError, match=r"temperatures is 1:0:0\.1: "):
        Config(probe_temperatures="1:0:0.1")


@pytest.mark.parametrize(("steps", "stages"), [
    (1, ("1:0.7:5",)), (2, ("2:0.7:5",)), (4, ("2:0.7:5", "2:0.7:5:reset")), (9, ("2:0.7:5", "7:0.7:5:reset")),
])  # fmt: skip
def test_steps_cut_or_extend_the_stages(steps, stages):
    folded = Config(stages=("2:1.0:10", "3:1.2:20:reset"), steps=steps, temperature=0.7, max_response_tokens=5)
    assert folded.stages == stages
    assert (folded.steps, folded.temperature, folded.max_response_tokens) == (None, None, None)  # folded once


PUBLISHED = {  # Source: release and blog: steps, temperature and response tokens of each stage
    "polaris-4b": ("Qwen/Qwen3-4B", [(450, 1.4, 39936), (150, 1.45, 48128), (100, 1.5, 52224)]),
    "polaris-7b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", [(520, 0.7, 15360), (370, 1.0, 23552), (590, 1.1, 31744)]
    ),
    "polaris-1.7b": ("Qwen/Qwen3-1.7B", [(350, 1.5, 39936), (150, 1.55, 48128)]),  # only the sum of the steps is known
}


@pytest.mark.parametrize("name", ["recipe", *PUBLISHED])
def test_presets_have_the_released_values(name):
    """Source: release, its training scripts; blog (0.9)."""
    c = PRESETS[name]
    assert (c.prompts_per_step, c.group_size, c.updates_per_batch, c.lr) == (128, 8, 1, 1e-6)
    assert (c.optimizer, c.beta1, c.beta2, c.weight_decay, c.max_grad_norm) == ("adamw", 0.9, 0.999, 0.01, 1.0)
    assert (c.clip_low, c.clip_high, c.dual_clip, c.mastered_above, c.max_prompt_tokens) == (0.2, 0.28, 3.0, 0.9, 1024)
    assert (c.advantage, c.rescue, c.rescue_ratio, c.substitute) == ("grpo", True, "on_policy", True)
    assert (c.lora_rank, c.require_think) == (0, True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_stages(name):
    model, stages = PUBLISHED[name]
    c = PRESETS[name]
    assert (c.model, c.data) == (model, "POLARIS-Project/Polaris-Dataset-53K")
    assert [(s.steps, s.temperature, s.max_response_tokens) for s in c.schedule] == stages
    # the release merges the weights between stages and starts again
    assert [s.reset_optimizer for s in c.schedule] == [False] + [True] * (len(stages) - 1)


@pytest.mark.parametrize(("name", "steps"), [("polaris-4b", 700), ("polaris-7b", 1480), ("polaris-1.7b", 500)])
def test_presets_have_the_published_number_of_steps(name, steps):
    """Source: blog, read off its figures."""
    assert PRESETS[name].total_steps == steps


@pytest.mark.parametrize(("name", "published"), [("rtx-24gb", "polaris-1.7b"), ("rtx-2x24gb", "polaris-4b")])
def test_workstation_presets_are_the_small_setting_of_the_author(name, published):
    """Source: issue #4 of the release, batch 32 and 32768 tokens."""
    c = PRESETS[name]
    assert c.prompts_per_step == 32
    assert {s.max_response_tokens for s in c.schedule} == {32768}
    assert c.tokens_per_micro_batch >= c.max_prompt_tokens + 32768  # the longest rollout fits
    assert c.lr == pytest.approx(10 * PRESETS[published].lr)  # with LoRA
    assert c.lora_rank > 0
    changed = {
        "preset", "stages", "prompts_per_step", "lora_rank", "lr", "optimizer", "gradient_checkpointing",
        "tokens_per_micro_batch", "rollouts_per_batch", "offload_policy", "checkpoint_every",
    }  # fmt: skip
    for field in fields(Config):
        if field.name not in changed:
            assert getattr(c, field.name) == getattr(PRESETS[published], field.name), field.name
    assert [s.temperature for s in c.schedule] == [s.temperature for s in PRESETS[published].schedule]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_names(name):
    assert PRESETS[name].preset == name


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", 1), ("temperature", 0.0), ("temperature", float("nan")), ("steps", 0), ("max_response_tokens", 0),
     ("prompts_per_step", 0), ("lr", 0.0), ("clip_low", 1.0), ("clip_high", -0.1), ("dual_clip", 1.0), ("beta2", 1.0),
     ("mastered_above", 1.5), ("updates_per_batch", 129), ("eval_every", -2), ("lora_rank", -1), ("stages", ()),
     ("stages", ("0:1.0:80",)), ("stages", ("4:1.0",)), ("probe_problems", 0), ("checkpoint_every", 0),
     ("reward_timeout", 0.0), ("quantize_base", True), ("offload_activations", True)],
)
def test_config_refuses_bad_values_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}.* (is|has) .*: "):
        Config(**{field: value})


def test_temperature_zones_need_something_correct():
    with pytest.raises(ValueError, match="accuracy is 0 at every temperature"):
        temperature_zones({0.6: 0.0, 1.0: 0.0})


def test_temperature_grid_of_a_tiny_step_does_not_fill_the_memory():
    with pytest.raises(ValueError, match="give START:END:STEP"):
        temperature_grid("0.5:1:1e-300")
