"""The whole loop on a miniature of the toy world: files, resume, interrupts, bad input, LoRA, warm start."""
from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import even_sums, lines
from fast_start import ROOT, Script
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import report
import train
from polaris_mini import PRESETS, Config, Problem
from rollout import load_model

SMALL = ["--warmup-steps", "30", "--prompts-per-step", "8", "--group-size", "4", "--max-response-tokens", "40",
         "--eval-problems", "8", "--eval-rollouts", "2", "--eval-every", "2", "--checkpoint-every", "2"]
STEPS = 9  # enough that a kill or Ctrl-C after the first ones comes before the last
METRICS = [
    "step", "stage", "reward/mean", "reward/solve_none", "reward/solve_all", "reward/timeout",
    "batch/informative", "batch/rescued",
    "batch/substituted", "response/tokens_mean", "response/tokens_max", "response/truncated", "sampling/temperature",
    "diversity/distinct_4", "diversity/distinct_4_fixed", "policy/entropy", "policy/loss", "policy/clip_fraction",
    "mismatch/kl", "mismatch/ratio_mean", "mismatch/ratio_max", "mismatch/cut",
    "optim/grad_norm", "optim/skipped", "optim/lr", "time/rollout", "time/reward",
    "time/update", "time/sync", "time/step",
    "tokens/rollout", "tokens/per_second", "tokens/update", "tokens/update_release",
    "memory/rollout_gib", "memory/update_gib",
]


@pytest.fixture(scope="session")
def finished(run_train, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = run_train(*SMALL, "--steps", STEPS, "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    assert "before" in result.stdout
    assert "--resume" in result.stdout
    return folder


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / f"step_{step:06d}").state_dict()


def assert_same_training(one: Path, other: Path, step: int) -> None:
    a, b = weights(one, step), weights(other, step)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("rollouts.jsonl", "scores.jsonl"):
        assert lines(one / name) == lines(other / name), name


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Same weights to the last bit, same rollouts, same scores, same metrics but for times and memory."""
    assert_same_training(one, other, step)
    assert lines(one / "evaluations.jsonl") == lines(other / "evaluations.jsonl")
    measured = ("time/", "memory/", "tokens/per_second")
    for x, y in zip(lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in x.items() if not k.startswith(measured)} == {
            k: v for k, v in y.items() if not k.startswith(measured)}


# ------------------------------------------------------------------ the run's folder


def test_run_folder_holds_what_the_readme_says(finished):
    metrics = lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    for m in metrics:
        evaluated = ["eval/avg_at_k", "eval/pass_at_k"] if m["step"] in (2, 4, 6, 8, 9) else []
        assert list(m) == METRICS + evaluated
    assert [e["step"] for e in lines(finished / "evaluations.jsonl")] == [0, 2, 4, 6, 8, 9]
    rollouts = lines(finished / "rollouts.jsonl")
    assert set(rollouts[-1]) == {
        "step", "id", "problem", "response", "answer", "reward", "reason", "tokens", "truncated", "advantage", "weight",
        "rescued"}
    assert len([r for r in rollouts if not r["rescued"]]) == STEPS * 8 * 4
    for m in metrics:
        of_step = [r for r in rollouts if r["step"] == m["step"]]
        rewards = [r["reward"] for r in of_step if not r["rescued"]]
        assert m["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert m["batch/rescued"] <= sum(r["rescued"] for r in of_step)
        assert m["batch/substituted"] == sum(r["weight"] - 1 for r in of_step if r["weight"] and not r["rescued"]) / 4
        coloured = [r for r in of_step if "pieces" in r]
        assert len({r["id"] for r in coloured}) == 1
        for r in coloured:
            assert "".join(text for text, _ in r["pieces"]).removesuffix("<|end|>") == r["response"]
            assert len(r["pieces"]) == r["tokens"]
    assert len(lines(finished / "scores.jsonl")) == STEPS * 8
    assert json.loads((finished / "config.json").read_text())["stages"][0]["steps"] == STEPS
    scores = {e["step"]: e["avg_at_k"] for e in lines(finished / "evaluations.jsonl") if e["step"] > 0}
    best = max(scores, key=lambda step: (scores[step], step))
    kept = sorted({8, 9, best})
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [f"step_{step:06d}" for step in kept]


def test_every_metric_is_defined_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in [*METRICS, "eval/avg_at_k", "eval/pass_at_k"]:
        assert f"| `{name}` |" in readme, name


def test_checkpoint_is_a_hugging_face_model(finished):
    folder = finished / "checkpoints" / "step_000009"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 5


def test_report_command_writes_a_page_of_several_runs(finished, run_train, tmp_path):
    run_report = functools.partial(run_train, script="tools/report.py")
    result = run_report(finished, finished, "--out", tmp_path / "both.html")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "both.html").read_text().startswith("<!doctype html>")
    assert run_report(finished).stdout == f"{finished / 'report.html'}\n"
    for name, step in (("old", 1), ("new", 2)):
        shutil.copytree(finished, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("checkpoints"))
        os.utime(tmp_path / "runs" / name / "metrics.jsonl", (step, step))
    assert run_report(cwd=tmp_path).stdout == "runs/new/report.html\n"


def test_plan_of_a_run_stands_beside_what_it_measured(finished, run_train):
    result = run_train("--run", finished, "--gpu-memory", 1.5, script="tools/plan.py")
    assert result.returncode == 0, result.stderr
    for phase, metric in (("rollout", "memory/rollout_gib"), ("backward", "memory/update_gib")):
        most = max(step[metric] for step in lines(finished / "metrics.jsonl"))
        assert re.search(rf"^{phase} .* \({most:.1f} measured\)", result.stdout, re.MULTILINE)


# ------------------------------------------------------------------------- resume


def wait_for_step(folder: Path, step: int, process: Script) -> None:
    path = folder / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < step):
        time.sleep(0.02)


def test_killed_run_resumes_bit_identical(finished, environment, run_train, tmp_path):
    """Killed without warning after step 3 of 9: step 3 is repeated from the checkpoint of step 2."""
    folder = tmp_path / "killed"
    process = Script([*SMALL, "--steps", STEPS, "--run-dir", folder], environment)
    wait_for_step(folder, 3, process)
    process.kill()
    process.wait()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < STEPS
    result = run_train("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(finished, folder, STEPS)


def test_interrupted_run_saves_and_says_how_to_go_on(finished, environment, run_train, tmp_path):
    folder = tmp_path / "interrupted"
    process = Script([*SMALL, "--steps", STEPS, "--run-dir", folder], environment)
    wait_for_step(folder, 1, process)
    process.send_signal(signal.SIGINT)
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr
    assert f"python train.py --resume {folder}" in ended.stdout
    done = len(lines(folder / "metrics.jsonl"))
    assert 1 <= done < STEPS
    assert (folder / "checkpoints" / f"step_{done:06d}").is_dir()
    assert run_train("--resume", folder).returncode == 0
    assert_same_training(finished, folder, STEPS)  # an evaluation may have been dropped


def test_a_second_process_in_a_run_is_refused_until_the_first_is_dead(finished, environment, run_train, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    first = Script(["--resume", copy, "--steps", 500], environment)
    wait_for_step(copy, STEPS + 1, first)
    second = run_train("--resume", copy, "--steps", STEPS + 4)
    assert second.returncode == 2
    assert f"run folder {copy}: another process is training in it" in second.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    assert run_train("--resume", copy, "--steps", STEPS + 4).returncode == 0


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "config.json", "sha256.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_damage_of_a_checkpoint_is_found_by_its_content(finished, tmp_path, name, harm):
    copy = tmp_path / "copy"
    shutil.copytree(finished / "checkpoints" / f"step_{STEPS:06d}", copy)
    (copy / "notes.txt").write_text("a user's own file does no harm")
    assert train.damage(copy) is None
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    {"cut": lambda: (copy / name).write_bytes(content[:-9]), "flip": lambda: (copy / name).write_bytes(content),
     "delete": (copy / name).unlink}[harm]()
    fault = train.damage(copy)
    assert fault is not None
    assert name in fault or name == "sha256.json"  # which another file may then seem to disagree with


def test_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(finished, run_train, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    newest, before = (copy / "checkpoints" / f"step_{step:06d}" for step in (STEPS, STEPS - 1))
    (newest / "model.safetensors").write_bytes(b"")
    result = run_train("--resume", copy)
    assert result.returncode == 0, result.stderr
    shown = "".join(result.stdout.split())  # whatever the width of the terminal
    assert "step_000009isdamaged(model.safetensorsismissingornotasitwassaved)" in shown
    assert_same_run(finished, copy, STEPS)
    assert (copy / "checkpoints" / "damaged_step_000009").is_dir()
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        (checkpoint / "trainer_state.pt").unlink()
    result = run_train("--resume", copy)
    assert result.returncode == 2
    assert "every checkpoint in it is damaged" in result.stderr
    assert before.with_name(f"damaged_{before.name}").is_dir()  # nothing is deleted


def test_longer_training_of_a_finished_run(finished, run_train, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(finished, folder)
    result = run_train("--resume", folder, "--steps", STEPS + 1, "--lr", 5e-5)
    assert result.returncode == 0, result.stderr
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == list(range(1, STEPS + 2))


def test_a_resume_may_end_the_run_earlier_or_change_the_temperature(finished, run_train, tmp_path):
    folder = tmp_path / "shorter"
    shutil.copytree(finished, folder)
    result = run_train("--resume", folder, "--stages", "5:1.0:40")
    assert result.returncode == 0, result.stderr
    assert len(lines(folder / "metrics.jsonl")) == STEPS
    result = run_train("--resume", folder, "--stages", f"{STEPS + 1}:1.3:40")
    assert result.returncode == 0, result.stderr
    assert lines(folder / "metrics.jsonl")[-1]["sampling/temperature"] == 1.3


def test_log_lines_after_the_checkpoint_are_dropped_and_a_cut_line_too(finished, run_train, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000009")
    for name in ("metrics.jsonl", "rollouts.jsonl", "scores.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 9, "id": "cut o')
    result = run_train("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(finished, folder, STEPS)


def test_switched_off_mechanisms_do_nothing_and_a_tracker_listens(run_train, tmp_path):
    folder = tmp_path / "plain"
    result = run_train(*SMALL, "--steps", 2, "--no-rescue", "--no-substitute", "--track", "tensorboard",
                       "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    assert list((folder / "tensorboard").glob("events*"))
    assert all(m["batch/rescued"] == m["batch/substituted"] == 0 for m in lines(folder / "metrics.jsonl"))


# ------------------------------------------------------------ the data of the toy world


def test_toy_training_and_held_out_problems_are_disjoint():
    for seed in range(3):
        training, evaluation = train.load_data(Config(seed=seed))
        assert not {p.text for p in training} & {p.text for p in evaluation}
        assert len(evaluation) == 128


def test_toy_warm_start_sees_no_held_out_problem(environment, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    seen: list[str] = []
    real = data.encode_example

    def spy(example, tokenizer, **options):
        seen.append(example.problem)
        return real(example, tokenizer, **options)

    monkeypatch.setattr(data, "encode_example", spy)
    config = Config(**{**vars(PRESETS["toy"]), "warmup_steps": 3, "seed": 11})
    _, evaluation = train.load_data(config)
    train.toy_model_folder(config, evaluation, train.Display())
    assert len(seen) == 3 * config.warmup_batch
    assert not set(seen) & {p.text for p in evaluation}


# ------------------------------------------------------------------- other real input


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, finished) -> Path:
    """A checkpoint as somebody else's model, without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    source = finished / "checkpoints" / "step_000009"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"problem": p.text, "answer": p.answers[0]} for p in data.toy_problems(60, seed=5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_base_model_with_warm_start_examples_lora_and_8_bit_adam(base_model, sums, run_train, tmp_path):
    worked = tmp_path / "worked.jsonl"
    rows = [{"problem": p.text, "response": data.toy_response(p, None)} for p in data.toy_problems(6, seed=6)]
    worked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "lora"
    options = ["--model", base_model, "--data", sums, *SMALL, "--prompt-suffix", "", "--warmup", worked,
               "--prompt-examples", worked, "--lora-rank", 4, "--optimizer", "adamw8bit", "--max-prompt-tokens", 2000,
               "--warmup-steps", 3, "--updates-per-batch", 2, "--run-dir", folder]
    result = run_train(*options, "--steps", 2, "--gradient-checkpointing")
    assert result.returncode == 0, result.stderr
    assert (folder / "checkpoints" / "step_000002" / "adapter_model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_000002")
    assert any("lora_A" in name for name, _ in model.named_parameters())
    result = run_train("--resume", folder, "--steps", 3)
    assert result.returncode == 0, result.stderr
    straight = tmp_path / "straight"
    assert run_train(*options[:-1], straight, "--steps", 3, "--gradient-checkpointing").returncode == 0
    assert_same_run(straight, folder, 3)

    adapter = folder / "checkpoints" / "step_000003"  # as a model of the other commands: merged into its base
    merged = load_model(str(adapter), dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.tensor([[5, 9, 4, 7]])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, AutoModelForCausalLM.from_pretrained(adapter)(tokens).logits,
                              atol=1e-5)
    result = run_train("eval", "--model", adapter, "--data", sums, "--problems", 4, "--rollouts", 2,
                       "--max-response-tokens", 20, "--out", tmp_path / "eval", script="tools/evaluate.py")
    assert result.returncode == 0, result.stderr


def test_all_that_saves_memory_at_once_and_a_resume_that_changes_nothing(run_train, tmp_path):
    """Bfloat16 weights are rounded by chance, which follows from seed and step."""
    options = [*SMALL, "--trained-weights", "bfloat16", "--optimizer", "adamw8bit", "--offload-optimizer",
               "--offload-policy", "--gradient-checkpointing", "--offload-activations", "--mlp-chunk-tokens", 16,
               "--no-substitute", "--lr", "1e-5"]
    assert run_train(*options, "--steps", 4, "--run-dir", tmp_path / "straight").returncode == 0
    assert run_train(*options, "--steps", 2, "--run-dir", tmp_path / "stopped").returncode == 0
    result = run_train("--resume", tmp_path / "stopped", "--steps", 4)
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "straight", 4)["model.norm.weight"].dtype == torch.bfloat16
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", 4)


def test_stages_of_the_command_line_and_mastered_problems(run_train, tmp_path):
    """Two stages; with --mastered-above 0 every problem with a correct rollout leaves between them."""
    folder = tmp_path / "stages"
    result = run_train(*SMALL, "--stages", "2:1.0:40", "1:1.2:44", "--mastered-above", 0, "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    metrics = lines(folder / "metrics.jsonl")
    assert [(m["stage"], m["sampling/temperature"]) for m in metrics] == [(1, 1.0), (1, 1.0), (2, 1.2)]
    solved = {s["id"] for s in lines(folder / "scores.jsonl") if s["step"] <= 2 and s["score"] > 0}
    assert f"stage 2: {len(solved)} problems are mastered and leave" in result.stdout
    assert not solved & {s["id"] for s in lines(folder / "scores.jsonl") if s["step"] == 3}
    result = run_train("--resume", folder, "--stages", "9:1.0:40")  # in the second stage, of which there is none now
    assert result.returncode == 0, result.stderr
    assert lines(folder / "metrics.jsonl") == metrics


def test_auto_temperatures_plateau_and_reset_are_the_same_after_a_resume(base_model, run_train, tmp_path):
    """Two auto stages, the first ended by a plateau; rescue has something to do, as problems come again."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    even = even_sums(tmp_path / "even.jsonl", 60)
    stages = ["--stages", "6:auto:40:plateau", "3:auto:48:reset", "--plateau-window", 1, "--probe-problems", 4,
              "--probe-temperatures", "0.6:1.2:0.3", "--mastered-above", 1, "--no-substitute"]
    result = run_train("--model", base_model, "--data", even, *SMALL, "--eval-problems", 44,
                       "--prompt-suffix", "", "--checkpoint-every", 1, "--keep-checkpoints", 99, *stages,
                       "--run-dir", straight)
    assert result.returncode == 0, result.stderr
    metrics, probes = lines(straight / "metrics.jsonl"), lines(straight / "probes.jsonl")
    ended = next(m["step"] for m in metrics if m["stage"] == 2) - 1
    rewards = [m["reward/mean"] for m in metrics[:ended]]
    assert ended == 6 or rewards[-1] <= rewards[-2]
    assert all(b > a for a, b in itertools.pairwise(rewards[:-1]))  # until then it rose
    assert list(probes[0]["accuracy"]) == ["0.6", "0.9", "1.2"]
    assert {(m["stage"], m["sampling/temperature"]) for m in metrics} == {(p["stage"], p["chosen"]) for p in probes}
    assert len(metrics) == ended + 3
    for kept in (1, ended, ended + 1):
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(straight, resumed)
        for checkpoint in sorted((resumed / "checkpoints").iterdir())[kept:]:
            shutil.rmtree(checkpoint)
        assert run_train("--resume", resumed).returncode == 0
        assert_same_run(straight, resumed, len(metrics))
        assert lines(resumed / "probes.jsonl") == probes


def test_offline_pass_rates_are_the_first_scores(base_model, run_train, tmp_path):
    rows = [{"problem": p.text, "answer": p.answers[0], "difficulty": f"{i % 8}/8"}
            for i, p in enumerate(data.toy_problems(30, seed=5))]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_train("--model", base_model, "--data", tmp_path / "scored.jsonl", *SMALL, "--steps", 1,
                       "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    scores = lines(tmp_path / "run" / "scores.jsonl")
    assert [s["step"] for s in scores] == [0] * 22 + [1] * 8
    assert sum(report.known_difficulty(tmp_path / "run", 0)) == sum(report.known_difficulty(tmp_path / "run", 1)) == 22


def test_without_evaluation_nothing_is_held_out():
    training, evaluation = train.load_data(Config(eval_every=-1))
    assert (len(training), evaluation) == (data.TOY_PROBLEMS, [])


def test_dropped_evaluation_is_made_up_for_by_a_resume(finished, run_train, tmp_path):
    folder = tmp_path / "no_evaluation"
    shutil.copytree(finished, folder)
    path = folder / "evaluations.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"step": 9' not in line))
    assert run_train("--resume", folder).returncode == 0
    assert lines(path) == lines(finished / "evaluations.jsonl")


def test_parquet_in_verl_layout_trains(base_model, run_train, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": p.text}], "reward_model": {"ground_truth": p.answers[0]},
             "extra_info": {"index": i}} for i, p in enumerate(data.toy_problems(40, seed=5))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    result = run_train("--model", base_model, "--data", tmp_path / "verl.parquet", *SMALL, "--steps", 1,
                       "--optimizer", "sgd", "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert {r["id"] for r in lines(tmp_path / "run" / "rollouts.jsonl")} <= {str(i) for i in range(40)}


# ---------------------------------------------------------------------------- bad input


DIGITS = '''
def score(response, answer, problem):
    assert problem.text and problem.id and answer in problem.answers
    digits = response.rpartition("{")[2].partition("}")[0]
    return sum(a == b for a, b in zip(digits, answer)) / max(len(digits), len(answer))
'''


def test_reward_of_ones_own_trains_the_toy(run_train, tmp_path):
    (tmp_path / "digits.py").write_text(DIGITS)
    result = run_train(*SMALL, "--run-dir", "run", "--steps", "3", "--eval-every", "-1", "--reward", "digits:score",
                       "--no-substitute", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
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


def test_process_reward_is_saved_and_without_underlines_changes_nothing(finished, run_train, tmp_path):
    core = ["--process-reward", "core", "--min-overlap", "0.5", "--prompt-suffix", r"\underline{}"]
    run = tmp_path / "core"
    assert run_train(*SMALL, "--steps", 2, "--run-dir", run, *core).returncode == 0
    assert run_train("--resume", run, "--steps", STEPS).returncode == 0
    assert_same_training(finished, run, STEPS)
    saved = torch.load(run / "checkpoints" / f"step_{STEPS:06d}" / "trainer_state.pt", weights_only=True)
    assert set(saved["consensus"]) == {line["id"] for line in lines(run / "rollouts.jsonl")}
