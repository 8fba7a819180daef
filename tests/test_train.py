"""The whole loop on a miniature of the toy world: the run's folder, resume, stages, LoRA, rewards of one's own."""
from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import even_sums, lines
from fast_start import ROOT
from safetensors.torch import load_file
from soak import COIN, MEASURED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import evaluate
import report
import rollout
import toy
import train
from data import UserError
from polaris_mini import PRESETS, Common, Config, Problem, read_config
from rollout import load_model, prepare_policy

SMALL = ["--prompts-per-step", "8", "--group-size", "4", "--eval-problems", "8", "--eval-rollouts", "2",
         "--reward-workers", "1"]
SHORT = [*SMALL, "--max-response-tokens", "24"]
STEPS = 5
METRICS = {
    "step", "stage", "sampling/temperature", "reward/mean", "reward/solve_none", "reward/solve_all",
    "reward/no_think_end", "reward/no_answer", "reward/timeout", "reward/truncated", "reward/wrong",
    "batch/informative", "batch/rescued", "batch/substituted", "response/tokens_mean", "response/tokens_max",
    "response/truncated", "diversity/distinct_4",
    "policy/loss", "policy/entropy", "policy/clip_fraction", "mismatch/kl", "mismatch/ratio_mean",
    "mismatch/ratio_max", "mismatch/cut", "optim/grad_norm", "optim/skipped", "optim/lr", "time/rollout",
    "time/reward", "time/update", "time/sync", "time/save", "time/step", "tokens/rollout", "tokens/per_second",
    "tokens/update", "tokens/update_release", "memory/rollout_gib", "memory/update_gib",
}


def start(*arguments: object) -> None:
    train.main([str(argument) for argument in arguments])


def write_problems(path: Path, problems: list[Problem], **columns: list[object]) -> Path:
    rows = [{"problem": problem.text, "answer": problem.answers[0]} for problem in problems]
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """Problems that the toy model is now right and now wrong at, in 24 tokens."""
    return write_problems(tmp_path_factory.mktemp("data") / "sums.jsonl", toy.toy_problems(40, seed=5, terms=[2, 3]))


@pytest.fixture(scope="module")
def finished(sums, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    start(*SHORT, "--data", sums, "--steps", STEPS, "--eval-every", 2, "--checkpoint-every", 2, "--run-dir", folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((folder / "checkpoints").iterdir())]


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights to the last bit, same rollouts, same scores, same metrics but for times and memory."""
    for folders in ((one, other), (other, one)):
        (folder,) = sorted((folders[0] / "checkpoints").iterdir())[-1:]
        (weights,) = folder.glob("*.safetensors")
        found, expected = (load_file(root / "checkpoints" / folder.name / weights.name) for root in folders)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("rollouts.jsonl", "scores.jsonl", "evaluations.jsonl"):
        assert lines(one / name) == lines(other / name), name
    logs = [[{name: value for name, value in step.items() if not name.startswith(MEASURED)}
             for step in lines(run / "metrics.jsonl")] for run in (one, other)]
    assert logs[0] == logs[1]


# -------------------------------------------------------------------------- the loop


def test_the_loop_has_its_numbered_banners_on_one_screen():
    source = (ROOT / "train.py").read_text()
    (loop,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno - loop.lineno < 60
    banners = re.findall(r"# (\d)\. ([A-Z]+(?:, [A-Z]+)*)", ast.get_source_segment(source, loop))
    assert banners == [("0", "STAGE"), ("1", "ROLLOUT"), ("2", "REWARD"), ("3", "RESCUE"), ("4", "SUBSTITUTE"),
                       ("5", "ADVANTAGE"), ("6", "UPDATE"), ("7", "LOG, SAVE, EVAL")]


def test_run_folder_holds_what_the_docs_say(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "starts.jsonl", "log.txt", "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl",
        "scores.jsonl", "checkpoints", "sink"}
    metrics = lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert all(set(m) == METRICS for m in metrics)
    assert any(m["optim/grad_norm"] for m in metrics)
    assert [e["step"] for e in lines(finished / "evaluations.jsonl")] == [0, 2, 4, 5]
    rollouts = lines(finished / "rollouts.jsonl")
    assert set(rollouts[-1]) == {
        "step", "id", "problem", "response", "answer", "reward", "reason", "tokens", "truncated", "advantage", "weight",
        "rescued"}
    assert len([r for r in rollouts if not r["rescued"]]) == STEPS * 8 * 4
    for m in metrics:
        of_step = [r for r in rollouts if r["step"] == m["step"]]
        rewards = [r["reward"] for r in of_step if not r["rescued"]]
        assert m["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert m["batch/rescued"] == sum(r["rescued"] for r in of_step)
        assert m["batch/substituted"] == sum(r["weight"] - 1 for r in of_step if r["weight"]) / 4
        assert sum(r["weight"] for r in of_step) == (32 if m["optim/grad_norm"] else 0)  # every place is filled
        coloured = [r for r in of_step if "pieces" in r]
        assert len({r["id"] for r in coloured}) == 1
        for r in coloured:
            assert "".join(text for text, _ in r["pieces"]).removesuffix("<|end|>") == r["response"]
            assert len(r["pieces"]) == r["tokens"]
    assert len(lines(finished / "scores.jsonl")) == STEPS * 8
    assert json.loads((finished / "config.json").read_text())["stages"][0].startswith(f"{STEPS}:")
    assert steps_of(finished) == [4, 5]
    assert {path.name for path in (finished / "checkpoints" / "step_000005").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "optimizer.pt", "sink.jsonl"}
    log = (finished / "log.txt").read_text()
    assert f"python tools/report.py {finished}" in log
    assert re.search(r"^before .*\nafter ", log, re.MULTILINE)


def test_every_metric_is_defined_in_the_docs():
    (page,) = (path for path in (ROOT / "docs" / "run_folder.md", ROOT / "README.md")
               if path.exists() and "| `policy/loss` |" in path.read_text())
    assert set(re.findall(r"^\| `(\w+(?:/\w+)?)` \|", page.read_text(), re.MULTILINE)) >= METRICS


def test_checkpoint_is_a_hugging_face_model(finished):
    folder = finished / "checkpoints" / "step_000005"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 5


def test_the_toy_preset_is_a_run_like_any_other():
    toy_run = PRESETS["toy"]
    assert all(Path(name).exists() for name in (toy_run.model, toy_run.data, toy_run.eval_data))
    named = read_config([])
    assert named.preset == "toy"
    assert named.mismatch == "auto"  # decided by the engine at each start
    assert read_config(["--data", "own.jsonl"]).eval_data is None  # which belongs to the toy's data


# ------------------------------------------------------------------------- resume


def test_longer_training_of_a_finished_run_at_another_rate(copy):
    start("--resume", copy, "--steps", STEPS + 1, "--lr", 5e-5)
    metrics = lines(copy / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 2))
    assert [m["optim/lr"] for m in metrics[-2:]] == [PRESETS["toy"].lr, 5e-5]
    assert [e["step"] for e in lines(copy / "evaluations.jsonl")] == [0, 2, 4, 5, 6]
    assert steps_of(copy) == [5, 6]


def test_a_resume_may_end_the_run_earlier_or_change_the_temperature(copy):
    start("--resume", copy, "--stages", "3:1.0:24")
    assert len(lines(copy / "metrics.jsonl")) == STEPS
    start("--resume", copy, "--stages", f"{STEPS + 1}:1.3:24")
    assert lines(copy / "metrics.jsonl")[-1]["sampling/temperature"] == 1.3


@pytest.mark.parametrize("option", ["--seed 5", "--model nowhere", "--data nowhere.jsonl", "--optimizer sgd",
                                    "--lora-rank 4", "--eval-problems 4", "--prompt-suffix now"])
def test_what_a_resume_cannot_change_is_named(finished, option):
    name, value = option.removeprefix("--").replace("-", "_").split()
    with pytest.raises(UserError, match=f"{name} is {value}: in this run"):
        start("--resume", finished, *option.split())


def test_log_lines_after_the_checkpoint_come_again(finished, copy):
    """Also lines that a kill has cut, and an evaluation that did not come to its end."""
    shutil.rmtree(copy / "checkpoints" / "step_000005")
    path = copy / "evaluations.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"step": 4' not in line))
    for name in ("metrics.jsonl", "rollouts.jsonl", "scores.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"step": 5, "id": "cut o')
    start("--resume", copy)
    assert_same_run(finished, copy)


# ------------------------------------------------------------------- the first checkpoint


def test_a_run_is_saved_before_anything_is_drawn_and_goes_on_from_there(finished, sums, monkeypatch, tmp_path):
    """Killed at its first evaluation, some of whose groups are kept."""
    run = tmp_path / "run"

    def killed(*given, **named):
        real(*given, **named)
        assert (run / "checkpoints" / "step_000000" / "model.safetensors").exists()
        raise SystemExit("as if killed")

    real = train.sample_groups
    monkeypatch.setattr(train, "sample_groups", killed)
    with pytest.raises(SystemExit):
        start(*SHORT, "--data", sums, "--steps", STEPS, "--eval-every", 2, "--checkpoint-every", 2, "--run-dir", run)
    monkeypatch.undo()
    (kept,) = (run / "kept").iterdir()
    assert len(lines(kept)) == 8
    drawn = []
    monkeypatch.setattr(train, "sample_groups", lambda *given: drawn.append(kept.exists()) or real(*given))
    start("--resume", run)
    assert drawn[0]
    assert_same_run(finished, run)


def test_a_model_that_cannot_be_saved_ends_the_run_before_anything_is_drawn(sums, monkeypatch, tmp_path):
    """The file of the weights is cut short; or the files cannot be written."""
    run = tmp_path / "run"
    real = PreTrainedModel.save_pretrained

    def cut_short(model: PreTrainedModel, folder: Path) -> None:
        real(model, folder)
        os.truncate(folder / "model.safetensors", 10_000)

    options = [*SHORT, "--data", sums, "--steps", 1, "--run-dir", run]
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", cut_short)
    with pytest.raises(UserError, match=r"step_000000: cannot be saved \(.*header"):
        start(*options)
    monkeypatch.undo()
    (run / "checkpoints").rmdir()
    (run / "checkpoints").touch()
    with pytest.raises(UserError, match=r"step_000000: cannot be saved \(.*Not a directory"):
        start("--resume", run)
    (run / "checkpoints").unlink()
    assert not (run / "kept").exists()
    start("--resume", run)
    assert steps_of(run) == [0, 1]


@pytest.mark.parametrize(("options", "bytes_per_weight"), [
    ([], 12), (["--optimizer", "paged_adamw8bit"], 6), (["--optimizer", "sgd"], 4), (["--lora-rank", 4], 12)])
def test_checkpoints_that_will_not_fit_on_the_disk_are_an_error(sums, tmp_path, options, bytes_per_weight):
    model = AutoModelForCausalLM.from_pretrained(PRESETS["toy"].model)
    weights = sum(p.numel() for p in prepare_policy(model, Config(lora_rank=4 if "--lora-rank" in options else 0)
                                                    ).parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"checkpoints take .* are free: make room, lower --keep-checkpoints") as error:
        start(*SHORT, "--data", sums, "--steps", 10**9, "--checkpoint-every", 1, "--keep-checkpoints", 10**8, *options,
              "--run-dir", tmp_path / "run")
    need = float(re.search(r"take ([\d,.]+) GB", str(error.value))[1].replace(",", ""))
    assert need == pytest.approx((10**8 + 1) * weights * bytes_per_weight / 1e9, rel=1e-3)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("error", "line"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB.; python tools/plan.py with"),
    (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119"), "cpp:119; python tools/plan.py with"),
    (RuntimeError("CUDA error: an illegal memory access"), None),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_that_names_the_plan(error, line, sums, monkeypatch, capsys, tmp_path):
    def fails(*_: object) -> None:
        raise error

    options = [*SHORT, "--data", str(sums), "--eval-every", "-1", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(rollout.HFEngine, "wake", fails)
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(SystemExit if line else RuntimeError) as ended:
        runpy.run_path(train.__file__, run_name="__main__")
    if line:
        assert ended.value.code == 2
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_folder_may_become_a_run(sums, monkeypatch, tmp_path):
    """One that no other can take the place of, as where a disk is mounted."""
    monkeypatch.chdir(tmp_path)
    start(*SHORT, "--data", sums, "--steps", 1, "--eval-every", "-1", "--run-dir", ".")
    assert steps_of(tmp_path) == [0, 1]


# --------------------------------------------------------------- mechanisms and stages


def test_switched_off_mechanisms_do_nothing(sums, tmp_path):
    start(*SMALL, "--data", sums, "--stages", "2:1.0:24", "1:1.0:24", "--eval-every", "-1", "--no-rescue",
          "--no-substitute", "--mastered-above", 1, "--run-dir", tmp_path / "run")
    assert all(m["batch/rescued"] == m["batch/substituted"] == 0 for m in lines(tmp_path / "run" / "metrics.jsonl"))
    assert "stage 2: 0 problems are mastered" in (tmp_path / "run" / "log.txt").read_text()
    assert all(r["weight"] == 1 for r in lines(tmp_path / "run" / "rollouts.jsonl"))


def test_stages_of_the_command_line_and_mastered_problems(sums, tmp_path):
    """Two stages; with --mastered-above 0 every problem with a correct rollout leaves between them."""
    run = tmp_path / "run"
    start(*SMALL, "--data", sums, "--stages", "2:1.0:24", "1:1.2:26", "--mastered-above", 0, "--eval-every", "-1",
          "--run-dir", run)
    metrics = lines(run / "metrics.jsonl")
    assert [(m["stage"], m["sampling/temperature"]) for m in metrics] == [(1, 1.0), (1, 1.0), (2, 1.2)]
    assert json.loads((run / "config.json").read_text())["stages"] == ["2:1.0:24", "1:1.2:26"]
    solved = {s["id"] for s in lines(run / "scores.jsonl") if s["step"] <= 2 and s["score"] > 0}
    assert f"stage 2: {len(solved)} problems are mastered and leave" in (run / "log.txt").read_text()
    assert not solved & {s["id"] for s in lines(run / "scores.jsonl") if s["step"] == 3}
    start("--resume", run, "--stages", "9:1.0:24")  # in the second stage, of which there is none now
    assert lines(run / "metrics.jsonl") == metrics


def test_auto_temperatures_and_reset_are_the_same_after_a_resume(monkeypatch, tmp_path):
    """Two auto stages; rescue has something to do, as problems come again. A run ends before a step is saved."""
    straight, real = tmp_path / "straight", train.log_step
    even = even_sums(tmp_path / "even.jsonl", 24)
    options = [*SMALL, "--data", even, "--stages", "3:auto:24", "2:auto:26:reset", "--probe-problems", 4,
               "--probe-temperatures", "0.6:1.2:0.3", "--mastered-above", 1, "--no-substitute"]
    start(*options, "--keep-checkpoints", 9, "--run-dir", straight)
    metrics, probes = lines(straight / "metrics.jsonl"), lines(straight / "probes.jsonl")
    assert list(probes[0]["accuracy"]) == ["0.6", "0.9", "1.2"]
    assert [(p["stage"], p["step"]) for p in probes] == [(1, 1), (2, 4)]
    assert {(m["stage"], m["sampling/temperature"]) for m in metrics} == {(p["stage"], p["chosen"]) for p in probes}
    optimizers = {step: torch.load(straight / "checkpoints" / f"step_{step:06d}" / "optimizer.pt")["optimizer"]
                  for step in (3, 4)}
    assert optimizers[3][0]["step"] > optimizers[4][0]["step"] == 1  # the second stage began anew
    for step in (2, 4, 5):
        resumed = tmp_path / f"resumed-{step}"

        def log_step(run, *others, last=step):
            real(run, *others)
            if run.state.step == last:
                raise SystemExit("as if killed")

        monkeypatch.setattr(train, "log_step", log_step)
        with pytest.raises(SystemExit, match="as if killed"):
            start(*options, "--run-dir", resumed)
        monkeypatch.undo()
        start("--resume", resumed)
        assert_same_run(straight, resumed)
        assert lines(resumed / "probes.jsonl") == probes


def test_no_temperature_can_be_chosen_where_nothing_is_right(finished, tmp_path):
    wrong = write_problems(tmp_path / "wrong.jsonl", [Problem("", "1 + 1", ("7777",)), Problem("", "1 + 2", ("888",))])
    with pytest.raises(UserError, match="accuracy is 0 at every temperature"):
        start(*SHORT, "--data", wrong, "--prompts-per-step", 2, "--eval-every", "-1", "--temperature", "auto",
              "--probe-temperatures", "1", "--run-dir", tmp_path / "run")


# ---------------------------------------------------------------------- models and memory


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    """The toy model as somebody else's base model, without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    AutoModelForCausalLM.from_pretrained(PRESETS["toy"].model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(PRESETS["toy"].model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def test_base_model_with_lora_and_8_bit_adam(base_model, monkeypatch, tmp_path):
    even = even_sums(tmp_path / "even.jsonl", 24)
    monkeypatch.chdir(tmp_path)
    Path("coin.py").write_text(COIN)
    run, straight = tmp_path / "lora", tmp_path / "straight"
    options = ["--preset", "toy", "--model", base_model, "--data", even, *SHORT, "--lora-rank", 4, "--optimizer",
               "adamw8bit", "--updates-per-batch", 2, "--gradient-checkpointing", "--checkpoint-every", 2,
               "--eval-every", 2, "--reward", "coin:score"]
    start(*options, "--steps", 2, "--run-dir", run)
    adapter = run / "checkpoints" / "step_000002"
    assert (adapter / "adapter_model.safetensors").is_file()
    start("--resume", run, "--steps", 3)
    start(*options, "--steps", 3, "--run-dir", straight)
    assert_same_run(straight, run)
    trained = load_file(run / "checkpoints" / "step_000003" / "adapter_model.safetensors")
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)

    merged = load_model(str(adapter), Common(device="cpu"), torch.float32)  # as a model of the other commands
    tokens = torch.tensor([[5, 9, 4, 7]])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, AutoModelForCausalLM.from_pretrained(adapter)(tokens).logits,
                              atol=1e-5)
    evaluate.main(["eval", "--model", str(adapter), "--data", str(even), "--problems", "4", "--rollouts", "2",
                   "--max-response-tokens", "20", "--out", str(tmp_path / "eval")])
    with pytest.raises(UserError, match="LoRA adapter"):
        start(*options, "--model", adapter, "--run-dir", tmp_path / "second")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_model)

    full = tmp_path / "full"  # without LoRA all weights of the merged model train
    start(*options, "--lora-rank", 0, "--model", adapter, "--steps", 1, "--no-substitute", "--run-dir", full)
    before, after = (load_file(full / "checkpoints" / f"step_00000{step}" / "model.safetensors") for step in (0, 1))
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items() if name in before)
    assert lines(full / "metrics.jsonl")[0]["optim/grad_norm"] > 0
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    start("--resume", full, "--steps", 2)
    assert len(lines(full / "metrics.jsonl")) == 2


@pytest.mark.parametrize("options", [
    ["--optimizer", "paged_adamw8bit", "--offload-policy", "--gradient-checkpointing", "--offload-activations",
     "--logprob-chunk-tokens", "16"],
    ["--dtype", "float16"],
], ids=["memory", "float16"])
def test_a_resume_changes_nothing(tmp_path, options):
    """With all that saves memory at once; with a loss scale, which is in the checkpoint."""
    even = even_sums(tmp_path / "even.jsonl", 24)
    options = [*SHORT, "--data", even, "--eval-every", 2, "--no-substitute", *options]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    start(*options, "--steps", 3, "--run-dir", straight)
    start(*options, "--steps", 2, "--run-dir", stopped)
    start("--resume", stopped, "--steps", 3)
    assert_same_run(straight, stopped)
    assert any(m["optim/grad_norm"] for m in lines(straight / "metrics.jsonl"))


# ------------------------------------------------------------------- problems and rewards


def test_offline_pass_rates_are_the_first_scores(tmp_path):
    problems = write_problems(tmp_path / "scored.jsonl", toy.toy_problems(30, seed=5, terms=[2]),
                              difficulty=[f"{i % 8}/8" for i in range(30)])
    start(*SHORT, "--data", problems, "--steps", 1, "--run-dir", tmp_path / "run")
    scores = lines(tmp_path / "run" / "scores.jsonl")
    assert [s["step"] for s in scores] == [0] * 22 + [1] * 8
    assert sum(report.known_difficulty(tmp_path / "run", 0)) == sum(report.known_difficulty(tmp_path / "run", 1)) == 22


def test_parquet_in_verl_layout_trains(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": p.text}], "reward_model": {"ground_truth": p.answers[0]},
             "extra_info": {"index": i}} for i, p in enumerate(toy.toy_problems(40, seed=5, terms=[2]))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    start(*SHORT, "--data", tmp_path / "verl.parquet", "--eval-every", "-1", "--steps", 1, "--optimizer", "sgd",
          "--run-dir", tmp_path / "run")
    assert {r["id"] for r in lines(tmp_path / "run" / "rollouts.jsonl")} <= {str(i) for i in range(40)}


DIGITS = '''
def score(response, answer, problem):
    assert problem.text and problem.id and answer in problem.answers
    digits = response.rpartition("{")[2].partition("}")[0]
    return sum(a == b for a, b in zip(digits, answer)) / max(len(digits), len(answer))
'''


def test_reward_of_ones_own_trains_the_toy(sums, monkeypatch, tmp_path):
    (tmp_path / "digits.py").write_text(DIGITS)
    monkeypatch.chdir(tmp_path)
    start(*SHORT, "--data", sums, "--run-dir", "run", "--steps", 2, "--eval-every", "-1", "--reward", "digits:score",
          "--no-substitute")
    scope: dict[str, object] = {}
    exec(DIGITS, scope)
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    for line in rollouts:
        problem = Problem(line["id"], "text", tuple(line["answer"]))
        assert line["reward"] == scope["score"](line["response"], line["answer"][0], problem)
        assert (line["reason"] == "correct") == (line["reward"] == 1)
    assert len({line["reward"] for line in rollouts}) > 2  # some are partly right
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(step["optim/grad_norm"] > 0 for step in metrics)
    first = [line["reward"] for line in rollouts if line["step"] == 1]
    assert metrics[0]["reward/mean"] == pytest.approx(sum(first) / len(first))
