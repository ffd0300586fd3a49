"""The exception for mistakes of users, and helpers for its messages."""

import difflib
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


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


def cause_of(error: BaseException) -> str:
    """Return the type and the message of an error on one line of at most 300 characters, cut between words.

    torch.compile wraps the error of an operation in one that lists the operation's tensors; the operation's is taken.
    """
    text = one_line(error)
    wrapped = re.search(r"Dynamo failed .*: got (\w+)\((['\"])(.+?)\2\)(?: |$)", text)
    kind, said = (wrapped[1], wrapped[3]) if wrapped else (type(error).__name__, text)
    return f"{kind}: {textwrap.shorten(said.rstrip('.'), 300, placeholder=' ...')}"


def shown_path(path: str | Path) -> str:
    """Return a path within the current folder relative to it, and any other path as it is."""
    path = Path(path)
    absolute, here = path.resolve(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def require(condition: object, message: str) -> None:
    """Raise a UserError if a condition is false.

    Raises:
        UserError: the condition is false.
    """
    if not condition:
        raise UserError(message)


@contextmanager
def settings_as_options(options: Mapping[str, str], values: Mapping[str, object]) -> Iterator[None]:
    """Name the option that a user typed in a UserError that begins with the name and the value of a setting.

    Args:
        options: for each setting its option.
        values: the values of the settings; a message about something else of the same name, such as a file, has
            another value.
    """
    try:
        yield
    except UserError as error:
        found = re.match(r"(?:[\w ]+: )?(\w+)(?= is ([^,;]+)[,;])", str(error))
        value = None if found is None else values.get(found[1])
        if found is None or found[1] not in options or found[2] not in (str(value), repr(value)):
            raise
        raise UserError(f"{options[found[1]]}{str(error)[found.end() :]}") from error


def similar(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the most similar known word, whose case does not count; none if no known word is similar.

    >>> similar("xDeepFM", ["DeepFM", "XDeepFM"]), similar("embedding_dmi", ["embedding_dim"]), similar("x", ["fit"])
    (['XDeepFM'], ['embedding_dim'], [])
    """
    lowered = {name.lower(): name for name in known}
    return [lowered[found] for found in difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=cutoff)]


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean X?``, or an empty text if no known word is similar."""
    return "".join(f"; did you mean {name}?" for name in similar(word, known, cutoff))


def nearest_path(path: Path) -> str:
    """Return ``; did you mean PATH?`` for a similar entry beside a path, or an empty text."""
    found = nearest(path.name, [entry.name for entry in path.parent.glob("*")])
    return found.replace("mean ", f"mean {str(path).removesuffix(path.name)}", 1)


def in_yaml(value: object) -> str:
    """Return a value as a YAML has it.

    >>> in_yaml(None), in_yaml(True), in_yaml([512, "x"])
    ('null', 'true', '[512, x]')
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


KIND_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "Path": "a path",
    "list": "a list", "tuple": "a list", "Sequence": "a list", "dict": "keys with values",
}  # fmt: skip
"""Type of a value -> what is expected, in words."""


def joined(words: Sequence[str], conjunction: str) -> str:
    """Return words on one line, with a conjunction before the last.

    >>> joined(["a"], "or"), joined(["a", "b"], "or"), joined(["a", "b", "c"], "and")
    ('a', 'a or b', 'a, b and c')
    """
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def listed(words: Collection[str], most: int = 20) -> str:
    """Return the first words, and how many more there are, on one line.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], most=2)
    ('a, b, c', 'a, b and 1 more')
    """
    some = [word.replace("\n", "\\n") for word in words]
    return ", ".join(some[:most]) + (f" and {len(some) - most} more" if len(some) > most else "")


def nearest_first(word: str, known: Iterable[str], introduction: str, cutoff: float = 0.6) -> str:
    """Return the suggestion of ``nearest``, then the known words, at most 40 of them, after an introduction.

    >>> nearest_first("fitt", ["fit", "test"], "the commands are"), nearest_first("x", ["fit"], "the commands are")
    ('; did you mean fit? The commands are fit, test', '; the commands are fit')
    """
    words = list(known)
    suggestion = nearest(word, words, cutoff).replace("\n", "\\n")
    sentence = f"{introduction} {listed(words, most=40)}"
    return f"{suggestion} {sentence[0].upper()}{sentence[1:]}" if suggestion else f"; {sentence}"
