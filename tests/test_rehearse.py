"""The rehearsal on a CPU: every phase runs, no weight changes, and memory that runs out is told with what helps."""
from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import rehearse
import train
from plan import GIB
from polaris_mini import PRESETS, UserError, read_config

SMALL = ["--model", PRESETS["toy"].model, "--device", "cpu", "--engine", "hf", "--max-prompt-tokens", "8",
         "--max-response-tokens", "24", "--tokens-per-micro-batch", "100", "--prompts-per-step", "4",
         "--group-size", "2"]  # fmt: skip


@pytest.fixture
def policies(monkeypatch) -> list[tuple[torch.nn.Module, list[torch.Tensor]]]:
    """Return a list that gets each policy that is loaded, with a copy of its weights."""
    loaded, load = [], rehearse.load_policy

    def load_and_keep(*arguments: object) -> torch.nn.Module:
        policy = load(*arguments)
        loaded.append((policy, [parameter.detach().clone() for parameter in policy.parameters()]))
        return policy

    monkeypatch.setattr(rehearse, "load_policy", load_and_keep)
    return loaded


@pytest.mark.parametrize("options", [[], ["--lora-rank", "4", "--weight-decay", "0.1", "--dtype", "bfloat16"]], ids=str)
def test_all_phases_run_and_no_weight_changes(options, policies, capsys):
    assert rehearse.main([*SMALL, *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    phases = [line.split("  ")[0] for line in shown if "not measured" in line and not line.startswith("fits")]
    assert phases == ["model loads", "engine starts", *rehearse.UPDATE, "weight sync", "rollout", "sleep",
                      *rehearse.UPDATE, "engine ends"]  # fmt: skip
    planned = {line.split("  ")[0] for line in shown if re.match(r"[a-z -]{14} +\d+\.\d\d +not measured", line)}
    assert planned == {"weight sync", "rollout", "log-probs", "backward", "optimizer step"}
    assert shown[-1].startswith("fits: ")
    ((policy, before),) = policies
    for parameter, kept in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter.view(torch.uint8), kept.view(torch.uint8))


@pytest.mark.parametrize(("options", "lengths"), [
    ("--max-prompt-tokens 8 --max-response-tokens 24 --tokens-per-micro-batch 10", [31]),
    ("--max-prompt-tokens 8 --max-response-tokens 24 --tokens-per-micro-batch 100", [31, 31, 31, 7]),
    ("--max-prompt-tokens 80 --max-response-tokens 1 --tokens-per-micro-batch 100", [80, 20]),
    ("--max-prompt-tokens 8 --max-response-tokens 24 --prompts-per-step 1 --group-size 2", [31, 31]),
])  # fmt: skip
def test_the_row_is_the_longest_that_these_options_allow(options, lengths):
    config = read_config(["--data", "unread", *options.split()])
    row = rehearse.longest_row(config, torch.device("cpu"), 50)
    assert row.sequence_lengths == lengths
    assert row.input_ids.shape == (1, sum(lengths))
    assert len(row.targets) == sum(min(length, config.longest_response) for length in lengths)
    assert row.advantages.unique().tolist() == [1.0]
    assert row.loss_weights.unique().tolist() == [0.0]


@pytest.mark.parametrize(("place", "phase", "name"), [
    (train, "forward", "forward_row"), (rehearse.HFEngine, "rollout", "generate"),
    (train, "optimizer step", "apply_gradient"), (rehearse, "engine starts", "HFEngine"),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_that_says_where_and_what_helps(place, phase, name, monkeypatch, capsys):
    right = getattr(place, name)

    def fails(*arguments: object) -> object:
        if not torch.is_grad_enabled():  # the check at the start, of a few tokens
            return right(*arguments)
        if phase == "engine starts":
            raise UserError("engine is vllm: it does not start with M (CUDA out of memory.): give --engine hf")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(place, name, fails)
    assert rehearse.main(SMALL) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert f"memory ran out in {phase}; give --" in line


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(train, "forward_row", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rehearse.main(SMALL)


def test_a_weight_that_changes_is_an_error(monkeypatch):
    right: Callable[..., float] = train.apply_gradient

    def moves_one(policy: torch.nn.Module, *others: object) -> float:
        with torch.no_grad():
            next(policy.parameters())[0, 0] += 1e-3
        return right(policy, *others)

    monkeypatch.setattr(train, "apply_gradient", moves_one)
    with pytest.raises(RuntimeError, match="weights have changed"):
        rehearse.main(SMALL)


@pytest.mark.parametrize(("options", "phase", "card", "expected"), [
    ("--preset rtx-24gb", "forward", 24, "--offload-activations (copies to and from CPU memory)"),
    ("--preset rtx-24gb --no-offload-policy", "rollout", 24, "--offload-policy (copies to and from CPU memory, once a "
                                                             "step)"),
    ("--preset polaris-1.7b --max-response-tokens 8192 --engine hf", "rollout", 80,
     "--rollouts-per-batch 16 (slower, and other responses are drawn)"),
])  # fmt: skip
def test_advice_makes_the_phase_smaller_that_ran_out(options, phase, card, expected):
    """Also where the plan said that all of it fits."""
    config = read_config(["--data", "unread", "--engine", "vllm", *options.split()])
    assert rehearse.advice(config, phase, card * GIB) == expected
