"""Rollouts: the engine that generates responses, and what is done with it: groups for training, evaluation.

An engine has the same few methods whatever it runs on: `sync` takes the policy's weights, `generate` turns prompts
into responses. The Hugging Face engine below is the policy itself, decoded with a key-value cache by plain PyTorch:
it runs on any device, needs no second copy of the weights, and returns the log-prob of every sampled token at the
sampling temperature.

Left out: paged attention, continuous batching, CUDA graphs. They are a serving engine's business.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from polaris_mini import Group, Problem, Rollout, mean_and_interval, pass_at_k
from reward import RewardPool

# -------------------------------------------------------------- models from disk or hub


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message names the cause and the fix."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises: ModelError if there is none, or if it has no end-of-sequence token.
    """
    _check_folder(name, ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"), "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model is {name}: its tokenizer does not load: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model is {name}: its tokenizer has no eos_token, so no response could end; set one")
    return tokenizer


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub.

    Raises: ModelError if the folder has no weights or the model cannot be loaded.
    """
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    _check_folder(name, weights, "safetensors weights")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model is {name}: it does not load: {_first_line(error)}") from error
    return model.to(device)  # type: ignore[arg-type]


def _check_folder(name: str, any_of: Sequence[str], what: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in any_of):
            raise ModelError(f"model is {name}: the folder has no {what} (none of {', '.join(any_of)})")
    elif folder.is_file() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"model is {name}: no such folder; give a folder or a hub name like Qwen/Qwen3-1.7B")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def causal_lm(policy: torch.nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a policy, LoRA layers in place."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[return-value, operator]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute in `dtype` whatever the weights are stored in; nothing at all for float32 and float64."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------- the engine


@dataclass(slots=True)
class Response:
    """What an engine returns for one prompt."""

    tokens: list[int]
    sampler_logprobs: list[float]
    """(T,) nats, of each token, at the sampling temperature."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. top_p and top_k are for evaluation; training samples from the whole distribution."""

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0


class Engine(Protocol):
    """What training and evaluation ask of an engine."""

    def sync(self, policy: torch.nn.Module) -> None:
        """Take over the policy's current weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_tokens: Callable[[int], None] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order; report newly generated tokens to `on_tokens`."""


class HFEngine:
    """Generate with the policy itself: a batched decode loop with a key-value cache, on any device.

    Why not `model.generate`: it hands out log-probs only as whole (V,) rows, which for a vocabulary of 150,000 fill
    the memory, and goes on computing responses that have ended. Here ended responses leave the batch.
    """

    def __init__(
        self, policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, rollouts_per_batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.policy = policy
        self.rollouts_per_batch = rollouts_per_batch
        self.dtype = dtype
        model = causal_lm(policy)
        self.device = model.device
        listed = model.generation_config.eos_token_id if model.generation_config is not None else None
        stop_tokens = {tokenizer.eos_token_id, *([listed] if isinstance(listed, int) else listed or [])}
        self.stop_tokens = torch.tensor(sorted(stop_tokens), device=self.device)

    def sync(self, policy: torch.nn.Module) -> None:
        """Nothing to copy: the engine reads the policy's own weights."""
        self.policy = policy

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_tokens: Callable[[int], None] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order. The same seed and prompts give the same responses."""
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours need little padding
        responses: dict[int, Response] = {}
        with torch.inference_mode(), autocast(self.device, self.dtype), _decoding(self.policy):
            for start in range(0, len(prompts), self.rollouts_per_batch):
                batch = by_length[start : start + self.rollouts_per_batch]
                finished = self._decode([prompts[i] for i in batch], sampling, generator, on_tokens)
                responses.update(zip(batch, finished, strict=True))
        return [responses[i] for i in range(len(prompts))]

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator,
        on_tokens: Callable[[int], None] | None,
    ) -> list[Response]:
        model = causal_lm(self.policy)
        head = model.get_output_embeddings()
        longest = max(map(len, prompts))
        # B rows, padded on the left so that every row's next token is in the last column; rows leave as they end
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=self.device)  # (B, L)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # (B, L) bool
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        responses = [Response([], [], "length") for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
        for _ in range(sampling.max_tokens):
            hidden = model.base_model(
                input_ids=tokens, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]  # (B, H)
            logprobs = torch.log_softmax(head(hidden).float() / sampling.temperature, dim=-1)  # (B, V)
            tokens = torch.multinomial(_truncate(logprobs, sampling).exp(), 1, generator=generator)  # (B, 1)
            chosen = logprobs.gather(1, tokens)[:, 0].tolist()
            ended = torch.isin(tokens[:, 0], self.stop_tokens).tolist()
            grown = 0
            for row, token, logprob, end in zip(rows, tokens[:, 0].tolist(), chosen, ended, strict=True):
                response = responses[row]
                if response.finish_reason == "length":  # not ended before
                    response.tokens.append(token)
                    response.sampler_logprobs.append(logprob)
                    response.finish_reason = "stop" if end else "length"
                    grown += 1
            if on_tokens is not None:
                on_tokens(grown)
            running = [i for i, row in enumerate(rows) if responses[row].finish_reason == "length"]
            if not running:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(running) <= 0.75 * len(rows):  # copying the cache costs: drop ended rows a quarter at a time
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                rows = [rows[i] for i in running]
        return responses


@contextlib.contextmanager
def _decoding(policy: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and to attention over a cache; training's packed attention comes back after."""
    model = causal_lm(policy)
    was_training, attention = policy.training, model.config._attn_implementation
    policy.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        policy.train(was_training)


def _truncate(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set tokens outside top-k and top-p to -inf; `multinomial` renormalises the rest."""
    if sampling.top_k > 0:
        limit = logprobs.topk(min(sampling.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < limit, -math.inf)
    if sampling.top_p < 1.0:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p still counts
        logprobs = logprobs.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logprobs


# ---------------------------------------------------------------- groups and their grades


def sample_groups(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], group_size: int,
    sampling: Sampling, on_tokens: Callable[[int], None] | None = None,
) -> list[Group]:
    """Draw `group_size` rollouts of every problem, not graded yet."""
    prompts = [problem.prompt_tokens for problem in problems for _ in range(group_size)]
    responses = engine.generate(prompts, sampling, on_tokens)
    groups = []
    for i, problem in enumerate(problems):
        drawn = responses[i * group_size : (i + 1) * group_size]
        groups.append(Group(problem, [_rollout(problem, response, tokenizer) for response in drawn]))
    return groups


def _rollout(problem: Problem, response: Response, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    spoken = response.tokens[:-1] if response.finish_reason == "stop" else response.tokens  # without the stop token
    return Rollout(
        problem_id=problem.id,
        prompt_tokens=problem.prompt_tokens,
        response_tokens=response.tokens,
        sampler_logprobs=response.sampler_logprobs,
        text=tokenizer.decode(spoken, skip_special_tokens=False),  # type: ignore[arg-type]
        finish_reason=response.finish_reason,
    )


def grade_groups(groups: Sequence[Group], pool: RewardPool) -> None:
    """Set reward and reason of every rollout."""
    rollouts = [(rollout, group.problem) for group in groups for rollout in group.rollouts]
    grades = pool.grade([(rollout.text, problem.answers, rollout.truncated) for rollout, problem in rollouts])
    for (rollout, _), grade in zip(rollouts, grades, strict=True):
        rollout.reward, rollout.reason = grade.reward, grade.reason


# -------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """How good a policy is on a set of problems."""

    problems: int
    k: int
    avg_at_k: float
    interval: float
    """Half width of the 95 % interval of avg_at_k, over problems."""
    pass_at_k: float
    tokens_mean: float
    truncated: float


def evaluate(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, pool: RewardPool, problems: Sequence[Problem], k: int,
    sampling: Sampling, on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure avg@k and pass@k with k rollouts per problem."""
    groups = sample_groups(engine, tokenizer, problems, k, sampling, on_tokens)
    grade_groups(groups, pool)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    average, interval = mean_and_interval([group.pass_rate for group in groups])
    correct = [sum(rollout.reward > 0 for rollout in group.rollouts) for group in groups]
    return Evaluation(
        problems=len(groups),
        k=k,
        avg_at_k=average,
        interval=interval,
        pass_at_k=sum(pass_at_k(c, k, k) for c in correct) / len(groups),
        tokens_mean=sum(len(rollout.response_tokens) for rollout in rollouts) / len(rollouts),
        truncated=sum(rollout.truncated for rollout in rollouts) / len(rollouts),
    )
