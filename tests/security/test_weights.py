"""No weights file and no model folder runs code."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import torch
from rlhf_t2i_plugins.rewards.clip_model import load_tokenizer

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation.features import ClipFeatures
from rlhf_t2i.evaluation.models import load
from rlhf_t2i.families import sources
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny
from tests.security import hostile

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for folder in ("rlhf_t2i", "plugins", "zoo") for file in (ROOT / folder).rglob("*.py"))
CPU = torch.device("cpu")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def store(reference: Path, **more: str) -> ModelStore:
    models = {
        "reference": str(reference),
        "generator": f"{reference}/unet",
        "height": tiny.RESOLUTION,
        "width": tiny.RESOLUTION,
    } | more
    return ModelStore(Models.model_validate(models), StudentSettings(), CPU)


def refused(caught: pytest.ExceptionInfo[UsageError], ran: Path, *words: str) -> None:
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not ran.exists(), "code of a stranger ran"


def called(name: str) -> list[tuple[str, ast.Call]]:
    """Calls of ``name`` or ``x.name`` in the project's sources, with where they are."""
    found = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", node))
    return found


def keyword(call: ast.Call, name: str) -> object:
    value = next((k.value for k in call.keywords if k.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


def test_the_payload_works(ran: Path, tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    torch.save(hostile.Payload(ran), tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert ran.is_dir()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_generator_bin_that_would_run_code_is_refused(
    zipped: bool, tiny_sdxl: Path, tmp_path: Path, ran: Path
) -> None:
    """A whole DMD2 file with one object too many."""
    file = tiny.make_generator_bin(tiny_sdxl, tmp_path / "dmd2_sdxl_1step_unet_fp16.bin")
    state = torch.load(file, weights_only=True)
    torch.save({**state, "conv_in.weight": hostile.Payload(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError) as caught:
        store(tiny_sdxl, generator=str(file)).generator_network()
    refused(caught, ran, file.name, "not a file of weights")


def test_a_clip_bin_that_would_run_code_is_refused(tiny_clip: Path, tmp_path: Path, ran: Path) -> None:
    """transformers falls back to pytorch_model.bin where there are no safetensors."""
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": hostile.Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError) as caught:
        registry.reward("pickscore", model=str(folder))
    refused(caught, ran, str(folder))
    with pytest.raises(UsageError) as caught:
        ClipFeatures(str(folder), CPU)
    refused(caught, ran, str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_with_pickled_weights_is_refused(part: str, tiny_sdxl: Path, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"x": hostile.Payload(ran)}, weights.with_name(name))
    weights.unlink()
    models = store(folder)
    with pytest.raises(UsageError) as caught:
        _ = {
            "unet": models.generator_network,
            "vae": lambda: models.decoder,
            "text_encoder": lambda: models.conditioner,
        }[part]()
    refused(caught, ran, f"{folder}/{part}")
    with pytest.raises(UsageError) as caught:
        load(str(folder)).sample(["a cat"])
    refused(caught, ran, str(folder))


def test_a_clip_folder_with_code_of_its_own_is_not_executed(tiny_clip: Path, tmp_path: Path, ran: Path) -> None:
    folder = hostile.clip_with_code(tiny_clip, tmp_path / "clip", ran)
    hostile.tokenizer_with_code(folder, ran)
    with pytest.raises(UsageError) as caught:
        registry.reward("pickscore", model=str(folder)).score(torch.rand(1, 3, 16, 16), ["a cat"])
    refused(caught, ran, str(folder))


def test_a_tokenizer_with_code_of_its_own_is_not_executed(tiny_sdxl: Path, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, folder)
    hostile.tokenizer_with_code(folder / "tokenizer", ran)
    _ = store(folder).conditioner  # its files are read by the one class that we name
    assert not ran.exists()
    with pytest.raises(UsageError) as caught:
        load_tokenizer(sources.parse(str(folder / "tokenizer")), vocabulary=1000)
    refused(caught, ran, f"{folder}/tokenizer")


@pytest.mark.parametrize("entry", ["pipeline", "component", "module"])
def test_a_pipeline_with_code_of_its_own_is_not_executed(
    entry: str, tiny_sdxl: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, folder)
    index = folder / "model_index.json"
    if entry == "pipeline":
        (folder / "evil.py").write_text(hostile.source(ran), "utf-8")
        hostile.edit(index, _class_name=["evil", "EvilPipeline"])
    elif entry == "component":
        (folder / "unet" / "evil.py").write_text(hostile.source(ran), "utf-8")
        hostile.edit(index, unet=["evil", "EvilUNet"])
    else:  # a module that Python would find, though not part of the folder
        (tmp_path / "evil_module.py").write_text(hostile.source(ran), "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        hostile.edit(index, unet=["evil_module", "EvilUNet"])
    with pytest.raises(UsageError) as caught:
        load(str(folder)).sample(["a cat"])
    refused(caught, ran, str(folder))


def test_every_torch_load_reads_tensors_only() -> None:
    calls = called("torch.load")
    assert len(calls) >= 4
    assert [where for where, call in calls if keyword(call, "weights_only") is not True] == []


def test_nothing_asks_for_a_strangers_code() -> None:
    tokenizers = called("AutoTokenizer.from_pretrained")
    trusting = [
        f"{file.relative_to(ROOT)}:{node.value.lineno}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "custom_pipeline")
        if not (isinstance(node.value, ast.Constant) and node.value.value in (False, None))
    ]
    assert trusting == []
    # Left out, transformers would ask on the terminal.
    assert [where for where, call in tokenizers if keyword(call, "trust_remote_code") is not False] == []


@pytest.mark.parametrize(
    "name",
    ["pickle.load", "pickle.loads", "cloudpickle.loads", "joblib.load", "yaml.unsafe_load", "yaml.full_load",
     "hub.load", "os.system", "builtins.eval"],
)  # fmt: skip
def test_nothing_else_executes_what_it_reads(name: str) -> None:
    assert [where for where, _ in called(name)] == []
    assert [where for where, call in called("np.load") if keyword(call, "allow_pickle")] == []
    shells = [where for name in ("run", "Popen", "check_output") for where, c in called(name) if keyword(c, "shell")]
    assert shells == []
