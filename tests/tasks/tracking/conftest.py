"""Fixtures of the tracking tests."""

from servers import server

__all__ = ["server"]
