"""Read and check JSON and YAML files, which may be damaged or made by other programs."""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_dlrm.contracts.errors import UserError, one_line, require

if TYPE_CHECKING:
    import yaml
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

Form = TypeVar("Form")

MAX_BYTES = 32 * 2**20
"""Most bytes of a JSON or YAML file; dataset.json of all of Terabyte takes a tenth of it."""

_INVISIBLE = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f{_INVISIBLE}]")
"""Characters that change how a terminal shows a text: control characters except tab and line feed, and characters that
change the direction of writing."""
_CONTROL_IN_JSON = re.compile(
    rf"[{_INVISIBLE}]|(?<!\\)(?:\\\\)*\\(?:[bfr]|u00[0189][0-9a-f]|u007f|u202[a-e]|u206[6-9])", re.IGNORECASE
)
"""The same characters in JSON, where those below the space are written as escapes."""


_ADAPTERS: "dict[object, TypeAdapter[Any]]" = {}
"""Of each form: making one takes milliseconds."""


def parse_json(content: str | bytes, form: type[Form], where: str, advice: str) -> Form:
    """Return the content of a JSON file as a value of a type, such as a dataclass.

    No value is converted: ``"1"`` is refused for an int, and a list for a mapping.

    Args:
        content: the file's content.
        form: the type, with the types of everything within.
        where: path of the file, for messages.
        advice: what the user can do about a damaged file, for messages.

    Raises:
        UserError: the content is not JSON in UTF-8, has another form, or control characters.
    """
    # Importing it takes a tenth of a second.
    from pydantic import ValidationError

    try:
        text = content if isinstance(content, str) else content.decode()
        require(not _CONTROL_IN_JSON.search(text), "it has control characters")
        return _adapter(form).validate_json(text, strict=True)
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{where} is damaged or was changed ({one_line(error)}); {advice}") from error
    except ValidationError as error:
        raise UserError(f"{where} is damaged or was changed ({_first_fault(error)}); {advice}") from error


def parse_settings(values: Mapping[str, Any], form: type[Form], where: str) -> Form:
    """Return settings that a user wrote, such as the content of a YAML file, as a value of a type; see ``parse_json``.

    Args:
        values: the settings.
        form: the type.
        where: path of the file, for messages.

    Raises:
        UserError: a setting is missing, unknown, of another type, or out of range.
    """
    from pydantic import ValidationError

    try:
        return _adapter(form).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_fault(error, always_place=True)}") from error


def _adapter(form: type[Form]) -> "TypeAdapter[Form]":
    from pydantic import TypeAdapter

    if form not in _ADAPTERS:
        _ADAPTERS[form] = TypeAdapter(form)
    return _ADAPTERS[form]


def _first_fault(error: "ValidationError", always_place: bool = False) -> str:
    """Return the first fault on one line, without the middle of a long one: names in files may have any length.

    Args:
        error: pydantic's.
        always_place: begin with the place also if this project's own check raised the error.
    """
    first = error.errors(include_url=False)[0]
    place = "".join(f"{part}: " for part in first["loc"])
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        words = one_line(UserError(f"{place if always_place else ''}{raised}"))
    else:
        words = one_line(UserError(_words_of_setting(first) if always_place else f"{place}{first['msg']}"))
    return words if len(words) <= 1000 else f"{words[:500]} ... {words[-500:]}"


def _words_of_setting(fault: "ErrorDetails") -> str:
    """Return the fault of a setting in a YAML file, and what to write instead."""
    place, value = ": ".join(map(str, fault["loc"])), fault["input"]
    if fault["type"] == "missing":
        return f"{place} is missing"
    found = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    found = found if len(found) <= 200 else f"{found[:200]}..."
    if fault["type"] in ("list_type", "tuple_type"):
        remedy = "write a list" + (f": [{value}]" if isinstance(value, str | int | float) else "")
    elif fault["type"] in ("dict_type", "mapping_type", "dataclass_type"):
        remedy = "write keys with their values"
    else:
        remedy = fault["msg"].replace("Input should be", "expected")
    return f"{place}: found {found}; {remedy}"


def read_json(path: Path, form: type[Form], advice: str) -> Form:
    """Return the content of a JSON file as a value of a type; see ``parse_json``.

    Raises:
        UserError: the file cannot be read, or ``parse_json`` refuses its content.
    """
    return parse_json(read_bounded(path, advice), form, str(path), advice)


def read_bounded(path: Path, advice: str) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: the file cannot be read, is not a regular file, or has more than ``MAX_BYTES``.
    """
    try:
        require(not path.exists() or path.is_file(), f"{path} is not a file; {advice}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    require(len(content) <= MAX_BYTES, f"{path} has more than {MAX_BYTES:,} bytes; {advice}")
    return content


CONFIGURATION = "expected a configuration: keys such as 'trainer:', each with its values"
"""What a YAML file is expected to be if its reader does not say."""

YAML_FAULTS = (ValueError, OverflowError, LookupError, AttributeError, TypeError)
"""Exceptions of PyYAML other than YAMLError: for dates that do not exist, thousands of digits, tags of other values."""

MAX_VALUES = 1_000_000
"""Most values of a YAML file, each counted as often as an alias repeats it."""


def read_yaml(path: Path, expected: str = CONFIGURATION) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Args:
        path: the file.
        expected: what the file should hold and where it comes from, for messages.

    Raises:
        UserError: the file cannot be read, is not YAML in UTF-8, has a key twice, or does not hold keys with values.
    """
    # Imported here, so that processes that read no YAML start sooner.
    import yaml

    text = read_bounded(path, "check the path")
    try:
        content = parse_yaml(text.decode())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({yaml_fault(error)}); {expected}") from error
    require(content is not None, f"{path} is empty; {expected}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys with values; {expected}")
    return content


_YAML_WORDS = {
    r"found character '@' that cannot start any token": "a value begins with @; put it in quotes",
    r"found undefined alias '(\w+)'": r"*\1 has no anchor &\1; put the value in quotes if it is a text",
    r"found character '\\t' that cannot start any token": "a tab at the beginning; indent with spaces",
    r"expected <block end>, but found .*": "this line is not indented as the lines before it",
    r"mapping values are not allowed here": "a colon after a value, or a line that is indented too far",
    r"could not find expected ':'": "a key without a colon",
    r"expected ',' or '([]}])', but got .*": r"a comma, or the closing \1, is missing before this place",
    r"found unexpected end of stream": "the closing quotation mark is missing",
    r"could not determine a constructor for the tag '(?:tag:yaml.org,2002:)?(.*)'": r"the tag \1 is not allowed",
}
"""PyYAML's description of a fault -> plain words."""


def yaml_fault(error: Exception) -> str:
    """Return why a text is not YAML, with the line if it is known, on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8: save the file as UTF-8"
    if mark is None or not problem:
        return one_line(error)
    for pattern, words in _YAML_WORDS.items():
        problem = re.sub(pattern, words, problem)
    begin = getattr(error, "context_mark", None)
    since = f", in what begins in line {begin.line + 1}" if begin is not None and begin.line != mark.line else ""
    return one_line(UserError(f"line {mark.line + 1}: {problem}{since}"))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        UserError: a key occurs twice in a mapping, a number is too large, or aliases repeat values without end.
        yaml.YAMLError, RecursionError: the text is not YAML of plain values, or is nested too deeply.
    """
    import yaml

    fast, plain = _strict_loaders()
    try:
        try:
            value = yaml.load(text, fast)
        except yaml.YAMLError:
            # The parser in Python describes faults better.
            value = yaml.load(text, plain)
    except UserError:
        raise
    except YAML_FAULTS as error:
        raise yaml.YAMLError(repr(error)) from error
    if _count_values(value, {}) > MAX_VALUES:
        raise UserError(f"aliases make more than {MAX_VALUES:,} values; write the values themselves")
    return value


@functools.cache
def _strict_loaders() -> tuple[type["yaml.SafeLoader"], type["yaml.SafeLoader"]]:
    """Return loaders that refuse equal keys, of which PyYAML takes the last in silence: one on libyaml, which takes a
    tenth of the time, if PyYAML has it; and one in Python."""
    import yaml

    def strict(loader: type) -> Any:
        class StrictLoader(loader):
            def __init__(self, text: str) -> None:
                super().__init__(text)
                self.checked: set[yaml.MappingNode] = set()

            def flatten_mapping(self, node: yaml.MappingNode) -> None:
                # Each mapping is checked before it takes the keys of those that it merges.
                if node not in self.checked:
                    self.checked.add(node)
                    _check_keys(node)
                super().flatten_mapping(node)

        return StrictLoader

    return strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader)), strict(yaml.SafeLoader)


def _check_keys(node: "yaml.MappingNode") -> None:
    """Check that a mapping has no key twice."""
    import yaml

    keys: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        twice = f"the key {key.value} occurs twice, again in line {key.start_mark.line + 1}; keep one"
        require(key.value not in keys, twice)
        keys.add(key.value)


def _count_values(value: Any, known: dict[int, float]) -> float:
    """Return the number of values in a YAML value, infinite if it contains itself, and refuse too large numbers and
    control characters."""
    if isinstance(value, int):
        require(abs(value) < 1 << 63, "a number has more than 64 bits; give a smaller one")
    if isinstance(value, str):
        require(not _CONTROL.search(value), f"a value has control characters: {value[:40]!r}")
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(item, known) for item in inner)
    return known[id(value)]


def printable(text: str) -> str:
    """Return a text with control characters and characters that UTF-8 lacks as escapes."""
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.encode(errors="backslashreplace").decode()


def is_name(name: str) -> bool:
    """Return whether a name from a file may name a file: short, without separators and control characters."""
    return is_inner_path(name) and "/" not in name and name.isprintable()


def is_inner_path(name: str) -> bool:
    """Return whether a path that a file names stays within its folder: relative, without ``..``, and of a length that
    file systems allow."""
    parts = name.split("/")
    short = len(name) <= 1024 and max(map(len, parts)) <= 200
    return short and "\0" not in name and not {"", ".", ".."} & set(parts)
