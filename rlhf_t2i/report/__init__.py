"""The page and the before/after table that a run ends with: one self-contained file, OUT/report.html."""

from rlhf_t2i.report.compare import Row, Verdict, comparison, verdicts
from rlhf_t2i.report.page import write_report

__all__ = ["Row", "Verdict", "comparison", "verdicts", "write_report"]
