"""No recipe alone sends prompts, images or secrets anywhere: hosts and token variables are allowed by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import rlhf_t2i
from rlhf_t2i import cli
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import consent, registry, traits
from rlhf_t2i.recipe.schema import Recipe
from tests.rewards.test_http import GOOD, IMAGES, Server, reward


@pytest.fixture(autouse=True)
def no_consent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user has allowed nothing; the consent file."""
    for variable in consent.VARIABLES.values():
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "rlhf-t2i").mkdir(parents=True)
    return tmp_path / "config" / "rlhf-t2i" / "consent.yaml"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/score", "would send prompts and images to example.com: to allow it, run"),
        ("http://example.com/score", "would send prompts and images to example.com"),
        ("http://127.0.0.1.example.com/", "127.0.0.1.example.com"),
        ("http://localhost.example.com/", "localhost.example.com"),
        ("http://169.254.169.254/latest", "169.254.169.254"),
        ("http://0.0.0.0/", "0.0.0.0"),
        ("http://user:secret@127.0.0.1/", "holds a user name or password"),
    ],
)
def test_a_host_without_consent_is_refused(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        registry.reward("http", url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://localhost:9/", "http://[::1]:9/", "http://127.9.9.9/"])
def test_loopback_needs_no_consent(url: str) -> None:
    registry.reward("http", url=url)


def test_consent_by_command_line_and_https_off_loopback() -> None:
    consent.allow(hosts=["example.com"])
    registry.reward("http", url="https://example.com/score")
    registry.reward("http", url="https://example.com:8443/score")
    with pytest.raises(UsageError, match=r"to example.com unencrypted: use https, or allow it"):
        registry.reward("http", url="http://example.com/score")
    with pytest.raises(UsageError, match=r"sub.example.com"):
        registry.reward("http", url="https://sub.example.com/score")
    consent.allow(hosts=["http://10.0.0.7:8000"])
    registry.reward("http", url="http://10.0.0.7:8000/score")
    with pytest.raises(UsageError, match=r"10\.0\.0\.7:9000"):
        registry.reward("http", url="http://10.0.0.7:9000/score")


def test_consent_by_the_users_file(no_consent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_consent.write_text("hosts: [example.com]\ntokens: [SCORER_TOKEN]\n")
    monkeypatch.setenv("SCORER_TOKEN", "x")
    registry.reward("http", url="https://example.com/", token_env="SCORER_TOKEN")
    for text, words in [("hosts: 3\n", "must be a list"), ("host: [x]\n", "did you mean 'hosts'"), ("[", "YAML")]:
        no_consent.write_text(text)
        with pytest.raises(UsageError, match=words):
            registry.reward("http", url="https://example.com/")


def test_no_token_leaves_without_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(UsageError, match=r"--allow-token AWS_SECRET_ACCESS_KEY") as caught:
        registry.reward("http", url="http://127.0.0.1:9/", token_env="AWS_SECRET_ACCESS_KEY")
    assert "secret" not in str(caught.value)
    consent.allow(tokens=["AWS_SECRET_ACCESS_KEY"])
    registry.reward("http", url="http://127.0.0.1:9/", token_env="AWS_SECRET_ACCESS_KEY")


def test_a_recipe_from_a_stranger_is_refused_before_anything_starts(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = make_recipe().model_dump()
    recipe["algorithm"]["eval_rewards"] = [{"name": "http", "options": {"url": "https://example.com/"}}]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "run", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "--allow-host example.com" in capsys.readouterr().err
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    loaded = Recipe.model_validate(recipe)
    with pytest.raises(UsageError, match=r"rlhf-t2i --allow-host example\.com"):
        rlhf_t2i.plan(loaded)
    consent.allow(hosts=["example.com"])
    traits.resolve(loaded).preflight()


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, server = Server(), Server()
    server.answers = proxy.answers = [GOOD]
    address = proxy.url.removesuffix("/score")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        reward(server).score(IMAGES, ["a", "b"])
        assert (len(server.requests), len(proxy.requests)) == (1, 0)
    finally:
        for running in (proxy, server):
            running.server.shutdown()
            running.server.server_close()


@pytest.mark.parametrize(("option", "kind"), [("--allow-host", "hosts"), ("--allow-token", "tokens")])
def test_the_options_of_the_command_line(option: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("sys.argv", ["rlhf-t2i", option, "a", option, "b", "divergences", "list"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None)
    assert os.environ[consent.VARIABLES[kind]] == "a b"


def test_the_variables_reach_the_roles_processes() -> None:
    from rlhf_t2i.cluster import ray_cluster

    text = Path(ray_cluster.__file__).read_text("utf-8")
    assert "consent.VARIABLES.values()" in text
