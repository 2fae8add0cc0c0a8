"""Low-rank adapters (LoRA, arXiv:2106.09685) on a network's linear layers, by peft: only they are trained.

The second factor starts at zero, so that a network with fresh adapters is the network without. What leaves the process
(weights for sampling, the average, the export) is merged: ``W + alpha / rank * B A`` under the plain names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Lora

_ADAPTER = "default"
_BASE, _FACTORS = ".base_layer.", (".lora_A.", ".lora_B.")


def add(module: nn.Module, settings: Lora, targets: Sequence[str], seed: int) -> None:
    """Put adapters into ``module``, in place; everything else is frozen.

    Args:
        module: The network.
        settings: Rank and scale.
        targets: Ends of the names of the linear layers that get adapters.
        seed: Of the first factor's random start; the same on every rank.

    Raises:
        UsageError: As of :func:`check`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check(module, targets)
    alpha = settings.alpha or settings.rank
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    module.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=_ADAPTER)


def check(module: nn.Module, targets: Sequence[str], place: str = "lora.targets") -> None:
    """Refuse targets that a network does not have; it may be on the meta device.

    Args:
        module: The network.
        targets: See :func:`add`.
        place: Begins the error message.

    Raises:
        UsageError: A target names no layer, or one that is not linear.
    """
    for target in targets:
        found = [part for name, part in module.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UsageError(f"{place}: the network has no layer {target!r} (the default is its attention)")
        other = next((part for part in found if not isinstance(part, nn.Linear)), None)
        if other is not None:
            raise UsageError(f"{place}: {target!r} is a {type(other).__name__}: adapters go on linear layers")


def adapted(module: nn.Module) -> set[str]:
    """The plain names of the weights with adapters."""
    return {f"{name}.weight" for name, layer in module.named_modules() if _ADAPTER in getattr(layer, "lora_A", ())}


def merged(
    module: nn.Module, full: Callable[[nn.Parameter], Tensor], only_adapted: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its plain name with the adapters added in, in float32; without adapters, as they are.

    Weights are parameters and the buffers that belong to a state dict (a transformer's fixed position embedding).

    Args:
        module: The network; all ranks iterate together.
        full: Gives a parameter's whole float32 value.
        only_adapted: Leave out all but the weights with adapters.
    """
    changed = adapted(module)
    for name, parameter in module.named_parameters():
        plain = name.replace(_BASE, ".")
        if any(factor in name for factor in _FACTORS) or (only_adapted and plain not in changed):
            continue
        value = full(parameter)
        if name.endswith(f"{_BASE}weight"):
            layer = module.get_submodule(name.removesuffix(f"{_BASE}weight"))
            first, second = (full(factor[_ADAPTER].weight) for factor in (layer.lora_A, layer.lora_B))
            value = value + layer.scaling[_ADAPTER] * (second @ first)
        yield plain, value
    if only_adapted:
        return
    stored = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in stored:
            yield name.replace(_BASE, "."), buffer.detach().float()


def factors(module: nn.Module, full: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The adapters alone, in float32, by the names that peft and diffusers store: ``PATH.lora_A.weight``, ``lora_B``.

    The scale ``alpha / rank`` is multiplied into the second factor, so that readers need not know it.

    Args:
        module: The network; all ranks iterate together.
        full: Gives a parameter's whole float32 value.
    """
    for name, layer in module.named_modules():
        if _ADAPTER in getattr(layer, "lora_A", ()):
            yield f"{name}.lora_A.weight", full(layer.lora_A[_ADAPTER].weight)
            yield f"{name}.lora_B.weight", layer.scaling[_ADAPTER] * full(layer.lora_B[_ADAPTER].weight)


def frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained; checkpoints leave them out."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
