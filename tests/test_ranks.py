"""Two processes, one GPU each in earnest, here on the CPU: the same update, the same run, checkpoints for either.

This file is also the script that torchrun starts.
"""
from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import even_sums, lines, random_rollouts, tiny_model
from fast_start import ROOT
from safetensors.torch import load_file

import train
from polaris_mini import Config, Group, Problem

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL = ["--warmup-steps", "30", "--prompts-per-step", "7", "--group-size", "4", "--eval-problems", "9",
         "--eval-rollouts", "2", "--checkpoint-every", "2"]


def two_ranks(environment: dict[str, str], script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(script), *map(str, arguments)]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


# -------------------------------------------------------------------------- the update


def batches() -> list[list[Group]]:
    """Two batches whose groups have weights, and a rollout without advantage."""
    rollouts = random_rollouts(40, seed=1)
    rollouts[3].advantage = 0.0
    problem = Problem("p", "", ("1",))
    groups = [Group(problem, rollouts[i : i + 4], weight=1 + i % 3) for i in range(0, 40, 4)]
    return [groups[:5], groups[5:]]


CASES: dict[str, dict[str, Any]] = {
    "sharded": {}, "lora": {"lora_rank": 4}, "two updates": {"updates_per_batch": 2}, "corrected": {"mismatch": "tis"},
    "checkpointed": {"gradient_checkpointing": True}, "reset": {},
}


def updates(model: Path, case: str) -> dict[str, Any]:
    """Make an update with each batch; after each the optimizer is replaced by one from the gathered state."""
    config = Config(model=str(model), tokens_per_micro_batch=64, logprob_chunk_tokens=16, device="cpu", lr=1e-3,
                    **CASES[case])
    policy = train.load_policy(config, str(model), None, torch.device("cpu"))
    if train.rank_count() > 1 and config.lora_rank == 0:
        train.shard(policy, torch.device("cpu"))
    setup: Any = SimpleNamespace(policy=policy, optimizer=train.make_optimizer(policy, config),
                                 scaler=train.loss_scaler(config, torch.device("cpu")))
    results = []
    for groups in batches():
        state = [None]
        if train.leads():
            results.append(vars(train.update_policy(policy, setup.optimizer, setup.scaler, groups, 1.3, config)))
            if case == "reset":
                train.reset_optimizer(setup)
            state = [train.whole_state(setup)[1]]
            train.ask_ranks("end")
        else:
            train.follow(setup, config, train.Interrupt())
        if train.rank_count() > 1:
            torch.distributed.broadcast_object_list(state)
        setup.optimizer = train.make_optimizer(policy, config)
        train.load_optimizer(setup.optimizer, state[0], config)
    weights = {name: train._on_rank_0(weight) for name, weight in policy.state_dict().items()}
    return {"weights": weights, "results": results, "optimizer": state[0]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train.start_ranks(Config())
    found = {(kind, case): updates(folder / kind, case) for kind in ("tied", "untied") for case in CASES}
    if train.leads():
        torch.save(found, folder / f"ranks_{train.rank_count()}.pt")


@pytest.fixture(scope="module")
def updated(environment, tmp_path_factory) -> tuple[Path, dict, dict]:
    """Return the folder of the models, and what one and two ranks made of them."""
    folder = tmp_path_factory.mktemp("updated")
    for kind in ("tied", "untied"):
        tiny_model("qwen3", tied=kind == "tied").save_pretrained(folder / kind)
    main(folder)
    result = two_ranks(environment, Path(__file__), folder)
    assert result.returncode == 0, result.stderr
    return folder, torch.load(folder / "ranks_1.pt"), torch.load(folder / "ranks_2.pt")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_update_of_two_ranks_is_that_of_one(updated, kind, case):
    folder, one, two = updated[0], updated[1][kind, case], updated[2][kind, case]
    before = load_file(folder / kind / "model.safetensors")
    assert one["weights"].keys() == two["weights"].keys()
    tolerance = 1e-5 if case == "reset" else 1e-6  # Adam's first step makes much of a gradient's last digits
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], rtol=0, atol=tolerance), name
    trained = [name for name, weight in one["weights"].items() if name in before and not weight.equal(before[name])]
    assert bool(trained) == (case != "lora")
    assert case != "lora" or all(weight.any() for name, weight in one["weights"].items() if "lora_B" in name)
    for x, y in zip(one["results"], two["results"], strict=True):
        known = {name: value for name, value in x.items() if value is not None}
        assert known == pytest.approx({name: value for name, value in y.items() if value is not None}, rel=1e-4)
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, two["optimizer"]["state"][number][name], rtol=1e-4, atol=1e-6), (number, name)


def test_each_rank_packs_its_part_of_the_rows(monkeypatch):
    weighted = [(rollout, 1) for rollout in random_rollouts(9)]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    for tokens_per_row in (60, 1):  # 1: each rollout has a row of its own, and their number need not divide
        whole = train.pack(weighted, tokens_per_row)
        for count in (2, 3, 4):
            parts = []
            for rank in range(count):  # noqa: B007  get_rank reads it
                parts.append(train.pack(weighted, tokens_per_row, count))
            assert len({len(part) for part in parts}) == 1
            targets = sorted(t for part in parts for row in part for t in row.targets[row.weights > 0].tolist())
            assert targets == sorted(t for row in whole for t in row.targets.tolist())


# ---------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module", params=["hf", "vllm"])
def run_of_two(request, environment, tmp_path_factory) -> Path:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp(request.param)
    even = even_sums(folder / "even.jsonl", 60)
    result = two_ranks(environment, ROOT / "train.py", "--engine", request.param, *SMALL, "--data", even,
                       "--stages", "2:1.0:30", "2:1.0:40", "--run-dir", folder / "run")
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    return folder / "run"


def test_both_ranks_generate_and_one_writes(run_of_two):
    metrics, rollouts = lines(run_of_two / "metrics.jsonl"), lines(run_of_two / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for m in metrics:
        found = [r for r in rollouts if r["step"] == m["step"]]
        assert [r["id"] for r in found[::4]] == list(dict.fromkeys(r["id"] for r in found))
        assert len(found) == 7 * 4
        assert m["tokens/rollout"] == sum(r["tokens"] for r in found)
    updated = [m for m in metrics if m["policy/loss"] is not None]
    assert len(updated) >= 2
    assert all(m["mismatch/kl"] < 1e-6 and m["mismatch/ratio_max"] < 1.01 for m in updated)  # each with its own weights
    assert [e["problems"] for e in lines(run_of_two / "evaluations.jsonl")] == [9, 9]


@pytest.mark.parametrize("run_of_two", ["hf"], indirect=True)
def test_checkpoint_of_two_ranks_resumes_on_one_and_back(run_of_two, run_train, environment):
    folder, more = run_of_two, ["--resume", run_of_two]
    result = run_train(*more, "--steps", 6)
    assert result.returncode == 0, result.stderr
    result = two_ranks(environment, ROOT / "train.py", *more, "--steps", 8)
    assert result.returncode == 0, result.stderr
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == list(range(1, 9))
    state = torch.load(folder / "checkpoints" / "step_000008" / "trainer_state.pt", weights_only=True)
    updated = sum(m["policy/loss"] is not None for m in lines(folder / "metrics.jsonl"))
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {updated}  # Adam's count went along


def test_ctrl_c_ends_all_ranks_with_a_checkpoint(environment, tmp_path):
    command = [*TORCHRUN, str(ROOT / "train.py"), *SMALL, "--stages", "500:1.0:40", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == ["3"]:  # the row of step 3
            process.send_signal(signal.SIGINT)
            break
    shown, errors = process.communicate(timeout=60)
    assert "go on with: python train.py --resume" in shown, errors
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 3 <= last < 500
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}").is_dir()


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("option", "message"), [
    (["--optimizer", "adamw8bit"], "optimizer is adamw8bit"), (["--offload-optimizer"], "offload_optimizer is True"),
    (["--trained-weights", "bfloat16"], "trained_weights is bfloat16"),
])  # fmt: skip
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(
    environment, run_train, monkeypatch, option, message
):
    monkeypatch.setitem(environment, "WORLD_SIZE", "3")
    result = run_train(*option)
    assert result.returncode == 2
    assert f"{message}: it is not made for weights that are sharded" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_waits_for_what_other_ranks_take_part_in_and_a_second_one_is_never_swallowed(monkeypatch):
    handlers: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))
    interrupt = train.Interrupt()
    interrupt.finish_steps = True
    ctrl_c = functools.partial(handlers[0], signal.SIGINT, None)
    reached = []
    with interrupt.may_drop_step():
        with interrupt.must_finish():
            ctrl_c()
            reached.append("end of the shared part")
        reached.append("rest of the block")
    assert reached == ["end of the shared part"]
    assert interrupt.requested
    ctrl_c()  # at once: the same one, which the process and its group were sent
    interrupt._came -= 1
    with pytest.raises(KeyboardInterrupt), interrupt.may_drop_step():
        ctrl_c()


def test_other_commands_run_on_one_gpu(environment, run_train, monkeypatch, tmp_path):
    monkeypatch.setitem(environment, "WORLD_SIZE", "2")
    for script, *command in (["evaluate.py", "eval"], ["evaluate.py", "measure"], ["ablate.py"], ["export_verl.py"]):
        result = run_train(*command, "--out", tmp_path / "out", script=f"tools/{script}")
        assert result.returncode == 2
        assert "start it with python" in result.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
