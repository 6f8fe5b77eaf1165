"""What trains: a method puts its parameters into a model and says what happens to them while training."""

from .base import Control, Method, NoControl

__all__ = ["Control", "Method", "NoControl"]
