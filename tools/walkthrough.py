"""Follow one real training step of the toy world through the code, number by number: makes docs/walkthrough.md.

    python tools/walkthrough.py > docs/walkthrough.md      # some seconds

It holds, in `plain_loss`, the update in its simplest form: whole logits and torch's own gradient.
"""
from __future__ import annotations

import argparse
import inspect
import random
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from polaris_mini import PRESETS, Config, Group, Rollout, policy_loss, rescue, set_advantages, substitute
from reward import RewardPool, check_answer
from rollout import Engine, HFEngine, Sampling, load_tokenizer, sample_groups, set_rewards


def plain_loss(model: Any, rollout: Rollout, weight: float, temperature: float, config: Config) -> torch.Tensor:
    """Return the loss of one rollout from the logits of all its tokens."""
    prompt, response = rollout.prompt_tokens, torch.tensor(rollout.response_tokens)
    logits = model(torch.tensor([[*prompt, *rollout.response_tokens]])).logits[0]  # (tokens, V)
    log_p = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)  # (T, V)
    logprobs = log_p.gather(1, response[:, None])[:, 0]  # (T,)
    losses, _ = policy_loss(
        logprobs, logprobs.detach(), torch.full_like(logprobs, rollout.advantage),
        clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
    )  # fmt: skip
    return weight * losses.sum()


def walk(config: Config, step: int = 21) -> None:
    """Print the step in Markdown. `step`: which batch of problems is taken; the policy is the untrained one."""
    tokenizer, policy = load_tokenizer(config.model, config), train.load_policy(config)
    training, _ = data.training_and_held_out(config, check_answer)
    sampler = data.ProblemSampler(data.encode_prompts(training, tokenizer, config), config.seed)
    for _ in range(step):
        sampler.advance(config.prompts_per_step)
    rng, stage = random.Random(f"{config.seed}:{step}"), config.schedule[0]
    temperature = float(stage.temperature)

    say("# One step, number by number")
    say(f"Made by `python tools/walkthrough.py`: the toy model before training, batch {step + 1} of seed "
        f"{config.seed}, {config.prompts_per_step} problems with {config.group_size} rollouts each. Function names are "
        "those of the code; everything below was computed by them.")

    say("## 0. Stage: `enter_stage`")
    say(f"The first of {len(config.stages)} stages, `{stage}`: {stage.steps} steps at temperature {temperature:g}, "
        f"responses of at most {stage.max_response_tokens} tokens.")

    say("## 1. Rollout: `sample_groups`")
    sampling = Sampling(temperature, stage.max_response_tokens, seed=rng.getrandbits(63))
    engine = HFEngine(policy, tokenizer, config)
    sink: dict[str, Rollout] = {}
    with RewardPool(config.reward_workers, config.reward_timeout, require_think=data.thinks(tokenizer)) as pool:
        problems = sampler.peek(config.prompts_per_step)
        groups = set_rewards(*sample_groups(engine, pool, problems, config.group_size, sampling))
        seen = fill_sink(sink, groups, engine, pool, sampling)
    group = min(groups, key=lambda g: (not g.informative, g.pass_rate > 0.5, abs(len(g.problem.text) - 25)))
    first = group.rollouts[0]
    say(f"One problem asks for {group.problem.text}; its answer is {group.problem.answers[0]}. Its prompt, which "
        f"`encode_prompts` made of the chat template, has {len(group.problem.prompt_tokens)} tokens:")
    code(tokenizer.decode(group.problem.prompt_tokens))
    say("The engine draws a token from the policy's probabilities at this temperature, keeps its log-prob, and so on "
        f"until `<|end|>` or the limit. The first of its {config.group_size} responses, with each token's log-prob:")
    drawn = [f"{tokenizer.decode([token])!r} {logprob:.2f}"
             for token, logprob in zip(first.response_tokens, first.sampler_logprobs, strict=True)]
    code("\n".join("   ".join(drawn[i : i + 8]) for i in range(0, len(drawn), 8)))

    say("## 2. Reward: `set_rewards`")
    say("1 if the answer in the box is right. All of the group:")
    table(["", "response", "tokens", "reward", "reason"], [
        [i, f"`{rollout.text.replace(chr(10), ' ; ')}`", len(rollout.response_tokens), rollout.reward, rollout.reason]
        for i, rollout in enumerate(group.rollouts, start=1)])
    rates = sorted({g.pass_rate for g in groups})
    say(f"Its pass rate is {group.pass_rate:g}. Groups of the batch by pass rate: "
        + ", ".join(f"{sum(g.pass_rate == rate for g in groups)} at {rate:g}" for rate in rates) + ".")

    say("## 3. Rescue: `rescue`")
    batch = rescue(groups, sink, rng)
    borrowed = [rollout for g in batch for rollout in g.rollouts if rollout.rescued]
    say(f"In {sum(g.pass_rate == 0 for g in groups)} groups nothing is right. Say these problems were met before "
        f"(for this page, {seen} further rollouts of each were drawn), and a correct response of {len(borrowed)} of "
        "them lies in the sink. Each of these groups gets it in place of a wrong one.")
    if borrowed:
        (problem,) = (problem for problem in problems if problem.id == borrowed[0].problem_id)
        say(f"Problem {problem.text}, with the answer {problem.answers[0]}, gets back:")
        code(borrowed[0].text)

    say("## 4. Substitute: `substitute`")
    informative = sum(g.informative for g in batch)
    batch = substitute(batch, rng)
    (own,) = (g for g in batch if g.problem.id == group.problem.id)
    say(f"{informative} of {len(groups)} groups have rewards that differ, which is more than a third: they take the "
        f"places of the {len(groups) - len(batch)} others. {sum(g.places > 1 for g in batch)} of them, by chance, "
        f"have {max(g.places for g in batch)} places, the others 1, together {sum(g.places for g in batch)}. Our group "
        f"has {own.places}.")

    say("## 5. Advantage: `set_advantages`")
    set_advantages(batch, config.advantage)
    rewards = [rollout.reward for rollout in own.rollouts]
    say(f"Rewards {rewards} have mean {sum(rewards) / len(rewards):g} and standard deviation "
        f"{torch.tensor(rewards).std():.4f}, so the advantages are "
        f"{[round(rollout.advantage, 4) for rollout in own.rollouts]}.")

    say("## 6. Update: `update_policy`")
    update(policy, batch, own, temperature, config)

    say("## 7. Log, save, evaluate: `log_step`, `save_checkpoint`, `evaluate_policy`")
    say("The rollouts with their advantages go to rollouts.jsonl, each group's pass rate to scores.jsonl, the step's "
        f"numbers to metrics.jsonl. After every step (`--checkpoint-every {config.checkpoint_every}`) policy, "
        f"optimizer and state go to a checkpoint, and every {config.eval_every} steps the held-out problems are tried.")


def fill_sink(
    sink: dict[str, Rollout], groups: Sequence[Group], engine: Engine, pool: RewardPool, sampling: Sampling
) -> int:
    """Draw more rollouts of the problems without a correct one, as an earlier epoch would have; return how many."""
    count = 16
    lost = [group.problem for group in groups if group.pass_rate == 0]
    more = set_rewards(*sample_groups(engine, pool, lost, count, replace(sampling, seed=1)))
    rescue(more, sink, random.Random(0))
    return count


def update(policy: Any, batch: Sequence[Group], own: Group, temperature: float, config: Config) -> None:
    """Make the step's update, in its simplest form and in the trainer's, and print both."""
    first, tokenizer = own.rollouts[0], load_tokenizer(config.model, config)
    tokens = sum(len(r.response_tokens) * g.places for g in batch for r in g.rollouts)
    say(f"The batch has {tokens:,} response tokens, those of a group counted once for each of its places. By this "
        "number the sum of the loss is divided, once. With one update per batch the log-probs are the old ones too, so "
        f"the ratio is 1, and the loss of a token is minus its advantage, times {own.places} / {tokens}. In its "
        "simplest form, the loss of a rollout is this, and torch finds the gradient:")
    print(f"```python\n{inspect.getsource(plain_loss)}```\n")
    policy.set_attn_implementation("sdpa")
    plain = sum((plain_loss(policy, r, g.places / tokens, temperature, config) for g in batch for r in g.rollouts),
                torch.zeros(()))
    plain.backward()
    plain_gradient = gradient_of(policy)
    policy.set_attn_implementation("packed")
    policy.zero_grad(set_to_none=True)

    rows = train.pack_share(batch, config) or []
    sequences, packed = (sum(count) for count in zip(*(
        (len(row.sequence_lengths), row.input_ids.numel()) for row in rows), strict=True))
    loss = 0.0
    for row in rows:
        part, *_ = train.forward_row(policy, row, temperature, config)
        part.backward()
        loss += part.item()
    gradient = gradient_of(policy)
    policy.zero_grad(set_to_none=True)
    vocabulary = policy.config.vocab_size
    row_limit = config.row_limit("cuda")
    gib = row_limit * 151_936 * 4 / 2**30
    say(f"Here its logits have {vocabulary} columns. With the 151,936 of Qwen3, {row_limit:,} "
        f"tokens would have {gib:.1f} GiB of them, several times over. So the trainer does the same in another way. "
        f"`pack` lays the {sequences} rollouts with an advantage into rows without padding, here {len(rows)} of "
        f"{packed:,} tokens together. `packed_attention` keeps them apart. `ChunkedLoss` makes the logits of "
        f"{config.logprob_chunk_tokens} tokens at a time and takes their gradient before it goes on. The results are "
        "the same but for rounding:")
    difference = {name: (gradient[name] - expected).abs().max().item() for name, expected in plain_gradient.items()}
    largest = max(value.abs().max().item() for value in plain_gradient.values())
    table(["", "simplest form", "`forward_row`, `ChunkedLoss`", "difference"], [
        ["loss of the batch", f"{plain.item():.6e}", f"{loss:.6e}", f"{abs(loss - plain.item()):.0e}"],
        ["norm of the gradient", f"{norm(plain_gradient):.6f}", f"{norm(gradient):.6f}",
         f"{abs(norm(gradient) - norm(plain_gradient)):.0e}"],
        ["a weight's gradient, at most", f"{largest:.6f}", "", f"{max(difference.values()):.0e}"]])

    say("The first tokens of our group's first response. The sampler's log-probs are those that the engine gave:")
    (alone,) = train.pack([(first, own.places / tokens)], row_limit)
    with torch.no_grad():
        _, logprobs, entropy, _ = train.forward_row(policy, alone, temperature, config)
    losses, _ = train.token_losses(alone, slice(None), logprobs, config)
    table(["token", "sampler log-prob", "trainer log-prob", "entropy", "loss"], [
        [f"`{tokenizer.decode([first.response_tokens[i]])}`", f"{first.sampler_logprobs[i]:.5f}", f"{logprobs[i]:.5f}",
         f"{entropy[i]:.3f}", f"{losses[i]:.2e}"] for i in range(min(6, len(losses)))])
    run: Any = SimpleNamespace(
        config=config, policy=policy, optimizer=train.make_optimizer(policy, config),
        scaler=torch.amp.GradScaler("cpu", enabled=False), state=SimpleNamespace(temperature=temperature),
    )  # fmt: skip
    metrics = train.update_policy(run, batch)
    with torch.no_grad():
        after = train.forward_row(policy, alone, temperature, config)[1]
    direction = "more" if after.sum() > logprobs.sum() else "less"
    say("`update_policy` adds up the rows' gradients. Their norm, "
        f"{metrics['optim/grad_norm']:.3f}, is scaled down to {config.max_grad_norm:g} where it is larger. Then AdamW "
        f"takes one step at {config.lr:g}. The log-prob of the whole first response went from {logprobs.sum():.2f} to "
        f"{after.sum():.2f}: with advantage {first.advantage:.2f}, it has become {direction} likely.")


def gradient_of(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def norm(gradient: Mapping[str, torch.Tensor]) -> float:
    return torch.stack([value.norm() for value in gradient.values()]).norm().item()


def say(text: str) -> None:
    print(text if text.startswith(("#", "|")) else textwrap.fill(text, 120, break_long_words=False,
                                                                break_on_hyphens=False), end="\n\n")


def code(text: str) -> None:
    print(f"```\n{text}\n```\n")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |")
    print()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    walk(PRESETS["toy"])
