"""The page that a run ends with: one self-contained file, OUT/report.html."""

from rlhf_t2i.tools.report.page import write_report

__all__ = ["write_report"]
