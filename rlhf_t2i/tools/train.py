"""A whole run, from the recipe to the report: what ``rlhf-t2i run`` and :func:`rlhf_t2i.train` do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, targets

if TYPE_CHECKING:
    from rlhf_t2i.training.callbacks import TrainCallback
    from rlhf_t2i.training.run import RunResult


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    allow_recipe_change: bool,
    address: str | None,
    callback: TrainCallback,
    command: str = "",
) -> RunResult:
    """Train and write the report; arguments and errors as :func:`rlhf_t2i.training.run.run`.

    A placement that does not fit and a folder that is taken are refused before torch is imported.
    """
    check_placement(recipe)
    _check_free(folder, resume)
    from rlhf_t2i.tools import report
    from rlhf_t2i.tools.live_report import LiveReport
    from rlhf_t2i.training import run as training

    result = training.run(
        recipe, folder, resume=resume, allow_recipe_change=allow_recipe_change, address=address,
        callback=LiveReport(callback), command=command,
    )  # fmt: skip
    callback.on_phase("writing the report")
    with files.disk_errors(result.out):
        report.write_report(result.out)
    return result


def _check_free(out: Path, resume: bool) -> None:
    targets.check_folder(out, option("out"))
    if (out / "recipe.yaml").exists() and not resume:
        raise UsageError(
            f"{out} already holds a run: continue it with {option('resume')}, or choose another {option('out')}"
        )
