"""Kill runs with SIGKILL at any moment, resume them, and compare each with a run that nothing disturbed.

    python tests/soak.py --kills 200                      # of trainers and reward workers, also while a file is written
    python tests/soak.py --kills 12 --engine vllm         # trainers with vLLM in them

A tiny model trains on sums with a reward that is a coin tossed by the response's text: steps have updates, rescues,
problems that leave, a probe, evaluations and checkpoints, in half of the runs after every step, in the others after
every third. A kill comes at a random time, or at a random file operation in the run's folder, or up to 30 ms later.
Five responses are drawn at once, of 24 in a step, so that many kills come in the middle of a step.

Prints a report; the exit code is 1 if anything was lost, repeated or different. Lost is a finished group in kept/ that
the next start did not take from there. Repeated is one that was drawn again, and a response that was logged twice.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from fast_start import ROOT, Faults, Script
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
import data
import toy

COIN = "import zlib\n\ndef score(response, answer, problem):\n    return float(zlib.crc32(response.encode()) % 2)\n"
PROMPTS, GROUP_SIZE, STEPS, EVERY = 6, 4, 10, (1, 3)
OPTIONS = ["--data", "problems.jsonl", "--prompt-suffix", "", "--reward", "coin:score", "--prompts-per-step", PROMPTS,
           "--group-size", GROUP_SIZE, "--rollouts-per-batch", "5", "--eval-problems", "8", "--eval-rollouts", "2",
           "--eval-every", "4", "--lr", "1e-3", "--stages", "5:auto:10", "5:auto:14", "--probe-problems", "4",
           "--updates-per-batch", "2", "--mastered-above", "0.7", "--probe-temperatures", "1,1.1"]  # fmt: skip
LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "scores.jsonl", "probes.jsonl")
MEASURED = ("time/", "memory/", "tokens/per_second")
KINDS = {  # and how often
    "trainer, random moment": 2, "trainer, at a file operation": 2, "trainer, as a group is kept": 2,
    "reward worker": 1,
}  # fmt: skip
Kept = dict[tuple[str, str, int], object]  # file, key and number of a finished group -> its responses


def make_world(folder: Path) -> list[object]:
    """Write a tiny model, problems and the reward; return the options of a run."""
    tokenizer = toy.toy_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "coin.py").write_text(COIN)
    rows = [{"problem": problem.text, "answer": problem.answers[0]} for problem in toy.toy_problems(24, seed=5)]
    data.append_lines(folder / "problems.jsonl", rows)
    return ["--model", folder / "model", *OPTIONS]


def result_of(folder: Path) -> dict[str, object]:
    """Collect what a run leaves: logs but for times and memory, all of each checkpoint, the sink."""
    found: dict[str, object] = {}
    for name in LOGS:
        found[name] = [{key: value for key, value in line.items() if not key.startswith(MEASURED)}
                       for line in data.read_lines(folder / name)]
    for path in sorted((folder / "checkpoints").rglob("*")):
        if path.is_file():
            content = torch.load(path, weights_only=True) if path.suffix == ".pt" else path.read_bytes()
            found[str(path.relative_to(folder))] = as_text(content)
    found["sink"] = {path.name: path.read_bytes() for path in (folder / "sink").glob("*.json")}
    found["beside"] = sorted(path.name for path in folder.glob("[!.]*"))
    return found


def as_text(value: object) -> str:
    """Write bytes, tensors and what holds them as a short text, which differs where a bit does."""
    if isinstance(value, torch.Tensor):
        value = f"{value.dtype} {tuple(value.shape)} {value.tolist()}"
    elif isinstance(value, dict):
        value = {name: as_text(part) for name, part in value.items()}
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def kept_groups(folder: Path) -> Kept:
    """Read the finished groups in a folder.

    Raises: ValueError if one was drawn twice.
    """
    groups: Kept = {}
    for path in sorted(folder.glob("step_*")):
        for line in data.read_lines(path):
            group = path.name, line["key"], line["number"]
            if group in groups:
                raise ValueError(f"group {line['number']} of {path.name} was drawn twice")
            groups[group] = line["responses"]
    return groups


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
        self.expected: dict[int, dict[str, object]] = {}
        self.drawn: dict[int, Kept] = {}
        """What the undisturbed runs leave, and every group that they draw, by `checkpoint_every`."""
        for every in EVERY:
            run, start = folder / f"undisturbed-{every}", time.monotonic()
            ended = self.start(run, every=every).wait()
            assert ended.returncode == 0, ended.stderr
            self.seconds = time.monotonic() - start
            self.expected[every], self.drawn[every] = result_of(run), kept_groups(folder / "removed")
        metrics = list(data.read_lines(run / "metrics.jsonl"))
        assert sum(line["batch/rescued"] for line in metrics) > 0
        assert all(line["optim/grad_norm"] for line in metrics)
        assert re.search("stage 2: [1-9].* leave", (run / "log.txt").read_text())

    def start(self, run: Path, faults: Faults | None = None, every: int = EVERY[-1]) -> Script:
        """Start a run, or resume it. `removed` has then the kept groups that this process removes."""
        shutil.rmtree(self.folder / "removed", ignore_errors=True)
        (self.folder / "removed").mkdir()
        arguments = ["--resume", run] if run.exists() else [
            *self.options, "--checkpoint-every", every, "--run-dir", run]
        return Script(arguments, self.environment, cwd=self.folder,
                      faults=replace(faults or Faults(), removed=str(self.folder / "removed")))

    def kill_and_resume(self, run: Path, kills: int, every: int = EVERY[-1]) -> int:
        """Let a run come to its end; return how often it was killed on the way, at most `kills` times."""
        done, kept, checkpoints = 0, Kept(), {}
        while True:
            kind = self.rng.choices([*KINDS], [*KINDS.values()])[0] if done < kills else "none"
            killed, ended = self._one_process(run, kind, every)
            self.counts[f"killed: {kind}"] += killed
            done += killed
            place = f"{run.name}, {kind}"
            try:
                kept = self._compare_kept(run, kept, every)
                checkpoints = self._compare_checkpoints(run, checkpoints)
            except ValueError as error:
                self.faults.append(f"{place}: {error}")
            if ended:
                break
            self._count_middle(kept, every)
            self.counts["resumed"] += 1
        self._compare(run, every)
        return done

    def _one_process(self, run: Path, kind: str, every: int) -> tuple[int, bool]:
        """Start or resume a run, kill it or its workers, wait; return the number of kills, and whether it is over."""
        faults, witness = Faults(), self.folder / "witness"
        witness.unlink(missing_ok=True)
        if kind.startswith("trainer, a"):
            operation, folder = (60, f"{run.name}/kept") if "kept" in kind else (150, run.name)
            faults = Faults(kill_at=self.rng.randint(1, operation), folder=folder, witness=str(witness),
                            kill_after=self.rng.choice([0, 0.03 * self.rng.random()]))
        process = self.start(run, faults, every)
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
        if ended.returncode == -signal.SIGKILL:
            if witness.exists():
                file = witness.read_text()
                file = "the run's folder" if file == run.name else re.sub("[0-9a-f]{4,}|[0-9]+", "*", file)
                self.counts[f"of these, at {file}"] += 1
            return killed + 1, False
        if ended.returncode != 0:
            self.faults.append(f"{run.name}, {kind}: exit code {ended.returncode}: {ended.stderr[-300:]}")
        return killed, True

    def _compare_kept(self, run: Path, before: Kept, every: int) -> Kept:
        """Return the groups that are kept, after a process that found some: all of them are used, none drawn again.

        A file of groups leaves with the checkpoint that contains the step, or at the end. Until then it only grows,
        and then it holds exactly what the undisturbed run has drawn.

        Raises: ValueError.
        """
        removed = kept_groups(self.folder / "removed")
        now = kept_groups(run / "kept")
        newest = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=-1)
        for group, responses in before.items():
            if (now | removed).get(group) != responses:
                raise ValueError(f"group {group[2]} of {group[0]} was kept and is lost or was drawn again")
        for file in {group[0] for group in removed} - {group[0] for group in now}:
            if newest <= int(file[5:11]) < STEPS:
                raise ValueError(f"{file} was removed before its checkpoint was there")
            wanted = {group: drawn for group, drawn in self.drawn[every].items() if group[0] == file}
            found = {group: drawn for group, drawn in removed.items() if group[0] == file}
            if (found != wanted) if self.exact else (found.keys() != wanted.keys()):
                raise ValueError(f"{file} has other groups than in the undisturbed run")
        return now

    def _count_middle(self, kept: Kept, every: int) -> None:
        """Count a kill that came in the middle of a step, with some of its groups kept."""
        finished = Counter(group[:2] for group, responses in kept.items() if len(responses) == GROUP_SIZE)
        wanted = Counter(group[:2] for group in self.drawn[every])
        for drawing, count in finished.items():
            if count < wanted[drawing] == PROMPTS:
                self.counts["killed in the middle of a step"] += 1
                self.counts["groups kept of these steps, each used by a resume"] += count

    def _compare_checkpoints(self, run: Path, before: dict[str, int]) -> dict[str, int]:
        """Return the checkpoints, each with its folder's number. One may leave only for newer ones.

        Raises: ValueError.
        """
        now = {path.name: path.stat().st_ino for path in (run / "checkpoints").glob("step_*")}
        for name, number in before.items():
            if now.get(name, number) != number or (name not in now and sum(newer > name for newer in now) < 2):
                raise ValueError(f"checkpoint {name} is lost or was made again")
        return now

    def _compare(self, run: Path, every: int) -> None:
        self.counts["runs to their end"] += 1
        found = result_of(run)
        scores = [(line["step"], line["id"]) for line in data.read_lines(run / "scores.jsonl")]
        if len(scores) != len(set(scores)):
            self.faults.append(f"{run.name}: a score counts twice")
        logged = [line for line in data.read_lines(run / "rollouts.jsonl") if not line["rescued"]]
        if len(logged) != GROUP_SIZE * len(scores):
            self.faults.append(f"{run.name}: {len(logged)} responses are logged of {GROUP_SIZE * len(scores)}")
        if self.exact:
            expected = self.expected[every]
            self.faults += [f"{run.name}: {name} differs from the undisturbed run" for name in expected | found
                            if expected.get(name) != found.get(name)]

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
            number = soak.counts["runs to their end"]
            kills += soak.kill_and_resume(Path(folder) / f"run-{number}", min(20, options.kills - kills),
                                          EVERY[number % len(EVERY)])
            print(f"{kills} kills, {len(soak.faults)} faults", flush=True)
        print(soak.report())
    sys.exit(len(soak.faults) > 0)


if __name__ == "__main__":
    main()
