"""The page and the before/after table that a run ends with: one self-contained file, OUT/report.html."""

from rlhf_t2i.evaluation.compare import Row, Verdict, comparison, verdicts
from rlhf_t2i.tools.report.page import write_report

__all__ = ["Row", "Verdict", "comparison", "verdicts", "write_report"]
