"""What a run found, for people: pictures of a process and of the accuracy, and one static HTML page."""

from distpro.report.figures import plot_curves, plot_process
from distpro.report.page import write_report

__all__ = ["plot_curves", "plot_process", "write_report"]
