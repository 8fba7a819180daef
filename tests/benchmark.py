"""Time the engines and the update on this machine: figures to read and compare, not tests.

    python tests/benchmark.py engines                  # start, weight sync, generation; a Qwen3 of 4 layers
    python tests/benchmark.py engines MODEL            # the folder of a model
    python tests/benchmark.py update                   # seconds and memory, a vocabulary of 151,936
    python tests/benchmark.py update 4x1024 --gradient-checkpointing --logprob-chunk-tokens 128
"""
from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

import data
import train
from polaris_mini import Config, Group, Problem, Rollout
from rollout import Engine, HFEngine, Sampling, VLLMEngine, resolve_device

PROMPTS, COUNT, TOKENS = 16, 8, 128  # of the engines
CASES = ("8x512", "2x2048", "16x128")  # of the update: responses x tokens


def small_model(folder: Path, vocabulary: int) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=768, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=3,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------------- the engines


def make_engine(name: str, folder: Path, policy: torch.nn.Module, config: Config) -> Engine:
    if name == "vllm":
        return VLLMEngine(str(folder), data.toy_tokenizer(), config, max_tokens=512, weights="policy")
    return HFEngine(policy, data.toy_tokenizer(), config)


def engines(model: str | None) -> None:
    device = resolve_device("auto")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(model) if model else small_model(Path(temporary), vocabulary=4096)
        config = Config(model=str(folder), rollouts_per_batch=PROMPTS * COUNT)
        policy = train.load_policy(config, str(folder), None, device)
        print(f"{model or 'small model'}: {sum(p.numel() for p in policy.parameters()):,} parameters, {device}, "
              f"{torch.get_num_threads()} threads; {PROMPTS} x {COUNT} x {TOKENS} tokens")
        print("engine   start s   sync s   tokens/s (median, least, most of 3)")
        prompts = [[4 + (7 * i + j) % 18 for j in range(32)] for i in range(PROMPTS)]
        for name in ("hf", "vllm") if importlib.util.find_spec("vllm") else ("hf",):
            began = now()
            with contextlib.closing(make_engine(name, folder, policy, config)) as engine:
                start, sync, speed = now() - began, [], []
                for repeat in range(4):
                    began = now()
                    engine.wake(policy)
                    sync.append(now() - began)
                    began = now()
                    groups = list(engine.generate(prompts, COUNT, Sampling(1.0, TOKENS, seed=repeat)))
                    speed.append(sum(len(r.tokens) for _, responses in groups for r in responses) / (now() - began))
                    engine.sleep()
                speed = speed[1:]  # the first warms up
                print(f"{name:6} {start:9.1f} {statistics.median(sync):8.3f}   {statistics.median(speed):8,.0f} "
                      f"{min(speed):8,.0f} {max(speed):8,.0f}")


# -------------------------------------------------------------------------- the update


class PeakMemory:
    """The most memory that was taken in a block, in MiB above what was taken before it."""

    def __enter__(self) -> PeakMemory:
        self._cuda, self._done = torch.cuda.is_available(), threading.Event()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._before = self._peak = self._taken()
        if not self._cuda:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.above = (torch.cuda.max_memory_allocated() / 2**20 if self._cuda else self._peak) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._taken())

    def _taken(self) -> float:
        if self._cuda:
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def one_update(case: str, options: list[str], environment: dict[str, str]) -> list[float]:
    """Return what `update_once` does in a process of its own."""
    command = [sys.executable, __file__, "one-update", case, *options]
    environment = {**os.environ, **environment}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return list(map(float, shown.split()))


def update_once(case: str, options: list[str]) -> tuple[float, float, float]:
    """Return seconds, tokens per second and MiB of one update."""
    count, length = map(int, case.split("x"))
    config = tyro.cli(Config, args=["--optimizer", "sgd", *options])
    with tempfile.TemporaryDirectory() as temporary:
        folder = small_model(Path(temporary), vocabulary=151_936)
        policy = train.load_policy(config, str(folder), None, resolve_device("auto"))
        for parameter in policy.parameters():  # read from the disk only now
            parameter.data = parameter.data.clone()
    rng = random.Random(0)
    rollouts = [
        Rollout("p", [rng.randrange(150_000) for _ in range(32)], [rng.randrange(150_000) for _ in range(length)],
                [-11.9] * length, "", "length", advantage=(-1.0) ** i)
        for i in range(count)
    ]  # fmt: skip
    arguments: Any = (policy, train.make_optimizer(policy, config), train.loss_scaler(config, resolve_device("auto")))
    with PeakMemory() as memory:
        began = now()
        train.update_policy(*arguments, [Group(Problem("p", "", ("1",)), rollouts)], 1.0, config)
        took = now() - began
    return took, count * length / took, memory.above


def main(arguments: list[str]) -> None:
    transformers_logging.disable_progress_bar()
    command, *rest = arguments or ["--help"]
    if command == "engines":
        engines(*rest or [None])
    elif command == "update":
        cases = [word for word in rest if word[0].isdigit() and "x" in word] or list(CASES)
        options = [word for word in rest if word not in cases]
        print(f"{resolve_device('auto')}, {torch.get_num_threads()} threads; {' '.join(options) or 'default settings'}")
        print(" responses  seconds  tokens/s   MiB of tensors, MiB of the process above the model")
        for case in cases:
            # The C library keeps what it frees, for speed: with every tensor a mapping of its own, nothing is kept.
            exact = one_update(case, options, {"MALLOC_MMAP_THRESHOLD_": "100000"})
            usual = one_update(case, options, {})
            print(f"{case:>10} {usual[0]:8.1f} {usual[1]:9,.0f} {exact[2]:16,.0f} {usual[2]:20,.0f}")
    elif command == "one-update":
        print(*update_once(rest[0], rest[1:]))
    else:
        print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
