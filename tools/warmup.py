"""Teach a model a few worked examples before GRPO: supervised steps, and the result is a model folder.

    python tools/warmup.py --model Qwen/Qwen3-1.7B --data examples.jsonl --out runs/warm
    python train.py --model runs/warm --data problems.jsonl

A base model that never answers in a box never earns a reward, so GRPO has nothing to start from. A few worked examples
teach it the form. Each line of the file is an object with `problem` and `response`, and `system` where the problems
have one. The response is what follows the generation prompt: for a model that thinks, "thoughts</think>answer". The
prompt is the one of train.py.

Left out: several GPUs, epochs, an evaluation. Whoever needs these wants supervised fine-tuning, not a warm start.
"""
from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import UserError, encode_prompts, read_records, written_whole
from polaris_mini import Common, Config, Problem, Rollout, require
from rollout import causal_lm, load_policy, load_tokenizer, resolve_device, resolve_dtype
from train import apply_gradient, check_packing, forward_row, make_optimizer, pack


@dataclass(frozen=True)
class Options:
    """What is taught to which model."""

    model: str
    """A folder or hub name of a Hugging Face causal language model."""
    data: str
    """Worked examples: a jsonl, json or parquet file, or a hub data set, with the columns problem and response."""
    out: Path
    """Folder to make: a model that train.py takes as --model."""
    steps: int = 60
    """Supervised steps."""
    batch: int = 16
    """Examples per step."""
    lr: float = 2e-5
    """Highest learning rate: it rises over the first twentieth of the steps, then falls to 0 in a line."""
    seed: int = 0
    """Seed of the order of the examples, and of the LoRA adapters."""
    prompt_suffix: str = Config.prompt_suffix
    """Added after the problem's text unless it is there already. Give the same to train.py."""
    lora_rank: int = 0
    """Rank of LoRA adapters, which are merged into the model at the end; 0 trains every weight."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """As in train.py."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: bfloat16 on a GPU (float16 before Ampere), float32 on a CPU."""
    tokens_per_micro_batch: int | Literal["auto"] = "auto"
    """Prompt and response tokens that are forwarded together: memory and speed. auto: 1024 on a CPU, else 16384."""
    gradient_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along. Only for repositories that you have read."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            require(self, getattr(self, name) >= 1, name, "give at least 1")
        self.config()

    def config(self, prompt: int = 1024, response: int = 4096) -> Config:
        """Return train.py's configuration with these settings; prompt, response: tokens of the longest."""
        shared = ("model", "seed", "device", "dtype", "trust_remote_code", "prompt_suffix", "lora_rank", "optimizer",
                  "lr", "tokens_per_micro_batch", "gradient_checkpointing")  # fmt: skip
        return Config(**{name: getattr(self, name) for name in shared}, beta2=0.99, mismatch="ignore",
                      max_prompt_tokens=prompt, max_response_tokens=response)  # fmt: skip


# --------------------------------------------------------------------- worked examples


def load_worked_examples(source: str) -> list[tuple[Problem, str]]:
    """Load problems, each with the response that is to be taught.

    Raises: UserError with file and line.
    """
    examples = []
    for place, record in read_records(source):
        try:
            record = json.loads(record) if isinstance(record, bytes) else record
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}): write one object per line") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: is {record!r:.80}: give an object with problem and response")
        for name in ("problem", "response"):
            value = record.get(name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{place}: {name} is {value!r:.80}: give a text")
        problem = Problem(place, record["problem"].strip(), (), system=record.get("system") or None)
        examples.append((problem, record["response"]))
    if not examples:
        raise UserError(f"{source}: is empty: give at least one worked example")
    return examples


def encode_examples(
    examples: Sequence[tuple[Problem, str]], tokenizer: PreTrainedTokenizerBase, prompt_suffix: str
) -> list[Rollout]:
    """Return the examples as if the model had generated them, each with its end token."""
    problems = [problem for problem, _ in examples]
    settings = Common(prompt_suffix=prompt_suffix, max_prompt_tokens=sys.maxsize)
    encoded = []
    for problem, (_, response) in zip(encode_prompts(problems, tokenizer, settings), examples, strict=True):
        if tokenizer.chat_template is None:
            response = " " + response  # as after "Solution:" in the plain template
        elif str(tokenizer.decode(problem.prompt_tokens)).rstrip().endswith("<think>"):
            # some templates open the thought, others leave it to the model
            response = response.removeprefix("<think>").lstrip() if response.startswith("<think>") else response
        # Prompt and response are tokenized apart, as in generation, where the prompt's last token cannot change.
        tokens = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        # The advantage of 1 is for `add_gradient`.
        encoded.append(Rollout(problem.id, problem.prompt_tokens, tokens, [0.0] * len(tokens), response, "stop",
                               advantage=1.0))  # fmt: skip
    return encoded


# --------------------------------------------------------------------- supervised steps


def teach(
    policy: torch.nn.Module, examples: Sequence[Rollout], config: Config, *, steps: int, batch: int
) -> list[float]:
    """Take supervised steps on `batch` examples each, and return each step's loss, in nats per response token."""
    device = causal_lm(policy).device
    optimizer = make_optimizer(policy, config)
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_dtype(config, device) == torch.float16)
    order, losses = shuffled_for_ever(len(examples), config.seed), []
    policy.train()
    for step in tqdm(range(steps), unit="step", leave=False, disable=None):
        rise, fall = (step + 1) / (0.05 * steps), 1 - step / steps
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, rise, fall)
        chosen = [examples[next(order)] for _ in range(batch)]
        losses.append(add_gradient(policy, chosen, config, scaler.scale(torch.ones((), device=device))))
        norm = apply_gradient(policy, optimizer, scaler, config.max_grad_norm)
        if not (math.isfinite(norm) or scaler.is_enabled()):  # float16 overflows until its scale is found
            raise UserError(f"lr is {config.lr}: the gradient of step {step + 1} is not finite; lower it")
    return losses


def add_gradient(
    policy: torch.nn.Module, examples: Sequence[Rollout], config: Config, scale: torch.Tensor | None = None
) -> float:
    """Add the gradient of the examples' cross-entropy, the mean over their response tokens, and return its value.

    The trainer's own loss does it. It is -advantage * ratio for each token, where ratio = p / p_old, and without old
    log-probs p_old is the current p. So the ratio is 1, far from the clipping, and its gradient is that of log p. With
    an advantage of 1 the loss is constant, but its gradient is that of -log p: the cross-entropy's.
    """
    device, loss = causal_lm(policy).device, 0.0
    tokens = sum(len(example.response_tokens) for example in examples)
    for row in pack([(example, 1 / tokens) for example in examples], config.row_limit(device.type)):
        surrogate, logprobs, *_ = forward_row(policy, row.to(device), 1.0, config, scale)
        surrogate.backward()
        loss -= logprobs.sum().item() / tokens
    return loss


def shuffled_for_ever(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)


# --------------------------------------------------------------------- the command line


def warm_up(options: Options) -> list[float]:
    """Load, teach and save, and return each step's loss."""
    resolve_device(options.device)
    if options.out.exists():
        raise UserError(f"out is {options.out}: it exists already; give another, or delete it first")
    worked = load_worked_examples(options.data)
    tokenizer = load_tokenizer(options.model, options.config())
    examples = encode_examples(worked, tokenizer, options.prompt_suffix)
    config = options.config(max(len(example.prompt_tokens) for example in examples),
                            max(len(example.response_tokens) for example in examples))  # fmt: skip
    policy: Any = load_policy(config)
    check_packing(policy, config)
    losses = teach(policy, examples, config, steps=options.steps, batch=options.batch)
    if config.lora_rank > 0:
        policy = policy.merge_and_unload()
    save(policy, tokenizer, options.out)
    few = min(10, options.steps)
    print(f"{options.out}: {options.steps} steps on {len(examples)} worked examples; loss per token "
          f"{statistics.fmean(losses[:few]):.3f} -> {statistics.fmean(losses[-few:]):.3f} nats (the mean of the first "
          f"and of the last {few} steps)")
    return losses


def save(policy: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face model folder."""
    with written_whole(folder) as unfinished:
        policy.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    warm_up(tyro.cli(Options, args=arguments, prog="warmup.py", description=__doc__))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        print(f"warmup.py: error: {error}", file=sys.stderr)
        sys.exit(2)
