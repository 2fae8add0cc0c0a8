"""Write ``emoji64/style_probe.json``: which team drew a picture, for ``rlhf-t2i eval --metrics class_entropy``.

``python -m zoo.style_probe`` (after zoo.scorers); the same least-squares probe as the card's.
"""

from __future__ import annotations

import json

from transformers import CLIPModel

from zoo import card, data, scorers


def main() -> None:
    """Fit on the judge's image vectors and write labels, weight and bias."""
    judge = CLIPModel.from_pretrained(data.ROOT / "judge").eval()
    solution = card.style_probe(judge, scorers.Pictures())
    weight = [[round(value, 6) for value in row] for row in solution[:-1].T.tolist()]
    probe = {"labels": list(data.STYLES), "weight": weight, "bias": solution[-1].tolist(), "hard": True}
    (data.ROOT / "style_probe.json").write_text(json.dumps(probe) + "\n", "utf-8")


if __name__ == "__main__":
    main()
