"""The memory plan against what the same update really takes, by PyTorch's record of every allocation."""
from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rollouts
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM,
)

import train
from data import UserError
from plan import CUDA_CONTEXT, GIB, MemoryPlan, dry_run, main, plan_memory, show_plan
from polaris_mini import PRESETS, Config, Group, Problem, read_config
from rollout import load_policy

UPDATE = ("log-probs", "backward", "optimizer step")


def saved_model(folder: Path, **sizes: object) -> str:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**{
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 384, "vocab_size": 3000, "tie_word_embeddings": True, "bos_token_id": None, **sizes,
    })).save_pretrained(folder)  # fmt: skip
    return str(folder)


def measured_peak(config: Config, tokens: int) -> float:
    """Return the most bytes that all tensors took in the second update of a policy, its weights and state included."""
    policy = load_policy(config)
    optimizer, scaler = train.make_optimizer(policy, config), torch.amp.GradScaler("cpu", enabled=False)
    run = SimpleNamespace(policy=policy, optimizer=optimizer, scaler=scaler, config=config,
                          state=SimpleNamespace(temperature=1.0, step=0))  # fmt: skip
    rollouts = random_rollouts(2)
    for rollout in rollouts:
        rollout.prompt_tokens, rollout.advantage = [5] * 8, 1.0
        rollout.response_tokens, rollout.sampler_logprobs = [7] * (tokens - 7), [-1.0] * (tokens - 7)
    groups = [Group(Problem("p", "p", ("1",)), rollouts)]
    train.update_policy(run, groups)
    held = [*policy.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train.update_policy(run, groups)
    events, memory = list(found.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            memory.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # Only what was allocated here counts when it is freed: for older memory the size may be that of another tensor.
    live, peak = {}, 0
    for _, pointer, size in sorted(memory, key=lambda entry: entry[0]):
        if size > 0:
            live[pointer] = size
            peak = max(peak, sum(live.values()))
        else:
            live.pop(pointer, None)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in held)


TOKENS = 1200
"""Of a row."""
CHECKPOINTING = {"gradient_checkpointing": True}
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.mark.parametrize(("tied", "settings"), [
    (True, {}), (False, {}),
    (True, CHECKPOINTING), (True, {**CHECKPOINTING, "logprob_chunk_tokens": 400}),
    (True, BFLOAT16), (False, {**BFLOAT16, **CHECKPOINTING}), (True, {**CHECKPOINTING, "optimizer": "sgd"}),
    (True, {**BFLOAT16, "lora_rank": 8}), (True, {**BFLOAT16, **CHECKPOINTING, "lora_rank": 8}),
    (False, {**BFLOAT16, **CHECKPOINTING, "lora_rank": 8, "quantize_base": True}),
], ids=str)  # fmt: skip
def test_plan_is_within_a_tenth_of_what_an_update_takes(tmp_path, tied, settings):
    settings = {"dtype": "float32", "logprob_chunk_tokens": 50, **settings}
    config = Config(model=saved_model(tmp_path, tie_word_embeddings=tied), max_prompt_tokens=8,
                    stages=(f"1:1.0:{TOKENS - 7}",), tokens_per_micro_batch=TOKENS, device="cpu", **settings)
    planned = plan_memory(config, 24 * GIB).peak(*UPDATE) - CUDA_CONTEXT
    measured = measured_peak(config, TOKENS)
    print(f"planned {planned / 2**20:.2f}, measured {measured / 2**20:.2f} MiB, {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=0.1)


def test_dry_run_does_not_depend_on_the_number_of_layers_or_chunks_it_runs(tmp_path):
    """Layers and chunks are alike, so two of each stand for all."""
    config = Config(model=saved_model(tmp_path), dtype="bfloat16", gradient_checkpointing=True, logprob_chunk_tokens=50)
    one, two, four = (dry_run(config, layers, 700) for layers in (1, 2, 4))
    assert all(d == pytest.approx(a + 3 * (b - a)) for a, b, d in zip(one, two, four, strict=True))
    long = replace(config, logprob_chunk_tokens=349)  # two chunks are all there are
    short = replace(long, logprob_chunk_tokens=50)
    assert dry_run(long, 2, 699)[2] == pytest.approx(dry_run(short, 2, 699)[2], rel=0.02)


def planned(arguments: str, card: float = 24) -> MemoryPlan:
    return plan_memory(read_config(["--data", "unread", *arguments.split()]), card * GIB)


def test_plan_knows_what_each_option_changes():
    base = "--preset polaris-1.7b --max-response-tokens 8192 --gradient-checkpointing --tokens-per-micro-batch 9216"
    before = planned(base).phases["backward"]

    def after(option: str) -> dict[str, float]:
        return planned(f"{base} {option}").phases["backward"]

    parameters = 1_720_574_976  # of the published model
    assert before["policy"] == before["gradients"] == 4 * parameters
    assert before["optimizer"] == 8 * parameters
    assert after("--optimizer adamw8bit")["optimizer"] == 2 * parameters
    for optimizer, state in (("sgd", 0), ("paged_adamw", 8 * parameters), ("paged_adamw8bit", 2 * parameters)):
        plan = planned(f"{base} --optimizer {optimizer}")
        assert all("optimizer" not in parts for parts in plan.phases.values())
        assert plan.cpu.get("optimizer", 0) == state
    blocks = 28 * 9216 * 2048 * 4
    assert before["activations kept"] - after("--offload-activations")["activations kept"] == pytest.approx(
        blocks * 27 / 28)
    pinned = planned(f"{base} --offload-activations").cpu["activations"]
    assert blocks < pinned == 28 * 2**27  # 72 MiB are rounded up to 128
    lora = after("--lora-rank 32")
    assert lora["policy"] == pytest.approx(2 * parameters, rel=0.05)
    assert lora["gradients"] < 0.05 * before["gradients"]
    assert after("--lora-rank 32 --quantize-base")["policy"] < 0.5 * lora["policy"]
    hf = planned(f"{base} --engine hf").phases["rollout"]
    assert hf["engine weights"] == 2 * parameters  # the copies that autocast keeps
    assert "engine weights" not in planned(f"{base} --engine hf --lora-rank 32").phases["rollout"]
    offloaded = planned(f"{base} --offload-policy")
    assert "policy" not in offloaded.phases["rollout"]
    assert offloaded.cpu == {"policy": 4 * parameters}


def shown(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    main(arguments.split())
    return capsys.readouterr().out


def changes_in(output: str) -> str:
    return " ".join(line.partition("(")[0] for line in output.splitlines() if line.startswith("  --"))


def test_plan_command_names_a_change_that_fits(capsys):
    asked = "--gpu-memory 12 --preset rtx-24gb --max-response-tokens 16384"
    output = shown(capsys, asked)
    assert "does not fit: backward takes" in output
    assert output.count("|") + output.count(">") == 5  # a bar a phase
    assert "in CPU memory  policy 3.3" in output
    assert "\nfits: " in shown(capsys, f"{asked} {changes_in(output)}")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(preset):
    """Those that name a GPU of 24 GiB fit it."""
    plan = planned(f"--preset {preset}" + " --model Qwen/Qwen3-1.7B" * (preset == "recipe"), 23.5)
    assert list(plan.phases) == ["weight sync", "rollout", "log-probs", "backward", "optimizer step"]
    assert all(size > 0 for parts in plan.phases.values() for size in parts.values())
    assert (plan.peak() <= 23.5 * GIB) == (preset in ("toy", "rtx-24gb", "rtx-2x24gb"))


def test_plan_offers_what_does_not_change_the_result_first(capsys):
    output = shown(capsys, "--gpu-memory 23.5 --preset rtx-24gb --lora-rank 0 --optimizer adamw")
    assert changes_in(output).split() == ["--offload-activations", "--optimizer", "paged_adamw"]


def test_plan_shortens_responses_and_rows_where_nothing_else_helps(capsys, tmp_path):
    asked = f"--gpu-memory 2.02 --model {saved_model(tmp_path)} --max-response-tokens 30000"
    output = shown(capsys, asked)
    assert output.count("--max-response-tokens") == output.count("--tokens-per-micro-batch") == 1
    assert "\nfits: " in shown(capsys, f"{asked} {changes_in(output)}")


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 50}


@pytest.mark.parametrize(("shape", "slides"), [
    (MistralConfig(**TINY, sliding_window=4096), True), (Gemma3TextConfig(**TINY, sliding_window=4096), True),
    (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=4096, max_window_layers=1), True),
    (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=4096, max_window_layers=2), False),  # in no layer
    (Qwen2Config(**TINY, use_sliding_window=False, sliding_window=4096), False),
])  # fmt: skip
def test_plan_refuses_a_sliding_window_as_training_does(tmp_path, capsys, shape, slides):
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    refused = pytest.raises(UserError, match="sliding window has 4096 tokens, prompt and response may have 4097")
    for tokens in (64, 3072, 3073):  # and a prompt of 1024
        asked = f"--model {tmp_path} --max-response-tokens {tokens} --device cpu"
        with refused if slides and tokens == 3073 else nullcontext():
            load_policy(read_config(["--data", "unread", *asked.split()]))
        with refused if slides and tokens == 3073 else nullcontext():
            assert "\nfits: " in shown(capsys, f"--gpu-memory 8 {asked}")
    assert not slides or capsys.readouterr().out == ""  # nothing is shown of what cannot be


def test_measured_peaks_stand_beside_the_planned_ones(capsys):
    plan = MemoryPlan({"rollout": {"policy": 2 * GIB}, "backward": {"policy": 1 * GIB}}, 3.0)
    show_plan(plan, 4 * GIB, {"backward": 1.25 * GIB})
    rollout, backward = capsys.readouterr().out.splitlines()
    assert rollout.startswith("rollout        " + 24 * "P" + 24 * "." + "|   2.0  P policy 2.0")
    assert "1.0 (1.2 measured)" in backward


def test_a_run_is_planned_beside_what_it_measured(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(PRESETS["toy"])))
    steps = [{"step": n, "memory/rollout_gib": 1.25 * n, "memory/update_gib": 2.5} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    output = shown(capsys, f"--run {tmp_path} --gpu-memory 4")
    assert "responses of up to 128 tokens" in output
    assert re.search(r"^rollout .* \(2\.5 measured\)", output, re.MULTILINE)
    assert re.search(r"^backward .* \(2\.5 measured\)", output, re.MULTILINE)
    with pytest.raises(UserError, match=r"resume is .*nowhere"):
        main(["--run", str(tmp_path / "nowhere")])


# --------------------------------------------------------------- the tables of docs/gpu.md

@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()


def test_cards_hold_what_the_docs_say(page, capsys):
    cards = re.findall(r"^\| (?:\d+ \(([\d.]+)\))? *\| .*? \| ([\d,]+) \| `(--preset .*)` \| ([\d.]+) \| ([\d.]+) \|$",
                       page, re.MULTILINE)  # fmt: skip
    assert len(cards) == 13
    card = ""
    for given, tokens, options, highest, at_once in cards:
        card = given or card
        output = shown(capsys, f"--gpu-memory {card} {options}")
        assert f"responses of up to {tokens} tokens" in output
        (fits,) = [line for line in output.splitlines() if line.startswith("fits: ")]
        assert f"takes {highest} of {card} GiB; the cache holds {at_once} responses of full length" in fits, options


def test_the_printed_plan_of_the_docs_is_the_plan(page, capsys):
    (command,) = re.findall(r"^python tools/plan.py (--preset .*)$", page, re.MULTILINE)
    assert shown(capsys, command) in page


LONG = "--max-response-tokens 32768 --tokens-per-micro-batch 33792 --gradient-checkpointing"
TABLE = (  # model, what is trained and how, options
    ("Qwen3-1.7B", "every weight", f"--preset polaris-1.7b {LONG}"),
    ("", "… 8-bit Adam", f"--preset polaris-1.7b {LONG} --optimizer adamw8bit"),
    ("", "… paged Adam", f"--preset polaris-1.7b {LONG} --optimizer paged_adamw"),
    ("", "… and activations in CPU memory",
     f"--preset polaris-1.7b {LONG} --optimizer paged_adamw --offload-activations"),
    ("", "LoRA (`rtx-24gb`)", "--preset rtx-24gb"),
    ("", "LoRA on 4 bits", "--preset rtx-24gb --quantize-base"),
    ("Qwen3-4B", "LoRA (`rtx-2x24gb`)", "--preset rtx-2x24gb"),
    ("", "LoRA, activations in CPU memory", "--preset rtx-2x24gb --offload-activations"),
    ("", "… 40,960 tokens",
     "--preset rtx-2x24gb --max-response-tokens 40960 --tokens-per-micro-batch 41984 --offload-activations"),
    ("", "LoRA on 4 bits, activations in CPU memory", "--preset rtx-2x24gb --quantize-base --offload-activations"),
    ("Qwen3-8B", "LoRA on 4 bits, activations in CPU memory, 16,384 tokens",
     "--preset rtx-2x24gb --model Qwen/Qwen3-8B --quantize-base --offload-activations --max-response-tokens 16384 "
     "--tokens-per-micro-batch 17408"),
)  # fmt: skip


def memory_table() -> str:
    """Return the table of docs/gpu.md."""
    rows = ["| model | trained | policy | gradients | optimizer | highest point of the update | generated at once |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, what, arguments in TABLE:
        plan = planned(arguments)
        parts = [plan.phases["backward"].get(name, 0.0) / GIB for name in ("policy", "gradients", "optimizer")]
        peak, held = plan.peak(*UPDATE) / GIB, f"{plan.responses:.1f}"
        engine = held if plan.peak("rollout", "weight sync") <= 24 * GIB else "does not fit"
        rows.append(f"| {model} | {what} | {' | '.join(f'{part:.1f}' for part in parts)} | "
                    f"{peak:.1f}{', does not fit' * (peak > 24)} | {engine} |")
    return "\n".join(rows)


def test_the_detailed_memory_table_is_the_plans(page):
    assert memory_table() in page, f"\n{memory_table()}"
