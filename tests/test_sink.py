"""The sink gives back what was put in, and what it lends does not depend on where a run was killed."""
from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import data
from data import ProblemSampler, Sink
from polaris_mini import Group, Problem, Rollout, rescue


def rollout(problem_id: str, text: str = "", reward: float = 1.0) -> Rollout:
    rng = random.Random(problem_id + text)
    tokens = [rng.randrange(200_000) for _ in range(20)]
    logprobs = [-rng.expovariate(1) for _ in tokens]
    return Rollout(problem_id, (1, 2, 3), tokens, logprobs, text, "stop", reward, "correct")


def test_sink_gives_back_what_was_put_in(tmp_path: Path) -> None:
    odd = Rollout("é/../\n", (), [0, 2**31 - 1], [-0.0, -1e-320, -1 / 3, float("-inf")], "half \ud800, \0 \n\u2028é",
                  "length", 0.5, "\udfff", advantage=-0.1)  # fmt: skip
    sink = Sink(tmp_path / "sink")
    for item in (odd, rollout("a"), rollout("b", "not written")):
        assert sink.get(item.problem_id) is None
        sink[item.problem_id] = item
        assert sink.get(item.problem_id) is item
        if item.text != "not written":
            sink.write()
            assert sink.changes == {}
            assert sink.get(item.problem_id) == item
    assert {len(path.name) for path in (tmp_path / "sink").iterdir()} == {64 + len(".json")}

    again = Sink(tmp_path / "sink")
    assert str(again.get(odd.problem_id)) == str(odd)  # -0.0 too
    assert again.get("a") == rollout("a")
    assert [type(again.get("a").prompt_tokens), type(again.get("a").response_tokens)] == [tuple, list]
    assert again.get("b") is None


def test_sink_keeps_the_latest(tmp_path: Path) -> None:
    sink = Sink(tmp_path)
    for step in range(3):
        sink["a"] = rollout("a", f"step {step}")
        assert sink.get("a").text == f"step {step}"
        if step < 2:
            sink.write()
    assert Sink(tmp_path).get("a").text == "step 1"


# ------------------------------------------------- a run that is killed and resumed

PROBLEMS = [Problem(f"p{i}", f"{i}?", (str(i),)) for i in range(8)]
STEPS, PER_STEP, CHECKPOINT_EVERY = 23, 4, 5


class Killed(BaseException):
    pass


class SmallRun:
    """What train.py does with sampler, sink and checkpoints, without a model; `lent` is what rescue borrowed."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        self.sampler, self.sink = ProblemSampler(PROBLEMS, seed=3), Sink(folder / "sink")
        self.step, self.lent = 0, []
        if self.checkpoint.exists():
            state = json.loads((self.checkpoint / "state.json").read_text())
            self.step, self.lent = state["step"], state["lent"]
            self.sampler.load_state_dict(state["sampler"])
            for line in data.read_lines(self.checkpoint / "sink.jsonl"):
                self.sink.changes[line["problem_id"]] = Rollout(**line)
            self.sink.write()

    def train(self, last: int) -> None:
        while self.step < last:
            self.step += 1
            groups = [self.draw(problem) for problem in self.sampler.peek(PER_STEP)]
            for group in rescue(groups, self.sink, random.Random(self.step)):
                rescued = [rollout for rollout in group.rollouts if rollout.rescued]
                self.lent += [[self.step, r.problem_id, r.text, r.sampler_logprobs] for r in rescued]
            self.sampler.advance(PER_STEP)
            if self.step % CHECKPOINT_EVERY == 0:
                self.save()

    def draw(self, problem: Problem) -> Group:
        """Draw two responses, about one in four correct, the same ones whenever the step is repeated."""
        rng = random.Random(f"{self.step} {problem.id}")
        texts = [f"step {self.step}, response {i}" for i in range(2)]
        return Group(problem, [rollout(problem.id, text, rng.choice([0.0, 0.0, 0.0, 1.0])) for text in texts])

    def save(self) -> None:
        if self.checkpoint.exists():
            data.remove_whole(self.checkpoint)
        with data.written_whole(self.checkpoint) as beside:
            state = {"step": self.step, "lent": self.lent, "sampler": self.sampler.state_dict()}
            (beside / "state.json").write_text(json.dumps(state))
            data.append_lines(beside / "sink.jsonl", map(asdict, self.sink.changes.values()))
        self.sink.write()


def result(run: SmallRun) -> tuple[list[object], dict[str, Rollout]]:
    found = {problem.id: run.sink.get(problem.id) for problem in PROBLEMS}
    return run.lent, {problem_id: replace(item, prompt_tokens=()) for problem_id, item in found.items() if item}


def outcome(folder: Path, kills: Iterable[int]) -> tuple[list[object], dict[str, Rollout]]:
    for step in kills:
        SmallRun(folder).train(step)  # and dropped, with all that it had not written
    run = SmallRun(folder)
    run.train(STEPS)
    return result(run)


@pytest.mark.parametrize("kills", [[1], [5], [7], [12, 14], [3, 4, 9, 10, 11, 19, 22], [22, 22, 22]], ids=str)
def test_rescue_finds_what_was_there(tmp_path: Path, kills: list[int]) -> None:
    undisturbed = outcome(tmp_path / "undisturbed", [])
    assert outcome(tmp_path / "killed", kills) == undisturbed
    lent, sink = undisturbed
    assert len(lent) > 20
    assert len(sink) == len(PROBLEMS)


@pytest.mark.parametrize("files", range(6))
def test_killed_between_checkpoint_and_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """The checkpoint of step 10 is there, but only some of its changes are in the sink's files."""
    write_whole, written = data.write_whole, []

    def write_until_killed(path: Path, text: str) -> None:
        if len(written) == files:
            raise Killed
        written.append(path)
        write_whole(path, text)

    run = SmallRun(tmp_path / "killed")
    run.train(9)
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_whole", write_until_killed)
        with pytest.raises(Killed):
            run.train(10)
    assert outcome(tmp_path / "killed", [13]) == outcome(tmp_path / "undisturbed", [])


def test_files_written_before_their_checkpoint_would_show_later_responses(tmp_path: Path) -> None:
    """Why the trainer calls `write` after the checkpoint only, and that the tests above notice it if it does not."""
    undisturbed = outcome(tmp_path / "undisturbed", [])
    same = []
    for step in range(1, STEPS):
        run = SmallRun(tmp_path / f"{step}")
        run.train(step)
        run.sink.write()
        same.append(outcome(tmp_path / f"{step}", []) == undisturbed)
    assert not all(same)
