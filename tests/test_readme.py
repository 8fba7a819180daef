"""Every command of the README, run as it stands there but for the names of files and what makes it short."""
from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import even_sums
from fast_start import ROOT
from soak import make_world

import data
from difficulty import write_problems

README = (ROOT / "README.md").read_text()
SHORT = "--model model --data sums.jsonl --eval-problems 4 --steps 1 --group-size 2 --prompts-per-step 4"
# The first that a command begins with: what is added to it, or where else it is run.
HERE = {
    "train.py --help": "",
    "tools/plan.py": "",
    "tools/report.py": "",
    "train.py --resume": "--steps 3 --eval-problems 4",
    "tools/export_verl.py": "--eval-problems 4 --prompts-per-step 8",
    "tools/ablate.py": "tests/test_ablation.py",
    "train.py --reward close": "tests/test_changes.py",
    "train.py --temperature auto": "tests/test_changes.py",
    "train.py --advantage rloo": "tests/test_changes.py",
    "train.py --preset": SHORT,
    "train.py --model": "--eval-problems 4 --steps 1 --group-size 2 --prompts-per-step 4",
    "train.py": "--warmup-steps 5 --eval-problems 4 --steps 2 --prompts-per-step 4 --run-dir runs/NAME",
    "torchrun": f"{SHORT} --optimizer adamw --device cpu",
    "tools/evaluate.py measure": "--max-response-tokens 128",
    "tools/difficulty.py": "",
    "tools/evaluate.py probe": "--problems 8 --temperatures 0.8,1.0 --rollouts 4 --reward coin:score",
    "tools/evaluate.py eval": "--rollouts 2 --max-response-tokens 64",
    "reward.py FILE.jsonl --reward": "tests/test_reward.py",
    "reward.py": "",
}
BY_HAND = ("pip install", "-m pytest", "tests/benchmark.py engines", "torchrun --shutdown-timeout 600")
NAMES = {"MODEL": "model", "Qwen/Qwen3-1.7B": "model", "DATA": "sums.jsonl", "RUN": "runs/NAME", "[RUN...]": "",
         "countdown.jsonl": "sums.jsonl", "countdown:score": "coin:score"}


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands() -> list[str]:
    """Return the README's commands in their order: lines of bash blocks, then those within sentences."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        lines = re.sub(r"\s*\\\n\s*|(?<=&&)\n\s*", " ", block).splitlines()
        found += [line.partition(" #")[0].split(" && ")[-1].strip() for line in lines]
    prose = without_blocks(README)
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)
              if re.match(r"(python3?|torchrun|pip)\s", code)]
    return list(dict.fromkeys(re.sub(r"^(\.venv/bin/)?python3? ", "", command) for command in found))


def test_every_command_of_the_readme_runs(run_train, environment, tmp_path):
    make_world(tmp_path)
    even_sums(tmp_path / "sums.jsonl", 40)
    for name in ("aime24", "aime25"):
        write_problems(data.toy_problems(4, name), tmp_path / f"{name}.parquet")
    (tmp_path / "FILE.jsonl").write_text(json.dumps({"response": r"</think> \boxed{1}", "answer": "1"}) + "\n")
    missing, ran = [], []
    for command in commands():
        if command.startswith(BY_HAND) or any(done.startswith(f"{command} ") for done in ran):
            continue  # in a sentence that only names it
        begin = next((begin for begin in HERE if command.startswith(begin)), None)
        if begin is None:
            missing.append(command)
            continue
        if (added := HERE[begin]).startswith("tests/"):
            assert (ROOT / added).is_file()
            continue
        words = [NAMES.get(word, word) for word in shlex.split(command)]
        words = [word for word in [*words, *added.split()] if word]
        if words[0] == "torchrun":
            words = [ROOT / word if word == "train.py" else word for word in words]
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            ended = subprocess.run(words, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True,
                                   text=True, check=False)
        else:
            ended = run_train(*words[1:], script=words[0], cwd=tmp_path)
        assert ended.returncode == 0, f"{command}\n{words}\n{ended.stderr}"
        ran.append(command)
    assert not missing, "commands of the README that no test runs: add them to HERE"
    assert len(ran) >= 16


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = without_blocks((ROOT / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {link}"
