"""What people who help here are told: the commands exist, the files are valid, CI runs what the README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_t2i import __version__

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"\bmake ((?:[A-Z_]+=\S+ )*)([a-z-]+)")


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_ci_runs_commands_of_the_makefile() -> None:
    workflow = load(".github/workflows/ci.yml")
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert sorted(commands) == ["make docs", "make lint", "make test"]
    assert {command.removeprefix("make ") for command in commands} <= targets()
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true


def test_the_other_ci_runs_exactly_the_same_command() -> None:
    lines = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".github/pull_request_template.md"])
def test_pages_name_targets_that_exist(page: str) -> None:
    named = {target for _, target in COMMAND.findall((ROOT / page).read_text("utf-8"))}
    assert named
    assert named <= targets()


def test_pre_commit_uses_the_versions_of_the_environment() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]
    used = {dependency for hook in hooks for dependency in hook["additional_dependencies"]}
    assert f"ruff=={pins['ruff']}" in used
    assert not [d for d in used if d.startswith("ruff") and d != f"ruff=={pins['ruff']}"]


def test_citation_is_valid() -> None:
    citation = load("CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # required by schema 1.2.0
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    for reference in citation["references"]:
        assert reference.keys() >= {"type", "title", "authors"}
    people = [*citation["authors"], *(a for reference in citation["references"] for a in reference["authors"])]
    assert all("name" in person or {"family-names", "given-names"} <= person.keys() for person in people)


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_issue_forms_have_what_github_requires(form: Path) -> None:
    data = yaml.safe_load(form.read_text("utf-8"))
    assert data.keys() >= {"name", "description", "body"}
    ids = [field["id"] for field in data["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in data["body"])
