// SPDX-License-Identifier: Apache-2.0
// The kernels' arithmetic, included once for each instruction set inside a namespace of its own (QGNN_ISA), so that no
// inline function compiled for AVX2 can be linked into the scalar twin. Every float operation is rounded by itself
// (-ffp-contract=off), sums of floats run in the order that is written here, and sums of codes are whole numbers:
// both builds give the same bits. No std:: templates: they would be shared between the two.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define QGNN_MEMBER inline __attribute__((always_inline))
#define QGNN_INLINE static QGNN_MEMBER

namespace qgnn {
namespace QGNN_ISA {

// Calls `work` with as many registers as there are, 1 to `most`, known when this is compiled.
template <int most, class Work>
QGNN_INLINE void with_parts(i64 parts, const Work& work) {
  if constexpr (most > 1)
    if (parts < most) return with_parts<most - 1>(parts, work);
  work.template operator()<most>();
}

// Eight numbers side by side: one register with AVX2, two of the scalar twin's.
typedef float F8 __attribute__((vector_size(32)));
typedef std::int32_t I8 __attribute__((vector_size(32)));
typedef std::uint16_t U16x8 __attribute__((vector_size(16)));

// What each instruction set does its own way with less than eight numbers, n from 1 to 7: they touch no other place in
// memory. Rows of few classes have nothing else.
QGNN_INLINE F8 load_some(const float* p, i64 n, float rest);
QGNN_INLINE void store_some(F8 v, float* p, i64 n);
QGNN_INLINE F8 keep_some(F8 v, i64 n);

// n of eight numbers, `rest` in the others' places.
QGNN_INLINE F8 load8(const float* p, i64 n, float rest = 0.0f) {
  if (n != 8) return load_some(p, n, rest);
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

QGNN_INLINE void store8(F8 v, float* p, i64 n) {
  if (n == 8) std::memcpy(p, &v, sizeof v);
  else store_some(v, p, n);
}

// The first n of eight numbers, zeros in the others' places.
QGNN_INLINE F8 first_of(F8 v, i64 n) { return n == 8 ? v : keep_some(v, n); }

QGNN_INLINE float clamp(float x, float low, float high) {
  // Written so that NaN becomes `low`, which every later conversion can hold.
  x = x > low ? x : low;
  return x < high ? x : high;
}

QGNN_INLINE float floor_small(float x) {  // |x| < 2^31
  const float t = static_cast<float>(static_cast<std::int32_t>(x));
  return t - (t > x ? 1.0f : 0.0f);
}

QGNN_INLINE float round_small(float x) {  // half to even, |x| < 2^22
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

// Sums of a row in double: column c is added in lane c mod 8, and the lanes by halves at the end, so that additions need
// not wait for each other.
constexpr int kSumParts = 2;
typedef double SumDoubles __attribute__((vector_size(32)));
struct EightSums {
  SumDoubles part[kSumParts] = {};

  QGNN_MEMBER double total() const {
    const SumDoubles four = part[0] + part[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

QGNN_INLINE EightSums wide(F8 v) {
  return {{SumDoubles{v[0], v[1], v[2], v[3]}, SumDoubles{v[4], v[5], v[6], v[7]}}};
}

// Calls work(first, count) for n columns, 8 at a time.
template <typename Work>
QGNN_INLINE void each_eight(i64 n, Work work) {
  const i64 whole = n / 8 * 8;
  for (i64 j = 0; j < whole; j += 8) work(j, 8);
  if (whole < n) work(whole, n - whole);
}

// [Σe², Σ|e|, max|e|] of a row; eight at a time, zeros past the end.
struct Moments {
  EightSums squares, sums;
  F8 most{};

  QGNN_MEMBER void add(F8 e) {
    const F8 size = (F8)((I8)e & 0x7FFFFFFF);
    const EightSums x = wide(size);
    for (int k = 0; k < kSumParts; ++k) {
      squares.part[k] = squares.part[k] + x.part[k] * x.part[k];
      sums.part[k] = sums.part[k] + x.part[k];
    }
    most = size > most ? size : most;
  }
  template <typename Value>
  QGNN_MEMBER void add(i64 n, Value value) {
    each_eight(n, [&](i64 c, i64 count) __attribute__((always_inline)) {
      float e[8] = {};
      for (i64 k = 0; k < count; ++k) e[k] = value(c + k);
      add(load8(e, 8));
    });
  }

  QGNN_MEMBER void store(double* m) const {
    m[0] = squares.total();
    m[1] = sums.total();
    float t[8];
    std::memcpy(t, &most, sizeof t);
    for (int half = 4; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) t[k] = t[k + half] > t[k] ? t[k + half] : t[k];
    m[2] = t[0];
  }
};

// Σ x·y of a row.
struct Product {
  EightSums sums;

  QGNN_MEMBER void add(F8 x, F8 y) {
    const EightSums a = wide(x), b = wide(y);
    for (int k = 0; k < kSumParts; ++k) sums.part[k] = sums.part[k] + a.part[k] * b.part[k];
  }
  QGNN_MEMBER double total() const { return sums.total(); }
};

static void pack(const std::uint8_t* codes, i64 C, int bits, std::uint8_t* out, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits);
  for (i64 row = begin; row < end; ++row) {
    const std::uint8_t* in = codes + row * C;
    std::uint8_t* packed = out + row * B;
    std::memset(packed, 0, B);
    for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
      const i64 n = C - first < B ? C - first : B;
      for (i64 i = 0; i < n; ++i) packed[i] |= static_cast<std::uint8_t>(in[first + i] << shift);
    }
  }
}

static void unpack(const std::uint8_t* payload, i64 C, int bits, std::uint8_t* out, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits);
  const std::uint8_t mask = static_cast<std::uint8_t>((1 << bits) - 1);
  for (i64 row = begin; row < end; ++row) {
    const std::uint8_t* packed = payload + row * B;
    std::uint8_t* codes = out + row * C;
    for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
      const i64 n = C - first < B ? C - first : B;
      for (i64 i = 0; i < n; ++i) codes[first + i] = static_cast<std::uint8_t>(packed[i] >> shift) & mask;
    }
  }
}

// Rows of B bytes. Narrow ones are copied 32 bytes at a time, of which the next row takes back what is too much; the last
// row of a call, whose next one may be another thread's, and rows near the buffer's end are copied as they are.
static void gather_rows(const std::uint8_t* payload, i64 M, const std::int32_t* rows, i64 B, std::uint8_t* out, i64 begin,
                        i64 end) {
  constexpr i64 kWhole = 32;
  const i64 wide_end = B > 0 && B <= kWhole ? end - (kWhole - 1) / B : begin, last = M * B - kWhole;
  for (i64 i = begin; i < end; ++i) {
    const i64 at = rows[i] * B;
    if (i < wide_end && at <= last) std::memcpy(out + i * B, payload + at, kWhole);
    else std::memcpy(out + i * B, payload + at, B);
  }
}

// Sums of the codes of the neighbours begin..end, one field after the other.
template <class Sum>
static void sum_planes(const std::int32_t* indices, const std::uint8_t* payload, i64 C, int bits, i64 begin, i64 end,
                       Sum* sum) {
  const i64 B = row_bytes(C, bits);
  const std::int32_t mask = (1 << bits) - 1;
  std::memset(sum, 0, C * sizeof(Sum));
  for (i64 e = begin; e < end; ++e) {
    const std::uint8_t* packed = payload + indices[e] * B;
    for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
      const i64 n = C - first < B ? C - first : B;
      for (i64 i = 0; i < n; ++i) sum[first + i] = static_cast<Sum>(sum[first + i] + ((packed[i] >> shift) & mask));
    }
  }
}

// Whether x / step and x * (1 / step) are the same for every x: a division costs several products.
QGNN_INLINE bool is_power_of_two(float step) {
  std::uint32_t word;
  std::memcpy(&word, &step, sizeof word);
  const std::uint32_t exponent = word >> 23 & 255;
  return (word & 0x807FFFFFu) == 0 && exponent > 1 && exponent < 253;
}

// Levels of n neighbouring columns, from 0 to 2^b - 1. `restrict`: bytes may alias anything, and the loops would not be
// vectorised. `by` is the step, or its inverse where `exact`.
template <bool exact>
QGNN_INLINE void levels(const float* __restrict x, float scale, const float by, const float half, i64 n,
                        std::int32_t* __restrict out) {
  for (i64 i = 0; i < n; ++i) {
    const float e = scale * x[i];
    out[i] = static_cast<std::int32_t>(floor_small(clamp(exact ? e * by : e / by, -half, half - 1.0f)) + half);
  }
}

template <bool exact>
QGNN_INLINE void levels_of_news(const float* __restrict x, float* __restrict known, float scale, const float step,
                                const float by, const float half, i64 n, std::int32_t* __restrict out) {
  for (i64 i = 0; i < n; ++i) {
    const float e = scale * x[i] - known[i];
    const float level = floor_small(clamp(exact ? e * by : e / by, -half, half - 1.0f));
    known[i] += (level + 0.5f) * step;
    out[i] = static_cast<std::int32_t>(level + half);
  }
}

// Planes of n levels each, one after the other, to n bytes.
template <int bits>
QGNN_INLINE void pack_levels(const std::int32_t* __restrict in, i64 n, std::uint8_t* __restrict out) {
  for (i64 i = 0; i < n; ++i) {
    std::int32_t byte = in[i];
    for (int k = 1; k < 8 / bits; ++k) byte |= in[k * n + i] << (k * bits);
    out[i] = static_cast<std::uint8_t>(byte);
  }
}

// One row, half = 2^(b-1). Levels of up to 1024 columns are held back, so that the float work runs along the row and packing along bytes.
template <int bits, bool exact>
QGNN_INLINE void code_tiles(const float* in, float scale, float* known, float step, float half, i64 C,
                            std::uint8_t* packed) {
  constexpr i64 planes = 8 / bits, tile = 1024 / planes;
  const i64 B = row_bytes(C, bits);
  std::int32_t held[1024];
  const float by = exact ? 1.0f / step : step;
  for (i64 first = 0; first < B; first += tile) {
    const i64 bytes = B - first < tile ? B - first : tile;
    // A row of one tile has no gap between its planes.
    const i64 runs = bytes == B ? 1 : planes, run = bytes == B ? planes * B : bytes;
    for (i64 k = 0; k < runs; ++k) {
      const i64 column = k * B + first, there = C - column;
      const i64 n = there < 0 ? 0 : there < run ? there : run;
      if (known == nullptr) levels<exact>(in + column, scale, by, half, n, held + k * run);
      else levels_of_news<exact>(in + column, known + column, scale, step, by, half, n, held + k * run);
      std::memset(held + k * run + n, 0, (run - n) * sizeof(std::int32_t));
    }
    pack_levels<bits>(held, bytes, packed + first);
  }
}

template <bool exact>
QGNN_INLINE void code_news_by(const float* in, float scale, float* known, float step, int bits, i64 C,
                              std::uint8_t* packed) {
  const float half = static_cast<float>(1 << (bits - 1));
  switch (bits) {
    case 1: return code_tiles<1, exact>(in, scale, known, step, half, C, packed);
    case 2: return code_tiles<2, exact>(in, scale, known, step, half, C, packed);
    case 4: return code_tiles<4, exact>(in, scale, known, step, half, C, packed);
    default: return code_tiles<8, exact>(in, scale, known, step, half, C, packed);
  }
}

QGNN_INLINE void code_news_row(const float* in, float scale, float* known, float step, int bits, i64 C,
                               std::uint8_t* packed) {
  if (is_power_of_two(step)) code_news_by<true>(in, scale, known, step, bits, C, packed);
  else code_news_by<false>(in, scale, known, step, bits, C, packed);
}

QGNN_INLINE void news_moments(const float* in, float scale, const float* known, i64 C, double* moments) {
  Moments m;
  each_eight(C, [&](i64 j, i64 n) __attribute__((always_inline)) {
    const F8 y = scale * load8(in + j, n);
    m.add(known == nullptr ? y : y - load8(known + j, n));
  });
  m.store(moments);
}

static void code_news(const float* h, const float* d, float* believed, float step, int bits, i64 C,
                      std::uint8_t* payload, double* moments, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits);
  for (i64 row = begin; row < end; ++row) {
    const float* in = h + row * C;
    float* known = believed == nullptr ? nullptr : believed + row * C;
    if (moments != nullptr) news_moments(in, d[row], known, C, moments + row * 3);
    code_news_row(in, d[row], known, step, bits, C, payload + row * B);
  }
}

static void row_moments(const float* x, i64 C, double* moments, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    Moments m;
    each_eight(C, [&](i64 j, i64 n) __attribute__((always_inline)) { m.add(load8(x + row * C + j, n)); });
    m.store(moments + row * 3);
  }
}

// What a sum of codes adds to R; `Whole` holds twice the sum.
template <class Whole>
QGNN_INLINE float delivered(float r, std::int32_t sum, Whole offset, float half_step, bool keep) {
  const float news = static_cast<float>(2 * static_cast<Whole>(sum) - offset) * half_step;
  return keep ? r + news : news;
}

static void add_news(const std::int32_t* sums, const std::int32_t* degree, float step, int bits, bool keep, i64 C,
                     float* r, i64 begin, i64 end) {
  const float half_step = step * 0.5f;
  for (i64 row = begin; row < end; ++row) {
    const i64 offset = static_cast<i64>((1 << bits) - 1) * degree[row];
    const std::int32_t* in = sums + row * C;
    float* out = r + row * C;
    for (i64 c = 0; c < C; ++c) out[c] = delivered<i64>(out[c], in[c], offset, half_step, keep);
  }
}

static void scale_rows(const float* h, const float* d, i64 C, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    for (i64 c = 0; c < C; ++c) out[row * C + c] = d[row] * h[row * C + c];
}

static void propagated(const float* r, const float* h, const float* d, i64 C, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    const float one = d[row], two = one * one;
    for (i64 i = row * C; i < (row + 1) * C; ++i) out[i] = one * r[i] + two * h[i];
  }
}

static void half_step(const float* h, const float* p, const float* h0, float a, float b, float c, i64 C, float* out,
                      i64 begin, i64 end) {
  for (i64 i = begin * C; i < end * C; ++i) out[i] = (a * h[i] + b * p[i]) + c * h0[i];
}

static void apply_multiplier(const float* h, const float* half, const float* p, const float* p_next, float coefficient,
                             i64 C, float* out, double* dots, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    if (dots != nullptr) {  // before `out` is written: it may be `h`
      const i64 at = row * C;
      Product product;
      each_eight(C, [&](i64 j, i64 n) __attribute__((always_inline)) {
        const F8 moved = load8(half + at + j, n) - load8(h + at + j, n);
        product.add(moved, moved - (load8(p_next + at + j, n) - load8(p + at + j, n)));
      });
      dots[row] = product.total();
    }
    for (i64 i = row * C; i < (row + 1) * C; ++i) {
      const float delta = half[i] - h[i];
      out[i] = half[i] + coefficient * (delta - (p_next[i] - p[i]));
    }
  }
}

static void midrise(const float* x, float step, int bits, i64 C, float* out, i64 begin, i64 end) {
  const float half = static_cast<float>(1 << (bits - 1));
  for (i64 i = begin * C; i < end * C; ++i)
    out[i] = (floor_small(clamp(x[i] / step, -half, half - 1.0f)) + 0.5f) * step;
}

// Affine grids: code = clip(floor((x - low)·scale + bias)), value = low + code·step. `d` and `believed` may be null.
QGNN_INLINE void affine_row(const float* __restrict x, float d, float* __restrict known, const float low,
                            const float step, const float scale, const float bias, const float top, i64 n,
                            std::uint8_t* __restrict codes) {
  for (i64 i = 0; i < n; ++i) {
    const float news = d * x[i] - (known == nullptr ? 0.0f : known[i]);
    const float code = floor_small(clamp((news - low) * scale + bias, 0.0f, top));
    if (known != nullptr) known[i] += low + code * step;
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
  }
}

static void affine_codes(const float* x, const float* d, float* believed, float low, float step, float scale,
                         float bias, int bits, i64 C, std::uint8_t* codes, i64 begin, i64 end) {
  const float top = static_cast<float>((1 << bits) - 1);
  for (i64 row = begin; row < end; ++row) {
    const float by = d == nullptr ? 1.0f : d[row];
    if (believed == nullptr)
      affine_row(x + row * C, by, nullptr, low, step, scale, bias, top, C, codes + row * C);
    else
      affine_row(x + row * C, by, believed + row * C, low, step, scale, bias, top, C, codes + row * C);
  }
}

static void affine_values(const std::uint8_t* codes, float low, float step, i64 C, float* out, i64 begin, i64 end) {
  for (i64 i = begin * C; i < end * C; ++i) out[i] = low + static_cast<float>(codes[i]) * step;
}

static void add_affine(const std::int32_t* sums, const std::int32_t* degree, float low, float step, bool keep, i64 C,
                       float* r, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    const float base = low * static_cast<float>(degree[row]);
    for (i64 i = row * C; i < (row + 1) * C; ++i) {
      const float news = base + step * static_cast<float>(sums[i]);
      r[i] = keep ? r[i] + news : news;
    }
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn

#include "scales.h"
#include "perceptron_body.h"
#include "float_layer_body.h"
#include "random_body.h"
#include "training_body.h"

#define QGNN_TABLE(NAME, ISA)                                                                                         \
  const Kernels NAME = {ISA, pack, unpack, gather_rows, aggregate_codes, sum_edges, aggregate_scaled, aggregate_float, code_news, \
                        add_news, layer,                                                                              \
                        fixed_start, layer_float, layer_scaled, code_gradients, scale_rows, propagated, half_step, apply_multiplier, midrise,       \
                        affine_codes, affine_values, add_affine, row_moments, softmax, normalise_dense, normalise_csr,\
                        feature_codes_dense, feature_codes_csr, matmul_codes_dense, matmul_codes_csr,                 \
                        matmul_float_dense, matmul_float_csr, hidden_codes, perceptron, scores_from_codes,            \
                        philox_one, keyed_bits, dropout_dense, keep_csr, thin_codes, thin_values, matmul_thin,        \
                        add_transposed, add_transposed_csr, activate, recall, matmul_thinned}
