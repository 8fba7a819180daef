"""Kill runs with SIGKILL at any moment, resume them, and compare each with a run that nothing disturbed.

    python tests/soak.py --kills 200                      # of trainers and reward workers, also while a file is written
    python tests/soak.py --kills 12 --engine vllm         # trainers with vLLM in them

A tiny model trains on sums with a reward that is a coin tossed by the response's text: steps have updates, rescues,
problems that leave, a probe, evaluations and checkpoints. A kill comes at a random time, or at a random file operation
in the run's folder and up to 30 ms later. Prints a report; the exit code is 1 if anything was lost, repeated or
different.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from fast_start import ROOT, Faults, Script
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(ROOT))
import data
import train

COIN = "import zlib\n\ndef score(response, answer, problem):\n    return float(zlib.crc32(response.encode()) % 2)\n"
OPTIONS = ["--data", "toy", "--reward", "coin:score", "--prompts-per-step", "6", "--group-size", "4", "--eval-problems",
           "8", "--eval-rollouts", "2", "--eval-every", "4", "--checkpoint-every", "3", "--lr", "1e-3", "--stages",
           "9:1.0:10", "9:auto:14", "--probe-problems", "4", "--updates-per-batch", "2"]  # fmt: skip
STEPS = 18
LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "scores.jsonl", "probes.jsonl")
MEASURED = ("time/", "memory/", "tokens/per_second")
KINDS = {"trainer, random moment": 2, "trainer, at a file operation": 3, "reward worker": 1}  # and how often


def make_world(folder: Path) -> list[object]:
    """Write a tiny model and the reward; return the options of a run."""
    tokenizer = data.toy_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "coin.py").write_text(COIN)
    return ["--model", folder / "model", *OPTIONS]


def result_of(folder: Path) -> dict[str, object]:
    """Collect what a run leaves: logs but for times and memory, checkpoints, the sink."""
    found: dict[str, object] = {}
    for name in LOGS:
        found[name] = [{key: value for key, value in line.items() if not key.startswith(MEASURED)}
                       for line in data.read_lines(folder / name)]
    for checkpoint in train.Run(folder).checkpoints():
        found[f"weights of {checkpoint.name}"] = train.digests(checkpoint)["model.safetensors"]
        state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
        found[f"state of {checkpoint.name}"] = json.dumps(state, default=_as_json, sort_keys=True)
    with sqlite3.connect(folder / "sink.sqlite") as database:
        found["sink"] = sorted(database.execute("SELECT * FROM rollouts"))
    return found


def _as_json(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else sorted(value)  # a set


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


class Soak:
    """Runs that are killed and resumed, what happened to them and what is wrong."""

    def __init__(self, folder: Path, seed: int, engine: str = "hf") -> None:
        self.folder, self.rng, self.exact = folder, random.Random(seed), engine == "hf"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.options = [*make_world(folder), "--engine", engine]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        Script(["--help"], self.environment).wait()  # the first one waits for the import of torch
        start = time.monotonic()
        ended = self.start(folder / "undisturbed").wait()
        assert ended.returncode == 0, ended.stderr
        self.seconds = time.monotonic() - start
        self.expected = result_of(folder / "undisturbed")

    def start(self, run: Path, faults: Faults | None = None) -> Script:
        arguments = ["--resume", run] if run.exists() else [*self.options, "--run-dir", run]
        return Script(arguments, self.environment, cwd=self.folder, faults=faults)

    def kill_and_resume(self, run: Path, kills: int) -> int:
        """Let a run come to its end; return how often it was killed on the way, at most `kills` times."""
        done = 0
        while True:
            kind = self.rng.choices([*KINDS], [*KINDS.values()])[0] if done < kills else "none"
            before = self._precious(run)
            killed = self._one_process(run, kind)
            self.counts[f"killed: {kind}"] += killed
            done += killed
            self._compare_precious(run, before, kind)
            if (run / "done").exists():
                break
            self.counts["resumed"] += 1
        self._compare(run)
        return done

    def _one_process(self, run: Path, kind: str) -> int:
        """Start or resume a run, kill it or its workers, wait for its end; return the number of kills."""
        faults, witness = None, self.folder / "witness"
        witness.unlink(missing_ok=True)
        if kind == "trainer, at a file operation":
            faults = Faults(kill_at=self.rng.randint(1, 150), folder=run.name, witness=str(witness),
                            kill_after=self.rng.choice([0, 0.03 * self.rng.random()]))
        process = self.start(run, faults)
        killed = 0
        if kind == "trainer, random moment":
            with suppress(TimeoutError):  # which kills
                process.wait(0.7 * self.seconds * self.rng.random())
        while kind == "reward worker" and process.poll() is None and not killed:
            time.sleep(0.3 * self.seconds * self.rng.random())
            for worker in children(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    killed += 1
        ended = process.wait()
        if ended.returncode == 0:
            (run / "done").touch()
        elif ended.returncode == -signal.SIGKILL:
            killed += 1
            if witness.exists():
                file = witness.read_text()
                file = "the run's folder" if file == run.name else re.sub("[0-9a-f]{4,}|[0-9]+", "*", file)
                self.counts[f"of these, at {file}"] += 1
        else:
            self.faults.append(f"{run.name}, {kind}: exit code {ended.returncode}: {ended.stderr[-300:]}")
            (run / "done").touch()
        return killed

    def _precious(self, run: Path) -> dict[Path, int]:
        """Return what is paid for, checkpoints and drawn responses, each with the number of its file."""
        found = [*(run / "checkpoints").glob("step_*"), *(run / "drawn").glob("step_*/*.json")]
        return {path: path.stat().st_ino for path in found}

    def _compare_precious(self, run: Path, before: dict[Path, int], kind: str) -> None:
        """Find what was lost or drawn again: it may leave only for a newer checkpoint or at the end of the run."""
        checkpoints = train.Run(run).checkpoints()
        for checkpoint in checkpoints:
            if (fault := train.damage(checkpoint)) is not None:
                self.faults.append(f"{run.name}, {kind}: {checkpoint.name}: {fault}")
        newest = train.step_of(checkpoints[-1]) if checkpoints else -1
        now = self._precious(run)
        self.counts["drawn responses that a resume found"] += sum(path.suffix == ".json" for path in before)
        for path, number in before.items():
            step = train.step_of(path.parent if path.suffix else path)
            if now.get(path, number) != number or (path not in now and step >= newest and newest < STEPS):
                self.faults.append(f"{run.name}, {kind}: {path.name} of step {step} is lost or was made again")

    def _compare(self, run: Path) -> None:
        self.counts["runs to their end"] += 1
        found = result_of(run)
        scores = [(line["step"], line["id"]) for line in data.read_lines(run / "scores.jsonl")]
        if len(scores) != len(set(scores)):
            self.faults.append(f"{run.name}: a score counts twice")
        if self.exact:
            self.faults += [f"{run.name}: {name} differs from the undisturbed run" for name in self.expected | found
                            if self.expected.get(name) != found.get(name)]

    def report(self) -> str:
        lines = [f"{count:6} {what}" for what, count in sorted(self.counts.items()) if not what.endswith("none")]
        return "\n".join([*lines, f"{len(self.faults):6} losses, repetitions, differences", *self.faults])


def main() -> None:
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description="Kill runs, resume them, compare.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak, kills = Soak(Path(folder), options.seed, options.engine), 0
        while kills < options.kills and not soak.faults:
            kills += soak.kill_and_resume(Path(folder) / f"run-{kills}", min(20, options.kills - kills))
            print(f"{kills} kills, {len(soak.faults)} faults", flush=True)
        print(soak.report())
    sys.exit(len(soak.faults) > 0)


if __name__ == "__main__":
    main()
