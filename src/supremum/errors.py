"""Errors that a user can act on: what is wrong, where, and what to do about it."""


class SupremumError(Exception):
    """A failure that is the input's, the budget's or the machine's, not a bug; the command line prints it in one line.

    `cause` names the file or option and what is wrong with it, `remedy` says what to do.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy


class CheckpointError(SupremumError):
    """A model on disk that cannot be trusted or read."""


class BudgetError(SupremumError):
    """A budget that no plan can meet; the message says what the smallest feasible one is."""


class StateError(SupremumError):
    """Resumable state that belongs to another model, configuration or version, or is in use by another process."""
