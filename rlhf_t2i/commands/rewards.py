"""``rlhf-t2i rewards list|check|new`` and ``rlhf-t2i divergences list``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands import output
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils.inputs import JsonObject

rewards_app = typer.Typer(help="List, check and write reward plugins.", no_args_is_help=True)
divergences_app = typer.Typer(help="List divergence plugins.", no_args_is_help=True)


@rewards_app.command("list")
def list_rewards() -> None:
    """Show every installed reward and whether it can run here."""
    from rlhf_t2i.plugins import listing

    listing.print_rewards()


@divergences_app.command("list")
def list_divergences() -> None:
    """Show every installed divergence. VJPs: gradients through both denoisers' inputs, which cost a backward pass."""
    from rlhf_t2i.plugins import listing

    listing.print_divergences()


@rewards_app.command("check")
def check(
    reward: Annotated[str, typer.Argument(help="A reward's name, or path/to/file.py:Class.")],
    options: Annotated[
        list[str] | None,
        typer.Option("--options", "-o", metavar="KEY=VALUE", help="A reward's own option; repeatable."),
    ] = None,
    device: output.DeviceOption = "auto",
    size: Annotated[int, typer.Option(min=8, max=4096, metavar="PIXELS", help="Height of the test images.")] = 64,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A list whose first three prompts are asked [default: three of our own]."),
    ] = None,
) -> None:
    """Test a reward: shape, determinism, gradient, cost. Exit code 1 if a check fails."""
    parsed = parse_options(options or [])

    from rlhf_t2i.plugins import process_state, registry
    from rlhf_t2i.tools.reward_check import PROMPTS, check_reward

    asked = PROMPTS if prompts is None else first_prompts(prompts, len(PROMPTS))
    where = output.torch_device(device)
    with process_state.observed() as changed:
        built = registry.reward(reward, **parsed)
    output.print_findings(f"rewards check {reward}", check_reward(built, where, size, changed, asked))


@rewards_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The name recipes will use, e.g. my_reward.")],
    directory: Annotated[
        Path,
        typer.Option("--dir", parser=output.given_path, metavar="DIR", help="Where to write the package's folder."),
    ] = Path(),
    model: Annotated[
        str | None, typer.Option(help="A transformers model to score with: CLIP- and SigLIP-like, or a classifier.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The class of a classifier that scores [default: the first].")
    ] = None,
) -> None:
    """Write an installable package with a reward and its test."""
    from rlhf_t2i.plugins import registry
    from rlhf_t2i.plugins.scaffold import Scaffold, write_package

    if name in registry.registered(registry.REWARDS):
        owner = registry.registered(registry.REWARDS)[name][0].package
        raise UsageError(f"a reward called {name!r} is installed already, by {owner}")
    if model is None and label is not None:
        raise UsageError("--label is the class of a classifier: give the model, too, with --model")
    scaffold = Scaffold()
    if model is not None:
        from rlhf_t2i.tools.model_reward import scaffold_of

        scaffold = scaffold_of(model, label)
    folder = write_package(name, directory, scaffold)
    typer.echo(f"Wrote {folder}. Next:")
    typer.echo(f"  pip install -e {shlex.quote(f'{folder}[dev]')}")
    typer.echo(f"  rlhf-t2i rewards check {name}")
    typer.echo(f"  python -m pytest {shlex.quote(str(folder))}")


def first_prompts(path: str, count: int) -> tuple[str, ...]:
    """The first prompts of a list that differ from one another.

    Raises:
        UsageError: The list cannot be read, or holds fewer.
    """
    from rlhf_t2i.algorithm import prompts
    from rlhf_t2i.recipe import shipped

    found: dict[str, None] = {}
    for prompt in prompts.stream(shipped.resolve(path, "--prompts: "), place="--prompts: "):
        found[prompt] = None
        if len(found) == count:
            return tuple(found)
    raise UsageError(f"--prompts: {path} holds {len(found)} different prompts: the checks ask {count}")


def parse_options(pairs: list[str]) -> JsonObject:
    """``["a=1", "b=x"]`` to ``{"a": 1, "b": "x"}``; values are YAML scalars.

    Raises:
        UsageError: A pair without ``=``, or a value that is not YAML.
    """
    from rlhf_t2i.recipe.reading import Override

    return {given.key: given.value for given in (Override.parse(pair, "--options", "KEY=VALUE") for pair in pairs)}
