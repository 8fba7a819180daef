"""The warm start: worked examples as the model would write them, the gradient of cross-entropy, a model folder."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from doctor import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import toy
import warmup
from data import UserError
from polaris_mini import Common, Config, Problem, Rollout
from rollout import load_policy, prepare_policy

OPTIONS = ["--prompt-suffix", "", "--device", "cpu"]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that knows nothing, with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("qwen3", tied=True).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> str:
    rows = [{"problem": p.text, "response": toy.toy_response(p, None)} for p in toy.toy_problems(12, 6, terms=[2, 3])]
    return write(tmp_path_factory.mktemp("data") / "worked.jsonl", *rows)


def encoded(source: str) -> list[Rollout]:
    return warmup.encode_examples(warmup.load_worked_examples(source), toy.toy_tokenizer(), "")


# ----------------------------------------------------------------------------- worked examples


def test_example_is_what_the_model_should_write(tmp_path):
    response = "1 + 2 = 3\n</think>\n\\boxed{3}"
    source = write(tmp_path / "a.jsonl", {"problem": " 1 + 2 ", "response": response},
                   {"problem": "1 + 2", "response": f"<think>\n{response}"},  # the template opens the thought already
                   {"problem": "1 + 2", "response": response, "system": "8"})  # fmt: skip
    plain, opened, with_system = encoded(source)
    tokenizer = toy.toy_tokenizer()
    assert tokenizer.decode([*plain.prompt_tokens, *plain.response_tokens]) == (
        f"<|user|>1 + 2<|end|><|assistant|><think>{response}<|end|>")
    assert (opened.prompt_tokens, opened.response_tokens) == (plain.prompt_tokens, plain.response_tokens)
    assert tokenizer.decode(with_system.prompt_tokens).startswith("<|user|>8<|end|><|user|>1 + 2<|end|>")
    assert with_system.response_tokens == plain.response_tokens


@pytest.mark.parametrize("template", [toy.TOY_TEMPLATE, toy.TOY_TEMPLATE.replace("<think>", ""), None])
@pytest.mark.parametrize("suffix", ["", "8"])
def test_prompt_is_that_of_training(template, suffix):
    tokenizer = toy.toy_tokenizer()
    tokenizer.chat_template = template
    problems = toy.toy_problems(5, seed=0)
    trained = data.encode_prompts(problems, tokenizer, Common(prompt_suffix=suffix))
    taught = warmup.encode_examples([(problem, "<think>3</think>") for problem in problems], tokenizer, suffix)
    assert [example.prompt_tokens for example in taught] == [problem.prompt_tokens for problem in trained]
    expected = {toy.TOY_TEMPLATE: "3</think>", None: " <think>3</think>"}.get(template, "<think>3</think>")
    for example in taught:
        assert example.response_tokens == [
            *tokenizer(expected, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_long_prompts_are_taught_too():
    problem = Problem("long", " + ".join(["1"] * 2000), ("2000",))
    [example] = warmup.encode_examples([(problem, "</think>")], toy.toy_tokenizer(), "")
    assert len(example.prompt_tokens) > Config.max_prompt_tokens


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "1 + 2"}, "response is None: give a text"), ({"response": "3"}, "problem is None: give a text"),
        ({"problem": "1 + 2", "response": " "}, "response is ' ': give a text"),
        ({"problem": 12, "response": "3"}, "problem is 12: give a text"),
        ([1], r"is \[1\]: give an object with problem and response"),
    ],
)
def test_bad_row_is_named(row, message, tmp_path):
    source = write(tmp_path / "a.jsonl", {"problem": "1", "response": "1"}, row)
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {message}"):
        warmup.load_worked_examples(source)


def test_bad_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1", "response": "1"}\n\n{"problem": \n')
    with pytest.raises(UserError, match=r"a.jsonl, line 3: not JSON \("):
        warmup.load_worked_examples(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a.jsonl: is empty: give at least one worked example"):
        warmup.load_worked_examples(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot be read"):
        warmup.load_worked_examples(str(tmp_path / "nowhere.jsonl"))


# --------------------------------------------------------------------------- the gradient


def gradients(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_is_that_of_cross_entropy(tied, lora_rank, worked):
    examples = encoded(worked)[:5]
    # rows of two or three examples, each in several chunks; 40 tokens are the longest example alone
    config = Config(tokens_per_micro_batch=60, logprob_chunk_tokens=7, lora_rank=lora_rank)
    policy = prepare_policy(tiny_model("qwen3", tied=tied).double(), config)
    perturb(policy)
    loss = warmup.add_gradient(policy, examples, config)
    found = {name: gradient.clone() for name, gradient in gradients(policy).items()}

    policy.zero_grad()
    model = policy.get_base_model() if lora_rank else policy
    model.set_attn_implementation("sdpa")
    sequences = [[*example.prompt_tokens, *example.response_tokens] for example in examples]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    labels = torch.full_like(ids, -100)
    for row, example in zip(labels, examples, strict=True):
        start, end = len(example.prompt_tokens), len(example.prompt_tokens) + len(example.response_tokens)
        row[start:end] = torch.tensor(example.response_tokens)
    logits = policy(input_ids=ids, attention_mask=(torch.arange(longest) < torch.tensor(
        [[len(s)] for s in sequences])).long(), use_cache=False).logits  # fmt: skip
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert found.keys() == gradients(policy).keys()
    for name, gradient in gradients(policy).items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert gradient.norm() > 0, name


def test_examples_come_in_a_new_order_each_epoch_and_none_is_left_out():
    order = warmup.shuffled_for_ever(5, seed=0)
    first, second = ([next(order) for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second


def test_learning_rate_rises_and_falls(worked, monkeypatch):
    rates, real = [], warmup.apply_gradient

    def spy(policy, optimizer, scaler, max_norm):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(policy, optimizer, scaler, max_norm)

    monkeypatch.setattr(warmup, "apply_gradient", spy)
    config = Config(lr=0.01)
    policy = prepare_policy(tiny_model("qwen3", tied=True), config)
    warmup.teach(policy, encoded(worked), config, steps=40, batch=1)
    assert rates[:3] == pytest.approx([0.005, 0.00975, 0.0095])  # 0.01 in the second step, were it not falling yet
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0.01 / 40)


# ------------------------------------------------------------------------------ the whole tool


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "8"], ["--dtype", "float16"]], ids=["whole", "lora", "float16"])
def test_a_few_steps_lower_the_loss_and_the_folder_is_a_model(extra, model, worked, tmp_path, capsys):
    out = tmp_path / "runs" / "warm"
    warmup.main(["--model", str(model), "--data", worked, "--out", str(out), "--steps", "25", "--batch", "4", "--lr",
                 "0.01", *OPTIONS, *extra])
    assert {path.name for path in out.parent.iterdir()} == {"warm"}
    assert f"{out}: 25 steps on 12 worked examples; loss per token " in capsys.readouterr().out

    def loss(name: Path) -> float:
        config = Config(model=str(name), device="cpu")
        return warmup.add_gradient(load_policy(config), encoded(worked), config)

    assert loss(out) < 0.6 * loss(model)
    assert AutoTokenizer.from_pretrained(out).chat_template == toy.TOY_TEMPLATE
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert plain.config.eos_token_id == toy.toy_tokenizer().eos_token_id


def test_same_seed_teaches_the_same(worked):
    def taught(seed: int) -> torch.Tensor:
        config = Config(lr=0.01, seed=seed)
        policy = prepare_policy(tiny_model("qwen3", tied=True), config)
        warmup.teach(policy, encoded(worked), config, steps=3, batch=2)
        return torch.nn.utils.parameters_to_vector(policy.parameters())

    assert torch.equal(taught(0), taught(0))
    assert not torch.equal(taught(0), taught(1))


def test_gradient_that_is_not_finite_ends_it(worked):
    config = Config()
    policy = prepare_policy(tiny_model("qwen3", tied=True), config)
    next(policy.parameters()).data[:] = torch.nan
    with pytest.raises(UserError, match=r"lr is 1e-06: the gradient of step 1 is not finite; lower it"):
        warmup.teach(policy, encoded(worked), config, steps=2, batch=2)


def test_adapter_is_merged_into_its_base(model, worked, tmp_path):
    adapter = prepare_policy(AutoModelForCausalLM.from_pretrained(model), Config(lora_rank=4))
    adapter.peft_config["default"].base_model_name_or_path = str(model)
    perturb(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    toy.toy_tokenizer().save_pretrained(tmp_path / "adapter")
    arguments = ["--model", str(tmp_path / "adapter"), "--data", worked, *OPTIONS, "--steps", "1", "--lr", "1e-12"]
    warmup.main([*arguments, "--out", str(tmp_path / "warm")])
    tokens = torch.tensor([[5, 9, 4, 7]])
    with torch.no_grad():
        merged, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits
                            for name in ("warm", "adapter"))  # fmt: skip
        assert torch.allclose(merged, expected, atol=1e-5)
        assert not torch.allclose(merged, AutoModelForCausalLM.from_pretrained(model)(tokens).logits, atol=1e-2)
    with pytest.raises(UserError, match=r"adapter: it is a LoRA adapter"):
        warmup.main([*arguments, "--out", str(tmp_path / "out"), "--lora-rank", "4"])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_taught(model, worked, tmp_path):
    tokenizer = toy.toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_end")
    with pytest.raises(UserError, match=r"its tokenizer has no eos_token"):
        warmup.main(["--model", str(tmp_path / "no_end"), "--data", worked, "--out", str(tmp_path / "out"), *OPTIONS])
    with pytest.raises(UserError, match=r"out is .*tiny: it exists already"):
        warmup.main(["--model", str(model), "--data", worked, "--out", str(model)])


def test_settings_are_checked_at_once(capsys):
    for options, message in (("--steps 0", "steps is 0: give at least 1"), ("--lr 0", "lr is 0.0: give a value above"),
                             ("--stepz 3", "Unrecognized options: --stepz")):
        with pytest.raises(SystemExit):
            warmup.main(["--model", "m", "--data", "d", "--out", "o", *options.split()])
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
