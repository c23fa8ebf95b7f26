"""One self-contained page that shows what a run did."""

from mmpretrain.report.extras import load_extras, save_result_extras
from mmpretrain.report.page import write_report

__all__ = ["load_extras", "save_result_extras", "write_report"]
