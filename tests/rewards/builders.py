"""Small models with random weights, written in the layouts in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.rewards.fixtures import formula

IMAGE_SIZE = 32
FIXTURES = Path(__file__).parent / "fixtures"


class Identity:
    """A decoder whose latents are images."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in GPT-2's order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of single bytes."""
    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_config(**vision: Any) -> CLIPConfig:
    """A CLIP of 60k parameters, gelu like ViT-H-14."""
    vocabulary = len(clip_tokenizer())
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "pad_token_id": vocabulary - 1,
    }
    image = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=image | vision, projection_dim=16)


def random_clip(seed: int = 0, **vision: Any) -> CLIPModel:
    """A CLIPModel whose weights are large enough for its outputs to depend on its inputs."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(**vision)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model


def write_processor(folder: Path, size: int = IMAGE_SIZE) -> None:
    """tokenizer.json and preprocessor_config.json, as beside CLIP-ViT-H-14."""
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder)
    config = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def write_clip(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """A CLIPModel folder with processor: the layout of PickScore and of OpenAI's CLIP."""
    random_clip(seed, **vision).save_pretrained(folder)
    write_processor(folder)
    return folder


def pictures(count: int = 3, size: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth random images [B, 3, size, size] strictly inside (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return 0.1 + 0.8 * smooth


def write_open_clip_state(path: Path, shapes: dict[str, list[int]], wrap: bool = True) -> Path:
    """A ``torch.save`` checkpoint with weights from the formula; ``wrap`` puts them under ``state_dict`` as HPSv2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: formula.weight(name, shape) for name, shape in shapes.items()}
    torch.save({"epoch": 1, "state_dict": state} if wrap else state, path)
    return path


def write_hpsv2(folder: Path) -> Path:
    """A folder like xswu/HPSv2 with the oracle's weights, and a CLIP tokenizer."""
    write_open_clip_state(folder / "HPS_v2.1_compressed.pt", fixture_json("open_clip")["shapes"])
    clip_tokenizer().save_pretrained(folder)
    return folder


def write_openai_clip(folder: Path) -> Path:
    """A transformers CLIPModel folder with the weights of the oracle's OpenAI CLIP."""
    from rlhf_t2i_plugins.rewards.checkpoints import load_open_clip

    shapes = fixture_json("aesthetic")["clip"]
    checkpoint = write_open_clip_state(folder / "openai.pt", shapes, wrap=False)
    load_open_clip(checkpoint, quick_gelu=True).save_pretrained(folder)
    checkpoint.unlink()
    write_processor(folder)
    return folder


def write_aesthetic(folder: Path) -> tuple[Path, Path]:
    """(CLIP folder, head file) with the oracle's weights."""
    head = {name: formula.weight(name, shape) for name, shape in fixture_json("aesthetic")["head"].items()}
    path = folder / "head" / "aesthetic-model.pth"
    path.parent.mkdir(parents=True)
    torch.save(head, path)
    return write_openai_clip(folder / "clip"), path


def write_image_reward(folder: Path) -> Path:
    """A folder like THUDM/ImageReward with the oracle's weights, and a BERT tokenizer."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    spec = fixture_json("image_reward")
    state = {}
    for name, shape in spec["shapes"].items():
        is_buffer = name.endswith("position_ids")
        state[name] = torch.arange(shape[1]).unsqueeze(0) if is_buffer else formula.weight(name, shape)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(spec["med_config"]))
    BertTokenizer(vocab={word: i for i, word in enumerate(formula.BERT_WORDS)}).save_pretrained(folder)
    return folder


def fixture_json(name: str) -> Any:
    """An oracle's JSON file."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def fixture_tensors(name: str) -> dict[str, torch.Tensor]:
    """An oracle's tensors."""
    from safetensors.torch import load_file

    return load_file(FIXTURES / f"{name}.safetensors")
