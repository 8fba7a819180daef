"""The update against the plain way: padded sequences, full logits, autograd."""
from __future__ import annotations

import pytest
import torch
from conftest import random_rollouts, tiny_model

from polaris_mini import Config, Rollout, policy_loss
from train import pack, token_logprobs

T = 1.4


def padded_logprobs(model, rollouts: list[Rollout], temperature: float) -> list[torch.Tensor]:
    """Log-probs of the response tokens from full logits over a right-padded batch."""
    model.set_attn_implementation("sdpa")
    sequences = [[*r.prompt_tokens, *r.response_tokens] for r in rollouts]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_p = (logits / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    model.set_attn_implementation("packed")
    return [log_p[i, len(r.prompt_tokens) - 1 : len(sequences[i]) - 1] for i, r in enumerate(rollouts)]


def losses(logprobs: torch.Tensor, rollouts: list[Rollout], weights: list[int]) -> torch.Tensor:
    counts = torch.tensor([len(r.response_tokens) for r in rollouts])
    old = torch.tensor([x for r in rollouts for x in r.sampler_logprobs]).double()
    advantages = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(counts)
    loss, _ = policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    weight = torch.tensor(weights).repeat_interleave(counts)
    return (loss * weight).sum() / (weight.sum())


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tokens_per_row", "chunk"), [(10_000, 10_000), (10_000, 7), (90, 16), (1, 1000)])
def test_gradient_equals_padded_full_logits(kind, tied, tokens_per_row, chunk):
    model = tiny_model(kind, tied=tied).double()
    rollouts = random_rollouts(9)
    weights = [1 + i % 3 for i in range(len(rollouts))]
    losses(torch.cat(padded_logprobs(model, rollouts, T)), rollouts, weights).backward()
    expected = gradient(model)
    model.zero_grad()

    tokens = sum(w * len(r.response_tokens) for r, w in zip(rollouts, weights, strict=True))
    for row in pack(list(zip(rollouts, weights, strict=True)), tokens_per_row, torch.device("cpu")):
        logprobs, _ = token_logprobs(model, row, T, Config(logprob_chunk_tokens=chunk))
        loss, _ = policy_loss(logprobs, row.sampler_logprobs.double(), row.advantages, clip_low=0.2, clip_high=0.28,
                              dual_clip=3.0)
        ((loss * row.weights).sum() / tokens).backward()
    error = (gradient(model) - expected).norm() / expected.norm()
    assert error < 1e-9
