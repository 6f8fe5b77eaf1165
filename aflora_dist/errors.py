"""Errors that a person can act on. Their message is what is shown, so it says what to do instead."""


class AFLoRAError(ValueError):
    """Something the user asked for cannot be done as asked."""


class UnsupportedEngineError(AFLoRAError):
    """The way training was set up cannot be frozen exactly; the message says what to use instead."""


class DivergedError(AFLoRAError):
    """Training broke down: a loss or a freezing score is not finite."""
