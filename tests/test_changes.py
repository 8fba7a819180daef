"""The README's examples of how to change one mechanism, applied to a copy and run."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from conftest import lines
from fast_start import ROOT

README = (ROOT / "README.md").read_text()
CHANGES = re.findall(r"```diff\n(.*?)```\n\n```bash\npython train.py (.*?)\n```", README, re.DOTALL)
WARMUP = ["--warmup-steps", "200"]
SMALL = [*WARMUP, "--group-size", "4", "--max-response-tokens", "80", "--probe-problems", "8"]


@pytest.mark.parametrize(("change", "options"), CHANGES, ids=["reward", "temperature", "advantage"])
def test_change_of_the_readme_applies_and_runs(change, options, environment, tmp_path):
    changed = [line for line in change.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert 1 <= len(changed) < 15
    copy = tmp_path / "copy"
    copy.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, copy)
    (tmp_path / "change.patch").write_text(change)
    subprocess.run(["git", "apply", "--unidiff-zero", "../change.patch"], cwd=copy, check=True)
    command = [sys.executable, "train.py", *options.split(), *SMALL, "--run-dir", "run"]
    ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    rollouts = lines(copy / "run" / "rollouts.jsonl")
    if "close:score" in options:
        assert {line["reward"] for line in rollouts} == {0.0, 0.5, 1.0}
    if "auto" in options:
        (probe,) = lines(copy / "run" / "probes.jsonl")
        near = [float(t) for t, found in probe["accuracy"].items() if found >= 0.9 * max(probe["accuracy"].values())]
        assert probe["chosen"] == max(near)
    if "rloo" in options:
        assert any(line["advantage"] == pytest.approx(-1 / 3) for line in rollouts)  # one of four was right


def test_three_changes_are_shown():
    assert len(CHANGES) == 3


def test_walkthrough_is_what_its_command_prints(environment):
    """Its words, at least: another processor has other last digits, and then other responses."""
    command = [sys.executable, ROOT / "tools" / "walkthrough.py", *WARMUP]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def headings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("#", "| token", "|  | response"))]

    assert headings(shown) == headings((ROOT / "docs" / "walkthrough.md").read_text())
    assert len(headings(shown)) == 11
