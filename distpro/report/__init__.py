"""Results for people to read: figures of a process and of accuracy, a sweep's table, one static HTML page."""

from distpro.report.figures import figure_format, plot_curves, plot_process, save_figure
from distpro.report.page import write_report
from distpro.report.sweeps import sweep_figure, sweep_table, write_csv

__all__ = [
    "figure_format",
    "plot_curves",
    "plot_process",
    "save_figure",
    "sweep_figure",
    "sweep_table",
    "write_csv",
    "write_report",
]
