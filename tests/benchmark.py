"""Time start, weight sync and generation of both engines on this machine: figures to read, not tests.

    python tests/benchmark.py                  # a Qwen3 of 4 layers with random weights, 16 prompts x 8 x 128 tokens
    python tests/benchmark.py MODEL [THREADS]  # the folder of a model
"""
from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import Qwen3Config, Qwen3ForCausalLM

import data
import train
from polaris_mini import Config
from rollout import Engine, HFEngine, Sampling, VLLMEngine, resolve_device

PROMPTS, COUNT, TOKENS = 16, 8, 128


def small_model(folder: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=768, vocab_size=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def make_engine(name: str, folder: Path, policy: torch.nn.Module, config: Config) -> Engine:
    if name == "vllm":
        return VLLMEngine(str(folder), data.toy_tokenizer(), config, max_tokens=512, weights="policy")
    return HFEngine(policy, data.toy_tokenizer(), config)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        torch.set_num_threads(int(arguments[1]))
    device = resolve_device("auto")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0]) if arguments else small_model(Path(temporary))
        config = Config(model=str(folder), rollouts_per_batch=PROMPTS * COUNT)
        policy = train.load_policy(config, str(folder), None, device)
        print(f"{folder.name if arguments else 'small model'}: {sum(p.numel() for p in policy.parameters()):,} "
              f"parameters, {device}, {torch.get_num_threads()} threads; {PROMPTS} x {COUNT} x {TOKENS} tokens")
        print("engine   start s   sync s   tokens/s (median, least, most of 3)")
        prompts = [[4 + (7 * i + j) % 18 for j in range(32)] for i in range(PROMPTS)]
        for name in ("hf", "vllm") if importlib.util.find_spec("vllm") else ("hf",):
            began = now()
            with contextlib.closing(make_engine(name, folder, policy, config)) as engine:
                start, sync, speed = now() - began, [], []
                for repeat in range(4):
                    began = now()
                    engine.wake(policy)
                    sync.append(now() - began)
                    began = now()
                    groups = list(engine.generate(prompts, COUNT, Sampling(1.0, TOKENS, seed=repeat)))
                    speed.append(sum(len(r.tokens) for _, responses in groups for r in responses) / (now() - began))
                    engine.sleep()
                speed = speed[1:]  # the first warms up
                print(f"{name:6} {start:9.1f} {statistics.median(sync):8.3f}   {statistics.median(speed):8,.0f} "
                      f"{min(speed):8,.0f} {max(speed):8,.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
