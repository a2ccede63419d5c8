# SPDX-License-Identifier: Apache-2.0
"""Every kernel call passes here: arguments are checked by name, then the compiled kernel or its NumPy twin runs."""
from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError
from ..quant.packed import row_bytes

__all__ = ["isa", "kernel", "native", "set_threads", "threads", "using_isa"]

Function = TypeVar("Function", bound=Callable[..., Any])
_DTYPES = {"u1": np.uint8, "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64, "u4": np.uint32,
           "f4": np.float32, "f8": np.float64}
ENVIRONMENT = "QGNN_SIMD"
_forced_reference = False


@functools.cache
def native() -> ModuleType | None:
    """The compiled kernels at the level that QGNN_SIMD asks for, or None where they were not built.

    Raises:
        InputError: QGNN_SIMD is not a level, or not one that this processor has.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", "scalar", "avx2"):
        raise InputError(f"{ENVIRONMENT}={wanted}: expected scalar or avx2, or unset")
    try:
        from . import _kernels  # type: ignore[attr-defined]
    except ImportError:
        warnings.warn("qgnn_dist runs on NumPy, many times slower: its compiled kernels are missing. Install a C++20 "
                      "compiler and `pip install` the package again.", RuntimeWarning, stacklevel=3)
        return None
    if wanted and not _kernels.select_isa(wanted):
        raise InputError(f"{ENVIRONMENT}={wanted}: this processor cannot run it; unset it, or use scalar")
    return _kernels


def isa() -> str:
    """Which kernels run: `avx2`, `scalar`, or `reference` (NumPy)."""
    module = None if _forced_reference else native()
    return module.isa() if module is not None else "reference"


class using_isa:
    """Context that runs another level, for tests and benchmarks; not for several threads at once."""

    def __init__(self, level: str) -> None:
        self._level = level

    def __enter__(self) -> None:
        global _forced_reference
        self._before = isa()
        self._switch(self._level)

    def __exit__(self, *_: object) -> None:
        self._switch(self._before)

    @staticmethod
    def _switch(level: str) -> None:
        global _forced_reference
        _forced_reference = level == "reference"
        module = native()
        if not _forced_reference and (module is None or not module.select_isa(level)):
            raise ValueError(f"kernels at level {level} cannot run here")


def set_threads(count: int) -> None:
    """Size of the one pool of threads that all kernels of this process share; results do not depend on it."""
    if count < 1:
        raise ValueError(f"set_threads: count is {count}, expected at least 1")
    module = native()
    if module is not None and module.threads() != count:
        module.set_threads(count)


def threads() -> int:
    """Current size of the pool (1 on NumPy)."""
    module = native()
    return module.threads() if module is not None else 1


def kernel(**arrays: str) -> Callable[[Function], Function]:
    """Register a NumPy function as the reference of a compiled kernel of the same name.

    Args:
        arrays: for each array argument `dtype dim dim`. A dim is a letter (equal letters mean equal sizes), `N+1`, `N+`
            (at least N), `B` (packed bytes of C columns at `bits`), or a number. `=` in front: written to; `?`: may be
            None.
    """
    def register(reference: Function) -> Function:
        names = list(inspect.signature(reference).parameters)
        specs = [(names.index(name), name, *_parse(text)) for name, text in arrays.items()]
        bits_at = names.index("bits") if "bits" in names else None
        has_rows = "begin" in names and "end" in names

        @functools.wraps(reference)
        def call(*args: Any) -> Any:
            _check(reference.__name__, specs, args, args[bits_at] if bits_at is not None else 0)
            if has_rows:
                _check_range(reference.__name__, args[names.index("begin")], args[names.index("end")],
                             len(args[specs[0][0]]) - (specs[0][4] == ("N+1",)))
            module = None if _forced_reference else native()
            return (reference if module is None else getattr(module, reference.__name__))(*args)

        return call  # type: ignore[return-value]
    return register


def _parse(text: str) -> tuple[type, str, tuple[str, ...]]:
    flags = "".join(c for c in text if c in "=?")
    dtype, *dims = text.lstrip("=?").split()
    return _DTYPES[dtype], flags, tuple(dims)


def _check(function: str, specs: list[Any], args: tuple[Any, ...], bits: int) -> None:
    sizes: dict[str, int] = {}
    later = []
    for at, name, dtype, flags, dims in specs:
        array = args[at]
        if array is None and "?" in flags:
            continue
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != len(dims):
            raise TypeError(f"{function}: {name} is {_describe(array)}, expected {np.dtype(dtype)} ({', '.join(dims)})")
        if not array.flags.c_contiguous:
            raise ValueError(f"{function}: {name} is not C-contiguous; pass np.ascontiguousarray of it")
        if "=" in flags and not array.flags.writeable:
            raise ValueError(f"{function}: {name} is read-only, but results are written to it")
        for axis, dim in enumerate(dims):
            if len(dim) == 1 and dim.isalpha() and dim != "B" and dim not in sizes:
                sizes[dim] = array.shape[axis]
            else:
                later.append((name, axis, dim, array.shape))
    for name, axis, dim, shape in later:
        want, least = _size(dim, sizes, bits)
        if shape[axis] < want or (not least and shape[axis] != want):
            raise ValueError(f"{function}: {name} has shape {shape}, expected {'at least ' if least else ''}{want} "
                             f"along axis {axis} ({dim})")


def _size(dim: str, sizes: dict[str, int], bits: int) -> tuple[int, bool]:
    """The size that a dim stands for, and whether more is fine."""
    if dim == "B":
        if bits not in (1, 2, 4, 8):
            raise ValueError(f"bits is {bits}, expected 1, 2, 4 or 8")
        return row_bytes(sizes["C"], bits), False
    if dim.isdigit():
        return int(dim), False
    if dim.endswith("+1"):
        return sizes[dim[0]] + 1, False
    return sizes[dim[0]], dim.endswith("+")


def _check_range(function: str, begin: int, end: int, rows: int) -> None:
    if not 0 <= begin <= end <= rows:
        raise ValueError(f"{function}: rows {begin}…{end} are not inside 0…{rows}")


def _describe(array: Any) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
