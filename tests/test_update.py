"""The update against the plain way: padded sequences, full logits, autograd."""
from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import lines, random_rollouts, tiny_model
from doctor import perturb
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

import toy
import train
from polaris_mini import Config, Group, Problem, Rollout, UserError, policy_loss
from rollout import VLLMEngine, causal_lm, load_policy, policy_weights, prepare_policy
from train import Row, check_packing, forward_row, make_optimizer, pack, update_policy

T = 1.4
PLAIN_SGD = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
"""With these an update's change of the weights is the gradient, with the sign turned."""


def run_of(policy: torch.nn.Module, config: Config, **others: Any) -> Any:
    """Return what of a run an update uses."""
    scaler = torch.amp.GradScaler("cpu", enabled=config.dtype == "float16")
    return SimpleNamespace(**{
        "policy": policy, "config": config, "optimizer": make_optimizer(policy, config), "scaler": scaler,
        "state": SimpleNamespace(temperature=T), **others,
    })  # fmt: skip


def weighted(rollouts: list[Rollout], places: Sequence[int] = (1, 2, 3)) -> list[tuple[Rollout, float]]:
    """Give each rollout a loss weight: its places over the tokens of all."""
    placed = [(rollout, places[i % len(places)]) for i, rollout in enumerate(rollouts)]
    tokens = sum(len(rollout.response_tokens) * n for rollout, n in placed)
    return [(rollout, n / tokens) for rollout, n in placed]


def grouped(rollouts: list[Rollout], places: Sequence[int]) -> list[Group]:
    """Make groups of three, whose advantages are set already."""
    problem = Problem("p", "p", ("1",))
    return [Group(problem, rollouts[i : i + 3], places[i // 3]) for i in range(0, len(rollouts), 3)]


def gradient(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def trained(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters() if p.requires_grad])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def backward_of_rows(policy: torch.nn.Module, rows: list[Row], config: Config) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of some rows."""
    policy.zero_grad(set_to_none=True)
    loss = 0.0
    for row in rows:
        part = forward_row(policy, row, T, config)[0]
        part.backward()
        loss += part.item()
    return loss, gradient(policy)


# ------------------------------------------------------------- against padded full logits


def padded_logprobs(model: PreTrainedModel, rollouts: list[Rollout]) -> list[torch.Tensor]:
    """Return each rollout's log-probs of the response tokens, from full logits over a right-padded batch."""
    model.set_attn_implementation("sdpa")
    sequences = [[*r.prompt_tokens, *r.response_tokens] for r in rollouts]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_p = (logits / T).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    model.set_attn_implementation("packed")
    return [log_p[i, len(r.prompt_tokens) - 1 : len(sequences[i]) - 1] for i, r in enumerate(rollouts)]


def padded_loss(model: PreTrainedModel, pairs: list[tuple[Rollout, float]], *, old: str = "current") -> torch.Tensor:
    """Return the loss by the plain way. old: what stands for the policy before the update, `current` or `sampler`."""
    loss = torch.zeros(())
    for (rollout, weight), logprobs in zip(pairs, padded_logprobs(model, [r for r, _ in pairs]), strict=True):
        old_logprobs = logprobs.detach() if old == "current" else torch.tensor(rollout.sampler_logprobs)
        advantages = torch.full_like(logprobs, rollout.advantage)
        losses, _ = policy_loss(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        loss = loss + (losses * weight).sum()
    return loss


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_equal_padded_full_logits(kind, tied):
    """Whatever the size of rows and chunks, with ratios that are 1 and ratios that are not."""
    model = tiny_model(kind, tied=tied).double()
    pairs = [(replace(r, advantage=torch.tensor(r.advantage).item()), torch.tensor(w).item())  # as float32 holds them
             for r, w in weighted(random_rollouts(9))]
    for old in ("current", "sampler"):
        model.zero_grad(set_to_none=True)
        expected_loss = padded_loss(model, pairs, old=old)
        expected_loss.backward()
        expected = gradient(model)
        for tokens_per_row, chunk in ((10_000, 10_000), (10_000, 7), (90, 16), (1, 1000)):
            rows = pack(pairs, tokens_per_row)
            if old == "sampler":
                rows = [replace(row, old_logprobs=row.sampler_logprobs) for row in rows]
            loss, found = backward_of_rows(model, rows, Config(logprob_chunk_tokens=chunk))
            assert relative(found, expected) < 1e-9, (old, tokens_per_row, chunk)
            assert loss == pytest.approx(expected_loss.item(), rel=1e-6)


def test_each_tokens_loss_is_computed_once_by_three_products_with_the_head(monkeypatch):
    tokens: list[int] = []
    real = train.policy_loss

    def counted(logprobs: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        losses = real(logprobs, *arguments, **options)
        tokens.append(len(losses[0]))
        return losses

    monkeypatch.setattr(train, "policy_loss", counted)
    rollouts = random_rollouts(9)
    config = Config(tokens_per_micro_batch=90, logprob_chunk_tokens=16)
    run = run_of(tiny_model("qwen3", tied=False), config)
    update_policy(run, grouped(rollouts, [1, 2, 3]))
    assert sum(tokens) == sum(len(rollout.response_tokens) for rollout in rollouts)

    model = tiny_model("llama", tied=False)
    (row,) = pack(weighted(rollouts), 10_000)
    hidden = torch.randn(len(row.targets), 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        train.ChunkedLoss.apply(hidden, model.lm_head.weight, row, T, None, config)[0].backward()
    product = 2 * len(row.targets) * 32 * 50
    entropy = 2 * len(row.targets) * 50
    assert counter.get_total_flops() == 3 * product + entropy


def test_logprobs_and_entropy_of_every_token():
    model = tiny_model("llama", tied=False).double()
    rollouts = random_rollouts(3)
    (row,) = pack(weighted(rollouts), 10_000)
    with torch.no_grad():
        loss, logprobs, entropy, clipped = forward_row(model, row, T, Config(logprob_chunk_tokens=4))
        hidden = model.model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, row=row,
                             kind="sdpa").last_hidden_state[0, row.predicting]
        expected = torch.distributions.Categorical(logits=model.lm_head(hidden) / T)
    torch.testing.assert_close(entropy, expected.entropy())
    torch.testing.assert_close(logprobs, expected.log_prob(row.targets))
    assert loss.item() == pytest.approx(-(row.advantages * row.loss_weights).sum().item(), rel=1e-5)  # all ratios are 1
    assert not clipped.any()


# ------------------------------------------------------- two updates of three rows, every way


def two_updates(model: PreTrainedModel, config: Config) -> tuple[torch.Tensor, list[dict[str, float | None]]]:
    """Return the change of the trained weights by two batches of three rows each, and what was measured."""
    policy = prepare_policy(model, config)
    perturb(policy, 0.02)  # LoRA begins at zero, where half of its gradient is zero
    run, before = run_of(policy, config), trained(policy)
    measured = []
    for seed in (0, 1):
        rollouts = random_rollouts(12, seed)
        batch = grouped(rollouts, [1, 2, 1, 3])
        assert len(pack(weighted(rollouts), config.tokens_per_micro_batch)) == 3
        measured.append(update_policy(run, batch))
    return trained(policy) - before, measured


@pytest.mark.parametrize("rank", [0, 4], ids=["every weight", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_updates_of_three_rows_are_those_of_the_plain_way(rank, tied):
    """In float32 to five digits, in float16 in the same direction and by the same length."""
    config = Config(tokens_per_micro_batch=100, logprob_chunk_tokens=16, lora_rank=rank, **{**PLAIN_SGD, "lr": 0.1})
    plain = prepare_policy(tiny_model("qwen3", tied=tied), config)
    perturb(plain, 0.02)
    optimizer, before, norms = make_optimizer(plain, config), trained(plain), []
    for seed in (0, 1):
        rollouts = random_rollouts(12, seed)
        padded_loss(causal_lm(plain), weighted(rollouts, [1] * 3 + [2] * 3 + [1] * 3 + [3] * 3)).backward()
        norms.append(gradient(plain).norm().item())
        optimizer.step()
        optimizer.zero_grad()
    expected = trained(plain) - before

    change, measured = two_updates(tiny_model("qwen3", tied=tied), config)
    assert relative(change, expected) < 1e-5
    assert [m["optim/grad_norm"] for m in measured] == pytest.approx(norms, rel=1e-5)
    change, measured = two_updates(tiny_model("qwen3", tied=tied), replace(config, dtype="float16"))
    assert torch.nn.functional.cosine_similarity(change, expected, dim=0) > 0.999
    assert [m["optim/grad_norm"] for m in measured] == pytest.approx(norms, rel=0.02)


# ------------------------------------------------------------------------ what a batch means


def weights_after(config: Config, groups: list[Group], kind: str = "qwen3") -> torch.Tensor:
    model = tiny_model(kind, tied=True)
    update_policy(run_of(model, config), groups)
    return trained(model)


@pytest.mark.parametrize("updates", [1, 2])
def test_memory_settings_do_not_change_the_update(updates):
    config = Config(lr=1e-2, optimizer="sgd", updates_per_batch=updates)
    groups = grouped(random_rollouts(12), [1, 2, 1, 3])
    expected = weights_after(config, groups)
    for change in ({"tokens_per_micro_batch": 1}, {"tokens_per_micro_batch": 70}, {"logprob_chunk_tokens": 5}):
        assert relative(weights_after(replace(config, **change), groups), expected) < 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_what_saves_memory_does_not_change_the_gradient(kind):
    checkpointing = {"gradient_checkpointing": True}
    found = []
    for change in ({}, checkpointing, {**checkpointing, "offload_activations": True}):
        config = Config(**change)
        model = prepare_policy(tiny_model(kind, tied=True).double(), config).train()
        found.append(backward_of_rows(model, pack(weighted(random_rollouts(6)), 10_000), config)[1])
    assert relative(found[1], found[0]) < 1e-9
    assert relative(found[2], found[0]) < 1e-9


def test_a_checkpointed_block_keeps_its_input_only():
    """Nothing else of a row's length stays: what autograd keeps goes through its hooks."""
    model = prepare_policy(tiny_model("qwen3", tied=True), Config(gradient_checkpointing=True)).train()
    (row,) = pack(weighted(random_rollouts(6)), 10_000)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.base_model.layers[0](model.base_model.embed_tokens(row.input_ids), row=row, kind="sdpa",
                                   position_embeddings=model.base_model.rotary_emb(torch.zeros(1), row.position_ids))
    assert [tuple(t.shape) for t in kept if t.is_floating_point()] == [(1, row.input_ids.shape[1], 32)]


def test_places_equal_real_copies():
    """A group with three places gives the update of the same group three times in the batch."""
    config = Config(lr=1e-2, optimizer="sgd")
    rollouts = random_rollouts(6)
    copies = grouped(rollouts[:3] * 3 + rollouts[3:], [1, 1, 1, 1])
    assert relative(weights_after(config, grouped(rollouts, [3, 1])), weights_after(config, copies)) < 1e-6


def test_rollouts_without_advantage_count_in_the_mean_but_are_not_forwarded():
    config = Config(**PLAIN_SGD)
    rollouts = random_rollouts(6)
    for rollout in rollouts[3:]:
        rollout.advantage = 0.0
    start = trained(tiny_model("qwen3", tied=True))
    alone = weights_after(config, grouped(rollouts[:3], [1])) - start
    beside = weights_after(config, grouped(rollouts, [1, 1])) - start
    tokens = [len(r.response_tokens) for r in rollouts]
    assert relative(beside, alone * (sum(tokens[:3]) / sum(tokens))) < 1e-4
    # the second group's tokens would be an index error in the model if they were forwarded
    rollouts[4].response_tokens[0] = 10_000
    assert torch.isfinite(weights_after(config, grouped(rollouts, [1, 1]))).all()


def test_one_update_per_batch_has_ratio_one_and_more_have_not():
    groups = grouped(random_rollouts(12), [1, 1, 1, 1])
    for updates, moved in ((1, False), (4, True)):
        run = run_of(tiny_model("qwen3", tied=True), Config(lr=1.0, optimizer="sgd", updates_per_batch=updates))
        assert (update_policy(run, groups)["policy/clip_fraction"] > 0) == moved


def test_no_informative_group_means_no_update():
    model = tiny_model("qwen3", tied=True)
    before, run = trained(model), run_of(model, Config(lr=1.0))
    for groups in ([], grouped([replace(r, advantage=0.0) for r in random_rollouts(3)], [1])):
        update = update_policy(run, groups)
        assert update["policy/loss"] is update["optim/grad_norm"] is update["mismatch/kl"] is None
        assert update["tokens/update"] == update["tokens/update_release"] == 0
    assert torch.equal(trained(model), before)


def test_metrics_are_means_over_the_tokens_that_were_forwarded():
    """Whatever the rows, and with two updates: the loss is the mean of both."""
    rollouts = random_rollouts(12)
    for rollout in rollouts[:2]:
        rollout.advantage = 0.0
    rollouts[2].rescued = True
    forwarded = rollouts[2:]
    found = []
    for tokens_per_row in (70, 10_000):
        config = Config(tokens_per_micro_batch=tokens_per_row, updates_per_batch=2, lr=1e-9, optimizer="sgd")
        found.append(update_policy(run_of(tiny_model("qwen3", tied=True), config), grouped(rollouts, [1, 2, 1, 3])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    model = tiny_model("qwen3", tied=True)
    with torch.no_grad():
        logprobs = dict(zip(map(id, forwarded), padded_logprobs(model, forwarded), strict=True))
    sampled = [r for r in forwarded if not r.rescued]
    difference = torch.cat([logprobs[id(r)] - torch.tensor(r.sampler_logprobs) for r in sampled]).double()
    ratio = difference.exp()
    assert found[0]["mismatch/kl"] == pytest.approx((ratio - 1 - difference).mean().item(), rel=1e-4)
    assert found[0]["mismatch/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert found[0]["mismatch/ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-4)
    assert found[0]["mismatch/cut"] == pytest.approx((ratio > 2).double().mean().item())
    assert found[0]["tokens/update"] == sum(len(r.prompt_tokens) + len(r.response_tokens) - 1 for r in forwarded)
    loss = 0.0
    for share in (slice(0, None, 2), slice(1, None, 2)):
        groups = grouped(rollouts, [1, 2, 1, 3])[share]
        tokens = sum(len(r.response_tokens) * g.places for g in groups for r in g.rollouts)
        loss -= sum(r.advantage * len(r.response_tokens) * g.places for g in groups for r in g.rollouts) / tokens
    assert found[0]["policy/loss"] == pytest.approx(loss / 2, rel=1e-4)


@pytest.mark.parametrize(("settings", "sampled", "rescued"), [
    ({}, [1, 1, 1, 1], [1, 1, 1, 1]), ({"mismatch": "tis"}, [0.5, 1, 2, 0.1], [1, 1, 1, 1]),
    ({"rescue_ratio": "stored"}, [1, 1, 1, 1], [0.5, 1, 2, 0.1]),
    ({"mismatch": "tis", "rescue_ratio": "stored"}, [0.5, 1, 2, 0.1], [0.5, 1, 2, 0.1]),
])  # fmt: skip
def test_ratios_of_trainer_to_sampler_weigh_tokens(settings, sampled, rescued):
    """With ratios .5 1 4 .1 the gradient is that of tokens with these weights, those of a rescued rollout or others."""
    (rollout,) = random_rollouts(1, longest=4, seed=3)
    rollout = replace(rollout, advantage=1.0, response_tokens=[5, 9, 4, 7])
    model = tiny_model("qwen3", tied=True)
    logprobs = padded_logprobs(model, [rollout])[0]
    for is_rescued, weights in ((False, sampled), (True, rescued)):
        model.zero_grad(set_to_none=True)
        (-logprobs @ torch.tensor(weights, dtype=torch.float) / 4).backward(retain_graph=True)
        expected = gradient(model)
        ratios = torch.tensor([0.5, 1.0, 4.0, 0.1])
        drawn = replace(rollout, sampler_logprobs=(logprobs - ratios.log()).tolist(), rescued=is_rescued)
        policy = tiny_model("qwen3", tied=True)
        before = trained(policy)
        update = update_policy(run_of(policy, Config(**PLAIN_SGD, **settings)), grouped([drawn], [1]))
        torch.testing.assert_close(before - trained(policy), expected, rtol=1e-3, atol=1e-6)
        assert update["mismatch/cut"] == (0.0 if is_rescued else 0.25)
        assert update["mismatch/ratio_mean"] == pytest.approx(0.0 if is_rescued else (0.5 + 1 + 4 + 0.1) / 4, rel=1e-4)


# ------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(("engine", "mismatch"), [("hf", "ignore"), ("vllm", "tis")])
def test_auto_corrects_the_mismatch_where_vllm_generates(engine, mismatch):
    if engine == "vllm":
        pytest.importorskip("vllm")
    groups = grouped(random_rollouts(6), [1, 2])
    config = Config(lr=1e-2, optimizer="sgd", engine=engine, mismatch="auto")
    after = {kind: weights_after(replace(config, mismatch=kind), groups) for kind in ("auto", "ignore", "tis")}
    assert torch.equal(after["auto"], after[mismatch])
    assert not torch.equal(after["ignore"], after["tis"])


@pytest.mark.parametrize("updates", [1, 2])
def test_float16_scales_each_update_by_the_scale_of_that_moment(updates):
    """The scale falls after an overflow in the first update; the second one is unscaled by the new scale."""
    config = Config(lr=1e-2, optimizer="sgd", dtype="float16", updates_per_batch=updates, max_grad_norm=1e9)
    groups, found = grouped(random_rollouts(12), [1, 2, 1, 3]), []
    for growth in (1.0001, 8.0):  # after each step the scale stays much the same, or is 8 times as large
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=growth, growth_interval=1)
        model = tiny_model("qwen3", tied=True)
        update_policy(run_of(model, config, scaler=scaler), groups)
        found.append(trained(model))
    start = trained(tiny_model("qwen3", tied=True))
    assert relative(found[1] - start, found[0] - start) < 0.05


def test_pack_fills_rows_and_keeps_every_token_once():
    rollouts = random_rollouts(50, longest=60)
    rows = pack(weighted(rollouts), 100)
    assert all(sum(row.sequence_lengths) == row.input_ids.shape[1] <= 100 for row in rows)
    assert sum(len(row.targets) for row in rows) == sum(len(r.response_tokens) for r in rollouts)
    assert sum(row.loss_weights.sum().item() for row in rows) == pytest.approx(1.0)
    needed = sum(len(r.prompt_tokens) + len(r.response_tokens) - 1 for r in rollouts)
    assert len(rows) <= needed / 100 * 1.15 + 1


def test_packing_wastes_less_than_two_percent(monkeypatch):
    """Rows have no padding. What can be wasted is room in them, and the time of a rank that waits for the other."""
    rng = random.Random(0)
    rollouts = []
    for _ in range(512):
        length = min(8000, max(64, round(rng.lognormvariate(7.3, 0.8))))  # skewed, as real ones are; some are cut
        rollouts.append(Rollout("p", [5] * 100, [7] * length, [0.0] * length, "", "stop", advantage=1.0))
    tokens = [sum(row.sequence_lengths) for row in pack([(r, 1) for r in rollouts], 16384)]
    assert sum(tokens) / (16384 * len(tokens)) > 0.98
    monkeypatch.setattr(train, "rank_count", lambda: 2)
    of_ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        rows = train.pack_share(grouped(rollouts, [1] * 171), Config())
        of_ranks.append(sum(sum(row.sequence_lengths) for row in rows))
    assert sum(of_ranks) == sum(tokens)
    assert max(of_ranks) / min(of_ranks) < 1.02


def test_rows_are_short_on_a_cpu_unless_the_user_says_how_long():
    long = {"response_tokens": [7] * 450, "sampler_logprobs": [-1.0] * 450}
    rollouts = [replace(rollout, **long) for rollout in random_rollouts(9)]
    for limit, most in (("auto", 2), (1900, 4)):
        rows = train.pack_share(grouped(rollouts, [1, 1, 1]), Config(device="cpu", tokens_per_micro_batch=limit))
        assert max(len(row.sequence_lengths) for row in rows) == most
    assert Config().row_limit("cuda") == 16384


def test_packed_attention_refuses_a_forward_that_was_not_packed():
    model = tiny_model("qwen3", tied=True)
    with pytest.raises(RuntimeError, match="without a packed row"):
        model(input_ids=torch.tensor([[2, 3, 4]]))


# ----------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_optimizer_raises_the_logprobs_of_a_rollout_with_an_advantage(optimizer):
    model = tiny_model("qwen2", tied=False)
    config = Config(optimizer=optimizer, lr=1.0 if optimizer == "sgd" else 1e-2)
    rollout = replace(random_rollouts(1)[0], advantage=1.0)
    run = run_of(model, config)
    before = padded_logprobs(model, [rollout])[0].sum().item()
    for _ in range(5):
        update_policy(run, [Group(Problem("p", "p", ("1",)), [rollout])])
    assert padded_logprobs(model, [rollout])[0].sum().item() > before + 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_an_optimizer_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, optimizer):
    config = Config(optimizer=optimizer, lr=1e-2, temperature=T)
    problem = Problem("p", "p", ("1",))

    def whole_run(policy: torch.nn.Module, config: Config) -> train.Run:
        parts = {"folder": tmp_path, "tokenizer": toy.toy_tokenizer(), "sampler": train.ProblemSampler([problem], 0),
                 "sink": train.Sink(tmp_path / "sink"), "engine": None, "pool": None, "held_out": [], "log_file": None}
        return train.Run(**vars(run_of(policy, config, state=train.State(step=1, temperatures=[T]), **parts)))

    def update(run: train.Run, seed: int) -> torch.Tensor:
        update_policy(run, grouped(random_rollouts(6, seed), [1, 2]))
        return trained(run.policy)

    run = whole_run(tiny_model("qwen3", tied=True, head_dim=64), config)  # 8-bit state begins at 4,096 weights
    update(run, 0)
    train.save_checkpoint(run)
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    again, slower = (whole_run(load_policy(replace(config, device="cpu"), checkpoint), replace(config, lr=lr))
                     for lr in (config.lr, 5e-5))
    for resumed in (again, slower):
        train.restore(resumed, train.read_checkpoint(checkpoint))
    for seed in (1, 2):
        assert torch.equal(update(again, seed), update(run, seed))
    assert slower.optimizer.param_groups[0]["lr"] == 5e-5  # a resume's new --lr is obeyed


def test_adamw8bit_keeps_large_weights_state_in_8_bits():
    model = torch.nn.Linear(128, 128, bias=False)
    optimizer = make_optimizer(model, Config(optimizer="adamw8bit"))
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


def test_gradient_that_is_not_finite_changes_nothing():
    model = tiny_model("qwen3", tied=True)
    before = trained(model)
    rollouts = random_rollouts(3)
    rollouts[0].advantage = float("inf")
    update = update_policy(run_of(model, Config(lr=1.0)), grouped(rollouts, [1]))
    assert update["optim/skipped"] == 1
    assert update["optim/grad_norm"] is update["policy/loss"] is None
    assert torch.equal(trained(model), before)


# -------------------------------------------------------------------------------- float16


def test_float16_logprobs_are_near_those_of_float32():
    model = tiny_model("qwen3", tied=False)
    rollouts = random_rollouts(12)
    (row,) = pack(weighted(rollouts), 10_000)
    with torch.no_grad():
        _, narrow, entropy, _ = forward_row(model, row, T, Config(dtype="float16"))
        _, wide, expected, _ = forward_row(model, row, T, Config())
    assert narrow.dtype == entropy.dtype == torch.float32
    assert 0 < (narrow - wide).abs().max() < 0.02
    torch.testing.assert_close(entropy, expected, rtol=0, atol=0.01)


def test_float16s_loss_scale_enters_once_before_a_chunks_gradient_is_cast():
    """Weights as small as those of a long batch give gradients that float16 rounds to zero, unless they are scaled."""
    pairs = [(rollout, 1e-8) for rollout in random_rollouts(6)]
    (row,) = pack(pairs, 10_000)
    config = Config(dtype="float16", logprob_chunk_tokens=16)
    found = {}
    for name, dtype, scale in (("wide", "float32", 1.0), ("scaled", "float16", 2.0**20), ("unscaled", "float16", 1.0)):
        model = tiny_model("qwen3", tied=False)
        loss = forward_row(model, row, T, replace(config, dtype=dtype), torch.tensor(scale))[0]
        loss.backward()
        found[name] = (gradient(model) / scale, loss.item())
    assert relative(found["scaled"][0], found["wide"][0]) < 0.02
    assert relative(found["unscaled"][0], found["wide"][0]) > 0.2
    assert found["scaled"][1] == pytest.approx(found["wide"][1], rel=1e-3)  # the loss itself is not scaled


def test_a_float16_gradient_that_overflows_changes_nothing_and_halves_the_scale():
    model, config = tiny_model("qwen3", tied=True), Config(dtype="float16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = trained(model)
    update = update_policy(run_of(model, config, scaler=scaler), grouped(random_rollouts(12), [1, 2, 1, 1]))
    assert update["optim/grad_norm"] is None
    assert update["policy/loss"] is not None
    assert torch.equal(trained(model), before)
    assert scaler.get_scale() == 2.0**59


def test_a_run_seeks_its_loss_scale_for_as_long_as_it_takes_and_saves_it(tmp_path, monkeypatch):
    """Overflows of this search are no gradients that are not finite, of which three in a row end the run."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**28))
    train.main(["--dtype", "float16", "--prompts-per-step", "8", "--group-size", "4", "--stages", "10:1.0:80",
                "--no-substitute", "--eval-every", "-1", "--run-dir", str(tmp_path / "run")])  # fmt: skip
    skipped = [m["optim/skipped"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert skipped[:4] == [1] * 4
    assert 0 in skipped
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step_000010" / "optimizer.pt", weights_only=True)
    assert saved["scaler"]["scale"] == 2.0 ** (28 - sum(skipped))


# ------------------------------------------------------------------------------- policies


def dequantized(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a 4-bit model's weights in float32, without adapters."""
    weights = {name: w for name, w in model.state_dict().items() if "lora" not in name and ".weight." not in name}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), bitsandbytes.nn.Params4bit):
            state = module.weight.quant_state
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
    return weights


def test_quantized_base_trains_adapters_and_hands_over_what_it_computes_with(tmp_path):
    """The engine gets the 4-bit weights as they are used, with the adapters merged in: the same log-probs."""
    tiny_model("qwen3", tied=True, head_dim=32).save_pretrained(tmp_path)
    config = Config(model=str(tmp_path), device="cpu", lora_rank=4, lr=1e-2, quantize_base=True,
                    gradient_checkpointing=True)
    policy = load_policy(config)
    packed = policy.get_base_model().base_model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == 64 * 128
    check_packing(policy, config)  # decodes, too: on some CPUs 4-bit layers change for that
    rollouts = random_rollouts(6)
    rows = pack(weighted(rollouts), 10_000)
    perturb(policy)
    with_dequantized = tiny_model("qwen3", tied=True, head_dim=32)
    with_dequantized.load_state_dict(
        {name.replace(".base_layer.", "."): w for name, w in dequantized(policy.get_base_model()).items()})
    plain = prepare_policy(with_dequantized, replace(config, quantize_base=False))
    plain.load_state_dict({name: p for name, p in policy.named_parameters() if p.requires_grad}, strict=False)
    assert relative(*(backward_of_rows(p.train(), rows, config)[1] for p in (policy, plain))) < 1e-3
    policy.zero_grad()
    before = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert update_policy(run_of(policy, config), grouped(rollouts, [1, 1]))["optim/grad_norm"] > 0
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters() if not p.requires_grad)
    handed_over = dict(policy_weights(policy, torch.float32))
    other = tiny_model("qwen3", tied=True, head_dim=32)
    full_precision = {name: weight.clone() for name, weight in other.state_dict().items()}
    assert set(handed_over) == set(full_precision)
    other.load_state_dict(handed_over)
    with torch.no_grad(), policy.disable_adapter():
        of_policy, of_other = (forward_row(model, rows[0], T, Config())[1] for model in (policy, other))
    torch.testing.assert_close(of_policy, of_other, rtol=1e-3, atol=1e-3)
    assert relative(handed_over["model.layers.0.mlp.up_proj.weight"],
                    full_precision["model.layers.0.mlp.up_proj.weight"]) > 0.02  # it was rounded to 4 bits


def test_an_offloaded_policy_takes_the_scales_of_its_4_bit_weights_along(monkeypatch, tmp_path):
    tiny_model("qwen3", tied=True, head_dim=32).save_pretrained(tmp_path)
    policy = load_policy(Config(model=str(tmp_path), device="cpu", lora_rank=4, quantize_base=True))
    moved = []
    monkeypatch.setattr(bitsandbytes.functional.QuantState, "to", lambda *given: moved.append(given))
    engine = VLLMEngine.__new__(VLLMEngine)  # without a vLLM: only what moves the policy
    engine.offloaded = policy
    engine._move_policy(torch.device("cpu"))
    scales = [p.quant_state for p in policy.parameters() if isinstance(p, bitsandbytes.nn.Params4bit)]
    assert len(scales) == 2 * 7
    assert moved == [(state, torch.device("cpu")) for state in scales]


def test_a_lora_adapter_gets_no_second_one_on_top(tmp_path):
    """peft would save the second with the first one's base, and the first would be lost."""
    tiny_model("qwen3", tied=True).save_pretrained(tmp_path / "base")
    config = Config(model=str(tmp_path / "base"), device="cpu", lora_rank=4)
    policy = load_policy(config)
    perturb(policy)
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter: it is a LoRA adapter, .* merge it"):
        load_policy(replace(config, model=str(tmp_path / "adapter")))
    merged = load_policy(replace(config, model=str(tmp_path / "adapter"), lora_rank=0))  # then every weight is trained
    for name, weight in policy.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)


def test_lora_trains_the_adapters_only_and_no_head():
    model = tiny_model("qwen3", tied=True)
    base = {name: p.clone() for name, p in model.named_parameters()}
    config = Config(lora_rank=4, lr=1e-2)
    policy = prepare_policy(model, config)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    update_policy(run_of(policy, config), grouped(random_rollouts(6), [1, 1]))
    assert any(p.abs().max() > 0 for name, p in policy.named_parameters() if "lora_B" in name)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert all(torch.equal(after[name], base[name]) for name in base)


def save_tiny(folder: Path, config_class: type, model_class: type, **settings: object) -> str:
    torch.manual_seed(0)
    config = config_class(vocab_size=50, bos_token_id=None, eos_token_id=3, pad_token_id=0, **settings)
    model_class(config).save_pretrained(folder)
    return str(folder)


def test_dropout_of_a_model_is_switched_off(tmp_path):
    """GPT-2 has dropout by default: two passes over the same tokens must agree all the same."""
    folder = save_tiny(tmp_path, GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=2, n_head=4)
    config = Config(model=folder, device="cpu", max_prompt_tokens=16, max_response_tokens=16)
    policy = load_policy(config).train()
    (row,) = pack(weighted(random_rollouts(3)), 1000)
    with torch.no_grad():
        first, second = (forward_row(policy, row, T, config)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_sliding_window_shorter_than_a_response_is_refused_at_the_start(tmp_path):
    folder = save_tiny(tmp_path, MistralConfig, MistralForCausalLM, hidden_size=32, num_hidden_layers=2,
                       intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=32)
    config = Config(model=folder, device="cpu", max_prompt_tokens=16, max_response_tokens=16)
    check_packing(load_policy(config), config)  # fits
    with pytest.raises(UserError, match="sliding window has 32 tokens"):
        load_policy(replace(config, max_prompt_tokens=17))


def test_check_packing_finds_logits_that_are_not_the_heads():
    model = tiny_model("llama", tied=False)
    check_packing(model, Config())
    model.lm_head.register_forward_hook(lambda module, inputs, output: 30 * torch.tanh(output / 30))  # as Gemma 2 does
    for parameter in model.lm_head.parameters():
        parameter.data *= 20
    with pytest.raises(UserError, match="this architecture is not supported"):
        check_packing(model, Config())


def test_check_packing_finds_a_head_with_a_bias():
    model = tiny_model("llama", tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(50.0))
    with pytest.raises(UserError):
        check_packing(model, Config())


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_packed_attention_refuses_scores_that_are_capped_or_have_sinks(name):
    (row,) = pack(weighted(random_rollouts(3)), 1000)
    query = torch.randn(1, 4, row.input_ids.shape[1], 8)
    with pytest.raises(UserError, match="which packing does not support"):
        train.packed_attention(torch.nn.Module(), query, query, query, None, scaling=1.0, row=row, **{name: 1.0})
