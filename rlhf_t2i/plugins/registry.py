"""Find plugins: by entry point (``rlhf_t2i.rewards``, ``rlhf_t2i.divergences``) or as ``path/to/file.py:Class``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, Literal, overload

from pydantic import ValidationError

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import guard
from rlhf_t2i.recipe import mistakes, shipped
from rlhf_t2i.utils import files, inputs

if TYPE_CHECKING:
    from rlhf_t2i.plugins.base import Divergence, Options, Reward

REWARDS: Final = "rlhf_t2i.rewards"
DIVERGENCES: Final = "rlhf_t2i.divergences"
_KINDS = {REWARDS: "reward", DIVERGENCES: "divergence"}


@dataclass(frozen=True)
class Plugin:
    """A registered plugin that is not imported yet."""

    name: str
    package: str
    version: str
    entry_point: EntryPoint


def registered(group: str) -> dict[str, list[Plugin]]:
    """All plugins of a group by name; a name that two packages register has two entries."""
    plugins: dict[str, list[Plugin]] = {}
    for entry in entry_points(group=group):
        package = entry.dist.name if entry.dist else "unknown"
        version = entry.dist.version if entry.dist else ""
        plugin = Plugin(entry.name, package, version, entry)
        # One distribution can be listed twice (an editable install beside a build's metadata): that is one plugin.
        if all(plugin.package != other.package for other in plugins.get(entry.name, [])):
            plugins.setdefault(entry.name, []).append(plugin)
    return dict(sorted(plugins.items()))


@overload
def load_class(group: Literal["rlhf_t2i.rewards"], name: str) -> type[Reward]: ...
@overload
def load_class(group: Literal["rlhf_t2i.divergences"], name: str) -> type[Divergence]: ...
@overload
def load_class(group: str, name: str) -> type[Reward] | type[Divergence]: ...
def load_class(group: str, name: str) -> type[Reward] | type[Divergence]:
    """Import a plugin's class.

    Args:
        group: :data:`REWARDS` or :data:`DIVERGENCES`.
        name: A registered name, ``path/to/file.py:Class``, or ``emoji64:file.py:Class`` for one that is shipped.

    Raises:
        UsageError: Unknown name (with the nearest known), two packages with one name, an import that fails (with
            the reason), or a class of the wrong kind.
    """
    from rlhf_t2i.plugins.base import Divergence, Reward

    kind = _KINDS[group]
    name = shipped.resolve(name)
    cls = _from_file(name, kind) if ".py:" in name else _from_entry_point(group, name, kind)
    base = Reward if group == REWARDS else Divergence
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UsageError(f"{kind} {name!r} is not a subclass of rlhf_t2i.plugins.{base.__name__}")
    if issubclass(cls, Reward):
        _check_declarations(cls, name)
    return cls


def _check_declarations(cls: type[Reward], name: str) -> None:
    """Refuse class attributes of another type: ``requires = "cv2"`` would be three packages, c, v and 2."""
    words = {key: getattr(cls, key) for key in ("requires", "pip")}
    for key, value in words.items():
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"reward {name!r}: {key} must be a tuple of texts, as in {key} = ('name',)")
    ends = cls.value_range
    numbers = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not numbers or not ends[0] < ends[1]:
        raise UsageError(f"reward {name!r}: value_range must be two numbers, the smaller first, as in (0.0, 1.0)")


def _from_entry_point(group: str, name: str, kind: str) -> object:
    known = registered(group)
    if name not in known:
        raise UsageError(f"unknown {kind} {mistakes.shown(name)!r}; {mistakes.hint(name, known)}")
    if len(known[name]) > 1:
        packages = " and ".join(p.package for p in known[name])
        raise UsageError(f"{kind} {name!r} is registered by {packages}: uninstall one, or name the class by its file")
    plugin = known[name][0]
    with guard.building(f"{kind} {name!r} of package {plugin.package} cannot be imported"):
        return plugin.entry_point.load()


def _from_file(name: str, kind: str) -> object:
    file, _, attribute = name.rpartition(":")
    path = files.absolute(file)
    if not os.path.isfile(path):  # noqa: PTH113 - no error for names too long, or loops of links
        raise UsageError(f"{kind} {mistakes.shown(name)!r}: no such file: {mistakes.shown(str(path))}")
    inputs.read_bytes(path, "plugin file", inputs.SOURCE, f"{kind} {mistakes.shown(name)!r}: ")  # Python has no limit
    # The module name is derived from the path, so that every process agrees on it and two files never collide.
    module_name = f"rlhf_t2i_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            with guard.building(f"{kind} {name!r} cannot be imported"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(module, attribute):
        raise UsageError(f"{kind} {name!r}: {path.name} defines no {attribute!r}")
    return getattr(module, attribute)


def parse_options(
    cls: type[Reward] | type[Divergence],
    place: str,
    options: Mapping[str, object],
    where: Callable[[mistakes.KeyPath], str] | None = None,
) -> Options:
    """Validate a plugin's options against its pydantic model.

    Args:
        cls: The plugin's class.
        place: Names the plugin in the error: ``reward 'pickscore'``.
        options: As in a recipe.
        where: The place of an option in a recipe: ``recipe.yaml, line 7``.

    Raises:
        UsageError: One sentence naming the plugin and the option, or a class without a usable ``Options``.
    """
    from rlhf_t2i.plugins.base import Options

    if not (isinstance(cls.Options, type) and issubclass(cls.Options, Options)):
        raise UsageError(f"{place}: its Options must be a subclass of rlhf_t2i.plugins.Options")
    try:
        with guard.building(f"{place}: its options cannot be read", cls):
            return cls.Options(**options)
    except UsageError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        explained = place if where is None else lambda key: f"{where(key)}: {place}"
        raise mistakes.explain(error.__cause__, cls.Options, options, explained, "option") from None


def divergence(name: str, /, **options: object) -> Divergence:
    """Build a divergence, e.g. ``divergence("pseudo_huber", c_rel=5.4e-4)``.

    Raises:
        UsageError: An unknown name, a wrong option, or an error of the plugin's own code.
    """
    cls = load_class(DIVERGENCES, name)
    return build_divergence(cls, name, parse_options(cls, f"divergence {name!r}", options))


def build_divergence(cls: type[Divergence], name: str, options: Options) -> Divergence:
    """Build a divergence of its class and validated options.

    Raises:
        UsageError: An error of the plugin's own code.
    """
    with guard.building(f"divergence {name!r} cannot be built", cls):
        return cls(options)


def reward(name: str, /, **options: object) -> Reward:
    """Build a reward, e.g. ``reward("pickscore", model="path/to/folder")``; its weights are loaded here.

    Raises:
        UsageError: An unknown name, a wrong option, missing packages, or an error of the plugin's own code.
    """
    from rlhf_t2i.plugins.base import Reward

    cls = load_class(REWARDS, name)
    parsed = parse_options(cls, f"reward {name!r}", options)
    check_packages(cls, name)
    with guard.building(f"reward {name!r} cannot be built", cls):
        cls.preflight(parsed)
        if not _takes_options(cls):
            raise UsageError(
                f"reward {name!r} cannot be built: write its __init__ as `def __init__(self, options=None)` and call "
                "super().__init__(options)"
            )
        built = cls(parsed)
    if "_text_cache" not in vars(built):
        raise UsageError(f"reward {name!r} cannot be built: its __init__ must call super().__init__(options)")
    assert isinstance(built, Reward)
    return built


def check_packages(cls: type[Reward], name: str) -> None:
    """Refuse a reward whose packages are missing.

    Raises:
        UsageError: Names the packages.
    """
    if not cls.pip:  # else they are in an environment of its own
        missing = [package for package in cls.requires if importlib.util.find_spec(package) is None]
        if missing:
            raise UsageError(f"reward {name!r} needs {', '.join(missing)}, which is not installed: pip install it")


def _takes_options(cls: type[Reward]) -> bool:
    try:
        inspect.signature(cls).bind(None)
    except TypeError:
        return False
    return True
