"""Time the engines and the update on this machine: figures to read and compare, not tests.

    python tests/benchmark.py engines                  # start, weight sync, generation; a Qwen3 of 4 layers
    python tests/benchmark.py engines MODEL            # the folder of a model
    python tests/benchmark.py decode                   # the hf engine over the length of responses
    python tests/benchmark.py update                   # seconds and memory, a vocabulary of 151,936
    python tests/benchmark.py update 4x1024 1x8192v4096p64 mixed --gradient-checkpointing --logprob-chunk-tokens 128
    python tests/benchmark.py update --against trl     # ours and TRL's by turns; needs tests/requirements-trl.txt
    python tests/benchmark.py step                     # each phase of the toy world's steps
    python tests/benchmark.py step --against trl [MODEL] [--max-response-tokens 128 ...]  # whole steps by turns

A case of the update is RESPONSESxTOKENS, then, if need be, v and the vocabulary, p and the prompt's tokens. mixed is 8
responses of 64 to 2,048 tokens, most of them short. Options are those of train.py.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

import toy
import train
from doctor import run_of
from polaris_mini import Config, Group, Problem, Rollout, set_advantages
from reward import Grade
from rollout import (
    Engine, HFEngine, Sampling, VLLMEngine, load_policy, load_tokenizer, resolve_device, resolve_dtype, sample_groups,
    set_rewards,
)

PROMPTS, COUNT, TOKENS = 16, 8, 128  # of the engines
CASES = ("8x512", "2x2048", "16x128")  # of the update: responses x tokens
TURNS = 3  # of a whole step, each by both contestants
TENSORS_ALONE = {"MALLOC_MMAP_THRESHOLD_": "100000"}
"""The C library keeps what it frees, for speed: with every tensor a mapping of its own, nothing is kept."""


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

    @property
    def above(self) -> float:
        return (torch.cuda.max_memory_allocated() / 2**20 if self._cuda else self._peak) - self._before

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


def trl_settings(config: Config, folder: str, **others: Any) -> Any:
    from trl import GRPOConfig

    device = resolve_device("auto")
    return GRPOConfig(output_dir=folder, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
                      use_cpu=device.type == "cpu", bf16=resolve_dtype(config, device) == torch.bfloat16, beta=0.0,
                      gradient_checkpointing=config.gradient_checkpointing, **others)


def update_once(case: Case, config: Config) -> tuple[float, float]:
    """Take one update and return seconds and MiB."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = small_model(Path(temporary), case.vocabulary)
        policy = load_policy(replace(config, model=str(folder)))
        for parameter in policy.parameters():  # read from the disk only now
            parameter.data = parameter.data.clone()
    groups = [Group(Problem("p", "", ("1",)), case.rollouts())]
    run = run_of(policy, config)
    with PeakMemory() as memory:
        began = now()
        train.update_policy(run, groups)
        took = now() - began
    return took, memory.above


def trl_update_once(case: Case, config: Config) -> tuple[float, float]:
    """Do the same work by TRL's own training step: split, loss, backward; then clip and step as we do."""
    from datasets import Dataset
    from trl import GRPOTrainer
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
            args=trl_settings(config, temporary, per_device_train_batch_size=math.ceil(len(rollouts) / parts),
                              gradient_accumulation_steps=parts, num_generations=len(rollouts)),
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
            memory[who] = in_its_own_process(who, case, options, TENSORS_ALONE)[1]
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


class Clock:
    """Time the steps of a contestant, each when its turn comes, by standard input and output."""

    def __init__(self, memory: PeakMemory) -> None:
        self._memory, self._times = memory, list[float]()

    def begin(self) -> None:
        sys.stdin.readline()
        self._times = [now()]

    def drawn(self) -> None:
        self._times.append(now())

    def end(self) -> None:
        begin, drawn, end = *self._times, now()
        print("took", drawn - begin, end - drawn, end - begin, self._memory.above, flush=True)


class HalfRight:
    """Grade without looking, so that every group has a gradient."""

    def __init__(self) -> None:
        self._count = 0

    def submit(self, *_: object) -> Future[Grade]:
        self._count, future = self._count + 1, Future[Grade]()
        future.set_result(Grade(float(self._count % 2), "correct" if self._count % 2 else "wrong"))
        return future


def our_steps(config: Config, texts: Sequence[str], clock: Clock) -> None:
    policy, tokenizer, pool = load_policy(config), load_tokenizer(config.model, config), HalfRight()
    run, engine = run_of(policy, config), HFEngine(policy, tokenizer, config)
    engine.stop_tokens = [-1]  # no token of the model: all responses have full length
    problems = [Problem(text, text, ("1",), prompt_tokens=tuple(tokenizer(text)["input_ids"])) for text in texts]
    for seed in range(1 + TURNS):
        clock.begin()
        engine.wake(policy)
        sampling = Sampling(1.0, config.longest_response, seed)
        groups = set_rewards(*sample_groups(engine, pool, problems, config.group_size, sampling))  # type: ignore
        engine.sleep()
        clock.drawn()
        set_advantages(groups, config.advantage)
        train.update_policy(run, groups)
        clock.end()


def trl_steps(config: Config, texts: Sequence[str], clock: Clock) -> None:
    """Let TRL train in its own loop with its own generation, by its defaults: micro-batches of 8 responses.

    Type, checkpointing and optimizer are ours, so that the work is the same.
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            drawn = super()._generate_and_score_completions(inputs)
            assert drawn["completion_mask"].all(), "a response ended early"
            clock.drawn()
            return drawn

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as temporary:
        trainer = Timed(
            AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [i % 2 for i in range(len(completions))],
            processing_class=load_tokenizer(config.model, config), train_dataset=Dataset.from_dict({"prompt": texts}),
            args=trl_settings(
                config, temporary, max_steps=1 + TURNS, learning_rate=config.lr, lr_scheduler_type="constant",
                max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
                optim={"adamw": "adamw_torch_fused", "sgd": "sgd"}[config.optimizer],
                gradient_accumulation_steps=len(texts) * config.group_size // 8, num_generations=config.group_size,
                max_completion_length=config.longest_response, generation_kwargs={"eos_token_id": [-1]},
            ),
            callbacks=[Steps()],
        )  # fmt: skip
        trainer.eos_token_ids = [-1]
        trainer.train()


@contextlib.contextmanager
def contestant(who: str, options: list[str], environment: dict[str, str]) -> Iterator[Callable[[], list[float]]]:
    """Start a process that takes a step each time it is told to; yield what tells it.

    That returns the seconds of rollout, update and both, and the most MiB so far above the loaded model.
    """
    command = [sys.executable, __file__, "contest", who, *options]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with (tempfile.TemporaryFile("w+") as errors,
          subprocess.Popen(command, **pipes, stderr=errors, env={**os.environ, **environment}) as process):
        def step() -> list[float]:
            print(file=process.stdin)
            for line in process.stdout or ():
                if line.startswith("took "):
                    return [float(word) for word in line.split()[1:]]
            errors.seek(0)
            raise SystemExit(errors.read())

        try:
            yield step
        finally:
            process.terminate()


def contest_config(options: list[str]) -> Config:
    return tyro.cli(Config, args=options, default=Config(max_response_tokens=128))


def steps_against_trl(rest: list[str]) -> None:
    """Let ours and TRL take whole steps by turns. The first step of each warms up."""
    with tempfile.TemporaryDirectory() as temporary:
        if not rest or rest[0].startswith("--"):
            toy.toy_tokenizer().save_pretrained(small_model(Path(temporary), vocabulary=1024))
            rest = [temporary, *rest]
        prompts = "8" if rest[0] == temporary else "4"
        options = ["--model", rest[0], "--prompts-per-step", prompts, *rest[1:]]
        config = contest_config(options)
        tokens = config.prompts_per_step * config.group_size * config.longest_response
        name = "small model" if config.model == temporary else config.model
        print(f"{name}, {resolve_device('auto')}, {torch.get_num_threads()} threads; {config.prompts_per_step} x "
              f"{config.group_size} x {config.longest_response} tokens; {' '.join(rest[1:]) or 'default settings'}")
        with contestant("ours", options, {}) as our_step, contestant("trl", options, {}) as trl_step:
            turns = [(our_step(), trl_step()) for _ in range(1 + TURNS)]  # what disturbs one disturbs both
        tensors = []
        for who in ("ours", "trl"):
            with contestant(who, options, TENSORS_ALONE) as step:
                tensors.append([step()[3] for _ in range(2)][-1])  # the first makes the optimizer's state
    print("          ours, s (least, most)    TRL, s (least, most)    tokens/s, ours and TRL")
    ratios = []
    for i, phase in enumerate(("rollout", "update", "step")):
        mine, theirs = ([turn[who][i] for turn in turns[1:]] for who in (0, 1))
        seconds = "".join(f"{statistics.median(x):9.2f} ({min(x):.2f}, {max(x):.2f})".ljust(25) for x in (mine, theirs))
        speeds = "".join(f"{tokens / statistics.median(x):10,.0f}" for x in (mine, theirs))
        print(f"{phase:8} {seconds} {speeds}")
        ratio = [t / o for o, t in zip(mine, theirs, strict=True)]
        ratios.append(f"{phase} {statistics.median(ratio):.2f} ({min(ratio):.2f}, {max(ratio):.2f})")
    process = [last[3] for last in turns[-1]]
    for what, mib in (("tensors", tensors), ("the process", process)):
        print(f"MiB of {what}: ours {mib[0]:,.0f}, TRL {mib[1]:,.0f}")
    print(f"times as fast as TRL (least, most): {', '.join(ratios)}")


def contest(who: str, options: list[str]) -> None:
    config = contest_config(options)
    texts = [" + ".join(str(12 + 7 * i + j) for j in range(6 + i)) for i in range(config.prompts_per_step)]
    with PeakMemory() as memory:
        (our_steps if who == "ours" else trl_steps)(config, texts, Clock(memory))


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
        words = [word for word in rest if word not in ("--against", "trl")]
        steps_against_trl(words) if "--against" in rest else steps()
    elif command == "contest":
        contest(rest[0], rest[1:])
    elif command == "once":
        who, case, *options = rest
        config = tyro.cli(Config, args=["--optimizer", "sgd", *options])
        print(*(update_once if who == "ours" else trl_update_once)(Case.read(case), config))
    else:
        print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
