"""The house rules that a machine can check: arrows between modules, size, clean tools, docstring examples."""
from __future__ import annotations

import ast
import doctest
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "polaris_mini": set(),
    "reward": set(),
    "data": {"polaris_mini"},
    "rollout": {"polaris_mini", "reward", "data"},
    "train": {"polaris_mini", "reward", "data", "rollout"},
}
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
FILES = [*(ROOT / f"{module}.py" for module in MAY_IMPORT), *sorted((ROOT / "tools").rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIBRARIES_CALL = ("packed_attention", "decode_attention", "__torch_dispatch__", "polaris_advantages", "compute_score")
"""Besides the methods of an autograd.Function: the parameters of these are not ours to choose."""


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_go_one_way():
    for module, allowed in MAY_IMPORT.items():
        assert imported(module) & set(MAY_IMPORT) <= allowed, module
        assert not imported(module) & {"tools", *TOOLS}, module


def line_count(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


def test_the_five_modules_and_the_readme_stay_small():
    counts = {f"{module}.py": line_count(f"{module}.py") for module in MAY_IMPORT}
    assert sum(counts.values()) <= 3150, counts  # 3,000, and what verdicts and speed have added
    assert counts["train.py"] <= 900
    assert line_count("README.md") <= 190


def test_the_readme_counts_lines_right():
    readme = (ROOT / "README.md").read_text()
    counts = {f"{module}.py": line_count(f"{module}.py") for module in MAY_IMPORT}
    for name, count in counts.items():
        shown = re.search(rf"^\| \[{name}\]\({name}\) \| ([\d,]+) \|", readme, re.MULTILINE)
        assert shown, f"the README gives no line count for {name}"
        assert int(shown[1].replace(",", "")) == pytest.approx(count, rel=0.02), f"{name} has {count} lines"
    total = re.search(r"our own code has ([\d,]+)\s+lines", readme)
    assert total
    assert int(total[1].replace(",", "")) == pytest.approx(sum(counts.values()), rel=0.02), sum(counts.values())


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions whose parameters we choose."""
    of_autograd = {method for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                   if any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
                   for method in node.body}
    for node in ast.walk(tree):
        if (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node not in of_autograd
                and node.name not in LIBRARIES_CALL):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_has_more_than_six_parameters(path):
    many = {}
    for function in functions(ast.parse(path.read_text())):
        arguments = function.args
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        named += [a.arg for a in (arguments.vararg, arguments.kwarg) if a]
        named = [name for i, name in enumerate(named) if not (i == 0 and name in ("self", "cls"))]
        if len(named) > 6:
            many[function.name] = named
    assert not many


def prose(page: Path) -> str:
    """Return a page without its blocks of code and its tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ *\|.*", "", text, flags=re.MULTILINE)


def test_no_line_is_longer_than_120_columns():
    texts = {path: path.read_text() for path in (*FILES, *(ROOT / "tests").glob("*.py"))}
    texts |= {page: prose(page) for page in PAGES}
    long = [f"{path.relative_to(ROOT)}: {line}" for path, text in texts.items() for line in text.splitlines()
            if len(line) > 120]
    assert not long


def test_recipe_needs_nothing_heavy():
    code = ("import sys, polaris_mini; print([name for name in ('torch', 'transformers', 'numpy', 'datasets') "
            "if name in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


@pytest.mark.parametrize("module", [*MAY_IMPORT, *TOOLS])
def test_docstring_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_says_what_it_is_for(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: ")
    assert re.search(r"\b[A-Z][a-z]+( [\w'-]+){4}", shown)  # a sentence, not only the options


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]])
def test_linters_are_content(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_both_requirements_pin_the_same_versions():
    def pins(name: str) -> dict[str, str]:
        found = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
        return dict(found)

    cpu, gpu = pins("requirements-cpu.txt"), pins("requirements.txt")
    assert all(cpu[name] == version for name, version in gpu.items() if name in cpu)
    assert {"torch", "transformers", "vllm", "peft", "bitsandbytes", "datasets"} <= set(gpu)
