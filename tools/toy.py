r"""Make a toy world: a tiny model with bad habits, sums to train it on, and sums that are held out.

    python tools/toy.py --seed 1 --out runs/my_world    # minutes on one core
    python train.py --model runs/my_world/model --data runs/my_world/problems.jsonl \
        --eval-data runs/my_world/held_out.jsonl --preset toy

What it is for: the whole recipe at work on any machine, in minutes. The model is a Qwen3 of 0.6 million weights that
knows 22 tokens. It works sums such as "12 + 3 + 7" out line by line and puts the total in a box. Its warm start teaches
it two bad habits, which training is to undo: it adds some pairs of digits wrong, and it is hasty. So some problems are
never solved, some always, and most now and then, as a real data set is for a real model.

The preset toy of train.py trains in tools/toy_world, which `python tools/toy.py --out tools/toy_world` has made. A
world depends on nothing but its settings: on one machine the same command makes the same files to the last bit.
"""
from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warmup
from data import UserError, written_whole
from polaris_mini import Config, Problem, require
from rollout import prepare_policy

TOY_SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOY_THINK = ["<think>", "</think>"]
TOY_WORDS = [*"0123456789", " + ", " = ", "\n", "\\boxed{", "}", "<|unk|>"]
TOY_TEMPLATE = (
    "{% for turn in messages %}"
    "{{ ('<|assistant|>' if turn.role == 'assistant' else '<|user|>') + turn.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
TOY_MODEL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 384, "max_position_embeddings": 192, "tie_word_embeddings": True, "rope_theta": 10_000.0,
    "initializer_range": 0.05,
}  # fmt: skip
LARGEST = 12
"""Largest term, and most terms: a longer sum would not fit into the preset's limits on prompt and response."""
WARMUP_BATCH = 32


@dataclass(frozen=True)
class World:
    """What is in a toy world."""

    out: Path = Path("runs/toy_world")
    """Folder to make: model/, problems.jsonl and held_out.jsonl."""
    seed: int = 0
    """Seed of everything: sums, the model's first weights, the warm start."""
    problems: int = 640
    """Sums to train on."""
    held_out: int = 128
    """Sums for the evaluation, none of them among the others."""
    terms: tuple[int, int] = (2, LARGEST)
    """Fewest and most terms of a sum. More terms are harder."""
    hard: float = 0.3
    """Share of the sums of a last digit and a term that the warm start mostly teaches wrong."""
    wrong: float = 0.6
    """How often it teaches those wrong."""
    haste: float = 0.5
    """How often a line of working adds one more term, and how often after that yet one more."""
    ramble: float = 0.0
    """How often a line of working comes once more."""
    warmup_steps: int = 2000
    """Supervised steps of the warm start, on 32 worked sums each. With fewer the model is worse at sums."""

    def __post_init__(self) -> None:
        for name in ("problems", "held_out", "warmup_steps"):
            require(self, getattr(self, name) >= 1, name, "give at least 1")
        for name in ("hard", "wrong", "haste", "ramble"):
            require(self, 0 <= getattr(self, name) < 1, name, "give a share from 0 to below 1")
        fewest, most = self.terms
        require(self, 2 <= fewest <= most <= LARGEST, "terms", f"give two numbers from 2 to {LARGEST}, rising")
        possible, wanted = sum(LARGEST**count for count in self.numbers_of_terms), self.problems + self.held_out
        require(self, wanted <= possible / 2, "problems", f"with held_out give at most {possible // 2}, as half of the "
                f"{possible} sums of so few terms are for the warm start")  # fmt: skip

    @property
    def numbers_of_terms(self) -> range:
        return range(self.terms[0], self.terms[1] + 1)


DEFAULT = World()

# --------------------------------------------------------------- sums, and how they are worked


def toy_problems(count: int, seed: int | str, terms: Sequence[int] = DEFAULT.numbers_of_terms) -> list[Problem]:
    """Make different sums such as "12 + 3 + 7", of so many terms from 1 to 12; the id is the text."""
    problems: dict[str, Problem] = {}
    sums = draw_sums(random.Random(f"toy problems {seed}"), terms)
    while len(problems) < count:
        problem = next(sums)
        problems[problem.text] = problem
    return list(problems.values())


def draw_sums(rng: random.Random, terms: Sequence[int]) -> Iterator[Problem]:
    while True:
        numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice(terms))]
        text = " + ".join(map(str, numbers))
        yield Problem(text, text, (str(sum(numbers)),))


def toy_response(problem: Problem, rng: random.Random | None, world: World = DEFAULT) -> str:
    r"""Work a toy problem out line by line, with the bad habits that GRPO is to undo; without them if rng is None.

    Many lines hastily add several terms at once, which a tiny model does worse. Some sums of a last digit and a term
    are mostly taught wrong, always by the same slip: greedy decoding repeats it, sampling now and then does not. So
    problems are 8/8, 0/8 or anything between, depending on the sums that are in them.

    >>> toy_response(Problem("", "12 + 3 + 7 + 4", ("26",)), random.Random(1))
    '12 + 3 + 7 = 22\n22 + 4 = 26\n</think>\n\\boxed{26}'
    """
    def happens(chance: float) -> bool:
        return rng is not None and rng.random() < chance

    total, *terms = map(int, problem.text.split(" + "))
    lines = []
    while terms:
        count = 1
        while count < len(terms) and happens(world.haste):
            count += 1
        result = total
        for term in terms[:count]:
            habit = random.Random(f"{result % 10} + {term}")
            hard, slip = habit.random() < world.hard, habit.choice((-10, -1, 1, 10))
            wrong = hard and happens(world.wrong) and result + term + slip > 0
            result += term + slip * wrong
        lines.append(f"{' + '.join(map(str, [total, *terms[:count]]))} = {result}\n")
        while world.ramble and happens(world.ramble):  # at 0 it must not draw: worlds would change
            lines.append(lines[-1])
        total, terms = result, terms[count:]
    return f"{''.join(lines)}</think>\n\\boxed{{{total}}}"


# ----------------------------------------------------------------------- tokenizer and model


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 22 tokens; what it does not know becomes a visible `<|unk|>`, one per character."""
    vocabulary = {token: number for number, token in enumerate([*TOY_SPECIAL, *TOY_THINK, *TOY_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    pieces = Regex(r" \+ | = |\\boxed\{|.|\n")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    backend.decoder = decoders.Fuse()  # joins the pieces with nothing between them
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in TOY_SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in TOY_THINK])
    # <|unk|> is not declared here: as a special token it would vanish from decoded text, and 1<|unk|>2 would read 12.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TOY_TEMPLATE,
        extra_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_world(world: World) -> list[float]:
    """Make the folder, and return the loss of each step of the warm start."""
    if world.out.exists():
        raise UserError(f"out is {world.out}: it exists already; give another, or delete it first")
    problems = toy_problems(world.problems + world.held_out, world.seed, world.numbers_of_terms)
    known = {problem.text for problem in problems}
    tokenizer = toy_tokenizer()
    torch.set_num_threads(1)  # more are no faster with so small a model, and their number would change the last digits
    torch.manual_seed(world.seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, **TOY_MODEL,
    ))  # fmt: skip
    config = Config(seed=world.seed, device="cpu", lr=3e-3, beta2=0.99, mismatch="ignore", tokens_per_micro_batch=16384)
    rng = random.Random(f"warm start {world.seed}")
    others = (problem for problem in draw_sums(rng, world.numbers_of_terms) if problem.text not in known)
    worked = [(problem, toy_response(problem, rng, world))
              for problem in itertools.islice(others, world.warmup_steps * WARMUP_BATCH)]  # fmt: skip
    examples = warmup.encode_examples(worked, tokenizer, prompt_suffix="")
    losses = warmup.teach(prepare_policy(model, config), examples, config, steps=world.warmup_steps, batch=WARMUP_BATCH)
    with written_whole(world.out) as unfinished:
        warmup.save(model, tokenizer, unfinished / "model")
        for name, part in (("problems", problems[world.held_out :]), ("held_out", problems[: world.held_out])):
            lines = [json.dumps({"problem": problem.text, "answer": problem.answers[0]}) + "\n" for problem in part]
            (unfinished / f"{name}.jsonl").write_text("".join(lines))
    return losses


def main(arguments: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    world = tyro.cli(World, args=arguments, prog="toy.py", description=__doc__)
    last = make_world(world)[-10:]
    print(f"{world.out}: {world.problems} sums to train on, {world.held_out} held out, and a model whose warm start "
          f"ended at {statistics.fmean(last):.3f} nats per token")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"toy.py: error: {error}", file=sys.stderr)
        sys.exit(2)
