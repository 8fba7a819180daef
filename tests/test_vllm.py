"""The vLLM engine on its CPU build: log-probs, weight sync, YaRN and the loop, against the Hugging Face engine."""
from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import even_sums, lines, perturb, tiny_model
from fast_start import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

import data
from polaris_mini import Config, icepop_ratio, truncated_ratio, yarn_config
from rollout import (
    EngineError, HFEngine, ModelError, Sampling, VLLMEngine, causal_lm, generate_once, kv_cache_bytes, load_model,
    policy_weights, uses_vllm,
)
from train import add_lora

pytest.importorskip("vllm", reason="vLLM is not installed")
TOKENIZER = data.toy_tokenizer()
CPU = torch.device("cpu")


@contextlib.contextmanager
def vllm_engine(model: Path, max_tokens: int = 96, **options):
    """One engine at a time: vLLM keeps state in the process."""
    engine = VLLMEngine(str(model), TOKENIZER, Config(device="cpu", rollouts_per_batch=16), max_tokens=max_tokens,
                        **options)
    with contextlib.closing(engine):
        yield engine


def saved(policy: torch.nn.Module, folder: Path) -> Path:
    model = causal_lm(policy)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    return folder


def prompts(count: int = 6) -> list[list[int]]:
    return [[(7 * i + j) % 46 + 4 for j in range(3 + 5 * i)] for i in range(count)]


def logprobs_of(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)])
def test_responses_logprobs_and_sync(kind, tied, tmp_path):
    """As drawn from the disk's weights and, after a sync, from the policy's: groups, limits, log-probs at T, greedy."""
    policy = tiny_model(kind, tied=tied, head_dim=32)
    with vllm_engine(saved(policy, tmp_path)) as engine:
        for _ in range(2):
            drawn = dict(engine.generate(prompts(), 4, Sampling(1.4, 20, seed=1)))
            assert sorted(drawn) == list(range(6))
            assert all(len(responses) == 4 for responses in drawn.values())
            reasons = {r.finish_reason for responses in drawn.values() for r in responses}
            assert reasons == {"stop", "length"}
            for i, responses in drawn.items():
                for r in responses:
                    assert (r.tokens[-1] == 3) == (r.finish_reason == "stop")
                    assert 3 not in r.tokens[:-1]
                    assert len(r.tokens) <= 20
                    expected = logprobs_of(policy, prompts()[i], r.tokens, 1.4)
                    assert torch.tensor(r.sampler_logprobs) == pytest.approx(expected, abs=2e-5)
            hf = HFEngine(policy, TOKENIZER, Config(device="cpu"))
            greedy = Sampling(1.0, 20, seed=0, top_k=1)
            assert ({i: [r.tokens for r in found] for i, found in engine.generate(prompts(), 1, greedy)}
                    == {i: [r.tokens for r in found] for i, found in hf.generate(prompts(), 1, greedy)})
            perturb(policy)
            engine.wake(policy)


def test_seed_decides_and_progress_counts_every_token(tmp_path):
    with vllm_engine(saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path)) as engine:
        counted: list[int] = []
        first = dict(engine.generate(prompts(), 4, Sampling(1.0, 20, seed=3), counted.append))
        assert sum(counted) == sum(len(r.tokens) for responses in first.values() for r in responses)
        assert len(counted) > 10
        assert dict(engine.generate(prompts(), 4, Sampling(1.0, 20, seed=3))) == first
        assert dict(engine.generate(prompts(), 4, Sampling(1.0, 20, seed=4))) != first
        left = engine.generate(prompts(), 4, Sampling(1.0, 20, seed=5))
        next(left)
        left.close()  # as Ctrl-C does
        assert not engine.llm.llm_engine.has_unfinished_requests()
        assert dict(engine.generate(prompts(), 4, Sampling(1.0, 20, seed=3))) == first


def test_lora_is_merged_on_the_way(tmp_path):
    base = tiny_model("qwen3", tied=True, head_dim=32)
    with vllm_engine(saved(base, tmp_path), weights="policy") as engine:
        policy = add_lora(base, Config(lora_rank=4), None)
        perturb(policy)
        engine.wake(policy)
        for i, (response,) in engine.generate(prompts(), 1, Sampling(1.0, 20, seed=0)):
            expected = logprobs_of(policy.get_base_model(), prompts()[i], response.tokens, 1.0)
            assert torch.tensor(response.sampler_logprobs) == pytest.approx(expected, abs=2e-5)


def test_policy_weights_are_named_as_in_a_checkpoint_and_leave_the_policy_alone(tmp_path):
    base = tiny_model("llama", tied=False)
    names = set(base.state_dict())
    policy = add_lora(base, Config(lora_rank=4), None)
    perturb(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    weights = dict(policy_weights(policy, torch.bfloat16))
    assert set(weights) == names
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    merged = policy.merge_and_unload().state_dict()
    for name, weight in policy_weights_of(merged).items():
        assert torch.equal(weights[name], weight.bfloat16()), name


def policy_weights_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("scale", [1.0, 1.0405])
def test_yarn_is_the_same_in_both_engines_beyond_the_trained_length(scale, tmp_path):
    """Log-probs at positions past the original ones; another attention scale would show."""
    folder = saved(tiny_model("qwen3", tied=True, head_dim=32), tmp_path)
    settings = {"factor": 2.0, "original_max_positions": 64, "attention_scale": scale}
    hf = load_model(str(folder), dtype=torch.float32, device=CPU, rope=yarn_config(**settings))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    prompt = [(5 * j) % 46 + 4 for j in range(100)]
    with vllm_engine(folder, max_tokens=128, rope=yarn_config(**settings)) as engine:
        ((_, responses),) = engine.generate([prompt], 4, Sampling(1.0, 20, seed=0))
    for r in responses:
        drawn = torch.tensor(r.sampler_logprobs)
        assert drawn == pytest.approx(logprobs_of(hf, prompt, r.tokens, 1.0), abs=2e-5)
        assert (drawn - logprobs_of(plain, prompt, r.tokens, 1.0)).abs().max() > 1e-3


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
    with pytest.raises(ModelError, match=r"one response of 10000000 tokens .* at most \d+ tokens fit"):
        kv_cache_bytes(config, Config(device="cpu"), max_tokens=10_000_000)
    small = AutoConfig.for_model("qwen3", hidden_size=64, num_hidden_layers=2, num_key_value_heads=2,
                                 num_attention_heads=4, head_dim=32)
    cache = kv_cache_bytes(small, Config(device="cpu", rollouts_per_batch=8), max_tokens=100)
    assert cache == 2 * 2 * 2 * 32 * 4 * 228 * 8  # keys and values, layers, heads, width, bytes, tokens, sequences


def test_generation_without_memory_goes_on_with_fewer_at_once(tmp_path, monkeypatch):
    policy = tiny_model("qwen3", tied=True, head_dim=32)
    with vllm_engine(saved(policy, tmp_path)) as engine:
        real, running = engine.llm.llm_engine.step, []
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler

        def step():
            if len(scheduler.running) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            outputs = real()
            running.append(len(scheduler.running))
            return outputs

        monkeypatch.setattr(engine.llm.llm_engine, "step", step)
        drawn = dict(generate_once(engine, prompts(), 4, Sampling(1.0, 20, seed=1), None, None))
        assert sorted(drawn) == list(range(6))
        assert engine.rollouts_per_batch == 2
        assert running[0] == 16
        assert running[-10:] <= [2] * 10
        for i, responses in drawn.items():
            for r in responses:
                expected = logprobs_of(policy, prompts()[i], r.tokens, 1.0)
                assert torch.tensor(r.sampler_logprobs) == pytest.approx(expected, abs=2e-5)


def test_what_vllm_refuses_is_one_error(tmp_path):
    folder = saved(tiny_model("qwen3", tied=True, head_dim=8), tmp_path)  # its CPU kernels know no such narrow heads
    with vllm_engine(folder) as engine, pytest.raises(EngineError, match=r"while it generated \(Unsupported CPU"):
        dict(engine.generate(prompts(), 1, Sampling(1.0, 5, seed=0)))
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"engine is vllm: it does not start .* --engine hf"):
        VLLMEngine(str(folder), TOKENIZER, Config(device="cpu"), max_tokens=100)


def test_on_a_cpu_vllm_is_used_only_when_asked_for():
    assert not uses_vllm(Config(device="cpu"))
    assert uses_vllm(Config(device="cpu", engine="vllm"))


def test_vllm_takes_the_first_gpu_only(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=r"device is cuda:1: .* CUDA_VISIBLE_DEVICES=1"):
        VLLMEngine(str(tmp_path), TOKENIZER, Config(device="cuda:1"), max_tokens=100)


def test_ratios_of_trainer_and_sampler():
    """Source: TIS, min(trainer / sampler, 2); IcePop, 0 outside [0.5, 2]."""
    trainer, sampler = torch.tensor([0.25, 0.8, 0.1, 0.3]).log(), torch.tensor([0.5, 0.2, 0.3, 0.2]).log()
    assert truncated_ratio(trainer, sampler).tolist() == pytest.approx([0.5, 2.0, 1 / 3, 1.5])
    assert icepop_ratio(trainer, sampler).tolist() == pytest.approx([0.5, 0.0, 0.0, 1.5])


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_policy_learns_and_its_logprobs_are_the_engines(run_train, tmp_path, engine):
    result = run_train("--engine", engine, "--data", even_sums(tmp_path / "even.jsonl", 60), "--warmup-steps", 150,
                       "--stages", "10:1.0:40", "--prompts-per-step", 16, "--eval-problems", 16, "--eval-rollouts", 4,
                       "--lr", "3e-4", "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert f"engine {engine}" in result.stdout
    before, after = lines(tmp_path / "run" / "evaluations.jsonl")
    assert before["avg_at_k"] < 0.6
    assert after["avg_at_k"] > before["avg_at_k"] + 0.3
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 10
    updated = [m for m in metrics if m["policy/loss"] is not None]
    assert len(updated) >= 4
    assert all(0 <= m["mismatch/kl"] < 1e-6 and m["mismatch/ratio_max"] < 1.01 for m in updated)
    assert metrics[-1]["time/sync"] > 0


FAULT = """
import sys, time
import train
from vllm.v1.engine.llm_engine import LLMEngine

step, steps = LLMEngine.step, 0

def faulty(self):
    global steps
    steps += 1
    if steps > 150:
        {fault}
    return step(self)

LLMEngine.step = faulty
try:
    train.main(sys.argv[1:])
except train.ModelError as error:
    sys.exit(f"error: {{error}}")
"""


@pytest.mark.parametrize(("fault", "message"), [
    ("raise RuntimeError('the device is lost')", "it failed while it generated (the device is lost): lower"),
    ("time.sleep(600)", "no new token for 8 s, it hangs: raise --engine-timeout"),
    ("time.sleep(0.1); return []", "no new token for 8 s, it hangs: raise --engine-timeout"),  # busy with nothing
])  # fmt: skip
def test_an_engine_that_fails_or_hangs_costs_no_finished_step(fault, message, environment, run_train, tmp_path):
    options = ["--engine", "vllm", "--warmup-steps", 30, "--stages", "9:1.0:40", "--prompts-per-step", 8,
               "--group-size", 4, "--eval-every", -1, "--engine-timeout", 8, "--run-dir", tmp_path / "run"]
    ended = subprocess.run([sys.executable, "-c", FAULT.format(fault=fault), *map(str, options)], cwd=ROOT,
                           env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode in (1, 2)
    assert message in ended.stderr
    done = [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert 1 <= len(done) < 9
    assert (tmp_path / "run" / "checkpoints" / f"step_{len(done):06d}").is_dir()
    result = run_train("--resume", tmp_path / "run", "--engine", "hf")
    assert result.returncode == 0, result.stderr
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))
