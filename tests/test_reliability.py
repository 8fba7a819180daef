"""Faults made on purpose: kills, signals, a full disk, a clock that jumps, gradients that are not finite, no memory."""
from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import lines, random_rollouts, tiny_model
from fast_start import Faults, Script
from soak import Soak, result_of

import data
import train
from polaris_mini import Config, Group, Problem
from rollout import EngineError, HFEngine, OutOfMemory, Sampling, generate_once
from train import pack, within_memory

ENDLESS = ["--stages", "10000:1.0:10", "--eval-every", "-1"]


@pytest.fixture(scope="module")
def soak(tmp_path_factory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), seed=3)


def finished_after(soak: Soak, run: Path) -> dict[str, object]:
    ended = soak.start(run).wait()
    assert ended.returncode == 0, ended.stderr
    return result_of(run)


def has_steps(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


# ------------------------------------------------------------------------ kill anything


def test_soak_in_short(soak):
    """`python tests/soak.py` at length: docs/reliability.md."""
    kills = 0
    while kills < 12:
        kills += soak.kill_and_resume(soak.folder / f"run-{kills}", 12 - kills)
    assert not soak.faults, soak.report()


@pytest.mark.parametrize("operation", range(1, 8))
def test_killed_while_the_folder_is_made(soak, operation, tmp_path):
    """--resume works from the moment on at which there is a folder of that name."""
    run = tmp_path / "new"
    faults = Faults(kill_at=operation, folder=str(tmp_path), witness=str(soak.folder / "witness"))
    assert soak.start(run, faults).wait().returncode == -signal.SIGKILL
    process = soak.start(run)
    while not has_steps(run):
        assert process.poll() is None, process.wait().stderr
        time.sleep(0.02)
    process.kill()


def test_responses_are_generated_once(tmp_path):
    config = Config(dtype="float32", rollouts_per_batch=3)
    engine = HFEngine(tiny_model("qwen3", tied=True), data.toy_tokenizer(), config)
    asked = [(4, 5), (6,), (7, 8, 9)], 2, Sampling(1.0, 6, seed=5)
    first = list(generate_once(engine, *asked, None, tmp_path))
    assert list(generate_once(None, *asked, None, tmp_path)) == first  # from the folder: there is no engine
    assert list(generate_once(engine, *asked, None, None)) == first
    for other in ([(4, 5)], *asked[1:]), (asked[0], 3, asked[2]), (*asked[:2], replace(asked[2], temperature=0.9)):
        with pytest.raises(AttributeError):
            list(generate_once(None, *other, None, tmp_path))


def test_a_resume_with_other_settings_draws_later_steps_anew(soak):
    """They come from another policy then; only those of the checkpoint's very policy are the same."""
    run = train.Run(soak.folder / "made-up")
    for step in (2, 3, 4, 7):
        data.write_whole(run.drawn(step) / "a.json", "[]")
    run.forget_drawn(3, changed=False)
    assert [folder.name for folder in sorted((run.folder / "drawn").iterdir())] == [
        "step_000003", "step_000004", "step_000007"]
    run.forget_drawn(3, changed=True)
    assert [folder.name for folder in (run.folder / "drawn").iterdir()] == ["step_000003"]
    data.write_whole(run.drawn(6) / "a.json", "[]")
    run.forget_drawn(4, changed=False)  # steps between are missing: they may come out otherwise
    assert not list((run.folder / "drawn").iterdir())


# ------------------------------------------------------- signals, the disk, the clock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(soak, number):
    run = soak.folder / f"signal-{number}"
    process = soak.start(run)
    while not list(run.glob("drawn/step_00000[1-9]/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    ended = process.wait()
    assert ended.returncode == (0 if number == signal.SIGINT else 128 + number)
    assert ended.stdout.splitlines()[-1] == f"go on with: python train.py --resume {run}"
    assert ended.stderr == ""
    step = len(lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step_{step:06d}").is_dir()
    found = finished_after(soak, run)
    assert {name for name in soak.expected if found.get(name) != soak.expected[name]} <= {
        "evaluations.jsonl", "metrics.jsonl",  # the dropped evaluation
        *(name for name in soak.expected if "step_" in name and name not in found)}  # the best evaluation's


def test_closed_terminal_saves(soak):
    terminal, slave = os.openpty()
    run = soak.folder / "hangup"
    process = Script([*soak.options, *ENDLESS, "--run-dir", run], soak.environment, cwd=soak.folder,
                     terminal=os.ttyname(slave))
    os.close(slave)
    os.set_blocking(terminal, False)
    while not has_steps(run):
        assert process.poll() is None
        time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # a terminal that nobody reads would stop the writer
    os.close(terminal)
    assert process.wait(60).returncode == 128 + signal.SIGHUP
    assert (run / "log.txt").read_text().splitlines()[-1] == f"go on with: python train.py --resume {run}"
    step = len(lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step_{step:06d}").is_dir()


@pytest.mark.parametrize("size", [1_000, 3_000, 20_000, 60_000, 150_000])
def test_disk_that_is_full_leaves_the_run_intact(soak, size):
    """Every file's growth ends at a size: of the configuration, logs, the sink, weights, the trainer's state."""
    run = soak.folder / f"full-{size}"
    ended = soak.start(run, Faults(longest_file=size)).wait()
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: ")
    assert "Traceback" not in ended.stderr
    assert "Errno" in last or "os error" in last or "disk" in last
    assert not list(run.glob("checkpoints/.*"))
    assert finished_after(soak, run) == soak.expected


def test_run_folder_where_nothing_can_be_written_is_refused_at_once(soak):
    ended = Script([*soak.options, "--run-dir", "/proc/runs/new"], soak.environment, cwd=soak.folder).wait()
    assert ended.returncode == 2
    assert ended.stderr == ("train.py: error: run_dir is /proc/runs/new: nothing can be made in /proc (No such file "
                            "or directory); give another --run-dir\n")


# ------------------------------------------------------------------------------ numbers


def test_updates_that_are_not_finite_are_skipped_kept_and_end_the_run_in_the_third_step(soak):
    (soak.folder / "huge.py").write_text("def score(response, answer, problem):\n    return len(response) * 1e300\n")
    run = soak.folder / "huge"
    options = [*soak.options, "--reward", "huge:score", "--advantage", "dr_grpo", *ENDLESS, "--run-dir", run]
    ended = Script(options, soak.environment, cwd=soak.folder).wait()
    assert ended.returncode == 2
    assert "the gradient was not finite in 3 steps in a row" in ended.stderr
    assert "--lr" in ended.stderr
    metrics = lines(run / "metrics.jsonl")
    assert [line["optim/skipped"] for line in metrics] == [2, 2, 2]  # both updates of each batch
    assert all(line["optim/grad_norm"] is line["policy/loss"] is None for line in metrics)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    (skipped, *_) = json.loads((run / "skipped" / "step_000003.json").read_text())
    assert {"response_tokens", "sampler_logprobs", "advantage", "reward"} <= set(skipped["rollouts"][0])
    note = next(line for line in (run / "log.txt").read_text().splitlines() if line.startswith("warning, step 3"))
    assert skipped["problem"]["id"] in note
    assert "skipped/step_000003.json" in note


def metrics_of(count: int, **values: float | None) -> list[dict[str, float | None]]:
    usual = {"policy/entropy": 0.5, "response/tokens_mean": 100.0, "response/truncated": 0.1, "mismatch/kl": 1e-3,
             "reward/solve_none": 0.2, "reward/solve_all": 0.2, "reward/timeout": 0.0}
    return [usual | {name.replace("__", "/"): value for name, value in values.items()} for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("entropy", {"policy__entropy": 0.04}), ("length", {"response__tokens_mean": 20.0}),
        ("unsolved", {"reward__solve_none": 1}), ("solved", {"reward__solve_all": 1}),
        ("timeouts", {"reward__timeout": 0.3}), ("truncated", {"response__truncated": 0.3}),
        ("mismatch", {"mismatch__kl": 0.06}),
    ],
)
def test_warnings_come_when_ten_steps_say_so(name, values):
    assert train.warnings(metrics_of(30)) == {}
    assert train.warnings(metrics_of(10, policy__entropy=None, mismatch__kl=None)) == {}  # no update in ten steps
    assert train.warnings(metrics_of(20) + metrics_of(2, **values)) == {}
    assert [*train.warnings(metrics_of(20) + metrics_of(10, **values))] == [name]


def test_a_warning_comes_once_also_over_a_resume(soak):
    run = soak.folder / "warned"
    options = [*soak.options, "--max-response-tokens", 1, "--steps", 12, "--eval-every", "-1", "--temperature", 1,
               "--run-dir", run]
    assert Script(options, soak.environment, cwd=soak.folder).wait().returncode == 0
    assert Script(["--resume", run, "--steps", 15], soak.environment, cwd=soak.folder).wait().returncode == 0
    notes = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("warning")]
    assert len(notes) == 1
    assert notes[0].startswith("warning, step 10: response/truncated was")
    assert "--max-response-tokens" in notes[0]


# ------------------------------------------------------------------------------- memory


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("fits", [200, 90, 51])
def test_update_without_memory_halves_the_rows_and_has_the_same_gradient(fits):
    """A fault by count: what has more tokens finds no memory, in the middle of a row whose gradient has begun."""
    config, rollouts = Config(), random_rollouts(12)
    found, counts = [], []
    for limit in (10**9, fits):
        model = tiny_model("qwen3", tied=True)
        optimizer = torch.optim.SGD(model.parameters())

        def add_gradient(row, model=model, limit=limit):
            train.token_logprobs(model, row, 1.0, config, lambda row, logprobs: logprobs * row.advantages)
            if row.input_ids.shape[1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return row.input_ids.shape[1]

        rows, sizes = within_memory(add_gradient, pack([(r, 1.0) for r in rollouts], 10**6), optimizer)
        assert sum(sizes) == sum(train._row_tokens(r) for r in rollouts)
        assert len(rows) == len(sizes)
        found.append(gradient(model))
        counts.append(len(rows))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert counts[0] == 1 < counts[1]


def test_halves_of_a_row_are_the_rows_that_would_have_been_packed():
    rollouts = random_rollouts(5)
    (row,) = pack([(r, 1.0) for r in rollouts], 10**6)
    row.old_logprobs = torch.randn(len(row.targets))
    parts = [row]
    while len(parts) < 5:
        parts = [half for part in parts for half in part.halves()]
    for part, rollout in zip(parts, sorted(rollouts, key=train._row_tokens, reverse=True), strict=True):
        (alone,) = pack([(rollout, 1.0)], 10**6)
        for name in ("input_ids", "position_ids", "predicting", "targets", "sampler_logprobs", "sequence_bounds"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
        assert part.sequence_lengths == alone.sequence_lengths
        assert part.halves() == [part]
    assert torch.equal(torch.cat([part.old_logprobs for part in parts]), row.old_logprobs)


def _update_with_little_memory(path: str) -> None:
    """In a process of its own: an update under a limit of address space, which long rows exceed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_model("qwen3", tied=True, head_dim=64)
    groups = [Group(Problem("p", "", ("1",)), random_rollouts(8, seed, longest=400)) for seed in range(8)]
    config = Config(tokens_per_micro_batch=10**6, optimizer="sgd", lr=0.1, logprob_chunk_tokens=10**6)
    scaler, optimizer = torch.amp.GradScaler("cpu", enabled=False), torch.optim.SGD(model.parameters(), lr=0.1)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    enough = train.update_policy(model, optimizer, scaler, groups, 1.0, replace(config, tokens_per_micro_batch=500))
    model.load_state_dict(start)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 2**20, -1))
    update = train.update_policy(model, optimizer, scaler, groups, 1.0, config)
    found = [update.fitting_row, update.loss, enough.loss, update.grad_norm, enough.grad_norm]
    Path(path).write_text(json.dumps(found))


def test_update_goes_on_where_the_system_refuses_memory(soak, tmp_path):
    import multiprocessing

    process = multiprocessing.get_context("forkserver").Process(
        target=_update_with_little_memory, args=(str(tmp_path / "found"),))
    process.start()
    process.join()
    fitting_row, loss, expected_loss, norm, expected_norm = json.loads((tmp_path / "found").read_text())
    assert 0 < fitting_row < 10_000
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_what_fits_is_what_was_computed_also_with_several_updates(monkeypatch):
    """Old log-probs need less room than a gradient; the next step has room at once."""
    real, tries = train.token_logprobs, []

    def limited(policy, row, temperature, config, token_loss=None):
        tries.append(row.input_ids.shape[1])
        if row.input_ids.shape[1] > (400 if token_loss is None else 200):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(policy, row, temperature, config, token_loss)

    monkeypatch.setattr(train, "token_logprobs", limited)
    config = Config(tokens_per_micro_batch=10**6, updates_per_batch=2, prompts_per_step=8)
    engine = HFEngine(tiny_model("qwen3", tied=True), data.toy_tokenizer(), config)
    groups = [Group(Problem("p", "", ("1",)), random_rollouts(8, seed)) for seed in range(8)]
    optimizer = torch.optim.SGD(engine.policy.parameters())
    for step in range(2):
        tries.clear()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        update = train.update_policy(engine.policy, optimizer, scaler, groups, 1.0, config)
        config = train.with_what_fits(config, engine, update, train.Display())
        assert 50 < config.tokens_per_micro_batch <= 200
        assert (max(tries) > 200) == (step == 0)
        assert (update.fitting_row is None) == (step == 1)


def test_generation_without_memory_goes_on_with_fewer_at_once():
    model = tiny_model("qwen3", tied=True)
    engine = HFEngine(model, data.toy_tokenizer(), Config(rollouts_per_batch=8))
    real, refused = model.base_model.forward, []

    def forward(input_ids, **others):
        if len(input_ids) > 3:
            refused.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(input_ids=input_ids, **others)

    model.base_model.forward = forward
    prompts = [(4, 5), (6,), (7, 8, 9), (3, 3), (5, 5)]
    found = dict(generate_once(engine, prompts, 4, Sampling(1.0, 6, seed=5), None, None))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(len(responses) == 4 for responses in found.values())
    assert refused == [8, 4]
    assert engine.rollouts_per_batch == 2
    model.base_model.forward = lambda **inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(EngineError, match="--max-response-tokens") as ended:
        list(generate_once(engine, prompts, 4, Sampling(1.0, 6, seed=5), None, None))
    assert not isinstance(ended.value, OutOfMemory)


# ------------------------------------------------------------------------- what was run


def test_starts_are_recorded_and_what_has_changed_is_said(soak, tmp_path):
    problems = tmp_path / "sums.jsonl"
    rows = [{"problem": p.text, "answer": p.answers[0]} for p in data.toy_problems(30, seed=5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    options = [*soak.options, "--data", problems, "--eval-every", "-1", "--steps", 1, "--temperature", "1"]
    assert Script([*options, "--run-dir", run], soak.environment, cwd=soak.folder).wait().returncode == 0
    problems.write_text("\n" + problems.read_text())  # the same problems
    ended = Script(["--resume", run, "--steps", 2], soak.environment, cwd=soak.folder).wait()
    assert ended.returncode == 0, ended.stderr
    assert "warning: files changed since the last start" in ended.stdout
    first, second = lines(run / "starts.jsonl")
    assert first["step"] == 0
    assert second["step"] == 1
    assert f"--run-dir {run}" in first["command"]
    assert first["versions"]["torch"] == torch.__version__
    assert first["hardware"]["cores"] == os.cpu_count()
    assert list(first["files"]) == [str(problems), "coin.py"]
    assert first["files"] != second["files"]
    assert first["versions"] == second["versions"]
