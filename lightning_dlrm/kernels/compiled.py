"""The C library of ``native.c``: compiled at its first use, kept in the cache, called with checked arguments.

This file reads the declarations of the functions' arguments from the source, so that each is written only once.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dlrm.contracts.cache import cache_root
from lightning_dlrm.contracts.disk import flush

_SOURCE = Path(__file__).with_name("native.c")
# No flag may change the results of the formulas as written.
_FLAGS = "-std=c11 -O3 -march=native -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=off"
_THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
_SCALARS = {"bool": ctypes.c_bool, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
_ELEMENTS = {
    "char": (torch.float32, torch.bfloat16),
    "float": (torch.float32,),
    "uint16_t": (torch.bfloat16,),
    "int32_t": (torch.int32,),
    "int64_t": (torch.int64,),
    "uint64_t": (torch.int64,),
}
"""Element type of a pointer in C -> dtypes of the tensors that it may point to."""


class NativeError(Exception):
    """The kernels in C are not available on this machine.

    Args:
        reason: the cause, as the second half of a sentence.
        broken: whether a compiler or a library exists but failed.
    """

    def __init__(self, reason: str, broken: bool = False) -> None:
        super().__init__(reason)
        self.broken = broken


class _Entry(NamedTuple):
    """A function of the library, as the source declares it."""

    arguments: type[ctypes.Structure]
    pointers: dict[str, tuple[torch.dtype, ...]]
    """Name of each argument that is a pointer -> dtypes of the tensors that it may point to."""


def call(function: str, threads: int, **arguments: Tensor | float | None) -> Any:
    """Call a function of the library.

    Args:
        function: its name.
        threads: number of torch's threads that share the work.
        arguments: a value for each of the function's arguments, by name. A pointer takes a contiguous tensor on a CPU
            or None; the tensors are kept alive until the function returns.

    Returns:
        The function's arguments after the call.

    Raises:
        TypeError: an argument is missing, unknown, or a tensor that the function does not take.
    """
    entry = entries()[function]
    values: dict[str, Any] = dict(arguments)
    for name, dtypes in entry.pointers.items():
        tensor = values.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.is_contiguous():
            raise TypeError(
                f"{function}: {name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; expected a "
                f"contiguous tensor of {' or '.join(map(str, dtypes))} on a CPU"
            )
        values[name] = tensor.data_ptr()
    filled = entry.arguments(**values)
    if len(values) != len(entry.arguments._fields_):
        expected = sorted(field[0] for field in entry.arguments._fields_)
        raise TypeError(f"{function}: got arguments {sorted(values)}; expected {expected}")
    getattr(library(), function)(ctypes.byref(filled), threads)
    return filled


@cache
def entries() -> dict[str, _Entry]:
    """Return the arguments of each function of the library by the function's name, as the source declares them."""
    source = re.sub(r"/\*.*?\*/", "", _SOURCE.read_text(), flags=re.DOTALL)
    found = {}
    for structure, function in re.findall(r"^ENTRY\((\w+), (\w+)\)", source, flags=re.MULTILINE):
        body = re.search(rf"^struct {structure} \{{(.*?)^\}};", source, flags=re.DOTALL | re.MULTILINE)
        assert body is not None, f"native.c declares no struct {structure}"
        fields: list[tuple[str, Any]] = []
        pointers = {}
        for declaration in body[1].split(";")[:-1]:
            element, names = declaration.replace("const ", "").split(maxsplit=1)
            for name in names.split(","):
                is_pointer, name = "*" in name, name.strip(" *")
                fields.append((name, ctypes.c_void_p if is_pointer else _SCALARS[element]))
                if is_pointer:
                    pointers[name] = _ELEMENTS[element]
        # Slots make an unknown argument name an error.
        arguments = type(structure, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
        found[function] = _Entry(arguments, pointers)
    return found


@cache
def library() -> ctypes.CDLL:
    """Return the library; compile it if the cache has none.

    Raises:
        NativeError: the library is not available on this machine.
    """
    if sys.platform != "linux":
        raise NativeError(f"the native kernels are for Linux, and this is {sys.platform}")
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    missing = [name for name in _THREADS if not hasattr(torch_library, name)]
    if missing:
        raise NativeError(
            f"this build of torch does not export {missing[0]}, which the native kernels need for threads"
        )
    try:
        native = ctypes.CDLL(str(_cached_library()))
    except (OSError, RuntimeError) as error:
        # For instance, the user has no home folder.
        reason = f"the native kernels cannot be compiled, cached ($LIGHTNING_DLRM_CACHE) or loaded: {error}"
        raise NativeError(reason, broken=True) from error
    native.use_threads.argtypes = [ctypes.c_void_p] * len(_THREADS)
    native.use_threads(*(ctypes.cast(getattr(torch_library, name), ctypes.c_void_p) for name in _THREADS))
    for function, entry in entries().items():
        size = ctypes.c_size_t.in_dll(native, f"{function}_size").value
        if size != ctypes.sizeof(entry.arguments):
            raise NativeError(f"the compiler lays out the arguments of {function} in {size} bytes", broken=True)
        getattr(native, function).argtypes = [ctypes.POINTER(entry.arguments), ctypes.c_int]
        getattr(native, function).restype = None
    return native


def compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, or the first of cc, gcc and clang that is installed.

    Raises:
        NativeError: there is no compiler.
    """
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeError(f"CC is {os.environ['CC']}, which is not a command: {error}", broken=True) from error
    found = [name for name in ([asked[0]] if asked else ["cc", "gcc", "clang"]) if shutil.which(name)]
    if not found:
        raise NativeError(
            f"CC is {asked[0]}, which is not installed" if asked else "no C compiler is installed (cc, gcc or clang)",
            broken=bool(asked),
        )
    return [found[0], *asked[1:]]


def _cached_library() -> Path:
    """Compile the library unless it is cached, and return its path, in a folder that only the user may write to.

    The compiler writes to a temporary folder beside it, so that several processes can start at once.
    """
    command = [*compiler(), *_FLAGS.split()]
    version = _run([*compiler(), "--version"]).stdout
    key = hashlib.sha256("\n".join([_SOURCE.read_text(), *command, version, _processor()]).encode()).hexdigest()
    path = cache_root() / "native" / f"{key[:16]}.so"
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _check_owner(path.parent)
    if not path.exists():
        _compile(command, path)
    _check_owner(path)
    return path


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        made = Path(folder) / path.name
        done = _run([*command, str(_SOURCE), "-o", str(made), "-lm"])
        if done.returncode or not made.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), lines[0] if lines else "it printed nothing")
            raise NativeError(f"the C compiler {command[0]} failed: {reason.strip()}", broken=True)
        made.chmod(0o700)
        # Without this, a power failure could leave an incomplete file under the final name.
        flush(made)
        made.replace(path)


def _check_owner(path: Path) -> None:
    """Refuse a file or folder that another user could have written.

    Raises:
        NativeError: the user does not own it, others may write to it, or it is a link.
    """
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode):
        raise NativeError(
            f"{path} ({stat.filemode(status.st_mode)}, user {status.st_uid}) may be written by users other than "
            f"{os.geteuid()}: remove it",
            broken=True,
        )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _processor() -> str:
    """Return a description of this processor, as far as it changes what the compiler makes."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    # Frequencies change all the time.
    names = ("vendor", "cpu ", "model", "flags", "feat")
    return "\n".join([platform.machine(), *(x for x in lines if x.lower().startswith(names) and "MHz" not in x)])
