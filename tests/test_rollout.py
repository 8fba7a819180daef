"""The Hugging Face engine: its log-probs are the trainer's, its seeds hold, its limits too."""
from __future__ import annotations

import random

import pytest
import torch
from conftest import tiny_model

import data
from polaris_mini import Config, Problem, Rollout
from reward import RewardPool
from rollout import (
    Evaluation, HFEngine, ModelError, Response, Sampling, causal_lm, evaluate, load_model, load_tokenizer,
    sample_groups, set_rewards, uses_vllm,
)
from train import pack, token_logprobs

TOKENIZER = data.toy_tokenizer()
EOS = TOKENIZER.eos_token_id


def engine(kind: str = "qwen3", rollouts_per_batch: int = 64) -> HFEngine:
    return HFEngine(tiny_model(kind, tied=True), TOKENIZER, Config(rollouts_per_batch=rollouts_per_batch))


def draw(e, prompts_, sampling, on_tokens=None):
    """One response to each prompt, in order."""
    drawn = dict(e.generate(prompts_, 1, sampling, on_tokens))
    return [drawn[i][0] for i in range(len(prompts_))]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 50) for _ in range(rng.randint(1, 15))] for _ in range(count)]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_sampler_logprobs_are_the_trainers(kind, temperature):
    """Padding, the cache, rows that leave the batch and packing: none of them changes a log-prob."""
    e = engine(kind, rollouts_per_batch=16)
    responses = draw(e, prompts(40), Sampling(temperature, 30, seed=1))
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    rollouts = [
        Rollout("p", prompt, r.tokens, r.sampler_logprobs, "", r.finish_reason)
        for prompt, r in zip(prompts(40), responses, strict=True)
    ]
    for row in pack([(r, 1) for r in rollouts], 300):
        logprobs, _ = token_logprobs(causal_lm(e.policy), row, temperature, Config())
        torch.testing.assert_close(logprobs, row.sampler_logprobs, rtol=0, atol=3e-5)


def test_responses_end_at_the_stop_token_or_the_limit():
    for response in draw(engine(), prompts(60), Sampling(1.0, 20, seed=0)):
        assert len(response.tokens) == len(response.sampler_logprobs) <= 20
        assert EOS not in response.tokens[:-1]
        assert (response.tokens[-1] == EOS) == (response.finish_reason == "stop")
        assert response.finish_reason == "stop" or len(response.tokens) == 20


def test_every_stop_token_of_the_generation_config_ends_a_response():
    e = engine()
    e.policy.generation_config.eos_token_id = list(range(4, 50))
    e = HFEngine(e.policy, TOKENIZER, Config(rollouts_per_batch=8))
    assert max(len(r.tokens) for r in draw(e, prompts(20), Sampling(1.0, 50, seed=0))) < 15


def test_a_seed_repeats_and_another_does_not():
    e = engine()
    first = draw(e, prompts(10), Sampling(1.0, 20, seed=3))
    torch.rand(7)  # the global random state plays no part
    assert draw(e, prompts(10), Sampling(1.0, 20, seed=3)) == first
    assert draw(e, prompts(10), Sampling(1.0, 20, seed=4)) != first


def test_samples_follow_the_models_distribution():
    """4,000 first tokens against the probabilities at T = 1.4."""
    e = engine(rollouts_per_batch=4000)
    prompt = [5, 9, 11]
    drawn = torch.tensor([r.tokens[0] for r in draw(e, [prompt] * 4000, Sampling(1.4, 1, seed=0))])
    model = causal_lm(e.policy)
    model.set_attn_implementation("sdpa")
    expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.4).softmax(-1)
    frequency = drawn.bincount(minlength=50) / 4000
    assert (frequency - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    e = engine()
    prompt = [5, 9, 11]
    model = causal_lm(e.policy)
    model.set_attn_implementation("sdpa")
    probabilities = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    enough = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1  # the smallest set that holds half of the mass
    for sampling, allowed in ((Sampling(1.0, 1, 0, top_k=3), 3), (Sampling(1.0, 1, 0, top_p=0.5), enough)):
        drawn = {r.tokens[0] for r in draw(e, [prompt] * 500, sampling)}
        assert drawn == set(order[:allowed])


def test_tokens_are_reported_as_they_come():
    seen: list[int] = []
    responses = draw(engine(rollouts_per_batch=8), prompts(20), Sampling(1.0, 15, seed=0), seen.append)
    assert sum(seen) == sum(len(r.tokens) for r in responses)


def test_generation_leaves_the_policy_ready_to_train():
    e = engine()
    e.policy.train()
    draw(e, prompts(3), Sampling(1.0, 5, seed=0))
    assert e.policy.training
    assert causal_lm(e.policy).config._attn_implementation == "packed"


def test_groups_are_graded_and_evaluated():
    problems = data.encode_prompts(data.toy_problems(6, seed=0), TOKENIZER, suffix="", max_prompt_tokens=64)

    class Scripted:
        """Answers every problem, the last one first, in half of its rollouts rightly."""

        def generate(self, prompts_, count, sampling, on_tokens=None):
            for i in reversed(range(len(prompts_))):
                text = data.toy_response(problems[i], None)
                texts = [text if j % 2 else text.replace("boxed{", "boxed{9") for j in range(count)]
                tokens = [[*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
                yield i, [Response(t, [0.0] * len(t), "stop") for t in tokens]

    with RewardPool(require_think=True) as pool:
        groups, gradings = sample_groups(Scripted(), TOKENIZER, pool, problems, 4, Sampling(1.0, 96, 0))
        set_rewards(gradings)
        assert all([r.reason for r in g.rollouts] == ["wrong", "correct"] * 2 for g in groups)
        assert [g.problem for g in groups] == problems
        result = Evaluation.of(evaluate(Scripted(), TOKENIZER, pool, problems, 4, Sampling(1.0, 96, 0)))
    assert (result.avg_at_k, result.pass_at_k[-1], result.truncated, result.problems) == (0.5, 1.0, 0.0, 6)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"), dtype=torch.float32, device=torch.device("cpu"))
    tiny_model("qwen3", tied=True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"does not load: .*header"):
        load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))


def test_problem_text_survives_the_round_trip_to_tokens():
    problem = Problem("x", "3 + 4", ("7",))
    (encoded,) = data.encode_prompts([problem], TOKENIZER, suffix="", max_prompt_tokens=64)
    assert TOKENIZER.decode(encoded.prompt_tokens) == "<|user|>3 + 4<|end|><|assistant|><think>"


def test_vllm_that_is_not_installed_is_an_error_only_if_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not uses_vllm(Config())
    with pytest.raises(ModelError, match="engine is vllm: it is not installed"):
        uses_vllm(Config(engine="vllm"))
