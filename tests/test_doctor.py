"""The doctor on a CPU: what it finds on a machine that works, and on one that does not."""
from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from fast_start import ROOT

import doctor
import train
from rollout import HFEngine

NO_GPU = ["--device", "cpu", "--shape", "tiny"]


@pytest.fixture
def diagnosed(capfd):
    """Return a function that runs the doctor, and gives its exit code and its rows by name."""
    def call(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
        code = doctor.main([*NO_GPU, "--engine", "hf", "--json", *arguments])
        return code, {row["name"]: row for row in json.loads(capfd.readouterr().out)}

    return call


def names_with(status: str, rows: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["status"] == status}


def test_a_machine_that_works_is_ok_and_what_needs_a_gpu_is_not_checked(diagnosed):
    code, rows = diagnosed()
    assert code == 0
    assert {"attention varlen", "full: memory", "lora: memory"} <= names_with("not checked", rows)
    assert names_with("not checked", rows) <= {"driver", "compiler", "GPU", "attention varlen", "attention flash_attn",
                                               "full: memory", "lora: memory"}
    assert {"packages", "CPU memory", "attention sdpa", "hf: log-probs", "hf: sync of weights", "full: sync of weights",
            "full: two steps", "full: speed", "lora: sync of weights", "lora: two steps",
            "lora: speed"} <= names_with("ok", rows)
    assert torch.__version__ in rows["driver"]["measured"]


def test_wrong_attention_is_found_wherever_it_shows(diagnosed, monkeypatch):
    """Heads are exchanged: attention and the trainer's log-probs are wrong, the engine's are not."""
    right = train.packed_attention

    def wrong(module: Any, query: torch.Tensor, *others: Any, **named: Any) -> tuple[torch.Tensor, None]:
        return right(module, query.flip(1), *others, **named)

    monkeypatch.setattr(train, "packed_attention", wrong)
    monkeypatch.setitem(train.AttentionInterface._global_mapping, "packed", wrong)
    code, rows = diagnosed("--only", "attention", "hf")
    assert code == 1
    assert {"attention sdpa", "hf: log-probs"} <= names_with("wrong", rows)
    assert all(rows[name]["advice"] for name in names_with("wrong", rows))


def test_weights_that_do_not_reach_the_engine_are_found(diagnosed, monkeypatch):
    first: list[torch.nn.Module] = []

    def wake(engine: HFEngine, policy: torch.nn.Module) -> None:
        first.append(copy.deepcopy(policy))
        engine.policy = first[0]

    monkeypatch.setattr(HFEngine, "wake", wake)
    code, rows = diagnosed("--only", "hf")
    assert code == 1
    assert rows["hf: sync of weights"]["status"] == "wrong"
    assert "do not reach the engine" in rows["hf: sync of weights"]["advice"]


def test_a_check_that_raises_is_a_row_and_the_others_run(diagnosed, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(train, "make_optimizer", broken)
    code, rows = diagnosed("--only", "full", "lora")
    assert code == 1
    assert names_with("wrong", rows) == {"full: two steps", "lora: two steps"}
    assert rows["full: two steps"]["measured"] == "RuntimeError: CUDA error: no kernel image is available"
    assert "lora: log-probs" in names_with("ok", rows)


def test_the_table_has_the_rows_and_says_what_to_do(capfd, monkeypatch):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: "/nowhere")
    assert doctor.main([*NO_GPU, "--only", "surroundings", "attention"]) == 0
    shown = capfd.readouterr().out
    assert "compiler               not checked" in shown  # only a GPU needs it
    assert "no /nowhere/Python.h" in shown
    assert doctor.table_lines(doctor.Row("name", "wrong", "1 (limit 2)", "do this"))[1].strip() == "-> do this"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_is_checked_too():
    """In a process of its own, where vLLM takes it over and prints what it likes."""
    command = [sys.executable, "tools/doctor.py", *NO_GPU, "--only", "full", "lora", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row["name"]: row for row in json.loads(ended.stdout)}
    assert names_with("not checked", rows) == {"full: sleep", "full: memory", "lora: sleep", "lora: memory"}
    assert {"full: vllm starts", "lora: vllm starts", "lora: sync of weights"} <= names_with("ok", rows)
