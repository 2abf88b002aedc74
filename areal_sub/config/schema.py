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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ClusterConfig(Section):
    fileroot: str = "runs"
    """Folder of all runs; this run lives in `fileroot/experiment_name/trial_name`."""


class SchedulerConfig(Section):
    type: Literal["local"] = "local"
    """Where the processes of a run are started."""


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

    tier: Literal["auto", "namespaces", "process"] = "auto"
    """Which layers: see `docs/security.md`. `auto`: the strongest tier that this machine gives."""
    cgroups: Literal["auto", "off", "require"] = "auto"
    """Memory, processes and CPU of a child by a cgroup of its own: where this machine gives one
    (`auto`), never (`off`), or else no run at all (`require`)."""
    readable: list[str] = []
    """Folders and files that children can read, beside the system's, the interpreter's and those on
    their import path."""
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
    """Sealed children that stand ready, so that a rollout need not wait for one."""
    network: NetworkConfig = NetworkConfig()
    max_output_bytes: Positive = 4 * 2**20
    """stdout and stderr together; more ends the child with `output_limit`."""
    max_result_bytes: Positive = 1 * 2**20
    max_memory_bytes: Positive = 8 * 2**30
    """Address space of each process of the child; with cgroups also what all of them use together.
    Without, that is looked at twice a second, in the tier `namespaces` only."""
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


class OpenAIConfig(Section):
    """How agents are run and how their model calls are captured."""

    mode: Literal["inline", "subproc"] = "subproc"
    """`inline`: in the trainer's event loop (trusted agents only); `subproc`: each in a fresh
    child."""
    export_style: Literal["concat", "individual"] = "concat"
    """`concat`: one training sample per root-to-leaf branch; `individual`: one per turn."""
    turn_discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Backward: reward[i] += turn_discount * reward[i+1], in order of creation."""
    tool_call_parser: str = "hermes"
    """How tool calls are written by the model: a name in `areal_sub.proxy.parsers`."""
    chat_template: str | None = None
    """A Jinja file to use instead of the model folder's own template."""
    max_turns: Positive = 64
    """Model calls per rollout; more are answered with an error."""
    env: dict[str, str] = {}
    """Added to each child's environment."""
    env_passthrough: list[str] = []
    """Names of the trainer's own environment variables that children may see."""
    python_path: list[str] = []
    """Folders put in front of the children's import path (the working directory is always in
    it)."""
    num_children: Positive | None = None
    """Children alive at once; default: `rollout.max_concurrent_rollouts`."""
    sandbox: SandboxConfig = SandboxConfig()

    @model_validator(mode="after")
    def _files_need_children(self) -> Self:
        if self.mode == "inline" and (self.sandbox.workspace or self.sandbox.outputs):
            raise ValueError("sandbox.workspace and sandbox.outputs need mode=subproc")
        return self


class RolloutConfig(Section):
    max_concurrent_rollouts: Positive = 64
    max_head_offpolicyness: NotNegative = 1
    """Largest staleness, in policy versions, that a trained trajectory may have. 0: synchronous."""
    timeout_s: PositiveFloat = 300.0
    """Wall-clock limit of one rollout."""
    request_timeout_s: PositiveFloat = 300.0
    """Limit of one model call, waiting in the engine's queue included."""
    setup_timeout_s: PositiveFloat = 120.0
    """Limit for engine, proxy and pool to come up."""
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
    """Padded tokens of one forward pass."""


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
    num_threads: Positive | None = None
    """torch threads of the learner; default: torch's own."""
    gradient_checkpointing: bool = False
    mb_spec: MicroBatchConfig = MicroBatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ppo_n_minibatches: Positive = 1
    """Optimizer steps per training batch."""
    eps_clip: PositiveFloat = 0.2
    eps_clip_higher: PositiveFloat | None = None
    """Upper clip of the ratio where it differs from `eps_clip` (DAPO's clip-higher)."""
    adv_norm: Literal["none", "mean", "mean_std"] = "mean_std"
    """Within the group: subtract the mean, and divide by the standard deviation."""
    kl_ctl: NotNegativeFloat = 0.0
    """Weight of the KL penalty to the reference policy (the k3 estimator); 0: no reference."""
    use_decoupled_loss: bool = False
    """Decoupled PPO: ratio against the policy before the step, behaviour policy as a weight."""


class VllmConfig(Section):
    """A vLLM of 0.29 or later: one that is started, or those that run already. `docs/vllm.md`."""

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
    """A JSONL file, `reasoning-gym:TASK`, a `module:function` that yields tasks, or a dataset
    name on the Hugging Face hub."""
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


class RecoverConfig(FrequencyConfig):
    mode: Literal["disabled", "auto"] = "disabled"
    """`auto`: go on from the last recovery point of this experiment and trial, if there is one."""


class EvaluatorConfig(FrequencyConfig):
    eval_before_train: bool = False


class StatsLoggerConfig(Section):
    tensorboard: bool = True
    plot: bool = True
    """Write the reward curve as a PNG at the end."""


class Config(Section):
    experiment_name: str
    trial_name: str
    seed: int = 1
    total_train_epochs: Positive = 1
    total_train_steps: Positive | None = None
    """Stop after this many steps, whatever `total_train_epochs` says."""
    tokenizer_path: str | None = None
    """Default: `actor.path`."""
    workflow: str | None = None
    """Import path of the agent: `package.module.Name` or `package.module:Name`."""
    eval_workflow: str | None = None
    """Default: `workflow`."""
    workflow_kwargs: dict[str, Any] = {}
    """Passed to the agent's constructor."""
    cluster: ClusterConfig = ClusterConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    rollout: RolloutConfig = RolloutConfig()
    gconfig: GenerationConfig = GenerationConfig()
    eval_gconfig: GenerationConfig | None = None
    """Default: `gconfig` with one sample per task."""
    actor: ActorConfig
    engine: EngineConfig = EngineConfig()
    train_dataset: DatasetConfig | None = None
    valid_dataset: DatasetConfig | None = None
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
