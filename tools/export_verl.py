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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import DataError
from difficulty import write_problems
from plan import model_shape
from polaris_mini import Config
from rollout import ModelError, refuse_torchrun
from train import ConfigError, Display, load_data, need_a_batch, read_config, written_whole


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


def export_verl(options: ExportVerl, config: Config, display: Display) -> None:
    """Write train.parquet, val.parquet, run.sh and what verl calls of ours.

    Raises: ConfigError for settings that would mean something else there.
    """
    if config.model == "toy":
        raise ConfigError("model is toy: give --model, a folder or hub name")
    if config.resume is not None:
        raise ConfigError(f"resume is {config.resume}: give its checkpoint as --model, and the other options again")
    for name, count in (("gpus", options.gpus), ("machines", options.machines)):
        if count < 1:
            raise ConfigError(f"{name} is {count}: give at least 1")
    if config.reward is not None:
        raise ConfigError(f"reward is {config.reward}: leave it out, and name a function of verl's form to run.sh: "
                          "reward.custom_reward_function.path=FILE.py")
    for number, stage in enumerate(config.stages, start=1):
        if stage.temperature == "auto":
            raise ConfigError(f"the temperature of stage {number} is auto: choose it with "
                              "python tools/evaluate.py probe")
    if options.out.exists():
        raise ConfigError(f"out is {options.out}: it exists already; give another")
    if config.prompts_per_step % config.updates_per_batch:
        raise ConfigError(f"updates_per_batch is {config.updates_per_batch}: on verl it must divide prompts_per_step "
                          f"({config.prompts_per_step})")
    training, evaluation = load_data(config)
    need_a_batch(config, training)
    examples = data.load_worked_examples(config.prompt_examples) if config.prompt_examples else ()
    with written_whole(options.out) as folder:
        for name, problems in (("train", training), ("val", evaluation or training)):
            write_problems(problems, folder / f"{name}.parquet", "verl", config.prompt_suffix, examples)
        here = Path(__file__).resolve().parent
        for source in (here.parent / "polaris_mini.py", here.parent / "reward.py", here / "verl" / "polaris_verl.py"):
            shutil.copy(source, folder)
        (folder / "run.sh").write_text(verl_script(config, options))
        (folder / "run.sh").chmod(0o755)
    display.note(f"{options.out}: {len(training):,} problems, {len(evaluation):,} held out, and run.sh. It leaves out:")
    for left_out in not_on_verl(config):
        display.note(f"  {left_out}")
    if config.require_think:
        display.note("A response needs </think> there; for a model that does not think give --no-require-think.")


def verl_script(config: Config, options: ExportVerl) -> str:
    """Fill in verl/run.sh: <name> is a setting, or what stands for it in verl."""
    optimizer, package = {"adamw": ("AdamW", "torch.optim"), "adamw8bit": ("AdamW8bit", "bitsandbytes.optim"),
                          "sgd": ("SGD", "torch.optim")}[config.optimizer]  # fmt: skip
    folder, positions = Path(config.model), model_shape(config).get_text_config().max_position_embeddings
    values = vars(config) | vars(options) | {
        "model": folder.absolute() if folder.is_dir() else config.model,
        "positions": max(positions, config.max_prompt_tokens + config.longest_response),
        "logger": "[console]" if config.track == "none" else f"[console,{config.track}]",
        "validate": config.eval_every >= 0,
        "eval_every": config.eval_every or config.total_steps,
        "eval_temperature": config.eval_temperature or config.stages[0].temperature,
        "load_format": "safetensors" if config.lora_rank else "dummy",
        "estimator": "polaris" if config.substitute else "grpo",
        "divide_by_std": config.advantage == "grpo",
        "correction": "null" if config.mismatch == "ignore" else "token",
        "correction_bounds": "0.5_2.0" if config.mismatch == "icepop" else 2.0,
        "clip_high": min(config.clip_high, 1e9),
        "dual_clip": min(config.dual_clip, 1e9),
        "prompts_per_update": config.prompts_per_step // config.updates_per_batch,
        "optimizer": optimizer,
        "optimizer_package": package,
        "betas": f"[{config.beta1},{config.beta2}]",
        "dtype": "bfloat16" if config.dtype == "auto" else config.dtype,
        "model_dtype": "bf16" if config.trained_weights == "bfloat16" else "fp32",
    }
    stages, begin = [], 0
    for stage in config.stages:
        length, end = config.max_prompt_tokens + stage.max_response_tokens, begin + stage.steps
        stages.append(f"stage {begin} {end} {'reset' if stage.reset_optimizer else 'keep'} {stage.temperature} "
                      f"{stage.max_response_tokens} {max(length, config.tokens_per_micro_batch)}")
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
        "ends of stages at a plateau": any(stage.until == "plateau" for stage in config.stages),
        "rewards for intermediate results (core)": config.process_reward == "core",
        "skipping the update of a batch with too few informative groups: its advantages are 0, but Adam's momentum "
        "moves the weights": config.substitute,
        "several updates per batch: the weights of substitution are then those of the whole batch, not of each update":
            config.substitute and config.updates_per_batch > 1,
        "4-bit base weights": config.quantize_base,
        "the warm start": config.warmup is not None,
    }.items() if used] or ["nothing"]


def main(arguments: Sequence[str]) -> None:
    refuse_torchrun("export_verl")
    options, others = data.read_options(ExportVerl, arguments, "tools/export_verl.py", return_unknown_args=True)
    export_verl(options, read_config(others), Display())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, ModelError, ConfigError, OSError) as error:
        print(f"export_verl.py: error: {error}", file=sys.stderr)
        sys.exit(2)
