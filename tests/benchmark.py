"""Time the engines and the update on this machine: figures to read and compare, not tests.

    python tests/benchmark.py engines                  # start, weight sync, generation; a Qwen3 of 4 layers
    python tests/benchmark.py engines MODEL            # the folder of a model
    python tests/benchmark.py decode                   # the hf engine over the length of responses
    python tests/benchmark.py update                   # seconds and memory, a vocabulary of 151,936
    python tests/benchmark.py update 4x1024 1x8192v4096p64 mixed --gradient-checkpointing --logprob-chunk-tokens 128
    python tests/benchmark.py update --against trl     # ours and TRL's by turns; needs tests/requirements-trl.txt
    python tests/benchmark.py step                     # each phase of the toy world's steps

A case of the update is RESPONSESxTOKENS, then, if need be, v and the vocabulary, p and the prompt's tokens. mixed is 8
responses of 64 to 2,048 tokens, most of them short.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

import toy
import train
from polaris_mini import Config, Group, Problem, Rollout
from rollout import Engine, HFEngine, Sampling, VLLMEngine, load_policy, resolve_device

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
        return VLLMEngine(str(folder), toy.toy_tokenizer(), config, 512, policy=policy)
    return HFEngine(policy, toy.toy_tokenizer(), config)


def engines(model: str | None) -> None:
    device = resolve_device("auto")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(model) if model else small_model(Path(temporary), vocabulary=4096)
        config = Config(model=str(folder), rollouts_per_batch=PROMPTS * COUNT)
        policy = load_policy(config)
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


def decode() -> None:
    """Time the hf engine on responses that all have full length: 64 of 128 tokens, then 8 of growing length."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = small_model(Path(temporary), vocabulary=1024)
        policy = load_policy(Config(model=str(folder)))
    print(f"small model: {sum(p.numel() for p in policy.parameters()):,} parameters, {policy.device}, "
          f"{torch.get_num_threads()} threads\nresponses   tokens/s (median, least, most of 3)")
    for prompts, tokens in ((8, 128), (1, 128), (1, 512), (1, 1024), (1, 2048), (1, 4096)):
        engine = HFEngine(policy, toy.toy_tokenizer(), Config(rollouts_per_batch=64))
        engine.stop_tokens = [1024]  # no token of the model
        given, speed = [[4 + (7 * i + j) % 18 for j in range(20 + 2 * i)] for i in range(prompts)], []
        for seed in range(4):
            began = now()
            list(engine.generate(given, COUNT, Sampling(1.0, tokens, seed)))
            speed.append(prompts * COUNT * tokens / (now() - began))
        speed = sorted(speed[1:])  # the first warms up
        print(f"{prompts * COUNT:3} x {tokens:4} {speed[1]:8,.0f} {speed[0]:8,.0f} {speed[2]:8,.0f}", flush=True)


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


@dataclass(frozen=True)
class Case:
    """Fixed work for an update."""

    lengths: list[int]
    vocabulary: int
    prompt: int

    @classmethod
    def read(cls, text: str) -> Case:
        found = re.fullmatch(r"(?:(\d+)x(\d+)|mixed)(?:v(\d+))?(?:p(\d+))?", text)
        if not found:
            raise SystemExit(f"case is {text}: give RESPONSESxTOKENS, or mixed: 8x512, 8x512v4096p64")
        count, tokens, vocabulary, prompt = found.groups()
        rng = random.Random(0)
        skewed = [min(2048, max(64, round(rng.lognormvariate(5.7, 1.0)))) for _ in range(7)]
        return cls([int(tokens)] * int(count) if count else [*skewed, 2048], int(vocabulary or 151_936),
                   int(prompt or 32))

    def rollouts(self) -> list[Rollout]:
        rng = random.Random(1)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(4, self.vocabulary) for _ in range(count)]

        return [Rollout("p", tokens(self.prompt), tokens(length), [-11.9] * length, "", "length", advantage=(-1.0) ** i)
                for i, length in enumerate(self.lengths)]


def update_once(case: Case, config: Config) -> tuple[float, float]:
    """Take one update and return seconds and MiB."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = small_model(Path(temporary), case.vocabulary)
        policy = load_policy(replace(config, model=str(folder)))
        for parameter in policy.parameters():  # read from the disk only now
            parameter.data = parameter.data.clone()
    groups = [Group(Problem("p", "", ("1",)), case.rollouts())]
    device = resolve_device("auto").type
    run: Any = SimpleNamespace(policy=policy, config=config, optimizer=train.make_optimizer(policy, config),
                               scaler=torch.amp.GradScaler(device, enabled=config.dtype == "float16"),
                               state=SimpleNamespace(temperature=1.0))
    with PeakMemory() as memory:
        began = now()
        train.update_policy(run, groups)
        took = now() - began
    return took, memory.above


def trl_update_once(case: Case, config: Config) -> tuple[float, float]:
    """Do the same work by TRL's own training step: split, loss, backward; then clip and step as we do."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad

    rollouts, longest = case.rollouts(), max(case.lengths)
    together = max(1, 4096 // longest)  # responses in a micro-batch
    parts = math.ceil(len(rollouts) / together)

    def padded(sequences: list[list[int]]) -> torch.Tensor:
        return pad([torch.tensor(tokens) for tokens in sequences], padding_value=0, padding_side="right")

    class FixedRollouts(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            return {
                "prompt_ids": padded([list(r.prompt_tokens) for r in rollouts]),
                "prompt_mask": padded([[1] * case.prompt for _ in rollouts]),
                "completion_ids": padded([r.response_tokens for r in rollouts]),
                "completion_mask": padded([[1] * len(r.response_tokens) for r in rollouts]),
                "advantages": torch.tensor([r.advantage for r in rollouts]),
                "num_items_in_batch": torch.tensor(sum(case.lengths)),
            }

    with tempfile.TemporaryDirectory() as temporary:
        model = Qwen3ForCausalLM.from_pretrained(small_model(Path(temporary), case.vocabulary))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        trainer = FixedRollouts(
            model, reward_funcs=lambda **_: [], processing_class=toy.toy_tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": ["1"] * len(rollouts)}),
            args=GRPOConfig(
                output_dir=temporary, per_device_train_batch_size=math.ceil(len(rollouts) / parts),
                gradient_accumulation_steps=parts, num_generations=len(rollouts), bf16=False, report_to="none",
                gradient_checkpointing=config.gradient_checkpointing, use_cpu=not torch.cuda.is_available(), beta=0.0,
            ),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = parts
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    model.train()
    with PeakMemory() as memory:
        began = now()
        for _ in range(parts):
            trainer.training_step(model, {}, None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        took = now() - began
    return took, memory.above


def in_its_own_process(who: str, case: str, options: list[str], environment: dict[str, str]) -> list[float]:
    command = [sys.executable, __file__, "once", who, case, *options]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if found.returncode != 0:
        raise SystemExit(found.stderr)
    return [float(word) for word in found.stdout.splitlines()[-1].split()]


def updates(rest: list[str]) -> None:
    against = "--against" in rest
    rest = [word for word in rest if word not in ("--against", "trl")]
    cases = [word for word in rest if (word[0].isdigit() and "x" in word) or word.startswith("mixed")]
    options = [word for word in rest if word not in cases]
    print(f"{resolve_device('auto')}, {torch.get_num_threads()} threads; {' '.join(options) or 'default settings'}")
    print(f"{'case':>16} {'who':>5}  tokens  seconds (least, most)  tokens/s   MiB of tensors, MiB of the process"
          f"{'   speed against TRL (least, most)' * against}")
    for case in cases or (*CASES, *(["mixed"] if against else [])):
        seconds, memory, usual = defaultdict(list), {}, {}
        contestants = ["ours", "trl"] if against else ["ours"]
        for who in contestants:
            # The C library keeps what it frees, for speed: with every tensor a mapping of its own, nothing is kept.
            memory[who] = in_its_own_process(who, case, options, {"MALLOC_MMAP_THRESHOLD_": "100000"})[1]
        for _ in range(3):
            for who in contestants:  # by turns: what disturbs the machine disturbs both
                took, process = in_its_own_process(who, case, options, {})
                seconds[who].append(took)
                usual[who] = process
        tokens = sum(Case.read(case).lengths)
        for who in contestants:
            middle = statistics.median(seconds[who])
            line = (f"{case:>16} {who:>5} {tokens:7,} {middle:8.1f} ({min(seconds[who]):.1f}, {max(seconds[who]):.1f})"
                    f" {tokens / middle:12,.0f} {memory[who]:16,.0f} {usual[who]:16,.0f}")
            if who == "trl":
                ratios = [t / o for o, t in zip(seconds["ours"], seconds["trl"], strict=True)]
                line += f"   {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            print(line, flush=True)


# ---------------------------------------------------------------------------- a whole step


def steps() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        command = [sys.executable, "train.py", "--steps", "8", "--eval-every", "-1", "--run-dir", str(run)]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(train.__file__).parent)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    print("toy world, 32 x 8 rollouts; seconds, median of 7 steps (least, most)")
    for phase in ("rollout", "reward", "sync", "update", "step"):
        taken = [line[f"time/{phase}"] for line in lines]
        print(f"{phase:8} {statistics.median(taken):7.3f} ({min(taken):.3f}, {max(taken):.3f})")


def main(arguments: list[str]) -> None:
    transformers_logging.disable_progress_bar()
    command, *rest = arguments or ["--help"]
    if command == "engines":
        engines(*rest or [None])
    elif command == "decode":
        decode()
    elif command == "update":
        updates(rest)
    elif command == "step":
        steps()
    elif command == "once":
        who, case, *options = rest
        config = tyro.cli(Config, args=["--optimizer", "sgd", *options])
        print(*(update_once if who == "ours" else trl_update_once)(Case.read(case), config))
    else:
        print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
