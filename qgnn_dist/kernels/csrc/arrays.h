// SPDX-License-Identifier: Apache-2.0
// NumPy arrays as the bindings take them: shapes are checked by qgnn_dist/kernels/dispatch.py, which names function and
// argument; types and layout are checked here again, and nothing is converted silently.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "kernels.h"
#include "pool.h"

namespace qgnn {

namespace nb = nanobind;
using namespace nb::literals;

template <typename T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
using In8 = Array<const std::uint8_t, 2>;
using Out8 = Array<std::uint8_t, 2>;
using InF = Array<const float, 2>;
using OutF = Array<float, 2>;
using InF1 = Array<const float, 1>;
using OutF1 = Array<float, 1>;
using In64 = Array<const i64, 1>;
using Out64 = Array<i64, 1>;
using In32 = Array<const std::int32_t, 1>;
using In32x2 = Array<const std::int32_t, 2>;
using Out32 = Array<std::int32_t, 2>;
using Out32x1 = Array<std::int32_t, 1>;
using In16 = Array<const std::int16_t, 2>;
using Out16 = Array<std::int16_t, 2>;
using In16x1 = Array<const std::int16_t, 1>;
using Out16x1 = Array<std::int16_t, 1>;
using InW = Array<const std::int8_t, 2>;
using OutD = Array<double, 2>;
using OutD1 = Array<double, 1>;

inline i64 rows(const auto& a) { return static_cast<i64>(a.shape(0)); }
inline i64 columns(const auto& a) { return static_cast<i64>(a.shape(1)); }
template <typename A>
auto* data_or_null(std::optional<A>& a) { return a ? a->data() : nullptr; }

// Rows a chunk: enough work to pay for handing it out, few enough to even out long rows.
inline i64 grain(i64 work_per_row) { return std::clamp<i64>(65536 / std::max<i64>(work_per_row, 1), 16, 8192); }

}  // namespace qgnn

// The calls below hold no Python object but their arguments, so other Python threads may run meanwhile.
#define RUN(BEGIN, END, WORK, BODY)                                     \
  {                                                                     \
    const Kernels& k = active();                                        \
    nb::gil_scoped_release free_threads;                                \
    parallel(BEGIN, END, grain(WORK), [&](i64 b, i64 e) { BODY; });     \
  }
