"""Hand the recipe to verl, a trainer for many GPUs: data, settings, and what verl calls of ours.

    python tools/export_verl.py --preset polaris-4b --data DATA --out runs/verl    # --gpus 8 --machines 4

The folder's run.sh and polaris_verl.py come from verl/ beside this file.
"""
from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import training_and_held_out, written_whole
from difficulty import write_problems
from plan import model_shape
from polaris_mini import Config, UserError, read_config
from reward import check_answer


@dataclass(frozen=True)
class ExportVerl:
    """Write a folder from which verl, on many GPUs, trains by the same recipe: the data, hooks and run.sh.

    run.sh holds the recipe's settings as overrides of verl 0.9.1 and one command per stage. Every other option is one
    of training (python train.py --help).
    """

    out: Path = Path("runs/verl")
    """Folder to make."""
    gpus: int = 8
    """GPUs of each machine."""
    machines: int = 1
    """Machines of the Ray cluster."""


def export_verl(options: ExportVerl, config: Config) -> None:
    """Write train.parquet, val.parquet, run.sh and what verl calls of ours.

    Raises: UserError for settings that would mean something else there.
    """
    if config.resume is not None:
        raise UserError(f"resume is {config.resume}: give its checkpoint as --model, and the other options again")
    for name, count in (("gpus", options.gpus), ("machines", options.machines)):
        if count < 1:
            raise UserError(f"{name} is {count}: give at least 1")
    if config.reward is not None:
        raise UserError(f"reward is {config.reward}: leave it out, and name a function of verl's form to run.sh: "
                        "reward.custom_reward_function.path=FILE.py")
    for number, stage in enumerate(config.schedule, start=1):
        if stage.temperature == "auto":
            raise UserError(f"the temperature of stage {number} is auto: choose it with python tools/evaluate.py probe")
    if options.out.exists():
        raise UserError(f"out is {options.out}: it exists already; give another")
    if config.prompts_per_step % config.updates_per_batch:
        raise UserError(f"updates_per_batch is {config.updates_per_batch}: on verl it must divide prompts_per_step "
                        f"({config.prompts_per_step})")
    training, held_out = training_and_held_out(config, check_answer)
    with written_whole(options.out) as folder:
        for name, problems in (("train", training), ("val", held_out or training)):
            write_problems(problems, folder / f"{name}.parquet", "verl", config.prompt_suffix)
        here = Path(__file__).resolve().parent
        for source in (here.parent / "polaris_mini.py", here.parent / "reward.py", here / "verl" / "polaris_verl.py"):
            shutil.copy(source, folder)
        (folder / "run.sh").write_text(verl_script(config, options))
        (folder / "run.sh").chmod(0o755)
    print(f"{options.out}: {len(training):,} problems, {len(held_out):,} held out, and run.sh. It leaves out:")
    for left_out in not_on_verl(config):
        print(f"  {left_out}")
    if config.require_think:
        print("A response needs </think> there; for a model that does not think give --no-require-think.")


def verl_script(config: Config, options: ExportVerl) -> str:
    """Fill in verl/run.sh: <name> is a setting, or what stands for it in verl."""
    optimizer, package = {"adamw": ("AdamW", "torch.optim"), "adamw8bit": ("AdamW8bit", "bitsandbytes.optim"),
                          "sgd": ("SGD", "torch.optim")}[config.optimizer.removeprefix("paged_")]  # fmt: skip
    folder, positions = Path(config.model), model_shape(config).get_text_config().max_position_embeddings
    values = vars(config) | vars(options) | {
        "model": folder.absolute() if folder.is_dir() else config.model,
        "positions": max(positions, config.max_prompt_tokens + config.longest_response),
        "validate": config.eval_every >= 0,
        "eval_every": config.eval_every or config.total_steps,
        "eval_temperature": config.eval_temperature or config.schedule[0].temperature,
        "load_format": "safetensors" if config.lora_rank else "dummy",
        "estimator": "polaris" if config.substitute else "grpo",
        "divide_by_std": config.advantage == "grpo",
        "correction": "null" if config.mismatch == "ignore" else "token",
        "clip_high": min(config.clip_high, 1e9),
        "dual_clip": min(config.dual_clip, 1e9),
        "prompts_per_update": config.prompts_per_step // config.updates_per_batch,
        "optimizer": optimizer,
        "offload_optimizer": config.optimizer.startswith("paged_"),
        "optimizer_package": package,
        "betas": f"[{config.beta1},{config.beta2}]",
        "dtype": "bfloat16" if config.dtype == "auto" else config.dtype,
    }
    stages, begin = [], 0
    for stage in config.schedule:
        length, end = config.max_prompt_tokens + stage.max_response_tokens, begin + stage.steps
        stages.append(f"stage {begin} {end} {'reset' if stage.reset_optimizer else 'keep'} {stage.temperature} "
                      f"{stage.max_response_tokens} {max(length, config.row_limit('cuda'))}")
        begin = end
    script = (Path(__file__).parent / "verl" / "run.sh").read_text()
    script = re.sub(r"<(\w+)>", lambda match: shlex.quote(str(values[match[1]])), script)
    return script.replace("LEFT OUT", "\n#   ".join(not_on_verl(config))).replace("# STAGES", "\n".join(stages))


def not_on_verl(config: Config) -> list[str]:
    """Say which of the settings verl has nothing for."""
    return [text for text, used in {
        "Rollout Rescue: verl keeps no responses": config.rescue,
        "the removal of mastered problems between stages: measure and filter train.parquet again":
            config.mastered_above < 1,
        "skipping the update of a batch with too few informative groups: its advantages are 0, but Adam's momentum "
        "moves the weights": config.substitute,
        "several updates per batch: the weights of substitution are then those of the whole batch, not of each update":
            config.substitute and config.updates_per_batch > 1,
        "4-bit base weights": config.quantize_base,
    }.items() if used] or ["nothing"]


def main(arguments: Sequence[str]) -> None:
    options, others = tyro.cli(ExportVerl, args=arguments, prog="tools/export_verl.py", return_unknown_args=True)
    export_verl(options, read_config(others))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"export_verl.py: error: {error}", file=sys.stderr)
        sys.exit(2)
