"""Copy a run's first and last preview (the same prompts and noise) to before.png and after.png.

python pictures.py OUT FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(run: Path, folder: Path) -> None:
    """Previews are OUT/samples/step_NNNNNN.png; step 0 is the generator before training."""
    previews = sorted((run / "samples").glob("step_*.png"))
    if len(previews) < 2:
        sys.exit(f"{run}/samples holds {len(previews)} previews; at least two are needed")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(previews[0], folder / "colorfulness_before.png")
    shutil.copyfile(previews[-1], folder / "colorfulness_after.png")
    print(f"{previews[0].name} and {previews[-1].name} -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
