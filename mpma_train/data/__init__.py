"""Image-report pairs: readers of published data sets, the prepared store, and what training reads of it."""

from .store import Store

__all__ = ["Store"]
