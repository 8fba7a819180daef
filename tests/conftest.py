"""Tiny real models, tokenizers and problems, made in a moment and without a download."""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

import toy
import train  # noqa: F401  registers the packed attention
from fast_start import Script
from polaris_mini import Rollout
from reward import Grade, RewardPool

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 256, "eos_token_id": 3, "pad_token_id": 0,
         "bos_token_id": None, "vocab_size": 50}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def grade(response: str, answers: object, *, require_think: bool, truncated: bool = False) -> Grade:
    with RewardPool(1, require_think=require_think) as pool:
        return pool.grade([(response, answers, truncated)])[0]


def even_sums(path: Path, count: int) -> Path:
    """Write problems that accept any even number: even a model that can hardly add is often right, and often not."""
    rows = [{"problem": p.text, "answer": [str(n) for n in range(0, 40, 2)]}
            for p in toy.toy_problems(count, seed=5, terms=[3])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_model(kind: str, *, tied: bool, seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    torch.manual_seed(seed)
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    sizes = {**SIZES, "hidden_size": 4 * head_dim}
    extra = {"head_dim": head_dim} if kind == "qwen3" else {}
    model = model_class(config_class(tie_word_embeddings=tied, **sizes, **extra))
    model.set_attn_implementation("packed")
    for parameter in model.parameters():  # far from the flat start, so that probabilities and norms matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_rollouts(count: int, seed: int = 0, longest: int = 40) -> list[Rollout]:
    rng = random.Random(seed)
    rollouts = []
    for _ in range(count):
        prompt = [rng.randrange(2, 50) for _ in range(rng.randint(1, 12))]
        response = [rng.randrange(2, 50) for _ in range(rng.randint(1, longest))]
        logprobs = [-3 * rng.random() for _ in response]
        rollouts.append(Rollout("p", prompt, response, logprobs, "", "stop", advantage=rng.gauss(0, 1)))
    return rollouts


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run each test for a GPU in a process of its own: vLLM's allocator is one for a whole process."""
    if pyfuncitem.get_closest_marker("gpu") is None or "GPU_TEST" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {**os.environ, "GPU_TEST": pyfuncitem.name}
    ended = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=environment, check=False)
    assert ended.returncode == 0, f"it failed in a process of its own: {' '.join(command)}"
    return True


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """More threads wait for each other for longer than these models take."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run_train(environment):
    def call(
        *arguments: object, script: str = "train.py", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return Script(arguments, environment, script=script, cwd=cwd).wait(600)

    return call
