"""Faults in code of the user, such as a network of their own: the place, and how to define it."""

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from lightning_dlrm.contracts.errors import cause_of, joined, shown_path

_INSTALLED = {Path(path).resolve() for path in sysconfig.get_paths().values()}
_HERE = Path(__file__).resolve().parents[2]
_PACKAGES = (_HERE / "lightning_dlrm", _HERE / "datamodules")

_ARGUMENTS = {"CTRNetwork": ["features", "seed"], "Optimizer": ["params"], "LRScheduler": ["optimizer"]}
"""Base class -> the arguments with which this project makes an instance, before those of the configuration."""
_NO_INIT = r"before Module\.__init__\(\) call"
"""What torch says of a module whose ``__init__`` does not call that of its base first."""


def fault_in_own_code(error: BaseException) -> tuple[str | None, str]:
    """Return where the user's own code caused an error, such as ``own.py, line 12, in score``, and the cause; no place
    if it did not.

    The place is the innermost frame of own code. A call whose arguments do not fit an own method, and an own class that
    lacks a method, have no such frame: the place is then that of the method or the class, and the cause says how to
    define the method.
    """
    if (place := place_in_own_code(error)) is not None:
        remedy = "; call super().__init__(...) first" if re.search(_NO_INIT, str(error)) else ""
        return place, f"{cause_of(error)}{remedy}"
    called = re.match(r"([\w.]+)\.(\w+)\(\) (?:takes|missing|got) ", str(error))
    if isinstance(error, TypeError) and called and (owner := _own_class(called[1], error)) is not None:
        return _place_of(owner, called[2]), f"{cause_of(error)}; {_remedy(owner, called[2], error)}"
    frame = _innermost_frame(error)
    owner = None if frame is None else type(frame.f_locals.get("self"))
    if frame is None or owner is None or not _is_own_class(owner):
        return None, cause_of(error)
    method, cause = frame.f_code.co_name, cause_of(error)
    # So the methods of torch's and Lightning's base classes refuse a call if an own class does not define them.
    if isinstance(error, NotImplementedError):
        cause = f"{owner.__name__} does not define {method}"
    lacks_method = re.search("define|must be implemented", cause) is not None
    return _place_of(owner), f"{cause}; define {_form(owner, method)}" if lacks_method else cause


def place_in_own_code(error: BaseException) -> str | None:
    """Return the innermost frame of the user's own code in an error's traceback, such as ``own.py, line 12, in score``;
    None if there is none.

    Own code belongs neither to this project nor to an installed package. torch.compile names the frames of what it
    compiles in its message.
    """
    frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "(.+?)", line (\d+), in (\w+)', str(error))
    for file, line, name in reversed(frames):
        if _is_own(file):
            return f"{shown_path(file)}, line {line}, in {name}"
    return None


def with_place(made_by: Callable[..., Any]) -> str:
    """Return the name of a class, method or function, with its file and line if it is the user's own.

    >>> with_place(dict)
    'dict'
    """
    name = getattr(made_by, "__qualname__", type(made_by).__name__).rpartition("<locals>.")[2]
    if not (inspect.isclass(made_by) or inspect.isfunction(made_by)) or not _is_own_class(made_by):
        return name
    return f"{name} ({_file_and_line(made_by)})"


def _is_own(file: str) -> bool:
    path = Path(file)
    return path.is_file() and not any(
        folder in _INSTALLED or folder in _PACKAGES or folder.name == "site-packages"
        for folder in path.resolve().parents
    )


def _is_own_class(made_by: Callable[..., Any]) -> bool:
    return _has_own_file(sys.modules.get(made_by.__module__))


def _has_own_file(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and _is_own(file)


def _own_class(name: str, error: BaseException) -> type | None:
    """Return the class of this qualified name in a module of the user's; None if there is none.

    Of several, it is the one that the innermost frame of the error's traceback with one of them calls, or whose
    instance it uses; None if no frame has exactly one.
    """
    found: dict[type, None] = {}
    for module in list(sys.modules.values()):
        part: Any = module
        for key in name.split("."):
            part = vars(part).get(key) if hasattr(part, "__dict__") else None
        # The file last: there are thousands of modules, and looking at a file takes long.
        if inspect.isclass(part) and part.__qualname__ == name and _has_own_file(module):
            found[part] = None
    if len(found) < 2:
        return next(iter(found), None)
    for frame in reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)]):
        values = [value.func if isinstance(value, partial) else value for value in frame.f_locals.values()]
        classes = {
            base for value in values for base in inspect.getmro(value if inspect.isclass(value) else type(value))
        }
        if len(used := found.keys() & classes) == 1:
            return used.pop()
    return None


def _place_of(owner: type, method: str = "") -> str:
    if method in vars(owner):
        return f"{_file_and_line(getattr(owner, method))}, in {owner.__name__}.{method}"
    return f"{_file_and_line(owner)}, class {owner.__name__}"


def _file_and_line(made_by: Callable[..., Any]) -> str:
    file = str(getattr(sys.modules[made_by.__module__], "__file__", made_by.__module__))
    try:
        return f"{shown_path(file)}, line {inspect.getsourcelines(made_by)[1]}"
    except OSError:
        return shown_path(file)


def _remedy(owner: type, method: str, error: TypeError) -> str:
    """Return how to change a method of an own class whose arguments do not fit."""
    missing = re.findall(r"'(\w+)'", str(error).partition(" missing ")[2])
    if method == "__init__" and missing and not set(missing) & set(_given(owner)):
        return f"give {joined(missing, 'and')} a default"
    return f"define it as {_form(owner, method)}"


def _given(owner: type) -> list[str]:
    """Return the arguments with which this project makes an instance of an own class."""
    bases = [base.__name__ for base in inspect.getmro(owner)]
    return next((_ARGUMENTS[name] for name in bases if name in _ARGUMENTS), [])


def _form(owner: type, method: str) -> str:
    """Return the form of a method as the base of an own class has it, such as ``score(self, dense_BI, vectors)``."""
    if method == "__init__":
        return f"__init__({', '.join(['self', *_given(owner), '...'])})"
    bases = [base for base in inspect.getmro(owner)[1:] if not _is_own_class(base)]
    base = next((base for base in bases if method in vars(base)), owner)
    parameters = inspect.signature(getattr(base, method)).parameters.values()
    listed = ", ".join(
        str(one.replace(annotation=inspect.Parameter.empty)) for one in parameters if one.name not in ("args", "kwargs")
    )
    return f"{method}({listed})"


def _innermost_frame(error: BaseException) -> FrameType | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None
