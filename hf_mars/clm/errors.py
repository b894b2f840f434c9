"""The one exception that a user of the command line can cause."""


class UsageError(ValueError):
    """A request that cannot work. The message names the argument, its value and what is allowed."""
