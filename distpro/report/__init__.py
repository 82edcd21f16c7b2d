"""What a run found, for people: pictures of a process and of accuracy, the table of a sweep, one static HTML page."""

from distpro.report.figures import plot_curves, plot_process
from distpro.report.page import write_report
from distpro.report.sweeps import sweep_figure, sweep_table, write_csv

__all__ = ["plot_curves", "plot_process", "sweep_figure", "sweep_table", "write_csv", "write_report"]
