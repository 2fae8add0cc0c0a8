"""A reward that needs another version of a package than the core has: a constructed conflict, through Ray."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.plugins.environments import overlay_python
from rlhf_t2i.recipe.schema import Recipe, RewardChoice
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.reward_failure import RewardFailure
from tests.limits import HANG_S
from tests.rewards.builders import Identity

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REWARD = '''
import os
import time
from rlhf_t2i.plugins import Reward

class Clash(Reward):
    """Works with version 2 of a package; the core's environment has version 1."""

    pip = PACKAGES

    def score(self, images, prompts):
        import clashing_package  # inside, so that the class can be read where the package is another
        if clashing_package.VERSION != 2:
            raise RuntimeError(f"version {clashing_package.VERSION} of clashing_package, not 2")
        if "hang" in prompts:
            time.sleep(3600)
        if "crash" in prompts and not os.path.exists(CRASHED):
            open(CRASHED, "w").close()
            os._exit(1)
        if "bad" in prompts:
            raise ValueError("cannot read this")
        return clashing_package.weight(images)
'''


def write_wheel(folder: Path, version: int) -> Path:
    """A wheel of one module, as pip wants it."""
    name = f"clashing_package-{version}.0"
    module = f"VERSION = {version}\n\n\ndef weight(images):\n    return (images ** {version}).mean((1, 2, 3))\n"
    files = {
        "clashing_package.py": module,
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: clashing-package\nVersion: {version}.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{name}.dist-info/RECORD"] = record + f"{name}.dist-info/RECORD,,\n"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in files.items():
            wheel.writestr(inner, text)
    return path


class Clash(Reward):
    """The same reward without a package, for comparison."""

    def score(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return (images**2).mean((1, 2, 3))


@pytest.fixture(scope="module")
def conflict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(the reward's file, what its environment needs); version 1 is importable here, as the core's own."""
    folder = tmp_path_factory.mktemp("conflict")
    with zipfile.ZipFile(write_wheel(folder, 1)) as wheel:
        wheel.extractall(folder / "core")
    sys.path.insert(0, str(folder / "core"))
    old_cache = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    file = folder / "clash.py"
    packages = ["--no-index", "--no-deps", str(write_wheel(folder, 2))]
    file.write_text(f"CRASHED = {str(folder / 'crashed')!r}\nPACKAGES = {tuple(packages)!r}\n{REWARD}")
    yield f"{file}:Clash", packages
    sys.path.remove(str(folder / "core"))
    if old_cache is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = old_cache


@pytest.fixture(scope="module")
def isolated(conflict: tuple[str, list[str]], ray_for_rewards: None) -> Iterator[Reward]:
    from rlhf_t2i.cluster.isolated import start_isolated

    reward = start_isolated(RewardChoice(name=conflict[0], timeout_s=HANG_S), torch.float32)
    yield reward
    reward.close()


IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def test_the_overlay_changes_one_package_and_shares_the_rest(conflict: tuple[str, list[str]]) -> None:
    python = overlay_python(conflict[1])
    assert overlay_python(conflict[1]) == python
    code = (
        "import clashing_package, torch, rlhf_t2i; print(clashing_package.VERSION, torch.__file__, rlhf_t2i.__file__)"
    )
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    import clashing_package  # type: ignore[import-not-found]

    import rlhf_t2i

    assert clashing_package.VERSION == 1
    assert said == ["2", torch.__file__, rlhf_t2i.__file__]
    size = sum(p.stat().st_size for p in python.parents[1].rglob("*") if p.is_file() and not p.is_symlink())
    assert size < 2**20


def test_packages_that_cannot_be_installed_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"with --no-index, a-package-that-is-not-there cannot be made"):
        overlay_python(["--no-index", "a-package-that-is-not-there"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_and_gradients_come_from_the_other_version(isolated: Reward) -> None:
    settings = {"device": torch.device("cpu"), "dtype": torch.float32}
    local = RewardRole({"r": Clash()}, Identity(), **settings)
    here = local.value_and_grad(IMAGES, PROMPTS)["r"]
    for size in (None, 1):
        role = RewardRole({"r": isolated}, Identity(), micro_batch=size, **settings)
        values, grads = role.value_and_grad(IMAGES, PROMPTS)["r"]
        assert torch.allclose(values, here[0])
        assert torch.allclose(grads, here[1])
        assert torch.allclose(role.score(IMAGES, PROMPTS)["r"], local.score(IMAGES, PROMPTS)["r"])


def test_without_ray_it_says_what_to_do(conflict: tuple[str, list[str]], make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(algorithm__rewards=f"[{{name: '{conflict[0]}'}}]")
    with pytest.raises(UsageError, match=r"needs an environment of its own .*: use placement: ray"):
        LocalCluster(recipe)


def test_without_its_environment_it_fails(conflict: tuple[str, list[str]]) -> None:
    from rlhf_t2i.plugins import registry

    with pytest.raises(RuntimeError, match=r"version 1 of clashing_package, not 2"):
        registry.reward(conflict[0]).score(IMAGES, PROMPTS)


def test_its_errors_name_reward_prompt_and_sample(isolated: Reward, tmp_path: Path) -> None:
    role = RewardRole({"far": isolated}, Identity(), device=torch.device("cpu"), failures_dir=tmp_path)
    with pytest.raises(RewardFailure, match=r"'far' failed on the prompt 'bad': .*ValueError: cannot read this"):
        role.value_and_grad(IMAGES, ["a", "bad", "c"])
    assert list(tmp_path.glob("far-*/image.png"))


def test_a_lost_actor_is_restarted_and_the_call_repeated(isolated: Reward) -> None:
    values, _ = isolated.call(IMAGES, ["a", "crash", "c"], gradient=False)
    assert torch.allclose(values, (IMAGES**2).mean((1, 2, 3)))


def test_a_hang_ends_after_the_timeout(conflict: tuple[str, list[str]], isolated: Reward) -> None:
    from rlhf_t2i.cluster.isolated import IsolatedReward

    impatient = IsolatedReward(conflict[0], {}, timeout_s=HANG_S)
    impatient._timeout_s = 1.0
    with pytest.raises(RunError, match=r"did not answer within 1 s"):
        impatient.score(IMAGES, ["a", "hang", "c"])
    impatient.close()
