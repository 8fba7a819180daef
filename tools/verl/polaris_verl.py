"""What verl calls of ours: informative substitution as an advantage estimator, and the grader as a reward.

`python tools/export_verl.py` copies this file into its folder, beside polaris_mini.py and reward.py, and names both
functions in run.sh. Rollout Rescue is left out: verl keeps no responses of earlier steps.
"""
from __future__ import annotations

import functools
import random
from typing import Any

import numpy
import torch
from polaris_mini import Group, Problem, Rollout, set_advantages, substitute
from reward import RewardPool
from verl.trainer.ppo.core_algos import register_adv_est

RANDOM = random.Random(0)


@register_adv_est("polaris")
def polaris_advantages(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: numpy.ndarray, config: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each response its group's advantage times the places that the group fills, see `substitute`.

    verl divides the loss by the tokens of all responses, the recipe by those of the informative groups at their
    weights; the advantages make up for it. The gradient is that of train.py with one update per batch.

    (rows, tokens) rewards and mask, (rows,) ids of groups -> (rows, tokens) advantages, twice.
    """
    rewards, lengths = token_level_rewards.sum(dim=1).tolist(), response_mask.sum(dim=1).tolist()
    rows: dict[str, list[int]] = {}
    for row, group_id in enumerate(index):
        if lengths[row]:  # verl fills batches up with empty rows
            rows.setdefault(str(group_id), []).append(row)
    groups = [
        Group(Problem(group_id, "", ()), [Rollout(group_id, (), [], [], "", "stop", rewards[row]) for row in members])
        for group_id, members in rows.items()
    ]
    batch = substitute(groups, RANDOM)
    set_advantages(batch, "grpo" if config.norm_adv_by_std_in_grpo else "dr_grpo")
    tokens = sum(group.places * lengths[row] for group in batch for row in rows[group.problem.id])
    advantages = torch.zeros(len(index), 1)
    for group in batch:
        for row, rollout in zip(rows[group.problem.id], group.rollouts, strict=True):
            advantages[row] = group.places * rollout.advantage * sum(lengths) / tokens
    advantages = advantages.to(response_mask.device) * response_mask
    return advantages, advantages


@functools.cache
def _pool(require_think: bool, timeout: float) -> RewardPool:
    return RewardPool(workers=2, require_think=require_think, timeout=timeout)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any], *, require_think: bool,
    timeout: float, **_: Any,
) -> float:  # fmt: skip
    """Return 1 if the boxed answer after </think> is right, else 0."""
    answers = ground_truth if isinstance(ground_truth, str) else [str(answer) for answer in ground_truth]
    return _pool(require_think, timeout).submit((solution_str, answers, False)).result().reward
