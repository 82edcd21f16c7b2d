"""Tasks: the loss and the metrics of what the student is for, one file each."""

from distpro.tasks.classification import Classification, Metrics

__all__ = ["Classification", "Metrics"]
