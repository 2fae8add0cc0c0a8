"""How well a picture shows the text that its prompt quotes, read by RapidOCR (PP-OCR on onnxruntime). No gradient."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.utils.images import to_8_bits

_QUOTED = re.compile(
    r'"([^"]+)"|\u201c([^\u201d]+)\u201d|\u2018([^\u2019]+)\u2019|\u00ab([^\u00bb]+)\u00bb'
    r"|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)"
)


class OCROptions(plugins.Options):
    """What is compared."""

    ignore_case: bool = Field(True, description="letters of either case are the same")
    min_confidence: float = Field(0.5, ge=0, le=1, description="lines that the reader is less sure of do not count")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of the reader")


class OCR(plugins.Reward):
    """1 minus the edit distance of the text read and the text quoted, over the longer one's length.

    Spaces, line breaks and compatibility forms of letters do not count. Several quotes are joined in the prompt's
    order, and lines read from top to bottom, then left to right. RapidOCR's weights come with its package.
    """

    Options = OCROptions
    options: OCROptions
    differentiable = False
    value_range = (0.0, 1.0)
    unit = "similarity"
    license = "Apache-2.0"
    requires = ("rapidocr_onnxruntime", "rapidfuzz")

    def __init__(self, options: OCROptions | None = None) -> None:
        super().__init__(options)
        from rapidocr_onnxruntime import RapidOCR

        threads = self.options.threads
        self._reader = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    @classmethod
    def footprint(cls, options: OCROptions) -> plugins.Footprint | None:
        """None: the reader runs on the CPU, outside torch."""
        return None

    @classmethod
    def refuse_prompts(cls, options: OCROptions, prompts: Iterable[str]) -> str | None:
        """A prompt that quotes nothing."""
        return next((_nothing(prompt) for prompt in prompts if not _QUOTED.search(prompt)), None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Similarities [B] in [0, 1] of images [B, 3, H, W].

        Raises:
            ValueError: A prompt quotes nothing, or an image is not finite.
        """
        from rapidfuzz.distance import Levenshtein

        if not bool(images.isfinite().all()):
            raise ValueError("an image is not finite")
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            wanted, found = self._normalized(quoted(prompt)), self._normalized(self.read(image))
            scores.append(Levenshtein.normalized_similarity(wanted, found))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, image: Tensor) -> str:
        """The text in an image [3, H, W], line by line."""
        pixels = to_8_bits(image).permute(1, 2, 0).flip(-1).cpu().numpy()  # blue first, as OpenCV has it
        found, _ = self._reader(pixels)
        lines = [(box, text) for box, text, sure in found or [] if float(sure) >= self.options.min_confidence]
        return "\n".join(text for _, text in sorted(lines, key=lambda line: _place(line[0])))

    def _normalized(self, text: str) -> str:
        joined = "".join(unicodedata.normalize("NFKC", text).split())
        return joined.casefold() if self.options.ignore_case else joined


def quoted(prompt: str) -> str:
    """What a prompt quotes, in straight or typographic quotation marks; apostrophes within words are none.

    Raises:
        ValueError: Nothing.
    """
    found = ["".join(groups) for groups in _QUOTED.findall(prompt)]
    if not found:
        raise ValueError(_nothing(prompt))
    return " ".join(found)


def _nothing(prompt: str) -> str:
    return f'the prompt {prompt!r} quotes no text: write it as a sign that says "OPEN"'


def _place(box: Any) -> tuple[int, float]:
    """Row and column of a line: boxes whose middles are less than half a height apart are one row."""
    ys = [float(point[1]) for point in box]
    height = max(ys) - min(ys)
    return round(sum(ys) / len(ys) / max(height, 1.0)), min(float(point[0]) for point in box)
