"""The one error that a user's input causes."""


class SweepError(ValueError):
    """Bad input; its message is one sentence for the user."""
