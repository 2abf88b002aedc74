"""The configuration of a run: AReaL's key names wherever it has one, one name per setting.

Pure data (pydantic, strict, frozen): no file access, no defaults that depend on the machine.
`load.py` makes one of these from YAML and overrides and turns every problem into a `ConfigError`.
"""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""What every generator takes, numpy's 32 bits among them, also when restarts have counted it up."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ClusterConfig(Section):
    fileroot: str = "runs"
    """Folder of all runs; this run lives in `fileroot/experiment_name/trial_name`."""


class SchedulerConfig(Section):
    type: Literal["local"] = "local"
    """Where the processes of a run are started."""
    max_restarts: NotNegative = 5
    """How often engine, proxy and supervisor may each be started again, within
    `restart_window_s`; one more end of it is the end of the run."""
    restart_window_s: PositiveFloat = 3600.0


class DeadlinesConfig(Section):
    """Limits of the waits between the processes of a run, in seconds; see `docs/deadlines.md`.
    What agents get is `rollout.timeout_s`, `rollout.request_timeout_s` and
    `rollout.openai.reward_timeout_s`; what a process gets to come up, `rollout.setup_timeout_s`."""

    heartbeat_s: PositiveFloat = 60.0
    """Engine, proxy and supervisor answer within it, or are killed and started again."""
    engine_silence_s: PositiveFloat = 180.0
    """The engine, with requests to work on, samples a token within it, or is killed and started
    again."""
    weight_update_s: PositiveFloat = 120.0
    """The engine loads new weights within it, or is killed, and another starts with them."""
    learn_s: PositiveFloat = 3600.0
    """One training step of the learner."""
    checkpoint_s: PositiveFloat = 900.0
    """Writing a checkpoint, or a recovery point."""
    control_s: PositiveFloat = 180.0
    """The trainer's calls to the proxy, a restart of the proxy included."""
    drain_s: PositiveFloat = 60.0
    """What still runs at the end of a run gets it to be stopped and recorded."""
    shutdown_s: PositiveFloat = 3.0
    """Each process gets it to end: half by itself, half by SIGTERM; then comes SIGKILL."""


class NetworkConfig(Section):
    """What a child may reach beside its model. Tier `namespaces` only."""

    allow: list[str] = []
    """`host:port` each, for agents with web tools: a name, an IP address or `*.example.com` (the
    names below it). Reached through a proxy that `HTTP_PROXY` and its like name in the child's
    environment; see `docs/security.md`."""

    @field_validator("allow")
    @classmethod
    def _are_hosts_with_ports(cls, entries: list[str]) -> list[str]:
        for entry in entries:  # what else there is to check, the sandbox does before the first run
            if not re.fullmatch(r"([^\s:/@\[\]]+|\[[^\s\]]+\]):[0-9]{1,5}", entry):
                raise ValueError(f"{entry!r} is not host:port, as in api.example.com:443")
        return entries


class SandboxConfig(Section):
    """What a child may use. Enforced per rollout."""

    tier: Literal["auto", "namespaces", "process", "bwrap", "gvisor"] = "auto"
    """Which layers: see `docs/security.md`. `auto`: `namespaces`, or `process` where that is not to
    be had. What is said of `namespaces` here holds in `bwrap`, too."""
    cgroups: Literal["auto", "off", "require"] = "auto"
    """Memory, processes and CPU of a child by a cgroup of its own: where this machine gives one
    (`auto`), never (`off`), or else no run at all (`require`). Not in the tier `gvisor`."""
    readable: list[str] = []
    """Folders and files that children can read, beside the system's, the interpreter's and those on
    their import path."""
    start: Literal["fork", "exec"] = "fork"
    """How a Python agent's child begins: `fork` of a process that has imported the agent, in
    milliseconds; `exec` of a fresh interpreter that imports it, each time, for agents whose import
    you do not trust with its siblings either."""
    recycle_after: Positive = 10_000
    """Children that one such process may serve, until a fresh one takes its place."""
    workspace: str | None = None
    """A folder whose content each child finds in its working directory, as its own; relative to the
    trainer's. `{field}` stands for that field of the task, which has to be a plain name:
    `tasks/{id}/repo`. What is around all of them (`tasks`) is hidden from agents."""
    outputs: list[str] = []
    """Files and folders in the child's working directory that come out of it at its end; `*`, `?`
    and `[...]` may stand in their parts."""
    mounts: dict[str, str] = {}
    """More that children can read, at other paths: path inside → path outside. Tier `namespaces`
    only."""
    reserve: NotNegative = 8
    """Sealed children that stand ready, so that a rollout need not wait for one. They have copied
    the memory that a first model call touches (some 12 MB each), which is most of what the call
    costs a fresh child. Filled again while no rollout begins."""
    network: NetworkConfig = NetworkConfig()
    max_output_bytes: Positive = 4 * 2**20
    """stdout and stderr together; more ends the child with `output_limit`."""
    max_result_bytes: Positive = 1 * 2**20
    max_memory_bytes: Positive = 8 * 2**30
    """What all processes of the child use together: by cgroups; without, that is looked at twice a
    second, in the tier `namespaces` only. And address space of each process: as much in the tier
    `process` (Node's `fetch` alone reserves 10 GiB), eight times that in the others."""
    max_file_bytes: Positive = 1 * 2**30
    max_open_files: Positive = 1024
    max_cpu_s: Positive = 3600
    """CPU seconds of each process of the child; with cgroups, or in the tier `namespaces`, also of
    all together."""
    max_processes: Positive = 256
    """Processes and threads of a child. With cgroups, or in the tier `namespaces`."""
    max_scratch_bytes: Positive = 512 * 2**20
    """All files of a child together; they lie in memory. Tier `namespaces` only."""
    max_scratch_files: Positive = 65_536
    """Files and folders of a child. Tier `namespaces` only."""
    max_terminals: NotNegative = 0
    """Pseudo-terminals of a child, for agents that drive others by tmux or pexpect (8 will do); 0:
    not even the device that makes them. Tiers `namespaces` and `bwrap` only."""
    max_workspace_bytes: Positive = 256 * 2**20
    """All files of one workspace together."""
    max_outputs_bytes: Annotated[int, Field(gt=0, le=128 * 2**20)] = 16 * 2**20
    """All outputs of one child together."""

    @field_validator("workspace")
    @classmethod
    def _fields_are_plain(cls, value: str | None) -> str | None:
        try:
            parsed = list(string.Formatter().parse(value or ""))
        except ValueError as error:
            raise ValueError(f"{value}: {error}; a plain brace is written twice") from None
        for _, field, spec, conversion in parsed:
            if field is not None and (not field.isidentifier() or spec or conversion):
                raise ValueError(f"{value}: {{{field}}} is not the name of a field of the task")
        return value


class CommandConfig(Section):
    """An agent that is a program; see `docs/agents.md`. In the templates `{question}` stands for
    that field of the task, and `{base_url}`, `{api_key}`, `{model}` for the rollout's own."""

    argv: list[str]
    """Templates of the program and its words; no shell reads them."""
    stdin: str = ""
    """Template of what it reads."""
    files: dict[str, str] = {}
    """Written before it starts: path below its working directory, or `~/path`, → template."""
    env: dict[str, str] = {}
    """Templates of more variables."""
    reward: str = "last_line"
    """`last_line`: the last line of its stdout is a number, or JSON with a field `reward`;
    `file:PATH`: the last line of that file in its working directory; `exit_code`: 0 is the reward
    1, every other code is 0."""

    @field_validator("argv")
    @classmethod
    def _names_a_program(cls, argv: list[str]) -> list[str]:
        if not argv or not argv[0]:
            raise ValueError("write a program and its words: [node, agent.js, '{question}']")
        return argv

    @field_validator("reward")
    @classmethod
    def _can_be_found(cls, reward: str) -> str:
        kind, _, path = reward.partition(":")
        if reward not in ("last_line", "exit_code") and not (kind == "file" and path):
            raise ValueError(f"{reward!r} is none of last_line, exit_code, file:PATH")
        if path.startswith("/") or ".." in path.split("/") or any(c in path for c in "*?["):
            raise ValueError(f"{path!r} is not the path of one file below the working directory")
        return reward

    @field_validator("files")
    @classmethod
    def _stays_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for path in files:
            inside = path.removeprefix("~/")
            if not inside or inside.startswith("/") or ".." in inside.split("/"):
                raise ValueError(f"{path!r} is neither below the working directory nor ~/path")
        return files


class AgentConfig(Section):
    """One agent of several."""

    workflow: str | None = None
    """Import path of the agent, or `cmd:program word ...`."""
    workflow_kwargs: dict[str, Any] = {}
    command: CommandConfig | None = None
    """Instead of `workflow`."""
    agent_env: str | None = None
    agent_python: str | None = None
    weight: PositiveFloat = 1.0
    """Its share of the groups, relative to the others'."""

    @model_validator(mode="after")
    def _is_one_agent(self) -> Self:
        if (self.workflow is None) == (self.command is None):
            raise ValueError("set either workflow or command")
        if self.workflow_kwargs and is_program(self.workflow):
            raise ValueError("workflow_kwargs are for Python agents; a program has its words")
        return self


class OpenAIConfig(Section):
    """How agents are run and how their model calls are captured."""

    mode: Literal["inline", "subproc"] = "subproc"
    """`inline`: in the trainer's event loop (trusted agents only); `subproc`: each in a fresh
    child."""
    export_style: Literal["concat", "individual"] = "concat"
    """`concat`: one training sample per root-to-leaf branch; `individual`: one per turn."""
    turn_discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Backward: reward[i] += turn_discount * reward[i+1], in order of creation."""
    credit: Literal["all", "main", "per_branch"] = "all"
    """Which turns learn from which reward. `all`: every turn from the rollout's, in order of
    creation, as AReaL does; `main`: only the main conversation is trained; `per_branch`: each turn
    from what came of its own branch. `docs/trees.md` says how each is counted, and what is never
    trained."""
    tool_call_parser: str = "auto"
    """How tool calls are written by the model: `hermes`, `qwen3_coder`, `llama3_json`, `pythonic`,
    `mistral`, `gemma4`, `harmony` or `none`; `auto`: as its chat template writes them."""
    reasoning_parser: str = "none"
    """How reasoning is written by the model: `think` for `<think>…</think>` in front of the answer,
    which agents then get as the reasoning of their dialect; `none`: it stays in the text. Formats
    that write it with control tokens (harmony, gemma4, mistral) always tell it apart."""
    chat_template: str | None = None
    """A Jinja file to use instead of the model folder's own template."""
    max_turns: Positive = 64
    """Model calls per rollout; more are answered with an error."""
    agent_env: str | None = None
    """The environment that agents run in; by default our own. A virtual environment's folder, an
    interpreter, or a requirements file or `pylock.toml`, from which one is built and kept; for
    programs also a folder with a `package.json`. Mode `subproc` only; see `docs/agents.md`."""
    agent_python: str | None = None
    """The interpreter to build `agent_env` with, by name or path; default: our own."""
    agent_env_timeout_s: PositiveFloat = 1800.0
    """Limit for building it."""
    command: CommandConfig | None = None
    """An agent that is a program, instead of `workflow`."""
    agents: dict[str, AgentConfig] = {}
    """Several agents by name, instead of `workflow`; each group of rollouts is one agent's, drawn
    by weight."""
    env: dict[str, str] = {}
    """Added to each child's environment. `{base_url}` and the other addresses of a program's
    templates are the rollout's in the values, too."""
    silence: bool = True
    """Set the variables that keep SDKs and programs from telemetry, updates and questions."""
    env_passthrough: list[str] = []
    """Names of the trainer's own environment variables that children may see."""
    python_path: list[str] = []
    """Folders put in front of the children's import path (the working directory is always in
    it)."""
    num_children: Positive | None = None
    """Children alive at once; default: `rollout.max_concurrent_rollouts`."""
    reward: str = "agent"
    """Who says what a rollout is worth. `agent`: the agent, by what it returns. Or a grader's
    import path, `package.module:grade`, which runs when the agent is gone, in a sandbox of its own;
    what the agent returns is then a claim, and never used. See `docs/rewards.md`."""
    reward_kwargs: dict[str, Any] = {}
    """Passed to the grader, or to its constructor where it is a class."""
    reward_timeout_s: PositiveFloat = 60.0
    """Wall-clock limit of the grader for one rollout."""
    reward_max_memory_bytes: Positive = 8 * 2**30
    """Of the grader's child, as `sandbox.max_memory_bytes` is of the agent's. Its other limits are
    the agent's."""
    sandbox: SandboxConfig = SandboxConfig()

    @field_validator("agents")
    @classmethod
    def _have_plain_names(cls, agents: dict[str, AgentConfig]) -> dict[str, AgentConfig]:
        for name in agents:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(f"{name!r}: write up to 64 letters, digits, '_' and '-'")
        return agents

    @field_validator("reward")
    @classmethod
    def _is_agent_or_import_path(cls, value: str) -> str:
        if value != "agent" and not re.fullmatch(r"[\w.]+[.:][\w.]+", value):
            raise ValueError(f"{value!r} is neither 'agent' nor a grader's import path")
        return value

    @model_validator(mode="after")
    def _kwargs_need_a_grader(self) -> Self:
        if self.reward == "agent" and self.reward_kwargs:
            raise ValueError("reward_kwargs are a grader's, and reward=agent is none")
        return self

    @model_validator(mode="after")
    def _inline_has_no_children(self) -> Self:
        if self.mode == "inline":
            wanted = {
                "command": self.command is not None,
                "agent_env": self.agent_env is not None,
                "agents with a command": any(a.command for a in self.agents.values()),
                "agents with cmd:": any(is_program(a.workflow) for a in self.agents.values()),
                "agents with an agent_env": any(a.agent_env for a in self.agents.values()),
            }
            for name, is_set in wanted.items():
                if is_set:
                    raise ValueError(f"{name} needs mode=subproc: inline is this very process")
        if self.command is not None and self.agents:
            raise ValueError("set either command or agents")
        return self

    @model_validator(mode="after")
    def _files_need_children(self) -> Self:
        if self.mode == "inline" and (self.sandbox.workspace or self.sandbox.outputs):
            raise ValueError("sandbox.workspace and sandbox.outputs need mode=subproc")
        return self


def is_program(workflow: str | None) -> bool:
    """Written as `cmd:program word ...`."""
    return workflow is not None and workflow.startswith("cmd:")


class FailuresConfig(Section):
    """What is done about training rollouts that did not complete; see `docs/rewards.md`."""

    agent_reward: float | None = None
    """Reward of a rollout that failed by its agent's own fault (it raised, hung, used too much of
    something, returned no reward), which is then trained with it; null: it is not trained."""
    policy_reward: float | None = None
    """The same for one that failed as the model's context or `max_new_tokens`, or
    `rollout.openai.max_turns`, was used up."""
    retries: dict[Literal["lost", "start_failed", "grader_failed"], NotNegative] = {
        "lost": 3,
        "start_failed": 1,
        "grader_failed": 1,
    }
    """How often a rollout is run again that our own processes failed, by how it ended. After that
    it is left out of its group."""
    incomplete_groups: Literal["fill", "survivors", "drop"] = "survivors"
    """Groups with fewer than `gconfig.n_samples` rollouts to train: `fill` runs more, as many again
    at most; `survivors` trains two or more without the others; `drop` gives the group up."""


class RolloutConfig(Section):
    max_concurrent_rollouts: Positive = 64
    max_pending_bytes: Positive = 2 * 2**30
    """Tokens, logprobs and versions, in the trainer's memory, of rollouts that run or wait to be
    trained: above it no group is started, unless a batch waits for nothing else."""
    max_head_offpolicyness: NotNegative = 1
    """Largest staleness, in policy versions, that a trained trajectory may have. 0: synchronous."""
    over_stale: Literal["drop", "reweight"] = "drop"
    """What becomes of a rollout that took so long that it is older all the same: left out, or
    trained with the weights of `actor.use_decoupled_loss`; `actor.rejection_sampling` bounds
    them."""
    timeout_s: PositiveFloat = 300.0
    """Wall-clock limit of one rollout."""
    request_timeout_s: PositiveFloat = 300.0
    """Limit of one model call, waiting in the engine's queue included."""
    setup_timeout_s: PositiveFloat = 120.0
    """Limit for engine, proxy and pool to come up."""
    failures: FailuresConfig = FailuresConfig()
    replay_from: str | None = None
    """Folder of a recorded run, whose rollouts are trained from instead of running agents (for
    evaluation they are run). However old they are: see `actor.use_decoupled_loss`."""
    openai: OpenAIConfig = OpenAIConfig()


class GenerationConfig(Section):
    """Sampling defaults; `n_samples` is the group size. What the agent asks for wins, except
    that training tokens are always sampled at `temperature` and `top_p` (see `override_agent`)."""

    n_samples: Positive = 8
    max_new_tokens: Positive = 512
    """Per model call; also the ceiling for what an agent may ask for."""
    temperature: NotNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NotNegative = 0
    """0: off."""
    override_agent: bool = True
    """True: `temperature`, `top_p` and `top_k` from here hold whatever the agent asks for, as RL
    needs the distribution that is trained to be the one sampled from. False: the agent's hold."""


class OptimizerConfig(Section):
    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-5
    weight_decay: NotNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    gradient_clipping: PositiveFloat = 1.0
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.0
    warmup_steps_proportion: Fraction = 0.0
    """Share of `total_train_steps` over which the learning rate rises linearly from 0."""


class MicroBatchConfig(Section):
    max_tokens_per_mb: Positive = 16384
    """Tokens of one forward pass, padding included. Samples share rows where the model keeps them
    apart."""


class RejectionSamplingConfig(Section):
    """Which sampled tokens are too far from the policy before the step, and what is done then. The
    corrections in use are spelled out in `docs/algorithms.md`."""

    level: Literal["token", "sequence"] = "token"
    action: Literal["mask", "clamp"] = "mask"
    """`mask`: they give no gradient; `clamp`: their weight is held to the bounds."""
    metric: Literal["ratio", "kl_k1", "kl_k2", "kl_k3"] = "ratio"
    agg: Literal["sum", "mean", "max"] = "mean"
    """Over the tokens of a sequence; of a ratio, of its logarithm."""
    upper: PositiveFloat = 5.0
    lower: float | None = None

    @model_validator(mode="after")
    def _bounds_are_of_the_metric(self) -> Self:
        if self.action == "clamp" and self.metric != "ratio":
            raise ValueError("action=clamp bounds the ratio: set metric=ratio")
        if self.action == "clamp" and self.level == "sequence" and self.agg == "max":
            raise ValueError("agg=max only decides, it is no weight to clamp")
        if self.lower is not None and self.lower >= self.upper:
            raise ValueError(f"lower={self.lower} is not below upper={self.upper}")
        return self


class LoraConfig(Section):
    """Low-rank adapters, by peft: the policy's weights stay as they are, and two small matrices
    beside each target layer learn. Without dropout, as the sampler has none. Needs `num_processes`
    1; see `docs/algorithms.md`."""

    rank: Positive = 16
    alpha: Positive = 32
    """The adapter's product counts `alpha / rank`."""
    target_modules: list[str] = ["all-linear"]
    """Names, or ends of names, of linear layers, as in `[q_proj, v_proj]`; `[all-linear]`: all but
    the output embedding."""

    @field_validator("target_modules")
    @classmethod
    def _are_some(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("an adapter needs a layer: write [all-linear], or lora: null")
        return names


class ActorConfig(Section):
    """The policy and how it learns."""

    path: str
    """A Hugging Face model folder, or a hub name."""
    warm_start: str | None = None
    """Import path of `def make(path: Path, seed: int) -> None`: called once where `path` is
    not there yet, to make the model folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str = "auto"
    """"auto": CUDA where there is one, else the CPU."""
    num_processes: Positive = 1
    """Processes of the learner on this machine, each with a share of the batch and a shard of
    weights and optimizer (FSDP2). On GPUs each has one of its own."""
    rank_timeout_s: PositiveFloat = 600.0
    """Limit of any wait of one such process for another."""
    num_threads: Positive | None = None
    """torch threads of the learner; default: torch's own."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    """Null: all weights are trained."""
    mb_spec: MicroBatchConfig = MicroBatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ppo_n_minibatches: Positive = 1
    """Optimizer steps per training batch."""
    objective: Literal["ppo", "cispo"] = "ppo"
    """What the ratio does: `ppo` clips the objective, `cispo` clips the weight of each token's
    gradient; see `docs/algorithms.md`."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's, or the geometric mean over the sequence (GSPO; then `eps_clip`
    wants to be some 3e-4)."""
    eps_clip: PositiveFloat = 0.2
    eps_clip_higher: PositiveFloat | None = None
    """Upper clip of the ratio where it differs from `eps_clip` (DAPO's clip-higher)."""
    c_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: largest ratio that counts where the advantage is negative."""
    adv_norm: Literal["none", "mean", "mean_std", "leave_one_out", "mean_batch_std"] = "mean_std"
    """Within the group: subtract the mean (Dr. GRPO) and divide by the group's standard deviation
    (GRPO, `mean_std`) or by the whole batch's (REINFORCE++-baseline, `mean_batch_std`); or subtract
    the mean of the others (RLOO, `leave_one_out`)."""
    loss_agg_mode: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """What weighs the same in the loss: each token, each sequence, or each token by a constant
    (Dr. GRPO)."""
    loss_agg_constant: PositiveFloat | None = None
    """With `loss_agg_mode: constant`: tokens that a sequence is taken to have, such as the most
    that it may."""
    kl_ctl: NotNegativeFloat = 0.0
    """Weight of the KL penalty to the reference policy; 0: no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_decoupled_loss: bool = False
    """Decoupled PPO: ratio against the policy before the step, behaviour policy as a weight."""
    prox_logp_method: Literal["recompute", "loglinear"] = "recompute"
    """How the policy before the step is had, with the decoupled loss: by a forward pass, or from
    sampler's and learner's logprobs by the versions of the tokens."""
    rejection_sampling: RejectionSamplingConfig | None = None
    """With the decoupled loss: how that weight is bounded."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.rejection_sampling is not None and not self.use_decoupled_loss:
            raise ValueError("rejection_sampling bounds the weight of use_decoupled_loss: set that")
        if self.c_clip is not None and self.objective == "cispo":
            raise ValueError("c_clip is of objective=ppo; cispo bounds every ratio")
        if (self.loss_agg_mode == "constant") != (self.loss_agg_constant is not None):
            raise ValueError("loss_agg_mode=constant and loss_agg_constant go together")
        if self.lora is not None and self.num_processes > 1:
            raise ValueError(
                "lora is trained by one process, what it trains is small: set num_processes=1"
            )
        return self


class VllmConfig(Section):
    """A vLLM of 0.29 or later: one that is started, or those that run already, which may be
    SGLang's, too. `docs/vllm.md`."""

    python: str | None = None
    """The interpreter of an environment with vLLM in it: a server is started with it."""
    urls: list[str] = []
    """Servers that run already, `http://host:port` each, instead of `python`. They have to read
    this machine's files."""
    args: list[str] = []
    """More flags for the server that is started, as in `["--enforce-eager"]`."""
    env: dict[str, str] = {}
    """Added to its environment."""
    start_timeout_s: PositiveFloat = 600.0
    """Limit for it to load the model and serve."""
    update_timeout_s: Annotated[float, Field(gt=0, le=110)] = 100.0
    """Limit of one weight update, all servers and the check after it included."""
    max_restarts: NotNegative = 3
    """How often in a run a server that died is started again."""
    max_retries: NotNegative = 3
    """How often a model call goes on after the server under it has died."""

    @field_validator("urls")
    @classmethod
    def _are_http(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not re.fullmatch(r"https?://[^\s/]+/?", url):
                raise ValueError(f"{url!r} is not http://host:port")
        return urls


class EngineConfig(Section):
    type: Literal["embedded", "vllm"] = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: the actor's."""
    device: str = "auto"
    num_threads: Positive | None = None
    max_running_requests: Positive = 64
    """Sequences decoded at once."""
    max_model_len: Positive | None = None
    """Prompt and new tokens together; default: the model's own limit, at most 4096."""
    vllm: VllmConfig = VllmConfig()
    """Only with `type: vllm`."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        vllm = self.vllm
        if self.type == "embedded":
            if vllm.python is not None or vllm.urls:
                raise ValueError("engine.vllm is set, but engine.type is embedded, not vllm")
            return self
        if (vllm.python is None) == (not vllm.urls):
            raise ValueError(
                "type=vllm needs either vllm.python (the interpreter that has vLLM; a server is "
                "started with it) or vllm.urls (servers that run already)"
            )
        if vllm.urls and (vllm.args or vllm.env):
            raise ValueError("vllm.args and vllm.env are for a server that is started: vllm.python")
        if self.device != "auto" or self.num_threads is not None:
            raise ValueError(
                "device and num_threads are the embedded engine's; vLLM has its own variables for "
                "both, set in vllm.env (CUDA_VISIBLE_DEVICES, VLLM_CPU_OMP_THREADS_BIND)"
            )
        return self


class DatasetConfig(Section):
    path: str
    """A JSONL file, `reasoning-gym:TASK`, a `module:function` that yields tasks (it is called with
    `split=`, `seed=`, `size=` and what is in `dataset_kwargs`), or a dataset name on the Hugging
    Face hub."""
    split: str = "train"
    batch_size: Positive = 8
    """Tasks per training step (each gets `gconfig.n_samples` rollouts)."""
    shuffle: bool = True
    size: Positive | None = None
    """Use (or, for a generator, make) this many tasks; reasoning-gym makes 500 by default."""
    dataset_kwargs: dict[str, Any] = {}
    """For generators: reasoning-gym's task parameters, the function's arguments, ..."""


class FrequencyConfig(Section):
    freq_epochs: Positive | None = None
    freq_steps: Positive | None = None
    freq_secs: Positive | None = None


class SaverConfig(FrequencyConfig):
    keep: Positive = 2
    """Checkpoints kept beside the final one."""


class JournalConfig(Section):
    """The record of all rollouts; see `docs/wire-format.md`."""

    segment_bytes: Positive = 64 * 2**20
    """A file of it is closed, and the next begun, at this size."""
    retain_bytes: Positive | None = None
    """Its oldest files are removed above this size, once all rollouts in them are done with; null:
    none is. `areal-sub inspect` then tells of those rollouts only what became of them."""
    retain_age_s: PositiveFloat | None = None
    """The same for files that were last written to so long ago."""
    fsync: Literal["never", "end", "always"] = "never"
    """When records are safe from a power cut (a process's death harms none): when the kernel writes
    them out, when a rollout's end is acknowledged, or each at once. What it costs is in
    `docs/wire-format.md`."""


class RecoverConfig(FrequencyConfig):
    mode: Literal["disabled", "auto"] = "disabled"
    """`auto`: go on from the last recovery point of this experiment and trial, if there is one.
    Model and training tasks have to be those that it was begun with; other keys may change."""


class EvaluatorConfig(FrequencyConfig):
    eval_before_train: bool = False


class StatsLoggerConfig(Section):
    tensorboard: bool = True
    plot: bool = True
    """Write the reward curve as a PNG at the end."""


class Config(Section):
    experiment_name: str
    trial_name: str
    seed: Seed = 1
    total_train_epochs: Positive = 1
    total_train_steps: Positive | None = None
    """Stop after this many steps, whatever `total_train_epochs` says."""
    tokenizer_path: str | None = None
    """Default: `actor.path`."""
    workflow: str | None = None
    """Import path of the agent: `package.module.Name` or `package.module:Name`; or a program:
    `cmd:node agent.js {question}`."""
    eval_workflow: str | None = None
    """Default: `workflow`."""
    workflow_kwargs: dict[str, Any] = {}
    """Passed to the agent's constructor."""
    cluster: ClusterConfig = ClusterConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    rollout: RolloutConfig = RolloutConfig()
    gconfig: GenerationConfig = GenerationConfig()
    eval_gconfig: GenerationConfig | None = None
    """Default: `gconfig` with one sample per task."""
    actor: ActorConfig
    engine: EngineConfig = EngineConfig()
    train_dataset: DatasetConfig | None = None
    valid_dataset: DatasetConfig | None = None
    journal: JournalConfig = JournalConfig()
    saver: SaverConfig = SaverConfig()
    recover: RecoverConfig = RecoverConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    stats_logger: StatsLoggerConfig = StatsLoggerConfig()

    @field_validator("experiment_name", "trial_name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
            raise ValueError(
                f"{name!r} names a folder: write up to 128 letters, digits, '.', '_' and '-', "
                "with a letter or digit first"
            )
        return name

    @model_validator(mode="after")
    def _stale_has_weights(self) -> Self:
        if self.rollout.over_stale == "reweight" and not self.actor.use_decoupled_loss:
            raise ValueError(
                "rollout.over_stale=reweight needs the weights of actor.use_decoupled_loss=true"
            )
        return self

    @model_validator(mode="after")
    def _is_one_agent(self) -> Self:
        openai = self.rollout.openai
        for other in ("agents", "command"):
            if self.workflow is not None and getattr(openai, other):
                raise ValueError(f"set either workflow or rollout.openai.{other}")
        for name, workflow in (
            ("workflow", self.workflow),
            ("eval_workflow", self.eval_workflow),
        ):
            if is_program(workflow) and openai.mode == "inline":
                raise ValueError(f"{name}={workflow}: a program needs rollout.openai.mode=subproc")
        if self.workflow_kwargs and is_program(self.workflow):
            raise ValueError("workflow_kwargs are for Python agents; a program has its words")
        return self
