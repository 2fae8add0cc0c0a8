"""rlhf-t2i: distributed RLHF for one- and few-step text-to-image generators (Diff-Instruct* and its relatives)."""

__version__ = "0.1.0"
