"""AReaL's keys that are named differently here, or are not needed: what to do about each.

Read by `keys.unknown`, so that a configuration brought over from AReaL is told what to change
instead of being told of a typing error. Keys that mean the same here keep AReaL's names and are
not listed.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_ONE_RUN = "set it once, at the top level"
_NO_LAUNCHER = "not needed here: the processes of a run are started by `areal-sub train` itself"

# Old name → name here; what stands below it keeps its name.
RENAMED = {
    "openai": "rollout.openai",
    "rollout.agent": "rollout.openai",
    "rollout.setup_timeout": "rollout.setup_timeout_s",
    "rollout.request_timeout": "rollout.request_timeout_s",
    "rollout.openai.subproc_max_workers": "rollout.openai.num_children",
    "rollout.openai.engine_max_tokens": "engine.max_model_len",
    "rollout.tokenizer_path": "tokenizer_path",
    "actor.group_size": "gconfig.n_samples",
    "actor.temperature": "gconfig.temperature",
    "actor.max_new_tokens": "gconfig.max_new_tokens",
    "actor.weight_decay": "actor.optimizer.weight_decay",
    "actor.lr": "actor.optimizer.lr",
    "actor.lora_rank": "actor.lora.rank",
    "actor.lora_alpha": "actor.lora.alpha",
    "actor.target_modules": "actor.lora.target_modules",
    "sglang": "engine",
    "vllm": "engine",
}

# Full dotted path (`*` for any characters) → what to do. The first that matches is taken.
HINTS = {
    "*.experiment_name": _ONE_RUN,
    "*.trial_name": _ONE_RUN,
    "*.fileroot": "set it once, as cluster.fileroot",
    "allocation_mode": "not needed here: the engine is chosen by engine.type",
    "*n_nodes": "not needed here: a run has one machine",
    "*n_gpus_per_node": "not needed here: devices are actor.device and engine.device",
    "cluster.name_resolve": "not needed here: the parts of a run find one another by themselves",
    "cluster.cluster_name": "not needed here: a run has one machine",
    "launcher": _NO_LAUNCHER,
    "*.scheduling_spec": _NO_LAUNCHER,
    "*.scheduling_strategy": _NO_LAUNCHER,
    "enable_offload": "not needed here: engine and learner hold one copy of the weights each",
    "ref": "not needed here: with actor.kl_ctl > 0 the reference is the policy at the start",
    "critic": "not here: advantages are relative to the group (actor.adv_norm)",
    "perf_tracer": "not here: timings are in the metrics of each step",
    "stats_logger.wandb": "not here: metrics go to TensorBoard files and JSONL",
    "stats_logger.swanlab": "not here: metrics go to TensorBoard files and JSONL",
    "rollout.queue_size": "not needed here: rollout.max_head_offpolicyness bounds what waits",
    "rollout.consumer_batch_size": "not needed here: it is train_dataset.batch_size",
    "rollout.enable_rollout_tracing": "not needed here: the journal holds every turn",
    "rollout.dump_to_file": "not needed here: the journal holds every turn",
    "rollout.backend": "the engine is chosen by engine.type",
    "*gconfig.greedy": "write temperature: 0",
    "*gconfig.min_new_tokens": "not here: the model's own stop token ends a call",
    "*gconfig.stop_token_ids": "not needed here: they are the model folder's own",
    "actor.backend": "write actor.num_processes: the learner is FSDP2",
    "actor.fsdp": "not here: the learner is FSDP2 on one machine, see actor.num_processes",
    "actor.megatron": "not here: the learner is FSDP2 on one machine, see actor.num_processes",
    "actor.archon": "not here: the learner is FSDP2 on one machine, see actor.num_processes",
    "actor.weight_update_mode": "not needed here: weights go to the engine by the engine's own way",
    "*use_lora": "write the section actor.lora; without it, all weights are trained",
    "actor.peft_type": "not needed here: actor.lora is LoRA",
    "actor.recompute_logprob": "not needed here: actor.use_decoupled_loss recomputes them",
    "actor.disable_dropout": "not needed here: dropout is always off",
    "actor.init_from_scratch": "not here: actor.warm_start makes a model where there is none",
    "actor.reward_scaling": "not here: scale the reward in the agent, or see actor.adv_norm",
    "actor.reward_bias": "not here: shift the reward in the agent, or see actor.adv_norm",
    "actor.reward_norm": "advantages are normalised within the group: see actor.adv_norm",
    "actor.m2_threshold": "not here: see actor.rejection_sampling",
    "actor.use_sapo_loss": "not here: see actor.objective",
    "actor.behave_imp_weight_cap": "write actor.rejection_sampling.upper",
    "actor.behave_imp_weight_mode": "write actor.rejection_sampling (level, action, agg)",
    "actor.optimizer.offload": "not here: the optimizer lives beside the weights",
    "*_dataset.type": "not needed here: every dataset is one of tasks for RL",
    "*_dataset.pin_memory": "not needed here: tasks are plain rows",
    "*_dataset.num_workers": "not needed here: tasks are plain rows",
    "*_dataset.max_length": "not here: filter the tasks, or see engine.max_model_len",
    "*_dataset.drop_last": "not needed here: an epoch is made of whole batches",
}


def hint(path: str) -> str | None:
    """What to do about AReaL's key `path`; None where it is not one of these."""
    for pattern, text in HINTS.items():
        if fnmatchcase(path, pattern):
            return text
    return None
