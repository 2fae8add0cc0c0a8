"""Qwen2-VL as rewards call it: images and texts to the language model's state at each text's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from rlhf_t2i_plugins.rewards.qwen_images import QwenPreprocess
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins.precision import Float32, without_autocast

Precision = Literal["bfloat16", "float16", "float32"]

# Qwen2-VL's chat format (its chat_template.json) around one image and a text.
BEFORE_IMAGE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER_IMAGE = "<|vision_end|>"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


class QwenText:
    """The tokenizer, and what a prompt must not contain.

    Args:
        tokenizer: Of the model, with all its special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._control = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; the names of special tokens in it become these tokens."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that would be read as more than text.

        Raises:
            ValueError: Names the control token.
        """
        for prompt in prompts:
            found = next((token for token in self._control if token in prompt), None)
            if found is not None:
                raise ValueError(f"the prompt {prompt!r} holds {found!r}, a control token of the language model")


class Rope(Float32):
    """A rotary embedding whose frequencies stay in float32: bf16 would turn position 900 by a radian."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, on the device of the states."""
        return self.rope(states, position_ids.to(states.device))


class QwenVL(nn.Module):
    """Vision tower and language model.

    Texts are padded on the right: causal attention never sees what follows a token, so no mask is needed and a text
    gives the same state alone and in a batch.

    Args:
        model: From :func:`adapted`, in any dtype.
        preprocess: From images to patches.
        dtype: Of its weights, whatever the reward is moved to; the reward's own when None.
        sequential: Number image tokens like text, instead of by row and column.
        lm_head: From states to logits of tokens, kept in the same dtype.
    """

    def __init__(
        self,
        model: Any,
        preprocess: QwenPreprocess,
        dtype: Precision | None = None,
        sequential: bool = False,
        lm_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head
        self.preprocess, self.sequential = preprocess, sequential
        self._dtype = None if dtype is None else getattr(torch, dtype)
        vision = model.config.vision_config
        wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if (preprocess.patch, preprocess.merge, preprocess.frames) != wanted:
            given = (preprocess.patch, preprocess.merge, preprocess.frames)
            raise UsageError(f"the image processor makes patches of {given}, but the model reads {wanted}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QwenVL:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            fixed = self._dtype is not None and moved.is_floating_point()
            return tensor.to(moved.device, self._dtype) if fixed else moved

        return super()._apply(keep, recurse)

    def forward(self, images: Tensor, before: Sequence[int], after: Sequence[Sequence[int]]) -> Tensor:
        """States [B, D] at the last token of each text, after the final norm; gradients flow to the images.

        Args:
            images: Float [B, 3, H, W] in [0, 1].
            before: Token ids before each image.
            after: Token ids after each image, one list per image.
        """
        device = images.device
        lengths = [len(ids) for ids in after]
        padded = [[*ids, *[0] * (max(lengths) - len(ids))] for ids in after]
        # Its weights have one dtype; autocast would change the dtype between layers.
        with without_autocast(images):
            vision = self._image_tokens(images)
            embed = self.model.language_model.embed_tokens
            first = embed(torch.tensor(list(before), device=device)).expand(len(images), -1, -1)
            sequence = torch.cat([first, vision, embed(torch.tensor(padded, device=device))], 1)
            positions = self._positions(images, len(before), vision.shape[1], max(lengths))
            output = self.model.language_model(
                inputs_embeds=sequence, position_ids=positions.to(device), use_cache=False
            )
        ends = torch.tensor([len(before) + vision.shape[1] + length - 1 for length in lengths], device=device)
        return output.last_hidden_state[torch.arange(len(images), device=device), ends]

    def _image_tokens(self, images: Tensor) -> Tensor:
        """The vision tower's tokens [B, N, D] of images."""
        tower = self.model.visual
        patches = self.preprocess(images).to(tower.patch_embed.weight.dtype)
        return tower(patches.flatten(0, 1), grid_thw=self._grid(images)).pooler_output.unflatten(0, (len(images), -1))

    def _grid(self, images: Tensor) -> Tensor:
        """Frames, rows and columns [B, 3] of patches, on the CPU: the model loops over them."""
        grid = [1, *self.preprocess.grid(*images.shape[-2:])]
        return torch.tensor([grid] * len(images), device="cpu")

    def _positions(self, images: Tensor, before: int, tokens: int, after: int) -> Tensor:
        """Positions [3, B, L] in time, height and width; all samples have the same ones."""
        total = before + tokens + after
        if self.sequential:
            positions = torch.arange(total, device="cpu").expand(3, 1, -1)
        else:
            kinds = torch.tensor([[0] * before + [1] * tokens + [0] * after], device="cpu")
            grid = self._grid(images[:1])
            # The ids are read for their shape alone.
            positions, _ = self.model.get_rope_index(kinds, mm_token_type_ids=kinds, image_grid_thw=grid)
        return positions.expand(3, len(images), -1)


def adapted(model: Any, vision_rope: Callable[[nn.Module], nn.Module] = Rope) -> Any:
    """A loaded model, changed in place: frequencies in float32, and patches read by one matrix product.

    Patches do not overlap, so the tower's Conv3d is a Linear, which is faster and has no memory format.

    Args:
        model: transformers' ``Qwen2VLModel`` or ``Qwen2_5_VLModel``.
        vision_rope: Wraps the vision tower's rotary embedding.
    """
    text, vision = model.language_model, model.visual
    text.rotary_emb, vision.rotary_pos_emb = Rope(text.rotary_emb), vision_rope(vision.rotary_pos_emb)
    weight = vision.patch_embed.proj.weight.detach().flatten(1)
    vision.patch_embed = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    vision.patch_embed.load_state_dict({"weight": weight}, assign=True)
    return model.eval().requires_grad_(False)
