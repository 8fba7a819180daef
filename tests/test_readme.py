"""Every command of README.md and docs/, run as it stands there but for the names of files and what makes it short."""
from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex

import pytest
from conftest import even_sums
from fast_start import ROOT

import toy
import train
from difficulty import write_problems
from polaris_mini import PRESETS, read_config

PAGES = {f"{path.relative_to(ROOT)}": path.read_text() for path in [
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
MODEL = PRESETS["toy"].model
SHORT = ("--data sums.jsonl --eval-problems 4 --eval-rollouts 1 --steps 1 --group-size 2 --prompts-per-step 4 "
         "--max-response-tokens 40 --reward-workers 1")
# The first that a command begins with: what is added to it, or which test runs it.
HERE = {
    "train.py --help": "",
    "train.py --reward close": "tests/test_changes.py",
    "train.py --steps 3": "tests/test_changes.py",
    "train.py --temperature auto": "tests/test_changes.py",
    "train.py --advantage rloo": "tests/test_changes.py",
    "train.py --mismatch": "tests/test_changes.py",
    "train.py --resume": "--steps 3",
    "train.py --preset": f"{SHORT} --model {MODEL}",
    "train.py --model": SHORT,
    "train.py": "--steps 2 --prompts-per-step 4 --group-size 2 --eval-rollouts 1 --run-dir runs/NAME",
    "torchrun --nproc_per_node 2 train.py": "tests/test_ranks.py",
    "tools/plan.py": "",
    "tools/report.py": "",
    "tools/export_verl.py": "--eval-problems 4 --prompts-per-step 8",
    "tools/ablate.py": "tests/test_ablation.py",
    "tools/doctor.py": "tests/test_doctor.py",
    "tools/rehearse.py": "tests/test_rehearse.py",
    "tools/walkthrough.py": "tests/test_changes.py",
    "tools/toy.py": "tests/test_toy.py",
    "tools/track.py": "tests/test_track.py",
    "tools/warmup.py": "--steps 1 --batch 2",
    "tools/grade.py": "",
    "tools/evaluate.py measure": "--rollouts 2 --problems 8 --max-response-tokens 40 --prompt-suffix ''",
    "tools/difficulty.py": "",
    "tools/evaluate.py probe": "--problems 8 --rollouts 2 --temperatures 0.8,1.0 --max-response-tokens 99 "
                               "--prompt-suffix ''",
    "tools/evaluate.py eval": "--rollouts 2 --max-response-tokens 32",
}  # fmt: skip
BY_HAND = {
    "pip install": "it changes the environment",
    "-m pytest": "it is what runs this",
    "tests/benchmark": "minutes, and its numbers are for people",
    "tests/soak.py": "hours",
    "torchrun --shutdown-timeout": "an option in a sentence, without a script",
}
NAMES = {"MODEL": MODEL, "Qwen/Qwen3-1.7B": MODEL, "DATA": "sums.jsonl", "RUN": "runs/NAME", "FOLDER": "warm",
         "FILE": "examples.jsonl", "countdown.jsonl": "sums.jsonl", "countdown:score": "coin:score"}


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands() -> list[str]:
    """Return the commands in their order: of each page the lines of bash blocks, then those within sentences.

    A command in a sentence that is the beginning of another one only names it.
    """
    found, named = [], []
    for text in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = re.sub(r"\s*\\\n\s*|(?<=&&)\n\s*", " ", block).splitlines()
            found += [line.partition(" #")[0].split(" && ")[-1].strip() for line in lines]
        named += [" ".join(part.split()) for code in re.findall(r"`([^`]+)`", without_blocks(text))
                  for part in code.split(";") if re.match(r"\s*(python3?|torchrun|pip)\s", part)]
    found, named = ([re.sub(r"^(\.venv/bin/)?python3? ", "", command) for command in commands if command]
                    for commands in (found, named))
    found += [name for name in named if not any(other.startswith(f"{name} ") for other in [*found, *named])]
    return [command for command in dict.fromkeys(found) if not command.startswith(tuple(BY_HAND))]


def test_every_command_runs(run_train, tmp_path):
    even_sums(tmp_path / "sums.jsonl", 40)
    for name in ("aime24", "aime25"):
        write_problems(toy.toy_problems(2, name), tmp_path / f"{name}.parquet")
    example = {"problem": "1 + 2", "response": "1 + 2 = 3\n</think>\n\\boxed{3}", "answer": "3"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n")
    (tmp_path / "coin.py").write_text("def score(response, answer, problem):\n    return len(response) % 2\n")
    failed, ran = {}, 0
    for command in commands():
        begin = next((begin for begin in HERE if command.startswith(begin)), None)
        if begin is None:
            failed[command] = "no test runs this command: add it to HERE"
        elif (added := HERE[begin]).startswith("tests/"):
            assert (ROOT / added).is_file()
        else:
            script, *words = [NAMES.get(word, word) for word in shlex.split(command)] + shlex.split(added)
            ended = run_train(*words, script=script, cwd=tmp_path)
            ran += 1
            if ended.returncode != 0:
                failed[command] = ended.stderr[-2000:]
    assert not failed, "\n\n".join(f"{command}\n{reason}" for command, reason in failed.items())
    assert ran >= 16


def test_options_of_the_readme_make_a_configuration():
    cells = [cell for text in PAGES.values() for cell in re.findall(r"`(--preset [^`]+)`", without_blocks(text))]
    assert len(cells) >= 5
    for cell in cells:
        read_config([*shlex.split(cell.replace("…", "")), "--data", "sums.jsonl"])


def test_every_option_and_tool_that_is_named_exists():
    modules = [train, *(importlib.import_module(path.stem) for path in (ROOT / "tools").glob("*.py"))]
    ours = {field.name for module in modules for thing in vars(module).values()
            if isinstance(thing, type) and dataclasses.is_dataclass(thing) for field in dataclasses.fields(thing)}
    elsewhere = {option for name in ("soak", "benchmark", "benchmark_reward")
                 for option in re.findall(r'"--([\w-]+)"', (ROOT / "tests" / f"{name}.py").read_text())}
    elsewhere |= {"help", "no-deps", "dist", "nproc_per_node", "shutdown-timeout"}
    of_others = ("docs/coming_from_elsewhere.md",)  # its options are looked up by tests/test_export_verl.py
    unknown = set()
    for page, text in PAGES.items():
        unknown |= {(page, tool) for tool in re.findall(r"tools/\w+\.py", text) if not (ROOT / tool).is_file()}
        named = re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", " ".join(re.findall(r"`[^`]+`", text, re.DOTALL)))
        unknown |= {(page, name) for name in named if page not in of_others
                    and name.removeprefix("no-").replace("-", "_") not in ours and name not in elsewhere}
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(PAGES[page])):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {link}"
