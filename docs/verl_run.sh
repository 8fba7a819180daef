#!/usr/bin/env bash
# POLARIS on verl 0.9.1, one run per stage; made by `python train.py export-verl`. On a machine with verl, vLLM and
# math-verify[antlr4_9_3] installed: ./run.sh [further overrides]. Started again, it goes on from verl's newest checkpoint.
# The grader wants </think> in a response, unless this was made with --no-require-think.
# What it leaves out, as verl has nothing for it:
# LEFT OUT
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VERL_USE_EXTERNAL_MODULES=polaris_verl

common=(
  data.train_files="$PWD/train.parquet"
  data.val_files="$PWD/val.parquet"
  reward.custom_reward_function.path=pkg://polaris_verl
  trainer.default_local_dir="$PWD/checkpoints"
  trainer.project_name=polaris
  trainer.experiment_name="$(basename "$PWD")"
# OVERRIDES
)
more=("$@")

stage() { # BEGIN END keep|reset OVERRIDES...: train up to step END; reset drops the optimizer's state at BEGIN
  local begin=$1 end=$2 optimizer=$3 saved load=()
  saved=$(cat checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0)
  [ "$saved" -lt "$end" ] || return 0
  if [ "$optimizer" = reset ] && [ "$saved" = "$begin" ]; then
    load=('actor_rollout_ref.actor.checkpoint.load_contents=[model,extra]')
  fi
  python3 -m verl.trainer.main_ppo "${common[@]}" trainer.total_training_steps="$end" "${load[@]}" "${@:4}" "${more[@]}"
}

# STAGES
