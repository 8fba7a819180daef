#!/usr/bin/env bash
# POLARIS on verl 0.9.1, one run per stage; made by `python tools/export_verl.py`. In an environment of its own:
#   pip install "verl[vllm,flash-attn-cu130torch211]==0.9.1" "math-verify[antlr4_9_3]==0.9.0" tyro==1.0.17
#   ./run.sh [further overrides]
# Started again, it goes on from verl's newest checkpoint. On several machines this folder is shared, Ray runs on all
# (`ray start`), and run.sh starts on one. How rows fit into memory is left to verl's own options.
# What it leaves out, as verl has nothing for it:
#   LEFT OUT
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VERL_USE_EXTERNAL_MODULES=polaris_verl

everywhere=(
  +ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH="$PYTHONPATH"
  +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES="$VERL_USE_EXTERNAL_MODULES"
  trainer.project_name=polaris
  trainer.experiment_name="$(basename "$PWD")"
  trainer.default_local_dir="$PWD/checkpoints"
  trainer.n_gpus_per_node=<gpus>
  trainer.nnodes=<machines>
  trainer.logger=[console]
  trainer.total_epochs=1000000 # the steps end a stage
  trainer.save_freq=<checkpoint_every>
  trainer.max_actor_ckpt_to_keep=<keep_checkpoints>
  trainer.test_freq=<eval_every>

  data.train_files="$PWD/train.parquet"
  data.val_files="$PWD/val.parquet"
  data.train_batch_size=<prompts_per_step>
  data.max_prompt_length=<max_prompt_tokens>
  data.filter_overlong_prompts=<skip_bad_rows>
  data.truncation=error
  data.seed=<seed>
  data.trust_remote_code=<trust_remote_code>

  actor_rollout_ref.model.path=<model>
  actor_rollout_ref.model.trust_remote_code=<trust_remote_code>
  actor_rollout_ref.model.lora_rank=<lora_rank>
  actor_rollout_ref.model.lora_alpha=<lora_alpha>
  +actor_rollout_ref.model.override_config.max_position_embeddings=<positions>
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.use_fused_kernels=True # no logits of whole rows

  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=<group_size>
  actor_rollout_ref.rollout.top_p=1.0
  actor_rollout_ref.rollout.top_k=-1
  actor_rollout_ref.rollout.dtype=<dtype>
  actor_rollout_ref.rollout.load_format=<load_format>
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.max_num_seqs=<rollouts_per_batch>
  +actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.max_position_embeddings=<positions>
  actor_rollout_ref.rollout.val_kwargs.n=<eval_rollouts>
  actor_rollout_ref.rollout.val_kwargs.do_sample=True
  actor_rollout_ref.rollout.val_kwargs.temperature=<eval_temperature>
  actor_rollout_ref.rollout.val_kwargs.top_p=1.0

  reward.custom_reward_function.path=pkg://polaris_verl
  reward.custom_reward_function.name=compute_score
  +reward.custom_reward_function.reward_kwargs.require_think=<require_think>
  +reward.custom_reward_function.reward_kwargs.timeout=<reward_timeout>

  algorithm.adv_estimator=<estimator>
  algorithm.norm_adv_by_std_in_grpo=<divide_by_std>
  algorithm.use_kl_in_reward=False
  algorithm.rollout_correction.rollout_is=<correction>
  algorithm.rollout_correction.rollout_is_threshold=2.0

  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.entropy_coeff=0
  actor_rollout_ref.actor.loss_agg_mode=token-mean
  actor_rollout_ref.actor.clip_ratio_low=<clip_low>
  actor_rollout_ref.actor.clip_ratio_high=<clip_high>
  actor_rollout_ref.actor.clip_ratio_c=<dual_clip>
  actor_rollout_ref.actor.ppo_epochs=1
  actor_rollout_ref.actor.ppo_mini_batch_size=<prompts_per_update>
  actor_rollout_ref.actor.use_dynamic_bsz=True

  actor_rollout_ref.actor.optim.optimizer=<optimizer>
  actor_rollout_ref.actor.optim.optimizer_impl=<optimizer_package>
  actor_rollout_ref.actor.optim.lr=<lr>
  actor_rollout_ref.actor.optim.lr_scheduler_type=constant
  actor_rollout_ref.actor.optim.weight_decay=<weight_decay>
  actor_rollout_ref.actor.optim.betas=<betas>
  actor_rollout_ref.actor.grad_clip=<max_grad_norm>
  actor_rollout_ref.actor.optim.clip_grad=<max_grad_norm>

  actor_rollout_ref.actor.fsdp_config.dtype=<dtype>
  actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
  actor_rollout_ref.actor.fsdp_config.param_offload=<offload_policy>
  actor_rollout_ref.actor.fsdp_config.optimizer_offload=<offload_optimizer>
)
further=("$@")

# Train up to step END. reset: at step BEGIN the optimizer's state is left behind.
stage() { # BEGIN END keep|reset TEMPERATURE RESPONSE_TOKENS TOKENS_PER_MICRO_BATCH
  local saved load=()
  saved=$(cat checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0)
  [ "$saved" -lt "$2" ] || return 0
  if [ "$3" = reset ] && [ "$saved" = "$1" ]; then
    load=('actor_rollout_ref.actor.checkpoint.load_contents=[model,extra]')
  fi
  python3 -m verl.trainer.main_ppo "${everywhere[@]}" "${load[@]}" \
    trainer.val_before_train="$([ "$saved" = 0 ] && echo <validate> || echo False)" trainer.total_training_steps="$2" \
    actor_rollout_ref.rollout.temperature="$4" data.max_response_length="$5" \
    actor_rollout_ref.rollout.max_model_len=$((<max_prompt_tokens> + $5)) \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$6" "${further[@]}"
}

# STAGES
