"""The table of ``rlhf-t2i plan --compare`` and ``--gpus``: placements side by side, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from rlhf_t2i.commands.plan_report import bytes_text
from rlhf_t2i.tools.planning.options import Option
from rlhf_t2i.utils.terminal import PlainConsole

_SHOWN = 6


def show(options: Sequence[Option], before: Option | None, device: str) -> None:
    """Print placements, what limits each, which is fastest and why, and the lines to set.

    Args:
        options: The fastest that fits first.
        before: The recipe's own placement, if it is one of so many devices.
        device: The name of the device.
    """
    console = PlainConsole(width=80)
    fitting = [option for option in options if option.fits]
    table = Table(
        box=None, padding=(0, 1, 0, 0), title=f"Placements on {device}, the fastest first", title_justify="left"
    )
    table.add_column("devices and roles; settings", overflow="fold", width=31)
    for name in ("s/step", "img/s", "GPU-h", "GB", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limited by", overflow="fold")
    rows = [*([before] if before else []), *fitting[:_SHOWN]]
    for option in rows:
        name = "as it is: " if option.as_it_is else ""
        table.add_row(f"{name}{option.describe()}; {option.settings()}", *_cells(option), end_section=True)
    console.print(table)
    missing = len(options) - len(fitting)
    if missing:
        console.print(f"{missing} other placement{'s' * (missing > 1)} did not fit")
    for line in _conclusion(options[0], before):
        console.print(line)
    if fitting:  # not wrapped: it is copied
        console.print(fitting[0].lines(), soft_wrap=True)


def _cells(option: Option) -> list[str]:
    group, role, share = option.limit
    where = f" in {group}" if len(option.seconds.idle) > 1 else ""
    memory = f"{option.memory / 1e9:.3g}" + ("" if option.fits else " (!)")
    return [
        f"{option.seconds.step:.3g}",
        f"{option.images_per_second:.3g}",
        f"{option.duration.gpu_hours:.3g}",
        memory,
        f"{max(0.0, option.idle):.0%}",
        f"{role}{where}, {share:.0%}",
    ]


def _conclusion(best: Option, before: Option | None) -> Iterator[str]:
    """Which is fastest, and why."""
    if not best.fits:
        yield f"Nothing fits: the smallest needs {bytes_text(best.memory)} per process."
        return
    yield f"Fastest: {best.describe()} ({best.settings()})."
    if before is None:
        return
    ratio = before.seconds.step / best.seconds.step
    if ratio <= 1.01:
        yield "The recipe is as fast as any placement that was tried."
        return
    yield f"{ratio:.2g} times as fast as the recipe is now. What changes, now and then:"
    yield (
        f"  devices that wait for others {max(0.0, before.idle):.0%}, {max(0.0, best.idle):.0%}; exposed communication "
        f"{before.seconds.exposed:.2g} s, {best.seconds.exposed:.2g} s"
    )
    kinds = {"generator": "generator update", "assistant": "assistant updates"}
    parts = (
        f"{text} {getattr(before.seconds, k):.3g} s, {getattr(best.seconds, k):.3g} s" for k, text in kinds.items()
    )
    yield f"  {'; '.join(parts)}"
