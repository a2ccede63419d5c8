# SPDX-License-Identifier: Apache-2.0
"""Input features: how rows are normalised, and their codes with one scale a row.

Legend: n rows of a block, F features, nnz stored values.
"""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .. import kernels
from ..data.graph import SparseFeatures
from ..errors import ModelError
from ..quant.levels import NUM_LEVELS, level_of

if TYPE_CHECKING:
    from ..comm.group import Group
    from .packed import PackedModel

__all__ = ["DENSE_SHARE", "FeatureBlock", "FeatureRows", "FeatureScheme", "FeatureStatistics", "choose_norm",
           "feature_level", "feature_statistics", "keeps_dense", "read_block", "reads_dense", "refuse_negative"]

NORMS = ("none", "row", "l2")
"""Position = the number that the kernels know a normalisation by."""
FEW_STORED, FEW_SHARE = 64, 0.1
SAME_SUMS = 0.01
"""Rows whose sums differ by less than this share have the same sum."""
BLOCK_ROWS = 16384
DENSE_SHARE, DENSE_ROWS = 1 / 3, 2048
"""Of non-zeros, from which sparse rows' codes are worked on as dense ones, so many rows being turned at a time. From a
third on they take no more, 2 bytes a column against 6 a value, and an epoch on amazon_photo (0.35) takes two thirds of
the time."""


class FeatureRows(Protocol):
    """Feature rows as they are: of a part (store.reader.Part), or of a graph in memory (model.memory.GraphRows).

    Attributes: index: the part's number. feature_kind: dense or sparse. stored_values: of a row, in the mean.
    """

    @property
    def index(self) -> int: ...
    @property
    def num_local(self) -> int: ...
    @property
    def num_features(self) -> int: ...
    @property
    def feature_kind(self) -> str | None: ...
    @property
    def stored_values(self) -> float: ...

    def features_dense(self, begin: int, end: int) -> np.ndarray:
        """Rows begin..end, float32 (n, F), C-contiguous."""

    def features_sparse(self, begin: int, end: int) -> SparseFeatures:
        """Rows begin..end in CSR form."""


@dataclass(frozen=True)
class FeatureStatistics:
    """What `feature_norm=auto` looks at, added up over training rows of all workers.

    Attributes:
        sums, squared_sums: Σ of the rows' sums, and of their squares.
    """

    rows: int = 0
    nonzero: int = 0
    negative: int = 0
    sums: float = 0.0
    squared_sums: float = 0.0

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def spread(self) -> float:
        """Standard deviation of the rows' sums over their mean; 0 where there are no values."""
        if not self.rows or not self.sums:
            return 0.0
        mean = self.sums / self.rows
        return math.sqrt(max(self.squared_sums / self.rows - mean * mean, 0.0)) / mean


def feature_statistics(part: FeatureRows, rows: np.ndarray) -> FeatureStatistics:
    """Statistics of some local rows (int64, ascending), read in blocks."""
    total = FeatureStatistics()
    for begin in range(0, part.num_local, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, part.num_local)
        local = rows[(rows >= begin) & (rows < end)] - begin
        if len(local) == 0:
            continue
        values, sums = _values(part, begin, end, local)
        total += FeatureStatistics(len(local), int(np.count_nonzero(values)), int((values < 0).sum()),
                                   float(sums.sum()), float((sums * sums).sum()))
    return total


def feature_level(part: FeatureRows, group: Group | None) -> int:
    """The level (quant/levels.py) of all stored feature values as they are, over all workers, who must all call it."""
    histogram = np.zeros(NUM_LEVELS, np.int64)
    for begin in range(0, part.num_local, BLOCK_ROWS):
        values = _values(part, begin, min(begin + BLOCK_ROWS, part.num_local), None)[0]
        flat = np.ascontiguousarray(values, np.float32).reshape(-1, 1)
        kernels.level_histogram(flat, np.ones(len(flat), np.float32), histogram)
    if group is not None:
        group.all_reduce_sum(histogram)
    return level_of(histogram)


def choose_norm(statistics: FeatureStatistics, num_features: int) -> str:
    """The normalisation that fits: `none` for signed features or rows alike, `row` for few non-zeros, else `l2`.

    Normalising is there to make rows of many and of few values alike. Where all rows have the same sum already (one
    value a category, say), it would only make them small, and a small input starves the perceptron: on
    fb100_johnshopkins55_year (6 ones in every row) INT2 reaches 51 % by row sums and 73 % without.

    A row of m equal non-zeros has l2 norm 1/√m once it is divided by its sum: with hundreds of non-zeros that starves
    the perceptron (amazon_photo: 78 ± 5 % after 200 epochs by row sums, 91.5 % by l2 norms), while bags of a few words
    do best by row sums.
    """
    if statistics.negative or statistics.spread <= SAME_SUMS:
        return "none"
    stored = statistics.nonzero / max(statistics.rows, 1)
    return "row" if stored <= min(FEW_STORED, FEW_SHARE * num_features) else "l2"


@dataclass(frozen=True)
class FeatureScheme:
    """How features become the perceptron's input; part of the packed model.

    Attributes:
        norm: `row`, `l2` or `none`. signed: whether the grid has negative codes. bits: 2, 4, 8, or 32 for float.
    """

    norm: str
    signed: bool
    bits: int


@dataclass(frozen=True)
class FeatureBlock:
    """Coded rows. `values` are int16 codes, or float32 at 32 bits; the value meant is `values · scale[row]`.

    Attributes:
        values: (n, F) dense, or (nnz,) beside `indptr` int64 (n+1,) and `indices` int32 (nnz,).
        scale: float32 (n,); ones at 32 bits.
    """

    values: np.ndarray
    scale: np.ndarray
    num_features: int
    indptr: np.ndarray | None = None
    indices: np.ndarray | None = None

    def rows(self, begin: int, end: int) -> FeatureBlock:
        """Some of the rows, as views; a row pointer is made anew."""
        if self.indptr is None or self.indices is None:
            return dataclasses.replace(self, values=self.values[begin:end], scale=self.scale[begin:end])
        low, high = int(self.indptr[begin]), int(self.indptr[end])
        return dataclasses.replace(self, values=self.values[low:high], scale=self.scale[begin:end],
                                   indices=self.indices[low:high],
                                   indptr=np.ascontiguousarray(self.indptr[begin:end + 1] - low))

    def take(self, rows: np.ndarray) -> FeatureBlock:
        """Rows of these numbers (int64, ascending), copied."""
        if self.indptr is None or self.indices is None:
            return dataclasses.replace(self, values=self.values[rows], scale=self.scale[rows])
        counts = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.repeat(self.indptr[rows] - indptr[:-1], counts) + np.arange(indptr[-1])
        return dataclasses.replace(self, values=self.values[places], scale=self.scale[rows], indptr=indptr,
                                   indices=self.indices[places])

    def times(self, weights: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Product with weights (F, H): int8 codes to int32 sums, exactly, or float32 to float32 in a fixed order."""
        if self.indptr is not None and self.indices is not None:
            if self.values.dtype == np.int16:
                kernels.matmul_codes_csr(self.indptr, self.indices, self.values, weights, out)
            else:
                kernels.matmul_float_csr(self.indptr, self.indices, self.values, weights, out)
        elif self.values.dtype == np.int16:
            kernels.matmul_codes_dense(self.values, weights, out)
        else:
            kernels.matmul_float_dense(self.values, weights, out)
        return out

    def active(self, model: PackedModel) -> np.ndarray:
        """relu(X·W₁ + b₁) before its grid, float32 (n, H), as the forward of a model without affine grids has it."""
        info, rows = model.info, len(self.scale)
        if info.bits["weights"] < 32 and info.bits["features"] < 32:
            sums = self.times(model.weight1, np.empty((rows, info.hidden), np.int32)).astype(np.float32)
        else:
            sums = self.as_float().times(model.weight1.astype(np.float32), np.empty((rows, info.hidden), np.float32))
        scale = self.scale * np.float32(info.weight_steps[0])
        hidden: np.ndarray = np.maximum(sums * scale[:, None] + model.bias1, np.float32(0))
        return hidden

    def scores(self, model: PackedModel, moments: np.ndarray | None, out: np.ndarray) -> None:
        """The rows through the integer perceptron of a model with codes in every stage; see kernels.perceptron_dense.

        Args: moments: float64 (n, 3), of the hidden values. out: float32 (n, C).
        """
        info = model.info
        step1, step2 = (np.float32(s) for s in info.weight_steps)
        rest = (self.scale, model.weight1, step1, model.bias1, np.float32(info.hidden_step), info.bits["hidden"],
                model.weight2, step2, model.bias2, moments, out)
        if self.indptr is not None and self.indices is not None:
            kernels.perceptron_csr(self.indptr, self.indices, self.values, *rest)
        else:
            kernels.perceptron_dense(self.values, *rest)

    def as_float(self) -> FeatureBlock:
        """Codes as float32 numbers, unscaled."""
        return FeatureBlock(self.values.astype(np.float32), self.scale, self.num_features, self.indptr, self.indices)


def keeps_dense(stored: float, num_features: int, bits: int) -> bool:
    """Whether sparse rows with so many values of a row stored, in the mean, are dense once they are codes.

    Products of codes are exact, so no score depends on it; float rows keep their order of addition.
    """
    return bits < 32 and stored >= DENSE_SHARE * num_features > 0


def reads_dense(part: FeatureRows, scheme: FeatureScheme) -> bool:
    """`keeps_dense` of a part's own features, where they are sparse."""
    return part.feature_kind == "sparse" and keeps_dense(part.stored_values, part.num_features, scheme.bits)


def read_block(part: FeatureRows, scheme: FeatureScheme, begin: int, end: int, *,
               as_dense: bool = False) -> FeatureBlock:
    """Normalise and code the local rows begin..end of a part, row by row in a fixed order.

    Args: as_dense: codes of sparse features without row pointers.
    """
    n, norm = end - begin, NORMS.index(scheme.norm)
    scale = np.ones(n, np.float32)
    if part.feature_kind == "sparse" and as_dense:
        dense = _dense_block(part, scheme, begin, end)
        if dense is not None:
            return dense
    if part.feature_kind == "sparse":
        rows = part.features_sparse(begin, end)
        if scheme.bits == 32:
            values = np.empty(len(rows.values), np.float32)
            kernels.normalise_csr(rows.indptr, rows.values, norm, values)
        else:
            values = np.empty(len(rows.values), np.int16)
            kernels.feature_codes_csr(rows.indptr, rows.values, rows.shape[1], norm, scheme.bits, scheme.signed,
                                      values, scale)
        return FeatureBlock(values, scale, rows.shape[1], rows.indptr, np.ascontiguousarray(rows.indices))
    num_features = part.features_dense(begin, begin).shape[1]
    values = np.empty((n, num_features), np.float32 if scheme.bits == 32 else np.int16)
    for first in range(0, n, BLOCK_ROWS):  # what is read is larger than what is kept
        some = slice(first, min(first + BLOCK_ROWS, n))
        x = part.features_dense(begin + some.start, begin + some.stop)
        if scheme.bits == 32:
            kernels.normalise_dense(x, norm, values[some])
        else:
            kernels.feature_codes_dense(x, norm, scheme.bits, scheme.signed, values[some], scale[some])
    return FeatureBlock(values, scale, num_features)


def _dense_block(part: FeatureRows, scheme: FeatureScheme, begin: int, end: int) -> FeatureBlock | None:
    """The codes of sparse rows, and those of their zeros, which are 0 on every grid of features.

    Returns: None where a row names a column twice: its codes add up, and may leave the grid.
    """
    values = np.zeros((end - begin, part.num_features), np.int16)
    scale = np.empty(end - begin, np.float32)
    for first in range(0, len(values), DENSE_ROWS):
        last = min(first + DENSE_ROWS, len(values))
        some = read_block(part, scheme, begin + first, begin + last)
        assert some.indptr is not None
        assert some.indices is not None
        rows = np.repeat(np.arange(last - first, dtype=np.int64), np.diff(some.indptr))
        places = rows * part.num_features + some.indices
        if (np.diff(places) <= 0).any() and (np.diff(np.sort(places)) == 0).any():
            return None
        values[first:last].reshape(-1)[places] = some.values
        scale[first:last] = some.scale
    return FeatureBlock(values, scale, part.num_features)


def count_negative(part: FeatureRows) -> int:
    """Negative feature values among all local rows: an unsigned grid cannot hold them."""
    count = 0
    for begin in range(0, part.num_local, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, part.num_local)
        count += int((_values(part, begin, end, None)[0] < 0).sum())
    return count


def refuse_negative(part: FeatureRows, scheme: FeatureScheme, file: str) -> None:
    """Raise ModelError where a part has features that the scheme's unsigned grid cannot hold; `file` is named."""
    if scheme.bits == 32 or scheme.signed:
        return
    negative = count_negative(part)
    if negative:
        raise ModelError(f"part {part.index} has {negative} negative feature values, but the model was trained on "
                         f"non-negative ones (norm={scheme.norm}, unsigned grid); train on such features", file=file)


def _values(part: FeatureRows, begin: int, end: int, local: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Stored values of some rows of a block, flat order left open, and the rows' sums in double."""
    if part.feature_kind == "sparse":
        block: SparseFeatures = part.features_sparse(begin, end)
        block = block if local is None else block.rows(local)
        before = np.concatenate([[0.0], np.cumsum(block.values, dtype=np.float64)])
        return block.values, np.diff(before[block.indptr])
    dense = part.features_dense(begin, end)
    dense = dense if local is None else dense[local]
    return dense, dense.sum(1, dtype=np.float64)
