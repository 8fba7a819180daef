"""Rollouts: models, the engines that generate responses, graded groups, and what is measured of these.

Both engines have the same methods. `wake` takes the policy's weights. `generate` turns prompts into responses with the
log-prob of every sampled token at the sampling temperature. `sleep` leaves the memory to the update.

Left out: servers, and engines on other machines; weights go over within one process. Left out too: a response that is
begun in one step and ended in the next.

Dimensions in comments: B sequences decoded side by side, L longest prompt, T one response, V vocabulary, H hidden.
"""
from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, astuple, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          BitsAndBytesConfig, DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase,
                          TopKLogitsWarper, TopPLogitsWarper)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file

from data import append_lines, read_lines
from polaris_mini import (Common, Config, Group, Problem, Rollout, UserError,
                          mean_and_interval, mean_distinct_n, pass_at_k)
from reward import Grade, RewardPool

# ------------------------------------------------------- models, devices, ranks
def load_tokenizer(name: str, settings: Common) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub. Raises: UserError if there is none, or one that cannot be used."""
    source = name if (Path(name) / "tokenizer_config.json").is_file() else base_model(name)  # an adapter may lack one
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model is {name}: its tokenizer does not load ({one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model is {name}: its tokenizer has no eos_token, so no response could end; set one")
    if isinstance(named := tokenizer.chat_template, dict) and "default" not in named:
        raise UserError(f"model is {name}: its chat templates are {', '.join(sorted(named))}, and none is default: "
                        "download the model, and copy one of them to chat_template.jinja in its folder")
    return tokenizer


def load_model(name: str, settings: Common, dtype: torch.dtype, *, rope: Mapping[str, Any] | None = None,
               four_bits: bool = False) -> PreTrainedModel:
    """Load a causal language model, or a LoRA adapter merged into its base, from a folder or the hub.

    rope: other positions, as of YaRN. four_bits: linear layers but the head in NF4 (QLoRA, arXiv 2305.14314).
    Raises: UserError if it cannot be loaded, as when its weights are not in safetensors: pickled ones can run code.
    """
    base, device = base_model(name), resolve_device(settings.device)
    trust, placed = settings.trust_remote_code, {}
    if four_bits:
        placed = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True)}
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
        if rope is not None:
            text = config.get_text_config()
            text.rope_parameters = {**text.rope_parameters, **rope}
            text.max_position_embeddings = round(rope["factor"] * rope["original_max_position_embeddings"])
        model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, trust_remote_code=trust,
                                                     use_safetensors=True, attn_implementation="sdpa", **placed)
        if base != name:
            from peft import PeftModel  # slow to import, and only LoRA needs it
            model = PeftModel.from_pretrained(model, name).merge_and_unload().requires_grad_(True)
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"model is {name}: it does not load ({one_line(error)})") from error
    try:
        if model.generation_config is not None:
            model.generation_config.validate(strict=True)
    except ValueError as error:  # transformers would not write them: sample where they say how, drop all others
        greedy = model.generation_config.temperature == 0
        for setting, reason in re.findall(r"^- `(\w+)`: (.*)", str(error), re.MULTILINE):
            sampling = "do_sample" in reason and not greedy
            setattr(model.generation_config, "do_sample" if sampling else setting, sampling or None)
    return model if four_bits else model.to(device)  # type: ignore[arg-type]


def check_model(name: str, settings: Common, problems: Sequence[Problem], response_tokens: int) -> int:
    """Return how many tokens prompt and response may have. Raises: UserError if the model has no room for them."""
    base = base_model(name)
    try:
        text = AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code).get_text_config()
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise UserError(f"model is {name}: it does not load ({one_line(error)})") from error
    longest = max(len(problem.prompt_tokens) for problem in problems) + response_tokens
    largest = max(max(problem.prompt_tokens) for problem in problems)
    rows, positions = (getattr(text, key, math.inf) for key in ("vocab_size", "max_position_embeddings"))
    if largest >= rows:
        raise UserError(f"model is {name}: a prompt has token {largest}, and the embedding has {rows} rows: take the "
                        "model's own tokenizer, or resize the embedding and train it first")
    rotary = any(getattr(text, key, None) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
    if longest > positions and not rotary:  # learned ones are a table, which has an end
        raise UserError(f"model is {name}: the model has {positions} positions, prompt and response up to {longest} "
                        "tokens: lower --max-response-tokens, or --max-prompt-tokens with --skip-bad-rows")
    return longest


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def base_model(name: str) -> str:
    """Return the base of the LoRA adapter of this name, sought here and in the folders above; any other model as is."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    if not adapter.is_file():
        return name
    base = "of no name"
    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        above = [str(up / base) for up in (Path.cwd(), *adapter.absolute().parents)]
        base = next((folder for folder in above if (Path(folder) / "config.json").is_file()), base)
        cached_file(base, "config.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model is {name}: the base of this adapter, {base}, is no folder, here or above, and not "
                        f"on the hub ({one_line(error)}): write the base's place into {adapter}") from error
    return base


def causal_lm(policy: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a policy, LoRA layers in place."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore


def rank() -> int:
    """Return the number of this process among those that torchrun has started, one per GPU; without torchrun 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Return the values that all ranks give, in the order of the ranks."""
    values = [value] * rank_count()
    if rank_count() > 1:
        dist.all_gather_object(values, value)
    return values


def resolve_device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device is {name}: give auto, cpu, cuda or cuda:N") from error
    if name == "auto" and torch.version.cuda and device.type == "cpu" and Path("/dev/nvidia0").exists():
        raise UserError(f"device is auto: there is a GPU, but its driver is too old for PyTorch's CUDA "
                        f"{torch.version.cuda} (13 needs driver 580 or newer): update it, or give --device cpu")
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise UserError(f"device is {name}: PyTorch sees no such device, or it is not supported; give --device cpu")
    return device


def resolve_dtype(settings: Common, device: torch.device) -> torch.dtype:
    """Return the type in which the model computes."""
    if settings.dtype == "auto" and device.type == "cuda":  # vLLM takes bfloat16 only where the GPU computes in it
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> contextlib.AbstractContextManager:
    """Compute in `dtype` whatever the weights are stored in; do nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def load_policy(config: Config, checkpoint: Path | None = None) -> nn.Module:
    """Load the model to train: all of it with float32 weights, or its frozen base with LoRA adapters on top."""
    lora = config.lora_rank > 0
    if lora and base_model(config.model) != config.model:  # a second adapter on top of the first would lose it
        raise UserError(f"model is {config.model}: it is a LoRA adapter, so --resume RUN or merge it into its base")
    dtype = resolve_dtype(config, resolve_device(config.device)) if lora else torch.float32
    name = config.model if lora or checkpoint is None else str(checkpoint)
    return prepare_policy(load_model(name, config, dtype, four_bits=config.quantize_base), config, checkpoint)


def prepare_policy(model: PreTrainedModel, config: Config, checkpoint: Path | None = None) -> nn.Module:
    """Make a loaded model the policy: LoRA on every linear layer but the head, packed attention, no dropout."""
    policy: Any = model
    text, longest = model.config.get_text_config(), config.max_prompt_tokens + config.longest_response
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if (window := getattr(text, "sliding_window", None)) is not None and slides and window < longest:
        raise UserError(f"model is {config.model}: its sliding window has {window} tokens, prompt and response may "
                        f"have {longest}; lower --max-response-tokens or take a model without one")
    if config.lora_rank > 0:
        from peft import LoraConfig, PeftModel, get_peft_model  # slow to import, and only LoRA needs it
        torch.manual_seed(config.seed)  # the adapters' random start
        settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear",
                              lora_dropout=0.0, task_type="CAUSAL_LM")  # fmt: skip
        policy = (get_peft_model(model, settings) if checkpoint is None
                  else PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True))
        base = Path(config.model)  # a checkpoint names it as it is seen from any folder
        policy.peft_config["default"].base_model_name_or_path = str(base.absolute() if base.is_dir() else base)
    model.set_attn_implementation("packed")
    for module in policy.modules():
        if isinstance(module, nn.Dropout):  # the trainer's log-probs must be the sampler's
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of 4-bit layers: a CPU path without a gradient
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "cast_input_dtype_enabled"):  # of LoRA: autocast is enough, and keeps no float32 copy
            module.cast_input_dtype_enabled = False
    if config.gradient_checkpointing:  # without dropout there are no random numbers to repeat
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return policy


def start_ranks(config: Config) -> None:
    """Join the processes (ranks) that torchrun has started, one per GPU; without torchrun there are none to join.

    Every rank runs the same loop. Each draws and grades its part of the problems, and all gather the groups. Each
    forwards its part of the batch, and gradients are summed. Rank 0 writes and prints.
    """
    count, device = int(os.environ.get("WORLD_SIZE", "1")), resolve_device(config.device)
    if count == 1:
        return
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise UserError(f"torchrun started {count} processes, but PyTorch sees {torch.cuda.device_count()} GPUs")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a rank that waits for a long response must not give up: torchrun ends all ranks when one has died
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))


# ------------------------------------------------------------------------- the engine
ENGINE_SHARE, ENGINE_LEAST = 0.1, 2**30  # of a GPU, for vLLM's activations, CUDA graphs and what else there is
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw": 8, "paged_adamw8bit": 2, "sgd": 0}  # for each weight
KV_BLOCK = 128  # tokens; vLLM rounds each sequence up to its block, which is no larger
Prompts = Sequence[Sequence[int]]  # token ids
Generated = Generator[tuple[int, list["Response"]], None, None]  # the number of each prompt, and its responses


@dataclass(slots=True)
class Response:
    """One response as an engine returns it."""

    tokens: list[int]
    sampler_logprobs: list[float]  # (T,) nats, of each token, at the sampling temperature
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. top_p and top_k are for evaluation; training samples from the whole distribution."""

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0


class HFEngine:
    """Generate with the policy itself, on any device, without a second copy of the weights: a loop with a cache.

    Why not `model.generate`: it returns log-probs only as whole (V,) rows, which for a vocabulary of 150,000 fill the
    memory. It also goes on computing responses that have ended; here ended responses leave the decoding.
    """

    def __init__(self, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Common) -> None:
        self.policy, self.tokenizer, self.rollouts_per_batch = policy, tokenizer, settings.rollouts_per_batch
        model = causal_lm(policy)
        self.device, self.dtype = model.device, resolve_dtype(settings, model.device)
        listed = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.stop_tokens = stop_tokens(tokenizer, listed)

    def wake(self, policy: nn.Module) -> None:
        self.policy = policy

    def sleep(self) -> None:
        """Free nothing: the cache lives only while responses are decoded."""

    close = sleep

    def generate(self, prompts: Prompts, count: int, sampling: Sampling, finished: Collection[int] = ()) -> Generated:
        """Yield each prompt's number with its `count` responses, but not for prompts whose number is in `finished`.

        Each `rollouts_per_batch` sequences have their own random numbers: leaving finished ones out changes no others.
        """
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours need little padding
        order = [i for i in by_length for _ in range(count)]
        responses: dict[int, list[Response]] = {i: [] for i in by_length}
        for start in range(0, len(order), self.rollouts_per_batch):
            together = order[start : start + self.rollouts_per_batch]
            if all(i in finished for i in together):
                continue
            seed = random.Random(f"{sampling.seed}:{start}").getrandbits(63)
            generator = torch.Generator(self.device).manual_seed(seed)
            with torch.inference_mode(), autocast(self.device, self.dtype), _decoding(self.policy):
                decoded = self._decode({i: prompts[i] for i in together}, together, sampling, generator)
            for i, response in zip(together, decoded, strict=True):
                responses[i].append(response)
                if len(responses[i]) == count and i not in finished:
                    yield i, responses[i]

    def _decode(self, prompts: Mapping[int, Sequence[int]], order: Sequence[int], sampling: Sampling,
                generator: torch.Generator) -> list[Response]:
        model = causal_lm(self.policy)
        head = model.get_output_embeddings()
        longest = max(map(len, prompts.values()))
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts.values()]  # on the left, so that all end together
        tokens = torch.tensor(padded, device=self.device)  # (prompts, L)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts.values()], device=self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (prompts, L)
        cache = DynamicCache(config=model.config)
        limit = longest + sampling.max_tokens
        cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        responses = [Response([], [], "length") for _ in order]
        decoding, ends = list(responses), set(self.stop_tokens)  # sequences leave `decoding` as they end
        for step in range(sampling.max_tokens):
            hidden = model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions,
                                      past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # (B, H)
            if step == 0 and len(prompts) < len(order):  # a prompt went through the model once for all its responses
                sources = torch.tensor([[*prompts].index(i) for i in order], device=self.device)
                cache.batch_select_indices(sources)
                hidden, mask, positions = hidden[sources], mask[sources], positions[sources]
            logprobs = torch.log_softmax(head(hidden).float() / sampling.temperature, dim=-1)  # (B, V)
            tokens = _draw(_truncate(logprobs, sampling).exp(), generator)  # (B, 1)
            chosen = logprobs.gather(1, tokens)[:, 0].tolist()
            if not all(map(math.isfinite, chosen)):
                raise UserError("the model's log-probs are not finite: its weights are damaged, or try --dtype float32")
            for response, token, logprob in zip(decoding, tokens[:, 0].tolist(), chosen, strict=True):
                if response.finish_reason == "length":  # not ended before
                    response.tokens.append(token)
                    response.sampler_logprobs.append(logprob)
                    response.finish_reason = "stop" if token in ends else "length"
            running = [i for i, response in enumerate(decoding) if response.finish_reason == "length"]
            if not running:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(decoding), 1)], dim=1)
            if len(running) <= 0.75 * len(decoding):  # copying the cache costs: a quarter at a time
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                decoding = [decoding[i] for i in running]
        return responses


class GrowingLayer(DynamicLayer):
    """Keep keys and values, (B, heads, tokens, D), in memory that grows by half: few new tokens copy old ones."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.memory = limit, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, news = self.get_seq_length(), (key_states.to(value_states.dtype), value_states)  # norms give float32
        end = start + key_states.shape[2]
        if not self.memory or end > self.memory[0].shape[2]:
            size = max(end, min(end + end // 2 + 64, self.limit))
            olds = self.memory or [new[:, :, :0] for new in news]
            self.memory = [pad(old, (0, 0, 0, size - old.shape[2])) for old in olds]
            self.is_initialized = True
        for memory, new in zip(self.memory, news, strict=True):
            memory[:, :, start:end] = new
        self.keys, self.values = self.memory[0][:, :, :end], self.memory[1][:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length, self.memory = self.get_seq_length(), [memory[indices] for memory in self.memory]
        self.keys, self.values = self.memory[0][:, :, :length], self.memory[1][:, :, :length]


def decode_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                     scaling: float, **others: Any) -> tuple[Tensor, None]:
    """Attend from one token a sequence over the cache. transformers would first copy keys for heads that share them."""
    if query.shape[2] > 1 or any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # (B, key heads, group, D): the group as queries
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.flatten(1, 2)[:, None], None


AttentionInterface.register("decode", decode_attention)
AttentionMaskInterface.register("decode", sdpa_mask)


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token of each sequence, (B, V) -> (B, 1), by one random number; `multinomial` takes V of them."""
    limits = probabilities.cumsum(1, dtype=torch.double)
    drawn = torch.rand(len(limits), 1, generator=generator, device=limits.device, dtype=limits.dtype) * limits[:, -1:]
    return torch.searchsorted(limits, drawn, right=True).clamp(max=limits.shape[1] - 1)


@contextlib.contextmanager
def _decoding(policy: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and to attention over a cache, and back."""
    model = causal_lm(policy)
    was_training, attention = policy.training, model.config._attn_implementation
    policy.eval()
    model.set_attn_implementation("decode")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        policy.train(was_training)


def _truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Set tokens outside top-k and top-p to -inf; `_draw` renormalises the rest."""
    if sampling.top_k > 0:
        logprobs = TopKLogitsWarper(sampling.top_k)(None, logprobs)  # type: ignore[arg-type]
    if sampling.top_p < 1.0:
        logprobs = TopPLogitsWarper(sampling.top_p)(None, logprobs)  # type: ignore[arg-type]
    return logprobs


def stop_tokens(tokenizer: PreTrainedTokenizerBase, listed: int | list[int] | None) -> list[int]:
    """Return the tokens that end a response: the tokenizer's, those listed by the model, and the chat template's."""
    turns, after = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "MARK7f3"}], ""
    with contextlib.suppress(TemplateError, ValueError, TypeError):  # a template may take no such conversation
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).partition("MARK7f3")[2]
    added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"]
            if added.get(token, "").strip() and "think" not in added[token]][:1]
    return sorted({tokenizer.eos_token_id, *ends, *([listed] if isinstance(listed, int) else listed or [])})


class VLLMEngine:
    """Generate with vLLM in this process, on the policy's own device: paged attention, continuous batching.

    On a GPU trainer and engine take turns with the memory. Asleep, the engine holds neither weights nor a cache. Waking
    brings the policy's weights over, tensor by tensor, before the cache is made. On a CPU vLLM only takes the weights.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, settings: Common, max_tokens: int, *,
                 rope: Mapping[str, Any] | None = None, policy: nn.Module | None = None) -> None:
        """Start vLLM. max_tokens: prompt and response. Without a policy it reads the weights, and never sleeps."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, not in one beside
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", module="vllm|torch.jit")  # of what they will change in themselves
        from vllm import LLM
        from vllm.config.lora import MaxLoRARanks
        self.tokenizer, self.device = tokenizer, resolve_device(settings.device)
        if self.device.index:
            raise UserError(f"device is {settings.device}: vllm takes the first GPU that it sees; start with "
                            f"CUDA_VISIBLE_DEVICES={self.device.index} and without --device, or give --engine hf")
        self.dtype = resolve_dtype(settings, self.device)
        self.rollouts_per_batch, self.timeout = settings.rollouts_per_batch, settings.engine_timeout
        self.sleeps = self.device.type == "cuda" and policy is not None
        training = settings if policy is not None and isinstance(settings, Config) else Config()
        self.offloaded = policy if self.sleeps and training.offload_policy else None
        config = AutoConfig.from_pretrained(model, trust_remote_code=settings.trust_remote_code)
        text = config.get_text_config()
        # as in the release, responses may be longer than the positions that the model's config names
        overrides: dict[str, Any] = {"max_position_embeddings": max(max_tokens, text.max_position_embeddings)}
        if rope is not None:
            overrides["rope_parameters"] = {**text.rope_parameters, **rope}
        self._move_policy(torch.device("cpu"))
        cache_bytes = kv_cache_bytes(config, settings, max_tokens, policy)
        self.adapter: Any = None  # the LoRA adapter that vLLM serves
        lora = training.lora_rank
        self.takes_base = lora == 0 or training.quantize_base  # else vLLM reads the base itself, once
        self.sleep_level = 2 if lora == 0 else 1
        try:
            self.llm = LLM(
                model=model, dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                seed=settings.seed, hf_overrides=overrides, trust_remote_code=settings.trust_remote_code,
                load_format="dummy" if policy is not None and self.takes_base else "safetensors",
                enable_sleep_mode=self.sleeps, max_model_len=max_tokens, max_num_seqs=settings.rollouts_per_batch,
                kv_cache_memory_bytes=cache_bytes, gpu_memory_utilization=0.01,  # what vLLM insists on finding free
                logprobs_mode="processed_logprobs",  # at the temperature; the default's are at 1
                skip_tokenizer_init=True, enforce_eager=self.device.type != "cuda",
                max_num_batched_tokens=max(2048, settings.rollouts_per_batch),  # of a step, which sets its activations
                enable_lora=lora > 0, max_loras=1,
                max_lora_rank=min((r for r in get_args(MaxLoRARanks) if r >= lora), default=lora),  # vLLM knows few
                distributed_executor_backend="external_launcher" if rank_count() > 1 else None)  # one engine per rank
        except (ValueError, RuntimeError, OSError, AssertionError, SafetensorError) as error:
            raise UserError(f"engine is vllm: it does not start with {model} ({one_line(error)}): give --engine hf "
                            "or, if memory is short, lower --max-response-tokens or --rollouts-per-batch") from error
        generation = self.llm.model_config.try_get_generation_config()
        self.stop_tokens = stop_tokens(tokenizer, generation.get("eos_token_id"))
        self.sleep()

    def wake(self, policy: nn.Module) -> None:
        """Take the policy's weights over, or its adapter alone, then make the key-value cache."""
        if self.sleeps:
            torch.cuda.empty_cache()  # what the update has freed, PyTorch has kept
            self.llm.wake_up(tags=["weights"])
        if self.takes_base:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy_weights(policy, self.dtype)})
        if hasattr(policy, "peft_config"):
            from vllm.lora.request import LoRARequest
            with tempfile.TemporaryDirectory() as folder:
                policy.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
                self.adapter = LoRARequest("policy", 1, folder, load_inplace=True)
                self.llm.llm_engine.add_lora(self.adapter)
            self.adapter.load_inplace, self.takes_base = False, False
        self.llm.reset_prefix_cache()  # it was computed with the old weights
        self._move_policy(torch.device("cpu"))
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Free cache and weights. The base of an adapter waits in CPU memory; `wake` brings all other weights."""
        if self.sleeps:
            self.llm.sleep(level=self.sleep_level)
        self._move_policy(self.device)

    def _move_policy(self, device: torch.device) -> None:
        if self.offloaded is not None:
            for parameter in self.offloaded.parameters():
                parameter.data = parameter.data.to(device)
                if (scales := getattr(parameter, "quant_state", None)) is not None:  # of 4-bit weights
                    scales.to(device)  # where they stayed, they would keep the memory around them
        torch.cuda.empty_cache()

    def close(self) -> None:
        """End vLLM, so that another engine can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        if self.sleeps:  # CUDA fails to free what sleep has unmapped, and then gives no memory to the next engine
            self._move_policy(torch.device("cpu"))
            for tag in ("weights", "kv_cache"):
                self.llm.wake_up(tags=[tag])
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def generate(self, prompts: Prompts, count: int, sampling: Sampling, finished: Collection[int] = ()) -> Generated:
        """Yield each prompt's number with its responses, those that finish first first."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        engine: Any = self.llm.llm_engine
        torch.manual_seed(sampling.seed)
        settings = SamplingParams(n=count, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                                  max_tokens=sampling.max_tokens, stop_token_ids=self.stop_tokens, detokenize=False,
                                  logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip
        missing = [i for i in range(len(prompts)) if i not in finished]
        for i in missing:
            if self.device.type == "cuda":  # there vLLM ignores torch's seed; on a CPU it cannot always take this one
                settings.seed = random.Random(f"{sampling.seed}:{i}").getrandbits(62)  # plus 0, 1, ... per response
            prompt = {"prompt_token_ids": list(prompts[i])}
            engine.add_request(str(i), prompt, settings.clone(), lora_request=self.adapter)
        try:
            while engine.has_unfinished_requests():
                faulthandler.dump_traceback_later(self.timeout, exit=True)  # nothing else ends a hang; --resume goes on
                for output in engine.step():
                    if failed := {o.finish_reason for o in output.outputs} - {"stop", "length"}:
                        raise UserError(f"engine is vllm: it ended a response by {failed.pop()}; give --engine hf")
                    yield int(output.request_id), [Response([*o.token_ids], [*o.logprobs.logprobs], o.finish_reason)
                                                   for o in output.outputs]
        finally:
            faulthandler.cancel_dump_traceback_later()
            engine.abort_request([str(i) for i in missing])  # what Ctrl-C has left


def uses_vllm(settings: Common) -> bool:
    """Tell whether responses come from vLLM: on a GPU if it is installed, unless the engine is named."""
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise UserError("engine is vllm: it is not installed; see the README, or give --engine hf")
    return installed and settings.engine != "hf" and (
        settings.engine == "vllm" or resolve_device(settings.device).type == "cuda")  # fmt: skip


def policy_weights(policy: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield a policy's weights under their names in a checkpoint, tied ones too; of LoRA the base, not in 4 bits."""
    model = causal_lm(policy)
    for name, weight in model.state_dict().items():
        if ".lora_" in name or ".base_layer.weight." in name:  # an adapter's own, the scales of a 4-bit weight
            continue
        if name.endswith(".base_layer.weight"):
            from peft.utils.integrations import dequantize_module_weight  # slow to import, and only LoRA needs it
            weight = dequantize_module_weight(model.get_submodule(name.removesuffix(".weight")))
        yield name.replace(".base_layer.", "."), weight.to(dtype)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize


def optimizer_bytes(policy: nn.Module, config: Config) -> int:
    """Return what the optimizer's state takes of the device after the first update; paged state can leave it."""
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return 0 if config.optimizer.startswith("paged") else trained * STATE_BYTES[config.optimizer]


def check_space(policy: nn.Module, config: Config, folder: Path) -> None:
    """Raise a UserError if a run's checkpoints do not fit on its disk: a new one comes before an old one goes."""
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    each = trained * (4 + STATE_BYTES[config.optimizer])
    count = min(config.keep_checkpoints, -(-config.total_steps // config.checkpoint_every)) + 1
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    checkpoints = folder.absolute() / "checkpoints"
    disk = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    need, free = count * each / 1e9, (held + shutil.disk_usage(disk).free) / 1e9
    if need > free:
        raise UserError(f"run_dir is {folder}: {count} checkpoints take {need:,.3f} GB, and {free:,.3f} GB are free: "
                        "make room, lower --keep-checkpoints, or give another --run-dir")


def kv_cache_bytes(config: PretrainedConfig, settings: Common, max_tokens: int, policy: nn.Module | None = None) -> int:
    """Give vLLM's cache what all sequences need, or else what memory is left. Raises: UserError if not one fits."""
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings, device)
    per_token = kv_bytes_per_token(config, dtype)
    left = 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if device.type == "cuda":
        with torch.device("meta"):  # no memory: only to count
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
        free, total = torch.cuda.mem_get_info(device)
        left = free - model.num_parameters() * dtype.itemsize - max(ENGINE_SHARE * total, ENGINE_LEAST)
        if policy is not None and isinstance(settings, Config):
            left -= optimizer_bytes(policy, settings)
    most = int(left / per_token) - KV_BLOCK
    if most < max_tokens:
        raise UserError(f"engine is vllm: a prompt with its response may have {max_tokens} tokens, {max(0, most)} fit "
                        "into the memory that is left for its key-value cache; lower --max-response-tokens")
    return int(min(left, per_token * (max_tokens + KV_BLOCK) * settings.rollouts_per_batch))


# ---------------------------------------------------------------- groups and their grades
Engine = HFEngine | VLLMEngine
Grading = tuple[Rollout, "Future[Grade]"]


def sample_groups(engine: Engine, pool: RewardPool, problems: Sequence[Problem], group_size: int, sampling: Sampling,
                  kept: Path | None = None) -> tuple[list[Group], list[Grading]]:
    """Draw `group_size` rollouts of every problem. Grading of a group begins when the group is finished.

    Each rank draws its part of the problems. Finished groups are appended to the file `kept`, and after a kill the same
    call takes them from there. Returns the groups in the problems' order, and the gradings that `set_rewards` awaits.
    """
    problems = problems[rank() :: rank_count()]
    sampling = replace(sampling, seed=sampling.seed + rank())
    prompts = [list(problem.prompt_tokens) for problem in problems]
    drawing = [prompts, group_size, asdict(sampling), type(engine).__name__, engine.rollouts_per_batch]
    key = hashlib.sha256(json.dumps(drawing).encode()).hexdigest()[:16]
    kept = kept and kept.with_name(f"{kept.name}.rank{rank()}.jsonl")
    known = {line["number"]: [Response(*values) for values in line["responses"]]
             for line in (read_lines(kept) if kept else ()) if line["key"] == key}
    groups: dict[int, Group] = {}
    gradings: list[Grading] = []
    with (contextlib.closing(engine.generate(prompts, group_size, sampling, known.keys())) as generated,
          tqdm(total=len(problems), unit="group", leave=False, disable=True if rank() else None) as progress):
        for i, responses in itertools.chain(known.items(), generated):
            if kept and i not in known:
                append_lines(kept, [{"key": key, "number": i, "responses": [astuple(r) for r in responses]}])
            problem = problems[i]
            groups[i] = Group(problem, [])
            for r in responses:
                spoken = r.tokens[:-1] if r.finish_reason == "stop" else r.tokens  # without the stop token
                text = str(engine.tokenizer.decode(spoken, skip_special_tokens=False))
                drawn = Rollout(problem.id, problem.prompt_tokens, r.tokens, r.sampler_logprobs, text, r.finish_reason)
                groups[i].rollouts.append(drawn)
                gradings.append((drawn, pool.submit((text, problem.answers, drawn.truncated), problem)))
            tokens = sum(len(rollout.response_tokens) for rollout, _ in gradings)
            progress.set_postfix_str(f"{tokens / (progress.format_dict['elapsed'] + 1e-6):,.0f} tokens/s")
            progress.update()
    return [groups[i] for i in range(len(problems))], gradings


def set_rewards(groups: list[Group], gradings: Sequence[Grading]) -> list[Group]:
    """Set reward and reason of every rollout, once they are known. Return the groups, those of all ranks together."""
    for rollout, grading in gradings:
        grade = grading.result()
        rollout.reward, rollout.reason = grade.reward, grade.reason
    parts = gather(groups)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


# ------------------------------------------------------------- evaluation, temperature probe
@dataclass(frozen=True)
class Evaluation:
    """How good a policy is on a set of problems."""

    problems: int
    k: int
    avg_at_k: float
    interval: float  # half width of the 95 % interval of avg_at_k, over problems
    pass_at_k: list[float]  # (k,) unbiased pass@1 ... pass@k
    tokens_mean: float
    truncated: float
    distinct_4: float

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Evaluation:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        k = len(groups[0].rollouts)
        correct = [sum(rollout.correct for rollout in group.rollouts) for group in groups]
        average, interval = mean_and_interval([group.pass_rate for group in groups])
        return cls(len(groups), k, average, interval,
                   pass_at_k=[statistics.fmean(pass_at_k(c, k, tries) for c in correct) for tries in range(1, k + 1)],
                   tokens_mean=statistics.fmean(len(rollout.response_tokens) for rollout in rollouts),
                   truncated=statistics.fmean(rollout.truncated for rollout in rollouts),
                   distinct_4=mean_distinct_n([r.text for r in group.rollouts] for group in groups))  # fmt: skip


@dataclass(frozen=True)
class ProbeCurves:
    """What a probe found: temperature -> value."""

    accuracy: dict[float, float]
    noise: dict[float, float]  # standard error of the difference to the best accuracy, paired by problem
    distinct_4: dict[float, float]

    @classmethod
    def of(cls, measured: Mapping[float, Sequence[Group]]) -> ProbeCurves:
        accuracy = {t: statistics.fmean(group.pass_rate for group in groups) for t, groups in measured.items()}
        best = measured[max(accuracy, key=accuracy.__getitem__)]
        noise, diversity = {}, {}
        for t, groups in measured.items():
            differences = [b.pass_rate - group.pass_rate for b, group in zip(best, groups, strict=True)]
            noise[t] = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
            diversity[t] = mean_distinct_n([rollout.text for rollout in group.rollouts] for group in groups)
        return cls(accuracy, noise, diversity)
