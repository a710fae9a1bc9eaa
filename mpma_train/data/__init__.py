"""Image-report pairs: readers of published data sets, the prepared store, the training data set."""

from .store import Store

__all__ = ["Store"]
