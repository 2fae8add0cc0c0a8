"""Draw the README's first picture: ``python docs/make_before_after.py runs/quickstart-DATE``.

The first image of evenly spaced held-out prompts, before and after; none is picked by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from rlhf_t2i.evaluation import results
from rlhf_t2i.utils import numbers

PROMPTS, SIDE, GAP = 10, 96, 4


def main(run: Path) -> None:
    """Write ``docs/images/before_after.png``."""
    rows = [results.read(run / "evaluation" / when) for when in ("before", "after")]
    sheet = Image.new("RGB", (PROMPTS * (SIDE + GAP) - GAP, 2 * (SIDE + GAP) - GAP), "white")
    for row, found in enumerate(rows):
        if found is None:
            sys.exit(f"{run} holds no evaluation before and after training")
        groups = list(found.members.values())
        for column, place in enumerate(numbers.evenly_spaced(len(groups), PROMPTS)):
            index = groups[place][0]
            with Image.open(found.folder / found.images[index]) as image:
                tile = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * (SIDE + GAP), row * (SIDE + GAP)))
            if row == 0:
                print(found.prompts[index])
    sheet.save(Path(__file__).parent / "images/before_after.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
