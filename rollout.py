"""Rollouts: the engine that generates responses, and what is done with it: groups, evaluation, temperature probes.

An engine has the same few methods whatever it runs on: `wake` takes the policy's weights, `generate` turns prompts into
responses with the log-prob of every sampled token at the sampling temperature, `sleep` leaves the memory to the update.
`HFEngine` is the policy itself, decoded with a key-value cache by plain PyTorch: it runs on any device and needs no
second copy of the weights. `VLLMEngine` is vLLM in this process: paged attention, continuous batching, CUDA graphs.

Left out: servers and engines on other machines (weights go over within one process), and responses that outlive a
step (the policy that learns from a response is the one that wrote it).
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache, GenerationConfig,
    PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase,
)

import data
from polaris_mini import Common, Group, Problem, Rollout, mean_and_interval, mean_distinct_n, pass_at_k
from reward import Grade, RewardPool, check_answer

# -------------------------------------------------------------- models from disk or hub


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message names the cause and the fix."""


class EngineError(ModelError):
    """An engine that failed while it generated. The policy is as it was before the step."""


class OutOfMemory(EngineError):
    """An engine for which there was no memory. It has lowered its `rollouts_per_batch`: it can be asked again."""


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether it is PyTorch's on a GPU, CUDA's, a library's of it, or PyTorch's on a CPU."""
    return re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error), re.IGNORECASE) is not None


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises: ModelError if there is none, or if it has no end-of-sequence token.
    """
    _check_folder(name, ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"), "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model is {name}: its tokenizer does not load: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model is {name}: its tokenizer has no eos_token, so no response could end; set one")
    return tokenizer


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False,
    allow_pickled_weights: bool = False, rope: Mapping[str, Any] | None = None, four_bits: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub, with other rope settings (see `yarn_config`) if given.

    four_bits: keep the linear layers in NF4, except the head.

    Raises: ModelError if the folder has no weights or the model cannot be loaded.
    """
    _check_weights(name, allow_pickled_weights)
    base = base_model(name)
    try:
        settings = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        if rope is not None:
            text = settings.get_text_config()
            text.rope_parameters = {**text.rope_parameters, **rope}
            text.max_position_embeddings = round(rope["factor"] * rope["original_max_position_embeddings"])
        model = AutoModelForCausalLM.from_pretrained(
            base, config=settings, dtype=dtype, trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickled_weights else True,
            attn_implementation="sdpa", **(quantized(dtype, device) if four_bits else {}),
        )
        if base != name:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name).merge_and_unload()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    return model if four_bits else model.to(device)  # type: ignore[arg-type]


def _not_loaded(name: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(f"model is {name}: it brings code of its own; read it, then give --trust-remote-code")
    return ModelError(f"model is {name}: it does not load: {_first_line(error)}")


def quantized(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what loads a model in NF4 with quantized scales. Source: QLoRA (arXiv 2305.14314)."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": device}}


def base_model(name: str) -> str:
    """Return the model that the LoRA adapter of this name belongs to; any other model as it is."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else name


def _check_weights(name: str, allow_pickled: bool) -> None:
    folder = Path(name).expanduser()
    safe, pickled = (any((folder / file).is_file() for file in files) for files in (WEIGHTS, PICKLED))
    if pickled and not (safe or allow_pickled):
        raise ModelError(f"model is {name}: its weights are pickled, which can run code as they are loaded: give "
                         "--allow-pickled-weights if you trust who made them")
    _check_folder(name, (*WEIGHTS, *PICKLED), "weights")


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


def _check_folder(name: str, any_of: Sequence[str], what: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in any_of):
            raise ModelError(f"model is {name}: the folder has no {what} (none of {', '.join(any_of)})")
    elif folder.is_file() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"model is {name}: no such folder; give a folder or a hub name like Qwen/Qwen3-1.7B")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def causal_lm(policy: torch.nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a policy, LoRA layers in place."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[return-value, operator]


def rank_count() -> int:
    """Return how many processes train together, one per GPU."""
    return dist.get_world_size() if dist.is_initialized() else 1


def torchrun_count() -> int:
    """Return how many processes torchrun has started, whether or not they have joined; without it 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_torchrun(command: str) -> None:
    if torchrun_count() > 1:
        raise ModelError(f"torchrun started {torchrun_count()} processes: {command} runs on one GPU; start it with "
                         "python")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor in one piece, for which all ranks have to ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(policy: torch.nn.Module) -> bool:
    """Tell whether each rank holds a part of the weights only."""
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device is {name}: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device is {name}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device is {name}: PyTorch sees no CUDA device here; use --device cpu")
    return device


def resolve_dtype(settings: Common, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> contextlib.AbstractContextManager:
    """Compute in `dtype` whatever the weights are stored in; nothing at all for float32 and float64."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype, cache_enabled=cache)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------- the engine


@dataclass(slots=True)
class Response:
    """One response as an engine returns it."""

    tokens: list[int]
    sampler_logprobs: list[float]
    """(T,) nats, of each token, at the sampling temperature."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. top_p and top_k are for evaluation; training samples from the whole distribution."""

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0


class Engine(Protocol):
    """What training and evaluation ask of an engine."""

    @property
    def rollouts_per_batch(self) -> int:
        """Responses side by side: the setting, or fewer since memory has run out."""

    def wake(self, policy: torch.nn.Module) -> None:
        """Get ready to generate with the policy's current weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, list[Response]]]:
        """Yield each prompt's number with its `count` responses, as they finish; report new tokens to `on_tokens`."""

    def sleep(self) -> None:
        """Leave the device's memory to the update."""

    def close(self) -> None:
        """End the engine for good."""


class HFEngine:
    """Generate with the policy itself: a batched decode loop with a key-value cache, on any device.

    Why not `model.generate`: it hands out log-probs only as whole (V,) rows, which for a vocabulary of 150,000 fill
    the memory, and goes on computing responses that have ended. Here ended responses leave the batch.
    """

    def __init__(
        self, policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Common
    ) -> None:
        self.policy = policy
        self.rollouts_per_batch = settings.rollouts_per_batch
        model = causal_lm(policy)
        self.device = model.device
        self.dtype = resolve_dtype(settings, self.device)
        self.stop_tokens = torch.tensor(stop_tokens(tokenizer, model.generation_config), device=self.device)

    def wake(self, policy: torch.nn.Module) -> None:
        """Read the policy's weights where they are; if they are sharded, copy them into the engine's own model."""
        if is_sharded(policy):
            own = self.policy.state_dict()
            for name, weight in policy_weights(policy, self.dtype):
                own[name].copy_(weight)
        else:
            self.policy = policy

    def sleep(self) -> None:
        """Nothing to free: the cache lives as long as a batch."""

    def close(self) -> None:
        """Nothing to end."""

    def generate(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, list[Response]]]:
        """Yield each prompt's number with its responses. The same seed and prompts give the same responses."""
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours need little padding
        rows = [i for i in by_length for _ in range(count)]
        responses: dict[int, list[Response]] = {i: [] for i in by_length}
        for start in range(0, len(rows), self.rollouts_per_batch):
            batch = rows[start : start + self.rollouts_per_batch]
            with (_fewer_at_once(self), torch.inference_mode(), autocast(self.device, self.dtype),
                  _decoding(self.policy)):  # fmt: skip
                drawn = self._decode([prompts[i] for i in batch], sampling, generator, on_tokens)
            for i, response in zip(batch, drawn, strict=True):
                responses[i].append(response)
            for i in dict.fromkeys(batch):
                if len(responses[i]) == count:
                    yield i, responses[i]

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator,
        on_tokens: Callable[[int], None] | None,
    ) -> list[Response]:
        model = causal_lm(self.policy)
        head = model.get_output_embeddings()
        longest = max(map(len, prompts))
        # B rows, padded on the left so that every row's next token is in the last column; rows leave as they end
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=self.device)  # (B, L)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = torch.arange(longest, device=self.device) >= longest - lengths[:, None]  # (B, L) bool
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        responses = [Response([], [], "length") for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
        for _ in range(sampling.max_tokens):
            hidden = model.base_model(
                input_ids=tokens, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]  # (B, H)
            logprobs = torch.log_softmax(head(hidden).float() / sampling.temperature, dim=-1)  # (B, V)
            tokens = torch.multinomial(_truncate(logprobs, sampling).exp(), 1, generator=generator)  # (B, 1)
            chosen = logprobs.gather(1, tokens)[:, 0].tolist()
            ended = torch.isin(tokens[:, 0], self.stop_tokens).tolist()
            grown = 0
            for row, token, logprob, end in zip(rows, tokens[:, 0].tolist(), chosen, ended, strict=True):
                response = responses[row]
                if response.finish_reason == "length":  # not ended before
                    response.tokens.append(token)
                    response.sampler_logprobs.append(logprob)
                    response.finish_reason = "stop" if end else "length"
                    grown += 1
            if on_tokens is not None:
                on_tokens(grown)
            running = [i for i, row in enumerate(rows) if responses[row].finish_reason == "length"]
            if not running:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(running) <= 0.75 * len(rows):  # copying the cache costs: drop ended rows a quarter at a time
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                rows = [rows[i] for i in running]
        return responses


@contextlib.contextmanager
def _decoding(policy: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and to attention over a cache; training's packed attention comes back after."""
    model = causal_lm(policy)
    was_training, attention = policy.training, model.config._attn_implementation
    policy.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        policy.train(was_training)


def _truncate(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set tokens outside top-k and top-p to -inf; `multinomial` renormalises the rest."""
    if sampling.top_k > 0:
        limit = logprobs.topk(min(sampling.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < limit, -math.inf)
    if sampling.top_p < 1.0:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p still counts
        logprobs = logprobs.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logprobs


def stop_tokens(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> list[int]:
    """Return the tokens that end a response: the tokenizer's, and those that the model's generation settings list."""
    listed = settings.eos_token_id if settings is not None else None
    return sorted({tokenizer.eos_token_id, *([listed] if isinstance(listed, int) else listed or [])})


class VLLMEngine:
    """Generate with vLLM in this very process, on the policy's own device: paged attention, continuous batching.

    On a GPU the two take turns with the memory: asleep, the engine holds neither weights nor a key-value cache, and
    waking it brings the policy's weights over, tensor by tensor, before the cache is made. So policy, engine, cache and
    the update's activations are never there together. On a CPU, where vLLM cannot sleep, it only takes the weights.
    """

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, settings: Common, *, max_tokens: int,
        rope: Mapping[str, Any] | None = None, weights: Literal["disk", "policy"] = "disk", reserved_bytes: int = 0,
        offload: torch.nn.Module | None = None,
    ) -> None:
        """Start vLLM.

        max_tokens: of the longest prompt with its response. weights: disk, or policy: each `wake` brings them, and in
        between the engine sleeps. reserved_bytes: device memory that others will take and the cache must leave.
        offload: the policy, if it is to be in CPU memory while the engine is awake.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, not in one beside
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", module="vllm|torch.jit")  # of what they will change in themselves
        from vllm import LLM

        device = resolve_device(settings.device)
        if device.index:
            raise ModelError(f"device is {settings.device}: vllm takes the first GPU that it sees; start with "
                             f"CUDA_VISIBLE_DEVICES={device.index} and without --device, or take --engine hf")
        dtype = resolve_dtype(settings, device)
        if weights == "disk":
            _check_weights(model, settings.allow_pickled_weights)
        on_disk = "auto" if settings.allow_pickled_weights else "safetensors"
        self.sleeps, self.dtype = device.type == "cuda" and weights == "policy", dtype
        config = AutoConfig.from_pretrained(model, trust_remote_code=settings.trust_remote_code)
        text = config.get_text_config()
        # As in the release, responses may be longer than the positions that the model's config names.
        overrides: dict[str, Any] = {"max_position_embeddings": max(max_tokens, text.max_position_embeddings)}
        if rope is not None:
            overrides["rope_parameters"] = {**text.rope_parameters, **rope}
        self.offload, self.device = offload if self.sleeps else None, device
        self._move_policy(torch.device("cpu"))
        cache_bytes = kv_cache_bytes(config, settings, max_tokens, reserved_bytes)
        self.time_limit = settings.engine_timeout
        self.on_hang: Callable[[], None] = lambda: None
        self.rollouts_per_batch = settings.rollouts_per_batch
        try:
            self.llm = LLM(
                model=model, dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                seed=settings.seed, hf_overrides=overrides,
                load_format="dummy" if weights == "policy" else on_disk, trust_remote_code=settings.trust_remote_code,
                max_model_len=max_tokens, max_num_seqs=settings.rollouts_per_batch, kv_cache_memory_bytes=cache_bytes,
                logprobs_mode="processed_logprobs",  # at the temperature; the default's are at 1
                gpu_memory_utilization=0.01,  # what vLLM insists on finding free; the cache's size is given
                skip_tokenizer_init=True,  # tokens in, tokens out
                enable_sleep_mode=self.sleeps, enforce_eager=device.type != "cuda",
                distributed_executor_backend="external_launcher" if rank_count() > 1 else None,  # one engine per rank
            )
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise ModelError(f"engine is vllm: it does not start with model {model} ({_first_line(error)}): lower "
                             "--max-response-tokens or --rollouts-per-batch if memory is short, or take --engine hf"
                             ) from error
        try:
            generation = GenerationConfig.from_pretrained(model)
        except OSError:  # the folder has none
            generation = None
        self.stop_tokens = stop_tokens(tokenizer, generation)
        self.sleep()

    def wake(self, policy: torch.nn.Module) -> None:
        """Take the policy's weights over, then make the key-value cache."""
        with _engine_errors("took the weights over"):
            if self.sleeps:
                torch.cuda.empty_cache()  # what the update has freed, PyTorch has kept
                self.llm.wake_up(tags=["weights"])
            weights = policy_weights(policy, self.dtype)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.reset_prefix_cache()  # it was computed with the old weights
            self._move_policy(torch.device("cpu"))
            if self.sleeps:
                self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Free weights and cache; neither is kept, as the next `wake` brings all weights again."""
        if self.sleeps:
            self.llm.sleep(level=2)
        self._move_policy(self.device)

    def _move_policy(self, device: torch.device) -> None:
        if self.offload is not None:
            for parameter in self.offload.parameters():
                parameter.data = parameter.data.to(device)
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End vLLM and free what it holds, so that another engine can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def generate(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, list[Response]]]:
        """Yield each prompt's number with its responses, those that finish first first."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine: Any = self.llm.llm_engine
        torch.manual_seed(sampling.seed)  # all requests draw from it: a generator for each would be slow
        engine.engine_core.engine_core.scheduler.max_num_active_reqs = self.rollouts_per_batch
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, SamplingParams(
                n=count, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=sampling.max_tokens, stop_token_ids=self.stop_tokens, logprobs=0, flat_logprobs=True,
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            ))  # fmt: skip
        finished = reported = 0
        try:
            with _engine_errors("generated"), _fewer_at_once(self), self._watched() as alive:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if failed := {o.finish_reason for o in output.outputs} - {"stop", "length"}:
                            raise EngineError(f"engine is vllm: a response ended by {failed.pop()}; take --engine hf")
                        responses = [Response(list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason)
                                     for o in output.outputs]
                        finished += sum(len(response.tokens) for response in responses)
                        yield int(output.request_id), responses
                    running = engine.output_processor.request_states.values()
                    tokens = finished + sum(state.detokenizer.num_output_tokens() for state in running)
                    if tokens != reported:  # fewer when a response waits for the rest of its group
                        alive()
                    if on_tokens is not None:
                        on_tokens(tokens - reported)
                    reported = tokens
        finally:
            engine.abort_request([str(i) for i in range(len(prompts))])  # what Ctrl-C has left

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Callable[[], None]]:
        """End the process if what is yielded is not called for `time_limit` seconds: a hang cannot be interrupted."""
        done, last = threading.Event(), time.monotonic()

        def alive() -> None:
            nonlocal last
            last = time.monotonic()

        def watch() -> None:
            while not done.wait(self.time_limit / 10):
                if time.monotonic() - last > self.time_limit:
                    print(f"error: engine is vllm: no new token for {self.time_limit:g} s, it hangs: raise "
                          "--engine-timeout if that is too short, or take --engine hf", file=sys.stderr, flush=True)
                    saving = threading.Thread(target=self.on_hang, daemon=True)
                    saving.start()
                    saving.join(60)  # the device may hang too
                    os._exit(2)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield alive
        finally:
            done.set()


@contextlib.contextmanager
def _fewer_at_once(engine: HFEngine | VLLMEngine) -> Iterator[None]:
    """Where memory runs out, halve the responses side by side, for the one who asks again."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if engine.rollouts_per_batch == 1:
            raise EngineError("memory runs out while a single response is generated: lower --max-response-tokens, or "
                              "ask python tools/plan.py what fits") from error
        engine.rollouts_per_batch //= 2
        raise OutOfMemory(f"memory ran out, now {engine.rollouts_per_batch} responses side by side") from error


@contextlib.contextmanager
def _engine_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # out of memory is one, a dead engine another
        raise EngineError(f"engine is vllm: it failed while it {doing} ({_first_line(error)}): lower "
                          "--rollouts-per-batch if memory is short, or take --engine hf") from error


def uses_vllm(settings: Common) -> bool:
    """Tell whether responses come from vLLM: on a GPU if it is installed, unless the engine is named."""
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise ModelError("engine is vllm: it is not installed; see the README, or take --engine hf")
    auto = settings.engine == "auto" and installed and resolve_device(settings.device).type == "cuda"
    return settings.engine == "vllm" or auto


def policy_weights(policy: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a policy's weights under their names in a checkpoint, tied ones too, each with its LoRA merged in.

    Sharded ones come whole, so all ranks have to ask for them.
    """
    model = causal_lm(policy)
    for name, weight in model.state_dict().items():
        if ".lora_" in name or ".base_layer.weight." in name:  # an adapter's own, the scales of a 4-bit weight
            continue
        if name.endswith(".base_layer.weight"):
            from peft.utils.integrations import dequantize_module_weight  # slow to import, and only LoRA needs it

            adapted = model.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = dequantize_module_weight(adapted.base_layer).float()  # type: ignore[arg-type]
            weight = weight + adapted.get_delta_weight("default").detach().float()  # type: ignore[operator]
        yield name.replace(".base_layer.", "."), whole(weight).to(dtype)


ENGINE_SHARE = 0.1
"""Of a GPU's memory, for vLLM's activations, CUDA graphs and what else there is."""
KV_BLOCK = 128
"""Tokens; vLLM rounds each sequence up to its block, which is no larger."""


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize


def kv_cache_bytes(config: PretrainedConfig, settings: Common, max_tokens: int, reserved_bytes: int = 0) -> int:
    """Give vLLM's key-value cache what all sequences need at their longest, at most what the device has left.

    Raises: ModelError if not even one response fits.
    """
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings, device)
    per_token = kv_bytes_per_token(config, dtype)
    if device.type == "cuda":
        with torch.device("meta"):  # no memory: only to count
            weights = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            ).num_parameters() * dtype.itemsize
        free, total = torch.cuda.mem_get_info(device)
        left = free - weights - reserved_bytes - ENGINE_SHARE * total
    else:
        left = 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if left < per_token * (max_tokens + KV_BLOCK):
        raise ModelError(
            f"engine is vllm: the key-value cache of one response of {max_tokens} tokens with its prompt takes "
            f"{per_token * max_tokens / 2**30:.1f} GiB, {max(0.0, left) / 2**30:.1f} are left: at most "
            f"{max(0, int(left / per_token) - KV_BLOCK)} tokens fit; lower --max-response-tokens")
    return int(min(left, per_token * (max_tokens + KV_BLOCK) * settings.rollouts_per_batch))


# ---------------------------------------------------------------- groups and their grades


def sample_groups(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, pool: RewardPool, problems: Sequence[Problem], group_size: int,
    sampling: Sampling, on_tokens: Callable[[int], None] | None = None, kept_in: Path | None = None,
) -> tuple[list[Group], list[Grading]]:
    """Draw `group_size` rollouts of every problem. Each group's grading begins when it is finished, beside the others'.

    kept_in: see `generate_once`. Returns the groups in the order of the problems, and what `set_rewards` waits for.
    """
    groups: dict[int, Group] = {}
    gradings = []
    prompts = [problem.prompt_tokens for problem in problems]
    with contextlib.closing(generate_once(engine, prompts, group_size, sampling, on_tokens, kept_in)) as finished:
        for i, responses in finished:
            problem = problems[i]
            groups[i] = Group(problem, [_rollout(problem, response, tokenizer) for response in responses])
            for rollout in groups[i].rollouts:
                gradings.append((rollout, pool.submit((rollout.text, problem.answers, rollout.truncated), problem)))
    return [groups[i] for i in range(len(problems))], gradings


def generate_once(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling,
    on_tokens: Callable[[int], None] | None, kept_in: Path | None,
) -> Generator[tuple[int, list[Response]]]:
    """Yield what the engine generates, and keep it in a folder, from where it comes when the same is asked again.

    Where memory runs out it is asked for what is missing, see `OutOfMemory`.
    """
    asked = json.dumps([prompts, count, asdict(sampling)])
    path = kept_in and kept_in / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    if path and path.exists():
        with contextlib.suppress(ValueError):  # damaged on the disk: generate it again
            known = json.loads(path.read_bytes())
            yield from ((i, [Response(*values) for values in kept]) for i, kept in known)
            return
    drawn: list[tuple[int, list[Any]]] = []
    left = list(range(len(prompts)))
    while left:
        numbers = left.copy()
        try:
            with contextlib.closing(engine.generate([prompts[i] for i in left], count, sampling, on_tokens)) as done:
                for number, responses in done:
                    i = numbers[number]
                    drawn.append((i, [(r.tokens, r.sampler_logprobs, r.finish_reason) for r in responses]))
                    yield i, responses
                    left.remove(i)
        except OutOfMemory:  # ask for the others again, fewer of which are then generated side by side
            pass
    if path:
        data.write_whole(path, json.dumps(drawn))


def _rollout(problem: Problem, response: Response, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    spoken = response.tokens[:-1] if response.finish_reason == "stop" else response.tokens  # without the stop token
    return Rollout(
        problem_id=problem.id,
        prompt_tokens=problem.prompt_tokens,
        response_tokens=response.tokens,
        sampler_logprobs=response.sampler_logprobs,
        text=tokenizer.decode(spoken, skip_special_tokens=False),  # type: ignore[arg-type]
        finish_reason=response.finish_reason,
    )


Grading = tuple[Rollout, "Future[Grade]"]


def set_rewards(gradings: Sequence[Grading]) -> None:
    """Set reward and reason of every rollout, once they are known."""
    for rollout, grading in gradings:
        grade = grading.result()
        rollout.reward, rollout.reason = grade.reward, grade.reason


def load_problems(settings: Common, source: str) -> list[Problem]:
    """Load problems whose answers can be graded; a reward of one's own reads them itself."""
    check = (lambda answers: None) if settings.reward else check_answer
    return data.load_problems(source, check_answers=check, skip_bad_rows=settings.skip_bad_rows, seed=settings.seed)


def encode_prompts(
    settings: Common, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase
) -> list[Problem]:
    """Return the problems with their prompt_tokens."""
    examples = data.load_worked_examples(settings.prompt_examples) if settings.prompt_examples else []
    return data.encode_prompts(
        problems, tokenizer, suffix=settings.prompt_suffix, examples=examples,
        max_prompt_tokens=settings.max_prompt_tokens, skip_bad_rows=settings.skip_bad_rows,
    )


def reward_pool(settings: Common, tokenizer: PreTrainedTokenizerBase) -> RewardPool:
    return RewardPool(workers=settings.reward_workers, timeout=settings.reward_timeout, function=settings.reward,
                      require_think=settings.require_think and data.thinks(tokenizer))


# -------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Outcome:
    """What is kept of one rollout when nothing is trained."""

    reward: float
    reason: str
    tokens: int
    truncated: bool
    text: str

    @property
    def correct(self) -> bool:
        return self.reward >= 1.0


@dataclass(frozen=True)
class Measured:
    """A problem with the outcomes of its rollouts, and all settings that decided about them."""

    id: str
    problem: str
    answers: tuple[str, ...]
    system: str | None
    pass_rate: float
    outcomes: tuple[Outcome, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, group: Group, settings: dict[str, Any] | None = None, keep_text: bool = True) -> Measured:
        outcomes = tuple(
            Outcome(r.reward, r.reason, len(r.response_tokens), r.truncated, r.text if keep_text else "")
            for r in group.rollouts
        )
        problem = group.problem
        return cls(problem.id, problem.text, problem.answers, problem.system, group.pass_rate, outcomes, settings or {})


@dataclass(frozen=True)
class Evaluation:
    """How good a policy is on a set of problems."""

    problems: int
    k: int
    avg_at_k: float
    interval: float
    """Half width of the 95 % interval of avg_at_k, over problems."""
    pass_at_k: list[float]
    """(k,) unbiased pass@1 ... pass@k."""
    tokens_mean: float
    truncated: float
    distinct_4: float

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> Evaluation:
        outcomes = [outcome for problem in measured for outcome in problem.outcomes]
        k = len(measured[0].outcomes)
        correct = [sum(outcome.correct for outcome in problem.outcomes) for problem in measured]
        average, interval = mean_and_interval([problem.pass_rate for problem in measured])
        return cls(
            problems=len(measured),
            k=k,
            avg_at_k=average,
            interval=interval,
            pass_at_k=[statistics.fmean(pass_at_k(c, k, tries) for c in correct) for tries in range(1, k + 1)],
            tokens_mean=statistics.fmean(outcome.tokens for outcome in outcomes),
            truncated=statistics.fmean(outcome.truncated for outcome in outcomes),
            distinct_4=mean_distinct_n([[o.text for o in problem.outcomes] for problem in measured]),
        )


def evaluate(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, pool: RewardPool, problems: Sequence[Problem], k: int,
    sampling: Sampling, on_tokens: Callable[[int], None] | None = None, kept_in: Path | None = None,
) -> list[Measured]:
    """Sample and grade k rollouts per problem."""
    groups, gradings = sample_groups(engine, tokenizer, pool, problems, k, sampling, on_tokens, kept_in)
    set_rewards(gradings)
    return [Measured.of(group) for group in groups]


# --------------------------------------------------------------------- temperature probe


@dataclass(frozen=True)
class ProbeCurves:
    """What a probe found: temperature -> value."""

    accuracy: dict[float, float]
    noise: dict[float, float]
    """Standard error of the difference to the best accuracy, paired by problem."""
    distinct_4: dict[float, float]
    distinct_4_fixed: dict[float, float]
    """Of the first `words` words only, over problems whose responses are all as long; nan if there are none."""

    @classmethod
    def of(cls, measured: Mapping[float, Sequence[Measured]], words: int) -> ProbeCurves:
        accuracy = {t: statistics.fmean(m.pass_rate for m in found) for t, found in measured.items()}
        best = measured[max(accuracy, key=accuracy.__getitem__)]
        noise, diversity, fixed = {}, {}, {}
        for t, found in measured.items():
            differences = [b.pass_rate - m.pass_rate for b, m in zip(best, found, strict=True)]
            noise[t] = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
            texts = [[outcome.text for outcome in m.outcomes] for m in found]
            diversity[t], fixed[t] = mean_distinct_n(texts), mean_distinct_n(texts, words=words)
        return cls(accuracy, noise, diversity, fixed)
