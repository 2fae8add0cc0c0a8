"""What finished work depends on: the content of models, prompts and rewards, so that caches never mix two of them."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from rlhf_t2i.algorithm import prompt_hub
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import benchmarks
from rlhf_t2i.evaluation.settings import SPECIAL, Settings
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, fingerprints
from rlhf_t2i.utils.versions import installed

# Before 3.11.8 and 3.12.2, two threads in ast.parse at once end in "AST constructor recursion depth mismatch"
# (python/cpython#106905), and the ablation's rows are digested in threads.
_PARSER = threading.Lock()
_PACKAGES = ("rlhf-t2i", "torch", "diffusers", "transformers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    return installed(_PACKAGES)


def of_model(text: str) -> str:
    """A digest of a local model's files; a hub id with its commit."""
    source = sources.parse(text)
    if source.is_local:
        return fingerprints.of_path(source.location)
    return f"{source.location}/{source.file or ''}@{_commit(source) or source.revision or 'main'}"


def of_plugin(group: str, name: str, options: Mapping[str, object]) -> str:
    """A digest of a plugin's code, its options (defaults included), and the weights that they name.

    The code is the class's file and what it imports of its own package or folder; other packages count by their
    versions, see :func:`versions`.

    Raises:
        UsageError: Unknown plugin or option.
    """
    cls = registry.load_class(group, name)
    parsed = registry.parse_options(cls, f"metric {name!r}", options)
    code = sorted({file for base in cls.__mro__ for file in _code(base)})
    parts = [f"{cls.__qualname__} {file.name} {fingerprints.of_path(file)}" for file in code]
    parts += [f"{key}={_of_value(value)}" for key, value in sorted(parsed.model_dump().items())]
    return fingerprints.of_text("\n".join(parts))


def of_recipe(recipe: Recipe) -> dict[str, str]:
    """Digests of everything outside a recipe that its run depends on, by the key that names it."""
    algorithm = recipe.algorithm
    choices = [(registry.DIVERGENCES, "algorithm.divergence", algorithm.divergence)]
    choices += [(registry.REWARDS, f"algorithm.rewards: {reward.key}", reward) for reward in algorithm.rewards]
    choices += [(registry.REWARDS, f"algorithm.eval_rewards: {r.key}", r) for r in algorithm.eval_rewards]
    found = {key: of_plugin(group, choice.name, choice.options) for group, key, choice in choices}
    for key in ("reference", "generator", "assistant", "vae"):
        text = getattr(recipe.models, key)
        if text is not None:
            found[f"models.{key}"] = of_model(text)
    for key in ("prompts", "held_out"):
        if path := getattr(recipe.data, key):
            found[f"data.{key}"] = _of_prompts(path, recipe.revisions)
    return {f"{key} (content)": digest for key, digest in found.items()}


def of_evaluation(settings: Settings) -> dict[str, str]:
    """Digests of everything outside the settings of an evaluation that its results depend on.

    Raises:
        UsageError: A model, prompt list or reward is missing.
    """
    found = {"model": of_model(settings.model), "base": of_model(settings.base or settings.model)}
    prompts = benchmarks.load(settings.prompts, settings.column)
    found["prompts"] = fingerprints.of_lines(prompts.prompts)
    for label, name in settings.named.items():
        if name not in SPECIAL:
            found[label] = of_plugin(registry.REWARDS, name, settings.options.get(label, {}))
    for key in ("vae", "features", "real", "inception", "classes"):
        found[key] = _of_value(getattr(settings, key))
    return found


def _of_prompts(path: str, revisions: Mapping[str, str]) -> str:
    """A digest of a file or folder of prompts; of a dataset of the hub its commit, which a run has pinned."""
    if not path.startswith(prompt_hub.PREFIX):
        return fingerprints.of_path(path)
    source = prompt_hub.DatasetRef.parse(path)
    return f"{source.repository}:{source.split}@{source.pinned(revisions) or 'main'}"


@lru_cache
def _commit(source: sources.ModelRef) -> str | None:
    return sources.commit(source.location, source.revision)


def _of_value(value: object) -> str:
    """An option's value, with the content of a file, folder or hub model that it names."""
    if isinstance(value, dict):
        return str({key: _of_value(item) for key, item in sorted(value.items())})
    if isinstance(value, list | tuple):
        return str([_of_value(item) for item in value])
    if not isinstance(value, str) or not value:
        return repr(value)
    if ".py:" in value:  # a plugin inside a plugin's options: what a surrogate learns
        value = value.rpartition(":")[0]
    try:
        path = files.expanded(value)
        if not path.exists():
            return of_model(value)
    except (UsageError, OSError):  # neither a path nor a hub id
        return repr(value)
    return fingerprints.of_path(path)


def _code(cls: type) -> Iterator[Path]:
    """The source files that a class is made of, as far as they belong to its own package or folder."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    package = cls.__module__.partition(".")[0]
    if not file or package in ("torch", "builtins", "abc", "typing"):
        return
    seen: set[Path] = set()
    todo = [Path(file)]
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        for name in _imports(path.read_bytes()):
            module = sys.modules.get(name)
            own = name.startswith(("rlhf_t2i.plugins", f"{package}.")) and package != "rlhf_t2i"
            found = getattr(module, "__file__", None)
            if found and (own or Path(found).is_relative_to(path.parent)):
                todo.append(Path(found))
            else:
                todo.append(path.parent / f"{name.replace('.', '/')}.py")


@lru_cache(maxsize=4096)
def _imports(source: bytes) -> tuple[str, ...]:
    """The names of modules that a Python source imports, at any depth; none where it is no Python."""
    try:
        with _PARSER:
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names += [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
    return tuple(names)
