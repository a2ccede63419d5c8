# SPDX-License-Identifier: Apache-2.0
"""Every kernel call passes here: arguments are checked by name, then the compiled kernel or its NumPy twin runs."""
from __future__ import annotations

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError, QgnnWarning
from ..quant.packed import row_bytes

__all__ = ["isa", "kernel", "native", "set_threads", "threads", "using_isa"]

Function = TypeVar("Function", bound=Callable[..., Any])
_DTYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i1": np.int8, "i2": np.int16, "i4": np.int32,
           "i8": np.int64, "f4": np.float32, "f8": np.float64}
_WHOLE = (int, np.integer)
Limits = tuple[tuple[type, ...], Callable[[Any], bool], str]
_MID_TREAD_BITS: Limits = (_WHOLE, lambda v: v in (2, 4, 8), "2, 4 or 8")  # such a grid of two levels has no use
_MID_TREAD = ("feature_codes_dense", "feature_codes_csr", "code_gradients", "aggregate_scaled", "layer_scaled")
_RANGES: dict[str, Limits] = {
    "bits": (_WHOLE, lambda v: v in (1, 2, 4, 8), "1, 2, 4 or 8"),
    "residual_bits": (_WHOLE, lambda v: v in (1, 2, 4, 8), "1, 2, 4 or 8"),
    "hidden_bits": (_WHOLE, lambda v: v in (2, 4, 8), "2, 4 or 8"),
    "norm": (_WHOLE, lambda v: v in (0, 1, 2), "0 (none), 1 (row sum) or 2 (l2)"),
    "seed": (_WHOLE, lambda v: 0 <= v < 2**64, "0 to 2^64 - 1"),
    "epoch": (_WHOLE, lambda v: 0 <= v < 2**32, "0 to 2^32 - 1"),
    "stage": (_WHOLE, lambda v: 0 <= v < 2**8, "0 to 255"),
    "layer": (_WHOLE, lambda v: 0 <= v < 2**16, "0 to 65535"),
    "round": (_WHOLE, lambda v: 0 <= v < 2**8, "0 to 255"),
    "columns": (_WHOLE, lambda v: 0 <= v <= 2**26, "0 to 2^26"),
    "p": ((*_WHOLE, float, np.floating), lambda v: 0 <= v < 1, "0 to less than 1"),
    "salt": (_WHOLE, lambda v: 0 <= v < 2**32, "0 to 2^32 - 1"),
    "most": (_WHOLE, lambda v: v >= 0, "0 or more"),
    "pull": ((*_WHOLE, float, np.floating), lambda v: 0 <= v <= 1, "0 to 1"),
}
"""Scalar arguments by name: their types, the values allowed, and how that reads."""
_APART = (("payload", "next_payload"), ("y", "next_y"))
"""Arguments by name of which the second is written while the first is read, by other rows' threads too."""
_REMEMBERED = 256
"""Layouts of arguments that a kernel remembers as fine: training and prediction have a few, in every call again."""
ENVIRONMENT = "QGNN_SIMD"
BUILD = "QGNN_KERNELS"
_forced_reference = False


@functools.cache
def native() -> ModuleType | None:
    """The compiled kernels at the level that QGNN_SIMD asks for, or None where they were not built. QGNN_KERNELS names
    the file of another build than the installed one, such as `make sanitize` makes.

    Raises:
        InputError: QGNN_SIMD is not a level, or not one that this processor has, or QGNN_KERNELS cannot be loaded.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", "scalar", "avx2"):
        raise InputError(f"{ENVIRONMENT}={wanted}: expected scalar or avx2, or unset")
    build = os.environ.get(BUILD)
    try:
        module = _load(build) if build else importlib.import_module("._kernels", __package__)
    except ImportError:
        warnings.warn("qgnn_dist runs on NumPy, many times slower: its compiled kernels are missing. Install a C++20 "
                      "compiler and `pip install` the package again.", QgnnWarning, stacklevel=3)
        return None
    if wanted and not module.select_isa(wanted):
        raise InputError(f"{ENVIRONMENT}={wanted}: this processor cannot run it; unset it, or use scalar")
    return module


def _load(path: str) -> ModuleType:
    loader = ExtensionFileLoader(f"{__package__}._kernels", path)
    try:
        module = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError as error:
        raise InputError(f"{BUILD}={path}: expected a built _kernels extension, or unset: {error}") from error
    return module


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
        arrays: for each array argument `dtype dim dim`, `u1|u2` for either of two. A dim is a letter (equal letters
            mean equal sizes), `N+1`, `N+` (at least N), `B` (packed bytes of C columns at `bits`), `G` (those and a
            scale byte), `K` (of H columns at `bits`, and at 1), `S` (C rounded up to a multiple of 8, as registers are
            stored whole), a number, or the name of a whole-number argument. `=` in front: written to; `?`: may be None.
    """
    def register(reference: Function) -> Function:
        signature = inspect.signature(reference)
        names = list(signature.parameters)
        specs = [(names.index(name), name, *_parse(text)) for name, text in arrays.items()]
        pointer = names.index("indptr") if "indptr" in names else None
        stored = next((s for s in specs if s[1] in ("indices", "values")), None) if pointer is not None else None
        function = reference.__name__
        ranges = {**_RANGES, "bits": _MID_TREAD_BITS} if function in _MID_TREAD else _RANGES
        scalars = [(at, name, ranges[name]) for at, name in enumerate(names) if name in ranges and name not in arrays]
        rows_at = names.index("rows") if "seed" in names else None
        begin_at = names.index("begin") if "begin" in names else None
        apart = [(names.index(read), names.index(written)) for read, written in _APART if written in names]
        dims = {dim for spec in specs for dim in spec[4]}
        sizing = [at for at, name in enumerate(names) if name in dims or (name == "bits" and dims & {"B", "G", "K"})]
        placed = [spec[0] for spec in specs]
        fine: set[tuple[Any, ...]] = set()

        @functools.wraps(reference)
        def call(*args: Any, **named: Any) -> Any:
            if named or len(args) != len(names):
                args = signature.bind(*args, **named).args
            for at, name, limits in scalars:
                _check_scalar(function, name, args[at], limits)
            layout = *[args[at] for at in sizing], *[_layout(args[at]) for at in placed]
            if layout not in fine:  # all that `_check` looks at
                _check(function, specs, args, names)
                if len(fine) >= _REMEMBERED:
                    fine.clear()
                fine.add(layout)
            for read, written in apart:
                if args[written] is not None and np.may_share_memory(args[read], args[written]):  # exact: C-contiguous
                    raise ValueError(f"{function}: {names[written]} shares memory with {names[read]}, which other rows "
                                     "still read; pass another buffer")
            begin, end = 0, None
            if begin_at is not None:
                begin, end = args[begin_at], args[begin_at + 1]
                _check_range(function, begin, end, len(args[specs[0][0]]) - (specs[0][4] == ("N+1",)))
            if pointer is not None and stored is not None:
                _check_pointer(function, args[pointer], begin, end, stored[1], len(args[stored[0]]))
            if rows_at is not None:
                _check_rows(function, args[rows_at], begin, end)
            module = None if _forced_reference else native()
            return (reference if module is None else getattr(module, function))(*args)

        return call  # type: ignore[return-value]
    return register


def _parse(text: str) -> tuple[tuple[type, ...], str, tuple[str, ...]]:
    flags = "".join(c for c in text if c in "=?")
    dtypes, *dims = text.lstrip("=?").split()
    return tuple(_DTYPES[name] for name in dtypes.split("|")), flags, tuple(dims)


def _layout(array: Any) -> Any:
    """What tells arrays apart to a kernel, their values aside."""
    return (array.shape, array.dtype, array.flags.num) if isinstance(array, np.ndarray) else type(array)


def _check(function: str, specs: list[Any], args: tuple[Any, ...], names: list[str]) -> None:
    sizes: dict[str, int] = {}
    later = []
    for at, name, dtypes, flags, dims in specs:
        array = args[at]
        if array is None and "?" in flags:
            continue
        if not isinstance(array, np.ndarray) or array.dtype not in dtypes or array.ndim != len(dims):
            expected = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
            raise TypeError(f"{function}: {name} is {_describe(array)}, expected {expected} ({', '.join(dims)})")
        if not array.flags.c_contiguous:
            raise ValueError(f"{function}: {name} is not C-contiguous; pass np.ascontiguousarray of it")
        if "=" in flags and not array.flags.writeable:
            raise ValueError(f"{function}: {name} is read-only, but results are written to it")
        for axis, dim in enumerate(dims):
            if len(dim) == 1 and dim.isalpha() and dim not in "BGKS" and dim not in sizes:
                sizes[dim] = array.shape[axis]
            else:
                later.append((name, axis, dim, array.shape))
    for name, axis, dim, shape in later:
        want, least = (args[names.index(dim)], False) if dim in names else _size(dim, sizes, args, names)
        if shape[axis] < want or (not least and shape[axis] != want):
            raise ValueError(f"{function}: {name} has shape {shape}, expected {'at least ' if least else ''}{want} "
                             f"along axis {axis} ({dim})")


def _size(dim: str, sizes: dict[str, int], args: tuple[Any, ...], names: list[str]) -> tuple[int, bool]:
    """The size that a dim stands for, and whether more is fine."""
    if dim == "B":
        return row_bytes(sizes["C"], args[names.index("bits")]), False
    if dim == "G":
        return row_bytes(sizes["C"], args[names.index("bits")]) + 1, False
    if dim == "K":
        return row_bytes(sizes["H"], args[names.index("bits")]) + row_bytes(sizes["H"], 1), False
    if dim == "S":
        return -(-sizes["C"] // 8) * 8, False
    if dim.isdigit():
        return int(dim), False
    if dim.endswith("+1"):
        return sizes[dim[0]] + 1, False
    return sizes[dim[0]], dim.endswith("+")


def _check_scalar(function: str, name: str, value: Any, limits: Limits) -> None:
    kind, allowed, text = limits
    # A bool is an int to Python, yet as a number of bits or a key it is a slip.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} is {type(value).__name__}, expected {text}")
    if not allowed(value):
        raise ValueError(f"{function}: {name} is {value}, expected {text}")


def _check_range(function: str, begin: int, end: int, rows: int) -> None:
    if not 0 <= begin <= end <= rows:
        raise ValueError(f"{function}: rows {begin}…{end} are not inside 0…{rows}")


def _check_pointer(function: str, indptr: np.ndarray, begin: int, end: int | None, stored: str, count: int) -> None:
    """The rows asked for lie inside the stored values; `check_csr` sees to what is between, once."""
    if not len(indptr):
        raise ValueError(f"{function}: indptr has shape (0,), expected at least 1 along axis 0")
    first, last = int(indptr[begin]), int(indptr[-1 if end is None else end])
    if not 0 <= first <= last <= count:
        raise ValueError(f"{function}: indptr runs from {first} to {last}, expected inside 0 to {count}, "
                         f"the length of {stored}")


def _check_rows(function: str, rows: np.ndarray, begin: int, end: int | None) -> None:
    """Places of random numbers that this call draws: more bits would run into those of the column."""
    if np.bitwise_or.reduce(rows[begin:end]) >> 40:  # a negative number keeps its sign
        bad = begin + int(np.flatnonzero((rows[begin:end] < 0) | (rows[begin:end] >= 2**40))[0])
        raise ValueError(f"{function}: rows[{bad}] is {rows[bad]}, expected 0 to 2^40 - 1")


def _describe(array: Any) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
