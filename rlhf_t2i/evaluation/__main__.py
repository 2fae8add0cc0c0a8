"""One evaluation in a process of its own: ``python -m rlhf_t2i.evaluation SETTINGS.json OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation.settings import build


def main(settings: str, out: str) -> int:
    """Evaluate; the exit codes are the command line's."""
    from rlhf_t2i.evaluation.run import evaluate

    try:
        evaluate(build(json.loads(Path(settings).read_text("utf-8"))), Path(out))
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
