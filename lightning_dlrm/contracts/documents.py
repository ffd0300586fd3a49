"""Read JSON and YAML files, which may be damaged or foreign, and check their form."""

from pathlib import Path
from typing import Any, TypeVar

from lightning_dlrm.contracts.errors import UserError, one_line

Form = TypeVar("Form")


def parse_json(content: str | bytes, form: type[Form], where: str, advice: str) -> Form:
    """Return the content of a JSON file as a value of a type, such as a dataclass.

    No value is converted: ``"1"`` is refused for an int, and a list for a mapping.

    Args:
        content: the file's content.
        form: the type, with the types of everything within.
        where: path of the file, for messages.
        advice: what the user can do about a damaged file, for messages.

    Raises:
        UserError: the content is not JSON in UTF-8, or has another form.
    """
    # Importing it takes a tenth of a second.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raised = first.get("ctx", {}).get("error")
        place = "".join(f"{part}: " for part in first["loc"])
        message = str(raised) if isinstance(raised, UserError) else f"{place}{first['msg']}"
        raise UserError(f"{where} is damaged or was changed ({one_line(UserError(message))}); {advice}") from error


def read_json(path: Path, form: type[Form], advice: str) -> Form:
    """Return the content of a JSON file as a value of a type; see ``parse_json``.

    Raises:
        UserError: the file cannot be read, or ``parse_json`` refuses its content.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    return parse_json(content, form, str(path), advice)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML in UTF-8, or does not hold keys with values.
    """
    # Processes that read no YAML start without it.
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}; correct it there") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; expected keys such as 'trainer:', each with its values")
    return content


def is_inner_path(name: str) -> bool:
    """Return whether a path that a file names stays within its folder: relative, and without ``..``."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
