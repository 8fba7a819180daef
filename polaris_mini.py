"""POLARIS as pure functions: the whole recipe, without a model, a file or a GPU.

What lives here: the types that the other modules pass around (`Problem`, `Rollout`, `Group`), the configuration
(`Stage`, `Config`, `PRESETS`) and every mechanism of the recipe: rescue, substitution, advantages, the policy loss,
rewards for intermediate results, the removal of mastered problems, plateaus, zones of temperature, YaRN, diversity
and pass@k.
What does not: reading, generating, grading, optimizing, so that each rule can be read and tested by itself. The other
modules call these functions, `train.py` in the order of the algorithm.

"Source:" lines name the POLARIS blog post (hkunlp.github.io/blog/2025/Polaris), the released code
(github.com/ChenxinAn-fdu/POLARIS) or a paper by its arXiv number.
"""
from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

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

    @property
    def correct(self) -> bool:
        """A reward below 1 is for effort: the problem is not solved."""
        return self.reward >= 1.0


@dataclass(slots=True)
class Group:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: list[Rollout]
    weight: int = 1
    """How many places of the batch this group fills, see `substitute`."""

    @property
    def pass_rate(self) -> float:
        return sum(rollout.correct for rollout in self.rollouts) / len(self.rollouts)

    @property
    def informative(self) -> bool:
        """Only where rewards differ, as those of right and wrong rollouts, are there advantages, and so a gradient."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


# ------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one temperature and one length limit."""

    steps: int = 100
    """Steps (rollout batches) in this stage, at most."""
    temperature: float | Literal["auto"] = 1.0
    """Sampling temperature; log-probs are taken at the same one. auto: chosen by a probe when the stage begins."""
    max_response_tokens: int = 4096
    """Response limit in tokens; a longer response is cut, scores 0 unless already answered, and is trained on."""
    until: Literal["steps", "plateau"] = "steps"
    """plateau: the stage ends earlier once its mean reward has stopped rising, see `plateaued`."""
    reset_optimizer: bool = False
    """Begin the stage with an empty optimizer state, as the release does: it merges the weights and starts again."""


@dataclass(frozen=True)
class Common:
    """Settings that training shares with tools/evaluate.py."""

    model: str = "toy"
    """A folder or hub name of a Hugging Face causal language model, or toy for the embedded tiny one."""
    seed: int = 0
    """Seed of everything random; the same seed, machine and versions give the same run on a CPU."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: bfloat16 on a GPU (trained weights stay float32), float32 on a CPU. With float16, sampler and
    trainer agree better (arXiv 2510.26788)."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along. Only for repositories that you have read."""
    allow_pickled_weights: bool = False
    """Load weights that are no safetensors. Pickled ones can run code: only from those whom you trust."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used (and say how many) instead of ending with an error."""
    prompt_suffix: str = "Let's think step by step and output the final answer within \\boxed{}."
    """Added after the problem's text unless it is there already. Source: the release's evaluation prompt."""
    prompt_examples: str | None = None
    """jsonl file of worked examples (problem, response) that stand before each problem as chat turns."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens. Source: release (1024)."""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """What generates. hf: the policy itself, by plain PyTorch. vllm: for a GPU. auto: vllm on a GPU if it is
    installed, else hf."""
    rollouts_per_batch: int = 256
    """Responses that are generated side by side: memory and speed. Another number draws other responses."""
    engine_timeout: float = 600.0
    """Seconds without a new token after which vLLM counts as hung, and the process saves what it has and ends."""
    require_think: bool = True
    """With a model whose chat template knows <think>, grade only what follows </think>. Source: release."""
    reward: str | None = None
    """A reward of your own, module:function, called as function(response, answer, problem) -> float; 1 or more counts
    as solved. Default: is the boxed answer right?"""
    reward_workers: int = 2
    """Processes that check answers."""
    reward_timeout: float = 3.0
    """Seconds that one answer may take to check before it counts as wrong."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "rollouts_per_batch", "reward_workers"):
            require(self, getattr(self, name) >= 1, name, "give at least 1")
        for name in ("reward_timeout", "engine_timeout"):
            require(self, 0 < getattr(self, name) < math.inf, name, "give a value above 0")


@dataclass(frozen=True)
class Config(Common):
    """Every setting of a run. The defaults are the released training values, in one stage; presets change them."""

    preset: str = "recipe"
    """Where the defaults come from: a key of PRESETS. toy is a tiny model that learns sums, in minutes on a CPU."""
    data: str = "toy"
    """Problems: a jsonl, json or parquet file, a hub data set (owner/name, or owner/name:split), or toy."""
    run_dir: str | None = None
    """Folder of this run; made by training, never overwritten. Default: runs/<time>."""
    resume: str | None = None
    """Folder of an earlier run to go on with; its config is the default for every other option."""

    # the evaluation
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
    """What changes over time, each as STEPS:TEMPERATURE:MAX_RESPONSE_TOKENS[:plateau][:reset]: 450:1.4:39936."""
    steps: int | None = None
    """Total steps: cuts the stages short, or extends the last one."""
    temperature: float | Literal["auto"] | None = None
    """Replaces the temperature of every stage."""
    max_response_tokens: int | None = None
    """Replaces the response limit of every stage."""
    plateau_window: int = 25
    """Steps over which a stage with `plateau` averages its reward: it ends when a window is no better than the last."""
    probe_problems: int = 16
    """Training problems on which an `auto` temperature is chosen, with group_size rollouts each."""
    probe_temperatures: str = "0.4:1.6:0.1"
    """START:END:STEP of the temperatures that are tried for a first stage; later ones try higher ones than the last."""
    diversity_words: int = 500
    """Words of each response that the fixed-length diversity looks at."""

    # sampling
    prompts_per_step: int = 128
    """P, problems in a rollout batch. Source: release (128); its author uses 32 to 64 on small machines (#4, #18)."""
    group_size: int = 8
    """G, rollouts per problem. Source: release (8)."""

    # the mechanisms
    process_reward: Literal["none", "core"] = "none"
    """core: wrong responses earn up to 0.5 for intermediate results, in \\underline{}, that the problem's correct
    responses have too. The prompt_suffix must ask for them. Source: Polaris V2."""
    min_overlap: float = 0.0
    """With process_reward core, problems leave at the end of a stage whose wrong responses had a smaller share of the
    correct ones' intermediate results; 0 keeps all. Source: Polaris V2, at about step 300; its value is not known."""
    rescue: bool = True
    """A group with no correct rollout borrows one that this problem once had. Source: blog, Rollout Rescue."""
    rescue_ratio: Literal["on_policy", "stored"] = "on_policy"
    """on_policy: a rescued response counts as one of today's policy, as in the order of the release (its old log-probs
    are taken after it came in). stored: it is weighted by min(pi / pi of the policy that wrote it, 2)."""
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
    mismatch: Literal["auto", "ignore", "tis", "icepop"] = "auto"
    """Sampler and trainer never give a token quite the same probability. tis: weigh it by min(trainer / sampler, 2);
    icepop: by the ratio itself, 0 outside [0.5, 2]; ignore: 1. auto: tis if vllm generates, else ignore."""
    updates_per_batch: int = 1
    """Optimizer steps per rollout batch, each on its share of the groups. With 1 the ratio is exactly 1."""

    # the optimizer
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """adamw8bit keeps Adam's state in 8 bits (bitsandbytes; on several GPUs with LoRA only); sgd keeps none (arXiv
    2602.07729)."""
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
    quantize_base: bool = False
    """Keep the frozen weights under the LoRA adapters in 4 bits (NF4 by bitsandbytes, arXiv 2305.14314)."""
    trained_weights: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights where all are trained. bfloat16 halves them and their gradients, which are then summed in
    bfloat16; the step is rounded up or down by chance, so that small changes are not lost. Not on several GPUs."""

    # memory: changes nothing in the result
    tokens_per_micro_batch: int = 16384
    """Prompt and response tokens that are forwarded together, as one row without padding. At least one rollout goes
    into each row, so less than the longest prompt with its response saves nothing."""
    logprob_chunk_tokens: int = 256
    """Tokens whose logits exist at the same time: fewer take less memory, far fewer also longer."""
    gradient_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass."""
    offload_activations: bool = False
    """Keep each block's input in CPU memory. Needs gradient_checkpointing."""
    mlp_chunk_tokens: int = 0
    """Recompute each block's MLP this many tokens at a time, 4096 for instance; its forward pass is then computed a
    third time. 0: all at once. Needs gradient_checkpointing."""
    offload_policy: bool = False
    """Keep the policy's weights in CPU memory while vLLM, on a GPU, generates with its own: more room for its cache. On
    several GPUs with LoRA only."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in CPU memory; each weight's comes over for its step. On several GPUs with LoRA
    only."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attn", "flex"] = "auto"
    """Attention in the update. sdpa: one sequence after another, anywhere; varlen: all of a row at once, by PyTorch's
    flash attention (16 bits, Ampere or newer); flash_attn: by that package; flex: FlexAttention, for older GPUs. auto:
    varlen where it runs, else sdpa."""

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
    """Newest checkpoints to keep; the one with the best evaluation is kept too."""
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
        super().__post_init__()
        _check(self)

    @property
    def total_steps(self) -> int:
        """Steps of all stages; fewer come if a stage ends at a plateau."""
        return sum(stage.steps for stage in self.stages)

    @property
    def longest_response(self) -> int:
        """Response limit of the stage with the highest, in tokens."""
        return max(stage.max_response_tokens for stage in self.stages)


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


def require(settings: object, ok: bool, name: str, advice: str, value: object = None) -> None:
    """Raise a ValueError that names the setting, its value (unless another is shown) and what would be right."""
    if not ok:
        raise ValueError(f"{name} is {getattr(settings, name) if value is None else value}: {advice}")


def _check(config: Config) -> None:
    def need(ok: bool, name: str, advice: str, value: object = None) -> None:
        require(config, ok, name, advice, value)

    need(len(config.stages) > 0, "stages", "give at least one stage")
    for place, stage in enumerate(config.stages, start=1):
        need(stage.steps >= 1, f"stages[{place}].steps", "give at least 1", stage.steps)
        number = isinstance(stage.temperature, (int, float)) and 0 < stage.temperature < math.inf
        need(number or stage.temperature == "auto", "temperature",
             "give auto or a value above 0 (a greedy policy samples G equal responses, which teach nothing)",
             stage.temperature)
        need(stage.max_response_tokens >= 1, "max_response_tokens", "give at least 1", stage.max_response_tokens)
    need(config.group_size >= 2, "group_size", "give at least 2, an advantage compares the rollouts of a group")
    for name in ("prompts_per_step", "updates_per_batch", "tokens_per_micro_batch", "logprob_chunk_tokens",
                 "checkpoint_every", "keep_checkpoints", "eval_problems", "eval_rollouts", "warmup_steps",
                 "warmup_batch", "plateau_window", "probe_problems",
                 "diversity_words"):
        need(getattr(config, name) >= 1, name, "give at least 1")
    need(config.updates_per_batch <= config.prompts_per_step, "updates_per_batch",
         f"give at most prompts_per_step ({config.prompts_per_step}), each update needs a group")
    for name in ("lr", "warmup_lr", "max_grad_norm"):
        need(0 < getattr(config, name) < math.inf, name, "give a value above 0")
    for name in ("weight_decay", "lora_rank"):
        need(getattr(config, name) >= 0, name, "give 0 or more")
    for name in ("beta1", "beta2"):
        need(0 <= getattr(config, name) < 1, name, "give a value from 0 to below 1")
    need(config.lora_alpha > 0, "lora_alpha", "give at least 1")
    need(config.mlp_chunk_tokens >= 0, "mlp_chunk_tokens", "give tokens, or 0 for all at once")
    need(config.lora_rank > 0 or not config.quantize_base, "quantize_base", "it is for LoRA; give --lora-rank 32")
    need(config.lora_rank == 0 or config.trained_weights == "float32", "trained_weights",
         "LoRA adapters are small and stay float32; leave it out")
    need(config.dtype != "float16" or config.trained_weights == "float32", "trained_weights",
         "with dtype float16 give float32")
    for name in ("offload_activations", "mlp_chunk_tokens"):
        need(config.gradient_checkpointing or not getattr(config, name), name, "it needs --gradient-checkpointing")
    need(config.process_reward == "none" or r"\underline" in config.prompt_suffix, "prompt_suffix",
         r"with process_reward core, let it ask for intermediate results: ... Put each of them in \underline{}.")
    need(0 <= config.min_overlap <= 1, "min_overlap", "give a share from 0 (keeps all) to 1")
    need(config.process_reward == "core" or config.min_overlap == 0, "min_overlap", "it needs --process-reward core")
    need(config.eval_every >= -1, "eval_every", "give steps, 0 (first and last only) or -1 (never)")
    need(config.eval_temperature is None or 0 < config.eval_temperature < math.inf, "eval_temperature",
         "give a value above 0")
    need(0 <= config.mastered_above <= 1, "mastered_above", "give a pass rate from 0 to 1 (1 keeps all problems)")
    need(0 < config.clip_low < 1, "clip_low", "give a value between 0 and 1")
    need(config.clip_high > 0, "clip_high", "give a value above 0")
    need(config.dual_clip > 1, "dual_clip", "give a value above 1")
    temperature_grid(config.probe_temperatures)


# ---------------------------------------------------------------- the mechanisms


_UNDERLINED = re.compile(r"\\underline\s*+\{((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}")


def intermediate_results(response: str) -> set[str]:
    r"""Collect what a response underlines, without spaces and without a name before an equals sign.

    >>> sorted(intermediate_results(r"so \underline{x = 12} and $\underline{\frac{1}{2}}$"))
    ['12', '\\frac{1}{2}']
    """
    found = set()
    for text in _UNDERLINED.findall(response):
        text = re.sub(r"\s|\$|\\[,;!]|(?<=\d),(?=\d{3}(?!\d))", "", text).replace("dfrac", "frac").rstrip(".,;")
        found.add(re.sub(r"^[A-Za-z](?:_\w|_\{\w+\})?=", "", text))
    return found - {""}


def core_rewards(groups: Sequence[Group], consensus: MutableMapping[str, set[str]]) -> dict[str, float]:
    """Let wrong rollouts earn min(0.5, overlap) for intermediate results that correct ones have: sets their rewards.

    The consensus, updated in place, has for each problem id the set S of intermediate results of all its correct
    rollouts so far; the overlap of a wrong rollout with results P is |P & S| / |S|.
    Returns the mean overlap of the wrong rollouts, for each problem that has any and whose S is not empty.

    Source: Polaris V2 (CORE). That S is a union over correct rollouts is our reading. A response that underlines many
    wrong results besides loses nothing by it.
    """
    overlaps = {}
    for group in groups:
        shared = consensus.setdefault(group.problem.id, set())
        shared.update(*(intermediate_results(rollout.text) for rollout in group.rollouts if rollout.correct))
        wrong = [rollout for rollout in group.rollouts if not rollout.correct]
        if not shared or not wrong:
            continue
        shares = [len(intermediate_results(rollout.text) & shared) / len(shared) for rollout in wrong]
        overlaps[group.problem.id] = statistics.fmean(shares)
        for rollout, share in zip(wrong, shares, strict=True):
            rollout.reward = max(rollout.reward, min(0.5, share))
    return overlaps


def low_overlap(overlaps: Mapping[str, float], below: float) -> set[str]:
    """Name the problems whose wrong rollouts share too little with the correct ones.

    Source: Polaris V2 (low-difference filter).
    """
    return {problem_id for problem_id, overlap in overlaps.items() if overlap < below}


def rescue(groups: Sequence[Group], sink: MutableMapping[str, Rollout], rng: random.Random) -> list[Group]:
    """Put one correct rollout from the sink into each group that has none.

    The sink, updated in place, keeps one correct rollout per problem id, the latest. The group in which nothing was
    correct loses one random failed rollout to it; every other group is returned as it came. How much the borrowed one
    counts, now that the policy is another, is `Config.rescue_ratio`.

    Source: blog, Rollout Rescue and its figure.
    Differs from the release: there it was announced but never published.
    """
    rescued_groups = []
    for group in groups:
        correct = [rollout for rollout in group.rollouts if rollout.correct]
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


def set_advantages(groups: Sequence[Group], kind: Literal["grpo", "dr_grpo"] = "grpo") -> None:
    """Set every rollout's advantage, each group's by its own rewards."""
    for group in groups:
        values = advantages([rollout.reward for rollout in group.rollouts], kind)
        for rollout, value in zip(group.rollouts, values, strict=True):
            rollout.advantage = value


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


def truncated_ratio(logprobs: Tensor, sampler_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Weigh tokens that another policy drew: (N,), min(exp(logprobs - sampler_logprobs), cap), without a gradient.

    Source: truncated importance sampling (fengyao.notion.site/off-policy-rl; cap 2).
    """
    return (logprobs - sampler_logprobs).detach().clamp(max=20).exp().clamp(max=cap)


def icepop_ratio(logprobs: Tensor, sampler_logprobs: Tensor, low: float = 0.5, high: float = 2.0) -> Tensor:
    """Weigh tokens as `truncated_ratio` does, but drop those whose ratio is outside [low, high]: (N,).

    Source: IcePop (Ling team, 2025: importance sampling that masks tokens on which sampler and trainer disagree).
    """
    ratio = (logprobs - sampler_logprobs).detach().clamp(max=20).exp()
    return ratio.where((ratio >= low) & (ratio <= high), 0.0)


def mastered(scores: Mapping[str, Sequence[float]], above: float) -> set[str]:
    """Name the problems whose mean score in a stage is above the limit. Problems without a score are not named.

    Source: blog (accuracy above 0.9 leaves between stages); release (plain mean of the stage's scores).
    """
    return {problem_id for problem_id, values in scores.items() if values and statistics.fmean(values) > above}


def plateaued(rewards: Sequence[float], window: int) -> bool:
    """Tell whether a stage's mean reward has stopped rising: its last `window` steps are no better than those before.

    >>> plateaued([0.1, 0.2, 0.3, 0.4], window=2), plateaued([0.1, 0.2, 0.2, 0.1], window=2)
    (False, True)
    """
    if len(rewards) < 2 * window:
        return False
    return statistics.fmean(rewards[-window:]) <= statistics.fmean(rewards[-2 * window : -window])


# ---------------------------------------------------------- temperature, length


def temperature_grid(text: str) -> list[float]:
    """Read START:END:STEP, end included, or a comma-separated list.

    >>> temperature_grid("0.2:0.8:0.2")
    [0.2, 0.4, 0.6, 0.8]

    Raises: ValueError.
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
        raise ValueError(f"temperatures is {text}: give START:END:STEP or a list, rising and above 0: 0.2:1.8:0.2")
    return grid


@dataclass(frozen=True)
class Zones:
    """The borders between the three zones of accuracy over temperature. Beyond the second, it collapses."""

    robust_until: float
    """Robust Generation: the last temperature at which accuracy is still as good as the best."""
    exploration_until: float
    """Controlled Exploration: the last one at which accuracy is above 80 % of the best."""


def temperature_zones(accuracy: Mapping[float, float], noise: Mapping[float, float] | None = None) -> Zones:
    """Find the zones of a curve, temperature -> accuracy. As good as the best: within 1 %, or within the noise.

    noise: temperature -> standard error of the difference to the best accuracy, where it is known.

    Raises: ValueError if nothing was correct at any temperature.

    Source: blog, the zones of its section on temperature. That 1 % and 80 % give its borders is our reading.
    """
    best = max(accuracy.values())
    if best <= 0:
        raise ValueError("accuracy is 0 at every temperature: probe easier problems or more of them, or give a number")
    exploration = max(t for t, value in accuracy.items() if value >= 0.8 * best)
    tolerance = {t: max(0.01 * best, (noise or {}).get(t, 0.0)) for t in accuracy}
    robust = max(t for t, value in accuracy.items() if value >= best - tolerance[t] and t <= exploration)
    return Zones(robust, exploration)


def pick_temperature(
    accuracy: Mapping[float, float], diversity: Mapping[float, float], *, match: float | None = None,
    noise: Mapping[float, float] | None = None,
) -> float:
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


def yarn_config(factor: float, original_max_positions: int, *, attention_scale: float = 1.0) -> dict[str, Any]:
    """Make the rope settings that stretch a model's positions by `factor`, at inference, for both engines.

    >>> yarn_config(1.5, 65536)["attention_factor"]
    1.0

    Source: YaRN (arXiv 2309.00071); blog (factor 1.5, at inference only, without attention scaling).
    Differs from the release: its attn_factor of 1.0 was multiplied by 0.1 ln(1.5) + 1 = 1.0405 in the vLLM of its time
    and is ignored by today's and by transformers, so YaRN's scaling of attention stayed on.
    """
    return {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_max_positions,
        "attention_factor": attention_scale,
    }  # fmt: skip


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


def mean_distinct_n(responses: Iterable[Sequence[str]], n: int = 4, words: int | None = None) -> float:
    """Average `distinct_n` over problems, each with its responses.

    With `words`, at a fixed length: of the first `words` words of each response, over the problems whose responses all
    have that many; nan where no problem has.
    """
    if words is not None:
        split = [[text.split() for text in texts] for texts in responses]
        responses = [[" ".join(text[:words]) for text in texts] for texts in split if min(map(len, texts)) >= words]
    values = [distinct_n(texts, n) for texts in responses]
    return statistics.fmean(values) if values else math.nan


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


# ------------------------------------------------------------------- the presets

HUB_DATA = "POLARIS-Project/Polaris-Dataset-53K"
"""The published problems without those that R1-Distill-Qwen-7B always solved. Filter them again with your own model."""


def _published(model: str, stages: Sequence[tuple[int, float, int]]) -> Config:
    """Make a preset of the release: stages as steps, temperature, tokens; each begins from merged weights."""
    first, *later = (Stage(*stage) for stage in stages)
    later = [replace(stage, reset_optimizer=True) for stage in later]
    return Config(model=model, data=HUB_DATA, stages=(first, *later))


PRESETS = {
    "recipe": Config(),
    "polaris-4b": _published("Qwen/Qwen3-4B", [(450, 1.4, 39936), (150, 1.45, 48128), (100, 1.5, 52224)]),
    "polaris-7b": _published(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", [(520, 0.7, 15360), (370, 1.0, 23552), (590, 1.1, 31744)]
    ),
    # 500 steps in all; where the second stage began is not published
    "polaris-1.7b": _published("Qwen/Qwen3-1.7B", [(350, 1.5, 39936), (150, 1.55, 48128)]),
}
_WORKSTATION: dict[str, Any] = {
    "prompts_per_step": 32, "max_response_tokens": 32768, "lora_rank": 32, "lr": 1e-5, "optimizer": "adamw8bit",
    "gradient_checkpointing": True, "tokens_per_micro_batch": 33792, "rollouts_per_batch": 16, "offload_policy": True,
}  # fmt: skip
"""Source: the release's author on small machines (issues #4, #18: batch 32, up to 32768 tokens); LoRA is ours."""
PRESETS |= {
    "rtx-24gb": replace(PRESETS["polaris-1.7b"], **_WORKSTATION),
    "rtx-2x24gb": replace(PRESETS["polaris-4b"], **_WORKSTATION),
    "toy": Config(
        max_prompt_tokens=64, stages=(Stage(40, 1.0, 80), Stage(40, 1.1, 128)),
        prompts_per_step=32, diversity_words=12, lr=2e-4, eval_every=10, checkpoint_every=20,
        warmup_steps=600, warmup_batch=32, warmup_lr=3e-3,
    ),
}  # fmt: skip
PRESETS = {name: replace(preset, preset=name) for name, preset in PRESETS.items()}
