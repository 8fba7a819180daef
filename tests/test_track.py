"""Metrics of a run in a tracker: tensorboard, which writes files that can be read back."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import track
from conftest import lines

import train
from polaris_mini import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("track") / "run"
    train.main(["--steps", "2", "--prompts-per-step", "4", "--group-size", "2", "--eval-rollouts", "1",
                "--max-response-tokens", "12", "--run-dir", str(folder)])
    return folder


@pytest.mark.parametrize("follow", [False, True])
def test_all_metrics_reach_the_tracker(run, follow):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track.track(track.Track(run, to="tensorboard", follow=follow)) == 3  # with the evaluation before step 1
    events = EventAccumulator(str(run / run.name))
    events.Reload()
    metrics = lines(run / "metrics.jsonl")
    numbers = {name for line in metrics for name, value in line.items() if value is not None} - {"step"}
    assert numbers | {"eval/avg_at_k", "eval/pass_at_k"} <= set(events.Tags()["scalars"])
    found = {event.step: event.value for event in events.Scalars("reward/mean")}
    assert found == pytest.approx({line["step"]: line["reward/mean"] for line in metrics})
    evaluated = {event.step for event in events.Scalars("eval/avg_at_k")}
    assert evaluated == {line["step"] for line in lines(run / "evaluations.jsonl")}


def test_wrong_input_is_said_in_one_line(run, tmp_path):
    with pytest.raises(UserError, match="no run in it"):
        track.track(track.Track(tmp_path))
    with pytest.raises(UserError, match=r"to is nothing: give one of .*wandb"):
        track.track(track.Track(run, to="nothing"))


def test_a_run_is_running_while_its_log_is_locked(run):
    assert not track.is_running(run)
    import data

    with data.open_locked(run / "log.txt"):
        assert track.is_running(run)
    assert json.loads((run / "config.json").read_text())["stages"]
