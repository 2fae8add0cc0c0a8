"""The exported model's card: what the hub and a reader find in it; and its way to the hub."""

from __future__ import annotations

import ast
import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.cli import app
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Models, StudentSettings
from rlhf_t2i.tools.push import push
from rlhf_t2i.training import model_card
from rlhf_t2i.utils import manifest
from tests import tiny
from tests.project import pages

RECIPE = {
    "seed": 3, "steps": 1, "algorithm": {"cfg": {"guidance_scale": 3.0}},
    "optimization": {"batch_size": 2, "generator": {"lr": 1e-3, "lora": {"rank": 2}}},
    "placement": "local", "evaluation": {"images": 8, "images_per_prompt": 2, "batch_size": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Path:
    """A run's folder with model/ and adapter/."""
    rewards = [{"name": "pickscore", "scale": 100, "options": {"model": str(tiny_clip)}}]
    recipe = {
        **RECIPE, "algorithm": {**RECIPE["algorithm"], "rewards": rewards}, "data": {"prompts": str(tiny_prompts)},
        "models": {"reference": str(tiny_sdxl), "generator": f"{tiny_sdxl}/unet", "height": 16, "width": 16},
    }  # fmt: skip
    return rlhf_t2i.train(recipe, tmp_path_factory.mktemp("card") / "run", progress=False).out


def test_the_card_says_what_it_is_and_what_changed(finished: Path) -> None:
    folder = finished / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert "one-step" in card.data.tags
    assert card.data.get("license") is None  # the tiny models state none, so the card claims none
    comparison = {row.key: row for row in rlhf_t2i.evaluation.compare.of_run(finished / "evaluation").rows}
    assert f"| {comparison['pickscore'].before:.4g} |".replace("-", "\N{MINUS SIGN}") in card.content
    assert re.search(r"latent_distance \(diversity\) \| [\d.]+ \| [\d.]+ \| x [\d.]+ \|", card.content)
    assert "training prompts" in card.content  # the recipe has no held-out list
    assert "| reward pickscore, trained with it, not included | `pickscore` | MIT |" in card.content
    with Image.open(folder / model_card.PICTURE) as picture:
        assert picture.size == (4 * 18 - 2, 2 * 18 - 2)


def test_the_manifest_covers_card_and_picture(finished: Path) -> None:
    assert manifest.damage(finished / "model") is None
    assert {"README.md", model_card.PICTURE} <= set(manifest.read(finished / "model")["files"])


def test_the_snippet_draws_what_sample_draws(finished: Path) -> None:
    content = (finished / "model/README.md").read_text("utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    torch.manual_seed(7)
    names: dict[str, Any] = {}
    exec(source.replace('"."', repr(str(finished / "model"))), names)
    (prompt,) = re.findall(r'pipe\("(.*?)"', source)
    (own,) = rlhf_t2i.load(finished).sample([prompt], seed=7)
    assert names["image"].tobytes() == own.tobytes()


def test_the_snippet_passes_the_parts_that_a_pipeline_demands_and_has_not(tmp_path: Path) -> None:
    folder = str(tiny.make_sd3(tmp_path, t5=False))
    store = ModelStore(Models(reference=folder, generator=folder), StudentSettings(steps=4), torch.device("cpu"))
    (source,) = re.findall(r"```python\n(.*)\n```\Z", model_card._snippet(store, "a cat"), re.DOTALL)
    assert "from_pretrained(model, text_encoder_3=None, tokenizer_3=None)" in source
    names: dict[str, Any] = {}
    exec(source.replace('"."', repr(folder)), names)
    assert names["image"].size == (store.size[1], store.size[0])


def test_nothing_exported_names_a_folder_of_this_machine(finished: Path) -> None:
    for part in ("model", "adapter"):
        for file in (finished / part).rglob("*"):
            if file.suffix in (".json", ".md"):
                assert "/tmp" not in file.read_text("utf-8"), file


@pytest.mark.parametrize(
    "prompt",
    [
        "<img src=x onerror=alert(1)>", "a | b", "```\n# head", "`", "[a](http://b)", "a\n---\nlicense: x\n---",
        "\x1b]0;owned\x07", "\u202egnp.exe", "say \"hi\" \\", "{x} %s $y", "\u2028line",
    ],
    ids=range(11),
)  # fmt: skip
def test_a_prompt_is_text_in_the_card_whatever_it_holds(prompt: str, tiny_sdxl: Path) -> None:
    models = Models(reference=str(tiny_sdxl), generator=str(tiny_sdxl))
    snippet = model_card._snippet(ModelStore(models, StudentSettings(), torch.device("cpu")), prompt)
    (source,) = re.findall(r"\A## Draw\n\n```python\n(.*)\n```\Z", snippet, re.DOTALL)
    assert not re.search("^```", source, re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert prompt in [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    code = model_card._code(prompt)
    fence = re.match("`+", code)
    assert fence is not None
    assert code.endswith(fence[0])
    assert fence[0] not in code[len(fence[0]) : -len(fence[0])]
    assert code.isprintable()


def test_a_divergence_of_a_file_goes_by_its_file_name() -> None:
    recipe = reading.build({**RECIPE, "data": {"prompts": "p.txt"}, "models": {"reference": "a/b", "generator": "a/b"},
                            "algorithm": {"divergence": {"name": "/home/me/secret/mine.py:D"}}})  # fmt: skip
    assert "| divergence | mine.py:D |" in model_card._training(recipe)


def test_a_stated_license_is_found_beside_a_network_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}", "utf-8")
    card = tmp_path / "README.md"
    for text, stated in (
        ("---\nlicense: mit\n---\n# A", "mit"),
        ("---\nlicense: other\nlicense_name: some-terms\n---\n", "some-terms"),
        ("# no metadata", None),
        ("---\nlicense: [\n---\n", None),
        ("---\njust text\n---\n", None),
    ):
        card.write_text(text, "utf-8")
        assert model_card.stated_license(ModelRef(str(tmp_path / "unet"))) == stated
        monkeypatch.setattr(sources, "cached", lambda source, file: card)
        assert model_card.stated_license(ModelRef("org/name")) == stated
    assert model_card.stated_license(ModelRef(str(tmp_path / "nowhere"))) is None


def test_cards_of_hub_models_are_fetched_at_the_start_where_the_hub_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, known = [], {"org/network": ["README.md", "weights.bin"], "org/reference": ["model_index.json"]}

    def model_info(self: HfApi, repository: str, **_: Any) -> SimpleNamespace:
        if repository not in known:
            raise ConnectionError("out of reach")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in known[repository]])

    def hub_file(source: ModelRef, file: str) -> str:
        asked.append((source.location, file))
        raise UsageError("out of reach")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(sources, "hub_file", hub_file)
    monkeypatch.setattr(sources, "cached", lambda source, file: Path() if source.location == "org/vae" else None)
    models = Models(reference="org/reference", generator="org/network/weights.bin", vae="org/vae")
    model_card.fetch_licenses(ModelStore(models, StudentSettings(), torch.device("cpu")))
    assert asked == [("org/network", "README.md")]
    known["org/reference"].append("README.md")
    del known["org/network"]
    model_card.fetch_licenses(ModelStore(models, StudentSettings(), torch.device("cpu")))
    assert asked[1:] == [("org/reference", "README.md")]


def test_the_kohya_form_of_the_adapter_names_every_layer(finished: Path, tmp_path: Path) -> None:
    (source,) = (
        block for _, block in pages.blocks("docs/models.md", "python") if "convert_state_dict_to_kohya" in block
    )
    exec(source.replace("OUT/", f"{finished}/").replace("adapter_kohya", f"{tmp_path}/adapter_kohya"), {})
    plain = load_file(finished / "adapter/pytorch_lora_weights.safetensors")
    kohya = load_file(tmp_path / "adapter_kohya.safetensors")
    for key, factor in plain.items():
        layer = "lora_" + key.removesuffix(".weight").rpartition(".lora_")[0].replace(".", "_")
        part = "lora_down" if key.endswith("lora_A.weight") else "lora_up"
        assert torch.equal(kohya.pop(f"{layer}.{part}.weight"), factor)
        if part == "lora_down":
            assert kohya.pop(f"{layer}.alpha") == factor.shape[0]  # so that alpha / rank is 1
    assert kohya == {}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; keeps what it gets."""

    received: dict[str, bytes]
    asked: list[tuple[str, str]]
    repository: dict[str, Any]
    status = 200

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "org/name", "xetEnabled": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            self.repository.update(json.loads(body))
            self._answer({"url": "https://huggingface.co/org/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in (line["value"] for line in lines if line["key"] == "file"):
                self.received[line["path"]] = base64.b64decode(line["content"])
            self._answer(
                {"commitUrl": "https://huggingface.co/org/name/commit/0", "commitOid": "0" * 40, "success": True}
            )

    def _answer(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Recorded", (Hub,), {"received": {}, "asked": [], "repository": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        yield handler
        server.shutdown()


def test_push_uploads_exactly_the_export(finished: Path, hub: type[Hub]) -> None:
    assert push(finished, "org/name", private=True) == f"{constants.ENDPOINT}/org/name"
    local = {
        prefix + str(file.relative_to(root)): file.read_bytes()
        for prefix, root in (("", finished / "model"), ("adapter/", finished / "adapter"))
        for file in root.rglob("*") if file.is_file()
    }  # fmt: skip
    assert hub.received == local
    assert hub.repository["visibility"] == "private"
    hub.received.clear()
    result = CliRunner().invoke(app, ["push", str(finished / "model"), "org/name"])
    assert result.stdout == f"{constants.ENDPOINT}/org/name\n"
    assert hub.received == local
    assert hub.repository["visibility"] != "private"
    assert (hub.repository["organization"], hub.repository["name"]) == ("org", "name")
    assert {token for _, token in hub.asked} == {"Bearer hf_of_the_test"}


def test_a_hub_that_refuses_is_one_sentence(finished: Path, hub: type[Hub]) -> None:
    hub.status = 403
    with pytest.raises(RunError, match=r"^org/name could not be uploaded: [^\n]+$"):
        push(finished, "org/name")


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(
    finished: Path, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="holds no exported model"):
        push(tmp_path, "org/name")
    for name in ("name", "a/b/c", "org/na me", "org/--"):
        with pytest.raises(UsageError, match="is no name for a repository"):
            push(finished, name)
    damaged = finished / "model/README.md"
    text = damaged.read_text("utf-8")
    damaged.write_text("# mine", "utf-8")
    with pytest.raises(UsageError, match=r"README\.md has changed"):
        push(finished, "org/name")
    damaged.write_text(text, "utf-8")
    secret = finished / "adapter/.env"
    secret.write_text("TOKEN=1", "utf-8")
    with pytest.raises(UsageError, match=r"adapter/\.env is not of the run"):
        push(finished, "org/name")
    secret.unlink()
    listed = finished / "adapter/manifest.json"
    listed.rename(finished / "manifest.json")  # an adapter that nothing vouches for was left out without a word
    with pytest.raises(UsageError, match=r"adapter is not as the run wrote it \(manifest\.json is missing\)"):
        push(finished, "org/name")
    (finished / "manifest.json").rename(listed)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="the hub needs a token"):
        push(finished, "org/name")
    assert hub.asked == []
