"""docs/change.md: each change of one mechanism, applied to a copy and run; docs/walkthrough.md, computed again."""
from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import lines
from fast_start import ROOT, start_server

import walkthrough

PAGE = (ROOT / "docs" / "change.md").read_text()
CHANGES = re.findall(r"```diff\n(.*?)```\n\n```bash\npython train.py (.*?)\n```", PAGE, re.DOTALL)


def train_changed(folder: Path, options: list[str], errors: Path) -> None:
    """Train with the modules of a folder; this process is a fork of one that has imported torch and the others."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    for module in ("polaris_mini", "reward", "data", "rollout", "train"):
        sys.modules.pop(module, None)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import train

    train.main(options)


@pytest.mark.parametrize(("change", "options"), CHANGES,
                         ids=["reward", "core", "temperature", "advantage", "mismatch", "8bit"])
def test_change_applies_and_runs(change, options, environment, tmp_path):
    changed = [line for line in change.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert 1 <= len(changed) < 15
    copy = tmp_path / "copy"
    copy.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, copy)
    (copy / "tools").symlink_to(ROOT / "tools")  # for the toy world
    (tmp_path / "change.patch").write_text(change)
    subprocess.run(["git", "apply", "../change.patch"], cwd=copy, check=True)
    start_server(environment)
    process = multiprocessing.get_context("forkserver").Process(
        target=train_changed, args=(copy, [*options.split(), "--run-dir", "run"], tmp_path / "errors"))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    rollouts = lines(copy / "run" / "rollouts.jsonl")
    if "core_rewards" in change:
        assert any(0 < line["reward"] < 0.5 for line in rollouts)
    if "close:score" in options:
        assert {line["reward"] for line in rollouts} == {0.0, 0.5, 1.0}
    if "auto" in options:
        (probe,) = lines(copy / "run" / "probes.jsonl")
        near = [float(t) for t, found in probe["accuracy"].items() if found >= 0.9 * max(probe["accuracy"].values())]
        assert probe["chosen"] == max(near)
    if "rloo" in options:
        compared = 0
        for _, group in groupby(rollouts, lambda line: (line["step"], line["id"])):
            group = list(group)
            rewards = [line["reward"] for line in group]
            if group[0]["weight"] == 0 or any(line["rescued"] for line in group):
                continue
            for i, line in enumerate(group):
                others = statistics.fmean(rewards[:i] + rewards[i + 1 :])
                assert line["advantage"] == pytest.approx(line["reward"] - others)
                compared += line["advantage"] != 0
        assert compared
    if "float8" in change:
        assert all(1e-5 < line["mismatch/kl"] < 1e-2 for line in lines(copy / "run" / "metrics.jsonl"))
    if "icepop" in options:
        specification = importlib.util.spec_from_file_location("changed", copy / "polaris_mini.py")
        module = sys.modules["changed"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        ratios = torch.tensor([0.1, 0.6, 1.0, 1.9, 2.1])
        weights = module.icepop_ratio(ratios.log(), torch.zeros(5))
        torch.testing.assert_close(weights, torch.tensor([0.0, 0.6, 1.0, 1.9, 0.0]))


def test_six_changes_are_shown():
    assert len(CHANGES) == 6


def test_walkthrough_is_what_its_tool_writes(capsys):
    """Its words and its code, at least: another processor has other last digits, and then other responses."""
    walkthrough.walk(walkthrough.PRESETS["toy"])

    def fixed(text: str) -> list[str]:
        return [*re.findall(r"^#.*|^\| \w.*\|(?=\n\| ---)", text, re.MULTILINE),
                *re.findall(r"```python\n.*?```", text, re.DOTALL)]

    shown = fixed(capsys.readouterr().out)
    assert shown == fixed((ROOT / "docs" / "walkthrough.md").read_text())
    assert len(shown) == 11
