"""Plan what a run takes of a GPU's memory, phase by phase, and name the cheapest change that makes it fit.

    python tools/plan.py --preset rtx-24gb --gpu-memory 11.6    # with --gpus 2 for two; and all options of training
    python tools/plan.py --run runs/NAME                        # a run's plan, beside what it measured

Needs neither a GPU nor weights: the update's own code runs on tensors without content.
"""
from __future__ import annotations

import copy
import functools
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import DataError
from polaris_mini import Config, Rollout
from rollout import ENGINE_SHARE, KV_BLOCK, ModelError, base_model, causal_lm, kv_bytes_per_token, refuse_torchrun
from train import (
    TOY_MODEL, ConfigError, Display, Row, _hidden_states, blocks, optimizer_bytes, pack, prepare_policy, read_config,
    refuse_unshardable, stored_dtype, token_logprobs,
)


GIB = 2**30
CUDA_CONTEXT = 1.0 * GIB
"""CUDA's context, its libraries' workspaces, gaps between tensors: an assumption."""
KNOWN_SHAPES: dict[str, PretrainedConfig] = {
    **{name: Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        tie_word_embeddings=tied,
    ) for name, hidden, inner, layers, heads, tied in (
        ("Qwen/Qwen3-1.7B", 2048, 6144, 28, 16, True), ("Qwen/Qwen3-4B", 2560, 9728, 36, 32, True),
        ("Qwen/Qwen3-8B", 4096, 12288, 36, 32, False),
    )},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""So that the presets' models can be planned without a network. Source: their config.json on the hub."""


@dataclass(frozen=True)
class PlanOptions:
    """Say what a run takes of a GPU's memory, phase by phase, and the cheapest change that makes it fit.

    Needs neither a GPU nor weights. Every other option is one of training (python train.py --help).
    """

    gpu_memory: float = 24.0
    """GiB of each GPU, as PyTorch sees them: about 23.5 of an RTX 3090 or 4090."""
    gpus: int = 1
    """How many torchrun will use."""
    run: Path | None = None
    """Folder of a run: plan its settings, and show what it measured beside the plan."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and by what takes them, on each GPU."""

    phases: dict[str, dict[str, float]]
    responses: float
    """Responses of full length that the engine's key-value cache holds at once."""
    cpu: dict[str, float] = field(default_factory=dict)
    """What waits in CPU memory."""

    def peak(self, *phases: str) -> float:
        return max(sum(self.phases[phase].values()) for phase in phases or self.phases)


def plan_memory(config: Config, card: float, gpus: int = 1) -> MemoryPlan:
    """Work out what every phase of a step takes of a GPU with `card` bytes."""
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    shape = model_shape(config)
    policy, tokens = unloaded_policy(config, shape), config.max_prompt_tokens + config.longest_response
    weights, state, gathered = weight_bytes(policy, config), float(optimizer_bytes(policy, config)), 0.0
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradients: float = sum(p.numel() * p.element_size() for p in trained)
    if gpus > 1 and config.lora_rank == 0:  # FSDP brings embedding, head and two blocks together: weights, gradients,
        layers = blocks(causal_lm(policy))  # and these once more on their way to the other GPUs
        block = sum(p.numel() * p.element_size() for p in layers[0].parameters())
        gathered = 3 * (weights - (len(layers) - 2) * block)
        weights, gradients, state = weights / gpus, gradients / gpus, state / gpus
    held = {"policy": weights, "optimizer": 0.0 if config.offload_optimizer else state, "CUDA": CUDA_CONTEXT}
    largest = max(trained, key=torch.Tensor.numel)  # of which the step by weights has copies
    step = 16.0 * largest.numel() if largest.dtype == torch.bfloat16 else 0.0  # float32 weight, gradient, noise, sum
    if config.offload_optimizer:
        step += state * largest.numel() / sum(p.numel() for p in trained)

    kept, logprobs, backward, block_inputs = update_bytes(policy, config, tokens)
    held, engine, rollout, responses = engine_bytes(policy, config, held, card, tokens, sharded=gathered > 0)
    always = {**held, "gathered weights": gathered, "gradients": gradients, "activations kept": kept}
    recomputed = "block recomputed" if config.gradient_checkpointing else "backward"
    phases = {
        "weight sync": engine,
        "rollout": rollout,
        "log-probs": {**always, "log-prob chunk": logprobs - kept},
        "backward": {**always, recomputed: backward - kept},
        "optimizer step": {**always, "activations kept": 0.0, "one weight": step},
    }
    cpu = {"policy": weights * config.offload_policy, "activations": block_inputs * config.offload_activations,
           "optimizer": state * config.offload_optimizer}  # fmt: skip
    return MemoryPlan({phase: _without_zeros(parts) for phase, parts in phases.items()}, responses, _without_zeros(cpu))


def _without_zeros(parts: Mapping[str, float]) -> dict[str, float]:
    return {what: size for what, size in parts.items() if size}


def frozen_linear(policy: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights under the LoRA adapters, which are those that `quantize_base` keeps in 4 bits."""
    head: Any = causal_lm(policy).get_output_embeddings()
    linear = (module.weight for module in policy.modules() if type(module) is torch.nn.Linear and module is not head)
    return [weight for weight in linear if not weight.requires_grad]


def weight_bytes(policy: torch.nn.Module, config: Config) -> float:
    """Return what the policy's weights take."""
    size: float = sum(p.numel() * p.element_size() for p in policy.parameters())
    if config.quantize_base:  # half a byte, and 8 bits for every 64 weights with 32 bits for every 256 of these
        size -= sum(w.numel() * (w.element_size() - 0.5 - 1 / 64 - 4 / (64 * 256)) for w in frozen_linear(policy))
    return size


def update_bytes(policy: torch.nn.Module, config: Config, longest: int) -> tuple[float, float, float, float]:
    """Return what the forward pass keeps, the peaks of log-probs and backward pass, and the inputs of all blocks.

    Not estimated by formulas but found by a dry run of the update's own code. `longest`: a prompt and its response.
    """
    row = max(longest, min(config.tokens_per_micro_batch, longest * config.prompts_per_step * config.group_size))
    same = replace(config, quantize_base=False, offload_activations=False, offload_optimizer=False, attention="sdpa",
                   offload_policy=False, optimizer="adamw", lr=1.0)  # in these a dry run would not differ
    one, two = (dry_run(same, layers, row) for layers in (1, 2))
    layers: int = causal_lm(policy).config.get_text_config().num_hidden_layers
    more = 0 if config.offload_activations else layers - 1
    kept, logprobs, backward = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    if config.quantize_base:  # one matrix at a time is made 16-bit again
        backward += max(w.numel() * w.element_size() for w in frozen_linear(policy))
    return kept, logprobs, backward, layers * (two[0] - one[0])


def engine_bytes(
    policy: torch.nn.Module, config: Config, held: dict[str, float], card: float, longest: int, *, sharded: bool
) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
    """Return what is held in every phase, in weight sync and in rollout, and how many responses the cache holds."""
    compute = getattr(torch, config.dtype)
    whole_model = [p for p in policy.parameters() if config.lora_rank == 0 or not p.requires_grad]
    weights = float(sum(p.numel() for p in whole_model) * compute.itemsize)
    response = kv_bytes_per_token(causal_lm(policy).config, compute) * (longest + KV_BLOCK)
    cache = float(response * config.rollouts_per_batch)
    if config.engine == "hf":  # the policy itself, but a copy of sharded weights; autocast keeps 16-bit ones of float32
        held = {**held, "engine weights": weights} if sharded else held
        copies = config.lora_rank == 0 and whole_model[0].dtype != compute
        rollout = {**held, "engine weights": weights if sharded or copies else 0.0}
        return held, held, {**rollout, "key-value cache": cache}, cache / response
    engine = {**held, "engine weights": weights}
    rollout = {**engine, "CUDA": CUDA_CONTEXT + ENGINE_SHARE * card}
    rollout["policy"] *= not config.offload_policy
    cache = max(response, min(card - sum(rollout.values()), cache))
    return held, engine, {**rollout, "key-value cache": cache}, cache / response


def unloaded_policy(config: Config, shape: PretrainedConfig) -> torch.nn.Module:
    """Make the policy on the meta device: every shape and type, no memory."""
    dtype = stored_dtype(config, getattr(torch, config.dtype))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return prepare_policy(model, config)


@functools.cache
def dry_run(config: Config, layers: int, tokens: int) -> tuple[float, float, float]:
    """Run the update's own code on fake tensors, which have shapes but no content, and count what is alive.

    One row of `tokens` tokens and a model of few layers: all are alike, so each more takes what the second takes.

    Returns bytes without weights and their gradients: what forward keeps, the peaks of log-probs and backward pass.
    """
    shape = copy.deepcopy(model_shape(config))
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    policy = unloaded_policy(config, shape)
    model, live, found = causal_lm(policy), LiveMemory(), []

    def hidden_states(row: Row, config: Config) -> torch.Tensor:
        hidden = _hidden_states(model, row, config)
        found.append(live.bytes)
        forward = live.peak
        live.peak = live.bytes

        def at_begin_of_backward(gradient: torch.Tensor) -> None:
            found.append(live.peak)
            live.peak = forward  # in case it is the higher one

        hidden.register_hook(at_begin_of_backward)
        return hidden

    model.hidden_states = hidden_states  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_weights(policy)
        few = min(tokens, 2 * config.logprob_chunk_tokens + 1)  # all chunks are alike too
        rollout = Rollout("", [0] * (tokens - few + 1), [0] * few, [0.0] * few, "", "length", advantage=1.0)
        (row,) = pack([(rollout, 1)], tokens)
        for parameter in policy.train().parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            live.ignore(parameter, parameter.grad)
        try:
            with live:
                token_logprobs(policy, row, 1.0, config, lambda row, logprobs: logprobs * row.advantages)
        except RuntimeError as error:
            raise ModelError(f"model is {config.model}: its memory cannot be planned, as its code looks at values, not "
                             f"only shapes ({type(error).__name__})") from error
    kept, logprobs = found
    states = (tokens - few) * text.hidden_size * getattr(torch, config.dtype).itemsize  # of the other chunks; and
    return kept, logprobs + 2 * states, live.peak + 2 * states  # their gradients


def fake_weights(policy: torch.nn.Module) -> None:
    """Give a policy on the meta device fake weights on the CPU, shared ones shared."""
    fake: dict[torch.Tensor, torch.Tensor] = {}
    for module in policy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fake:
                    fake[tensor] = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake[tensor] = torch.nn.Parameter(fake[tensor], requires_grad=tensor.requires_grad)
                if tensor is not None:
                    tensors[name] = fake[tensor]  # type: ignore[assignment]


class LiveMemory(TorchDispatchMode):
    """Count the bytes of all tensors that operations make, while they live, and the most there were: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()  # storages

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._grow(storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._grow(-size)

    def _grow(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def ignore(self, *tensors: torch.Tensor | None) -> None:
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}


def model_shape(config: Config) -> PretrainedConfig:
    """Return the configuration of the model, which has its shape."""
    if config.model == "toy":
        return Qwen3Config(vocab_size=len(data.toy_tokenizer()), **TOY_MODEL)
    if config.model in KNOWN_SHAPES:
        return KNOWN_SHAPES[config.model]
    try:
        return AutoConfig.from_pretrained(base_model(config.model), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model is {config.model}: no config.json of it can be read; give a folder or a hub name like "
                         "Qwen/Qwen3-1.7B") from error


Change = tuple[dict[str, Any], str]
"""Settings and their price."""


def changes_by_price(config: Config) -> list[Change]:
    """Return what needs less memory, cheapest first."""
    longest = config.max_prompt_tokens + config.longest_response
    changes: list[Change] = [
        ({"offload_policy": True}, "copies to and from CPU memory, once a step"),
        ({"gradient_checkpointing": True}, "blocks are computed twice"),
        ({"tokens_per_micro_batch": longest}, "more rows"),
        ({"offload_activations": True}, "copies to and from CPU memory"),
        ({"mlp_chunk_tokens": 4096}, "MLPs are computed a third time"),
        ({"optimizer": "adamw8bit"}, "a coarser optimizer state"),
        ({"offload_optimizer": True}, "copies to and from CPU memory, once a step"),
        ({"trained_weights": "bfloat16"}, "coarser weights and gradients"),
    ]
    if config.engine == "hf":
        changes.insert(0, ({"rollouts_per_batch": 16}, "slower, and other responses are drawn"))
    if config.lora_rank == 0:
        changes.append(({"lora_rank": 32, "lr": 1e-5, "trained_weights": "float32"}, "only adapters learn"))
    changes.append(({"quantize_base": True}, "a base of 4-bit weights"))
    return changes


def changed(config: Config, changes: Sequence[Change]) -> Config:
    return replace(config, **{name: value for change, _ in changes for name, value in change.items()})


def cheapest_changes(config: Config, peak: Callable[[Config], float], card: float) -> list[Change]:
    """Return the cheapest change that makes a configuration fit; if none does alone, several that all are needed."""
    def peak_with(changes: Sequence[Change]) -> float:
        try:
            return peak(changed(config, changes))
        except ValueError:  # one change needs another, or excludes it
            return math.inf

    taken: list[Change] = []
    for change in changes_by_price(config):
        if peak_with([change]) <= card:
            return [change]
        if peak_with([*taken, change]) < peak_with(taken):
            taken.append(change)
    for change in reversed(taken.copy()):  # the dearest first
        rest = [other for other in taken if other is not change]
        if peak_with(rest) <= card:
            taken = rest
    return taken


def run_plan(options: PlanOptions, config: Config, display: Display) -> None:
    """Print the plan and, if it does not fit, what would."""
    if not 0 < options.gpu_memory < math.inf or options.gpus < 1:
        raise ConfigError(f"gpu_memory is {options.gpu_memory}, gpus {options.gpus}: give GiB above 0, and at least 1")
    card = options.gpu_memory * GIB

    @functools.cache
    def plan(config: Config) -> MemoryPlan:
        return plan_memory(config, card, options.gpus)

    def peak(config: Config) -> float:
        if options.gpus > 1:
            refuse_unshardable(config)
        return plan(config).peak()

    def summary(config: Config) -> str:
        full = plan(config).peak("rollout") <= card  # by a cache that takes what is left
        worst = max((phase for phase in plan(config).phases if phase != "rollout" or not full), key=plan(config).peak)
        return (f"{worst} takes {plan(config).peak(worst) / GIB:.1f} of {options.gpu_memory:g} GiB; the cache holds "
                f"{plan(config).responses:.1f} responses of full length at once")

    display.note(f"{config.model}, responses of up to {config.longest_response:,} tokens, {options.gpus} x "
                 f"{options.gpu_memory:g} GiB, engine {'hf' if config.engine == 'hf' else 'vllm'}; GiB on each GPU:\n")
    fits = peak(config) <= card
    show_plan(plan(config), card, display, measured_memory(options.run) if options.run else None)
    display.note(f"\n{'fits' if fits else 'does not fit'}: {summary(config)}")
    if fits:
        return
    changes = fitting = cheapest_changes(config, peak, card)
    length = config.longest_response
    while peak(changed(config, fitting)) > card:
        length //= 2
        if length < 128:
            display.note("nothing that is known here makes it fit: take a smaller model or a larger GPU")
            return
        row = min(config.tokens_per_micro_batch, length + config.max_prompt_tokens)
        fitting = [*changes, ({"max_response_tokens": length, "tokens_per_micro_batch": row}, "shorter responses")]
    display.note(f"the cheapest change that fits: {summary(changed(config, fitting))}")
    for settings, price in fitting:
        flags = (f"--{name.replace('_', '-')}" + f" {value}" * (value is not True) for name, value in settings.items())
        display.note(f"  {' '.join(flags)}    ({price})")


def measured_memory(run: Path) -> dict[str, float]:
    """Return the most bytes that any step of a run measured, by the phase of the plan in which they are highest."""
    steps = list(data.read_lines(run / "metrics.jsonl"))
    names = {"rollout": "memory/rollout_gib", "backward": "memory/update_gib"}
    return {phase: GIB * max(step.get(name) or 0.0 for step in steps) for phase, name in names.items() if steps}


def show_plan(plan: MemoryPlan, card: float, display: Display, measured: Mapping[str, float] | None = None) -> None:
    """Draw a bar for each phase, as long as the share of the card that it takes."""
    width = 48
    for phase, parts in plan.phases.items():
        bar, total = "", 0.0
        for what, size in parts.items():
            total += size
            bar += PLAN_LETTERS[what] * (round(width * total / card) - len(bar))
        found = f" ({measured[phase] / GIB:.1f} measured)" if measured and phase in measured else ""
        legend = "  ".join(f"{PLAN_LETTERS[what]} {what} {size / GIB:.1f}" for what, size in parts.items())
        end = ">" if total > card else "|"
        display.note(f"{phase:14} {bar[:width].ljust(width, '.')}{end} {total / GIB:5.1f}{found}  {legend}")
    if plan.cpu:
        display.note("in CPU memory  " + ", ".join(f"{what} {size / GIB:.1f}" for what, size in plan.cpu.items()))


PLAN_LETTERS = {"policy": "P", "gathered weights": "W", "optimizer": "O", "gradients": "G", "CUDA": "C",
                "activations kept": "A", "log-prob chunk": "L", "block recomputed": "B", "backward": "B",
                "one weight": "S", "engine weights": "E", "key-value cache": "K"}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    refuse_torchrun("plan")
    options, others = data.read_options(PlanOptions, arguments, "tools/plan.py", return_unknown_args=True)
    if options.run is not None:
        others = ["--resume", str(options.run), *others]
    run_plan(options, read_config(others, needs_data=False), Display())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, ModelError, ConfigError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
