"""The update against the plain way: padded sequences, full logits, autograd."""
from __future__ import annotations

import random
from types import SimpleNamespace
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel
from conftest import perturb, random_rollouts, tiny_model

from polaris_mini import Config, Group, Problem, Rollout, policy_loss
from rollout import ModelError, policy_weights
from train import (
    Row, add_lora, apply_gradient, attention_over, check_packing, load_optimizer, load_policy, loss_scaler,
    make_optimizer, pack, prepare_policy, round_stochastically, token_logprobs, update_policy,
    whole_state,
)

T = 1.4
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


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

    def token_loss(part: Row, logprobs: torch.Tensor) -> torch.Tensor:
        loss, _ = policy_loss(logprobs, part.sampler_logprobs.double(), part.advantages, clip_low=0.2, clip_high=0.28,
                              dual_clip=3.0)
        return loss * part.weights / tokens

    for row in pack(list(zip(rollouts, weights, strict=True)), tokens_per_row):
        token_logprobs(model, row, T, Config(logprob_chunk_tokens=chunk), token_loss)
    error = (gradient(model) - expected).norm() / expected.norm()
    assert error < 1e-9


def grouped(rollouts: list[Rollout], weights: list[int]) -> list[Group]:
    """Groups of three with advantages already set."""
    problem = Problem("p", "p", ("1",))
    return [Group(problem, rollouts[i : i + 3], weights[i // 3]) for i in range(0, len(rollouts), 3)]


def weights_after(config: Config, groups: list[Group], kind: str = "qwen3") -> torch.Tensor:
    model = tiny_model(kind, tied=True)
    optimizer = make_optimizer(model, config)
    update_policy(model, optimizer, UNSCALED, groups, T, config)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("updates", [1, 2])
def test_memory_settings_do_not_change_the_update(updates):
    config = Config(lr=1e-2, optimizer="sgd", updates_per_batch=updates)
    groups = grouped(random_rollouts(12), [1, 2, 1, 3])
    expected = weights_after(config, groups)
    for change in ({"tokens_per_micro_batch": 1}, {"tokens_per_micro_batch": 70}, {"logprob_chunk_tokens": 5}):
        assert relative(weights_after(replace(config, **change), groups), expected) < 1e-6


def test_substitute_weight_equals_real_copies():
    """A group with weight 3 gives the update of the same group three times in the batch."""
    config = Config(lr=1e-2, optimizer="sgd")
    rollouts = random_rollouts(6)
    copies = grouped(rollouts[:3] * 3 + rollouts[3:], [1, 1, 1, 1])
    assert relative(weights_after(config, grouped(rollouts, [3, 1])), weights_after(config, copies)) < 1e-6


def test_rollouts_without_advantage_count_in_the_mean_but_are_not_forwarded():
    config = Config(lr=1e-2, optimizer="sgd", max_grad_norm=1e9)
    rollouts = random_rollouts(6)
    for rollout in rollouts[3:]:
        rollout.advantage = 0.0
    start = torch.nn.utils.parameters_to_vector(tiny_model("qwen3", tied=True).parameters()).detach()
    alone = weights_after(config, grouped(rollouts[:3], [1])) - start
    beside = weights_after(config, grouped(rollouts, [1, 1])) - start
    tokens = [len(r.response_tokens) for r in rollouts]
    decay = -config.lr * config.weight_decay * start
    torch.testing.assert_close(beside - decay, (alone - decay) * (sum(tokens[:3]) / sum(tokens)), rtol=1e-2, atol=1e-6)
    # the second group's tokens would be an index error in the model if they were forwarded
    rollouts[4].response_tokens[0] = 10_000
    assert torch.isfinite(weights_after(config, grouped(rollouts, [1, 1]))).all()


def test_one_update_per_batch_has_ratio_one_and_more_have_not():
    groups = grouped(random_rollouts(12), [1, 1, 1, 1])
    for updates, moved in ((1, False), (4, True)):
        model = tiny_model("qwen3", tied=True)
        config = Config(lr=1.0, optimizer="sgd", updates_per_batch=updates)
        update = update_policy(model, make_optimizer(model, config), UNSCALED, groups, T, config)
        assert (update.clip_fraction > 0) == moved


def test_no_informative_group_means_no_update():
    model = tiny_model("qwen3", tied=True)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    config = Config(lr=1.0)
    for groups in ([], grouped([replace(r, advantage=0.0) for r in random_rollouts(3)], [1])):
        assert update_policy(model, make_optimizer(model, config), UNSCALED, groups, T, config).loss is None
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_what_saves_memory_does_not_change_the_gradient(kind):
    checkpointing = {"gradient_checkpointing": True}
    results = []
    for change in ({}, checkpointing, {**checkpointing, "offload_activations": True},
                   {**checkpointing, "mlp_chunk_tokens": 13},
                   {**checkpointing, "mlp_chunk_tokens": 13, "offload_activations": True}):  # fmt: skip
        config = Config(**change)
        model = prepare_policy(tiny_model(kind, tied=True).double(), config).train()
        (row,) = pack([(r, 1) for r in random_rollouts(6)], 10_000)
        token_logprobs(model, row, T, config, lambda part, logprobs: logprobs * part.advantages)
        results.append(gradient(model))
    for result in results[1:]:
        assert relative(result, results[0]) < 1e-9


def test_offloaded_activations_are_the_inputs_of_the_blocks():
    """Nothing else of a row's length stays: what autograd keeps goes through its hooks, and only block inputs do."""
    model = prepare_policy(tiny_model("qwen3", tied=True), Config(gradient_checkpointing=True)).train()
    (row,) = pack([(r, 1) for r in random_rollouts(6)], 10_000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.base_model.layers[0](model.base_model.embed_tokens(row.input_ids), attend=attention_over(row, "sdpa"),
                                   position_embeddings=model.base_model.rotary_emb(torch.zeros(1), row.position_ids))
    assert [tuple(t.shape) for t in kept if t.is_floating_point()] == [(1, row.input_ids.shape[1], 32)]


def test_flex_attention_agrees_with_sdpa():
    """Its forward pass, uncompiled: it has no backward on a CPU. The others need a GPU, see test_gpu.py."""
    (row,) = pack([(r, 1) for r in random_rollouts(6)], 10_000)
    size = row.input_ids.shape[1]
    query, key, value = (torch.randn(1, heads, size, 16) for heads in (4, 2, 2))
    sdpa, flex = (attention_over(row, kind)(query, key, value, 0.3) for kind in ("sdpa", "flex"))
    torch.testing.assert_close(flex, sdpa)


@pytest.mark.parametrize(("attention", "needs"), [
    ("varlen", "a GPU from Ampere on and 16 bits"), ("flash_attn", "a GPU from Ampere on and 16 bits"),
    ("flex", "a GPU"),
])  # fmt: skip
def test_attention_that_needs_a_gpu_says_so(attention, needs):
    with pytest.raises(ModelError, match=f"attention is {attention}: it needs {needs}; take --attention sdpa"):
        check_packing(tiny_model("qwen3", tied=True), Config(attention=attention))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_offloaded_optimizer_takes_the_same_steps(optimizer):
    found = []
    for offload in (False, True):
        model = tiny_model("qwen3", tied=True, head_dim=64)  # 8-bit state begins at 4,096 weights
        config = Config(optimizer=optimizer, lr=1e-2, offload_optimizer=offload)
        optimizer_ = make_optimizer(model, config)
        for seed in range(3):
            update_policy(model, optimizer_, UNSCALED, grouped(random_rollouts(6, seed), [1, 2]), T, config)
        found.append((torch.nn.utils.parameters_to_vector(model.parameters()), optimizer_.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert str(found[0][1]) == str(found[1][1])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("offload", [False, True])
def test_an_optimizer_goes_on_from_its_saved_state_as_if_never_stopped(tmp_path, optimizer, offload):
    config = Config(optimizer=optimizer, lr=1e-2, offload_optimizer=offload)
    model = tiny_model("qwen3", tied=True, head_dim=64)
    optimizer_ = make_optimizer(model, config)

    def update(model: PreTrainedModel, optimizer_: torch.optim.Optimizer, seed: int) -> torch.Tensor:
        update_policy(model, optimizer_, UNSCALED, grouped(random_rollouts(6, seed), [1, 2]), T, config)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    update(model, optimizer_, 0)
    copied = tiny_model("qwen3", tied=True, head_dim=64)
    copied.load_state_dict(model.state_dict())
    setup = SimpleNamespace(policy=model, optimizer=optimizer_)
    torch.save(whole_state(setup)[1], tmp_path / "state.pt")  # what a checkpoint holds
    again = make_optimizer(copied, config)
    load_optimizer(again, torch.load(tmp_path / "state.pt", weights_only=True), config)
    for seed in (1, 2):
        assert torch.equal(update(copied, again, seed), update(model, optimizer_, seed))
    slower = make_optimizer(copied, replace(config, lr=5e-5))
    load_optimizer(slower, torch.load(tmp_path / "state.pt", weights_only=True), config)
    assert slower.param_groups[0]["lr"] == 5e-5  # a resume's new --lr is obeyed


def test_stochastic_rounding_is_right_on_average_and_leaves_what_bfloat16_can_hold():
    torch.manual_seed(0)
    value = torch.tensor([1.0 + 2**-9, -3.0 - 2**-10, 1e-30, 0.0])  # the first is a quarter of a step above 1
    rounded = torch.stack([round_stochastically(value) for _ in range(40_000)]).double()
    torch.testing.assert_close(rounded.mean(0), value.double(), rtol=1e-4, atol=0)
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_bfloat16_weights_move_at_a_learning_rate_of_a_millionth(optimizer):
    """Rounded to nearest none of them would: a step of 1e-6 is far below half of what bfloat16 resolves near 1."""
    torch.manual_seed(0)
    config = Config(optimizer=optimizer, lr=1e-6, weight_decay=0.0, trained_weights="bfloat16", max_grad_norm=1e9)
    layer = torch.nn.Linear(512, 512, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    optimizer_ = make_optimizer(layer, config)
    for _ in range(200):
        layer.weight.grad = torch.ones_like(layer.weight)
        apply_gradient(layer, optimizer_, 1e9, UNSCALED, config)
    change = (layer.weight.double() - 1).mean().item()
    assert change == pytest.approx(-200 * 1e-6, rel=0.1)
    assert torch.equal(torch.ones(1).bfloat16() - 1e-6, torch.ones(1).bfloat16())


def test_bfloat16_weights_give_the_gradient_of_float32_and_a_float32_optimizer_state():
    rollouts = random_rollouts(12)
    found = {}
    for kind in ("float32", "bfloat16"):
        config = Config(trained_weights=kind, dtype="bfloat16", optimizer="sgd", lr=1.0, weight_decay=0.0)
        model = tiny_model("qwen3", tied=True).bfloat16().to(getattr(torch, kind))
        (row,) = pack([(r, 1) for r in rollouts], 10_000)
        token_logprobs(model, row, T, config, lambda part, logprobs: logprobs * part.advantages)
        found[kind] = gradient(model).float()
    assert torch.nn.functional.cosine_similarity(*found.values(), dim=0) > 0.999

    config = replace(config, optimizer="adamw", lr=1e-3)
    optimizer_ = make_optimizer(model, config)
    update_policy(model, optimizer_, UNSCALED, grouped(rollouts, [1, 1, 1, 1]), T, config)
    again = make_optimizer(model, config)
    load_optimizer(again, optimizer_.state_dict(), config)
    states = [state for optimizer in (optimizer_, again) for state in optimizer.state.values()]
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)
    assert str(again.state_dict()["state"]) == str(optimizer_.state_dict()["state"])


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
    config = Config(model=str(tmp_path), lora_rank=4, lr=1e-2, quantize_base=True, gradient_checkpointing=True)
    policy = load_policy(config, config.model, None, torch.device("cpu"))
    packed = policy.get_base_model().base_model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == 64 * 128
    check_packing(policy, config)  # decodes, too: on some CPUs 4-bit layers change for that
    rollouts = random_rollouts(6)
    perturb(policy)
    with_dequantized = tiny_model("qwen3", tied=True, head_dim=32)
    gradients = []
    for plain in (False, True):
        if plain:
            with_dequantized.load_state_dict(
                {name.replace(".base_layer.", "."): w for name, w in dequantized(policy.get_base_model()).items()})
            adapters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
            policy_ = prepare_policy(with_dequantized, replace(config, quantize_base=False)).train()
            policy_.load_state_dict(adapters, strict=False)
        else:
            policy_ = policy.train()
        (row,) = pack([(r, 1) for r in rollouts], 10_000)
        token_logprobs(policy_, row, T, config, lambda part, logprobs: logprobs * part.advantages)
        gradients.append(torch.cat([p.grad.flatten() for p in policy_.parameters() if p.requires_grad]))
    assert relative(*gradients) < 1e-3
    policy.zero_grad()
    optimizer_ = make_optimizer(policy, config)
    before = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    update = update_policy(policy, optimizer_, UNSCALED, grouped(rollouts, [1, 1]), T, config)
    assert update.grad_norm > 0
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters() if not p.requires_grad)
    handed_over = dict(policy_weights(policy, torch.float32))
    other = tiny_model("qwen3", tied=True, head_dim=32)
    full_precision = {name: weight.clone() for name, weight in other.state_dict().items()}
    assert set(handed_over) == set(full_precision)
    other.load_state_dict(handed_over)
    (row,) = pack([(r, 1) for r in rollouts], 10_000)
    of_policy, of_other = (token_logprobs(model, row, T, Config())[0] for model in (policy, other))
    torch.testing.assert_close(of_policy, of_other, rtol=1e-3, atol=1e-3)
    assert relative(handed_over["model.layers.0.mlp.up_proj.weight"],
                    full_precision["model.layers.0.mlp.up_proj.weight"]) > 0.02  # it was rounded to 4 bits


def test_entropy_of_every_token():
    model = tiny_model("llama", tied=False).double()
    model.set_attn_implementation("packed")
    rollouts = random_rollouts(3)
    (row,) = pack([(r, 1) for r in rollouts], 10_000)
    _, entropy = token_logprobs(model, row, T, Config(logprob_chunk_tokens=4))
    hidden = model.model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False,
                         attend=attention_over(row, "sdpa")).last_hidden_state[0, row.predicting]
    expected = torch.distributions.Categorical(logits=model.lm_head(hidden) / T).entropy()
    torch.testing.assert_close(entropy, expected)


def test_pack_fills_rows_and_keeps_every_token_once():
    rollouts = random_rollouts(50, longest=60)
    rows = pack([(r, 1) for r in rollouts], 100)
    assert all(sum(row.sequence_lengths) == row.input_ids.shape[1] <= 100 for row in rows)
    assert sum(len(row.targets) for row in rows) == sum(len(r.response_tokens) for r in rollouts)
    needed = sum(len(r.prompt_tokens) + len(r.response_tokens) - 1 for r in rollouts)
    assert len(rows) <= needed / 100 * 1.15 + 1


def test_packing_wastes_less_than_two_percent():
    """Rows have no padding; what can be wasted is room in them, and the time of a rank that waits for the other."""
    rng = random.Random(0)
    rollouts = []
    for _ in range(512):
        length = min(8000, max(64, round(rng.lognormvariate(7.3, 0.8))))  # skewed, as real ones are; some are cut
        rollouts.append(Rollout("p", [5] * 100, [7] * length, [0.0] * length, "", "stop"))
    tokens = [sum(row.sequence_lengths) for row in pack([(r, 1) for r in rollouts], 16384)]
    assert sum(tokens) / (16384 * len(tokens)) > 0.98
    waiting = sum(abs(a - b) for a, b in zip(tokens[::2], [*tokens[1::2], 0], strict=False))  # of two ranks
    assert waiting / (2 * sum(tokens)) < 0.02


def test_packed_attention_refuses_a_forward_that_was_not_packed():
    model = tiny_model("qwen3", tied=True)
    model.set_attn_implementation("packed")
    with pytest.raises(RuntimeError, match="without a packed row"):
        model(input_ids=torch.tensor([[2, 3, 4]]))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_optimizer_lowers_the_loss(optimizer):
    """Each optimizer raises the log-probs of a rollout with a positive advantage; state survives a save and a load."""
    model = tiny_model("qwen2", tied=False)
    model.set_attn_implementation("packed")
    config = Config(optimizer=optimizer, lr=1.0 if optimizer == "sgd" else 1e-2)
    rollout = replace(random_rollouts(1)[0], advantage=1.0)
    (row,) = pack([(rollout, 1)], 1000)
    optimizer_ = make_optimizer(model, config)
    before = token_logprobs(model, row, T, config)[0].sum().item()
    for _ in range(5):
        update_policy(model, optimizer_, UNSCALED, [Group(Problem("p", "p", ("1",)), [rollout])], T, config)
    assert token_logprobs(model, row, T, config)[0].sum().item() > before + 0.1
    again = make_optimizer(model, config)
    again.load_state_dict(optimizer_.state_dict())
    assert str(again.state_dict()["param_groups"]) == str(optimizer_.state_dict()["param_groups"])


def test_adamw8bit_keeps_large_weights_state_in_8_bits():
    model = torch.nn.Linear(128, 128, bias=False)
    optimizer = make_optimizer(model, Config(optimizer="adamw8bit"))
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


def test_a_lora_adapter_gets_no_second_one_on_top(tmp_path):
    """peft would save the second with the first one's base, and the first would be lost."""
    tiny_model("qwen3", tied=True).save_pretrained(tmp_path / "base")
    config = Config(model=str(tmp_path / "base"), lora_rank=4)
    load_policy(config, config.model, None, torch.device("cpu")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter: it is a LoRA adapter, .* merge it"):
        load_policy(config, str(tmp_path / "adapter"), None, torch.device("cpu"))
    load_policy(Config(), str(tmp_path / "adapter"), None, torch.device("cpu"))  # every weight: merged, then trained


def test_lora_trains_the_adapters_only_and_no_head():
    from peft import PeftModel

    model = tiny_model("qwen3", tied=True)
    base = {name: p.clone() for name, p in model.named_parameters()}
    config = Config(lora_rank=4, lr=1e-2)
    policy = add_lora(model, config, None)
    assert isinstance(policy, PeftModel)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    model.set_attn_implementation("packed")
    update_policy(policy, make_optimizer(policy, config), UNSCALED, grouped(random_rollouts(6), [1, 1]), T, config)
    assert any(p.abs().max() > 0 for name, p in policy.named_parameters() if "lora_B" in name)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_gradient_that_is_not_finite_changes_nothing():
    model = tiny_model("qwen3", tied=True)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    rollouts = random_rollouts(3)
    rollouts[0].advantage = float("inf")
    config = Config(lr=1.0)
    update = update_policy(model, make_optimizer(model, config), UNSCALED, grouped(rollouts, [1]), T, config)
    assert update.skipped == 1
    assert update.grad_norm is None
    assert update.loss is None
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)


def save_tiny(folder: Path, config_class: type, model_class: type, **settings: object) -> str:
    torch.manual_seed(0)
    config = config_class(vocab_size=50, bos_token_id=None, eos_token_id=3, pad_token_id=0, **settings)
    model_class(config).save_pretrained(folder)
    return str(folder)


def test_dropout_of_a_model_is_switched_off(tmp_path):
    """GPT-2 has dropout by default: two passes over the same tokens must agree all the same."""
    folder = save_tiny(tmp_path, GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=2, n_head=4)
    config = Config(max_prompt_tokens=16, max_response_tokens=16)
    policy = load_policy(config, folder, None, torch.device("cpu")).train()
    (row,) = pack([(r, 1) for r in random_rollouts(3)], 1000)
    first, second = (token_logprobs(policy, row, T, config)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_sliding_window_shorter_than_a_response_is_refused_at_the_start(tmp_path):
    folder = save_tiny(tmp_path, MistralConfig, MistralForCausalLM, hidden_size=32, num_hidden_layers=2,
                       intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=32)
    config = Config(max_prompt_tokens=16, max_response_tokens=16)
    policy = load_policy(config, folder, None, torch.device("cpu"))
    check_packing(policy, config)  # fits
    with pytest.raises(ModelError, match="sliding window has 32 tokens"):
        check_packing(policy, replace(config, max_prompt_tokens=17))


def test_check_packing_finds_logits_that_are_not_the_heads(tmp_path):
    model = tiny_model("llama", tied=False)
    check_packing(model, Config())
    model.lm_head.register_forward_hook(lambda module, inputs, output: 30 * torch.tanh(output / 30))  # as Gemma 2 does
    for parameter in model.lm_head.parameters():
        parameter.data *= 20
    with pytest.raises(ModelError, match="this architecture is not supported"):
        check_packing(model, Config())


def test_float16_trains_as_float32_does_and_survives_an_overflow():
    rollouts = random_rollouts(12)
    changes = {}
    for dtype in ("float32", "float16"):
        model = tiny_model("qwen3", tied=True)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        config = Config(optimizer="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=1e9, dtype=dtype)
        optimizer, scaler = make_optimizer(model, config), loss_scaler(config, torch.device("cpu"))
        assert scaler.is_enabled() == (dtype == "float16")
        update = update_policy(model, optimizer, scaler, grouped(rollouts, [1, 2, 1, 1]), T, config)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        changes[dtype] = (after - before, update.grad_norm)
    (wide, norm), (narrow, narrow_norm) = changes.values()
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 0.999
    assert narrow_norm == pytest.approx(norm, rel=0.02)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    update = update_policy(model, optimizer, scaler, grouped(rollouts, [1, 2, 1, 1]), T, config)
    assert update.grad_norm is None
    assert torch.equal(after, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize(("mismatch", "weights"), [
    ("ignore", [1, 1, 1, 1]), ("tis", [0.5, 1, 2, 0.1]), ("icepop", [0.5, 1, 0, 0]),
])  # fmt: skip
def test_mismatch_weighs_each_token_but_no_rescued_one(mismatch, weights):
    """The gradient with ratios .5 1 4 .1 of trainer to sampler is that of tokens with these weights."""
    (rollout,) = random_rollouts(1, longest=4, seed=3)
    rollout.advantage, rollout.response_tokens = 1.0, [5, 9, 4, 7]
    found = {}
    for rescued in (False, True):
        model = tiny_model("qwen3", tied=True)
        config = Config(optimizer="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=1e9, mismatch=mismatch)
        (row,) = pack([(replace(rollout, sampler_logprobs=[0.0] * 4), 1)], 999)
        each = torch.tensor([1.0] * 4 if rescued else weights) / 4
        trainer = token_logprobs(model, row, T, config, lambda part, logprobs, each=each: -logprobs * each)[0]
        gradient_ = gradient(model)
        model.zero_grad()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        ratios = torch.tensor([0.5, 1.0, 4.0, 0.1])
        drawn = replace(rollout, sampler_logprobs=(trainer - ratios.log()).tolist(), rescued=rescued)
        found[rescued] = update_policy(model, make_optimizer(model, config), UNSCALED, grouped([drawn], [1]), T, config)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(before - after, gradient_, rtol=1e-3, atol=1e-6)
    assert found[False].ratio_cut == {"ignore": 0.0, "tis": 0.25, "icepop": 0.5}[mismatch]
    assert found[False].ratio_mean == pytest.approx((0.5 + 1 + 4 + 0.1) / 4, rel=1e-4)
    assert found[True].ratio_cut == 0.0
