"""rlhf-t2i: distributed RLHF for one-step text-to-image generators (Diff-Instruct* and its relatives)."""

__version__ = "0.1.0"
