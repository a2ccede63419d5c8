# SPDX-License-Identifier: Apache-2.0
"""Messages and propagation: what each kernel computes, as NumPy; csrc/ has the compiled twins.

Legend: N rows, M rows of a buffer (local, then halo), C columns, E directed edges, B packed bytes a row,
b bits of a code. Results go to arrays that the caller supplies; float32 throughout, one rounding an operation.
"""
from __future__ import annotations

import numpy as np

from ..quant.packed import pack_codes, unpack_codes
from .dispatch import kernel

__all__ = [
    "add_affine", "add_news", "affine_codes", "affine_values", "aggregate_codes", "aggregate_float", "apply_multiplier",
    "check_csr", "code_news", "fixed_layer", "fixed_start", "gather_rows", "half_step", "layer",
    "layer_float", "level_histogram", "midrise", "pack", "propagated", "row_moments", "scale_rows", "unpack",
]
F4 = np.float32
LAYER_COLUMNS = 4096
"""Widest rows that `layer` and `fixed_layer` take; csrc/kernels.h has it too."""


CHECKED_ROWS = 1 << 16
"""That `check_csr` looks at at once: it needs no array of a graph's size."""


def check_csr(indptr: np.ndarray, indices: np.ndarray, num_columns: int) -> None:
    """Refuse a row pointer or an index that a kernel would read out of bounds by.

    Args: indptr int64 (N+1,); indices int32 (E,), expected in [0, num_columns).
    Raises: ValueError naming the first bad row.
    """
    for name, array, dtype in (("indptr", indptr, np.int64), ("indices", indices, np.int32)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"check_csr: {name} is {got}, expected {np.dtype(dtype)} of one axis")
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError(f"check_csr: row pointer is {indptr[:1]}…{indptr[-1:]}, expected 0…{len(indices)}")
    for begin in range(0, len(indptr) - 1, CHECKED_ROWS):
        falling = np.flatnonzero(np.diff(indptr[begin:begin + CHECKED_ROWS + 1]) < 0)
        if len(falling):
            raise ValueError(f"check_csr: row pointer falls at row {begin + falling[0]}")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= num_columns):
        bad = int(np.flatnonzero((indices < 0) | (indices >= num_columns))[0])
        row = int(np.searchsorted(indptr, bad, side="right")) - 1
        raise ValueError(f"check_csr: row {row} has index {indices[bad]}, expected 0 to {num_columns - 1}")


@kernel(codes="u1 N C", out="=u1 N B")
def pack(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Codes to payload. Raises ValueError where a code is 2^bits or more."""
    out[:] = pack_codes(codes, bits)


@kernel(payload="u1 N B", out="=u1 N C")
def unpack(payload: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Payload to codes."""
    out[:] = unpack_codes(payload, bits, out.shape[1])


@kernel(payload="u1 M P", rows="i4 N", out="=u1 N P")
def gather_rows(payload: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """out[i] = payload[rows[i]]; rows are checked by the caller to lie in [0, M)."""
    out[:] = payload[rows]


@kernel(indptr="i8 N+1", indices="i4 E", payload="u1 M B", out="=i4 N C")
def aggregate_codes(indptr: np.ndarray, indices: np.ndarray, payload: np.ndarray, bits: int, begin: int, end: int,
                    out: np.ndarray) -> None:
    """out[i] = sum of the codes of i's neighbours, for rows begin ≤ i < end. The CSR is checked by `check_csr` once.

    Raises: ValueError: a row of so many neighbours that a sum could leave 32 bits: (2^31 − 1)/(2^bits − 1).
    """
    codes = unpack_codes(payload, bits, out.shape[1]).astype(np.int32)
    out[begin:end] = 0
    rows = np.repeat(np.arange(begin, end), np.diff(indptr[begin:end + 1]))
    np.add.at(out, rows, codes[indices[indptr[begin]:indptr[end]]])


@kernel(indptr="i8 N+1", indices="i4 E", x="f4 M C", out="=f4 N C")
def aggregate_float(indptr: np.ndarray, indices: np.ndarray, x: np.ndarray, begin: int, end: int,
                    out: np.ndarray) -> None:
    """out[i] = sum of x over i's neighbours, added in the order of the row, for rows begin ≤ i < end."""
    out[begin:end] = 0
    counts = np.diff(indptr[begin:end + 1])
    for k in range(int(counts.max(initial=0))):
        rows = begin + np.flatnonzero(counts > k)
        out[rows] += x[indices[indptr[rows] + k]]


@kernel(h="f4 N C", inv_sqrt_degree="f4 N", believed="=?f4 N C", payload="=u1 N B", moments="=?f8 N 3")
def code_news(h: np.ndarray, inv_sqrt_degree: np.ndarray, believed: np.ndarray | None, step: float, bits: int,
              begin: int, end: int, payload: np.ndarray, moments: np.ndarray | None) -> None:
    """Code what is new about y = D̃^-½·h on the mid-rise grid, and bring `believed` up to date.

    e = y − believed (y itself without it); level = clip(⌊e/step⌋, −2^(b−1), 2^(b−1) − 1); the code is
    level + 2^(b−1); believed += (level + ½)·step. NaN gets code 0. moments: per row [Σe², Σ|e|, max|e|].
    """
    half, rows = F4(2 ** (bits - 1)), slice(begin, end)
    news = inv_sqrt_degree[rows, None] * h[rows]
    if believed is not None:
        news = news - believed[rows]
    if moments is not None:
        moments[rows] = moments_by_row(news)
    level = _level(news / F4(step), half)
    if believed is not None:
        believed[rows] += (level + F4(0.5)) * F4(step)
    payload[rows] = pack_codes((level + half).astype(np.uint8), bits)


@kernel(sums="i4 N C", degree="i4 N", r="=f4 N C")
def add_news(sums: np.ndarray, degree: np.ndarray, step: float, bits: int, keep: bool, begin: int, end: int,
             r: np.ndarray) -> None:
    """R += step·(Σ codes − ½·(2^b − 1)·degree) over rows begin ≤ i < end; without `keep`, R is set."""
    rows = slice(begin, end)
    whole = 2 * sums[rows].astype(np.int64) - (2**bits - 1) * degree[rows, None].astype(np.int64)
    news = whole.astype(F4) * (F4(step) * F4(0.5))
    r[rows] = r[rows] + news if keep else news


@kernel(indptr="i8 N+1", indices="i4 E", payload="u1 M B", inv_sqrt_degree="f4 N", residual="f4 N C", r="=f4 N C",
        h="f4 N C", before="?f4 N C", out="=f4 N C", believed="=?f4 N C", next_payload="=u1 N B", moments="=?f8 N 3",
        dots="=?f8 N")
def layer(indptr: np.ndarray, indices: np.ndarray, payload: np.ndarray, bits: int, step: float,
          inv_sqrt_degree: np.ndarray, residual: np.ndarray, r: np.ndarray, h: np.ndarray, before: np.ndarray | None,
          out: np.ndarray, gradient: bool, coefficient: float, a: float, b: float, c: float,
          believed: np.ndarray | None, next_step: float, next_payload: np.ndarray, moments: np.ndarray | None,
          dots: np.ndarray | None, begin: int, end: int) -> None:
    """A round and what its layer does with it, in one pass over rows begin ≤ i < end: aggregate_codes, add_news,
    propagated, half_step, apply_multiplier and code_news one after the other, to the last bit.

    R takes the neighbours' codes of `payload`, on the grid of `step` (0: nothing came); P = D̃^-½·R + D̃^-1·h.
    With `gradient`, out = H½ of h, plus `coefficient`·((H½ − h) − (P − P')), which is left out at 0; without,
    out = h + `coefficient`·((h − before) − (P − P')), the second round of a layer. P' is that of `before`, with R as it
    was. Then `next_payload` gets the codes of `out` on the grid of `next_step` (0: none).

    Args:
        payload: uint8 (M, B), codes of local and halo rows. next_payload: other memory, as others still read that one.
        h: at most LAYER_COLUMNS wide. before: the state that the last round was of, None for none (then P' = P).
        out: may be `h` or `before`. residual: float32 (N, C), the H⁰ term.
        believed: Ŷ of the local rows, kept up to date; None where states are coded afresh, and R is set anew.
        moments: see code_news. dots: ⟨D, D − (P − P')⟩ of each row, D = h − before.
    """
    rows, columns = slice(begin, end), h.shape[1]
    last = h if before is None else before
    held, now, half, new = (np.zeros_like(h) for _ in range(4))
    propagated(r, last, inv_sqrt_degree, begin, end, held)
    if step != 0:
        sums = np.empty((len(h), columns), np.int32)
        aggregate_codes(indptr, indices, payload, bits, begin, end, sums)
        degree = np.diff(indptr).astype(np.int32)
        add_news(sums, degree, step, bits, believed is not None, begin, end, r)
    propagated(r, h, inv_sqrt_degree, begin, end, now)
    if before is None:
        held = now
    if dots is not None:
        rowwise = np.zeros(len(h))
        apply_multiplier(last, h, held, now, 0.0, np.empty_like(h), rowwise)
        dots[rows] = rowwise[rows]
    half_step(h, now, residual, a, b, c, half)
    if not gradient:
        apply_multiplier(last, h, held, now, coefficient, new, None)
    elif coefficient != 0:
        apply_multiplier(h, half, held, now, coefficient, new, None)
    else:
        new = half
    out[rows] = new[rows]
    if next_step != 0:
        code_news(out, inv_sqrt_degree, believed, next_step, bits, begin, end, next_payload, moments)


@kernel(indptr="i8 N+1", indices="i4 E", payload="u1 M B", inv_sqrt_degree="f4 N", residual="i1 N S", r="=u2 N S",
        far_rows="?i4 P", far="=?f4 P C", h="f4 N C", before="?f4 N C", out="=f4 N C", believed="=?u1|u2 N S",
        next_payload="=u1 N B", moments="=?f8 N 3", dots="=?f8 N")
def fixed_layer(indptr: np.ndarray, indices: np.ndarray, payload: np.ndarray, bits: int, step: float,
                inv_sqrt_degree: np.ndarray, residual: np.ndarray, residual_step: float, unit: float, middle: float,
                r: np.ndarray, far_rows: np.ndarray | None, far: np.ndarray | None, h: np.ndarray,
                before: np.ndarray | None, out: np.ndarray, gradient: bool, coefficient: float, a: float, b: float,
                c: float, believed: np.ndarray | None, next_step: float, next_payload: np.ndarray,
                moments: np.ndarray | None, dots: np.ndarray | None, begin: int, end: int) -> None:
    """`layer` over state in fixed point, with the same bits: steps are powers of two.

    R and Ŷ are sums of codes in units of `unit`, from 0 on. With Ŷ = (believed − middle)·unit before this round's codes
    are in, R = (r − degree·middle)·unit; a round of codes moves the middle by ½·(2^b − 1)·step/unit, and is all of it
    where states are coded afresh. The caller sees to it that the numbers fit.

    Args:
        r: uint16 (N, S), S = C rounded up to a multiple of 8. believed: uint8 or uint16 (N, S).
        residual: int8 (N, S), levels of `residual_step`, which stand for (level + ½)·step.
        far_rows: int32 (P,), ascending, rows whose R does not fit; far: float32 (P, C), their R, instead of `r`.
    Raises: ValueError: only one of `far_rows` and `far`.
    """
    if (far_rows is None) != (far is None):
        raise ValueError("fixed_layer: one of far_rows and far is None; expected both or none")
    columns, degree = h.shape[1], np.diff(indptr)[:, None].astype(F4)
    highest = F4(2**bits - 1) / F4(2 * unit)
    now = F4(middle if believed is not None or step == 0 else 0) + F4(step) * highest
    wide = (r[:, :columns].astype(F4) - degree * F4(middle)) * F4(unit)
    kept = None if believed is None else (believed[:, :columns].astype(F4) - now) * F4(unit)
    elsewhere = slot = np.zeros(0, np.int64)
    if far_rows is not None and far is not None:
        slot = np.flatnonzero((far_rows >= begin) & (far_rows < end))
        elsewhere = far_rows[slot]
        wide[elsewhere] = far[slot]
    layer(indptr, indices, payload, bits, step, inv_sqrt_degree,
          (residual[:, :columns].astype(F4) + F4(0.5)) * F4(residual_step), wide, h, before, out, gradient, coefficient,
          a, b, c, kept, next_step, next_payload, moments, dots, begin, end)
    here = np.arange(begin, end)
    if far is not None:
        far[slot] = wide[elsewhere]
        here = np.setdiff1d(here, elsewhere)
    r[here, :columns] = (wide[here] / F4(unit) + degree[here] * now).astype(np.uint16)
    if believed is not None and kept is not None:
        now = now + F4(next_step) * highest
        believed[begin:end, :columns] = (kept[begin:end] / F4(unit) + now).astype(believed.dtype)


@kernel(h="f4 N C", inv_sqrt_degree="f4 N", residual="=i1 N S", believed="=?u1|u2 N S", payload="=u1 N B",
        moments="=?f8 N 3")
def fixed_start(h: np.ndarray, inv_sqrt_degree: np.ndarray, residual_step: float, residual_bits: int, unit: float,
                step: float, bits: int, begin: int, end: int, residual: np.ndarray, believed: np.ndarray | None,
                payload: np.ndarray, moments: np.ndarray | None) -> None:
    """What comes before the first `fixed_layer`: levels of the residual term, the first round's codes, and Ŷ."""
    columns, rows = h.shape[1], slice(begin, end)
    kept = None if believed is None else np.zeros_like(h)
    code_news(h, inv_sqrt_degree, kept, step, bits, begin, end, payload, moments)
    residual[rows, :columns] = _level(h[rows] / F4(residual_step), F4(2 ** (residual_bits - 1))).astype(np.int8)
    if believed is not None and kept is not None:
        middle = F4(step) * F4(2**bits - 1) / F4(2 * unit)
        believed[rows] = 0
        believed[rows, :columns] = (kept[rows] / F4(unit) + middle).astype(believed.dtype)


@kernel(indptr="i8 N+1", indices="i4 E", y="f4 M C", inv_sqrt_degree="f4 N", h0="f4 N C", h="f4 N C", before="?f4 N C",
        out="=f4 N C", p="=?f4 N C", next_y="=?f4 N+ C", dots="=?f8 N")
def layer_float(indptr: np.ndarray, indices: np.ndarray, y: np.ndarray, inv_sqrt_degree: np.ndarray, h0: np.ndarray,
                h: np.ndarray, before: np.ndarray | None, out: np.ndarray, p: np.ndarray | None, first: bool,
                second: bool, coefficient: float, a: float, b: float, c: float, next_y: np.ndarray | None,
                dots: np.ndarray | None, begin: int, end: int) -> None:
    """A round of float messages and its layer, in one pass over rows begin ≤ i < end: what aggregate_float, propagated,
    half_step, apply_multiplier and scale_rows do one after the other, to the last bit.

    P = D̃^-½·Σ y + D̃^-1·h over the neighbours; out = H½ of h, plus `coefficient`·G where that is not 0, with
    G = Δ − (P − P of the layer before, which `p` holds; in the `first` layer P itself); then `p` becomes P. `dots` gets
    ⟨D, D − (P − p)⟩ of D = h − before, 0 in the first layer. Then next_y = D̃^-½·out.

    `second`: the other round of a layer. h is H½, `before` and `p` are H and P of the first round, which stay;
    out = h + coefficient·G and `dots` gets ⟨Δ, G⟩, with Δ = h − before and G = Δ − (P − p).

    Args:
        y: D̃^-½·H of local and halo rows. out: may be `h` or `before`. p: None where no multiplier acts here or next.
        next_y: another buffer than `y`, whose rows others may still read; None: nothing is to be sent.
    Raises: ValueError: a multiplier without `p`, or `second` or `dots` past the first layer without `before`.
    """
    looks_back = second or (dots is not None and not first)
    if ((looks_back or coefficient != 0) and p is None) or (looks_back and before is None):
        raise ValueError("layer_float: a multiplier needs p, and its dots or second round need before")
    rows, now, sums = slice(begin, end), np.empty_like(h), np.empty_like(h)
    aggregate_float(indptr, indices, y, begin, end, sums)
    propagated(sums, h, inv_sqrt_degree, begin, end, now)
    moved, gap = np.zeros_like(now[rows]), np.zeros_like(now[rows])
    if looks_back and before is not None and p is not None:
        moved = h[rows] - before[rows]
        gap = moved - (now[rows] - p[rows])
    if dots is not None:
        dots[rows] = _products_by_row(moved, gap)
    if second:
        fresh = h[rows] + F4(coefficient) * gap
    else:
        fresh = (F4(a) * h[rows] + F4(b) * now[rows]) + F4(c) * h0[rows]
        if coefficient != 0 and p is not None:
            held = now[rows] if first else p[rows]
            fresh = fresh + F4(coefficient) * ((fresh - h[rows]) - (now[rows] - held))
        if p is not None:
            p[rows] = now[rows]
    out[rows] = fresh
    if next_y is not None:
        next_y[rows] = inv_sqrt_degree[rows, None] * fresh


@kernel(h="f4 N C", inv_sqrt_degree="f4 N", out="=f4 N+ C")
def scale_rows(h: np.ndarray, inv_sqrt_degree: np.ndarray, begin: int, end: int, out: np.ndarray) -> None:
    """y = D̃^-½·h, into the first rows of `out`."""
    out[begin:end] = inv_sqrt_degree[begin:end, None] * h[begin:end]


@kernel(r="f4 N C", h="f4 N C", inv_sqrt_degree="f4 N", out="=f4 N C")
def propagated(r: np.ndarray, h: np.ndarray, inv_sqrt_degree: np.ndarray, begin: int, end: int,
               out: np.ndarray) -> None:
    """P = Â·h = D̃^-½·R + D̃^-1·h: the neighbours' part from messages, the node's own part exact."""
    d = inv_sqrt_degree[begin:end, None]
    out[begin:end] = d * r[begin:end] + (d * d) * h[begin:end]


@kernel(h="f4 N C", p="f4 N C", h0="f4 N C", out="=f4 N C")
def half_step(h: np.ndarray, p: np.ndarray, h0: np.ndarray, a: float, b: float, c: float, out: np.ndarray) -> None:
    """H½ = a·H + b·P + c·H⁰, the gradient step of a layer."""
    out[:] = (F4(a) * h + F4(b) * p) + F4(c) * h0


@kernel(h="f4 N C", half="f4 N C", p="f4 N C", p_next="f4 N C", out="=f4 N C", dots="=?f8 N")
def apply_multiplier(h: np.ndarray, half: np.ndarray, p: np.ndarray, p_next: np.ndarray, coefficient: float,
                     out: np.ndarray, dots: np.ndarray | None) -> None:
    """H = H½ + coefficient·G with Δ = H½ − H, G = Δ − (P' − P); dots[i] = ⟨Δ_i, G_i⟩, added as in `row_moments`.

    `out` may be `h`.
    """
    delta = half - h
    g = delta - (p_next - p)
    if dots is not None:
        dots[:] = _products_by_row(delta, g)
    out[:] = half + F4(coefficient) * g


@kernel(x="f4 N C", out="=f4 N C")
def midrise(x: np.ndarray, step: float, bits: int, out: np.ndarray) -> None:
    """The value that a mid-rise code of x stands for: (clip(⌊x/step⌋) + ½)·step."""
    out[:] = (_level(x / F4(step), F4(2 ** (bits - 1))) + F4(0.5)) * F4(step)


@kernel(x="f4 N C", inv_sqrt_degree="?f4 N", believed="=?f4 N C", codes="=u1 N C")
def affine_codes(x: np.ndarray, inv_sqrt_degree: np.ndarray | None, believed: np.ndarray | None, low: float,
                 step: float, scale: float, bias: float, bits: int, begin: int, end: int, codes: np.ndarray) -> None:
    """Code rows begin ≤ i < end on an affine grid (quant.grids.AffineGrid), and bring `believed` up to date.

    e = D̃^-½·x − believed, where given; code = clip(⌊(e − low)·scale + bias⌋, 0, 2^b − 1); NaN gets code 0;
    believed += low + code·step.
    """
    rows = slice(begin, end)
    news = x[rows] if inv_sqrt_degree is None else inv_sqrt_degree[rows, None] * x[rows]
    if believed is not None:
        news = news - believed[rows]
    level = np.floor(np.fmin(np.fmax((news - F4(low)) * F4(scale) + F4(bias), F4(0)), F4(2**bits - 1)))
    if believed is not None:
        believed[rows] += F4(low) + level * F4(step)
    codes[rows] = level.astype(np.uint8)


@kernel(codes="u1 N C", out="=f4 N C")
def affine_values(codes: np.ndarray, low: float, step: float, out: np.ndarray) -> None:
    """What codes of an affine grid mean: low + code·step."""
    out[:] = F4(low) + codes.astype(F4) * F4(step)


@kernel(sums="i4 N C", degree="i4 N", r="=f4 N C")
def add_affine(sums: np.ndarray, degree: np.ndarray, low: float, step: float, keep: bool, begin: int, end: int,
               r: np.ndarray) -> None:
    """R += low·degree + step·Σ codes over rows begin ≤ i < end; without `keep`, R is set."""
    rows = slice(begin, end)
    news = (F4(low) * degree[rows, None].astype(F4)) + F4(step) * sums[rows].astype(F4)
    r[rows] = r[rows] + news if keep else news


@kernel(x="f4 N C", moments="=f8 N 3")
def row_moments(x: np.ndarray, moments: np.ndarray) -> None:
    """Per row [Σx², Σ|x|, max|x|] in double; what the running ranges follow.

    Column c is added to sum c mod 8, and the eight sums by halves: additions need not wait for each other.
    """
    moments[:] = moments_by_row(x)


@kernel(h="f4 N C", inv_sqrt_degree="f4 N", out="=i8 4096")
def level_histogram(h: np.ndarray, inv_sqrt_degree: np.ndarray, out: np.ndarray) -> None:
    """out[upper 12 bits of |D̃^-½·h|] += 1 for every value: biased exponent and sixteenths, see quant/levels.py."""
    words = (inv_sqrt_degree[:, None] * h).view(np.uint32)
    out += np.bincount(((words >> 19) & 4095).ravel(), minlength=4096)


def _level(scaled: np.ndarray, half: np.float32) -> np.ndarray:
    level: np.ndarray = np.floor(np.fmin(np.fmax(scaled, -half), half - F4(1)))
    return level


def moments_by_row(x: np.ndarray) -> np.ndarray:
    """`row_moments` as a new array."""
    size = np.abs(x.astype(np.float64))
    largest = np.fmax.reduce(size, axis=1, initial=0.0)
    return np.stack([_sum_by_row(size * size), _sum_by_row(size), largest], 1)


def _products_by_row(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _sum_by_row(x.astype(np.float64) * y.astype(np.float64))


def _sum_by_row(x: np.ndarray) -> np.ndarray:
    """Column c is added to sum c mod 8, and the eight sums by halves."""
    lanes = np.zeros((len(x), 8))
    for c in range(x.shape[1]):
        lanes[:, c % 8] += x[:, c]
    for half in (4, 2, 1):
        lanes[:, :half] += lanes[:, half:2 * half]
    return lanes[:, 0]
