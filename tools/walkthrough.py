"""Follow one real training step of the toy world through the code, number by number: makes docs/walkthrough.md.

    python tools/walkthrough.py > docs/walkthrough.md      # about a minute, more where the toy model is made first
"""
from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from polaris_mini import PRESETS, Config, Group, rescue, set_advantages, substitute
from rollout import HFEngine, Sampling, encode_prompts, load_model, reward_pool, sample_groups, set_rewards


def walk(config: Config, step: int = 21) -> None:
    """Print the step in Markdown. `step`: which batch of problems is taken; the policy is the untrained one."""
    display = train.Display()
    with contextlib.redirect_stdout(io.StringIO()):
        training, evaluation = train.load_data(config)
        folder = train.toy_model_folder(config, evaluation, display)
    tokenizer = data.toy_tokenizer()
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    policy = train.prepare_policy(model, config)
    problems = encode_prompts(config, training, tokenizer)
    rng = random.Random(f"{config.seed}:{step}")
    stage = config.stages[0]
    temperature = float(stage.temperature)
    sampler = data.ProblemSampler(problems, config.seed)
    for _ in range(step):
        sampler.advance(config.prompts_per_step)
    batch_problems = sampler.peek(config.prompts_per_step)

    say("# One step, number by number")
    say(f"Made by `python tools/walkthrough.py`: the toy model before training, batch {step + 1} of seed "
        f"{config.seed}, {config.prompts_per_step} problems with {config.group_size} rollouts each. Function names are "
        "those of the code; everything below was computed by them.")

    say("## 0. Stage: `enter_stage`")
    say(f"The first of {len(config.stages)} stages: {stage.steps} steps at temperature {temperature:g}, responses of "
        f"at most {stage.max_response_tokens} tokens.")

    say("## 1. Rollout: `sample_groups`")
    sampling = Sampling(temperature, stage.max_response_tokens, seed=rng.getrandbits(63))
    engine = HFEngine(policy, tokenizer, config)
    with reward_pool(config, tokenizer) as pool:
        groups, gradings = sample_groups(engine, tokenizer, pool, batch_problems, config.group_size, sampling)
        set_rewards(gradings)
    sink: dict = {}
    seen = seen_before(config, groups, engine, tokenizer, sampling, sink)
    group = min(groups, key=lambda g: (not g.informative, g.pass_rate > 0.5, abs(len(g.problem.text) - 25)))
    say(f"One problem asks for {group.problem.text}; its ground truth is {group.problem.answers[0]}. Its "
        f"prompt, which `encode_prompts` made of the chat template, has {len(group.problem.prompt_tokens)} tokens:")
    code(tokenizer.decode(group.problem.prompt_tokens))
    say("The engine draws a token from the policy's probabilities at this temperature, keeps its log-prob, and so on "
        f"until `<|end|>` or the limit. The first of its {config.group_size} responses, with each token's "
        "log-prob:")
    first = group.rollouts[0]
    drawn = [f"{tokenizer.decode([token])!r} {logprob:.2f}" for token, logprob in zip(
        first.response_tokens, first.sampler_logprobs, strict=True)]
    code("\n".join("   ".join(drawn[i : i + 9]) for i in range(0, len(drawn), 9)))

    say("## 2. Reward: `set_rewards`")
    say("1 if the answer in the box is right. All of the group:")
    table(["", "response", "tokens", "reward", "reason"], [
        [i, f"`{rollout.text.replace(chr(10), ' ; ')}`", len(rollout.response_tokens), rollout.reward, rollout.reason]
        for i, rollout in enumerate(group.rollouts, start=1)])
    say(f"Its pass rate is {group.pass_rate:g}. Groups of the batch by pass rate: " + ", ".join(
        f"{sum(g.pass_rate == rate for g in groups)} at {rate:g}"
        for rate in sorted({g.pass_rate for g in groups})) + ".")

    say("## 3. Rescue: `rescue`")
    before = sum(not any(r.correct for r in g.rollouts) for g in groups)
    rescued = rescue(groups, sink, rng)
    swapped = [g for g in rescued if any(r.rescued for r in g.rollouts)]
    say(f"In {before} groups nothing is right. Say these problems were met before (here: {seen} further rollouts of "
        f"each were drawn for this page), and a correct response of {len(swapped)} of them lies in the sink. Each of "
        "these groups gets it in place of a wrong one.")
    if swapped:
        borrowed = next(r for r in swapped[0].rollouts if r.rescued)
        say(f"Problem {swapped[0].problem.text} gets back:")
        code(borrowed.text)

    say("## 4. Substitute: `substitute`")
    batch = substitute(rescued, rng)
    own = next(g for g in batch if g.problem.id == group.problem.id)
    say(f"{sum(g.informative for g in rescued)} of {len(rescued)} groups have rewards that differ, which is more than "
        f"a third: they fill the places of the {len(rescued) - len(batch)} others too, as weights "
        f"{sorted((g.weight for g in batch), reverse=True)}, together {sum(g.weight for g in batch)}. The weight of "
        f"our group is {own.weight}.")

    say("## 5. Advantage: `set_advantages`")
    set_advantages(batch, config.advantage)
    rewards = [rollout.reward for rollout in own.rollouts]
    say(f"Rewards {rewards} have mean {sum(rewards) / len(rewards):g} and standard deviation "
        f"{torch.tensor(rewards).std():.4f}, so the advantages are "
        f"{[round(rollout.advantage, 4) for rollout in own.rollouts]}.")

    say("## 6. Update: `update_policy`")
    tokens = sum(len(r.response_tokens) * g.weight for g in batch for r in g.rollouts)
    (rows,) = train.pack_shares(batch, config)
    say(f"The batch has {tokens:,} weighted response tokens, by which the sum of the loss is divided, once. `pack` "
        f"lays the {sum(len(row.sequence_lengths) for row in rows)} rollouts with an advantage into rows, here "
        f"{len(rows)} of {sum(row.input_ids.numel() for row in rows):,} tokens together, without padding. For each "
        "response token `token_logprobs` gives the log-prob; with one update per batch it is the old one too, so the "
        f"ratio is 1, the loss of a token is minus its advantage, times {own.weight} / {tokens}:")
    (alone,) = train.pack([(first, own.weight / tokens)], config.tokens_per_micro_batch)
    with torch.no_grad():
        logprobs, entropy = train.token_logprobs(policy, alone, temperature, config)
    losses, _ = train.token_losses(alone, logprobs, train.mismatch_correction(config), config)
    shown = range(min(6, len(losses)))
    table(["token", "sampler log-prob", "trainer log-prob", "entropy", "loss"], [
        [f"`{tokenizer.decode([first.response_tokens[i]])}`", f"{first.sampler_logprobs[i]:.5f}", f"{logprobs[i]:.5f}",
         f"{entropy[i]:.3f}", f"{losses[i]:.2e}"] for i in shown])
    optimizer, scaler = train.make_optimizer(policy, config), train.loss_scaler(config, torch.device("cpu"))
    update = train.update_policy(policy, optimizer, scaler, batch, temperature, config)
    with torch.no_grad():
        after, _ = train.token_logprobs(policy, alone, temperature, config)
    direction = "more" if after.sum() > logprobs.sum() else "less"
    say(f"The gradient's norm is {update.grad_norm:.3f} (clipped to {config.max_grad_norm:g}), the loss "
        f"{update.loss:.2e}, the entropy {update.entropy:.3f} nats. After one step of AdamW at {config.lr:g} the "
        f"log-prob of the whole first response went from {logprobs.sum():.2f} to {after.sum():.2f}: with advantage "
        f"{first.advantage:.2f}, it has become {direction} likely.")

    say("## 7. Log, evaluate, save: `log_rollouts`, `step_metrics`, `save_checkpoint`")
    say("The rollouts with their advantages go to rollouts.jsonl, each group's pass rate to scores.jsonl, the step's "
        "numbers to metrics.jsonl, and every "
        f"{config.checkpoint_every} steps policy, optimizer and state to a checkpoint.")


def seen_before(config: Config, groups, engine, tokenizer, sampling, sink) -> int:
    """Draw more rollouts of the problems that nothing was right for, as an earlier epoch would have."""
    count = 64
    lost = [g.problem for g in groups if g.pass_rate == 0]
    with reward_pool(config, tokenizer) as pool:
        more, gradings = sample_groups(engine, tokenizer, pool, lost, count, replace(sampling, seed=1))
        set_rewards(gradings)
    for group in more:
        rescue([Group(group.problem, [r]) for r in group.rollouts if r.correct][:1], sink, random.Random(0))
    return count


def say(text: str) -> None:
    print(text if text.startswith(("#", "|")) else textwrap.fill(text, 120, break_long_words=False,
                                                                break_on_hyphens=False), end="\n\n")


def code(text: str) -> None:
    print(f"```\n{text}\n```\n")


def table(heads: list[str], rows: list[list[object]]) -> None:
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |")
    print()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Print one training step of the toy world, in Markdown.")
    parser.add_argument("--warmup-steps", type=int, default=PRESETS["toy"].warmup_steps)
    walk(replace(PRESETS["toy"], rollouts_per_batch=256, warmup_steps=parser.parse_args().warmup_steps))
