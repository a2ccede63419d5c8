# SPDX-License-Identifier: Apache-2.0
"""Memory of the systems of a bench: what each will need, and what each took in a process of its own.

This module loads nothing heavy: a measured process imports it first, then the libraries of its system, and is idle.
"""
from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from ..errors import QgnnError
from ..memory import available_bytes, status_bytes

__all__ = ["Need", "Sizes", "available_bytes", "failure", "measure", "measure_apart", "misfits", "modules_of", "need",
           "wake_torch"]

Prepare = Callable[..., Callable[[], Any]]
_LIBRARIES = {"torch-sparse": "torch_sparse", "pyg": "torch_geometric.nn"}
_MADV_POPULATE_READ, _M_MMAP_THRESHOLD = 22, -3
_APART_BYTES = 1 << 20
_USED_BY_ALL = ["torch", "pyarrow.parquet", "pyarrow.ipc", "qgnn_dist.cluster.api"]
_MATRIX = {"torch-csr": 8, "torch-sparse": 12, "pyg": 20}
"""System → bytes of an entry of Â."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a graph and a network: n nodes, directed edges without self loops, F features, H hidden, C classes."""

    nodes: int
    edges: int
    features: int
    hidden: int
    classes: int


@dataclass(frozen=True)
class Need:
    """Bytes that a system needs.

    Attributes:
        shared: inputs that other systems can use as well, name → bytes. held: its own inputs. working: what it has on
            top of them while it runs.
    """

    shared: dict[str, int]
    held: int
    working: int

    @property
    def total(self) -> int:
        """Of the system alone."""
        return sum(self.shared.values()) + self.held + self.working


def need(system: str, sizes: Sizes, *, training: bool) -> Need:
    """An estimate from the arrays that a system has at its peak; `measure` says how near it comes.

    All read the features, 4nF bytes. With m = edges + n, torch CSR reads 8m for Â (32-bit indices, weights),
    torch_sparse 12m, PyG 20m, and PyG's products have messages of 4mC, twice. A float forward has its hidden layer,
    4nH, or the states of a layer, 6·4nC; training has inputs dropped out and their mask, 8nF, six arrays of the hidden
    layer, 24nH, and 8·4nC. Ours reads 4 bytes an edge and 20 a node, and has 8·4nC in prediction (hidden values live
    by the block); its training has what stock's has, and coded features, 6nF.
    """
    n, m = sizes.nodes, sizes.edges + sizes.nodes
    features, hidden, states = 4 * n * sizes.features, 4 * n * sizes.hidden, 4 * n * sizes.classes
    ours, matrix = system.startswith("qgnn-"), next((s for s in _MATRIX if s == system), "torch-csr")
    shared = {"features": features}
    shared |= {"graph": 4 * sizes.edges + 20 * n} if ours else {matrix: m * _MATRIX[matrix]}
    messages = 8 * m * sizes.classes if system == "pyg" else 0
    if training:
        return Need(shared, features * 3 // 2 if ours else 0, 2 * features + 6 * hidden + 8 * states + messages)
    return Need(shared, 0, 8 * states if ours else max(hidden + states, 6 * states + messages))


def misfits(needs: Mapping[str, Need], available: int) -> dict[str, str]:
    """Systems that do not fit, and why: one after the other, all that fit staying in memory.

    Args: available: bytes.
    """
    reasons, shared, held = {}, dict[str, int](), 0
    for system, mine in needs.items():
        left = available - held - sum(shared.values())
        wanted = mine.total - sum(mine.shared[name] for name in mine.shared.keys() & shared.keys())
        if wanted > left:
            reasons[system] = (f"does not fit: needs about {wanted / 2**30:.2f} GiB, {max(left, 0) / 2**30:.2f} GiB "
                               "are left")
        else:
            shared, held = shared | mine.shared, held + mine.held
    return reasons


def modules_of(system: str) -> list[str]:
    """What a process imports before its memory counts as idle."""
    return [*_USED_BY_ALL, *([_LIBRARIES[system]] if system in _LIBRARIES else [])]


def measure_apart(prepare: Prepare, *args: Any, modules: Sequence[str] = ()) -> dict[str, Any]:
    """`measure` in a new process.

    Raises: QgnnError: the process died, most likely for memory, or raised something.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, prepare, *args, modules=modules).result()
        except BrokenProcessPool:
            raise QgnnError("failed: the measured process died, perhaps out of memory") from None
        except Exception as error:
            raise QgnnError(failure(error)) from error


def failure(error: Exception) -> str:
    """One line of what went wrong, most likely in somebody else's library."""
    return f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"


def measure(prepare: Prepare, *args: Any, modules: Sequence[str] = ()) -> dict[str, Any]:
    """Resident memory of this process, above what it has with its libraries loaded and nothing else.

    Args:
        prepare: called with `args`, loads the inputs and returns what is then run once.
        modules: imported before memory counts as idle.
    Returns: `input_bytes` after loading, `peak_bytes` the highest while running, inputs included (where the system
        keeps its mark from us, /proc/self/clear_refs, the highest of loading counts too); and what the run returned,
        if that is a dict.
    """
    _give_back_at_once()
    for module in modules:
        importlib.import_module(module)
    if "torch" in modules:
        wake_torch()
    _read_libraries()
    idle = _settled()
    run = prepare(*args)
    loaded = _settled()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as marks:
        marks.write("5")  # the highest so far is what is resident now
    found = run()
    peak = status_bytes("VmHWM")
    return {"input_bytes": loaded - idle, "peak_bytes": peak - idle, **(found if isinstance(found, dict) else {})}


def wake_torch() -> None:
    """Have what its first products and its optimisers load and allocate for good: some 100 MiB."""
    import torch

    few = torch.ones(64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([few])
    torch.autograd.backward((few @ few).sum())
    optimizer.step()
    few = few.detach()
    with warnings.catch_warnings():  # torch calls CSR a beta
        warnings.simplefilter("ignore", UserWarning)
        few.to_sparse_csr() @ torch.addmm(few[0], few, few)


def _give_back_at_once() -> None:
    """Have arrays go back to the system when they are freed, as those of more than 32 MiB always do: glibc keeps freed
    ones of less where something small was put behind them, and a run's figure would jump by as much."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _APART_BYTES)


def _read_libraries() -> None:
    """Have all pages of the loaded libraries resident, hundreds of MiB: else it is up to the system how many of them
    come along when one is touched, and a run's figure would jump by as much."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            place, _, _, _, _, *file = line.split(maxsplit=5)
            if file and ".so" in file[0]:
                begin, end = (int(address, 16) for address in place.split("-"))
                # An older kernel refuses, and the figures are as they are.
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_POPULATE_READ)


def _settled() -> int:
    """Resident bytes once freed memory has gone back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")
