# SPDX-License-Identifier: Apache-2.0
"""Packed codes, sums over neighbours and moments as torch operations: the kernels' twins for any device.

Whole numbers are summed as float32 where they stay below 2^24, and as float64 beyond, so that sums are exact in
whatever order a device adds. Steps divide as tensors: by a plain number, CUDA would multiply by its inverse.
Legend: n local rows, H halo rows, C columns, B packed bytes a row.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..propagation.neighbourhood import Neighbourhood
from ..quant.packed import row_bytes

__all__ = ["DeviceGraph", "level", "midrise", "moments", "pack", "row_dot", "unpack"]

EXACT = 2**24
BLOCK_ROWS = 65536
"""Rows that are made double at a time."""


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Codes uint8 (n, C) to payload uint8 (n, B), planar (quant/packed.py)."""
    size = out.shape[1]
    out.zero_()
    for plane in range(8 // bits):
        piece = codes[:, plane * size:(plane + 1) * size]
        out[:, :piece.shape[1]] |= piece << (plane * bits)


def unpack(payload: Tensor, bits: int, out: Tensor) -> None:
    """Payload uint8 (n, B) to whole numbers, (n, C) of any type."""
    size, columns = payload.shape[1], out.shape[1]
    for plane in range(8 // bits):
        first, last = plane * size, min((plane + 1) * size, columns)
        if first < last:
            out[:, first:last] = (payload[:, :last - first] >> (plane * bits)) & (2**bits - 1)


def level(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """clip(⌊x/step⌋, −2^(b−1), 2^(b−1) − 1), NaN as the lowest; a new tensor. step: float32 (1,), on x's device."""
    half = float(2 ** (bits - 1))
    low, high = (torch.full_like(step, v) for v in (-half, half - 1))
    return torch.fmin(torch.fmax(x / step, low), high).floor_()


def midrise(x: Tensor, step: float, bits: int) -> Tensor:
    """What mid-rise codes of x stand for, as kernels.midrise."""
    return (level(x, x.new_full((1,), step), bits) + 0.5) * step


def moments(x: Tensor) -> list[float]:
    """[Σx², Σ|x|, max|x|, count] in double."""
    total = x.new_zeros(3, dtype=torch.float64)
    for some in torch.split(x, BLOCK_ROWS):
        size = some.double().abs_()
        largest = size.amax() if size.numel() else total[2]
        total[2] = torch.fmax(total[2], largest)
        total[1] += size.sum()
        total[0] += size.square_().sum()
    return [*(float(v) for v in total.tolist()), float(x.numel())]


def row_dot(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩ in double."""
    total = x.new_zeros((), dtype=torch.float64)
    for a, b in zip(torch.split(x, BLOCK_ROWS), torch.split(y, BLOCK_ROWS)):
        total += (a.double() * b.double()).sum()
    return float(total)


@dataclass(frozen=True)
class DeviceGraph:
    """A Neighbourhood on a device, its boundary rows and interior rows apart.

    Attributes:
        inv_sqrt_degree: float32 (n, 1). degree: float64 (n, 1), neighbours without the node itself.
        most_neighbours: of one row.
    """

    num_local: int
    num_boundary: int
    num_halo: int
    most_neighbours: int
    inv_sqrt_degree: Tensor
    degree: Tensor
    _rows: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    _matrices: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Neighbourhood, device: torch.device) -> DeviceGraph:
        """Copy a worker's rows of the adjacency to `device`."""
        kind = torch.int32 if len(graph.indices) < 2**31 else torch.int64

        def rows(begin: int, end: int) -> tuple[Tensor, Tensor]:
            low, high = int(graph.indptr[begin]), int(graph.indptr[end])
            return (torch.from_numpy(graph.indptr[begin:end + 1] - low).to(device, kind),
                    torch.tensor(graph.indices[low:high]).to(device, kind))

        n, boundary = graph.num_local, graph.num_boundary
        return cls(n, boundary, graph.num_halo, int(graph.degree.max(initial=0)),
                   torch.tensor(graph.inv_sqrt_degree, device=device)[:, None],
                   torch.tensor(graph.degree.astype(np.float64), device=device)[:, None],
                   (rows(0, boundary), rows(boundary, n)))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.degree.device

    def count_type(self, bits: int) -> torch.dtype:
        """The float type in which doubled sums of codes over a row's neighbours are exact whole numbers."""
        return torch.float32 if 2 * self.most_neighbours * (2**bits - 1) < EXACT else torch.float64

    def add_neighbours(self, x: Tensor, interior: bool, out: Tensor) -> None:
        """out[i] = sum of x over i's neighbours for the interior rows, or for the boundary rows.

        Args: x: (n+H, C). out: (n, C) of its type, of which only those rows are written.
        """
        rows = slice(self.num_boundary, self.num_local) if interior else slice(0, self.num_boundary)
        if rows.start < rows.stop:
            out[rows] = self._matrix(x.dtype)[interior] @ x

    def _matrix(self, dtype: torch.dtype) -> list[Tensor]:
        """The adjacency of boundary and of interior rows, CSR of ones; types share the indices."""
        if dtype not in self._matrices:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
                self._matrices[dtype] = [
                    torch.sparse_csr_tensor(indptr, indices, torch.ones(len(indices), dtype=dtype, device=self.device),
                                            (len(indptr) - 1, self.num_local + self.num_halo))
                    for indptr, indices in self._rows]
        return self._matrices[dtype]


def new_payload(graph: DeviceGraph, columns: int, bits: int) -> Tensor:
    """Zeros for the packed rows of a round, uint8 (n+H, B)."""
    return torch.zeros(graph.num_local + graph.num_halo, row_bytes(columns, bits), dtype=torch.uint8,
                       device=graph.device)
