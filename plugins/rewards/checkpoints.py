"""Single-file checkpoints: finding, reading without running code, and renaming open_clip's weights to transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.sources import ModelRef

State = dict[str, Tensor]


def find_file(source: ModelRef, names: Sequence[str]) -> Path:
    """The first of ``names`` in a local folder, or the first from a hub repository; a path to a file is itself.

    Raises:
        UsageError: None of them is there.
    """
    if not source.is_local:
        return Path(sources.hub_file(source, names[0]))
    path = Path(source.location)
    if path.is_file():
        return path
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UsageError(f"{path} holds none of: {', '.join(names)}")
    return file


def read_state(path: Path, device: str = "cpu") -> State:
    """The tensors of a ``.safetensors`` file, or of a ``torch.save`` file read with ``weights_only=True``.

    On the device ``meta`` a ``torch.save`` file gives shapes alone.
    Of a training checkpoint the entry ``state_dict`` is read; DistributedDataParallel's prefix ``module.`` is removed.

    Raises:
        UsageError: Damaged, or a pickle that holds more than tensors.
    """
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as weights: {first_line(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise UsageError(f"{path} holds no weights: a mapping of names to tensors is needed")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _is_safetensors(path: Path) -> bool:
    """By the content: a hub cache's own files have no suffix. 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_exactly(module: Any, state: State, path: Path, assign: bool = False) -> None:
    """``load_state_dict`` that accepts neither missing nor additional weights nor other shapes.

    Args:
        module: To be filled.
        state: Weights by the module's names.
        path: Names the file in errors.
        assign: Put the tensors in place of the module's own, as one on the meta device needs.

    Raises:
        UsageError: Naming the first weight that differs.
    """
    wanted = module.state_dict()
    missing, additional = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or additional:
        kind, names = ("lacks", missing) if missing else ("has unknown", additional)
        raise UsageError(f"{path} {kind} {len(names)} weights for {type(module).__name__}, e.g. {names[0]}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UsageError(f"{path}: {name} is {list(tensor.shape)}, not {list(wanted[name].shape)}")
    module.load_state_dict(state, assign=assign)


# Vision towers of open_clip whose attention heads are not 64 wide (its model_configs: ViT-H-14, ViT-g-14, ViT-bigG-14).
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}

_CLIP_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    # The missing "e" is transformers' own spelling.
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)


def rename_open_clip(state: State) -> State:
    """open_clip's CLIP weights under transformers' CLIPModel names.

    The fused ``in_proj`` becomes q, k and v; the two projections are stored transposed.
    """
    renamed: State = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            target = "visual_projection.weight" if name == "visual.proj" else "text_projection.weight"
            renamed[target] = tensor.T.contiguous()
            continue
        if name.endswith("attn_mask"):
            continue
        target = name
        for pattern, replacement in _CLIP_NAMES:
            target = re.sub(pattern, replacement, target)
        fused = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", target)
        if fused:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{fused[1]}.self_attn.{letter}_proj.{fused[2]}"] = part.clone()
        else:
            renamed[target] = tensor
    return renamed


def open_clip_config(state: State, quick_gelu: bool = False) -> Any:
    """The CLIPConfig of open_clip weights, read off their shapes; attention heads are 64 wide unless known otherwise.

    Args:
        state: open_clip's names.
        quick_gelu: OpenAI's weights and open_clip's ``-quickgelu`` models; not LAION's.
    """
    from transformers import CLIPConfig

    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    act = "quick_gelu" if quick_gelu else "gelu"
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _depth(state, "visual.transformer.resblocks."),
        "num_attention_heads": max(1, vision_width // _HEAD_WIDTHS.get(vision_width, 64)),
        "image_size": patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5),
        "patch_size": patch,
        "hidden_act": act,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _depth(state, "transformer.resblocks."),
        "num_attention_heads": max(1, text_width // 64),
        "max_position_embeddings": len(state["positional_embedding"]),
        "hidden_act": act,
        # open_clip reads the text's feature at its largest token id: the end of text.
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["visual.proj"].shape[1])


def _depth(state: State, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def load_open_clip(path: Path, quick_gelu: bool = False) -> Any:
    """A transformers CLIPModel with the weights of an open_clip checkpoint file.

    Raises:
        UsageError: The file is damaged or is not a CLIP with two transformers.
    """
    from transformers import CLIPModel

    state = read_state(path)
    try:
        config = open_clip_config(state, quick_gelu)
    except KeyError as error:
        raise UsageError(f"{path} is not an open_clip ViT checkpoint: it has no {error}") from error
    with torch.device("meta"):
        model = CLIPModel(config)
    # Buffers are not in the checkpoint; assign puts the file's tensors in place of the meta ones.
    renamed = {name: tensor.float() for name, tensor in rename_open_clip(state).items()}
    _check_names(model, renamed, path)
    model.load_state_dict(renamed, strict=False, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count).unsqueeze(0)
    return model.eval().requires_grad_(False)


def open_clip_footprint(path: Path, quick_gelu: bool = False) -> plugins.Footprint:
    """The footprint of an open_clip checkpoint file, by the shapes of its weights.

    Raises:
        UsageError: The file is damaged.
    """
    from rlhf_t2i_plugins.rewards.clip_model import ImageTower

    config = open_clip_config(read_state(path, "meta"), quick_gelu)

    def build() -> nn.Module:
        from transformers import CLIPModel

        return ImageTower(CLIPModel(config))

    return plugins.Footprint(str(path), build)


def _check_names(model: Any, state: State, path: Path) -> None:
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = sorted(wanted.keys() ^ state.keys()) or sorted(n for n in wanted if wanted[n] != state[n].shape)
    if wrong:
        raise UsageError(f"{path} does not fit CLIPModel: {len(wrong)} weights differ, e.g. {wrong[0]}")
