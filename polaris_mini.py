"""POLARIS as pure functions: the whole recipe, without a model, a file or a GPU.

What lives here: the types that the other modules pass around (`Problem`, `Rollout`, `Group`), the configuration
(`Stage`, `Config`, `PRESETS`) and every mechanism of the recipe: rescue, substitution, advantages, the policy loss,
the removal of mastered problems, diversity and pass@k. What does not: reading, generating, grading, optimizing. Those
modules call these functions; `train.py` calls them in the order of the algorithm.

    python polaris_mini.py        # a tour: each mechanism on a handful of numbers

"Source:" lines name the POLARIS blog post (hkunlp.github.io/blog/2025/Polaris), the released code
(github.com/ChenxinAn-fdu/POLARIS) or a paper by its arXiv number.
"""
from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# ------------------------------------------------------------------ the types


@dataclass(frozen=True)
class Problem:
    """A question with its accepted answers (any one of them counts as right)."""

    id: str
    text: str
    answers: tuple[str, ...]
    pass_rate: float | None = None
    """Offline difficulty: the share of correct rollouts of the model to be trained, if it was measured."""
    system: str | None = None
    prompt_tokens: tuple[int, ...] = ()
    """The chat-templated prompt, filled in by `data.encode_prompts`."""


@dataclass(slots=True)
class Rollout:
    """One response with everything that training needs to know about it."""

    problem_id: str
    prompt_tokens: Sequence[int]
    response_tokens: list[int]
    sampler_logprobs: list[float]
    """(T,) nats, one per response token, at the sampling temperature, as the engine computed them."""
    text: str
    finish_reason: Literal["stop", "length"]
    reward: float = 0.0
    reason: str = ""
    """Why the reward is what it is, see `reward.Grade`."""
    advantage: float = 0.0
    rescued: bool = False

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: list[Rollout]
    weight: int = 1
    """How many places of the batch this group fills, see `substitute`."""

    @property
    def pass_rate(self) -> float:
        return sum(rollout.reward for rollout in self.rollouts) / len(self.rollouts)

    @property
    def informative(self) -> bool:
        """Only a group with both right and wrong rollouts has advantages, and so a gradient."""
        return 0.0 < self.pass_rate < 1.0


# ------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one temperature and one length limit."""

    steps: int = 100
    """Steps (rollout batches) in this stage."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same one. POLARIS: from measured diversity, raised per stage."""
    max_response_tokens: int = 4096
    """Response limit in tokens; a longer response is cut, scores 0 unless already answered, and is trained on."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the released training values, in one stage; presets change them."""

    preset: Literal["toy", "recipe"] = "recipe"
    """Where the defaults come from: toy (tiny model, made-up sums, minutes on a CPU) or recipe (POLARIS's values)."""
    model: str = "toy"
    """A folder or hub name of a Hugging Face causal language model, or toy for the embedded tiny one."""
    data: str = "toy"
    """Problems: a jsonl, json or parquet file, a hub data set (owner/name, or owner/name:split), or toy."""
    run_dir: str | None = None
    """Folder of this run; made by training, never overwritten. Default: runs/<time>."""
    resume: str | None = None
    """Folder of an earlier run to go on with; its config is the default for every other option."""
    seed: int = 0
    """Seed of everything random; the same seed, machine and versions give the same run on a CPU."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type. auto: bfloat16 on a GPU (trained weights stay float32), float32 on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along. Only for repositories that you have read."""

    # the data
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used (and say how many) instead of ending with an error."""
    prompt_suffix: str = "Let's think step by step and output the final answer within \\boxed{}."
    """Added after the problem's text unless it is there already. Source: the release's evaluation prompt."""
    prompt_examples: str | None = None
    """jsonl file of worked examples (problem, response) that stand before each problem as chat turns."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens. Source: release (1024)."""
    eval_data: str | None = None
    """Problems for the evaluation, all of them. Default: eval_problems are held out from the training data."""
    eval_problems: int = 128
    """Problems to hold out from the training data, unless eval_data is given."""
    eval_rollouts: int = 8
    """Rollouts per problem in the evaluation: k of avg@k and pass@k."""
    eval_every: int = 0
    """Steps between evaluations; 0: before the first and after the last step only; -1: never (nothing is held out)."""
    eval_temperature: float | None = None
    """Sampling temperature of the evaluation. Default: the first stage's."""

    # the stages
    stages: tuple[Stage, ...] = (Stage(),)
    """What changes over time, each as STEPS:TEMPERATURE:MAX_RESPONSE_TOKENS: 450:1.4:39936 150:1.45:48128."""
    steps: int | None = None
    """Total steps: cuts the stages short, or extends the last one."""
    temperature: float | None = None
    """Replaces the temperature of every stage."""
    max_response_tokens: int | None = None
    """Replaces the response limit of every stage."""

    # sampling
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """What generates. hf: the policy's own weights, by PyTorch. vllm: not in this version. auto: hf."""
    prompts_per_step: int = 128
    """P, problems in a rollout batch. Source: release (128); its author uses 32 to 64 on small machines (#4, #18)."""
    group_size: int = 8
    """G, rollouts per problem. Source: release (8)."""
    rollouts_per_batch: int = 256
    """Responses that the hf engine generates side by side: memory and speed. Another number draws other responses."""

    # the reward
    require_think: bool = True
    """With a model whose chat template knows <think>, grade only what follows </think>. Source: release."""
    reward_workers: int = 2
    """Processes that check answers."""
    reward_timeout: float = 3.0
    """Seconds that one answer may take to check before it counts as wrong."""

    # the mechanisms
    rescue: bool = True
    """A group with no correct rollout borrows one that this problem once had. Source: blog, Rollout Rescue."""
    substitute: bool = True
    """Groups that teach nothing give their place to groups that do. Source: blog and release."""
    mastered_above: float = 0.9
    """Problems with a higher pass rate in a stage leave at its end; 1 keeps all. Source: blog (0.9)."""

    # the loss
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """grpo: (reward - mean) / std. dr_grpo: reward - mean (arXiv 2503.20783)."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low. Source: release (0.2)."""
    clip_high: float = 0.28
    """The ratio is clipped from above at 1 + clip_high; inf: off. Source: release (0.28), DAPO (arXiv 2503.14476)."""
    dual_clip: float = 3.0
    """A token with negative advantage loses at most dual_clip x |advantage|; inf: off. Source: release (3)."""
    updates_per_batch: int = 1
    """Optimizer steps per rollout batch, each on its share of the groups. With 1 the ratio is exactly 1."""

    # the optimizer
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """adamw8bit keeps Adam's state in 8 bits (bitsandbytes); sgd keeps none (arXiv 2602.07729)."""
    lr: float = 1e-6
    """Learning rate, constant. Source: release (1e-6); about 10 times more with LoRA."""
    weight_decay: float = 0.01
    """Decoupled weight decay. Source: release (0.01)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment; sgd ignores it. Source: release (0.9)."""
    beta2: float = 0.999
    """AdamW's decay of the second moment. Source: release (0.999)."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm. Source: release (1.0)."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains every weight."""
    lora_alpha: int = 32
    """LoRA scale is lora_alpha / lora_rank."""

    # memory: changes nothing in the result
    tokens_per_micro_batch: int = 16384
    """Prompt and response tokens in one packed row; at least one rollout goes into each."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time."""
    gradient_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass."""

    # the warm start
    warmup: str | None = None
    """jsonl file of worked examples (problem, response) for a few supervised steps before GRPO."""
    warmup_steps: int = 60
    """Supervised steps."""
    warmup_batch: int = 16
    """Examples per supervised step."""
    warmup_lr: float = 2e-5
    """Peak learning rate of the supervised steps: a short rise, then linear to 0."""

    # the run
    checkpoint_every: int = 20
    """Steps between checkpoints; one is always saved at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    track: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    """Also send the metrics to this tracker, if it is installed."""

    def __post_init__(self) -> None:
        """Fold steps, temperature and max_response_tokens into the stages, then check every value.

        Raises: ValueError naming the field, its value and what would be right.
        """
        stages = tuple(self.stages)
        if self.temperature is not None:
            stages = tuple(replace(stage, temperature=self.temperature) for stage in stages)
        if self.max_response_tokens is not None:
            stages = tuple(replace(stage, max_response_tokens=self.max_response_tokens) for stage in stages)
        if self.steps is not None:
            stages = _with_total_steps(stages, self.steps)
        object.__setattr__(self, "stages", stages)
        for folded in ("steps", "temperature", "max_response_tokens"):
            object.__setattr__(self, folded, None)
        _check(self)

    def stage_at(self, step: int) -> Stage | None:
        """Return the stage of the step after `step` completed ones, or None when training is over."""
        number = self.stage_number(step)
        return self.stages[number - 1] if number <= len(self.stages) else None

    def stage_number(self, step: int) -> int:
        """Count the stages from 1; one more than there are when training is over."""
        for number, stage in enumerate(self.stages, start=1):
            if step < stage.steps:
                return number
            step -= stage.steps
        return len(self.stages) + 1

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def _with_total_steps(stages: tuple[Stage, ...], total: int) -> tuple[Stage, ...]:
    kept: list[Stage] = []
    for stage in stages:
        left = total - sum(s.steps for s in kept)
        if left > 0:
            kept.append(replace(stage, steps=min(stage.steps, left)))
    if not kept:
        raise ValueError(f"steps is {total}: give at least 1")
    missing = total - sum(s.steps for s in kept)
    kept[-1] = replace(kept[-1], steps=kept[-1].steps + missing)
    return tuple(kept)


def _check(config: Config) -> None:
    def need(ok: bool, name: str, advice: str, value: object = None) -> None:
        if not ok:
            shown = getattr(config, name) if value is None else value
            raise ValueError(f"{name} is {shown}: {advice}")

    need(len(config.stages) > 0, "stages", "give at least one stage")
    for number, stage in enumerate(config.stages, start=1):
        need(stage.steps >= 1, f"stages[{number}].steps", "give at least 1", stage.steps)
        need(0 < stage.temperature < math.inf, "temperature",
             "give a value above 0 (a greedy policy samples G equal responses, which teach nothing)", stage.temperature)
        need(stage.max_response_tokens >= 1, "max_response_tokens", "give at least 1", stage.max_response_tokens)
    need(config.group_size >= 2, "group_size", "give at least 2, an advantage compares the rollouts of a group")
    for name in ("prompts_per_step", "updates_per_batch", "rollouts_per_batch", "max_prompt_tokens", "reward_workers",
                 "tokens_per_micro_batch", "logprob_chunk_tokens", "checkpoint_every", "keep_checkpoints",
                 "eval_problems", "eval_rollouts", "warmup_steps", "warmup_batch"):
        need(getattr(config, name) >= 1, name, "give at least 1")
    need(config.updates_per_batch <= config.prompts_per_step, "updates_per_batch",
         f"give at most prompts_per_step ({config.prompts_per_step}), each update needs a group")
    for name in ("lr", "warmup_lr", "reward_timeout", "max_grad_norm"):
        need(0 < getattr(config, name) < math.inf, name, "give a value above 0")
    for name in ("weight_decay", "lora_rank"):
        need(getattr(config, name) >= 0, name, "give 0 or more")
    for name in ("beta1", "beta2"):
        need(0 <= getattr(config, name) < 1, name, "give a value from 0 to below 1")
    need(config.lora_alpha > 0, "lora_alpha", "give at least 1")
    need(config.eval_every >= -1, "eval_every", "give steps, 0 (first and last only) or -1 (never)")
    need(config.eval_temperature is None or 0 < config.eval_temperature < math.inf, "eval_temperature",
         "give a value above 0")
    need(0 <= config.mastered_above <= 1, "mastered_above", "give a pass rate from 0 to 1 (1 keeps all problems)")
    need(0 < config.clip_low < 1, "clip_low", "give a value between 0 and 1")
    need(config.clip_high > 0, "clip_high", "give a value above 0")
    need(config.dual_clip > 1, "dual_clip", "give a value above 1")


PRESETS: dict[str, Config] = {
    "recipe": Config(),
    "toy": Config(
        preset="toy", prompt_suffix="", max_prompt_tokens=64, stages=(Stage(100, 1.0, 96),),
        prompts_per_step=32, lr=1e-4, eval_every=25, checkpoint_every=25,
        warmup_steps=600, warmup_batch=32, warmup_lr=3e-3,
    ),
}  # fmt: skip

# ---------------------------------------------------------------- the mechanisms


def rescue(groups: Sequence[Group], sink: dict[str, Rollout], rng: random.Random) -> list[Group]:
    """Put one correct rollout from the sink into each group that has none.

    The sink, updated in place, keeps one correct rollout per problem id, the latest. The group in which nothing was
    correct loses one random failed rollout to it; every other group is returned as it came. The borrowed rollout
    counts as on-policy: its old log-probs are those of the current policy, so its ratio starts at 1.

    Source: blog, Rollout Rescue and its figure.
    Differs from the release: there it was announced but never published.
    """
    rescued_groups = []
    for group in groups:
        correct = [rollout for rollout in group.rollouts if rollout.reward > 0]
        if correct:
            sink[group.problem.id] = rng.choice(correct)
        elif group.problem.id in sink:
            rollouts = list(group.rollouts)
            rollouts[rng.randrange(len(rollouts))] = replace(sink[group.problem.id], rescued=True)
            group = replace(group, rollouts=rollouts)
        rescued_groups.append(group)
    return rescued_groups


def substitute(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """Let informative groups fill the whole batch: each is returned once, with its number of places as weight.

    If more than a third of the groups are informative, every other group's place goes to a random informative one,
    without repetition as long as there are enough. Otherwise the list is empty: the batch is too poor for an update.
    A copy has its original's tokens and advantages, hence its gradient, so a weight stands for copies at no cost.

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
    return [replace(group, weight=1 + copied.count(i)) for i, group in enumerate(informative)]


def advantages(rewards: Sequence[float], kind: Literal["grpo", "dr_grpo"] = "grpo") -> list[float]:
    """Compare each reward with its group: (reward - mean) / (std + 1e-6), std with n - 1; dr_grpo: reward - mean.

    >>> [round(a, 3) for a in advantages([1, 0, 0, 0, 0, 0, 0, 0])][:2]
    [2.475, -0.354]

    Source: GRPO (arXiv 2402.03300), release; Dr. GRPO (arXiv 2503.20783).
    """
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + 1e-6 if kind == "grpo" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
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


def mastered(scores: Mapping[str, Sequence[float]], above: float) -> set[str]:
    """Name the problems whose mean score in a stage is above the limit. Problems without a score are not named.

    Source: blog (accuracy above 0.9 leaves between stages); release (plain mean of the stage's scores).
    """
    return {problem_id for problem_id, values in scores.items() if values and statistics.fmean(values) > above}


# -------------------------------------------------------------- what is measured


def distinct_n(texts: Sequence[str], n: int = 4) -> float:
    """Share of different word n-grams among all word n-grams of one problem's responses; 0 if there are none.

    Depends on the number and length of the texts: compare only where these are equal.

    >>> distinct_n(["a b c d e", "a b c d f"])
    0.75

    Source: release (whitespace words, pooled over the rollouts of a problem).
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen) / total if total else 0.0


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
    """Return the mean and the half width of its 95 % interval (normal approximation).

    Give one value per problem, not per rollout: the rollouts of a problem are not independent.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, 1.96 * statistics.stdev(values) / math.sqrt(len(values))


# ---------------------------------------------------------------------- the tour


def _tour() -> None:
    def group(name: str, rewards: Sequence[float]) -> Group:
        rollouts = [Rollout(name, (), [], [], f"response {i}", "stop", reward) for i, reward in enumerate(rewards)]
        return Group(Problem(name, name, ("1",)), rollouts)

    rng = random.Random(0)
    batch = [group("a", [1, 0, 0, 0]), group("b", [0, 0, 0, 0]), group("c", [1, 1, 1, 1]), group("d", [1, 1, 0, 0])]
    sink = {"b": Rollout("b", (), [], [], "an old correct response", "stop", 1.0)}
    print("rewards      ", {g.problem.id: [r.reward for r in g.rollouts] for g in batch})
    batch = rescue(batch, sink, rng)
    print("rescue       ", f"b -> {[r.text for r in batch[1].rollouts]}")
    batch = substitute(batch, rng)
    print("substitute   ", {g.problem.id: f"{g.weight} places" for g in batch}, "(c taught nothing)")
    for g in batch:
        print("advantages   ", g.problem.id, [round(a, 3) for a in advantages([r.reward for r in g.rollouts])])
    print("mastered     ", mastered({"a": [0.25], "c": [1.0, 1.0], "unvisited": []}, above=0.9))
    print("distinct_n   ", distinct_n(["2 + 3 = 5 so 5", "2 + 3 = 5 so five"]))
    print("pass_at_k    ", {k: pass_at_k(2, 8, k) for k in (1, 4, 8)}, "with 2 of 8 correct")


if __name__ == "__main__":
    _tour()
