"""The task of causal language modelling: chats, prompts with completions, instructions, or plain text."""

from .task import LanguageModelling

__all__ = ["LanguageModelling"]
