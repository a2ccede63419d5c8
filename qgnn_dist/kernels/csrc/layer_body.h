// SPDX-License-Identifier: Apache-2.0
// A whole round in one pass over the rows: the neighbours' codes are added up, R, P and H follow, and what is new about H
// is coded for the next round. Each operation is rounded as in the kernels that do one of these things each, so that
// both ways give the same bits. Included after `sum_codes_row`, which every instruction set has of its own.

namespace qgnn {
namespace QGNN_ISA {

constexpr std::int32_t kExactDegree = 4000000;

// Columns of one row through R, P and the layer's step.
template <bool sent>
QGNN_INLINE void advance(const std::int32_t* __restrict sums, const std::int32_t offset, const float half_step,
                         const float one, const Layer& s, float* __restrict r, float* __restrict h,
                         const float* __restrict h0, i64 n) {
  const float two = one * one;
  for (i64 i = 0; i < n; ++i) {
    if (sent) r[i] = delivered<std::int32_t>(r[i], sums[i], offset, half_step, s.keep);
    const float p = one * r[i] + two * h[i];
    h[i] = (s.a * h[i] + s.b * p) + s.c * h0[i];
  }
}

// The same with the multiplier's term: `p` holds P of the round before, and then this one's.
template <bool sent>
QGNN_INLINE void advance_constrained(const std::int32_t* __restrict sums, const std::int32_t offset,
                                     const float half_step, const float one, const Layer& s,
                                     float* __restrict r, float* __restrict h, const float* __restrict h0,
                                     float* __restrict before, i64 n) {
  const float two = one * one;
  for (i64 i = 0; i < n; ++i) {
    if (sent) r[i] = delivered<std::int32_t>(r[i], sums[i], offset, half_step, s.keep);
    const float p = one * r[i] + two * h[i];
    const float half = (s.a * h[i] + s.b * p) + s.c * h0[i];
    const float held = s.first ? p : before[i];
    const float moved = half + s.coefficient * ((half - h[i]) - (p - held));
    h[i] = s.coefficient != 0.0f ? moved : half;
    before[i] = p;
  }
}

static void layer(const Layer& a, i64 begin, i64 end) {
  const i64 C = a.C, B = row_bytes(C, a.bits), last_edge = a.indptr[end];
  const float half_step = a.step * 0.5f;
  alignas(32) std::int32_t sums[kLayerColumns + kSlack];
  for (i64 row = begin; row < end; ++row) {
    const i64 at = row * C;
    const float one = a.d[row];
    float* p = a.p == nullptr ? nullptr : a.p + at;
    const bool far = a.degree[row] > kExactDegree;  // twice its sums would not fit 32 bits
    if (a.step != 0.0f) sum_codes_row(a.indptr, a.indices, a.payload, a.M, C, a.bits, row, last_edge, sums);
    if (a.step != 0.0f && far) {
      const i64 offset = static_cast<i64>((1 << a.bits) - 1) * a.degree[row];
      for (i64 i = 0; i < C; ++i) a.r[at + i] = delivered<i64>(a.r[at + i], sums[i], offset, half_step, a.keep);
    }
    if (a.step != 0.0f && !far) {
      const std::int32_t offset = ((1 << a.bits) - 1) * a.degree[row];
      if (p == nullptr) advance<true>(sums, offset, half_step, one, a, a.r + at, a.h + at, a.h0 + at, C);
      else advance_constrained<true>(sums, offset, half_step, one, a, a.r + at, a.h + at, a.h0 + at, p, C);
    } else {
      if (p == nullptr) advance<false>(sums, 0, 0.0f, one, a, a.r + at, a.h + at, a.h0 + at, C);
      else advance_constrained<false>(sums, 0, 0.0f, one, a, a.r + at, a.h + at, a.h0 + at, p, C);
    }
    if (a.next_step == 0.0f) continue;
    float* known = a.believed == nullptr ? nullptr : a.believed + at;
    if (a.moments != nullptr) news_moments(a.h + at, one, known, C, a.moments + row * 3);
    code_news_row(a.h + at, one, known, a.next_step, a.bits, C, a.next + row * B);
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
