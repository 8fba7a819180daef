"""The Hugging Face engine: its log-probs are the trainer's, its seeds hold, its limits too; and the groups it draws."""
from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES, lines, tiny_model
from doctor import perturb
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer

import rollout
import toy
from data import encode_prompts
from polaris_mini import Config, Problem, Rollout, UserError
from reward import RewardPool
from rollout import (
    Evaluation, HFEngine, ProbeCurves, Response, Sampling, base_model, causal_lm, check_model, load_model,
    load_tokenizer, policy_weights, prepare_policy, resolve_device, resolve_dtype, sample_groups, set_rewards,
    uses_vllm,
)
from train import forward_row, pack

TOKENIZER = toy.toy_tokenizer()
EOS = TOKENIZER.eos_token_id


def engine(kind: str = "qwen3", rollouts_per_batch: int = 64) -> HFEngine:
    return HFEngine(tiny_model(kind, tied=True), TOKENIZER, Config(rollouts_per_batch=rollouts_per_batch))


def draw(e: HFEngine, prompts_: list[list[int]], sampling: Sampling) -> list[Response]:
    """Draw one response to each prompt, in order."""
    drawn = dict(e.generate(prompts_, 1, sampling))
    return [drawn[i][0] for i in range(len(prompts_))]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 50) for _ in range(rng.randint(1, 15))] for _ in range(count)]


# -------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_sampler_logprobs_are_the_trainers(kind, temperature):
    """Padding, the cache, sequences that leave the decoding and packing: none of them changes a log-prob."""
    e = engine(kind, rollouts_per_batch=16)
    responses = draw(e, prompts(40), Sampling(temperature, 30, seed=1))
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    rollouts = [
        Rollout("p", prompt, r.tokens, r.sampler_logprobs, "", r.finish_reason)
        for prompt, r in zip(prompts(40), responses, strict=True)
    ]
    for row in pack([(r, 1) for r in rollouts], 300):
        with torch.no_grad():
            logprobs = forward_row(e.policy, row, temperature, Config())[1]
        torch.testing.assert_close(logprobs, row.sampler_logprobs, rtol=0, atol=3e-5)


def test_a_growing_cache_holds_what_transformers_own_does():
    """Over several pieces of memory, also when sequences leave or are repeated."""
    ours, theirs = rollout.GrowingLayer(358), DynamicLayer()
    for length, chosen in [(5, [0, 0, 1, 2, 2]), (1, None), (200, [4, 1]), *[(1, None)] * 150, (1, [1]), (1, None)]:
        new = [torch.randn(3 if ours.get_seq_length() == 0 else len(ours.keys), 2, length, 4) for _ in range(2)]
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        if chosen is not None:
            ours.batch_select_indices(torch.tensor(chosen))
            theirs.batch_select_indices(torch.tensor(chosen))
    assert ours.get_seq_length() == theirs.get_seq_length() == ours.memory[0].shape[2] == 358


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_over_the_cache_is_pytorchs(heads, key_heads, dtype, queries):
    query = 80 * torch.randn(3, heads, queries, 128).to(dtype)  # products of queries and keys are beyond float16
    key, value = torch.randn(2, 3, key_heads, 7, 128).to(dtype)
    key *= 80
    mask = torch.rand(3, 1, queries, 7) > 0.3
    mask[..., -1] = True
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    for given in (mask, None) if queries == 1 else (mask,):
        found, _ = rollout.decode_attention(module, query, key, value, given, scaling=1e-4)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), attn_mask=given, scale=1e-4, enable_gqa=heads != key_heads)
        atol = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
        torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=0, atol=atol)


def test_tokens_are_drawn_by_their_probabilities():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = rollout._draw(p.repeat(40_000, 1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0], minlength=6) / 40_000
    assert shares[p == 0].sum() == 0
    assert (shares - p).abs().max() < 0.01  # four standard deviations


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


TURN, END = "{% for m in messages %}{{ m.role + m.content", "{% endfor %}"


@pytest.mark.parametrize(("template", "ends"), [
    (TURN + " + ' <|end|>\n' }}" + END, ["<|end|>"]),
    (TURN + " + '<|user|><|end|>' }}" + END, ["<|user|>"]),
    (TURN + " + '  </think><|end|>' }}" + END, ["<|end|>"]),  # neither a blank nor a thought ends a turn
    ("<|end|>" + TURN + " }}" + END, []), ("{{ '<|end|>' + messages[0].content }}", []), (None, []),
    ("{{ raise_exception('only one turn') if messages[1:] }}", []), ("{{ messages[0].nothing + 1 }}", []),
])
def test_the_token_that_ends_a_turn_in_the_chat_template_ends_a_response(template, ends):
    """A base model's tokenizer has another end than its chat template."""
    tokenizer = toy.toy_tokenizer()
    tokenizer.add_tokens(["  "])
    tokenizer.chat_template, tokenizer.eos_token = template, "<|pad|>"
    expected = sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)})
    model = tiny_model("qwen3", tied=True)
    model.generation_config.eos_token_id = None
    e = HFEngine(model, tokenizer, Config(rollouts_per_batch=8))
    assert e.stop_tokens == expected
    for response in draw(e, prompts(20), Sampling(1.0, 30, seed=0)):
        assert not set(response.tokens[:-1]) & set(expected)
        assert (response.tokens[-1] in expected) == (response.finish_reason == "stop")


def test_a_seed_repeats_and_another_does_not():
    e = engine()
    first = draw(e, prompts(10), Sampling(1.0, 20, seed=3))
    torch.rand(7)  # the global random state plays no part
    assert draw(e, prompts(10), Sampling(1.0, 20, seed=3)) == first
    assert draw(e, prompts(10), Sampling(1.0, 20, seed=4)) != first


@pytest.mark.parametrize("rollouts_per_batch", [3, 8])
def test_what_is_missing_is_drawn_as_if_nothing_had_been_finished(rollouts_per_batch):
    """To the last bit. Sequences are decoded in fixed batches, and those in which nothing is missing are skipped."""
    e = engine(rollouts_per_batch=rollouts_per_batch)
    decoded: list[int] = []
    real = e._decode
    e._decode = lambda given, order, *rest: decoded.append(len(order)) or real(given, order, *rest)  # type: ignore
    whole = dict(e.generate(prompts(10), 4, Sampling(1.0, 20, seed=3)))
    assert sorted(whole) == list(range(10))
    for finished in (list(whole)[:6], list(whole)[3:5], list(whole)):  # in the order in which they come
        decoded.clear()
        rest = dict(e.generate(prompts(10), 4, Sampling(1.0, 20, seed=3), finished))
        assert rest == {i: responses for i, responses in whole.items() if i not in finished}
        missing = 40 - 4 * len(finished)
        assert missing <= sum(decoded) <= missing + 2 * (rollouts_per_batch - 1)


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


def test_generation_leaves_the_policy_ready_to_train():
    e = engine()
    e.policy.train()
    draw(e, prompts(3), Sampling(1.0, 5, seed=0))
    assert e.policy.training
    assert causal_lm(e.policy).config._attn_implementation == "packed"


def test_the_engine_generates_with_the_policy_that_it_was_given_last():
    e, other = engine(), tiny_model("qwen3", tied=True, seed=1)
    before = draw(e, prompts(5), Sampling(1.0, 20, seed=3))
    e.wake(other)
    assert draw(e, prompts(5), Sampling(1.0, 20, seed=3)) != before
    perturb(e.policy)  # an update changes the weights in place: there is no copy that could be an old one
    rollouts = [Rollout("p", prompt, r.tokens, r.sampler_logprobs, "", r.finish_reason)
                for prompt, r in zip(prompts(5), draw(e, prompts(5), Sampling(1.0, 20, seed=3)), strict=True)]
    (row,) = pack([(r, 1) for r in rollouts], 10_000)
    with torch.no_grad():
        logprobs = forward_row(other, row, 1.0, Config())[1]
    torch.testing.assert_close(logprobs, row.sampler_logprobs, rtol=0, atol=3e-5)


# -------------------------------------------------------------------------------- the groups


PROBLEMS = encode_prompts(toy.toy_problems(6, seed=0), TOKENIZER, Config(prompt_suffix="", max_prompt_tokens=64))


class Scripted:
    """Answers every problem, the last one first, in half of its rollouts rightly; fails after so many groups."""

    tokenizer, rollouts_per_batch = TOKENIZER, 64

    def __init__(self, fails_after: int = 99) -> None:
        self.fails_after, self.asked = fails_after, []

    def generate(
        self, prompts_: list[list[int]], count: int, sampling: Sampling, finished: Collection[int] = ()
    ) -> Any:
        of_prompt = {problem.prompt_tokens: problem for problem in PROBLEMS}
        for i in reversed(range(len(prompts_))):
            if i in finished:
                continue
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(i)
            text = toy.toy_response(of_prompt[tuple(prompts_[i])], None)
            texts = [text if j % 2 else text.replace("boxed{", "boxed{9") for j in range(count)]
            tokens = [[*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
            yield i, [Response(t, [-0.1 * i] * len(t), "stop") for t in tokens]


@pytest.fixture(scope="module")
def pool():
    with RewardPool(require_think=True) as pool:
        yield pool


def test_groups_are_graded_and_measured(pool):
    groups = set_rewards(*sample_groups(Scripted(), pool, PROBLEMS, 4, Sampling(1.0, 96, 0)))
    assert all([r.reason for r in group.rollouts] == ["wrong", "correct"] * 2 for group in groups)
    assert [group.problem for group in groups] == PROBLEMS
    result = Evaluation.of(groups)
    assert (result.avg_at_k, result.pass_at_k[-1], result.truncated, result.problems) == (0.5, 1.0, 0.0, 6)
    curves = ProbeCurves.of({0.8: groups, 1.0: groups})
    assert curves.accuracy == {0.8: 0.5, 1.0: 0.5}
    assert curves.noise == {0.8: 0.0, 1.0: 0.0}


def test_groups_that_were_finished_before_an_interrupt_come_from_the_file(pool, tmp_path):
    kept, sampling = tmp_path / "kept" / "step_000003", Sampling(1.0, 96, 0)
    whole = set_rewards(*sample_groups(Scripted(), pool, PROBLEMS, 4, sampling))
    with pytest.raises(KeyboardInterrupt):
        sample_groups(Scripted(fails_after=4), pool, PROBLEMS, 4, sampling, kept)
    (file,) = kept.parent.iterdir()
    assert sorted(line["number"] for line in lines(file)) == [2, 3, 4, 5]
    file.write_bytes(file.read_bytes()[:-30])  # a kill cuts the last line short: its group is drawn again
    rest = Scripted()
    assert set_rewards(*sample_groups(rest, pool, PROBLEMS, 4, sampling, kept)) == whole
    assert rest.asked == [2, 1, 0]
    again = Scripted()
    assert set_rewards(*sample_groups(again, pool, PROBLEMS, 4, sampling, kept)) == whole
    assert again.asked == []


@pytest.mark.parametrize("change", ["sampling", "group_size", "problems", "rollouts_per_batch", "engine"])
def test_groups_of_another_question_are_not_used(pool, tmp_path, change):
    kept, e = tmp_path / "step_000003", Scripted()
    set_rewards(*sample_groups(e, pool, PROBLEMS[:3], 4, Sampling(1.0, 96, 0), kept))
    if change == "rollouts_per_batch":
        e.rollouts_per_batch = 32
    elif change == "engine":
        e = type("Other", (Scripted,), {})()
    e.asked = []
    problems, group_size = PROBLEMS[3:] if change == "problems" else PROBLEMS[:3], 2 if change == "group_size" else 4
    sampling = Sampling(1.1 if change == "sampling" else 1.0, 96, 0)
    groups = set_rewards(*sample_groups(e, pool, problems, group_size, sampling, kept))
    assert e.asked == [2, 1, 0]
    assert [group.problem for group in groups] == problems
    assert {len(group.rollouts) for group in groups} == {group_size}


def test_an_interrupted_draw_of_the_real_engine_ends_as_the_undisturbed_one(pool, tmp_path):
    e, sampling = engine(rollouts_per_batch=5), Sampling(1.0, 20, seed=3)
    whole = set_rewards(*sample_groups(e, pool, PROBLEMS, 4, sampling))
    real = e._decode
    left = [2]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    e._decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sample_groups(e, pool, PROBLEMS, 4, sampling, tmp_path / "kept")
    assert 1 <= len(lines(tmp_path / "kept.rank0.jsonl")) < 6
    left = [10]
    assert set_rewards(*sample_groups(e, pool, PROBLEMS, 4, sampling, tmp_path / "kept")) == whole
    assert len(lines(tmp_path / "kept.rank0.jsonl")) == 6


# -------------------------------------------------------------------------------- models


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    settings = Config(device="cpu")
    with pytest.raises(UserError, match=rf"model is {tmp_path}/nowhere: its tokenizer does not load"):
        load_tokenizer(str(tmp_path / "nowhere"), settings)
    with pytest.raises(UserError, match=rf"model is {tmp_path}/nowhere: it does not load"):
        load_model(str(tmp_path / "nowhere"), settings, torch.float32)
    model = tiny_model("qwen3", tied=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # pickled weights can run code
    with pytest.raises(UserError, match=r"it does not load .*safetensors"):
        load_model(str(tmp_path), settings, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="it does not load"):
        load_model(str(tmp_path), settings, torch.float32)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = toy.toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(str(tmp_path), Config())


SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(("kind", "positions"), [
    ("gpt2", 64), ("opt", 64), ("gpt_neo", 64), ("gpt_bigcode", 64), ("biogpt", 64),
    ("qwen2", None), ("llama", None), ("phi", None), ("gpt_neox", None), ("falcon", None), ("bloom", None),
])
def test_only_a_learned_table_of_positions_has_an_end(tmp_path, kind, positions):
    named = {} if kind == "bloom" else {"max_position_embeddings": 64}
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2} if kind == "gpt_neo" else {}
    AutoConfig.for_model(kind, **SMALL | named | layers).save_pretrained(tmp_path)
    problems = [Problem("1", "", ("1",), prompt_tokens=(1,) * length) for length in (3, 4)]
    assert check_model(str(tmp_path), Config(), problems, 60) == 64
    if positions is None:
        assert check_model(str(tmp_path), Config(), problems, 10_000) == 10_004
    else:
        with pytest.raises(UserError, match=f"model has {positions} positions, prompt and response up to 65 tokens"):
            check_model(str(tmp_path), Config(), problems, 61)


def test_a_token_without_a_row_in_the_embedding_is_an_error(tmp_path):
    AutoConfig.for_model("qwen2", **SMALL).save_pretrained(tmp_path)
    check_model(str(tmp_path), Config(), [Problem("1", "", ("1",), prompt_tokens=(1, 49))], 10)
    with pytest.raises(UserError, match="a prompt has token 50, and the embedding has 50 rows"):
        check_model(str(tmp_path), Config(), [Problem("1", "", ("1",), prompt_tokens=(1, 50, 2))], 10)


@pytest.mark.parametrize(("settings", "mended"), [
    ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
     {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}),
    ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
    ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {"do_sample": False}),
    ({"early_stopping": True, "length_penalty": 2.0, "output_scores": True}, {}),
    ({"early_stopping": True, "num_beams": 4}, {"early_stopping": True, "num_beams": 4}),
    ({"temperature": 0.6, "output_logits": True, "pad_token_id": -1}, {"do_sample": True, "temperature": 0.6}),
])
def test_settings_of_generation_that_transformers_would_not_write_are_mended(tmp_path, settings, mended):
    tiny_model("qwen3", tied=True).save_pretrained(tmp_path)
    ids = {"eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | ids))
    load_model(str(tmp_path), Config(device="cpu"), torch.float32).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    del saved["transformers_version"]
    assert saved == mended | ids


def test_the_base_of_an_adapter_is_found_from_any_folder_or_named(tmp_path, monkeypatch):
    adapter = tmp_path / "work" / "runs" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"model is {adapter}: the base of this adapter, models/base, is no folder"):
        base_model(str(adapter))
    for place in ("work", "elsewhere"):  # above the adapter; then here, which comes first
        tiny_model("qwen3", tied=True).save_pretrained(tmp_path / place / "models" / "base")
        monkeypatch.chdir(tmp_path / "elsewhere" if place == "elsewhere" else tmp_path)
        assert base_model(str(adapter)) == str(tmp_path / place / "models" / "base")
    assert base_model("models/base") == "models/base"


def yarn_config(factor: float, original: int, scale: float = 1.0) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "attention_factor": scale}  # fmt: skip


def test_yarn_stretches_positions(tmp_path: Path):
    tiny_model("qwen3", tied=True).save_pretrained(tmp_path)
    yarn = load_model(str(tmp_path), Config(device="cpu"), torch.float32, rope=yarn_config(2.0, 64))
    assert yarn.config.max_position_embeddings == 128
    reference = Qwen3ForCausalLM(Qwen3Config(**{
        **SIZES, "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 128,
        "rope_parameters": {**yarn.config.rope_parameters, **yarn_config(2.0, 64)},
    }))  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    reference.load_state_dict(plain.state_dict())
    ids = torch.tensor([[(5 * j) % 46 + 4 for j in range(100)]])
    with torch.no_grad():
        torch.testing.assert_close(yarn(ids).logits, reference.eval()(ids).logits)
        assert (yarn(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_policy_weights_are_named_as_in_a_checkpoint_and_leave_the_policy_alone():
    base = tiny_model("llama", tied=False)
    names = set(base.state_dict())
    policy = prepare_policy(base, Config(lora_rank=4))
    perturb(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    weights = dict(policy_weights(policy, torch.bfloat16))
    assert set(weights) == names
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    for name, weight in policy.unload().state_dict().items():  # the adapter goes over by itself
        assert torch.equal(weights[name], weight.bfloat16()), name


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 6), torch.bfloat16)])
def test_a_gpu_computes_in_what_vllm_takes_on_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype(Config(), torch.device("cuda")) == expected
    assert resolve_dtype(Config(dtype="float32"), torch.device("cuda")) == torch.float32


def test_a_gpu_that_pytorch_cannot_use_is_an_error_unless_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    with pytest.raises(UserError, match=r"device is auto: .* too old for PyTorch's CUDA 13\.0 .*driver 580 or newer"):
        resolve_device("auto")
    assert resolve_device("cpu").type == "cpu"


def test_problem_text_survives_the_round_trip_to_tokens():
    settings = Config(prompt_suffix="", max_prompt_tokens=64)
    (encoded,) = encode_prompts([Problem("x", "3 + 4", ("7",))], TOKENIZER, settings)
    assert TOKENIZER.decode(encoded.prompt_tokens) == "<|user|>3 + 4<|end|><|assistant|><think>"


def test_vllm_that_is_not_installed_is_an_error_only_if_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not uses_vllm(Config())
    with pytest.raises(UserError, match="engine is vllm: it is not installed"):
        uses_vllm(Config(engine="vllm"))
