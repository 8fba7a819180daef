"""Plan what a run takes of a GPU's memory, phase by phase, and name the cheapest change that makes it fit.

    python tools/plan.py --preset rtx-24gb --gpu-memory 11.6    # with any options of python train.py
    python tools/plan.py --run runs/NAME                        # a run's plan, beside what it measured

Needs neither a GPU nor weights: the update's own code runs on tensors without content. On several GPUs each holds what
one does.
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
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import UserError
from polaris_mini import Config, Rollout, read_config
from rollout import (
    ENGINE_LEAST, ENGINE_SHARE, KV_BLOCK, base_model, causal_lm, kv_bytes_per_token, optimizer_bytes, prepare_policy,
)
from train import forward_row, pack

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
    """What the plan needs to know beside the options of training (python train.py --help)."""

    gpu_memory: float = 24.0
    """GiB of the GPU, as PyTorch sees them: about 23.5 of an RTX 3090 or 4090."""
    run: Path | None = None
    """Folder of a run: plan its settings, and show what it measured beside the plan."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and by what takes them."""

    phases: dict[str, dict[str, float]]
    responses: float
    """Responses of full length that the engine's key-value cache holds at once."""
    cpu: dict[str, float] = field(default_factory=dict)
    """What waits in CPU memory."""

    def peak(self, *phases: str) -> float:
        return max(sum(self.phases[phase].values()) for phase in phases or self.phases)


def plan_memory(config: Config, card: float) -> MemoryPlan:
    """Work out what every phase of a step takes of a GPU with `card` bytes."""
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    policy, tokens = unloaded_policy(config, model_shape(config)), config.max_prompt_tokens + config.longest_response
    weights, state = weight_bytes(policy, config), optimizer_bytes(policy, config)
    unpaged: Any = config.optimizer.removeprefix("paged_")
    paged = optimizer_bytes(policy, replace(config, optimizer=unpaged)) - state
    gradients = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    held = {"policy": weights, "optimizer": float(state), "CUDA": CUDA_CONTEXT}

    kept, logprobs, backward, block_inputs = update_bytes(policy, config, tokens)
    weight_sync, rollout, responses, asleep = engine_bytes(policy, config, held, card)
    always = {**held, "gradients": float(gradients), "activations kept": kept}
    recomputed = "block recomputed" if config.gradient_checkpointing else "backward"
    phases = {
        "weight sync": weight_sync,
        "rollout": rollout,
        "log-probs": {**always, "log-prob chunk": logprobs - kept},
        "backward": {**always, recomputed: backward - kept},
        "optimizer step": {**always, "activations kept": 0.0},
    }
    cpu = {"policy": weights * config.offload_policy, "activations": block_inputs * config.offload_activations,
           "optimizer": float(paged), "engine weights": asleep}  # fmt: skip
    return MemoryPlan({phase: without_zeros(parts) for phase, parts in phases.items()}, responses, without_zeros(cpu))


def pinned_bytes(size: float) -> int:
    """Return what a tensor of this size takes of pinned CPU memory: PyTorch rounds up to a power of two."""
    return 2 ** math.ceil(math.log2(size))


def without_zeros(parts: Mapping[str, float]) -> dict[str, float]:
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
    """Return what forward keeps, the peaks of log-probs and backward pass, and the CPU memory for all blocks' inputs.

    Not estimated by formulas but found by a dry run of the update's own code. `longest`: a prompt and its response.
    """
    row = max(longest, min(config.row_limit("cuda"), longest * config.prompts_per_step * config.group_size))
    same = replace(config, quantize_base=False, offload_activations=False, offload_policy=False, attention="sdpa",
                   optimizer="adamw", lr=1.0, stages=("1:1:1",), rollouts_per_batch=1, tokens_per_micro_batch=1,
                   max_prompt_tokens=1, data="", preset="")  # in these a dry run would not differ
    one, two = (dry_run(same, layers, row) for layers in (1, 2))
    layers: int = causal_lm(policy).config.get_text_config().num_hidden_layers
    more = 0 if config.offload_activations else layers - 1
    kept, logprobs, backward = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    if config.quantize_base:  # one matrix at a time is made 16-bit again
        backward += max(w.numel() * w.element_size() for w in frozen_linear(policy))
    return kept, logprobs, backward, layers * pinned_bytes(two[0] - one[0])


def engine_bytes(
    policy: torch.nn.Module, config: Config, held: dict[str, float], card: float
) -> tuple[dict[str, float], dict[str, float], float, float]:
    """Return what weight sync and rollout take, how many full responses the cache holds, and what sleeps on the CPU."""
    compute = getattr(torch, config.dtype)
    whole_model = [p for p in policy.parameters() if config.lora_rank == 0 or not p.requires_grad]
    weights = float(sum(p.numel() for p in whole_model) * compute.itemsize)
    longest = config.max_prompt_tokens + config.longest_response
    response = kv_bytes_per_token(causal_lm(policy).config, compute) * (longest + KV_BLOCK)
    cache = float(response * config.rollouts_per_batch)
    if config.engine == "hf":  # the policy itself; while it decodes, autocast keeps 16-bit copies of float32 weights
        copies = weights if whole_model[0].dtype != compute else 0.0
        return held, {**held, "engine weights": copies, "key-value cache": cache}, cache / response, 0.0
    engine = {**held, "engine weights": weights}
    rollout = {**engine, "CUDA": CUDA_CONTEXT + max(ENGINE_SHARE * card, ENGINE_LEAST)}
    rollout["policy"] *= not config.offload_policy
    cache = max(response, min(card - sum(rollout.values()), cache))
    if config.lora_rank == 0 or config.quantize_base:  # vLLM makes a layer anew before it takes the weights
        engine["layer twice"] = float(max(p.numel() for p in whole_model) * compute.itemsize)
    # under adapters vLLM keeps the base, in pinned memory; without them the weights come anew at each step
    asleep = float(sum(pinned_bytes(p.numel() * compute.itemsize) for p in whole_model)) * (config.lora_rank > 0)
    return engine, {**rollout, "key-value cache": cache}, cache / response, asleep


def unloaded_policy(config: Config, shape: PretrainedConfig) -> torch.nn.Module:
    """Make the policy on the meta device: every shape and type, no memory."""
    dtype = getattr(torch, config.dtype) if config.lora_rank > 0 else torch.float32
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
    policy, live = unloaded_policy(config, shape), LiveMemory()
    few = min(tokens, 2 * config.logprob_chunk_tokens + 1)  # all chunks are alike too
    rollout = Rollout("", [0] * (tokens - few + 1), [0] * few, [0.0] * few, "", "length", advantage=1.0)
    (row,) = pack([(rollout, 1.0)], tokens)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_weights(policy)
        for parameter in policy.train().parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            live.ignore(parameter, parameter.grad)
        phases: list[tuple[int, int]] = []  # what is alive at the end of each, and the peak
        causal_lm(policy).base_model.register_forward_hook(lambda *_: phases.append(live.end_phase()))
        try:
            with live:
                loss = forward_row(policy, row, 1.0, config)[0]
                phases.append(live.end_phase())
                loss.backward()
                phases.append(live.end_phase())
        except RuntimeError as error:
            raise UserError(f"model is {config.model}: its memory cannot be planned, as its code looks at values, not "
                            f"only shapes ({type(error).__name__})") from error
    (kept, forward), (_, logprobs), (_, backward) = phases
    states = (tokens - few) * text.hidden_size * getattr(torch, config.dtype).itemsize  # of the other chunks
    return kept, logprobs + 2 * states, max(forward, backward)  # twice: their gradients too


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
    """Count the bytes of all tensors that operations make, while they live, and the most there were: `peak`.

    Why not PyTorch's MemTracker: it is private, and ends in an error where weights are frozen, as under LoRA.
    """

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

    def end_phase(self) -> tuple[int, int]:
        """Return what is alive and the peak since the last phase."""
        peak, self.peak = self.peak, self.bytes
        return self.bytes, peak

    def ignore(self, *tensors: torch.Tensor | None) -> None:
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}


def model_shape(config: Config) -> PretrainedConfig:
    """Return the configuration of the model, which has its shape."""
    if config.model in KNOWN_SHAPES:
        return KNOWN_SHAPES[config.model]
    base = base_model(config.model)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model is {config.model}: no config.json of it can be read; give a folder or a hub name like "
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
        ({"optimizer": "paged_adamw"}, "copies to and from CPU memory, once a step"),
        ({"optimizer": "adamw8bit"}, "a coarser optimizer state"),
    ]
    if config.engine == "hf":
        changes.insert(0, ({"rollouts_per_batch": 16}, "slower, and other responses are drawn"))
    if config.lora_rank == 0:
        changes.append(({"lora_rank": 32, "lr": 1e-5}, "only adapters learn"))
    changes.append(({"quantize_base": True}, "a base of 4-bit weights"))
    return changes


def changed(config: Config, changes: Sequence[Change]) -> Config:
    return replace(config, **{name: value for change, _ in changes for name, value in change.items()})


PeakWith = Callable[[Sequence[Change]], float]
"""Bytes at the highest point of a configuration with some changes."""


def cheapest_changes(config: Config, peak_with: PeakWith, card: float) -> list[Change]:
    """Return the cheapest change that makes a configuration fit; if none does alone, several that all are needed."""
    taken: list[Change] = []
    for change in changes_by_price(config):
        if peak_with([change]) <= card:
            return [change]
        if peak_with([*taken, change]) < peak_with(taken):
            taken.append(change)
        if peak_with(taken) <= card:
            break
    return without_needless(taken, peak_with, card)


def without_needless(changes: Sequence[Change], peak_with: PeakWith, card: float) -> list[Change]:
    """Leave out, the dearest first, what a configuration fits without."""
    needed = list(changes)
    for change in reversed(changes):
        rest = [other for other in needed if other is not change]
        if peak_with(rest) <= card:
            needed = rest
    return needed


def run_plan(options: PlanOptions, config: Config) -> None:
    """Print the plan and, if it does not fit, what would."""
    if not 0 < options.gpu_memory < math.inf:
        raise UserError(f"gpu_memory is {options.gpu_memory}: give GiB above 0")
    card = options.gpu_memory * GIB

    @functools.cache
    def plan(config: Config) -> MemoryPlan:
        return plan_memory(config, card)

    def peak_with(changes: Sequence[Change]) -> float:
        try:
            return plan(changed(config, changes)).peak()
        except ValueError:  # one change needs another
            return math.inf

    def summary(config: Config) -> str:
        full = plan(config).peak("rollout") <= card  # by a cache that takes what is left
        worst = max((phase for phase in plan(config).phases if phase != "rollout" or not full), key=plan(config).peak)
        return (f"{worst} takes {plan(config).peak(worst) / GIB:.1f} of {options.gpu_memory:g} GiB; the cache holds "
                f"{plan(config).responses:.1f} responses of full length at once")

    plan(config)  # what is wrong is said before anything is shown
    print(f"{config.model}, responses of up to {config.longest_response:,} tokens, engine "
          f"{'hf' if config.engine == 'hf' else 'vllm'}; GiB of a GPU with {options.gpu_memory:g}:\n")
    show_plan(plan(config), card, measured_memory(options.run) if options.run else {})
    fits = plan(config).peak() <= card
    print(f"\n{'fits' if fits else 'does not fit'}: {summary(config)}")
    if fits:
        return
    changes = fitting = cheapest_changes(config, peak_with, card)
    length = config.longest_response
    while peak_with(fitting) > card:
        length //= 2
        if length < 128:
            print("nothing that is known here makes it fit: take a smaller model or a larger GPU")
            return
        row = min(config.row_limit("cuda"), length + config.max_prompt_tokens)
        fitting = [*changes, ({"max_response_tokens": length, "tokens_per_micro_batch": row}, "shorter responses")]
    fitting = without_needless(fitting, peak_with, card)
    print(f"the cheapest change that fits: {summary(changed(config, fitting))}")
    for settings, price in fitting:
        print(f"  {options_text(settings)}    ({price})")


def options_text(settings: Mapping[str, Any]) -> str:
    """Write settings as they are given on the command line."""
    return " ".join(f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
                    for name, value in settings.items())


def measured_memory(run: Path) -> dict[str, float]:
    """Return the most bytes that any step of a run measured, by the phase of the plan in which they are highest."""
    steps = list(data.read_lines(run / "metrics.jsonl"))
    names = {"rollout": "memory/rollout_gib", "backward": "memory/update_gib"}
    return {phase: GIB * max(step[name] for step in steps) for phase, name in names.items() if steps}


def show_plan(plan: MemoryPlan, card: float, measured: Mapping[str, float]) -> None:
    """Draw a bar for each phase, as long as the share of the card that it takes."""
    width = 48
    for phase, parts in plan.phases.items():
        bar, total = "", 0.0
        for what, size in parts.items():
            total += size
            bar += PLAN_LETTERS[what] * (round(width * total / card) - len(bar))
        found = f" ({measured[phase] / GIB:.1f} measured)" if phase in measured else ""
        legend = "  ".join(f"{PLAN_LETTERS[what]} {what} {size / GIB:.1f}" for what, size in parts.items())
        end = ">" if total > card else "|"
        print(f"{phase:14} {bar[:width].ljust(width, '.')}{end} {total / GIB:5.1f}{found}  {legend}")
    if plan.cpu:
        print("in CPU memory  " + ", ".join(f"{what} {size / GIB:.1f}" for what, size in plan.cpu.items()))


PLAN_LETTERS = {"policy": "P", "optimizer": "O", "gradients": "G", "CUDA": "C", "activations kept": "A",
                "log-prob chunk": "L", "block recomputed": "B", "backward": "B", "engine weights": "E",
                "layer twice": "T", "key-value cache": "K"}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    options, others = tyro.cli(PlanOptions, args=arguments, prog="tools/plan.py", description=__doc__,
                               return_unknown_args=True)
    before = ["--resume", str(options.run)] if options.run else ["--data", "unread"]  # the plan needs no problems
    run_plan(options, read_config([*before, *others]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
