# SPDX-License-Identifier: Apache-2.0
"""Kernels at their edges: calls that would leave a buffer, odd numbers, edges of tiles, threads and forks."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.kernels.dispatch import native

LEVELS = ["scalar", "reference"] + (["avx2"] if kernels.isa() == "avx2" else [])
needs_native = pytest.mark.skipif(native() is None, reason="the compiled kernels are not built")


def _z(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def _pointer(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _fixed(stride: int, far_rows: list[int] | None, far: np.ndarray | None, known_type: Any = np.uint8) -> None:
    """One row of 4 columns without neighbours."""
    h, r, residual = _z(1, 4), _z(1, stride, dtype=np.uint16), _z(1, stride, dtype=np.int8)
    rows = None if far_rows is None else np.array(far_rows, np.int32)
    kernels.fixed_layer(_pointer(0, 0), _z(0, dtype=np.int32), _z(1, 1, dtype=np.uint8), 2, 2.0, _z(1), residual, 1.0,
                        1.0, 0.0, r, rows, far, h, None, h, True, 0.0, 0.0, 0.9, 0.1, r.astype(known_type), 2.0,
                        _z(1, 1, dtype=np.uint8), None, None, 0, 1)


OUT_OF_BOUNDS: list[tuple[str, Callable[[], Any], str]] = [
    ("sums past the edges", lambda: kernels.aggregate_codes(
        _pointer(0, 9), _z(2, dtype=np.int32), _z(2, 1, dtype=np.uint8), 2, 0, 1, _z(1, 4, dtype=np.int32)),
     "aggregate_codes: indptr runs from 0 to 9, expected inside 0 to 2, the length of indices"),
    ("float sums before the edges", lambda: kernels.aggregate_float(
        _pointer(-1, 1), _z(2, dtype=np.int32), _z(2, 1), 0, 1, _z(1, 1)), "indptr runs from -1 to 1"),
    ("product past the values", lambda: kernels.matmul_float_csr(
        _pointer(0, 3), _z(2, dtype=np.int32), _z(2), _z(4, 1), _z(1, 1)), "matmul_float_csr: indptr runs from 0 to 3"),
    ("fewer values than indices", lambda: kernels.matmul_codes_csr(
        _pointer(0, 2), _z(2, dtype=np.int32), _z(1, dtype=np.int16), _z(4, 1, dtype=np.int8),
        _z(1, 1, dtype=np.int32)), "matmul_codes_csr: codes has shape (1,), expected 2"),
    ("scale too short", lambda: kernels.feature_codes_csr(
        _pointer(0, 1, 2), _z(2), 5, 0, 2, False, _z(2, dtype=np.int16), _z(1)), "feature_codes_csr: indptr has shape"),
    ("no row pointer", lambda: kernels.normalise_csr(_pointer(), _z(0), 1, _z(0)), "indptr has shape (0,)"),
    ("columns past the output", lambda: kernels.keyed_bits(
        0, 0, 0, 0, 0, _z(1, dtype=np.int64), 8, _z(1, 4, dtype=np.uint32)), "out has shape (1, 4), expected 8"),
    ("dropout columns", lambda: kernels.dropout_dense(0, 0, 0, 0, _z(1, dtype=np.int64), 3, 0.5, _z(1, 4)),
     "dropout_dense: out has shape (1, 4), expected 3"),
    ("a row that runs into the column", lambda: kernels.keyed_bits(
        0, 0, 0, 0, 0, _pointer(0, 2**40), 4, _z(2, 4, dtype=np.uint32)), "rows[1] is 1099511627776"),
    ("a layer that runs into the stage", lambda: kernels.keyed_bits(
        0, 0, 0, 2**16, 0, _pointer(0), 4, _z(1, 4, dtype=np.uint32)), "layer is 65536, expected 0 to 65535"),
    ("everything dropped", lambda: kernels.dropout_dense(0, 0, 0, 0, _pointer(0), 4, 1.0, _z(1, 4)), "p is 1.0"),
    ("three bits", lambda: kernels.add_news(
        _z(1, 1, dtype=np.int32), _z(1, dtype=np.int32), 1.0, 3, True, 0, 1, _z(1, 1)), "add_news: bits is 3"),
    ("features of one bit", lambda: kernels.feature_codes_dense(
        _z(1, 1), 0, 1, True, _z(1, 1, dtype=np.int16), _z(1)), "feature_codes_dense: bits is 1, expected 2, 4 or 8"),
    ("no such norm", lambda: kernels.normalise_dense(_z(1, 1), 3, _z(1, 1)), "normalise_dense: norm is 3"),
    ("registers past a row", lambda: _fixed(4, None, None), "fixed_layer: residual has shape (1, 4), expected 8"),
    ("registers past a scratch", lambda: _fixed(8192, None, None), "residual has shape (1, 8192), expected 8"),
    ("a row past those in float32", lambda: _fixed(8, [0, 0, 0], _z(2, 4)), "far has shape (2, 4), expected 3 along"),
    ("no rows in float32", lambda: _fixed(8, [0], None), "fixed_layer: one of far_rows and far is None; expected both"),
    ("registers of the start", lambda: kernels.fixed_start(
        _z(1, 4), _z(1), 1.0, 8, 1.0, 2.0, 2, 0, 1, _z(1, 4, dtype=np.int8), None, _z(1, 1, dtype=np.uint8), None),
     "fixed_start: residual has shape (1, 4), expected 8"),
    ("fewer messages than rows", lambda: kernels.layer_float(
        _pointer(0, 0, 0), _z(0, dtype=np.int32), _z(1, 4), _z(2), _z(2, 4), _z(2, 4), None, _z(2, 4), None, False,
        False, 0.0, 0.0, 0.9, 0.1, _z(1, 4), None, 0, 2), "layer_float: next_y has shape (1, 4), expected at least 2"),
    ("no classes", lambda: kernels.softmax(_z(1, 0), _z(1, dtype=np.int32), _z(1), None), ""),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("call", "text"), [pytest.param(call, text, id=name) for name, call, text in OUT_OF_BOUNDS])
def test_what_would_leave_a_buffer_is_refused(level: str, call: Callable[[], Any], text: str) -> None:
    with kernels.using_isa(level), pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


WRONG_AFTER_RIGHT: dict[str, tuple[dict[int, Any], type[Exception], str]] = {
    "bits": ({1: 4}, ValueError, "pack: out has shape (3, 2), expected 4 along axis 1"),
    "dtype": ({0: _z(3, 7, dtype=np.int8)}, TypeError, "pack: codes is int8 (3, 7), expected uint8"),
    "axes": ({0: _z(21, dtype=np.uint8)}, TypeError, "pack: codes is uint8 (21,), expected uint8 (N, C)"),
    "rows": ({0: _z(4, 7, dtype=np.uint8)}, ValueError, "pack: out has shape (3, 2), expected 4 along axis 0"),
    "order": ({0: _z(7, 3, dtype=np.uint8).T}, ValueError, "pack: codes is not C-contiguous"),
    "read-only": ({2: _read_only(_z(3, 2, dtype=np.uint8))}, ValueError, "pack: out is read-only"),
    "a list": ({0: [[0] * 7] * 3}, TypeError, "pack: codes is list, expected uint8"),
    "no array": ({2: None}, TypeError, "pack: out is NoneType, expected uint8"),
    "bits as a bool": ({1: True}, TypeError, "pack: bits is bool"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WRONG_AFTER_RIGHT)
def test_a_wrong_call_is_refused_after_a_right_one(level: str, name: str) -> None:
    """Layouts that were fine once are remembered: all that tells arrays apart has to count."""
    changes, error, text = WRONG_AFTER_RIGHT[name]
    right: list[Any] = [_z(3, 7, dtype=np.uint8), 2, _z(3, 2, dtype=np.uint8)]
    with kernels.using_isa(level):
        kernels.pack(*right)
        with pytest.raises(error) as caught:
            kernels.pack(*[changes.get(at, value) for at, value in enumerate(right)])
    assert text in str(caught.value)


@pytest.mark.parametrize("level", LEVELS)
def test_places_of_random_numbers_are_checked_where_they_are_drawn(level: str) -> None:
    h, ones, payload = _z(3, 4), np.ones(3, np.float32), _z(3, 2, dtype=np.uint8)
    for bad in (-1, 2**40, -2**63):
        places = _pointer(0, bad, 2**40 - 1)
        with kernels.using_isa(level):
            kernels.code_gradients(h, ones, 2, 0, 0, 0, 0, 0, places, 2, 3, payload)
            with pytest.raises(ValueError, match=rf"code_gradients: rows\[1\] is {bad}, expected 0 to 2"):
                kernels.code_gradients(h, ones, 2, 0, 0, 0, 0, 0, places, 0, 3, payload)


@pytest.mark.parametrize("level", LEVELS)
def test_gathered_rows_are_copied_whole_and_alone(level: str) -> None:
    """Of every width around what is copied at a time, from the buffer's end too; nothing past the rows is written."""
    rng = np.random.default_rng(0)
    for width in [*range(36), 64, 160]:
        for count in (0, 1, 2, 7, 40):
            payload = rng.integers(0, 256, (9, width), dtype=np.uint8)
            rows = rng.integers(0, 9, count).astype(np.int32)
            block = np.full((count + 40, width), 255, np.uint8)
            with kernels.using_isa(level):
                kernels.gather_rows(payload, rows, block[:count])
            np.testing.assert_array_equal(block[:count], payload[rows])
            assert (block[count:] == 255).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("overlap", ["whole", "first row", "last row", "last place", "second place", "none"])
@pytest.mark.parametrize("name", ["layer", "fixed_layer", "layer_float"])
def test_a_round_is_not_written_where_it_is_read(level: str, overlap: str, name: str) -> None:
    """What is read and what is written in one block of memory, side by side at best."""
    block, at = np.zeros(64, np.uint8), {"whole": 0, "first row": 2, "last row": 6, "last place": 7, "second place": 1}
    payload, following = block[:8].reshape(4, 2), block[at.get(overlap, 8):][:8].reshape(4, 2)
    h, pointer, indices, ones = _z(4, 2), _pointer(0, 0, 0, 0, 0), _z(0, dtype=np.int32), np.ones(4, np.float32)
    head = (pointer, indices, payload, 8, 2.0, ones)
    tail = (h, None, h.copy(), True, 0.0, 0.0, 0.9, 0.1, None, 2.0, following, None, None, 0, 4)

    def call() -> None:
        if name == "layer":
            kernels.layer(*head, h, h.copy(), *tail)
        elif name == "fixed_layer":
            kernels.fixed_layer(*head, _z(4, 8, dtype=np.int8), 2.0, 1.0, 0.0, _z(4, 8, dtype=np.uint16), None, None,
                                *tail)
        else:
            y, next_y = block[:32], block[4 * at.get(overlap, 8):][:32]
            kernels.layer_float(pointer, indices, y.view(np.float32).reshape(4, 2), ones, h, h, None, h.copy(), None,
                                False, False, 0.0, 0.0, 0.9, 0.1, next_y.view(np.float32).reshape(4, 2), None, 0, 4)

    read, written = ("y", "next_y") if name == "layer_float" else ("payload", "next_payload")
    with kernels.using_isa(level):
        if overlap == "none":
            call()
            return
        with pytest.raises(ValueError, match=f"{name}: {written} shares memory with {read}, which other rows"):
            call()


@needs_native
def test_sums_that_leave_32_bits_are_refused() -> None:
    most = (2**31 - 1) // 255
    pointer, indices, payload = _pointer(0, 0, most + 1), _z(most + 1, dtype=np.int32), _z(1, 1, dtype=np.uint8)
    sums, h, text = _z(2, 1, dtype=np.int32), _z(2, 1), f"row 1 has {most + 1} neighbours, expected at most {most}"
    with pytest.raises(ValueError, match=f"aggregate_codes: {text}"):
        kernels.aggregate_codes(pointer, indices, payload, 8, 0, 2, sums)
    with pytest.raises(ValueError, match=f"layer: {text}"):
        kernels.layer(pointer, indices, payload, 8, 2.0, h[:, 0].copy(), h, h.copy(), h, None, h, True, 0.0, 0.0, 0.9,
                      0.1, None, 0.0, _z(2, 1, dtype=np.uint8), None, None, 0, 2)
    kernels.aggregate_codes(_pointer(0, 0, most), indices, np.full((1, 1), 255, np.uint8), 8, 0, 2, sums)
    assert sums.ravel().tolist() == [0, most * 255]


def test_types_are_not_converted() -> None:
    with pytest.raises(TypeError, match="bits is float, expected 1, 2, 4 or 8"):
        kernels.midrise(_z(1, 1), 1.0, 2.0, _z(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="indptr is int32"):
        kernels.check_csr(np.array([0, 1], np.int32), _z(1, dtype=np.int32), 1)
    with pytest.raises(TypeError, match="missing a required argument: 'bits'"):
        kernels.pack(_z(1, 1, dtype=np.uint8))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"fixed_layer: believed is int16 \(1, 8\), expected uint8 or uint16 \(N, S\)"):
        _fixed(8, None, None, np.int16)


@needs_native
def test_the_compiled_functions_convert_nothing_either() -> None:
    """Past the checks by name, the extension still refuses another type, stride or device."""
    module: Any = native()
    good = _z(4, 4, dtype=np.uint8)
    for bad in (good.astype(np.int32), good[:, ::2], good.tolist()):
        with pytest.raises(TypeError):
            module.unpack(bad, 8, good)


@pytest.mark.parametrize("level", LEVELS)
def test_odd_numbers_have_one_answer(level: str) -> None:
    with kernels.using_isa(level), np.errstate(all="ignore"):
        scores = np.array([[1, np.inf], [-np.inf, -np.inf], [np.nan, 3], [3, np.nan]], np.float32)
        classes, confidence, every = _z(4, dtype=np.int32), _z(4), _z(4, 2)
        kernels.softmax(scores, classes, confidence, every)
        assert classes.tolist() == [1, 0, 0, 0]
        assert np.isnan(confidence).all()
        assert np.isnan(every).all()
        codes, scale = _z(1, 3, dtype=np.int16), _z(1)
        kernels.feature_codes_dense(np.array([[np.nan, np.inf, 1]], np.float32), 0, 2, False, codes, scale)
        assert codes.tolist() == [[0, 0, 0]]
        kernels.feature_codes_dense(np.array([[3e38, -3e38, 1e-30]], np.float32), 1, 2, True, codes, scale)
        assert codes.tolist() == [[-2, -2, 0]]
        none = _z(3)
        kernels.feature_codes_dense(_z(3, 0), 2, 2, True, _z(3, 0, dtype=np.int16), none)
        assert none.tolist() == [1, 1, 1]


@needs_native
@pytest.mark.parametrize(("columns", "bits"), [(1024, 8), (1025, 8), (1031, 1), (2050, 2), (3000, 4), (8193, 1)])
def test_rows_wider_than_one_tile(columns: int, bits: int) -> None:
    rng = np.random.default_rng(columns)
    h, d = rng.normal(size=(3, columns)).astype(np.float32), np.ones(3, np.float32)
    start = rng.normal(size=(3, columns)).astype(np.float32)
    results = []
    for level in LEVELS:
        for known in (start.copy(), None):
            payload = np.full((3, (columns * bits + 7) // 8), 255, np.uint8)
            with kernels.using_isa(level):
                kernels.code_news(h, d, known, 0.1, bits, 0, 3, payload, None)
            results.append((payload, known))
    for payload, known in results[2:]:
        want_payload, want_known = results[0 if known is not None else 1]
        np.testing.assert_array_equal(payload, want_payload)
        if known is not None:
            np.testing.assert_array_equal(known, want_known)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("features", [1, 2, 3, 16, 31])
@pytest.mark.parametrize("width", [1, 7, 15, 16, 17, 33, 40, 64, 97])
def test_products_at_the_edges_of_tiles(rows: int, features: int, width: int) -> None:
    """Whole numbers at their extremes are exact; floats are added in the order of the features, bit by bit."""
    rng = np.random.default_rng(rows * features * width)
    codes = rng.choice(np.array([-32768, -1, 0, 255, 32767], np.int16), (rows, features))
    weights = rng.choice(np.array([-128, -1, 0, 1, 127], np.int8), (features, width))
    x = rng.normal(size=(rows, features)).astype(np.float32)
    w = rng.normal(size=(features, width)).astype(np.float32)
    in_order = np.zeros((rows, width), np.float32)
    for f in range(features):
        in_order += x[:, f:f + 1] * w[f]
    for level in LEVELS:
        with kernels.using_isa(level):
            out, product = np.full((rows, width), 7, np.int32), np.full((rows, width), 7, np.float32)
            kernels.matmul_codes_dense(codes, weights, out)
            kernels.matmul_float_dense(x, w, product)
        np.testing.assert_array_equal(out, codes.astype(np.int64) @ weights.astype(np.int64), err_msg=level)
        np.testing.assert_array_equal(product.view(np.uint32), in_order.view(np.uint32), err_msg=level)


@needs_native
@pytest.mark.parametrize("level", [name for name in LEVELS if name != "reference"])
@pytest.mark.parametrize(("counter", "key", "want"), [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
], ids=["zeros", "ones", "pi"])
def test_known_answers_of_philox(level: str, counter: list[int], key: list[int], want: str) -> None:
    out = np.empty(4, np.uint32)
    with kernels.using_isa(level):
        native().philox(np.array(counter, np.uint32), np.array(key, np.uint32), out)  # type: ignore[union-attr]
    assert [f"{v:08x}" for v in out] == want.split()


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_sit_in_the_counter_as_documented(level: str) -> None:
    """Row 40 bits, column/4 24 bits, epoch, layer | stage | round, at the top of every range but the column's."""
    out = np.empty((1, 44), np.uint32)
    with kernels.using_isa(level):
        kernels.keyed_bits(2**64 - 1, 2**32 - 1, 255, 2**16 - 1, 255, np.array([2**40 - 1]), 44, out)
    if native() is None:
        pytest.skip("needs the compiled Philox to compare with")
    for group in range(11):
        want = np.empty(4, np.uint32)
        counter = np.array([2**32 - 1, 255 | group << 8, 2**32 - 1, 2**32 - 1], np.uint32)
        native().philox(counter, np.full(2, 2**32 - 1, np.uint32), want)  # type: ignore[union-attr]
        np.testing.assert_array_equal(out[0, 4 * group:4 * group + 4], want)


@needs_native
def test_callers_from_several_threads_take_turns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40000, 7)).astype(np.float32)
    want = np.empty_like(x)
    kernels.half_step(x, x, x, 0.1, 0.2, 0.3, want)
    wrong: list[int] = []

    def work(me: int) -> None:
        out = np.empty_like(x)
        for turn in range(40):
            out[:] = 0
            kernels.half_step(x, x, x, 0.1, 0.2, 0.3, out)
            if not np.array_equal(out, want):
                wrong.append(me)
            if me == 0:
                kernels.set_threads(1 + turn % 3)  # while others are at work

    workers = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    kernels.set_threads(1)
    assert wrong == []


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 5, 8])
def test_threads_take_every_row_once(threads: int) -> None:
    """Of 16 rows a chunk: fewer chunks than threads, as many, and a few more, the last one not full."""
    kernels.set_threads(threads)
    try:
        for rows in (17, 33, 16 * threads, 16 * threads + 1, 16 * (threads + 2) - 3, 500):
            counts = np.zeros((rows, 4096), np.float32)
            for _ in range(30):
                kernels.half_step(counts, counts, np.ones_like(counts), 1.0, 0.0, 1.0, counts)
            np.testing.assert_array_equal(counts, 30, err_msg=f"{rows} rows")
    finally:
        kernels.set_threads(1)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    code = """
import os, threading, numpy as np
from qgnn_dist import kernels
x = np.ones((200000, 8), np.float32); out = np.empty_like(x)
def run():
    kernels.half_step(x, x, x, 1, 1, 1, out)
    return bool((out == 3).all())
kernels.set_threads(3)
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        kernels.half_step(x, x, x, 1, 1, 1, np.empty_like(x))
busy = threading.Thread(target=keep_busy)
busy.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        fine = run() and kernels.threads() == 1
        kernels.set_threads(2)
        for _ in range(3):
            fine = fine and run()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set(); busy.join(); assert run(); print("fine", kernels.threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "fine 3\n", done.stderr
