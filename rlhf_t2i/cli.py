"""The command line: parses, calls, prints. ``rlhf-t2i --help`` imports neither torch nor Ray."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rlhf_t2i.commands import ablate, evaluate, plan, rewards
from rlhf_t2i.commands import run as run_module
from rlhf_t2i.commands import sample as sample_module
from rlhf_t2i.errors import RunError, UsageError

app = typer.Typer(
    name="rlhf-t2i",
    help="Align one-step text-to-image generators with human-preference rewards (Diff-Instruct*).",
    epilog="A first run, from the repository: rlhf-t2i run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run_module.run_command)
app.command("sample")(sample_module.sample_command)
app.command("plan")(plan.plan_command)
app.command("eval")(evaluate.eval_command)
app.command("ablate")(ablate.ablate_command)
app.add_typer(rewards.rewards_app, name="rewards")
app.add_typer(rewards.divergences_app, name="divergences")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from rlhf_t2i import __version__

        typer.echo(f"rlhf-t2i {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the CLI: 0 done, 1 failed while running, 2 bad recipe or usage, 130/143 stopped by a signal."""
    try:
        app(standalone_mode=True)
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _fail(message: str, code: int) -> None:
    print(f"rlhf-t2i: {message}", file=sys.stderr, flush=True)
    # Ray and torch threads must not hold the process once the sentence is out.
    if code == 130:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
