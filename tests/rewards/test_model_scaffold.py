"""``rewards new --model``: the reward that is written scores as transformers' own classes do, and passes the check."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, ViTConfig, ViTForImageClassification
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins.preprocessing import Preprocess
from rlhf_t2i.plugins.scaffold import write_package
from rlhf_t2i.tools.model_reward import scaffold_of
from rlhf_t2i.tools.reward_check import PROMPTS, check_reward
from tests.rewards import builders
from tests.rewards.fixtures import formula

SIDE = 32
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = Image.fromarray(formula.image(SIDE, SIDE))  # of the model's size: no resize, so no rounding to compare with


def loud(model: nn.Module) -> Any:
    """The model with weights that let its outputs depend on its inputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT classifier of three classes."""
    folder = tmp_path_factory.mktemp("vit")
    labels = {0: "plain", 1: "pretty", 2: "odd"}
    config = ViTConfig(
        **TOWER, image_size=SIDE, patch_size=8, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    loud(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("siglip")
    words = ["<pad>", "<unk>", "a", "red", "apple", *dict.fromkeys(re.findall(r"\w{3,}", " ".join(PROMPTS)[11:]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {**TOWER, "vocab_size": len(words), "max_position_embeddings": 12, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": SIDE, "patch_size": 8})
    loud(SiglipModel(config)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def built(name: str, parent: Path, model: Path, label: str | None = None) -> Any:
    """The reward of the package that is written."""
    folder = write_package(name, parent, scaffold_of(str(model), label))
    spec = importlib.util.spec_from_file_location(f"rlhf_t2i_{name}", folder / f"rlhf_t2i_{name}/__init__.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name.capitalize())().eval()


def pixels() -> Tensor:
    return torch.from_numpy(formula.image(SIDE, SIDE)).permute(2, 0, 1)[None].float() / 255


def test_a_classifier_scores_the_log_odds_of_its_class(vit: Path, tmp_path: Path) -> None:
    reward = built("pretty", tmp_path, vit, "pretty")
    given = ViTImageProcessorPil.from_pretrained(vit)(PICTURE, return_tensors="pt").pixel_values
    with torch.no_grad():
        p = ViTForImageClassification.from_pretrained(vit)(pixel_values=given).logits.double().softmax(1)[0, 1]
        assert reward.score(pixels(), [""]).item() == pytest.approx((p / (1 - p)).log().item(), abs=1e-4)
    assert [f for f in check_reward(reward, torch.device("cpu"), size=64) if f.outcome == "fail"] == []


def test_a_pair_scores_the_cosine_of_transformers_own_features(siglip: Path, tmp_path: Path) -> None:
    reward = built("cosine", tmp_path, siglip)
    model = SiglipModel.from_pretrained(siglip).eval()
    given = SiglipImageProcessorPil.from_pretrained(siglip)(PICTURE, return_tensors="pt").pixel_values
    # Token 2 is "a", 3 "red", 4 "apple"; SigLIP's prompts fill the context with padding, and no mask hides it.
    tokens = torch.tensor([[2, 3, 4] + 9 * [0]])
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=given)
        expected = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).item()
        assert reward.score(pixels(), ["a red apple"]).item() == pytest.approx(expected, abs=1e-5)
    assert [f for f in check_reward(reward, torch.device("cpu"), size=64) if f.outcome == "fail"] == []


def test_a_clip_gives_a_pair_with_a_mask(tmp_path: Path) -> None:
    scaffold = scaffold_of(str(builders.write_clip(tmp_path)))
    assert (scaffold.reward, scaffold.words["hf_class"]) == ("pair", "CLIPModel")
    assert "attention_mask" in scaffold.words["inputs"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"do_pad": True}, "do_pad is not supported"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "Siglip2ImageProcessor"},
            "'Siglip2ImageProcessor' is not",
        ),
        ("preprocessor_config.json", {"resample": 1}, "resample 1 is not supported"),
        ("config.json", {"architectures": ["ViTModel"]}, "'vit' model without features of images and text"),
        ("config.json", {"id2label": {"0": 'a"b', "1": "c"}}, "the class's name .* holds quotes"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(
    vit: Path, tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        data = json.loads((vit / name).read_text("utf-8")) | (change if name == file else {})
        (tmp_path / name).write_text(json.dumps(data), "utf-8")
    with pytest.raises(UsageError, match=message):
        scaffold_of(str(tmp_path))


def test_labels_are_the_models_own(vit: Path, siglip: Path) -> None:
    assert scaffold_of(str(vit)).words["label"] == "plain"
    with pytest.raises(UsageError, match="'prety' is no class of the model; did you mean 'pretty'"):
        scaffold_of(str(vit), "prety")
    with pytest.raises(UsageError, match="--label is for an image classifier"):
        scaffold_of(str(siglip), "pretty")


@pytest.mark.parametrize("kind", ["Siglip2ImageProcessor", "ViTHybridImageProcessor", "CLIPSegProcessor", "BlipThing"])
def test_a_processor_of_another_kind_is_not_taken_for_one_with_its_beginning(kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{kind}' is not supported"):
        Preprocess.from_config({"image_processor_type": kind})
