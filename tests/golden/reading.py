"""What a run, or an evaluation, left on the disk, in numbers.

Names of files, and of what is in them, are written here alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

Numbers = dict[str, list[float | None]]

RENAMED: dict[str, str] = {}
"""Names of numbers as recorded, and as they are called now; a key that ends with ``/`` renames every name under it."""
TIMES = ("timing", "memory", "mfu")
"""Metrics that depend on the machine."""
TRAINED = "unet"
"""The folder of ``model/`` with the weights that were trained."""


@dataclass
class Result:
    """The outcome of a case.

    Attributes:
        numbers: Values by name: one a step, an image, a prompt, or a single one.
        weights: The trained tensors.
        others: Digests of what must stay as it is: the rest of the exported tensors, pictures.
    """

    numbers: Numbers
    weights: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def recorded_names(self) -> Result:
        """With the names that the recording uses."""
        return Result({recorded(name): v for name, v in self.numbers.items()}, self.weights, self.others)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every part."""
        return {"numbers": of_numbers(self.numbers), "weights": of_tensors(self.weights)} | self.others

    def summaries(self) -> dict[str, list[float]]:
        """Of each tensor its sum, its norm and its product with a fixed vector, in float64."""
        return {name: summary(tensor) for name, tensor in sorted(self.weights.items())}


def of_run(out: Path) -> Result:
    """metrics.jsonl, the exported model, and the table after training."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    numbers: Numbers = {}
    for name in sorted({name for row in rows for name in row if name not in TIMES}):
        values = [row.get(name) for row in rows]
        if all(value is None or isinstance(value, int | float) for value in values):
            numbers[f"metrics/{name}"] = values
    after = json.loads((out / "evaluation/after/results.json").read_text("utf-8"))
    for name, metric in after["metrics"].items():
        numbers[f"after/{name}"] = metric["by_image"] or metric["by_prompt"]
    files = sorted((out / "model").rglob("*.safetensors"))
    weights, rest = {}, {}
    for file in files:
        folder = str(file.parent.relative_to(out / "model"))
        for name, tensor in load_file(file).items():
            if folder == TRAINED:
                weights[name] = tensor
            else:
                rest[f"{folder}/{name}"] = tensor
    return Result(numbers, weights, {"other tensors": of_tensors(rest)})


def of_evaluation(out: Path, sample: Path) -> Result:
    """Scores, diversity, the table, and the images of ``eval`` and ``sample``."""
    data = json.loads((out / "results.json").read_text("utf-8"))
    numbers: Numbers = {}
    for name, metric in data["metrics"].items():
        for kind in ("by_image", "by_prompt"):
            if metric[kind]:
                numbers[f"{kind}/{name}"] = metric[kind]
    for row in data["table"]:
        for column in ("mean", "low", "high"):
            numbers[f"table/{row['metric']}/{column}"] = [row[column]]
    pictures = [np.asarray(Image.open(out / image["file"])) for image in data["images"]]
    numbers["pixels/eval"] = [float(picture.mean() / 255) for picture in pictures]
    pictures.append(np.asarray(Image.open(sample)))
    numbers["pixels/sample"] = [float(pictures[-1].mean() / 255), float(pictures[-1].std() / 255)]
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(str(picture.shape).encode() + picture.tobytes())
    return Result(numbers, others={"pictures": digest.hexdigest()})


def recorded(name: str) -> str:
    """The name under which a number of today was recorded."""
    kind, _, rest = name.partition("/")
    for old, new in RENAMED.items():
        if rest == new or (new.endswith("/") and rest.startswith(new)):
            return f"{kind}/{old}{rest[len(new) :]}"
    return name


def of_numbers(numbers: Numbers) -> str:
    """SHA-256 of the exact values, by name."""
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def summary(tensor: Tensor) -> list[float]:
    """Sum, L2 norm and product with a fixed vector, to 12 digits."""
    flat = tensor.double().flatten().numpy()
    values: list[Any] = [flat.sum(), np.linalg.norm(flat), flat @ directions(flat.size)]
    return [float(f"{value:.12g}") for value in values]


def directions(count: int) -> np.ndarray:
    """Numbers between -1 and 1 that depend on no library: splitmix64 of 1, 2, 3 ..."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**63 - 1.0
