"""The vLLM engine on its CPU build: log-probs, weight sync, YaRN and the loop, against the Hugging Face engine."""
from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import even_sums, lines, random_rollouts, tiny_model
from fast_start import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import toy
import train
from data import encode_prompts
from doctor import perturb, run_of
from polaris_mini import Config, Group, Problem, UserError
from reward import RewardPool
from rollout import (
    HFEngine, Sampling, VLLMEngine, causal_lm, kv_cache_bytes, load_model, load_policy, sample_groups,
    set_rewards, uses_vllm,
)

pytest.importorskip("vllm", reason="vLLM is not installed")
TOKENIZER = toy.toy_tokenizer()
SETTINGS = Config(device="cpu", rollouts_per_batch=16)


@contextlib.contextmanager
def vllm_engine(model: Path, max_tokens: int = 96, **options: Any):
    """One engine at a time: vLLM keeps state in the process."""
    with contextlib.closing(VLLMEngine(str(model), TOKENIZER, SETTINGS, max_tokens, **options)) as engine:
        yield engine


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Return an engine that several tests use, one after another; each gives it a policy first."""
    folder = saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path_factory.mktemp("qwen3"))
    with vllm_engine(folder, policy=tiny_model("qwen3", tied=True, head_dim=32)) as engine:
        yield engine


def saved(policy: torch.nn.Module, folder: Path) -> Path:
    model = causal_lm(policy)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    return folder


def prompts(count: int = 6) -> list[list[int]]:
    return [[(7 * i + j) % 46 + 4 for j in range(3 + 5 * i)] for i in range(count)]


def logprobs_of(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def check_responses(engine: VLLMEngine, policy: PreTrainedModel) -> None:
    """Compare with the policy: groups, limits, log-probs at a temperature, the most likely responses."""
    drawn = dict(engine.generate(prompts(), 4, Sampling(1.4, 20, seed=1)))
    assert sorted(drawn) == list(range(6))
    assert all(len(responses) == 4 for responses in drawn.values())
    assert {r.finish_reason for responses in drawn.values() for r in responses} == {"stop", "length"}
    for i, responses in drawn.items():
        for r in responses:
            assert (r.tokens[-1] == 3) == (r.finish_reason == "stop")
            assert 3 not in r.tokens[:-1]
            assert len(r.tokens) <= 20
            expected = logprobs_of(policy, prompts()[i], r.tokens, 1.4)
            assert torch.tensor(r.sampler_logprobs) == pytest.approx(expected, abs=2e-5)
    hf = HFEngine(policy, TOKENIZER, SETTINGS)
    greedy = Sampling(1.0, 20, seed=0, top_k=1)
    assert ({i: [r.tokens for r in found] for i, found in engine.generate(prompts(), 1, greedy)}
            == {i: [r.tokens for r in found] for i, found in hf.generate(prompts(), 1, greedy)})


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", False), ("qwen2", True), ("llama", False)])
def test_responses_are_those_of_the_weights_on_the_disk_and_then_of_the_policys(kind, tied, tmp_path):
    policy = tiny_model(kind, tied=tied, head_dim=32)
    with vllm_engine(saved(policy, tmp_path)) as engine:
        check_responses(engine, policy)
        perturb(policy)
        engine.wake(policy)
        check_responses(engine, policy)


def check_adapter(engine: VLLMEngine, policy: torch.nn.Module) -> list[torch.Tensor]:
    """Compare log-probs of the engine's own responses with the policy's."""
    found = []
    for i, (response,) in engine.generate(prompts(), 1, Sampling(1.4, 20, seed=0)):
        with torch.no_grad():
            expected = logprobs_of(policy.get_base_model(), prompts()[i], response.tokens, 1.4)
        assert torch.tensor(response.sampler_logprobs) == pytest.approx(expected, abs=1e-4)
        found.append(expected)
    causal_lm(policy).set_attn_implementation("packed")
    return found


@pytest.mark.parametrize("settings", [{}, {"quantize_base": True}], ids=["base of the disk", "base in 4 bits"])
def test_vllm_serves_the_adapter_that_is_trained(tmp_path, settings):
    """Ten steps of training, each with a sync; then an adapter of zero is the base, and another policy's is its own."""
    folder = saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path)
    config = Config(model=str(folder), device="cpu", rollouts_per_batch=16, lora_rank=6, lr=1e-2, **settings)
    policy, other, new = load_policy(config), load_policy(replace(config, lora_rank=2, seed=1)), load_policy(config)
    with contextlib.closing(VLLMEngine(str(folder), TOKENIZER, config, 96, policy=policy)) as engine:
        engine.wake(policy)
        first = check_adapter(engine, policy)
        run = run_of(policy, config)
        for step in range(10):
            train.update_policy(run, [Group(Problem("p", "", ("1",)), random_rollouts(6, seed=step))])
            engine.wake(policy)
            last = check_adapter(engine, policy)
        assert max((a - b).abs().max() for a, b in zip(first, last, strict=True) if len(a) == len(b)) > 1e-2
        perturb(other)
        engine.wake(other)
        check_adapter(engine, other)
        engine.wake(new)
        for a, b in zip(check_adapter(engine, new), first, strict=True):
            torch.testing.assert_close(a, b)


def test_an_engine_that_begins_without_weights_gets_the_policys(qwen3):
    policy = tiny_model("qwen3", tied=True, head_dim=32)
    for _ in range(2):
        qwen3.wake(policy)
        check_responses(qwen3, policy)
        qwen3.sleep()
        perturb(policy)


def test_a_seed_repeats_and_what_is_left_undone_leaves_no_trace(qwen3):
    qwen3.wake(tiny_model("qwen3", tied=True, head_dim=32))
    first = dict(qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=3)))
    assert dict(qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=3))) == first
    assert dict(qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=4))) != first
    assert len(dict(qwen3.generate([[7] * 70] * 40, 1, Sampling(1.0, 20, seed=3)))) == 40  # more than a step can take
    left = qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=5))
    next(left)
    left.close()  # as Ctrl-C does
    assert not qwen3.llm.llm_engine.has_unfinished_requests()
    assert dict(qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=3))) == first


def test_finished_groups_are_not_asked_for_again(qwen3, tmp_path):
    policy = tiny_model("qwen3", tied=True, head_dim=32)
    qwen3.wake(policy)
    assert sorted(i for i, _ in qwen3.generate(prompts(), 4, Sampling(1.0, 20, seed=3), {0, 2, 5})) == [1, 3, 4]
    problems = encode_prompts(toy.toy_problems(6, seed=0), TOKENIZER, Config(prompt_suffix=""))
    question = (problems, 4, Sampling(1.0, 20, seed=3), tmp_path / "step_000000")
    with RewardPool(require_think=True) as pool:
        first = set_rewards(*sample_groups(qwen3, pool, *question))
        (file,) = tmp_path.iterdir()
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
        again = set_rewards(*sample_groups(qwen3, pool, *question))
    kept = {line["number"] for line in lines(file)[:4]}
    assert [group.problem for group in again] == problems
    assert all(again[i] == first[i] for i in kept)
    assert len(lines(file)) == 6
    for group in again:
        for r in group.rollouts:
            expected = logprobs_of(policy, list(r.prompt_tokens), r.response_tokens, 1.0)
            assert torch.tensor(r.sampler_logprobs) == pytest.approx(expected, abs=2e-5)


def test_yarn_is_the_same_in_both_engines_beyond_the_trained_length(tmp_path):
    """Log-probs at positions past the original ones; another attention scale would show."""
    folder = saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}
    hf = load_model(str(folder), SETTINGS, torch.float32, rope=yarn)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    prompt = [(5 * j) % 46 + 4 for j in range(100)]
    with vllm_engine(folder, max_tokens=128, rope=yarn) as engine:
        ((_, responses),) = engine.generate([prompt], 4, Sampling(1.0, 20, seed=0))
    for r in responses:
        sampled = torch.tensor(r.sampler_logprobs)
        assert sampled == pytest.approx(logprobs_of(hf, prompt, r.tokens, 1.0), abs=2e-5)
        assert (sampled - logprobs_of(plain, prompt, r.tokens, 1.0)).abs().max() > 1e-3


def test_responses_may_be_longer_than_the_positions_in_the_models_config(tmp_path):
    """As in the release, whose later stages go beyond Qwen3's 40960."""
    policy = tiny_model("qwen3", tied=True, head_dim=32)
    folder = saved(policy, tmp_path)
    prompt = [(5 * j) % 46 + 4 for j in range(policy.config.max_position_embeddings + 20)]
    with vllm_engine(folder, max_tokens=len(prompt) + 20) as engine:
        ((_, (response,)),) = engine.generate([prompt], 1, Sampling(1.0, 20, seed=0))
    expected = logprobs_of(policy, prompt, response.tokens, 1.0)
    assert torch.tensor(response.sampler_logprobs) == pytest.approx(expected, abs=2e-5)


def test_a_cache_too_small_for_one_response_says_what_would_fit():
    config = AutoConfig.for_model("qwen3", hidden_size=4096, num_hidden_layers=80, num_key_value_heads=64,
                                  num_attention_heads=64, head_dim=128)
    with pytest.raises(UserError, match=r"may have 10000000 tokens, \d+ fit into the memory"):
        kv_cache_bytes(config, Config(device="cpu"), max_tokens=10_000_000)
    small = AutoConfig.for_model("qwen3", hidden_size=64, num_hidden_layers=2, num_key_value_heads=2,
                                 num_attention_heads=4, head_dim=32)
    cache = kv_cache_bytes(small, Config(device="cpu", rollouts_per_batch=8), max_tokens=100)
    assert cache == 2 * 2 * 2 * 32 * 4 * 228 * 8  # keys and values, layers, heads, width, bytes, tokens, sequences


def test_a_model_that_vllm_cannot_load_is_one_error(tmp_path):
    folder = saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"engine is vllm: it does not start .* --engine hf"):
        VLLMEngine(str(folder), TOKENIZER, SETTINGS, 100)


def test_on_a_cpu_vllm_is_used_only_when_asked_for():
    assert not uses_vllm(Config(device="cpu"))
    assert uses_vllm(Config(device="cpu", engine="vllm"))


def test_vllm_takes_the_first_gpu_only(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"device is cuda:1: .* CUDA_VISIBLE_DEVICES=1"):
        VLLMEngine(str(tmp_path), TOKENIZER, Config(device="cuda:1"), 100)


# ------------------------------------------------------------------------------------ runs


def test_policy_learns_and_its_logprobs_are_the_engines(tmp_path):
    train.main(["--preset", "toy", "--engine", "vllm", "--device", "cpu", "--data",
                str(even_sums(tmp_path / "even.jsonl", 60)), "--stages", "8:1.0:40", "--prompts-per-step", "12",
                "--eval-problems", "16", "--eval-rollouts", "4", "--lr", "1e-3", "--run-dir", str(tmp_path / "run")])
    before, after = lines(tmp_path / "run" / "evaluations.jsonl")
    assert after["avg_at_k"] > before["avg_at_k"] + 0.2
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    updated = [m for m in metrics if m["policy/loss"] is not None]
    assert len(updated) >= 4
    assert all(0 <= m["mismatch/kl"] < 1e-6 and m["mismatch/ratio_max"] < 1.01 for m in updated)
    assert metrics[-1]["time/sync"] > 0


HANGING = """
import sys, time
import train
from vllm.v1.engine.llm_engine import LLMEngine

step, steps = LLMEngine.step, 0

def hanging(self):
    global steps
    steps += 1
    if steps > 150:
        time.sleep(600)
    return step(self)

LLMEngine.step = hanging
train.main(sys.argv[1:])
"""


def test_a_step_of_vllm_that_hangs_ends_the_process_and_costs_nothing_that_was_finished(environment, tmp_path):
    options = ["--engine", "vllm", "--stages", "9:1.0:80", "--prompts-per-step", "8", "--group-size", "4",
               "--eval-every", "-1", "--engine-timeout", "4", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", HANGING, *options], cwd=ROOT, env=environment, capture_output=True,
                           text=True, timeout=120, check=False)  # fmt: skip
    assert ended.returncode == 1
    assert "Timeout (0:00:04)!" in ended.stderr
    assert "in hanging" in ended.stderr  # where it hung
    done = [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert 1 <= len(done) < 9
    assert (tmp_path / "run" / "checkpoints" / f"step_{len(done):06d}").is_dir()
    assert len(lines(tmp_path / "run" / "kept" / f"step_{len(done):06d}.rank0.jsonl")) >= 1
    train.main(["--resume", str(tmp_path / "run"), "--engine", "hf", "--steps", str(len(done) + 1)])
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, len(done) + 2))


def test_a_sleeping_engine_wakes_before_it_ends():
    """What sleep has unmapped, CUDA fails to free, and then the next engine of the process cannot start."""
    calls: list[object] = []
    core = SimpleNamespace(shutdown=lambda: calls.append("shutdown"))
    llm = SimpleNamespace(wake_up=lambda tags: calls.append(tags), llm_engine=SimpleNamespace(engine_core=core))
    engine: Any = SimpleNamespace(sleeps=True, llm=llm, _move_policy=lambda device: calls.append(device.type))
    VLLMEngine.close(engine)
    assert calls == ["cpu", ["weights"], ["kv_cache"], "shutdown"]
