"""POLARIS as functions that need no model and no GPU.

Here are the types that the other modules pass around (`Problem`, `Rollout`, `Group`), the configuration (`Stage`,
`Config`, `PRESETS`, `read_config`), the rules of the recipe, and what is measured of a step. `train.py` calls them in
the order of the algorithm. Reading, generating, grading and optimizing are elsewhere, so each rule can be tested alone.

Dimensions in comments: P problems of a step, G rollouts of a group, T tokens of one response, N tokens side by side.
"Source:" lines name the POLARIS blog post (hkunlp.github.io/blog/2025/Polaris), the released code
(github.com/ChenxinAn-fdu/POLARIS) or a paper by its arXiv number.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

# ------------------------------------------------------------------ the types
class UserError(ValueError):
    """Say in one line what is wrong with the user's input, where, and what would be right."""


@dataclass(frozen=True)
class Problem:
    """A question with its accepted answers (any one of them counts as right)."""

    id: str
    text: str
    answers: tuple[str, ...]
    pass_rate: float | None = None  # Offline: the share of right rollouts of the model to be trained, if measured.
    system: str | None = None
    prompt_tokens: tuple[int, ...] = ()  # The chat-templated prompt, filled in by `data.encode_prompts`.


@dataclass(slots=True)
class Rollout:
    """One response with everything that training needs to know about it."""

    problem_id: str
    prompt_tokens: Sequence[int]
    response_tokens: list[int]
    sampler_logprobs: list[float]  # (T,) nats, of each response token, at the sampling temperature, by the engine.
    text: str
    finish_reason: Literal["stop", "length"]
    reward: float = 0.0
    reason: str = ""  # Why the reward is what it is, see `reward.Grade`.
    advantage: float = 0.0
    rescued: bool = False

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def correct(self) -> bool:
        """A reward below 1 is for effort: the problem is not solved."""
        return self.reward >= 1.0


@dataclass(slots=True)
class Group:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: list[Rollout]
    places: int = 1  # How many places of the batch this group fills, see `substitute`.

    @property
    def pass_rate(self) -> float:
        return sum(rollout.correct for rollout in self.rollouts) / len(self.rollouts)

    @property
    def informative(self) -> bool:
        """Tell whether rewards differ. Where all are equal, all advantages are 0, and there is no gradient."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


Advantage = Literal["grpo", "dr_grpo"]

# ------------------------------------------------------------- the configuration
@dataclass(frozen=True)
class Stage:
    """A stretch of training with one temperature and one length limit."""

    steps: int = 100  # Steps (rollout batches) in this stage.
    temperature: float | Literal["auto"] = 1.0
    """Sampling temperature; log-probs are taken at the same one. auto: chosen by a probe when the stage begins."""
    max_response_tokens: int = 4096  # A longer response is cut, scores 0 unless already answered, and is trained on.
    reset_optimizer: bool = False  # Begin with an empty optimizer state, as the release does after merging weights.

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read STEPS:TEMPERATURE:MAX_RESPONSE_TOKENS[:reset], as in 450:1.4:39936. Raises: UserError."""
        try:
            steps, temperature, tokens, *reset = text.split(":")
            if reset not in ([], ["reset"]):
                raise ValueError
            return cls(int(steps), "auto" if temperature == "auto" else float(temperature), int(tokens), bool(reset))
        except ValueError:
            raise UserError(f"stages has {text}: give STEPS:TEMPERATURE:TOKENS[:reset], as 450:1.4:39936") from None

    def __str__(self) -> str:
        return f"{self.steps}:{self.temperature}:{self.max_response_tokens}" + ":reset" * self.reset_optimizer


@dataclass(frozen=True)
class Common:
    """Settings that training shares with tools/evaluate.py."""

    model: str = ""  # A folder or hub name of a Hugging Face causal language model.
    seed: int = 0  # Seed of everything random; the same seed, machine and versions give the same run on a CPU.
    device: str = "auto"  # auto (the first GPU, else the CPU), cpu, cuda or cuda:1.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: bfloat16 on a GPU (float16 before Ampere), float32 on a CPU; trained weights float32. With
    float16, sampler and trainer agree better (arXiv 2510.26788)."""
    trust_remote_code: bool = False  # Run code that a model's repository brings along: only if you have read it.
    skip_bad_rows: bool = False  # Leave out rows that cannot be used (and count them) instead of ending with an error.
    prompt_suffix: str = "Let's think step by step and output the final answer within \\boxed{}."
    """Added after the problem's text unless it is there already. Source: the release's evaluation prompt."""
    max_prompt_tokens: int = 1024  # Longest prompt in tokens. Source: release (1024).
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """What generates. hf: the policy itself, by plain PyTorch. auto: vllm on a GPU if it is installed, else hf."""
    rollouts_per_batch: int = 256
    """Responses that are generated side by side: memory and speed. Another number draws other responses."""
    engine_timeout: float = 600.0  # Seconds for a step of vLLM. After them vLLM counts as hung, and the process ends.
    require_think: bool = True  # If the chat template knows <think>, grade only what follows </think>. Source: release.
    reward: str | None = None
    """A reward of your own, module:function, called as function(response, answer, problem) -> float; 1 or more counts
    as solved. Default: is the boxed answer right?"""
    reward_workers: int = 2  # Processes that check answers.
    reward_timeout: float = 3.0  # Seconds that one answer may take to check before it counts as wrong.

    def __post_init__(self) -> None:
        """Check every number. Raises: UserError that names the field, its value and what would be right."""
        for limits, word in ((AT_LEAST, "at least"), (ABOVE, "a value above")):
            for name, limit in limits.items():
                value = getattr(self, name, None)
                fits = value in (None, "auto") or value > limit or (value == limit and limits is AT_LEAST)
                may_be_inf = name in ("clip_high", "dual_clip")  # off
                require(self, fits and (may_be_inf or value != math.inf), name, f"give {word} {limit}")


AT_LEAST = {
    "max_prompt_tokens": 1, "rollouts_per_batch": 1, "reward_workers": 1, "prompts_per_step": 1, "updates_per_batch": 1,
    "tokens_per_micro_batch": 1, "logprob_chunk_tokens": 1, "checkpoint_every": 1, "keep_checkpoints": 1,
    "eval_problems": 1, "eval_rollouts": 1, "probe_problems": 1, "lora_alpha": 1, "group_size": 2, "eval_every": -1,
    "weight_decay": 0, "lora_rank": 0, "beta1": 0, "beta2": 0, "mastered_above": 0}  # fmt: skip
ABOVE = {"reward_timeout": 0, "engine_timeout": 0, "lr": 0, "max_grad_norm": 0, "eval_temperature": 0, "clip_low": 0,
         "clip_high": 0, "dual_clip": 1}  # fmt: skip


@dataclass(frozen=True)
class Config(Common):
    """Every setting of a run. The defaults are the released training values, but for the stage; presets change them."""

    preset: str = "recipe"  # Where defaults come from: a key of PRESETS. toy: a tiny model learns sums on a CPU.
    data: str = ""  # Problems: a jsonl, json or parquet file, a folder, or a hub data set (owner/name, with :split).
    run_dir: str | None = None  # Folder of this run; made by training, never overwritten. Default: runs/<time>.
    resume: str | None = None  # Folder of a run to go on with; its config is the default for every other option.

    # the evaluation
    eval_data: str | None = None  # Problems for the evaluation, all of them. Default: eval_problems are held out.
    eval_problems: int = 128  # Problems to hold out from the training data, unless eval_data is given.
    eval_rollouts: int = 8  # Rollouts per problem in the evaluation: k of avg@k and pass@k.
    eval_every: int = 0
    """Steps between evaluations; 0: before the first and after the last step only; -1: never (nothing is held out)."""
    eval_temperature: float | None = None  # The evaluation's temperature. Default: the first stage's, or 1 for auto.

    # the stages
    stages: tuple[str, ...] = (str(Stage()),)
    """What changes over time, each as STEPS:TEMPERATURE:MAX_RESPONSE_TOKENS[:reset], as in 450:1.4:39936."""
    steps: int | None = None  # Total steps: cuts the stages short, or extends the last one.
    temperature: float | Literal["auto"] | None = None  # Replaces the temperature of every stage.
    max_response_tokens: int | None = None  # Replaces the response limit of every stage.
    probe_problems: int = 16  # Training problems on which auto chooses a temperature, with group_size rollouts each.
    probe_temperatures: str = "0.4:1.6:0.1"
    """START:END:STEP of the temperatures that a first stage tries; later ones try the last and six above it."""

    # sampling
    prompts_per_step: int = 128
    """P, problems in a rollout batch. Source: release (128); its author uses 32 to 64 on small machines (#4, #18)."""
    group_size: int = 8  # G, rollouts per problem. Source: release (8).

    # the mechanisms
    rescue: bool = True  # A group with no correct rollout borrows its problem's latest. Source: blog, Rollout Rescue.
    rescue_ratio: Literal["on_policy", "stored"] = "on_policy"
    """on_policy: a rescued response counts as one of today's policy. This choice is ours: the release has no
    rescue. stored: the response is weighted by min(pi / pi of the policy that wrote the response, 2)."""
    substitute: bool = True  # Groups that teach nothing give their place to groups that do. Source: blog and release.
    mastered_above: float = 0.9  # Problems with a higher pass rate leave as a stage ends; 1: none. Source: blog (0.9).

    # the loss
    advantage: Advantage = "grpo"  # grpo: (reward - mean) / std. dr_grpo: reward - mean (arXiv 2503.20783).
    clip_low: float = 0.2  # The ratio is clipped from below at 1 - clip_low. Source: release (0.2).
    clip_high: float = 0.28
    """The ratio is clipped from above at 1 + clip_high; inf: off. Source: release (0.28), DAPO (arXiv 2503.14476)."""
    dual_clip: float = 3.0
    """A token with negative advantage loses at most dual_clip x |advantage|; inf: off. Source: release (3)."""
    mismatch: Literal["auto", "ignore", "tis"] = "auto"
    """Sampler and trainer never give a token quite the same probability. tis: a token's loss is multiplied by
    min(trainer / sampler probability, 2). ignore: by 1. auto: tis if vllm generates, else ignore."""
    updates_per_batch: int = 1  # Optimizer steps of a batch, each on its share of the groups. With 1 all ratios are 1.

    # the optimizer
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"] = "adamw"
    """adamw8bit keeps Adam's state in 8 bits. paged_*: the state waits in CPU memory where the GPU's is short. These
    three are of bitsandbytes. sgd keeps no state (arXiv 2602.07729)."""
    lr: float = 1e-6  # Learning rate, constant. Source: release (1e-6); about 10 times more with LoRA.
    weight_decay: float = 0.01  # Decoupled weight decay. Source: release (0.01).
    beta1: float = 0.9  # AdamW's decay of the first moment; sgd ignores it. Source: release (0.9).
    beta2: float = 0.999  # AdamW's decay of the second moment. Source: release (0.999).
    max_grad_norm: float = 1.0  # The gradient is scaled down to this norm. Source: release (1.0).
    lora_rank: int = 0  # Rank of LoRA adapters on all linear layers but the head; 0 trains every weight.
    lora_alpha: int = 32  # LoRA scale is lora_alpha / lora_rank.
    quantize_base: bool = False  # Keep weights under LoRA adapters in 4 bits (NF4 by bitsandbytes, arXiv 2305.14314).

    # memory: changes nothing in the result
    tokens_per_micro_batch: int | Literal["auto"] = "auto"
    """Prompt and response tokens of a row, without padding. auto: 1024 on a CPU, for its caches, 16384 on a GPU."""
    logprob_chunk_tokens: int = 256  # Tokens whose logits exist at once. Fewer take less memory, far fewer also longer.
    gradient_checkpointing: bool = False  # Keep only each block's input and recompute the rest in the backward pass.
    offload_activations: bool = False  # Keep each block's input in CPU memory. Needs gradient_checkpointing.
    offload_policy: bool = False  # Keep the policy in CPU memory while vLLM generates: more room for vLLM's cache.
    attention: Literal["auto", "sdpa", "varlen", "flash_attn"] = "auto"
    """In the update. sdpa: one sequence after another, on any device. varlen: a row's sequences at once, by PyTorch's
    flash attention (16 bits, Ampere or newer). flash_attn: the same by that package. auto: varlen, else sdpa."""

    # the run
    checkpoint_every: int = 1
    """Steps between checkpoints; one is always saved at the end. A kill costs the updates since the last one."""
    keep_checkpoints: int = 2  # Newest checkpoints to keep.

    def __post_init__(self) -> None:
        """Fold steps, temperature and max_response_tokens into the stages, then check every value."""
        need = partial(require, self)
        stages = [Stage.parse(text) for text in self.stages]
        need(len(stages) > 0, "stages", "give at least one stage")
        if self.temperature is not None:
            stages = [replace(stage, temperature=self.temperature) for stage in stages]
        if self.max_response_tokens is not None:
            stages = [replace(stage, max_response_tokens=self.max_response_tokens) for stage in stages]
        if self.steps is not None:  # stages that would begin later go, and the last one that stays ends there
            need(self.steps > 0, "steps", "give at least 1")
            begins = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages))]
            stages = [stage for stage, begin in zip(stages, begins, strict=True) if begin < self.steps]
            stages[-1] = replace(stages[-1], steps=self.steps - begins[len(stages) - 1])
        object.__setattr__(self, "stages", tuple(map(str, stages)))
        for folded in ("steps", "temperature", "max_response_tokens"):
            object.__setattr__(self, folded, None)
        super().__post_init__()
        for stage in stages:
            need(stage.steps >= 1, "stages", "give each at least 1 step")
            require(stage, stage.max_response_tokens >= 1, "max_response_tokens", "give at least 1")
            require(stage, stage.temperature == "auto" or 0 < stage.temperature < math.inf, "temperature",
                    "give auto or a value above 0 (a greedy policy samples G equal responses, which teach nothing)")
            require(stage, stage.temperature != "auto" or stages[0].temperature == "auto", "temperature",
                    "the first stage must be auto too; to begin at T give auto and --probe-temperatures T")
        need(self.updates_per_batch <= self.prompts_per_step, "updates_per_batch",
             f"give at most prompts_per_step ({self.prompts_per_step}), each update needs a group")
        for name in ("clip_low", "beta1", "beta2"):
            need(getattr(self, name) < 1, name, "give a value below 1")
        need(self.mastered_above <= 1, "mastered_above", "give a pass rate from 0 to 1 (1 keeps all problems)")
        need(self.lora_rank > 0 or not self.quantize_base, "quantize_base", "it is for LoRA; give --lora-rank 32")
        need(self.gradient_checkpointing or not self.offload_activations, "offload_activations",
             "it needs --gradient-checkpointing")
        temperature_grid(self.probe_temperatures)

    def row_limit(self, device: str) -> int:
        """Return how many tokens a row may have on this type of device. A longer rollout gets a row alone."""
        auto = 1024 if device == "cpu" else 16384  # a CPU's caches are small
        return auto if self.tokens_per_micro_batch == "auto" else self.tokens_per_micro_batch

    @property
    def schedule(self) -> tuple[Stage, ...]:
        return tuple(Stage.parse(text) for text in self.stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.schedule)

    @property
    def longest_response(self) -> int:
        """Response limit of the stage with the highest, in tokens."""
        return max(stage.max_response_tokens for stage in self.schedule)


def require(settings: object, ok: bool, name: str, advice: str) -> None:
    """Raise a UserError that names the setting, its value and what would be right."""
    if not ok:
        raise UserError(f"{name} is {getattr(settings, name)}: {advice}")


# ---------------------------------------------------------------- the mechanisms
def rescue(groups: Sequence[Group], sink: Any, rng: random.Random) -> list[Group]:
    """Put one correct rollout from the sink into each group that has none.

    The sink, a `data.Sink` or a dict, is updated in place and keeps the latest correct rollout of each problem id. In a
    group without a correct one the sink's rollout replaces one rollout at random. Every other group is returned as it
    came. `Config.rescue_ratio` says how much the borrowed rollout counts, now that the policy is another.

    Source: blog, Rollout Rescue and its figure.
    Differs from the release: there it was announced but never published.
    """
    rescued_groups = []
    for group in groups:
        correct = [rollout for rollout in group.rollouts if rollout.correct]
        if correct:
            sink[group.problem.id] = rng.choice(correct)
        elif (borrowed := sink.get(group.problem.id)) is not None:
            rollouts = list(group.rollouts)
            rollouts[rng.randrange(len(rollouts))] = replace(borrowed, rescued=True)
            group = replace(group, rollouts=rollouts)
        rescued_groups.append(group)
    return rescued_groups


def substitute(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """Let informative groups fill the whole batch: each is returned once, with the number of its places.

    If more than a third of the groups are informative, every other group's place goes to a random informative one,
    without repetition as long as there are enough. Otherwise the list is empty: the batch is too poor for an update.
    A copy of a group would have the same tokens and the same advantages, so its gradient would be the original's. We
    therefore train the original once, with the number of its places as a factor.

    Source: blog, Intra-Batch Informative Substitution; release (the threshold of one third).
    Differs from the release: there the copies were graded against the wrong problem's answer, and dropped batches
    left no trace in the log.
    """
    informative = [group for group in groups if group.informative]
    if 3 * len(informative) <= len(groups):
        return []
    places = len(groups) - len(informative)
    if places <= len(informative):
        copied = rng.sample(range(len(informative)), places)
    else:
        copied = [rng.randrange(len(informative)) for _ in range(places)]
    return [replace(group, places=1 + copied.count(i)) for i, group in enumerate(informative)]


def advantages(rewards: Sequence[float], kind: Advantage = "grpo") -> list[float]:
    """Compare each reward with its group: (reward - mean) / (std + 1e-6), std with n - 1; dr_grpo: reward - mean.

    >>> [round(a, 3) for a in advantages([1, 0, 0, 0, 0, 0, 0, 0])][:2]
    [2.475, -0.354]

    Source: GRPO (arXiv 2402.03300), release; Dr. GRPO (arXiv 2503.20783).
    """
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)  # exactly: rounding would leave dust
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + 1e-6 if kind == "grpo" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def set_advantages(groups: Sequence[Group], kind: Advantage = "grpo") -> None:
    """Set every rollout's advantage, each group's by its own rewards."""
    for group in groups:
        values = advantages([rollout.reward for rollout in group.rollouts], kind)
        for rollout, value in zip(group.rollouts, values, strict=True):
            rollout.advantage = value


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float,
                dual_clip: float) -> tuple[Tensor, Tensor]:
    """Take the clipped policy-gradient loss of every token, and whether clipping stopped its gradient.

    logprobs, old_logprobs: (N,) nats, at the sampling temperature; advantages: (N,), one per token.
    Returns (N,) losses, not yet averaged, and (N,) bool. There is no KL and no entropy term.

    Source: PPO (arXiv 1707.06347); clip-high: DAPO (arXiv 2503.14476); dual clip: arXiv 1912.09729; release.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # (N,)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = plain.maximum(clipped)  # (N,) the more pessimistic of the two
    bound = -advantages * dual_clip
    too_large = (advantages < 0) & (loss > bound)  # a wrong token that became likely may not dominate the batch
    loss = loss.where(~too_large, bound)
    return loss, (clipped > plain) | too_large


def truncated_ratio(logprobs: Tensor, sampler_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Weigh tokens that another policy wrote: (N,), min(exp(logprobs - sampler_logprobs), cap), without a gradient.

    Source: truncated importance sampling, TIS (fengyao.notion.site/off-policy-rl; cap 2).
    """
    return (logprobs - sampler_logprobs).detach().clamp(max=20).exp().clamp(max=cap)


def mastered(scores: Mapping[str, Sequence[float]], above: float) -> set[str]:
    """Name the problems whose mean score in a stage is above the limit. Problems without a score are not named.

    Source: blog (accuracy above 0.9 leaves between stages); release (plain mean of the stage's scores).
    """
    return {problem_id for problem_id, values in scores.items() if values and statistics.fmean(values) > above}


# ---------------------------------------------------------- temperature
def temperature_grid(text: str) -> list[float]:
    """Read START:END:STEP, end included, or a comma-separated list. Raises: UserError.

    >>> temperature_grid("0.2:0.8:0.2")
    [0.2, 0.4, 0.6, 0.8]
    """
    try:
        if ":" in text:
            start, end, step = map(float, text.split(":"))
            count = math.floor((end - start) / step + 1e-6) + 1
            grid = [round(start + i * step, 6) for i in range(min(count, 1000))]
        else:
            grid = [float(word) for word in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        grid = []
    if not grid or not all(0 < a < b < 10 for a, b in pairwise([*grid, 9.9])):
        raise UserError(f"temperatures is {text}: give START:END:STEP or a list, rising and above 0: 0.2:1.8:0.2")
    return grid


@dataclass(frozen=True)
class Zones:
    """The borders between the three zones of accuracy over temperature. Beyond the second, it collapses."""

    robust_until: float  # Robust Generation: the last temperature at which accuracy is still as good as the best.
    exploration_until: float  # Controlled Exploration: the last one at which accuracy is above 80 % of the best.


def temperature_zones(accuracy: Mapping[float, float], noise: Mapping[float, float] | None = None) -> Zones:
    """Find the zones of a curve, temperature -> accuracy. As good as the best: within 1 %, or within the noise.

    noise: temperature -> standard error of the difference to the best accuracy, where it is known.
    Raises: UserError if nothing was correct at any temperature.

    Source: blog, the zones. Ours: borders at 1 % and 80 %; exploration ends where the curve first falls below 80 %.
    """
    best_at, best = max(accuracy.items(), key=lambda point: point[1])
    if best <= 0:
        raise UserError("accuracy is 0 at every temperature: probe easier problems or more of them, give a number, or "
                        "--no-require-think if the model does not think")
    exploration = max(takewhile(lambda t: accuracy[t] >= 0.8 * best, sorted(t for t in accuracy if t >= best_at)))
    tolerance = {t: max(0.01 * best, (noise or {}).get(t, 0.0)) for t in accuracy}
    robust = max(t for t, value in accuracy.items() if value >= best - tolerance[t] and t <= exploration)
    return Zones(robust, exploration)


def pick_temperature(accuracy: Mapping[float, float], diversity: Mapping[float, float], *, match: float | None = None,
                     noise: Mapping[float, float] | None = None) -> float:
    """Choose a stage's temperature from a probe: curves of temperature -> accuracy and temperature -> diversity.

    A first stage takes the border of robust generation: the most diversity that costs no accuracy. A later one takes
    the lowest temperature whose diversity, interpolated, reaches `match`, that of the first stage before training;
    where none does, or only beyond controlled exploration, the end of controlled exploration.

    Source: blog, temperature of the first stage and its rise in later ones.
    """
    zones = temperature_zones(accuracy, noise)
    if match is None:
        return zones.robust_until
    curve = sorted(diversity.items())
    reached = [curve[0][0]] if curve[0][1] >= match else []
    for (t0, d0), (t1, d1) in pairwise(curve):
        if d0 < match <= d1:
            reached.append(round(t0 + (t1 - t0) * (match - d0) / (d1 - d0), 2))
    return min([*reached, zones.exploration_until])


# -------------------------------------------------------------- what is measured
def distinct_n(texts: Sequence[str], n: int = 4) -> float:
    """Share of different word n-grams among all word n-grams of one problem's responses; 0 if there are none.

    Depends on the number and length of the texts: compare only where these are equal.

    >>> distinct_n(["a b c d e", "a b c d f"])
    0.75

    Source: release (whitespace words, pooled over the rollouts of a problem).
    """
    split = [text.split() for text in texts]
    ngrams = [ngram for words in split for ngram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def mean_distinct_n(responses: Iterable[Sequence[str]], n: int = 4) -> float:
    """Average `distinct_n` over problems, each with its responses."""
    return statistics.fmean(distinct_n(texts, n) for texts in responses)


def pass_at_k(correct: int, rollouts: int, k: int) -> float:
    """Estimate the chance that at least one of k rollouts is correct, without bias, from `rollouts` >= k of them.

    >>> pass_at_k(correct=1, rollouts=8, k=4)
    0.5

    Source: Codex (arXiv 2107.03374).
    """
    if rollouts - correct < k:
        return 1.0
    return 1.0 - math.comb(rollouts - correct, k) / math.comb(rollouts, k)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval, by Student's t.

    Give one value per problem, not per rollout: the rollouts of a problem are not independent.
    """
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom < 1:
        return mean, math.nan
    t95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    t = t95[freedom - 1] if freedom <= len(t95) else 1.96 + 2.5 / freedom  # within 0.015
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def batch_metrics(groups: Sequence[Group], batch: Sequence[Group]) -> dict[str, float]:
    """Measure a step's responses: `groups` are as generated, `batch` is what is trained on."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens = [len(rollout.response_tokens) for rollout in rollouts]
    return {
        "reward/mean": statistics.fmean(rollout.reward for rollout in rollouts),
        "reward/solve_none": statistics.fmean(group.pass_rate == 0 for group in groups),
        "reward/solve_all": statistics.fmean(group.pass_rate == 1 for group in groups),
        **{f"reward/{reason}": statistics.fmean(r.reason == reason for r in rollouts) for reason in UNSOLVED},
        "batch/informative": statistics.fmean(group.informative for group in groups),
        "batch/rescued": sum(rollout.rescued for group in batch for rollout in group.rollouts),
        "batch/substituted": sum(group.places - 1 for group in batch),
        "response/tokens_mean": statistics.fmean(tokens),
        "response/tokens_max": max(tokens),
        "response/truncated": statistics.fmean(rollout.truncated for rollout in rollouts),
        "diversity/distinct_4": mean_distinct_n([rollout.text for rollout in group.rollouts] for group in groups),
        "tokens/rollout": sum(tokens),
    }


UNSOLVED = {
    "no_think_end": "give --no-require-think if the model does not think",
    "no_answer": "let --prompt-suffix ask for a box, or teach it by tools/warmup.py",
    "truncated": "raise --max-response-tokens",
    "timeout": "raise --reward-timeout or --reward-workers",
    "wrong": "check the answers in rollouts.jsonl, or give easier problems",
}
"""For each reason of a reward of 0: what may help where it prevails."""


def health(metrics: Sequence[Mapping[str, Any]], steps: int = 10) -> dict[str, str]:
    """Name what goes wrong in silence, by the metrics of the last steps: a name, and what is seen with what to try."""
    if len(metrics) < steps:
        return {}

    def mean(metric: str, lines: Sequence[Mapping[str, Any]]) -> float:
        return statistics.fmean([line[metric] for line in lines if line.get(metric) is not None] or [math.nan])

    first, last, found = metrics[:steps], metrics[-steps:], {}
    for name, metric, share, advice in (
        ("entropy", "policy/entropy", 0.1, "the policy collapses: raise --temperature, lower --lr"),
        ("length", "response/tokens_mean", 0.3, "read rollouts.jsonl: are responses still reasoning? lower --lr"),
    ):
        if mean(metric, last) < share * mean(metric, first):
            found[name] = f"{metric} fell from {mean(metric, first):.3g} to {mean(metric, last):.3g}: {advice}"
    share, reason = max((mean(f"reward/{reason}", last), reason) for reason in UNSOLVED)
    for name, metric, limit, advice in (
        ("unsolved", "reward/solve_none", 1, f"no gradient; {share:.0%} are graded {reason}: {UNSOLVED[reason]}"),
        ("solved", "reward/solve_all", 1, "nothing is learned: give harder problems (python tools/difficulty.py)"),
        ("timeouts", "reward/timeout", 0.25, f"late answers earn 0: {UNSOLVED['timeout']}"),
        ("truncated", "response/truncated", 0.25, f"cut responses earn 0: {UNSOLVED['truncated']}"),
        ("mismatch", "mismatch/kl", 0.05, "sampler and trainer disagree: try --dtype float16, or --engine hf"),
    ):
        value = mean(metric, last)
        if value > limit or value == limit == 1:
            found[name] = f"{metric} was {value:.3g} on average in the last {steps} steps; {advice}"
    return found


# ------------------------------------------------------------------- the presets
def _published(model: str, *stages: str) -> Config:
    """Make a preset of the release. Its later stages begin from merged weights: with an empty optimizer state."""
    # the data is without problems that R1-Distill-Qwen-7B always solved: filter it again with your own model
    return Config(model=model, data="POLARIS-Project/Polaris-Dataset-53K", stages=stages, checkpoint_every=5)


TOY = Path(__file__).parent / "tools" / "toy_world"
PRESETS = {
    "recipe": Config(checkpoint_every=5),
    "polaris-4b": _published("Qwen/Qwen3-4B", "450:1.4:39936", "150:1.45:48128:reset", "100:1.5:52224:reset"),
    "polaris-7b": _published("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "520:0.7:15360", "370:1.0:23552:reset",
                             "590:1.1:31744:reset"),
    # 500 steps in all; where the second stage began is not published
    "polaris-1.7b": _published("Qwen/Qwen3-1.7B", "350:1.5:39936", "150:1.55:48128:reset"),
}
_WORKSTATION: dict[str, Any] = {
    "prompts_per_step": 32, "max_response_tokens": 32768, "lora_rank": 32, "lr": 1e-5, "optimizer": "adamw8bit",
    "gradient_checkpointing": True, "tokens_per_micro_batch": 33792, "rollouts_per_batch": 16, "offload_policy": True,
    "checkpoint_every": 1}  # fmt: skip
"""Source: the release's author on small machines (issues #4, #18: batch 32, up to 32768 tokens); LoRA is ours."""
PRESETS |= {
    "rtx-24gb": replace(PRESETS["polaris-1.7b"], **_WORKSTATION),
    "rtx-2x24gb": replace(PRESETS["polaris-4b"], **_WORKSTATION),
    "toy": Config(
        model=str(TOY / "model"), data=str(TOY / "problems.jsonl"), eval_data=str(TOY / "held_out.jsonl"),
        prompt_suffix="", max_prompt_tokens=64, stages=("40:1.0:80", "80:1.1:128"), prompts_per_step=32, lr=3e-4,
        eval_every=10),
}  # fmt: skip
PRESETS = {name: replace(preset, preset=name) for name, preset in PRESETS.items()}


# -------------------------------------------------------------------- the command line
FIXED_IN_A_RUN = ("model", "data", "seed", "optimizer", "lora_rank", "lora_alpha", "quantize_base", "eval_data",
                  "eval_problems", "prompt_suffix", "preset")  # fmt: skip


def read_config(arguments: Sequence[str], description: str | None = None) -> Config:
    """Make the configuration: first the preset or the resumed run, then the options over it."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # options that decide about others' defaults
    for name in ("--resume", "--preset", "--model", "--data"):
        ahead.add_argument(name)
    given = ahead.parse_known_args(arguments)[0]
    if given.resume is not None:
        default = replace(saved_config(Path(given.resume)), resume=given.resume, run_dir=given.resume)
    else:
        preset = given.preset or ("recipe" if given.model else "toy")
        if preset not in PRESETS:
            raise UserError(f"preset is {preset}: give one of {', '.join(PRESETS)}")
        default = PRESETS[preset]
        if given.data is not None:  # the preset's held-out problems belong to the preset's data
            default = replace(default, eval_data=None)
    config = tyro.cli(Config, args=arguments, prog="train.py", description=description, default=default)
    if not (config.model and config.data):
        raise UserError("model or data is missing: give --model and --data, or a --preset that has them")
    for name in FIXED_IN_A_RUN if given.resume else ():
        if getattr(config, name) != getattr(default, name):
            raise UserError(f"{name} is {getattr(config, name)}: in this run it stays {getattr(default, name)}")
    return config


def saved_config(folder: Path) -> Config:
    try:
        fields = json.loads((folder / "config.json").read_text())
        return Config(**{**fields, "stages": tuple(fields["stages"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"resume is {folder}: no config.json of a run can be read there ({error})") from error
