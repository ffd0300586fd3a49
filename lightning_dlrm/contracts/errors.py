"""The one exception for what a user can get wrong, and errors of others as part of its message."""


class UserError(ValueError):
    """A mistake in a path, a file, an option or a combination of them.

    Its message is shown to the user as it is, on one line and without a traceback; it says what
    was found, what was expected and what to do. The command line exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


def require(condition: object, message: str) -> None:
    """Check what a user can get wrong.

    Raises:
        UserError: with the message, if the condition is false.
    """
    if not condition:
        raise UserError(message)
