"""The schema of a recipe: every key, its default and its bounds. Reading the YAML is :mod:`rlhf_t2i.recipe.reading`.

Nothing here imports torch, so that a refused recipe answers at once.
"""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

ROLES = ("learner", "generator", "assistant", "reference", "reward")

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]


def _no_control(text: str) -> str:
    """Names become parts of files, environment variables and lines on a terminal."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError("must hold no control characters")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_no_control)]
Source = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_control)]
Timestep = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=8, le=8192)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Checkpointed = Literal["learner", "assistant", "reference", "reward"]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of the recipe's sections: strict types, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Models(Section):
    """Which networks; each a local folder (``./``, ``../``, ``~`` or ``/``) or a hub id, ``org/name@revision``."""

    reference: Source = Field(
        description="diffusers pipeline of the frozen reference; its text encoders and VAE are used"
    )
    generator: Source = Field(
        description="the network to align: its folder, a pipeline folder, or a .bin or .safetensors file"
    )
    assistant: Source | None = Field(None, description="where the assistant starts; the reference when absent")
    vae: Source | None = Field(None, description="another VAE for decoding (fp16-fix, or a tiny autoencoder)")
    vae_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the decoder; bf16 has float32's range, so that nothing overflows, but 8 bits: coarser"
    )
    vae_slicing: bool = Field(
        False, description="decode one image at a time: the same pictures, less memory where no gradient is taken"
    )
    vae_tiling: bool = Field(
        False, description="decode in overlapping tiles, blended: less memory, but slightly other pictures"
    )
    height: Pixels | None = Field(None, description="of the images, in pixels; the reference's own size when absent")
    width: Pixels | None = Field(None, description="of the images, in pixels; the reference's own size when absent")


class StudentSettings(Section):
    """How the generator is called: in one step, or in a few."""

    steps: int = Field(1, ge=1, le=64, description="K, network calls per image; its timesteps are the model family's")
    timesteps: Annotated[list[Timestep], Field(min_length=1, max_length=64)] | None = Field(
        None, description="the K timesteps in thousandths, falling, in place of the family's own"
    )
    transition: Literal["stochastic", "deterministic"] = Field(
        "stochastic", description="between steps: fresh noise, or the noise that the prediction implies"
    )
    input: Literal["unit", "sigma"] = Field(
        "unit", description="what the first step gets: unit noise, or noise scaled by its level (SiD-LSG)"
    )

    @model_validator(mode="after")
    def _falling(self) -> StudentSettings:
        taus = self.timesteps
        if taus is None:
            return self
        if any(a <= b for a, b in pairwise(taus)):
            raise ValueError(f"timesteps must fall from step to step, not {taus}")
        if "steps" in self.model_fields_set and self.steps != len(taus):
            raise ValueError(f"steps is {self.steps} but there are {len(taus)} timesteps: leave steps out")
        return self


class Data(Section):
    """Prompts: a text file one a line, jsonl, or csv."""

    prompts: Source = Field(description="the prompts to train on")
    column: Name = Field("prompt", description="the key of a jsonl object or the csv column that holds the prompt")
    held_out: Source | None = Field(
        None,
        description="prompts no step trains on, for previews and the table before/after; else training's",
    )


class PluginChoice(Section):
    """A plugin by registered name or ``path/to/file.py:Class``, with its options."""

    name: Name
    options: dict[str, Any] = Field(default_factory=dict, description="the plugin's own options")


class RewardChoice(PluginChoice):
    """A reward, its weight in the objective and how its actor is called."""

    scale: float = Field(1.0, allow_inf_nan=False, ge=-1e9, le=1e9, description="alpha_r of (3.3); rewards: only")
    label: Name | None = Field(None, description="the name in metrics; the plugin's name when absent")
    micro_batch: Size | None = Field(None, description="images a call of score(); the whole request when absent")
    timeout_s: Positive = Field(600.0, description="a longer call stops the run over Ray; placement: local waits")

    @property
    def key(self) -> str:
        """The name used in metrics and error messages; a file's class without a label goes by its own name."""
        return self.label or (self.name.rpartition(":")[2] if ".py:" in self.name else self.name)


class Guidance(Section):
    """Classifier-free guidance of the reference (algorithm.md 1.5)."""

    mode: Literal["inner", "outer"] = Field(
        "inner", description="Choice 2 (inner, DI*-In) or Choice 1 (outer, DI*-Out)"
    )
    guidance_scale: NonNegative = Field(7.5, description="alpha_cfg; 0 means no guidance")
    convention: Literal["omega", "one_plus"] = Field("omega", description="omega = scale, or 1 + scale")


class Timesteps(Section):
    """How training timesteps are drawn, in thousandths, 0 (data) to 1000 (noise)."""

    generator: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[first, last] of the divergence's t; [20, 979] (flow matching: [20, 980]) when absent"
    )
    assistant: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[first, last] of the assistant's t; all (flow matching: [20, 980]) when absent"
    )
    law: Literal["uniform", "shifted", "logit_normal"] | None = Field(
        None, description="their distribution; uniform when absent (flow matching: shifted, as the reference)"
    )
    shift: Positive | None = Field(None, description="k of shifted, s = k u / (1 + (k - 1) u); the reference's own")
    mean: float = Field(0.0, ge=-10, le=10, description="of logit_normal")
    std: Positive = Field(1.0, description="of logit_normal")

    @field_validator("generator", "assistant")
    @classmethod
    def _ordered(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"must be [first, last] with first <= last, not {value}")
        return value


class Algorithm(Section):
    """The objective (3.3): rewards, divergence, guidance and the assistant's schedule."""

    divergence: PluginChoice = PluginChoice(name="pseudo_huber")
    weighting: Literal["unit_x0", "inv_mean_abs", "score", "eps"] = Field(
        "unit_x0", description="w(t), see algorithm.md"
    )
    rewards: list[RewardChoice] = Field(default_factory=list, description="train; none makes SIM or Diff-Instruct")
    eval_rewards: list[RewardChoice] = Field(default_factory=list, description="only measured, never trained on")
    cfg: Guidance = Guidance()
    assistant_steps: int = Field(1, ge=0, le=1000, description="K_TA: assistant updates for each generator update")
    assistant_warmup: int = Field(0, ge=0, le=1_000_000, description="assistant updates before the first generator one")
    timesteps: Timesteps = Timesteps()
    reward_steps: Literal["all", "last"] = Field(
        "all", description="which of the generator's steps a reward trains: each, or its last one alone"
    )

    @model_validator(mode="after")
    def _unique_labels(self) -> Algorithm:
        keys = [r.key for r in [*self.rewards, *self.eval_rewards]]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated:
            raise ValueError(f"two rewards are called {repeated!r}: give one a label of its own")
        return self


class Lora(Section):
    """Low-rank adapters: they alone are trained, and are merged into the weights that are sampled and exported."""

    rank: int = Field(64, ge=1, le=4096, description="inner dimension of an adapter")
    alpha: Positive | None = Field(None, description="an adapter is scaled by alpha / rank; the rank when absent")
    targets: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="ends of the names of linear layers; the attention layers of the model family when absent"
    )


class Optimizer(Section):
    """AdamW with a linear warm-up to a constant rate, and clipping by global norm."""

    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw is torch's fused one; adamw_8bit has states of a byte (bitsandbytes, CUDA only)"
    )
    lr: Positive = Field(1e-6, description="the learning rate after warm-up")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.0, 0.999], min_length=2, max_length=2, description="Adam's decay rates"
    )
    eps: Positive = Field(1e-8, description="Adam's epsilon")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="updates of linear warm-up")
    max_grad_norm: Positive = Field(10.0, description="gradients are clipped to this global norm")
    lora: Lora | None = Field(None, description="train adapters instead of the whole network")


class Ema(Section):
    """Exponential moving average of the generator's weights, by half-life in thousands of images (SiD's rule)."""

    half_life_kimg: Positive = Field(description="thousands of images after which a weight counts half")
    rampup: Positive = Field(0.05, description="the half-life never exceeds this fraction of the images seen")


class Optimization(Section):
    """Batches, precision and both optimizers."""

    batch_size: Size = Field(128, description="images a generator update (and an assistant update), over all ranks")
    micro_batch: Size | None = Field(None, description="images a rank handles at once; all of its share when absent")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute; master weights are float32")
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage of learner and assistant")
    offload_optimizer: bool = Field(False, description="ZeRO-Offload: optimizer states in host memory")
    max_bad_steps: int = Field(
        3,
        ge=0,
        le=1_000_000,
        description="updates of a network in a row that may be skipped, their gradient not being finite",
    )
    gradient_checkpointing: bool | Annotated[list[Checkpointed], Field(min_length=1)] = Field(
        False, description="recompute activations, of all roles or of these: less memory, more time"
    )
    compile: bool = Field(
        False,
        description="torch.compile of the blocks of networks and decoder: faster steps, after minutes of compiling",
    )
    generator: Optimizer = Optimizer()
    assistant: Optimizer = Optimizer()
    ema: Ema | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Optimization:
        for role in ("generator", "assistant"):
            optimizer: Optimizer = getattr(self, role)
            if optimizer.lora and self.zero_stage == 3:
                raise ValueError(f"{role}.lora does not work under ZeRO-3: set zero_stage to 2 (adapters are small)")
            if optimizer.kind == "adamw_8bit" and self.offload_optimizer:
                raise ValueError(f"{role}.kind adamw_8bit runs on the GPU: use it or offload_optimizer, not both")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not work under ZeRO-3, which moves weights between blocks: set zero_stage to 2"
            )
        return self

    def checkpoints(self, role: str) -> bool:
        """Whether a role recomputes its activations."""
        chosen = self.gradient_checkpointing
        return chosen if isinstance(chosen, bool) else role in chosen


class Group(Section):
    """A set of devices and the roles that share them: one process a device."""

    devices: Size = Field(1, description="processes, one a device")
    roles: list[Name] = Field(min_length=1, description=f"of {', '.join(ROLES)}, or reward:LABEL for one reward")
    threads: Size | None = Field(None, description="CPU threads per process; default: a share of the node's cores")


class Placement(Section):
    """Where the roles live: everything in one process, or Ray actors in named groups."""

    mode: Literal["ray", "local"] = Field("ray", description="local: one process, no Ray; `placement: local` for short")
    groups: dict[Name, Group] = Field(
        default_factory=lambda: {"all": Group(roles=list(ROLES))}, description="by a name of your choice"
    )
    share_devices: bool = Field(
        False, description="with fewer GPUs than processes, let several groups share one; small models only"
    )
    max_restarts: int = Field(
        3, ge=0, le=1000, description="how often a run that lost a trained process restores itself"
    )
    step_timeout_s: Positive = Field(
        3600.0, description="over Ray a call without an answer for this long ends the run; placement: local waits"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value


class Logging(Section):
    """What a run writes while it goes."""

    samples_every: Count = Field(100, description="steps between pictures of the same prompts and noise")
    sample_count: int = Field(16, ge=1, le=256, description="pictures in a preview")
    watch_every: int = Field(
        50, ge=0, le=1_000_000_000, description="steps between looks for reward hacking and bf16 drift; 0: never"
    )
    watch_images: int = Field(64, ge=2, le=1_000_000, description="of the evaluation's images, drawn again in a look")
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="besides metrics.jsonl"
    )


class Checkpoints(Section):
    """When state is saved and how many are kept."""

    every: Count = Field(100, description="generator updates between checkpoints")
    keep: Count = Field(2, description="how many of the newest are kept")
    keep_best: bool = Field(True, description="besides them, the one with the highest reward over its last steps")


class Evaluation(Section):
    """The before/after table on held-out prompts."""

    images: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        256, description="held-out images scored before and after"
    )
    images_per_prompt: Annotated[int, Field(ge=2, le=1000)] = Field(
        4, description="diversity is measured within a prompt"
    )
    batch_size: Size = Field(32, description="images drawn and scored at once")


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, le=2**62, description="of every random draw")
    steps: Count = Field(description="generator updates")
    models: Models
    student: StudentSettings = StudentSettings()
    data: Data
    algorithm: Algorithm = Algorithm()
    optimization: Optimization = Optimization()
    placement: Placement = Placement()
    logging: Logging = Logging()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    revisions: dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{40}$")]] = Field(
        default_factory=dict,
        description="commit hashes of hub models by org/name or org/name@branch; a run adds those it used",
    )
