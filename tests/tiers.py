"""Which tests run when (CONTRIBUTING.md): the fast ones before every commit, all in CI.

A test is in the third tier if it is marked ``ray`` or ``slow``, or needs a GPU; in the first if its file is listed
here and it is not; else in the second.
"""

from __future__ import annotations

FAST = (
    "cluster/test_dispatch.py",
    "cluster_files/test_examples.py",
    "evaluation/test_statistics.py",
    "evaluation/test_images.py",
    "families/test_conditioning.py",
    "families/test_frozen.py",
    "families/test_loading.py",
    "families/test_registry.py",
    "families/test_seam.py",
    "math",
    "plan/test_geometry.py",
    "plan/test_simulation.py",
    "plan/test_zero.py",
    "project/test_helping.py",
    "project/test_signatures.py",
    "recipe/test_docs.py",
    "recipe/test_mistakes.py",
    "recipe/test_overrides.py",
    "recipe/test_prompts.py",
    "recipe/test_typed_values.py",
    "recipe/test_yaml.py",
    "report/test_comparison.py",
    "rewards/test_precision.py",
    "rewards/test_preprocessing.py",
    "rewards/test_qwen_images.py",
    "rewards/test_registry.py",
    "rewards/test_role.py",
    "rewards/test_traits.py",
    "security/test_terminal.py",
    "training/test_history.py",
    "test_layers.py",
    "test_tiers.py",
)
"""Files and folders below ``tests/`` whose tests call functions: no processes, no training, no whole commands."""

SECOND_RAY_STREAM = (
    "cluster_files/test_commands.py",
    "golden/test_golden.py",
    "rewards/test_isolated.py",
    "rewards/test_ray.py",
    "training/test_bad_steps.py",
    "training/test_faults.py",
    "training/test_restore.py",
)
"""Files whose tests over Ray run beside those of all other files, under ``make test``."""


def tier(file: str, marks: set[str]) -> str:
    """``fast``, ``local`` or ``all`` for a test.

    Args:
        file: Its file, relative to ``tests/``.
        marks: The names of its markers.
    """
    if marks & {"ray", "slow", "gpu"}:
        return "all"
    return "fast" if file in FAST or file.split("/")[0] in FAST else "local"
