# SPDX-License-Identifier: Apache-2.0
"""Integer and float kernels over NumPy arrays: compiled C++ (AVX2 or scalar, chosen at run time), or NumPy.

`isa()` says which; QGNN_SIMD=scalar|avx2 overrides. Signatures, shapes and formulas stand in ops.py, gradients.py and
perceptron.py.
"""
from __future__ import annotations

from .dispatch import isa, set_threads, threads, using_isa
from .gradients import aggregate_scaled, code_gradients, layer_scaled
from .ops import (
    LAYER_COLUMNS,
    add_affine,
    add_news,
    affine_codes,
    affine_values,
    aggregate_codes,
    aggregate_float,
    apply_multiplier,
    check_csr,
    code_news,
    fixed_layer,
    fixed_start,
    gather_rows,
    half_step,
    layer,
    layer_float,
    level_histogram,
    midrise,
    pack,
    propagated,
    row_moments,
    scale_rows,
    unpack,
)
from .partition import LOADS, contract, join_clusters, place_nodes
from .perceptron import (
    activate,
    add_transposed,
    add_transposed_csr,
    dropout_dense,
    feature_codes_csr,
    feature_codes_dense,
    hidden_codes,
    keyed_bits,
    lookup_tables,
    matmul_codes_csr,
    matmul_codes_dense,
    matmul_float_csr,
    matmul_float_dense,
    matmul_thin,
    matmul_thinned,
    normalise_csr,
    normalise_dense,
    perceptron_csr,
    perceptron_dense,
    recall,
    scores_from_codes,
    softmax,
    thin_codes,
    thin_csr,
    thin_values,
)

__all__ = [
    "LAYER_COLUMNS", "LOADS", "activate", "add_affine", "add_news", "add_transposed", "add_transposed_csr",
    "affine_codes", "affine_values", "aggregate_codes", "aggregate_float", "aggregate_scaled", "apply_multiplier",
    "check_csr", "code_gradients", "code_news", "contract", "dropout_dense", "feature_codes_csr",
    "feature_codes_dense", "fixed_layer", "fixed_start", "gather_rows", "half_step", "hidden_codes", "isa",
    "join_clusters", "keyed_bits", "layer", "layer_float", "layer_scaled", "level_histogram", "lookup_tables",
    "matmul_codes_csr", "matmul_codes_dense", "matmul_float_csr", "matmul_float_dense", "matmul_thin",
    "matmul_thinned", "midrise", "normalise_csr", "normalise_dense", "pack", "perceptron_csr", "perceptron_dense",
    "place_nodes", "propagated", "recall", "row_moments", "scale_rows", "scores_from_codes", "set_threads",
    "softmax", "thin_codes", "thin_csr", "thin_values", "threads", "unpack", "using_isa",
]
