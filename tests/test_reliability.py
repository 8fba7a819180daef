"""Faults made on purpose: kills, signals, a full disk, damaged files, gradients that are not finite."""
from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import lines
from fast_start import Faults, Script
from soak import EVERY, Soak, kept_groups, result_of

import rollout
import train
from data import UserError

ENDLESS = ["--stages", "10000:1.0:10", "--eval-every", "-1"]
SHORT = ["--stages", "1:auto:10", "2:1.1:14", "--probe-temperatures", "0.8,1.2", "--checkpoint-every", "2"]
STEPS = 3


@pytest.fixture(scope="module")
def soak(tmp_path_factory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), seed=3)


@pytest.fixture(scope="module")
def begin(soak):
    """Return what trains in this process: a new run with these options, or a resumed one, to its end.

    Signals have their default actions before it starts, even where the tests have been started with some ignored.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
                signal.SIGHUP: signal.SIG_DFL}

    def call(run: Path, *options: object, ignored: int = 0) -> None:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if number == ignored else handler)
        start = ["--resume", run] if run.exists() else [*soak.options, "--run-dir", run]
        with contextlib.chdir(soak.folder):
            train.main([str(argument) for argument in (*start, *options)])

    before = {number: signal.getsignal(number) for number in handlers}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(begin, soak) -> Path:
    """A short run that nothing disturbed."""
    run = soak.folder / "finished"
    begin(run, *SHORT)
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The same run when its last step had not begun."""
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:06d}")
    return run


def notes(run: Path, beginning: str) -> list[str]:
    return [line for line in (run / "log.txt").read_text().splitlines() if line.startswith(beginning)]


def moments_until_a_step(run: Path, process: Script) -> Iterator[None]:
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
        yield


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------ kill anything


def test_soak_in_short(soak):
    """`python tests/soak.py` at length: docs/reliability.md."""
    for every in EVERY:
        kills = runs = 0
        while kills < 6:
            kills += soak.kill_and_resume(soak.folder / f"run-{every}-{runs}", 6 - kills, every)
            runs += 1
    assert not soak.faults, soak.report()
    logs = [{name: result[name] for name in result if name.endswith(".jsonl") and "/" not in name}
            for result in soak.expected.values()]
    assert logs[0] == logs[1]  # how often a checkpoint is saved changes nothing


@pytest.mark.parametrize("operation", [1, 2, 4, 6])
def test_killed_while_the_folder_is_made(soak, begin, operation, tmp_path):
    """--resume works from the moment on at which there is a folder of that name."""
    run, options = tmp_path / "new", ["--steps", 1, "--eval-every", "-1"]
    faults = Faults(kill_at=operation, folder=str(tmp_path), witness=str(soak.folder / "witness"))
    process = Script([*soak.options, *options, "--run-dir", run], soak.environment, cwd=soak.folder, faults=faults)
    assert process.wait().returncode == -signal.SIGKILL
    begin(run, *([] if run.exists() else options))
    assert checkpoints(run) == [0, 1]


def test_a_kill_between_the_last_checkpoint_and_the_end_leaves_no_more_behind(finished, begin, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("step_000001", ".step_000000.unfinished"):
        shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / name)
    (run / "kept").mkdir()
    (run / "kept" / "step_000002.rank0.jsonl").touch()
    begin(run)
    assert result_of(run) == result_of(finished)


def test_kept_groups_are_used_unless_the_step_would_draw_otherwise(soak, copy, begin, monkeypatch):
    """A response that was changed in its file shows that the step took it from there."""
    keep = rollout.append_lines

    def append(path, lines):
        keep(path, lines)
        if path.parent.name == "kept" and len(path.read_text().splitlines()) == 3:
            raise SystemExit("as if killed")

    monkeypatch.setattr(rollout, "append_lines", append)
    with pytest.raises(SystemExit):
        begin(copy)
    monkeypatch.undo()
    (path,) = (copy / "kept").iterdir()
    kept = lines(path)
    assert len(kept) == 3
    kept[1]["responses"][2] = [[8, 8, 8, 3], [-1.0] * 4, "stop"]  # 222 and the end
    path.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"key": "cut o')
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    begin(copy)
    begin(other, "--rollouts-per-batch", 7)
    drawn, drawn_otherwise = ([r["response"] for r in lines(run / "rollouts.jsonl")
                               if r["step"] == STEPS and not r["rescued"]]
                              for run in (copy, other))
    assert drawn.count("222") == 1
    assert drawn_otherwise.count("222") == 0
    assert len(drawn) == len(drawn_otherwise) == 24
    assert not (copy / "kept").exists()


def test_a_sink_that_a_resume_goes_on_with_lends_what_it_lent_before(soak, begin, monkeypatch, tmp_path):
    """Eight problems, four a step, a checkpoint after every fifth step, and a kill in between."""
    def sinks(run):
        return {path.name: path.read_bytes() for path in (run / "sink").iterdir()}

    options = ["--eval-problems", 16, "--prompts-per-step", 4, "--group-size", 2, "--checkpoint-every", 5,
               "--stages", "10:1.0:6", "--eval-every", 10]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    begin(straight, *options)
    advance = train.log_step

    def log_step(run, *others):
        advance(run, *others)
        if run.state.step == 8:
            found.update(sinks(run.folder))
            raise SystemExit("as if killed")

    found: dict[str, bytes] = {}
    monkeypatch.setattr(train, "log_step", log_step)
    with pytest.raises(SystemExit):
        begin(killed, *options)
    monkeypatch.undo()
    assert checkpoints(killed) == [0, 5]
    borrowed = [r for r in lines(straight / "rollouts.jsonl") if r["rescued"] and 6 <= r["step"] <= 8]
    assert borrowed
    assert found != sinks(straight)  # steps 6 to 10 have changed it
    begin(killed)
    assert result_of(killed) == result_of(straight)


# ------------------------------------------------------------------------------ signals


def interrupt_at(monkeypatch, run: Path, place: str, number: int) -> None:
    """Let a signal come at the first call of a function in the second step of a run; `place` is module:function."""
    module, name = (train if place.startswith("train") else rollout), place.partition(":")[2]
    real = getattr(module, name)
    called = []

    def call(*arguments, **named):
        result = real(*arguments, **named)
        log = run / "metrics.jsonl"
        if log.exists() and len(lines(log)) == 1 and not called:
            called.append(name)
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(("number", "place", "completed"), [
    (signal.SIGINT, "rollout:append_lines", 1), (signal.SIGTERM, "rollout:append_lines", 1),
    (signal.SIGHUP, "rollout:append_lines", 1), (signal.SIGINT, "train:set_rewards", 2),
    (signal.SIGTERM, "train:update_policy", 2),
])
def test_a_signal_ends_drawing_at_once_and_from_grading_on_the_step_comes_first(
    begin, finished, monkeypatch, capsys, tmp_path, number, place, completed
):
    run = tmp_path / "run"
    interrupt_at(monkeypatch, run, place, number)
    with pytest.raises(SystemExit) as ended:
        begin(run, *SHORT)
    monkeypatch.undo()
    assert ended.value.code == (0 if number == signal.SIGINT else 128 + number)
    assert capsys.readouterr().out.splitlines()[-1] == notes(run, "stopped")[-1] == (
        f"stopped after step {completed}; go on with: python train.py --resume {run}")
    assert len(lines(run / "metrics.jsonl")) == completed
    assert checkpoints(run) == [0, completed]
    assert bool(kept_groups(run / "kept")) == (completed == 1)
    begin(run)
    wanted, found = result_of(finished), result_of(run)
    differing = {name for name in wanted if found.get(name) != wanted[name]}
    assert differing <= {"checkpoints/step_000002/sink.jsonl"}  # there is a checkpoint more, which has some of it


def test_a_signal_while_the_engine_wakes_waits_until_it_is_awake(begin, monkeypatch, tmp_path):
    """Half of its weights would be neither here nor there, and vLLM could not even sleep."""
    run, woken = tmp_path / "run", []

    def wake(engine, policy):
        if (run / "metrics.jsonl").exists():
            signal.raise_signal(signal.SIGINT)
        woken.append(policy)

    monkeypatch.setattr(rollout.HFEngine, "wake", wake)
    with pytest.raises(SystemExit) as ended:
        begin(run, *SHORT, "--eval-every", -1, "--temperature", 1)
    assert (ended.value.code, len(woken), checkpoints(run)) == (0, 2, [0, 1])


def test_a_signal_right_after_a_probe_does_not_lose_it(begin, finished, monkeypatch, tmp_path):
    run = tmp_path / "run"
    real = train.Run.note

    def note(self, text):
        real(self, text)
        if text.startswith("stage 1: temperature"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Run, "note", note)
    with pytest.raises(SystemExit):
        begin(run, *SHORT)
    monkeypatch.undo()
    assert checkpoints(run) == [0]
    begin(run)
    assert lines(run / "probes.jsonl") == lines(finished / "probes.jsonl")


def test_a_second_signal_ends_at_once(begin, monkeypatch, tmp_path):
    run = tmp_path / "run"

    def set_rewards(*_):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same one: many send it to the process and to its group
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(train, "set_rewards", set_rewards)
    with pytest.raises(SystemExit) as ended:
        begin(run, *SHORT, "--eval-every", "-1", "--temperature", 1)
    assert ended.value.code == 128 + signal.SIGTERM
    assert checkpoints(run) == [0]


def test_a_signal_that_nohup_ignores_ends_nothing(begin, finished, monkeypatch, tmp_path):
    run = tmp_path / "run"
    interrupt_at(monkeypatch, run, "rollout:append_lines", signal.SIGHUP)
    begin(run, *SHORT, ignored=signal.SIGHUP)
    assert result_of(run) == result_of(finished)


def test_closed_terminal_saves(soak):
    terminal, slave = os.openpty()
    run = soak.folder / "hangup"
    process = Script([*soak.options, *ENDLESS, "--run-dir", run], soak.environment, cwd=soak.folder,
                     terminal=os.ttyname(slave))
    os.close(slave)
    os.set_blocking(terminal, False)
    for _ in moments_until_a_step(run, process):
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # a terminal that nobody reads would stop the writer
    os.close(terminal)
    assert process.wait(60).returncode == 128 + signal.SIGHUP
    (note,) = notes(run, "stopped")
    assert note.endswith(f"go on with: python train.py --resume {run}")
    assert checkpoints(run)[-1] == len(lines(run / "metrics.jsonl"))


def test_a_second_process_in_a_run_is_refused_until_the_first_is_dead(soak, begin):
    run = soak.folder / "locked"
    first = Script([*soak.options, *ENDLESS, "--run-dir", run], soak.environment, cwd=soak.folder)
    for _ in moments_until_a_step(run, first):
        pass
    with pytest.raises(UserError, match=f"run folder {run}: another process is training in it"):
        begin(run)
    assert first.poll() is None
    first.kill()
    first.wait()
    begin(run, "--steps", 1)
    assert checkpoints(run)


# ----------------------------------------------------------------------- disk and files


@pytest.mark.parametrize("size", [1_000, 10_000, 60_000, 150_000])
def test_disk_that_is_full_leaves_the_run_intact(begin, finished, tmp_path, size):
    """Every file's growth ends at a size: of the configuration, logs, weights, the optimizer's state."""
    run, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises((OSError, UserError), match="too large"):
            begin(run, *SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(run.glob("checkpoints/.*"))
    assert size > 100_000 or not list(run.glob("kept/*"))  # the first checkpoint fails before anything is drawn
    begin(run, *([] if run.exists() else SHORT))
    assert result_of(run) == result_of(finished)


def test_full_disk_is_said_in_one_line(soak):
    process = Script([*soak.options, *SHORT, "--run-dir", "full"], soak.environment, cwd=soak.folder,
                     faults=Faults(longest_file=150_000))
    ended = process.wait()
    assert ended.returncode == 2
    assert ended.stderr.startswith("train.py: error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "harm"), [
    ("model.safetensors", "cut"), ("model.safetensors", "deleted"), ("config.json", "cut"),
    ("trainer_state.json", "cut"), ("trainer_state.json", "deleted"), ("optimizer.pt", "cut"),
    ("optimizer.pt", "emptied"), ("sink.jsonl", "cut"), ("sink.jsonl", "deleted"),
])
def test_damaged_checkpoint_is_named(begin, copy, name, harm):
    newest = copy / "checkpoints" / "step_000002"
    content = (newest / name).read_bytes()
    if harm == "deleted":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises(UserError) as error:
        begin(copy)
    ours = name in ("trainer_state.json", "optimizer.pt", "sink.jsonl")
    assert str(newest / name if ours else newest) in str(error.value)
    assert not ours or "delete" in str(error.value)
    assert checkpoints(copy) == [2]  # nothing is deleted


def test_once_a_damaged_checkpoint_is_deleted_the_one_before_it_goes_on(begin, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_000003")
    begin(run)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert checkpoints(run) == [2, 3]


# ------------------------------------------------------------------------------ numbers


def test_updates_that_are_not_finite_are_skipped_and_end_the_run_in_the_third_step(soak, begin, tmp_path):
    (soak.folder / "huge.py").write_text("def score(response, answer, problem):\n    return len(response) * 1e300\n")
    run = tmp_path / "huge"
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row.*--resume .* with a lower --lr"):
        begin(run, "--reward", "huge:score", "--advantage", "dr_grpo", *ENDLESS, "--checkpoint-every", 1)
    metrics = lines(run / "metrics.jsonl")
    assert [line["optim/skipped"] for line in metrics] == [2, 2, 2]  # both updates of each batch
    assert all(line["optim/grad_norm"] is line["policy/loss"] is None for line in metrics)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert len(notes(run, "warning, step 3: the gradient is not finite: 2 updates")) == 1
    assert {line["step"] for line in lines(run / "rollouts.jsonl")} == {1, 2, 3}
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run / "checkpoints").iterdir()]
    assert weights[0] == weights[1]  # no update has touched them


def test_a_warning_comes_once_also_over_a_resume(begin, tmp_path):
    run = tmp_path / "warned"
    begin(run, "--max-response-tokens", 1, "--steps", 11, "--eval-every", "-1", "--temperature", 1)
    begin(run, "--steps", 13)
    (note,) = notes(run, "warning")
    assert note.startswith("warning, step 10: response/truncated was")
    assert "--max-response-tokens" in note


@pytest.mark.parametrize(("options", "advice"), [
    (["--max-response-tokens", "1"], "% are graded truncated: raise --max-response-tokens"),
    (["--no-require-think"], "are graded no_answer: let --prompt-suffix ask for a box"),
])
def test_where_nothing_is_right_the_prevailing_reason_is_said(soak, tmp_path, options, advice):
    own_reward = soak.options.index("--reward")
    with contextlib.chdir(soak.folder):
        train.main([*map(str, soak.options[:own_reward]), *map(str, soak.options[own_reward + 2 :]), "--steps", "10",
                    "--prompts-per-step", "2", "--temperature", "1", "--max-response-tokens", "150", "--eval-every",
                    "-1", "--run-dir", str(tmp_path / "run"), *options])
    assert advice in notes(tmp_path / "run", "warning, step 10: reward/solve_none was 1")[0]


# ------------------------------------------------------------------------- what was run


def test_each_start_is_recorded(begin, monkeypatch, tmp_path):
    run, start = tmp_path / "run", ["train.py", "--run-dir", "a run"]
    for steps in (1, 2):
        monkeypatch.setattr("sys.argv", [*start, "--steps", str(steps)])
        begin(run, "--steps", steps, "--eval-every", "-1")
    first, second = lines(run / "starts.jsonl")
    assert (first["step"], second["step"]) == (0, 1)
    assert first["command"] == "train.py --run-dir 'a run' --steps 1"
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"] == second["versions"]
    assert first["commit"] == second["commit"]


def test_saving_counts_once_in_the_step_after_it(begin, tmp_path):
    begin(tmp_path / "run", "--steps", 6, "--eval-every", "-1", "--checkpoint-every", 3)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["time/save"] > 0 for line in metrics] == [False, False, False, True, False, False]
    for line in metrics:
        phases = sum(line[f"time/{phase}"] for phase in ("rollout", "reward", "update", "sync", "save"))
        assert line["time/step"] >= phases
