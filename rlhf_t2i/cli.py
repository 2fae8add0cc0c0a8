"""The command line: parses, calls, prints. ``rlhf-t2i --help`` imports neither torch nor Ray."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rlhf_t2i.commands import ablate, demo, encode, evaluate, families, init, plan, push, recipes, rewards
from rlhf_t2i.commands import app as app_module
from rlhf_t2i.commands import run as run_module
from rlhf_t2i.commands import sample as sample_module
from rlhf_t2i.errors import RunError, Stopped, UsageError, printable
from rlhf_t2i.utils.streams import survive_lost_readers

app = typer.Typer(
    name="rlhf-t2i",
    help="Align one- and few-step text-to-image generators with human-preference rewards (Diff-Instruct*).",
    epilog="A first run: rlhf-t2i demo. A recipe for your models: rlhf-t2i init --help, or one of rlhf-t2i recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo_command)
app.command("init")(init.init_command)
app.command("run")(run_module.run_command)
app.command("encode")(encode.encode_command)
app.command("sample")(sample_module.sample_command)
app.command("plan")(plan.plan_command)
app.command("eval")(evaluate.eval_command)
app.command("ablate")(ablate.ablate_command)
app.add_typer(recipes.recipes_app, name="recipes")
app.command("app")(app_module.app_command)
app.command("push")(push.push_command)
app.add_typer(rewards.rewards_app, name="rewards")
app.add_typer(rewards.divergences_app, name="divergences")
app.add_typer(families.families_app, name="families")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Let the reward http send prompts and images there; repeatable."),
    ] = None,
    allow_token: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIABLE", help="Let the reward http send this environment variable; repeatable."),
    ] = None,
) -> None:
    if allow_host or allow_token:
        from rlhf_t2i.plugins import consent

        consent.allow(allow_host or (), allow_token or ())
    if version:
        from rlhf_t2i import __version__

        typer.echo(f"rlhf-t2i {__version__}")
        raise typer.Exit
    from rlhf_t2i.utils.versions import check_torchvision

    check_torchvision()


def main() -> None:
    """Run the CLI: exit code 0 done, 1 failed while running, 2 bad recipe or usage, 128 + N stopped by signal N."""
    survive_lost_readers()
    try:
        app(standalone_mode=True)
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Stopped as stopped:
        _fail(str(stopped), stopped.exit_code, at_once=stopped.repeated)
    except KeyboardInterrupt:
        _fail("stopped", 130, at_once=True)


def _fail(message: str, code: int, at_once: bool = False) -> None:
    print(f"rlhf-t2i: {printable(message)}", file=sys.stderr, flush=True)
    if at_once:  # threads of Ray and torch must not delay the exit
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
