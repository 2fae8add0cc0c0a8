"""Prompts of diffusers pipelines, encoded by the pipelines' own ``encode_prompt``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources, weights
from rlhf_t2i.families.base import Conditioner, Conditioning, Family
from rlhf_t2i.utils.device import Sending
from rlhf_t2i.utils.quiet import quietly

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PipelineConditioner(Conditioner):
    """The text encoders of a diffusers pipeline.

    Args:
        family: Knows how the pipeline encodes.
        pipeline: It, without other parts.
        encoders: Its text encoders, by the names of its parts.
        constants: What every row holds besides.
    """

    def __init__(
        self,
        family: PromptFamily,
        pipeline: DiffusionPipeline,
        encoders: Mapping[str, nn.Module],
        constants: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self._family, self._pipeline, self._constants = family, pipeline, constants
        self._unconditional: dict[str, Tensor] = {}

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        return self._row(prompt)

    def unconditional_row(self) -> dict[str, Tensor]:
        """See :meth:`Conditioner.unconditional_row`."""
        if not self._unconditional:
            self._unconditional = self._row(None)
        return self._unconditional

    def _row(self, prompt: str | None) -> dict[str, Tensor]:
        device = next(self.encoders.parameters()).device
        with Sending():
            if prompt is None:
                row = self._family.encode_unconditional(self._pipeline, device)
            else:
                row = self._family.encode_prompt(self._pipeline, prompt, device)
            return row | {name: value.to(device) for name, value in self._constants.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Conditioner:
        self._unconditional = {}
        return super()._apply(fn, recurse)


def padded(embeds: Tensor, tokens: int) -> dict[str, Tensor]:
    """A ragged prompt as a row: its embeddings [L, D] in float32, zeros after them, and the mask [``tokens``]."""
    mask = torch.arange(tokens, device=embeds.device) < len(embeds)
    rows = nn.functional.pad(embeds.float(), (0, 0, 0, tokens - len(embeds)))
    return {"prompt_embeds": rows, "prompt_mask": mask}


def bare_pipeline(cls: type[DiffusionPipeline], **parts: object) -> DiffusionPipeline:
    """A diffusers pipeline of text encoders alone, for its ``encode_prompt``."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # without self
    required = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    with quietly():
        return cls(**dict.fromkeys(required) | parts)


class PromptFamily(Family):
    """A family whose prompts are encoded as its diffusers pipeline encodes them."""

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """The folders of the text encoders that every pipeline of the family holds."""

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The folders of this pipeline's text encoders."""
        return self.text_encoders

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class of diffusers that model_index.json names."""
        import diffusers

        return getattr(diffusers, self.index["_class_name"])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt, the pipeline's ``max_sequence_length``."""
        return inspect.signature(self.pipeline_class.__call__).parameters["max_sequence_length"].default

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoders = {part: self.text_encoder(part, dtype) for part in self.encoder_parts}
        names = {part: part.replace("text_encoder", "tokenizer") for part in encoders}
        tokenizers = {names[part]: self.tokenizer(names[part], encoder) for part, encoder in encoders.items()}
        pipeline = bare_pipeline(self.pipeline_class, **encoders, **tokenizers)
        return PipelineConditioner(self, pipeline, encoders, self.constant_conditioning(height, width))

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of one prompt [...] by name; masks as they are, embeddings in float32.

        Args:
            pipeline: Of :attr:`pipeline_class`, with text encoders and tokenizers alone.
            prompt: The prompt.
            device: That of the encoders.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode_prompt")

    def encode_unconditional(self, pipeline: DiffusionPipeline, device: torch.device) -> dict[str, Tensor]:
        """The tensors of guidance's unconditional branch: the empty prompt's, unless overridden."""
        return self.encode_prompt(pipeline, "", device)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what :meth:`encode_prompt` returns, from configurations alone; of the longest prompt."""
        raise NotImplementedError(f"{type(self).__name__} must define conditioning_shapes")

    def constant_conditioning(self, height: int, width: int) -> dict[str, Tensor]:
        """What every image of a size is told besides its prompt, by name; usually nothing."""
        return {}

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        constants = {name: tuple(value.shape) for name, value in self.constant_conditioning(height, width).items()}
        shapes = self.conditioning_shapes() | constants
        return Conditioning({name: torch.empty(batch, *shape, dtype=dtype) for name, shape in shapes.items()})

    def part_class(self, part: str) -> type[PreTrainedModel]:
        """The class of a part that model_index.json names, from diffusers or transformers.

        Raises:
            UsageError: It names none, or one of another library.
        """
        entry = self.index.get(part)
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers") or not isinstance(name, str):
            raise UsageError(f"{self.reference.location}/model_index.json names no {part} of a known library")
        found = getattr(importlib.import_module(library), name, None)
        if found is None:
            raise UsageError(f"{self.reference.location}/model_index.json: {library} has no {sources.printable(name)}")
        return found

    def tokenizer(self, part: str, encoder: PreTrainedModel) -> PreTrainedTokenizerBase:
        """A tokenizer that fits its text encoder.

        By its own class: AutoTokenizer would ask for a config.json that a downloaded snapshot does not hold.
        """
        tokenizer = weights.load_part(self.reference, part, self.part_class(part))
        config = encoder.config.get_text_config()  # of an encoder that also sees images
        # Without its files transformers builds a tokenizer of a handful of tokens and says nothing.
        if not 16 <= len(tokenizer) <= config.vocab_size:
            raise UsageError(
                f"{self.reference.location}/{part} has {len(tokenizer)} tokens but the text encoder knows "
                f"{config.vocab_size}: the tokenizer's files are missing or foreign"
            )
        limit_length(f"{self.reference.location}/{part}", tokenizer, encoder)
        return tokenizer

    def text_encoder(self, part: str, dtype: torch.dtype) -> PreTrainedModel:
        """A frozen text encoder with its weights."""
        return weights.load_part(self.reference, part, self.part_class(part), dtype=dtype).eval().requires_grad_(False)

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        classes = {part: self.part_class(part) for part in self.encoder_parts}
        with torch.device("meta"):
            return nn.ModuleList(self._build_encoder(part, cls) for part, cls in classes.items())

    def _build_encoder(self, part: str, cls: type[PreTrainedModel]) -> PreTrainedModel:
        config = sources.read_json(self.reference, f"{part}/config.json")
        try:
            return cls(cls.config_class(**config))
        except Exception as error:  # foreign numbers in a configuration raise whatever they meet first
            place = f"{self.reference.location}/{part}"
            raise UsageError(f"{place} describes no text encoder: {first_line(error)}") from error


def limit_length(place: str, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> None:
    """Cut a tokenizer's longest prompt to what its text encoder reads; one that states none has 1e30.

    Args:
        place: The tokenizer's folder, for the error message.
        tokenizer: Its ``model_max_length`` is set.
        encoder: The text encoder; one without ``max_position_embeddings`` sets no limit.

    Raises:
        UsageError: The tokenizer's length is no positive number.
    """
    own = tokenizer.model_max_length
    if isinstance(own, bool) or not isinstance(own, int | float) or own < 1:
        raise UsageError(f"{place}: model_max_length is {sources.printable(own)}, not a positive number")
    longest = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(own, longest)
