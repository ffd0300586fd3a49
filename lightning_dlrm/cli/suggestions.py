"""Keys that were probably meant by an unknown one."""

import inspect
from collections.abc import Sequence

from lightning_dlrm.cli.classes import OFFERED_CLASSES
from lightning_dlrm.contracts.errors import joined, listed, similar
from lightning_dlrm.tables.embeddings import TableSettings

_SYNONYMS = {
    "lr": ("learning_rate", "lr"),
    "learning_rate": ("learning_rate", "lr"),
    "optimizer": ("table_optimizer", "dense_optimizer"),
    "epochs": ("max_epochs",),
    "steps": ("max_steps",),
    "seed": ("seed_everything",),
    "gpus": ("devices",),
    "ranks": ("ranks", "devices"),
    "folder": ("path",),
    "data_dir": ("path",),
    "model": ("network",),
    "checkpoint": ("ckpt_path",),
    "output": ("run_dir",),
}
"""Name of a key elsewhere, or in some classes -> its names here."""
_SECTIONS = {
    "data": "LightningDataModule",
    "model.table_optimizer": "UpdateRule",
    "model.dense_optimizer": "Optimizer",
    "model.network": "CTRNetwork",
}
"""Section of a class -> the base of its classes."""


def suggested_keys(key: str, known: Sequence[str]) -> str:
    """Return ``; did you mean KEY?`` with the full names of the keys that were probably meant, or where all are listed.

    Args:
        key: the unknown key.
        known: the keys that are known, of all options or of one class.
    """
    if meant := _meant(key.replace("-", "_"), known):
        return f"; did you mean {joined(meant, 'or')}?"
    named = [name for name in known if name.rpartition(".")[2] != "help"]
    return "; --help.all lists all keys" if "config" in named else f"; expected one of {listed(named)}"


def _meant(key: str, known: Sequence[str]) -> list[str]:
    parts = key.split(".")
    sections = {".".join(split[:n]) for name in known if (split := name.split(".")) for n in range(1, len(split))}
    if key.removesuffix(".help") in sections:
        return []
    named = [name for name in known if name.rpartition(".")[2] != "help"]
    places = _places(named)
    if parts[0] not in sections:
        rest = key[len(parts[0]) :]
        full = [f"{place}{rest}" for place in _of_name(parts[0], places)]
        listed_ones = [one for one in full if one in places or one in known]
        if found := listed_ones or [one for one in full if f"{one.removesuffix(rest)}.help" in known]:
            return found
    for n in range(1, len(parts)):
        if (section := ".".join(parts[:n])) not in sections:
            for meant in similar(section, sections):
                corrected = ".".join([meant, *parts[n:]])
                # Settings of a class are not listed, but its section has a key for help.
                if corrected in known or f"{meant}.help" in known:
                    return [corrected]
            break
    found = _similar(key, named) or _of_name(parts[-1], places)
    for n in range(len(parts) - 1, 0, -1):
        found = found or _similar(".".join(parts[:n]), named)
    return found


def _similar(key: str, named: Sequence[str]) -> list[str]:
    """Return the nearest key, which is not a section of the key; none if no key is similar."""
    return similar(key, [one for one in named if one != key and not key.startswith(f"{one}.")])


def _of_name(name: str, places: Sequence[str]) -> list[str]:
    """Return the keys with this name or a similar one, or with a synonym, in any section."""
    of_name: dict[str, list[str]] = {}
    for place in places:
        of_name.setdefault(place.rpartition(".")[2], []).append(place)
    names = _SYNONYMS.get(name) or ([name] if name in of_name else similar(name, of_name, 0.7))
    return [place for one in names for place in of_name.get(one, [])]


def _places(named: Sequence[str]) -> list[str]:
    """Return keys and, below them, those of the classes that can be chosen there."""
    places = list(named)
    prefix = ""
    if "config" in named:
        for section, base in _SECTIONS.items():
            for found in OFFERED_CLASSES:
                parents = inspect.getmro(found)
                if base in (parent.__name__ for parent in parents):
                    # Classes pass options on to their base classes.
                    keys = (inspect.signature(parent).parameters for parent in parents if parent is not object)
                    places += [f"{section}.{one}" for names in keys for one in names]
        prefix = "model.network."
    if "tables" in named or prefix:
        places += [f"{prefix}tables.{one}" for one in inspect.signature(TableSettings).parameters]
    return list(dict.fromkeys(places))
