// SPDX-License-Identifier: Apache-2.0
// Float messages: sums over the neighbours in registers, and a whole round in one pass over the rows. Each operation is
// rounded as in the kernels that do one of these things each. Included by kernels_body.h, once for each instruction set.

namespace qgnn {
namespace QGNN_ISA {

constexpr i64 kFloatAhead = 12;  // neighbours: far enough to hide a cache miss

// `parts` registers of columns of the neighbours begin..end; the last one starts at column `last`, where it may overlap
// the one before. `x` points at the first column of the first row.
template <int parts>
QGNN_INLINE void sum_parts(const std::int32_t* indices, i64 begin, i64 end, i64 last_edge, const float* x, i64 C,
                           i64 last, float* sum) {
  Lanes acc[parts] = {};
  for (i64 e = begin; e < end; ++e) {
    const float* later = x + static_cast<i64>(indices[e + kFloatAhead < last_edge ? e + kFloatAhead : e]) * C;
    for (i64 i = 0; i < parts * kLanes; i += 16) __builtin_prefetch(later + i);
    __builtin_prefetch(later + last + kLanes - 1);
    const float* in = x + static_cast<i64>(indices[e]) * C;
    for (int k = 0; k + 1 < parts; ++k) acc[k] = acc[k] + load_lanes(in + k * kLanes);
    acc[parts - 1] = acc[parts - 1] + load_lanes(in + last);
  }
  for (int k = 0; k + 1 < parts; ++k) store_lanes(sum + k * kLanes, acc[k]);
  store_lanes(sum + last, acc[parts - 1]);
}

// The same of n columns, less than a register has.
template <int n>
QGNN_INLINE void sum_few(const std::int32_t* indices, i64 begin, i64 end, i64 last_edge, const float* x, i64 C,
                         float* sum) {
  F8 acc{};
  for (i64 e = begin; e < end; ++e) {
    __builtin_prefetch(x + static_cast<i64>(indices[e + kFloatAhead < last_edge ? e + kFloatAhead : e]) * C);
    acc = acc + load8(x + static_cast<i64>(indices[e]) * C, n);
  }
  store8(acc, sum, n);
}

// Columns first..first+n of a row's sum, n at most kTile, in the order of the row.
QGNN_INLINE void sum_float_row(const i64* indptr, const std::int32_t* indices, const float* x, i64 C, i64 row,
                               i64 last_edge, i64 first, i64 n, float* sum) {
  const i64 begin = indptr[row], end = indptr[row + 1];
  if (n < kLanes) {
    with_parts<kLanes - 1>(n, [=]<int few>() __attribute__((always_inline)) {
      sum_few<few>(indices, begin, end, last_edge, x + first, C, sum);
    });
    return;
  }
  with_parts<kMostParts>((n + kLanes - 1) / kLanes, [=]<int parts>() __attribute__((always_inline)) {
    sum_parts<parts>(indices, begin, end, last_edge, x + first, C, n - kLanes, sum);
  });
}

static void aggregate_float(const i64* indptr, const std::int32_t* indices, const float* x, i64 C, float* out,
                            i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    for (i64 first = 0; first < C; first += kTile)
      sum_float_row(indptr, indices, x, C, row, indptr[end], first, C - first < kTile ? C - first : kTile,
                    out + row * C + first);
}

// Columns of a row from the sums of its neighbours. `held`: where P of the round before is, which this one's takes the
// place of, or null where no multiplier acts. `dot` takes its share where it is not null. `corrected`: the multiplier's
// term is added; `second`: this is the other round of a layer.
template <bool corrected, bool second>
QGNN_INLINE void advance_columns(const FloatLayer& s, i64 row, i64 first, i64 n, const float* sums, Product* dot) {
  const float one = s.d[row], two = one * one, of_h = s.a, of_p = s.b, of_h0 = s.c, coefficient = s.coefficient;
  const i64 at = row * s.C + first;
  const float *h = s.h + at, *h0 = s.h0 + at, *before = s.before == nullptr ? nullptr : s.before + at;
  float *out = s.out + at, *held = s.p == nullptr ? nullptr : s.p + at;
  const bool keeps = !second && held != nullptr, first_layer = s.first;
  each_eight(n, [&](i64 j, i64 count) __attribute__((always_inline)) {
    const F8 x = load8(h + j, count), p = one * load8(sums + j, count) + two * x;
    F8 moved{}, gap{}, next;
    if (second || dot != nullptr) {
      moved = x - load8(before + j, count);
      gap = moved - (p - load8(held + j, count));
    }
    if (dot != nullptr) dot->add(moved, gap);
    if (second) {
      next = x + coefficient * gap;
    } else {
      next = (of_h * x + of_p * p) + of_h0 * load8(h0 + j, count);
      if (corrected) next = next + coefficient * ((next - x) - (p - (first_layer ? p : load8(held + j, count))));
      if (keeps) store8(p, held + j, count);
    }
    store8(next, out + j, count);  // `out` may be where `h` or `before` is
  });
}

// The same, of up to kTile columns, for what the round is.
QGNN_INLINE void advance_row(const FloatLayer& s, i64 row, i64 first, i64 n, const float* sums, Product* dot) {
  if (s.second) advance_columns<true, true>(s, row, first, n, sums, dot);
  else if (s.coefficient != 0.0f) advance_columns<true, false>(s, row, first, n, sums, dot);
  else advance_columns<false, false>(s, row, first, n, sums, dot);
}

static void layer_float(const FloatLayer& s, i64 begin, i64 end) {
  const i64 C = s.C, last_edge = s.indptr[end];
  alignas(32) float p[kTile];
  for (i64 row = begin; row < end; ++row) {
    Product dot;
    for (i64 first = 0; first < C; first += kTile) {
      const i64 n = C - first < kTile ? C - first : kTile, at = row * C + first;
      sum_float_row(s.indptr, s.indices, s.y, C, row, last_edge, first, n, p);
      advance_row(s, row, first, n, p, s.dots != nullptr && !s.first ? &dot : nullptr);
      if (s.next != nullptr)
        for (i64 i = 0; i < n; ++i) s.next[at + i] = s.d[row] * s.out[at + i];
    }
    if (s.dots != nullptr) s.dots[row] = dot.total();
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
