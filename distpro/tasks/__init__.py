"""Tasks: the loss and the metrics of what the student is trained for, one file each."""

from distpro.tasks.classification import Classification, Metrics, after_epochs

__all__ = ["Classification", "Metrics", "after_epochs"]
