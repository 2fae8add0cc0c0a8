"""What happens when a reward fails: an error that names reward and prompt, and the sample on disk."""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from pathlib import Path

from torch import Tensor

from rlhf_t2i.errors import RunError
from rlhf_t2i.utils import images


class RewardFailure(RunError):
    """A reward raised, or gave a wrong shape or a value or gradient that is not finite.

    Args:
        reward: The reward's label.
        prompt: Of the failing sample.
        reason: What was wrong.
        saved: The folder that holds the sample, if one was written.
    """

    def __init__(self, reward: str, prompt: str, reason: str, saved: str | None = None) -> None:
        # All arguments go to Exception so that the error survives pickling between actors.
        super().__init__(reward, prompt, reason, saved)
        self.reward, self.prompt, self.reason, self.saved = reward, prompt, reason, saved

    def __str__(self) -> str:
        where = f"; the sample is in {self.saved}" if self.saved else ""
        return f"reward {self.reward!r} failed on the prompt {self.prompt!r}: {self.reason}{where}"


def save_sample(
    folder: Path,
    reward: str,
    prompt: str,
    reason: str,
    image: Tensor | None,
    latent: Tensor | None,
    cause: BaseException | None = None,
) -> Path:
    """Write ``failure.json``, ``image.png`` and ``sample.safetensors`` (exact values) to a folder of their own.

    The folder's name comes from the content, so a repeated call writes the same folder again.

    Args:
        folder: OUT/failures.
        reward: The reward's label.
        prompt: Of the sample.
        reason: What was wrong.
        image: [3, H, W] in [0, 1].
        latent: [C, h, w].
        cause: The plugin's exception; its traceback is saved.
    """
    from safetensors.torch import save_file

    tensors = {
        # Cloned: the two may be views of one tensor, which safetensors refuses.
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in (("image", image), ("latent", latent))
        if tensor is not None
    }
    digest = hashlib.sha256(f"{reward}\0{prompt}\0{reason}".encode())
    for tensor in tensors.values():
        digest.update(tensor.float().numpy().tobytes())
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", reward).strip("._") or "reward"
    target = folder / f"{name[-60:]}-{digest.hexdigest()[:10]}"
    target.mkdir(parents=True, exist_ok=True)
    if image is not None:
        (target / "image.png").write_bytes(images.png(image))
    if tensors:
        save_file(tensors, target / "sample.safetensors")
    report = {"reward": reward, "prompt": prompt, "reason": reason}
    if cause is not None:
        report["traceback"] = "".join(traceback.format_exception(cause))
    (target / "failure.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return target
