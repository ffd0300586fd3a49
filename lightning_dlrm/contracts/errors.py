"""The exception for mistakes of users, and helpers for its messages."""


class UserError(ValueError):
    """A mistake in a path, a file, an option or a combination of them.

    The command line prints the message on one line, without a traceback, and exits with code 2. The message says what
    was found, what was expected and what to do.
    """

    on_all_ranks = False
    """Whether every rank raises it; the first one of a machine prints it."""


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())


def require(condition: object, message: str) -> None:
    """Raise a UserError if a condition is false.

    Raises:
        UserError: the condition is false.
    """
    if not condition:
        raise UserError(message)
