# SPDX-License-Identifier: Apache-2.0
"""The perceptron, its input and output, and random numbers: each kernel as NumPy; csrc/ has the compiled twins.

Legend: N rows, F features, H hidden width, C classes, Z stored values of a sparse matrix, b bits of a code.
"""
from __future__ import annotations

import numpy as np

from ..quant.packed import pack_codes, row_bytes, unpack_codes
from .dispatch import kernel
from .ops import moments_by_row
from .random import philox

__all__ = [
    "activate", "add_transposed", "add_transposed_csr", "dropout_dense", "feature_codes_csr",
    "feature_codes_dense", "hidden_codes", "keyed_bits", "lookup_tables", "matmul_codes_csr", "matmul_codes_dense",
    "matmul_float_csr", "matmul_float_dense", "matmul_thin", "matmul_thinned", "normalise_csr", "normalise_dense",
    "perceptron_csr", "perceptron_dense", "recall", "scores_from_codes", "softmax", "thin_codes", "thin_csr",
    "thin_values",
]
F4 = np.float32
SIGNED_STEP = {2: 1.0, 4: 0.335, 8: 0.0308}
"""Best step of a signed mid-tread grid for a Gaussian, in units of its rms."""


@kernel(x="f4 N F", out="=f4 N F")
def normalise_dense(x: np.ndarray, norm: int, out: np.ndarray) -> None:
    """Rows over their sum (norm 1), their l2 norm (2), or as they are (0); sums in double, in column order."""
    indptr = np.arange(len(x) + 1, dtype=np.int64) * x.shape[1]
    out[:] = _normalised(indptr, x.ravel(), norm).reshape(x.shape)


@kernel(values="f4 Z", indptr="i8 R", out="=f4 Z")
def normalise_csr(indptr: np.ndarray, values: np.ndarray, norm: int, out: np.ndarray) -> None:
    """`normalise_dense` for the stored values of CSR rows."""
    out[:] = _normalised(indptr, values, norm)


@kernel(x="f4 N F", codes="=i2 N F", scale="=f4 N")
def feature_codes_dense(x: np.ndarray, norm: int, bits: int, signed: bool, codes: np.ndarray,
                        scale: np.ndarray) -> None:
    """Normalise, then code each row on a mid-tread grid of its own, at 2, 4 or 8 bits: value ≈ code·scale[row].

    Unsigned: scale = largest/(2^b − 1), exact for 0/1 features; signed: scale = SIGNED_STEP[b]·rms. Half to even.
    """
    indptr = np.arange(len(x) + 1, dtype=np.int64) * x.shape[1]
    flat = np.empty(x.size, np.int16)
    _feature_codes(indptr, x.ravel(), norm, bits, signed, flat, scale)
    codes[:] = flat.reshape(x.shape)


@kernel(values="f4 Z", codes="=i2 Z", scale="=f4 N", indptr="i8 N+1")
def feature_codes_csr(indptr: np.ndarray, values: np.ndarray, num_features: int, norm: int, bits: int, signed: bool,
                      codes: np.ndarray, scale: np.ndarray) -> None:
    """`feature_codes_dense` for the stored values of CSR rows; rms over the stored values."""
    _feature_codes(indptr, values, norm, bits, signed, codes, scale)


@kernel(codes="i2 N F", weights="i1 F H", out="=i4 N H")
def matmul_codes_dense(codes: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Codes times weight codes, exactly."""
    out[:] = codes.astype(np.int32) @ weights.astype(np.int32)


@kernel(indices="i4 Z", codes="i2 Z", weights="i1 F H", out="=i4 N H", indptr="i8 N+1")
def matmul_codes_csr(indptr: np.ndarray, indices: np.ndarray, codes: np.ndarray, weights: np.ndarray,
                     out: np.ndarray) -> None:
    """Sparse codes times weight codes, exactly; indices are checked by the caller to lie in [0, F)."""
    out[:] = 0
    rows = np.repeat(np.arange(len(out)), np.diff(indptr))
    np.add.at(out, rows, codes[:, None].astype(np.int32) * weights[indices].astype(np.int32))


@kernel(x="f4 N F", weights="f4 F H", out="=f4 N H")
def matmul_float_dense(x: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """x times weights, added over features in their order, two roundings a term."""
    out[:] = 0
    for f in range(x.shape[1]):
        out += x[:, f:f + 1] * weights[f]


@kernel(indices="i4 Z", values="f4 Z", weights="f4 F H", out="=f4 N H", indptr="i8 N+1")
def matmul_float_csr(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, weights: np.ndarray,
                     out: np.ndarray) -> None:
    """Sparse x times weights, added in the order of the row, two roundings a term."""
    out[:] = 0
    counts = np.diff(indptr)
    for k in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > k)
        at = indptr[rows] + k
        out[rows] += values[at, None] * weights[indices[at]]


@kernel(acc="i4 N H", row_scale="f4 N", bias="f4 H", codes="=i2 N H", moments="=?f8 N 3")
def hidden_codes(acc: np.ndarray, row_scale: np.ndarray, weight_step: float, bias: np.ndarray, hidden_step: float,
                 bits: int, codes: np.ndarray, moments: np.ndarray | None) -> None:
    """relu and grid of the hidden layer: clip(round((acc·(row_scale·weight_step) + bias)/hidden_step), 0, 2^b − 1).

    moments: per row [Σv², Σ|v|, max|v|] of the values v behind the relu, before the grid.
    """
    value = acc.astype(F4) * (row_scale * F4(weight_step))[:, None] + bias
    codes[:] = np.rint(np.fmin(np.fmax(value / F4(hidden_step), F4(0)), F4(2**bits - 1)))
    if moments is not None:
        moments[:] = moments_by_row(np.where(value < 0, F4(0), value))


@kernel(codes="i2 N F", scale="f4 N", weight1="i1 F H", bias1="f4 H", weight2="i1 H C", bias2="f4 C",
        moments="=?f8 N 3", out="=f4 N C")
def perceptron_dense(codes: np.ndarray, scale: np.ndarray, weight1: np.ndarray, step1: float, bias1: np.ndarray,
                     hidden_step: float, hidden_bits: int, weight2: np.ndarray, step2: float, bias2: np.ndarray,
                     moments: np.ndarray | None, out: np.ndarray) -> None:
    """matmul_codes_dense, hidden_codes, matmul_codes_dense and scores_from_codes one after the other, a few rows at a
    time: nothing of the hidden width is kept. Features are codes·scale[row], moments those of hidden_codes.
    """
    sums = np.empty((len(codes), weight1.shape[1]), np.int32)
    matmul_codes_dense(codes, weight1, sums)
    _second_layer(sums, scale, step1, bias1, hidden_step, hidden_bits, weight2, step2, bias2, moments, out)


@kernel(indices="i4 Z", codes="i2 Z", scale="f4 N", weight1="i1 F H", bias1="f4 H", weight2="i1 H C", bias2="f4 C",
        moments="=?f8 N 3", out="=f4 N C", indptr="i8 N+1")
def perceptron_csr(indptr: np.ndarray, indices: np.ndarray, codes: np.ndarray, scale: np.ndarray, weight1: np.ndarray,
                   step1: float, bias1: np.ndarray, hidden_step: float, hidden_bits: int, weight2: np.ndarray,
                   step2: float, bias2: np.ndarray, moments: np.ndarray | None, out: np.ndarray) -> None:
    """`perceptron_dense` on sparse features; indices are checked by the caller to lie in [0, F)."""
    sums = np.empty((len(out), weight1.shape[1]), np.int32)
    matmul_codes_csr(indptr, indices, codes, weight1, sums)
    _second_layer(sums, scale, step1, bias1, hidden_step, hidden_bits, weight2, step2, bias2, moments, out)


@kernel(acc="i4 N C", bias="f4 C", out="=f4 N C")
def scores_from_codes(acc: np.ndarray, scale: float, bias: np.ndarray, out: np.ndarray) -> None:
    """acc·scale + bias."""
    out[:] = acc.astype(F4) * F4(scale) + bias


@kernel(scores="f4 N C", classes="=i4 N", confidence="=f4 N", probabilities="=?f4 N C")
def softmax(scores: np.ndarray, classes: np.ndarray, confidence: np.ndarray,
            probabilities: np.ndarray | None) -> None:
    """Class of the largest score (the lowest on ties), its probability, and all probabilities.

    With an exponential of our own, added up in eight sums of every eighth column, then those. A row with NaN gets
    class 0 and NaN; one whose largest score is infinite gets its class and NaN.
    """
    unknown = np.isnan(scores).any(1)
    best = np.where(unknown, 0, scores.argmax(1))
    top = scores[np.arange(len(scores)), best]
    odd = unknown | ~np.isfinite(top)
    width = -(-scores.shape[1] // 8) * 8
    below = np.full((len(scores), width), -np.inf, F4)
    below[:, :scores.shape[1]] = np.where(odd[:, None], F4(0), scores) - np.where(odd, F4(0), top)[:, None]
    exponentials = _exp_negative(below)
    lanes, total = np.zeros((len(scores), 8), F4), np.zeros(len(scores), F4)
    for c in range(0, width, 8):
        lanes += exponentials[:, c:c + 8]
    for lane in lanes.T:
        total += lane
    classes[:] = best
    confidence[:] = np.where(odd, F4(np.nan), F4(1) / total)
    if probabilities is not None:
        probabilities[:] = np.where(odd[:, None], F4(np.nan), exponentials[:, :scores.shape[1]] / total[:, None])


@kernel(rows="i8 N", out="=u4 N columns")
def keyed_bits(seed: int, epoch: int, stage: int, layer: int, round: int, rows: np.ndarray, columns: int,
               out: np.ndarray) -> None:
    """Philox4x32-10 (Salmon et al., SC 2011) at (row, column): numbers that depend on the key and place alone.

    Counter: row (40 bits), column/4 (24 bits), epoch (32), layer (16), stage (8), round (8); lane = column mod 4; key =
    seed (64 bits).
    """
    out[:] = philox(seed, epoch, stage, layer, round, rows[:, None], np.arange(columns)[None])


@kernel(rows="i8 N", out="=f4 N columns")
def dropout_dense(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, columns: int, p: float,
                  out: np.ndarray) -> None:
    """out = 0 with probability p, else 1/(1 − p), by `keyed_bits`."""
    _mask(philox(seed, epoch, stage, layer, 0, rows[:, None], np.arange(columns)[None]), p, out)


def _second_layer(sums: np.ndarray, scale: np.ndarray, step1: float, bias1: np.ndarray, hidden_step: float,
                  hidden_bits: int, weight2: np.ndarray, step2: float, bias2: np.ndarray, moments: np.ndarray | None,
                  out: np.ndarray) -> None:
    codes = np.empty(sums.shape, np.int16)
    hidden_codes(sums, scale, step1, bias1, hidden_step, hidden_bits, codes, moments)
    scores = np.empty(out.shape, np.int32)
    matmul_codes_dense(codes, weight2, scores)
    scores_from_codes(scores, F4(hidden_step) * F4(step2), bias2, out)


@kernel(rows="i8 N", x="i2 N F", out="=f4 N F")
def thin_codes(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, p: float, x: np.ndarray,
               out: np.ndarray) -> None:
    """x where `dropout_dense` of the same key keeps it, 0 elsewhere; the factor 1/(1 − p) is left to the caller."""
    out[:] = np.where(_kept(seed, epoch, stage, layer, rows, x.shape[1], p), x, 0)


@kernel(rows="i8 N", x="f4 N F", out="=f4 N F")
def thin_values(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, p: float, x: np.ndarray,
                out: np.ndarray) -> None:
    """`thin_codes` of floats; `out` may be `x`."""
    out[:] = np.where(_kept(seed, epoch, stage, layer, rows, x.shape[1], p), x, F4(0))


@kernel(rows="i8 N", indptr="i8 N+1", indices="i4 Z", values="f4 Z", kept_indptr="=i8 N+1", kept_indices="=i4 Z",
        kept_values="=f4 Z")
def thin_csr(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, p: float, indptr: np.ndarray,
             indices: np.ndarray, values: np.ndarray, kept_indptr: np.ndarray, kept_indices: np.ndarray,
             kept_values: np.ndarray) -> None:
    """The non-zeros of CSR rows that `dropout_dense` of the same key keeps, in their order, as CSR rows of their own.
    The caller checks the indices.

    Args: kept_indices, kept_values: as long as the input; what stands behind `kept_indptr[-1]` is left open.
    """
    numbers = philox(seed, epoch, stage, layer, 0, np.repeat(rows, np.diff(indptr)), indices)
    kept = np.flatnonzero((numbers.astype(np.uint64) >= round(p * 2**32)) & (values != 0))
    kept_indptr[:] = np.searchsorted(kept, indptr)
    kept_indices[:len(kept)], kept_values[:len(kept)] = indices[kept], values[kept]


@kernel(x="f4 N F", weights="f4 F H", out="=f4 N H")
def matmul_thin(x: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """`matmul_float_dense`, fast where x has many zeros: they are left out, whatever weights they would meet."""
    out[:] = 0
    for f in range(x.shape[1]):
        out += np.where(x[:, f:f + 1] != 0, x[:, f:f + 1] * weights[f], F4(0))


@kernel(weights="i1 F H", out="=u1 H P 16")
def lookup_tables(weights: np.ndarray, out: np.ndarray) -> None:
    """For `matmul_thinned`, P = ⌈F/2⌉: of each column and pair of features, the 16 sums that two codes of 0..3 give,
    all raised by one number so that none is negative; zeros where they don't fit a byte, or a row's sums 16 bits.
    """
    pairs = (len(weights) + 1) // 2
    if out.shape[1] != pairs:
        raise ValueError(f"lookup_tables: out has shape {out.shape}, expected {pairs} along axis 1, half the features")
    out[:] = 0
    shift = 6 * max(-int(weights.min(initial=0)), 0)
    largest = shift + 6 * max(int(weights.max(initial=0)), 0)
    if weights.size == 0 or largest > 127 or pairs * largest > 65535:
        return
    both = np.zeros((2 * pairs, weights.shape[1]), np.int32)
    both[:len(weights)] = weights
    index = np.arange(16)
    out[:] = shift + (index & 3) * both[0::2].T[:, :, None] + (index >> 2) * both[1::2].T[:, :, None]


@kernel(rows="i8 N", codes="i2 N F", weights="i1 F H", tables="?u1 H P 16", out="=f4 N H")
def matmul_thinned(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, p: float, codes: np.ndarray,
                   weights: np.ndarray, tables: np.ndarray | None, out: np.ndarray) -> None:
    """`thin_codes` times weight codes: whole numbers, exactly, as floats.

    Args:
        tables: `lookup_tables` of the weights, or None: the same numbers, faster where codes have 2 bits.
    """
    if tables is not None and tables.shape[1] != (len(weights) + 1) // 2:
        raise ValueError(f"matmul_thinned: tables has shape {tables.shape}, expected {(len(weights) + 1) // 2} along "
                         "axis 1, half the features")
    thinned = np.where(_kept(seed, epoch, stage, layer, rows, codes.shape[1], p), codes, 0).astype(np.int32)
    out[:] = thinned @ weights.astype(np.int32)


@kernel(x="f4 N F", row_scale="f4 N", grad="f4 N H", out="=f4 F H")
def add_transposed(x: np.ndarray, row_scale: np.ndarray, grad: np.ndarray, out: np.ndarray) -> None:
    """out += xᵀ·(row_scale·grad), zeros of x left out: all rows' products are added from 0 on in order, then to out."""
    total = np.zeros_like(out)
    for row, g in zip(x, row_scale[:, None] * grad):
        total += np.where(row[:, None] != 0, row[:, None] * g, F4(0))
    out += total


@kernel(indices="i4 Z", values="f4 Z", row_scale="f4 N", grad="f4 N H", out="=f4 F H", indptr="i8 N+1")
def add_transposed_csr(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, row_scale: np.ndarray,
                       grad: np.ndarray, out: np.ndarray) -> None:
    """out += Xᵀ·(row_scale·grad) of CSR rows, added to out in the order of the rows; the caller checks the indices."""
    for row, g in enumerate(row_scale[:, None] * grad):
        for e in range(indptr[row], indptr[row + 1]):
            out[indices[e]] += values[e] * g


RUN = 256
"""Columns of what `activate` keeps that are a planar row of their own."""


@kernel(sums="f4 N H", row_scale="f4 N", bias="f4 H", rows="i8 N", out="=f4 N H", grad="=?f4 N H", errors="=?f8 N",
        moments="=?f8 N 3", kept="=?u1 N K")
def activate(sums: np.ndarray, row_scale: np.ndarray, weight_step: float, bias: np.ndarray, step: float, bits: int,
             seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, p: float, out: np.ndarray,
             grad: np.ndarray | None, errors: np.ndarray | None, moments: np.ndarray | None,
             kept: np.ndarray | None) -> None:
    """The hidden layer in training: relu, grid and dropout, and the gradient back through them.

    v = max(sums·(row_scale·weight_step) + bias, 0); code = clip(round(v/step), 0, 2^b − 1), or v itself where step is
    0; out = code where dropout of the key keeps it (p = 0: everywhere), else 0; the factor 1/(1 − p) is the caller's.

    Args:
        out: may be `sums`.
        grad: ∂L/∂out on entry, times `step` becomes ∂L/∂v·step: 0 where dropped, at v ≤ 0, and past the highest code.
        errors: Σ grad·(code − v/step) of a row over what was kept, v/step only where the gradient passes: the gradient
            of a learned step (LSQ), in double and column order. moments: per row [Σv², Σv, max v].
        kept: what `recall` needs in place of a second call with `grad`: K = H·(b + 1)/8 bytes a row, rounded up.
    Raises: ValueError: errors without grad, kept without a grid.
    """
    if errors is not None and grad is None:
        raise ValueError("activate: errors need grad")
    if kept is not None and step == 0:
        raise ValueError("activate: kept needs a grid, step is 0")
    value = sums * (row_scale * F4(weight_step))[:, None] + bias
    value = np.where(value < 0, F4(0), value)
    if moments is not None:
        moments[:] = moments_by_row(value)
    top = F4(2**bits - 1)
    scaled = value / F4(step) if step else value
    code = np.rint(np.fmin(np.fmax(scaled, F4(0)), top)) if step else value
    keep = _kept(seed, epoch, stage, layer, rows, sums.shape[1], p) if p > 0 else np.ones(sums.shape, bool)
    passes = (value > 0) & ((scaled <= top) if step else True)
    if kept is not None:
        codes, flags = np.where(keep, code, 0).astype(np.uint8), (keep & passes).astype(np.uint8)
        runs = range(0, sums.shape[1], RUN)
        kept[:] = np.concatenate([pack_codes(codes[:, c:c + RUN], bits) for c in runs]
                                 + [pack_codes(flags[:, c:c + RUN], 1) for c in runs], 1)
    if grad is not None:
        if errors is not None:
            errors[:] = 0
            kept = keep.astype(F4) * grad
            through = code - np.where(passes, scaled, F4(0))
            for c in range(sums.shape[1]):
                errors += kept[:, c].astype(np.float64) * through[:, c].astype(np.float64)
        grad[:] = np.where(keep & passes, grad, F4(0))
    out[:] = np.where(keep, code, F4(0))


@kernel(kept="u1 N K", out="=f4 N H", grad="=f4 N H")
def recall(kept: np.ndarray, bits: int, out: np.ndarray, grad: np.ndarray) -> None:
    """What `activate` with this `kept` made of the hidden layer, and of ∂L/∂out in `grad`, without its inputs."""
    width, at = out.shape[1], 0
    for target, size in ((out, bits), (grad, 1)):
        for column in range(0, width, RUN):
            count = min(RUN, width - column)
            found = unpack_codes(kept[:, at:at + row_bytes(count, size)], size, count)
            target[:, column:column + count] = (found if target is out else
                                                np.where(found, target[:, column:column + count], F4(0)))
            at += row_bytes(count, size)


def _kept(seed: int, epoch: int, stage: int, layer: int, rows: np.ndarray, columns: int, p: float) -> np.ndarray:
    bits = philox(seed, epoch, stage, layer, 0, rows[:, None], np.arange(columns)[None])
    return bits.astype(np.uint64) >= round(p * 2**32)


def _mask(bits: np.ndarray, p: float, out: np.ndarray) -> None:
    out[:] = np.where(bits.astype(np.uint64) >= round(p * 2**32), F4(1 / (1 - p)), F4(0))


def _row_sums(indptr: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Sums of each row's terms in double, in order."""
    total, counts = np.zeros(len(indptr) - 1), np.diff(indptr)
    for k in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > k)
        total[rows] += terms[indptr[rows] + k]
    return total


def _normalised(indptr: np.ndarray, values: np.ndarray, norm: int) -> np.ndarray:
    x = values.astype(np.float64)
    by = np.ones(len(indptr) - 1)
    if norm:
        by = _row_sums(indptr, x if norm == 1 else x * x)
        by = np.sqrt(by) if norm == 2 else by
    by[by == 0] = 1.0
    return (x / np.repeat(by, np.diff(indptr))).astype(F4)


def _feature_codes(indptr: np.ndarray, values: np.ndarray, norm: int, bits: int, signed: bool, codes: np.ndarray,
                   scale: np.ndarray) -> None:
    x, counts = _normalised(indptr, values, norm), np.diff(indptr)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if signed:
        squares = _row_sums(indptr, x.astype(np.float64) ** 2)
        scale[:] = SIGNED_STEP[bits] * np.sqrt(squares / np.maximum(counts, 1))
    else:
        largest = np.zeros(len(counts))
        np.fmax.at(largest, np.repeat(np.arange(len(counts)), counts), x.astype(np.float64))
        scale[:] = largest / high
    scale[scale == 0] = 1.0
    codes[:] = np.rint(np.fmin(np.fmax(x / np.repeat(scale, counts), F4(low)), F4(high)))  # NaN: the lowest code


def _exp_negative(x: np.ndarray) -> np.ndarray:
    """e^x for float32 x ≤ 0, the same polynomial as the compiled kernels; 0 from −87 on."""
    safe = np.where(x > F4(-87), x, F4(0))
    n = np.rint(safe * F4(1.44269504))
    r = (safe - n * F4(0.693145752)) - n * F4(1.42860677e-6)
    s = np.full(x.shape, F4(1) / F4(5040))
    for k in (720, 120, 24, 6, 2, 1, 1):
        s = s * r + F4(1) / F4(k)
    exponentials: np.ndarray = np.where(x > F4(-87), np.ldexp(s, n.astype(np.int32)), F4(0))
    return exponentials
