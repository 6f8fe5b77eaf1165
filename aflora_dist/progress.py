"""`Progress` under its name of earlier releases."""

from .control import Progress

__all__ = ["Progress"]
