"""Two processes, one GPU each in earnest, here on the CPU: the same update, the same run, and an end for both.

This file is also a script that ranks run: see `main`.
"""
from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import even_sums, lines, random_rollouts, tiny_model
from fast_start import ROOT, Script
from safetensors.torch import load_file

import polaris_mini
import rollout
import train
from polaris_mini import Config, Group, Problem, UserError

THIS = "tests/test_ranks.py"
SMALL = ["--prompts-per-step", "7", "--group-size", "4", "--max-response-tokens", "40", "--eval-problems", "9",
         "--eval-rollouts", "2"]  # fmt: skip
ENDLESS = [*SMALL, "--stages", "500:1.0:40", "--eval-every", "-1", "--checkpoint-every", "100"]


@contextlib.contextmanager
def two_ranks(environment: dict[str, str], *arguments: object, script: str = "train.py") -> Iterator[list[Script]]:
    """Start two processes as torchrun does, but without its seconds; kill what is left of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    ranks = [Script(arguments, {**environment, **shared, "RANK": number, "LOCAL_RANK": number}, script=script)
             for number in ("0", "1")]  # fmt: skip
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def run_two_ranks(environment: dict[str, str], *arguments: object, script: str = "train.py") -> str:
    """Return what rank 0 printed."""
    with two_ranks(environment, *arguments, script=script) as ranks:
        results = [rank.wait(200) for rank in ranks]
    assert [result.returncode for result in results] == [0, 0], "".join(result.stderr for result in results)
    return results[0].stdout


def torchrun(environment: dict[str, str], *arguments: object, script: str = "train.py") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / script), *map(str, arguments)]  # fmt: skip
    path = os.pathsep.join([*map(str, (ROOT, ROOT / "tests", ROOT / "tools")), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env={**environment, "PYTHONPATH": path}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


# -------------------------------------------------------------------------- the update


def batches() -> list[list[Group]]:
    """Return two batches whose groups have places, with a rollout without advantage, and one for one rank only."""
    rollouts = random_rollouts(41, seed=1)
    rollouts[3].advantage = 0.0
    problem = Problem("p", "", ("1",))
    groups = [Group(problem, rollouts[i : i + 4], places=1 + i % 3) for i in range(0, 41, 4)]
    return [groups[:5], groups[5:10], groups[10:]]


CASES: dict[str, dict[str, Any]] = {
    "every weight": {}, "lora": {"lora_rank": 4}, "two updates": {"updates_per_batch": 2}, "tis": {"mismatch": "tis"},
    "checkpointed": {"gradient_checkpointing": True},
}


def updates(model: Path, case: str) -> dict[str, Any]:
    """Make an update with each batch."""
    config = Config(model=str(model), tokens_per_micro_batch=64, logprob_chunk_tokens=16, device="cpu", lr=1e-3,
                    **CASES[case])
    policy = rollout.load_policy(config)
    run: Any = SimpleNamespace(policy=policy, optimizer=train.make_optimizer(policy, config), config=config,
                               scaler=torch.amp.GradScaler("cpu", enabled=False),
                               state=SimpleNamespace(temperature=1.3, step=0))
    results = []
    for batch in batches():
        results.append(train.update_policy(run, batch))
        run.state.step += 1
    return {"weights": policy.state_dict(), "results": results, "optimizer": run.optimizer.state_dict()["state"]}


@pytest.fixture(scope="module")
def updated(environment, tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    """Return the folder of the models, what one process made of them, and what each of two ranks did."""
    folder = tmp_path_factory.mktemp("updated")
    for kind in ("tied", "untied"):
        tiny_model("qwen3", tied=kind == "tied").save_pretrained(folder / kind)
    one = {(kind, case): updates(folder / kind, case) for kind in ("tied", "untied") for case in CASES}
    run_two_ranks(environment, "updates", folder, script=THIS)
    return folder, one, [torch.load(folder / f"rank_{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_update_of_two_ranks_is_that_of_one(updated, kind, case):
    folder, one, (two, other) = updated[0], updated[1][kind, case], [of_rank[kind, case] for of_rank in updated[2]]
    before = load_file(folder / kind / "model.safetensors")
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], rtol=0, atol=1e-6), name
        assert torch.equal(two["weights"][name], other["weights"][name]), name
    trained = [name for name, weight in one["weights"].items() if name in before and not weight.equal(before[name])]
    assert bool(trained) == (case != "lora")
    assert case != "lora" or all(weight.any() for name, weight in one["weights"].items() if "lora_B" in name)
    assert two["results"] == other["results"]
    for x, y in zip(one["results"], two["results"], strict=True):
        assert y == pytest.approx(x, rel=1e-4)
    for number, state in one["optimizer"].items():
        for name, value in state.items():
            assert torch.allclose(value, two["optimizer"][number][name], rtol=1e-4, atol=1e-6), (number, name)


# ---------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module", params=["hf", "vllm"])
def run_of_two(request, environment, tmp_path_factory) -> Path:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp(request.param)
    even = even_sums(folder / "even.jsonl", 60)
    shown = run_two_ranks(environment, "--preset", "toy", "--engine", request.param, *SMALL, "--data", even, "--stages",
                          "2:1.3:40", "1:1.3:40", "--checkpoint-every", 2, "--run-dir", folder / "run")  # fmt: skip
    assert "2 x cpu" in shown
    return folder / "run"


def test_both_ranks_generate_and_one_writes(run_of_two):
    metrics, rollouts = lines(run_of_two / "metrics.jsonl"), lines(run_of_two / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        drawn = [r for r in rollouts if r["step"] == m["step"] and not r["rescued"]]
        assert [r["id"] for r in drawn[::4]] == list(dict.fromkeys(r["id"] for r in drawn))
        assert len(drawn) == 7 * 4
        assert m["tokens/rollout"] == sum(r["tokens"] for r in drawn)
    updated = [m for m in metrics if m["policy/loss"] is not None]
    assert len(updated) >= 2
    assert all(m["mismatch/kl"] < 1e-6 and m["mismatch/ratio_max"] < 1.01 for m in updated)  # each with its own weights
    assert [e["problems"] for e in lines(run_of_two / "evaluations.jsonl")] == [9, 9]
    responses = [tuple(r["response"] for r in rollouts[i : i + 4]) for i in range(0, 28, 4)]
    assert len(set(responses)) == 7  # the ranks' random numbers differ


@pytest.mark.parametrize("run_of_two", ["hf"], indirect=True)
def test_checkpoint_of_two_ranks_resumes_on_one_and_back(run_of_two, environment):
    train.main(["--resume", str(run_of_two), "--steps", "4"])
    run_two_ranks(environment, "--resume", run_of_two, "--steps", 5)
    metrics = lines(run_of_two / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    saved = torch.load(run_of_two / "checkpoints" / "step_000005" / "optimizer.pt", weights_only=True)
    updated = sum(m["policy/loss"] is not None for m in metrics)
    assert {float(state["step"]) for state in saved["optimizer"].values()} == {updated}  # Adam's count went along


def test_ranks_without_a_problem_of_their_own_take_part(environment, tmp_path):
    """One problem a step and one held out: the second rank draws nothing, and waits."""
    even = even_sums(tmp_path / "even.jsonl", 8)
    run_two_ranks(environment, "--preset", "toy", "--data", even, *SMALL, "--prompts-per-step", 1, "--eval-problems", 1,
                  "--stages", "3:1.0:40", "--run-dir", tmp_path / "run")  # fmt: skip
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert [e["problems"] for e in lines(tmp_path / "run" / "evaluations.jsonl")] == [1, 1]


# ------------------------------------------------------------------------------ the end


def check_stopped(folder: Path, shown: str, environment: dict[str, str]) -> None:
    """See that a run has ended with a checkpoint of its last step, and that it can go on from there."""
    assert "go on with: python train.py --resume" in shown
    last = lines(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints" / f"step_{last:06d}").is_dir()
    run_two_ranks(environment, "--resume", folder, "--steps", last + 1)
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == list(range(1, last + 2))


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("slow", [0, 1])
def test_ctrl_c_ends_a_rank_that_draws_and_one_that_waits_for_it(environment, tmp_path, slow):
    with two_ranks(environment, f"rank {slow} is slow", *ENDLESS, "--run-dir", tmp_path / "run", script=THIS) as ranks:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 1)
        time.sleep(1)  # by now one rank waits for the groups of the other
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        results = [rank.wait(60) for rank in ranks]
    assert [result.returncode for result in results] == [0, 0], "".join(result.stderr for result in results)
    check_stopped(tmp_path / "run", results[0].stdout, environment)


def test_ctrl_c_to_torchrun_ends_all_ranks_with_a_checkpoint(environment, tmp_path):
    process = torchrun(environment, *ENDLESS, "--run-dir", tmp_path / "run")
    wait_for_step(tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert "train.py" not in errors, errors  # no traceback through it
    check_stopped(tmp_path / "run", shown, environment)


OWN_REWARD = """
import os

def reward(response, answer, problem):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("rank 1 cannot grade")
    return 1.0
"""


def test_torchrun_ends_all_ranks_when_a_reward_fails_on_one(environment, tmp_path):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    process = torchrun({**environment, "PYTHONPATH": str(tmp_path)}, *ENDLESS, "--reward", "own:reward", "--run-dir",
                       tmp_path / "run")  # fmt: skip
    try:
        errors = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert "rank 1 cannot grade" in errors


@pytest.mark.parametrize(("fault", "message"), [
    ("user error", "train.py: error: only on rank 1\n"), ("any error", "ArithmeticError: only on rank 1\n"),
], ids=["user error", "any error"])  # fmt: skip
def test_a_rank_that_fails_ends_at_once_with_its_message(environment, tmp_path, fault, message):
    with two_ranks(environment, fault, *ENDLESS, "--run-dir", tmp_path / "run", script=THIS) as ranks:
        result = ranks[1].wait(60)
    assert result.returncode == 2
    assert message in result.stderr


def test_ranks_with_different_batches_end_with_an_error(environment, tmp_path):
    with two_ranks(environment, "different", *ENDLESS, "--run-dir", tmp_path / "run", script=THIS) as ranks:
        results = [rank.wait(100) for rank in ranks]
    for result in results:
        assert result.returncode != 0
        assert "the ranks would train on different batches" in result.stderr


# ---------------------------------------------------------------------------- the script


def main(what: str, *arguments: str) -> None:
    """Be a rank that makes the updates of `CASES`, or one that trains with something wrong in it."""
    number = int(os.environ["RANK"])
    if what == "updates":
        torch.set_num_threads(1)
        rollout.start_ranks(Config(device="cpu"))
        folder = Path(arguments[0])
        found = {(kind, case): updates(folder / kind, case) for kind in ("tied", "untied") for case in CASES}
        torch.save(found, folder / f"rank_{number}.pt")
        return
    real_decode, real_advantages = rollout.HFEngine._decode, polaris_mini.set_advantages

    def slow_decode(*given: Any) -> Any:
        time.sleep(2)
        return real_decode(*given)

    def other_advantages(batch: Any, kind: Any) -> None:
        real_advantages(batch, kind)
        for group in batch[:1]:
            group.rollouts[0].advantage += 1e-7

    def fails(*given: object) -> None:
        raise (UserError if what == "user error" else ArithmeticError)("only on rank 1")

    if what == f"rank {number} is slow":
        rollout.HFEngine._decode = slow_decode  # type: ignore[method-assign]
    elif what == "different" and number == 1:
        polaris_mini.set_advantages = other_advantages
    elif what in ("user error", "any error") and number == 1:
        polaris_mini.batch_metrics = fails  # type: ignore[assignment]
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
