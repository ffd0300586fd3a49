"""The YAML files that the project ships."""

from pathlib import Path

SCHEMAS = "datasets/"
"""Folder of the schemas of raw logs, which are not configurations."""


def shipped_configs() -> Path:
    """Return the project's ``configs/``: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Return the names of all shipped YAML files, such as ``dlrm.yaml`` and ``datasets/avazu.yaml``."""
    return sorted(path.relative_to(shipped_configs()).as_posix() for path in shipped_configs().rglob("*.yaml"))


def yaml_files_beside(path: str | Path) -> list[str]:
    """Return the YAML files of the folder in which a path would be, in the form of the path."""
    return sorted(str(one) for one in Path(path).parent.glob("*") if one.suffix in (".yaml", ".yml"))
