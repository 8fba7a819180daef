"""Rehearse a run before its days: its longest row, its optimizer's step and its rollout, beside the memory plan.

    python tools/rehearse.py --preset rtx-24gb --data DATA    # with any options of python train.py
    python tools/rehearse.py --resume runs/NAME               # with those of a run

The longest row there can be goes forward and backward with a loss of 0, and the optimizer steps at a learning rate of
0. The engine takes the weights, generates the last tokens of its longest sequences, and sleeps. Then the update comes
once more. No weight changes, no problem is read, and nothing is written but what libraries cache. The exit code is 1 if
memory runs out. On a CPU everything runs, and no memory is measured. Of several GPUs each holds what one does.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import UserError
from doctor import GIB, free_memory, make_prompts, run_of
from plan import Change, changed, cheapest_changes, options_text, plan_memory
from polaris_mini import Config, Problem, Rollout, read_config
from rollout import (
    Engine, HFEngine, Sampling, VLLMEngine, base_model, causal_lm, check_model, load_policy, load_tokenizer,
    resolve_device, uses_vllm,
)

UPDATE = ("forward", "log-probs", "backward", "optimizer step")


class Meter:
    """Measure one phase after another, and print each as it ends."""

    def __init__(self, device: torch.device, planned: Mapping[str, float]) -> None:
        self.on_gpu, self.planned = device.type == "cuda", planned
        self.phase, self.start, self.retries = "", 0.0, 0
        self.left: dict[str, float] = {}  # phase -> bytes of the card that nobody had taken
        self.unmapped: dict[str, int] = {}  # phase -> bytes that PyTorch counts although vLLM has given them back

    def begin(self, phase: str) -> None:
        self.end()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.retries = torch.cuda.memory_stats()["num_alloc_retries"]
        self.phase, self.start = phase, time.perf_counter()

    def end(self) -> None:
        if self.phase:
            measured = self.measure() if self.on_gpu else f"{'not measured':>28}"
            planned = f"{self.planned[self.phase] / GIB:.2f}" if self.phase in self.planned else ""
            print(f"{self.phase:14} {planned:>8} {measured} {time.perf_counter() - self.start:8.1f}", flush=True)
        self.phase = ""

    def measure(self) -> str:
        """Return the peaks of tensors and of what PyTorch held, and what was taken of the whole card."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()  # at the end: PyTorch keeps what is freed before,
        if torch.cuda.memory_stats()["num_alloc_retries"] > self.retries:  # unless the card was full
            free = 0
        self.left[self.phase] = min(free, self.left.get(self.phase, free))
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        tensors, held = (peak - self.unmapped.get(self.phase, 0) for peak in peaks)
        return f"{tensors / GIB:8.2f} {held / GIB:9.2f} {(total - free) / GIB:9.2f}"


def longest_row(config: Config, device: torch.device, vocabulary: int) -> train.Row:
    """Make the longest row there can be: full responses to full prompts side by side, and one that fills the rest."""
    longest = config.max_prompt_tokens + config.longest_response - 1  # a response's last token is no input
    tokens = max(longest, min(config.row_limit(device.type), longest * config.prompts_per_step * config.group_size))
    rollouts = []
    for start in range(0, tokens, longest):
        (content,) = make_prompts(1, min(longest, tokens - start) + 1, vocabulary)
        prompt = max(1, len(content) - config.longest_response)
        logprobs = [0.0] * (len(content) - prompt)
        rollouts.append(Rollout("", content[:prompt], content[prompt:], logprobs, "", "length", advantage=1.0))
    (row,) = train.pack([(rollout, 0.0) for rollout in rollouts], tokens)
    return row.to(device)


def update(run: Any, row: train.Row, meter: Meter) -> None:
    """Go forward and backward and step, as `train.update_policy` does, and change nothing."""
    model = causal_lm(run.policy.train())
    meter.begin("forward")
    for parameter in run.policy.parameters():  # as other rows of a batch leave it
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    hook = model.base_model.register_forward_hook(lambda *_: meter.begin("log-probs"))
    scale = run.scaler.scale(torch.ones((), device=model.device))
    loss = train.forward_row(run.policy, row, 1.0, run.config, scale)[0]
    hook.remove()
    meter.begin("backward")
    loss.backward()
    meter.begin("optimizer step")
    norm = train.apply_gradient(run.policy, run.optimizer, run.scaler, run.config.max_grad_norm)
    meter.end()
    if not math.isfinite(norm):
        raise UserError(f"the gradient of a loss of 0 is {norm}, so there was no step: try --dtype float32")


def checksum(policy: torch.nn.Module) -> int:
    """Return the CRC-32 of all weights; -0, which a step of 0 may turn into 0, counts as 0."""
    found = 0
    for parameter in policy.parameters():
        found = zlib.crc32((parameter.detach().cpu() + 0).flatten().view(torch.uint8).numpy(), found)
    return found


def rehearse(config: Config, meter: Meter, responses: int) -> int:
    """Go through the phases of a run in their order, and return the checksum of its weights."""
    device, longest = resolve_device(config.device), config.max_prompt_tokens + config.longest_response
    problem = Problem("", "", (), prompt_tokens=(0,) * config.max_prompt_tokens)
    check_model(config.model, config, [problem], config.longest_response)
    tokenizer = load_tokenizer(config.model, config)
    meter.begin("model loads")
    policy = load_policy(config)
    train.check_packing(policy, config)
    vocabulary = causal_lm(policy).config.get_text_config().vocab_size
    run, row, before = run_of(policy, config), longest_row(config, device, vocabulary), checksum(policy)
    for group in run.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    meter.begin("engine starts")
    free_memory()
    counted = torch.cuda.memory_allocated()
    engine: Engine = (VLLMEngine(base_model(config.model), tokenizer, config, longest, policy=policy)
                      if config.engine == "vllm" else HFEngine(policy, tokenizer, config))
    free_memory()
    meter.end()
    meter.unmapped = dict.fromkeys(UPDATE, torch.cuda.memory_allocated() - counted)

    update(run, row, meter)
    meter.begin("weight sync")
    if isinstance(engine, VLLMEngine):  # which resets it between weights and cache, where the plan has its border
        meter.unmapped["weight sync"] = engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes or 0
        reset: Any = engine.llm.reset_prefix_cache
        engine.llm.reset_prefix_cache = lambda: meter.begin("rollout") or reset()  # type: ignore
    engine.wake(policy)
    if meter.phase != "rollout":
        meter.begin("rollout")
    new = min(8, longest - 1)
    # the hf engine takes all prompts at once, in a run short ones: one for all responses fills its cache as they do
    prompts, each = (responses, 1) if config.engine == "vllm" else (1, responses)
    divides = config.engine == "hf" or device.type == "cuda"  # a long prompt; vLLM's CPU build has to take it at once
    length = longest - new if divides else min(longest - new, 2048)
    list(engine.generate(make_prompts(prompts, length, vocabulary), each, Sampling(1.0, new, seed=0)))
    meter.begin("sleep")
    engine.sleep()
    update(run, row, meter)
    meter.begin("engine ends")
    engine.close()
    meter.end()
    if (after := checksum(policy)) != before:
        raise RuntimeError(f"weights have changed (CRC-32 {before:08x}, now {after:08x}) at a learning rate of 0; "
                           "this is a bug, please report it")
    return after


def advice(config: Config, phase: str, card: float) -> str:
    """Name the cheapest change by which the plan of a phase that ran out fits and becomes a tenth smaller."""
    phase = {"model loads": "optimizer step", "engine starts": "rollout", "forward": "backward",
             "sleep": "weight sync", "engine ends": "weight sync"}.get(phase, phase)  # fmt: skip

    def size_with(changes: Sequence[Change]) -> float:
        try:
            parts = plan_memory(changed(config, changes), card).phases[phase]
        except ValueError:  # one change needs another
            return math.inf
        filling = "key-value cache" if config.engine == "vllm" else ""  # takes what is left
        return sum(size for what, size in parts.items() if what != filling)

    limit = min(card, 0.9 * size_with([]))
    changes = cheapest_changes(config, size_with, limit)
    named = [f"{options_text(settings)} ({price})" for settings, price in changes]
    shorter = "--max-response-tokens and --tokens-per-micro-batch with fewer tokens"
    return ", ".join(named + [shorter] * (size_with(changes) > limit))


def main(arguments: Sequence[str]) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser("tools/rehearse.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    options = parser.parse_known_args(arguments)[1]
    resumed = any(option.split("=")[0] == "--resume" for option in options)
    config = read_config(options if resumed else ["--data", "unread", *options])
    transformers_logging.disable_progress_bar()
    config, device = replace(config, engine="vllm" if uses_vllm(config) else "hf"), resolve_device(config.device)
    if device.index:
        torch.cuda.set_device(device)  # of which memory is then measured
    card = float(torch.cuda.mem_get_info()[0]) if device.type == "cuda" else 24.0 * GIB
    plan = plan_memory(config, card)
    responses = max(1, min(int(plan.responses), config.prompts_per_step * config.group_size))
    if config.engine == "vllm" and device.type == "cpu":
        responses = 1  # see `rehearse`
    print(f"{config.model} on {device}, engine {config.engine}, responses side by side: {responses}; in GiB, planned "
          f"with 1 for CUDA\n\n{'':14} {'planned':>8} {'tensors':>8} {'held':>9} {'card':>9} {'seconds':>8}")
    meter = Meter(device, {phase: plan.peak(phase) for phase in plan.phases})
    try:
        same = rehearse(config, meter, responses)
    except (RuntimeError, UserError) as error:  # a UserError if vLLM does not start
        if "out of memory" not in str(error):
            raise
        print(f"does not fit: memory ran out in {meter.phase}; give {advice(config, meter.phase, card)}")
        return 1
    left = "the memory of a CPU is not measured"
    if meter.left:
        tightest = min(meter.left, key=meter.left.__getitem__)
        left = f"{meter.left[tightest] / GIB:.2f} GiB of the card were left in {tightest}, the tightest phase"
    print(f"fits: {left}; no weight has changed (CRC-32 {same:08x})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError, ImportError) as error:
        print(f"rehearse.py: error: {error}", file=sys.stderr)
        sys.exit(2)
