"""The schema of a recipe: every key, its default and its bounds. Reading the YAML is :mod:`rlhf_t2i.recipe.reading`.

Nothing here imports torch, so that a refused recipe answers at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from rlhf_t2i.recipe import labels

ROLES = ("learner", "generator", "assistant", "reference", "reward")

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]


def _no_control(text: str) -> str:
    """Names become parts of files, environment variables and lines on a terminal."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError("must hold no control characters")
    return text


def _commit(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise ValueError("must be a commit hash, 40 digits of 0-9 and a-f")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_no_control)]
PathOrId = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_control)]
Commit = Annotated[str, AfterValidator(_commit)]
Timestep = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=8, le=8192)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Checkpointed = Literal["learner", "assistant", "reference", "reward"]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


def repeated(names: Sequence[str]) -> str | None:
    """The first name that occurs twice, or None."""
    return next((name for name in names if names.count(name) > 1), None)


class Section(BaseModel):
    """Base of the recipe's sections: strict types, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Models(Section):
    """Which networks; each a local folder (``./``, ``../``, ``~`` or ``/``) or a hub id, ``org/name@revision``."""

    reference: PathOrId = Field(
        description="diffusers pipeline of the frozen reference; its text encoders and VAE are used"
    )
    generator: PathOrId = Field(
        description="the network to align: its folder, a pipeline folder, or a .bin or .safetensors file"
    )
    assistant: PathOrId | None = Field(None, description="where the assistant starts; the reference when absent")
    vae: PathOrId | None = Field(None, description="another VAE for decoding (fp16-fix, or a tiny autoencoder)")
    vae_precision: Literal["mixed", "fp32", "bf16"] = Field(
        "mixed",
        description="precision of the decoder; mixed: float32, on CUDA with attention in bf16; bf16 does not overflow, "
        "but is coarser",
    )
    vae_slicing: bool = Field(
        False, description="decode one image at a time: same images, less memory without gradient"
    )
    vae_tiling: bool = Field(
        False, description="decode in overlapping blended tiles: less memory, slightly different images"
    )
    embeddings: PathOrId | None = Field(
        None,
        description="folder of cached prompt embeddings: prompts are encoded once, by `rlhf-t2i encode` or before the "
        "roles start, and no role loads text encoders; every node must see it",
    )
    height: Pixels | None = Field(None, description="pixels; default: the reference's own size")
    width: Pixels | None = Field(None, description="pixels; default: the reference's own size")


class StudentSettings(Section):
    """How the generator is called: in one step, or in a few."""

    steps: int = Field(1, ge=1, le=64, description="K, network calls per image; its timesteps are the model family's")
    timesteps: Annotated[list[Timestep], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="the K timesteps in thousandths, falling, in place of the family's own; of a flow-matching family "
        "the first is 1000, pure noise (t = 1), where the flow begins",
    )
    transition: Literal["stochastic", "deterministic"] = Field(
        "stochastic", description="between steps: fresh noise, or the noise that the prediction implies"
    )
    input: Literal["unit", "sigma"] = Field(
        "unit", description="what the first step gets: unit noise, or noise scaled by its level (SiD-LSG)"
    )

    @model_validator(mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("timesteps"), list) and value["timesteps"]:
            return {"steps": len(value["timesteps"]), **value}
        return value

    @model_validator(mode="after")
    def _falling(self) -> StudentSettings:
        taus = self.timesteps
        if taus is None:
            return self
        if any(a <= b for a, b in pairwise(taus)):
            raise ValueError(f"timesteps must fall from step to step, not {taus}")
        if self.steps != len(taus):
            raise ValueError(f"steps is {self.steps} but timesteps has {len(taus)}: leave steps out")
        return self


class Data(Section):
    """Prompts: a file, a folder of files, or a dataset of the hub (docs/recipes.md, "Prompts")."""

    prompts: PathOrId = Field(description="the prompts to train on")
    column: Name = Field("prompt", description="the JSON key or the table column that holds the prompt")
    held_out: PathOrId | None = Field(
        None,
        description="prompts that data.prompts does not hold, for previews and the before/after table; default: those",
    )


class PluginChoice(Section):
    """A plugin by registered name or ``path/to/file.py:Class``, with its options."""

    name: Name
    options: dict[str, Any] = Field(default_factory=dict, description="options of the plugin")


class RewardChoice(PluginChoice):
    """A reward, its weight in the objective and how its actor is called."""

    scale: float = Field(
        1.0,
        allow_inf_nan=False,
        ge=-1e9,
        le=1e9,
        description="weight alpha_r in the objective (3.3); eval_rewards ignore it",
    )
    label: Name | None = Field(None, description="name in metrics; default: the plugin's name, or the class of a file")
    micro_batch: Size | None = Field(None, description="images per call of score(); default: all at once")
    timeout_s: Positive = Field(600.0, description="seconds after which a call ends the run")

    @property
    def key(self) -> str:
        """The name used in metrics and error messages; a file's class without a label goes by its own name."""
        return self.label or (self.name.rpartition(":")[2] if ".py:" in self.name else self.name)


class Guidance(Section):
    """Classifier-free guidance of the reference (algorithm.md 1.5)."""

    mode: Literal["inner", "outer"] = Field("inner", description="Choice 2 (inner, DI*-In) or 1 (outer, DI*-Out)")
    guidance_scale: NonNegative = Field(7.5, description="alpha_cfg; 0 means no guidance")
    convention: Literal["omega", "one_plus"] = Field("omega", description="of inner: omega = scale, or 1 + scale")


class Timesteps(Section):
    """Sampling of training timesteps, in thousandths: 0 is data, 1000 is noise."""

    generator: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[first, last] of the divergence's t; [20, 979] (flow matching: [20, 980]) when absent"
    )
    assistant: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[first, last] of the assistant's t; all (flow matching: [20, 980]) when absent"
    )
    law: Literal["uniform", "shifted", "logit_normal"] | None = Field(
        None, description="their distribution; uniform when absent (flow matching: shifted, as the reference)"
    )
    shift: Positive | None = Field(None, description="k of shifted, s = k u / (1 + (k - 1) u); a flow's own")
    mean: float = Field(0.0, ge=-10, le=10, description="of logit_normal")
    std: Positive = Field(1.0, description="of logit_normal")

    @field_validator("generator", "assistant")
    @classmethod
    def _ordered(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"must be [first, last] with first <= last, not {value}")
        return value

    @model_validator(mode="after")
    def _of_the_law(self) -> Timesteps:
        if self.shift is not None and self.law != "shifted":
            raise ValueError("shift is read with law: shifted alone")
        if (self.mean, self.std) != (0.0, 1.0) and self.law != "logit_normal":
            raise ValueError("mean and std are read with law: logit_normal alone")
        return self


class Algorithm(Section):
    """The objective (3.3): rewards, divergence, guidance and the assistant's schedule."""

    divergence: PluginChoice = PluginChoice(name="pseudo_huber")
    weighting: Literal["unit_x0", "inv_mean_abs", "score", "eps"] = Field(
        "unit_x0", description="w(t), see algorithm.md 1.6"
    )
    rewards: list[RewardChoice] = Field(
        default_factory=list, description="rewards to train on; without any: SIM or Diff-Instruct"
    )
    eval_rewards: list[RewardChoice] = Field(default_factory=list, description="rewards that are measured only")
    cfg: Guidance = Guidance()
    assistant_steps: int = Field(1, ge=0, le=1000, description="K_TA: assistant updates per generator update")
    assistant_warmup: int = Field(
        0, ge=0, le=1_000_000, description="assistant updates before the first generator update"
    )
    timesteps: Timesteps = Timesteps()
    reward_steps: Literal["all", "last"] = Field(
        "all", description="which of the generator's steps a reward trains: each, or its last one alone"
    )

    @model_validator(mode="after")
    def _labels(self) -> Algorithm:
        labels.check([r.key for r in [*self.rewards, *self.eval_rewards]])
        return self


class Lora(Section):
    """Low-rank adapters. Only they are trained; sampling and export use the merged weights."""

    rank: int = Field(64, ge=1, le=4096, description="inner dimension of an adapter")
    alpha: Positive | None = Field(None, description="an adapter is scaled by alpha / rank; default: the rank")
    targets: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="suffixes of names of linear layers; default: the model family's attention layers"
    )


class Optimizer(Section):
    """AdamW with a linear warm-up to a constant rate, and clipping by global norm."""

    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw: torch's fused AdamW; adamw_8bit: 1-byte states (bitsandbytes, CUDA only)"
    )
    lr: Positive = Field(1e-6, description="learning rate after warm-up")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.0, 0.999], min_length=2, max_length=2, description="Adam's decay rates"
    )
    eps: Annotated[float, Field(ge=1e-30, le=1e9)] = Field(1e-8, description="Adam's epsilon")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="updates of linear warm-up")
    max_grad_norm: Positive = Field(10.0, description="global norm to which gradients are clipped")
    lora: Lora | None = Field(None, description="train adapters instead of the whole network")


class Ema(Section):
    """Exponential moving average of the generator's weights, by half-life in thousands of images (SiD's rule)."""

    half_life_kimg: Positive = Field(description="half-life in thousands of images")
    rampup: Positive = Field(0.05, description="upper bound of the half-life, as a fraction of the images seen")


class Optimization(Section):
    """Batches, precision and both optimizers."""

    batch_size: Size = Field(
        128, description="images per update of the generator, and of the assistant, over all ranks"
    )
    micro_batch: Size | None = Field(None, description="images per rank at once; default: the rank's whole share")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute precision; master weights are float32")
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage of learner and assistant")
    offload_optimizer: bool = Field(False, description="ZeRO-Offload: optimizer states in host memory")
    max_bad_steps: int = Field(
        3, ge=0, le=1_000_000, description="consecutive updates that may be skipped for a gradient that is not finite"
    )
    gradient_checkpointing: bool | Annotated[list[Checkpointed], Field(min_length=1)] = Field(
        False, description="recompute activations in the backward pass, of all roles or of a list of roles"
    )
    compile: bool = Field(
        False, description="torch.compile the blocks of networks and decoder: faster steps, minutes of compiling"
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
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer moves what ZeRO partitions: set zero_stage to 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not work under ZeRO-3, which moves weights between blocks: set zero_stage to 2"
            )
        return self

    def checkpoints(self, role: str) -> bool:
        """Whether a role recomputes its activations."""
        roles = self.gradient_checkpointing
        return roles if isinstance(roles, bool) else role in roles


class Group(Section):
    """A set of devices and the roles that share them, one process per device."""

    devices: Size = Field(1, description="processes, one per device")
    roles: list[Name] = Field(min_length=1, description=f"of {', '.join(ROLES)}, or reward:LABEL for one reward")
    threads: Size | None = Field(None, description="CPU threads per process; default: a share of the node's cores")


class Placement(Section):
    """Where the roles live: everything in one process, or Ray actors in named groups."""

    mode: Literal["ray", "local"] = Field("ray", description="local: one process, no Ray; `placement: local` for short")
    groups: dict[Name, Group] = Field(
        default_factory=lambda: {"all": Group(roles=list(ROLES))}, description="groups by name"
    )
    share_devices: bool = Field(
        False, description="let several groups share a GPU if there are fewer GPUs than processes; small models only"
    )
    max_restarts: int = Field(3, ge=0, le=1000, description="how often a run restores itself after a lost process")
    step_timeout_s: Positive = Field(3600.0, description="seconds after which a call without an answer ends the run")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"mode": value} if isinstance(value, str) else value


class Logging(Section):
    """What a run writes while it trains."""

    samples_every: Count = Field(100, description="steps between previews of the same prompts and noise")
    sample_count: int = Field(16, ge=1, le=256, description="images per preview")
    watch_every: int = Field(
        50, ge=0, le=1_000_000_000, description="steps between checks for reward hacking and bf16 drift; 0: never"
    )
    watch_images: int = Field(
        64, ge=2, le=1_000_000, description="images of the evaluation that are sampled again in a check"
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="experiment trackers besides metrics.jsonl"
    )


class Checkpoints(Section):
    """When checkpoints are written and which are kept."""

    every: Count = Field(100, description="generator updates between checkpoints")
    keep: Count = Field(2, description="number of newest checkpoints to keep")
    keep_best: bool = Field(True, description="also keep the checkpoint with the highest reward over its last steps")


class Evaluation(Section):
    """The before/after table on held-out prompts."""

    images: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        256, description="held-out images scored before and after"
    )
    images_per_prompt: Annotated[int, Field(ge=2, le=1000)] = Field(
        4, description="images per prompt; diversity is measured within a prompt"
    )
    batch_size: Size = Field(32, description="images sampled and scored at once")


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, le=2**62, description="seed of all randomness")
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
    revisions: dict[Name, Commit] = Field(
        default_factory=dict,
        description="commit hashes of hub models by org/name or org/name@branch; a run adds those it uses",
    )
    _where: Callable[[tuple[str | int, ...]], str] | None = PrivateAttr(None)

    def where(self, key: tuple[str | int, ...]) -> str:
        """Where a key was given, for error messages: ``recipe.yaml, line 7``."""
        return "recipe" if self._where is None else self._where(key)

    def __eq__(self, other: object) -> bool:
        """Recipes are equal by their values, wherever they were given."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # its lists and mappings have none
