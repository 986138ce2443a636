"""The report: one offline HTML file with inline SVG, no script, light and dark, for screen, phone and paper."""

from lowbit.report.page import report_html, write_report
from lowbit.report.run_file import add_evaluation, read_run

__all__ = ["add_evaluation", "read_run", "report_html", "write_report"]
