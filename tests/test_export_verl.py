"""What is handed over to verl: its settings, the order of its runs, the data, the gradient."""
from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import random
import re
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import even_sums
from fast_start import ROOT
from transformers import TrainingArguments

import data
import export_verl
from polaris_mini import Config, Group, Problem, Rollout, UserError, policy_loss, set_advantages, substitute

STAGES = "450:1.4:39936 150:1.45:48128:reset"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    even_sums(folder / "sums.jsonl", 40)
    with contextlib.chdir(folder):
        export_verl.main([
            "--preset", "polaris-4b", "--data", "sums.jsonl", "--eval-problems", "8", "--prompts-per-step", "16",
            "--prompt-suffix", "Box it.", "--out", "to/verl", "--gpus", "4", "--stages", *STAGES.split(),
        ])
    return folder / "to" / "verl"


def verl_commands(folder: Path, tmp_path: Path, *more: str) -> list[list[str]]:
    """Run run.sh with a python3 that notes what it is asked to do, and return each command's overrides."""
    noted = tmp_path / "noted"
    noted.unlink(missing_ok=True)
    (tmp_path / "python3").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" END >> {noted}\n')
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([folder / "run.sh", *more], env=environment, check=True)
    commands = [command.strip("\n").split("\n") for command in noted.read_text().split("END\n")[:-1]]
    assert all(command[:2] == ["-m", "verl.trainer.main_ppo"] for command in commands)
    return [command[2:] for command in commands]


@pytest.fixture(scope="module")
def verl_settings():
    """verl's own table of its settings, from the installed package."""
    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:  # tools/verl looks like a package of this name
        pytest.skip("verl is not installed")
    (package,) = found.submodule_search_locations
    return yaml.safe_load((Path(package) / "trainer/config/_generated_ppo_trainer.yaml").read_text())


def setting(settings: dict, name: str) -> object:
    for part in name.split("."):
        assert part in settings, f"verl has no {name}: {part} is none of {', '.join(settings)}"
        settings = settings[part]
    return settings


def test_every_override_is_a_setting_of_verl(exported, verl_settings, tmp_path):
    commands = verl_commands(exported, tmp_path)
    assert len(commands) == 2
    for overrides in commands:
        assert len(overrides) > 60
        for override in overrides:
            name, value = override.split("=", 1)
            if name.startswith("+"):
                *parents, new = name[1:].split(".")
                while isinstance(parents, list) and parents[-1] in ("reward_kwargs", "hf_overrides", "env_vars"):
                    parents.pop()
                assert new not in setting(verl_settings, ".".join(parents))
                continue
            default = setting(verl_settings, name)
            value = yaml.safe_load(value)
            if isinstance(default, bool) or isinstance(value, bool):
                assert type(value) is type(default), override
            elif isinstance(default, (int, float)):
                assert isinstance(float(value), float), override


def test_the_environment_has_what_the_copies_import(exported):
    text = (exported / "run.sh").read_text()
    copies = [*exported.glob("*.py")]
    texts = [path.read_text() for path in copies]
    found = {name for copy in texts for name in re.findall(r"^ *(?:import|from) (\w+)", copy, re.MULTILINE)}
    others = found - sys.stdlib_module_names - {path.stem for path in copies} - {"numpy", "sympy", "torch", "verl"}
    assert others == {"math_verify", "tyro"}  # verl brings the four
    for name in others:
        assert re.search(rf'pip install .*{name.replace("_", "-")}[\[=]', text)


def test_stages_are_runs_one_after_the_other(exported, tmp_path):
    first, second = (dict(override.split("=", 1) for override in command) for command in
                     verl_commands(exported, tmp_path, "trainer.nnodes=2"))
    for command, steps, temperature, tokens in ((first, 450, 1.4, 39936), (second, 600, 1.45, 48128)):
        assert int(command["trainer.total_training_steps"]) == steps
        assert float(command["actor_rollout_ref.rollout.temperature"]) == temperature
        assert int(command["data.max_response_length"]) == tokens
        assert int(command["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"]) == tokens + 1024
        assert command["trainer.nnodes"] == "2"  # given to run.sh, over the exported one
        assert command["+actor_rollout_ref.model.override_config.max_position_embeddings"] == "49152"
    assert first["trainer.n_gpus_per_node"] == "4"
    assert float(first["actor_rollout_ref.actor.clip_ratio_high"]) == 0.28
    assert first["trainer.val_before_train"] == "True"
    assert first["+ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH"].split(":")[0] == str(exported)
    load = "actor_rollout_ref.actor.checkpoint.load_contents"
    assert load not in second  # as nothing is saved yet
    for saved, stages, reset in ((449, 2, False), (450, 1, True), (460, 1, False), (599, 1, False)):
        (exported / "checkpoints").mkdir(exist_ok=True)
        (exported / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(saved))
        commands = verl_commands(exported, tmp_path)
        assert len(commands) == stages
        assert any(load in override for override in commands[-1]) == reset
        assert "trainer.val_before_train=False" in commands[0]  # the stage before has evaluated at its end


def test_verl_reads_the_same_problems_with_whole_prompts(exported):
    from pyarrow import parquet

    rows = parquet.read_table(exported / "train.parquet").to_pylist()
    source = {p.id: p for p in data.load_problems(str(exported.parents[1] / "sums.jsonl"))}
    assert len(rows) == 32
    for row in rows:
        problem = source[row["extra_info"]["index"]]
        assert row["prompt"] == [{"role": "user", "content": f"{problem.text} Box it."}]
        assert tuple(row["reward_model"]["ground_truth"]) == problem.answers
    held_out = {row["extra_info"]["index"] for row in parquet.read_table(exported / "val.parquet").to_pylist()}
    assert len(held_out) == 8
    assert not held_out & {row["extra_info"]["index"] for row in rows}


@pytest.fixture
def hooks(exported, monkeypatch):
    """The exported module. It needs only a decorator of verl, whose import takes more than is installed here."""
    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.register_adv_est = lambda name: lambda function: function
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    specification = importlib.util.spec_from_file_location("polaris_verl", exported / "polaris_verl.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rates", [[.5, .25, .75, .5, 1, 0], [.5, .5, 0, 0, 0], [.5, 0, 0]])
def test_gradient_on_verl_is_that_of_substitution(hooks, rates):
    rng, size, longest = random.Random(1), 4, 9
    rows = [(f"p{i}", float(j < rate * size), rng.randint(1, longest)) for i, rate in enumerate(rates)
            for j in range(size)]
    rows += [("filling", 0.0, 0)] * 2
    rng.shuffle(rows)  # verl balances its GPUs, so a group's rows are not side by side
    mask = torch.tensor([[1.0] * length + [0.0] * (longest - length) for _, _, length in rows])
    rewards = torch.zeros(mask.shape)
    for row, (_, reward, length) in enumerate(rows):
        rewards[row, max(length - 1, 0)] = reward
    config = types.SimpleNamespace(norm_adv_by_std_in_grpo=True)
    advantages, _ = hooks.polaris_advantages(
        token_level_rewards=rewards, response_mask=mask, index=[name for name, _, _ in rows], config=config)
    clip = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    torch.manual_seed(0)
    old = torch.randn(mask.shape)
    moved = old + 0.3 * torch.randn(mask.shape)  # far enough for every clip to act

    on_verl = moved.clone().requires_grad_()
    losses, _ = policy_loss(on_verl, old, advantages, **clip)
    ((losses * mask).sum() / mask.sum()).backward()  # loss_agg_mode=token-mean

    groups: dict[str, Group] = {}
    for row, (name, reward, length) in enumerate(rows):
        if name == "filling":
            continue
        group = groups.setdefault(name, Group(Problem(name, "", ()), []))
        group.rollouts.append(Rollout(str(row), (), [0] * length, [], "", "stop", reward))
    batch = substitute(list(groups.values()), random.Random(0))
    set_advantages(batch)
    tokens = sum(group.places * len(rollout.response_tokens) for group in batch for rollout in group.rollouts)
    ours = moved.clone().requires_grad_()
    for group in batch:
        for rollout in group.rollouts:
            part = (int(rollout.problem_id), slice(len(rollout.response_tokens)))
            losses, _ = policy_loss(ours[part], old[part], torch.tensor(rollout.advantage), **clip)
            (group.places * losses.sum() / tokens).backward()
    expected = torch.zeros_like(old) if ours.grad is None else ours.grad
    assert (len(batch) > 0) == (rates != [.5, 0, 0])
    torch.testing.assert_close(on_verl.grad, expected)


def test_reward_on_verl_is_the_graders(hooks):
    def score(response: str, truth: object, require_think: bool) -> float:
        return hooks.compute_score("", response, truth, {}, require_think=require_think, timeout=10.0)

    try:
        assert score(r"<think>a</think> \boxed{\frac12}", ["3", "0.5"], True) == 1.0
        assert score(r"\boxed{\frac12}", "0.5", True) == 0.0
        assert score(r"\boxed{\frac12}", "0.5", False) == 1.0
    finally:
        for require_think in (True, False):
            hooks._pool(require_think, 10.0).close()


def test_what_verl_would_do_otherwise_is_refused_or_said(tmp_path, capsys):
    even_sums(tmp_path / "sums.jsonl", 40)
    base = ["--preset", "polaris-4b", "--data", str(tmp_path / "sums.jsonl"), "--eval-every", "-1", "--out",
            str(tmp_path / "out"), "--prompts-per-step", "16"]
    for options, message in (
        (["--reward", "close:score"], "name a function of verl's form"), (["--temperature", "auto"], "stage 1 is auto"),
        (["--updates-per-batch", "3"], "it must divide"), (["--gpus", "0"], "gpus is 0"),
    ):
        with pytest.raises(UserError, match=message):
            export_verl.main([*base, *options])
    export_verl.main([*base, "--optimizer", "paged_adamw8bit", "--quantize-base", "--lora-rank", "8", "--no-rescue"])
    shown = capsys.readouterr().out
    assert "4-bit base weights" in shown
    assert "Rescue" not in shown
    overrides = (tmp_path / "out" / "run.sh").read_text()
    assert "optim.optimizer=AdamW8bit" in overrides
    assert "optimizer_offload=True" in overrides


def test_names_in_the_table_exist(verl_settings):
    ours = {field.name for field in fields(Config)}
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("trl is not installed")
    trainer = Path(found.submodule_search_locations[0]) / "trainer"
    nodes = [node for file in ("grpo_config.py", "grpo_trainer.py")
             for node in ast.walk(ast.parse((trainer / file).read_text()))]
    trl = {field.name for field in fields(TrainingArguments)} | {
        node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    table = [line.strip("|").split("|") for line in (ROOT / "docs/coming_from_elsewhere.md").read_text().splitlines()
             if line.count("|") == 5][2:]
    assert len(table) > 35
    for row in table:
        for option in re.findall(r"`--([\w-]+)", row[0]):
            assert option.removeprefix("no-").replace("-", "_") in ours, option
        for name in re.findall(r"`([a-z_]+\.[\w.]+)", row[1]):
            setting(verl_settings, name)
        for name in re.findall(r"`(\w+)[=`]", row[3]):
            assert name in (arguments if "*argument*" in row[3] else trl), name
