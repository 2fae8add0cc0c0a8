"""Activation checkpointing of any network made of ``nn.ModuleList``: decoders and rewards."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

_KEEP_NOTHING = ("Upsample2D",)
"""Class names of frozen layers that keep no activations: recomputing them saves nothing."""


def checkpoint_layers(module: nn.Module) -> None:
    """Recompute the innermost layers of every ``nn.ModuleList`` in the backward pass; in place.

    Innermost, since the graph of one block of a decoder at 1024 px is most of the decoder's. Entries of a list that are
    None (diffusers' blocks without attention) are passed over.
    """
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            checkpoint_layers(child)
            continue
        for layer in child:
            if layer is None:
                continue
            if any(isinstance(part, nn.ModuleList) for part in layer.modules()):
                checkpoint_layers(layer)
            # Two rewards may share a model: its layers are wrapped once.
            elif not isinstance(layer.forward, partial) and type(layer).__name__ not in _KEEP_NOTHING:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
