// SPDX-License-Identifier: Apache-2.0
// The kernels' arithmetic, included once for each instruction set inside a namespace of its own (QGNN_ISA), so that no
// inline function compiled for AVX2 can be linked into the scalar twin. Every float operation is rounded by itself
// (-ffp-contract=off), sums of floats run in the order that is written here, and sums of codes are whole numbers:
// both builds give the same bits. No std:: templates: they would be shared between the two.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define QGNN_INLINE static inline __attribute__((always_inline))

namespace qgnn {
namespace QGNN_ISA {

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

QGNN_INLINE float absolute(float x) { return x < 0.0f ? -x : x; }

QGNN_INLINE void add_moments(const float e, double* m) {
  const double v = static_cast<double>(absolute(e));
  m[0] += v * v;
  m[1] += v;
  m[2] = v > m[2] ? v : m[2];
}

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

static void aggregate_float(const i64* indptr, const std::int32_t* indices, const float* x, i64 C, float* out,
                            i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    float* sum = out + row * C;
    std::memset(sum, 0, C * sizeof(float));
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      __builtin_prefetch(x + indices[e + 8 < indptr[end] ? e + 8 : e] * C);
      const float* in = x + indices[e] * C;
      for (i64 c = 0; c < C; ++c) sum[c] += in[c];
    }
  }
}

// Coded levels of one plane of a row. `restrict`: bytes may alias anything, and the loop would not be vectorised.
QGNN_INLINE void code_plane(const float* __restrict x, float scale, const float step, const float half, i64 n,
                            i64 shift, std::uint8_t* __restrict packed) {
  for (i64 i = 0; i < n; ++i) {
    const float level = floor_small(clamp((scale * x[i]) / step, -half, half - 1.0f));
    packed[i] |= static_cast<std::uint8_t>(static_cast<std::int32_t>(level + half) << shift);
  }
}

QGNN_INLINE void code_plane_news(const float* __restrict x, float* __restrict known, float scale, const float step,
                                 const float half, i64 n, i64 shift, std::uint8_t* __restrict packed) {
  for (i64 i = 0; i < n; ++i) {
    const float level = floor_small(clamp((scale * x[i] - known[i]) / step, -half, half - 1.0f));
    known[i] += (level + 0.5f) * step;
    packed[i] |= static_cast<std::uint8_t>(static_cast<std::int32_t>(level + half) << shift);
  }
}

static void code_news(const float* h, const float* d, float* believed, float step, int bits, i64 C,
                      std::uint8_t* payload, double* moments, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits);
  const float half = static_cast<float>(1 << (bits - 1));
  for (i64 row = begin; row < end; ++row) {
    const float* in = h + row * C;
    float* known = believed == nullptr ? nullptr : believed + row * C;
    std::uint8_t* packed = payload + row * B;
    const float scale = d[row];
    if (moments != nullptr) {
      double m[3] = {0.0, 0.0, 0.0};
      for (i64 c = 0; c < C; ++c) add_moments(scale * in[c] - (known == nullptr ? 0.0f : known[c]), m);
      std::memcpy(moments + row * 3, m, sizeof m);
    }
    std::memset(packed, 0, B);
    for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
      const i64 n = C - first < B ? C - first : B;
      if (known == nullptr) code_plane(in + first, scale, step, half, n, shift, packed);
      else code_plane_news(in + first, known + first, scale, step, half, n, shift, packed);
    }
  }
}

static void row_moments(const float* x, i64 C, double* moments, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    double m[3] = {0.0, 0.0, 0.0};
    for (i64 c = 0; c < C; ++c) add_moments(x[row * C + c], m);
    std::memcpy(moments + row * 3, m, sizeof m);
  }
}

static void add_news(const std::int32_t* sums, const std::int32_t* degree, float step, int bits, bool keep, i64 C,
                     float* r, i64 begin, i64 end) {
  const float half_step = step * 0.5f;
  for (i64 row = begin; row < end; ++row) {
    const i64 offset = static_cast<i64>((1 << bits) - 1) * degree[row];
    const std::int32_t* in = sums + row * C;
    float* out = r + row * C;
    for (i64 c = 0; c < C; ++c) {
      const float news = static_cast<float>(2 * static_cast<i64>(in[c]) - offset) * half_step;
      out[c] = keep ? out[c] + news : news;
    }
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
    double dot = 0.0;
    if (dots != nullptr) {  // before `out` is written: it may be `h`
      for (i64 i = row * C; i < (row + 1) * C; ++i) {
        const float delta = half[i] - h[i];
        dot += static_cast<double>(delta) * static_cast<double>(delta - (p_next[i] - p[i]));
      }
      dots[row] = dot;
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

// e^x for x <= 0: x = n·ln2 + r, a polynomial in r, then the exponent n. Within 1e-15 of the true value, and the same
// bits on every host, which a mathematical library does not promise.
QGNN_INLINE double exp_negative(double x) {
  if (!(x > -700.0)) return 0.0;
  const double magic = 6755399441055744.0;  // 1.5 · 2^52: adding it rounds to a whole number
  const double n = (x * 1.4426950408889634 + magic) - magic;
  const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  double s = 1.0 / 6227020800.0;
  const double inverse[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                            1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                            0.5,               1.0,              1.0};
  for (double k : inverse) s = s * r + k;
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<i64>(n) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return s * scale;
}

static void softmax(const float* scores, i64 C, std::int32_t* classes, float* confidence, float* probabilities,
                    i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    const float* s = scores + row * C;
    i64 best = 0;
    bool odd = false;
    for (i64 c = 0; c < C; ++c) {
      odd |= s[c] != s[c];
      if (s[c] > s[best]) best = c;
    }
    double sum = 0.0;
    for (i64 c = 0; c < C; ++c) sum += exp_negative(static_cast<double>(s[c]) - static_cast<double>(s[best]));
    classes[row] = odd ? 0 : static_cast<std::int32_t>(best);
    confidence[row] = odd ? __builtin_nanf("") : static_cast<float>(1.0 / sum);
    if (probabilities == nullptr) continue;
    for (i64 c = 0; c < C; ++c) {
      const double p = exp_negative(static_cast<double>(s[c]) - static_cast<double>(s[best])) / sum;
      probabilities[row * C + c] = odd ? __builtin_nanf("") : static_cast<float>(p);
    }
  }
}

QGNN_INLINE double norm_of(const float* x, i64 n, int norm) {
  double sum = 0.0;
  if (norm == 1)
    for (i64 i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  else if (norm == 2)
    for (i64 i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  if (norm == 2) sum = __builtin_sqrt(sum);
  return norm == 0 || sum == 0.0 ? 1.0 : sum;
}

QGNN_INLINE void normalise_row(const float* x, i64 n, int norm, float* out) {
  const double by = norm_of(x, n, norm);
  for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) / by);
}

QGNN_INLINE void code_row(const float* x, i64 n, int norm, int bits, bool is_signed, std::int16_t* codes,
                          float* scale) {
  const double by = norm_of(x, n, norm);
  const int top = is_signed ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  const int low = is_signed ? -(1 << (bits - 1)) : 0;
  double figure = 0.0;
  for (i64 i = 0; i < n; ++i) {
    const double v = static_cast<double>(static_cast<float>(static_cast<double>(x[i]) / by));
    if (is_signed) figure += v * v;
    else figure = v > figure ? v : figure;
  }
  // Best steps of a signed mid-tread grid for a Gaussian, in units of its rms.
  const double share = bits == 2 ? 1.0 : bits == 4 ? 0.335 : 0.0308;
  float step = is_signed ? static_cast<float>(share * __builtin_sqrt(figure / static_cast<double>(n > 0 ? n : 1)))
                         : static_cast<float>(figure / static_cast<double>(top));
  if (step == 0.0f) step = 1.0f;
  *scale = step;
  for (i64 i = 0; i < n; ++i) {
    const float v = static_cast<float>(static_cast<double>(x[i]) / by) / step;
    codes[i] = static_cast<std::int16_t>(round_small(clamp(v, static_cast<float>(low), static_cast<float>(top))));
  }
}

static void normalise_dense(const float* x, i64 F, int norm, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) normalise_row(x + row * F, F, norm, out + row * F);
}

static void normalise_csr(const i64* indptr, const float* values, int norm, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    normalise_row(values + indptr[row], indptr[row + 1] - indptr[row], norm, out + indptr[row]);
}

static void feature_codes_dense(const float* x, i64 F, int norm, int bits, bool is_signed, std::int16_t* codes,
                                float* scale, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    code_row(x + row * F, F, norm, bits, is_signed, codes + row * F, scale + row);
}

static void feature_codes_csr(const i64* indptr, const float* values, int norm, int bits, bool is_signed,
                              std::int16_t* codes, float* scale, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    code_row(values + indptr[row], indptr[row + 1] - indptr[row], norm, bits, is_signed, codes + indptr[row],
             scale + row);
}

static void matmul_codes_csr(const i64* indptr, const std::int32_t* indices, const std::int16_t* codes,
                             const std::int8_t* weights, i64 H, std::int32_t* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    std::int32_t* sum = out + row * H;
    std::memset(sum, 0, H * sizeof(std::int32_t));
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      const std::int32_t x = codes[e];
      const std::int8_t* w = weights + indices[e] * H;
      for (i64 j = 0; j < H; ++j) sum[j] += x * static_cast<std::int32_t>(w[j]);
    }
  }
}

static void matmul_float_dense(const float* x, const float* weights, i64 F, i64 H, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    float* sum = out + row * H;
    std::memset(sum, 0, H * sizeof(float));
    for (i64 f = 0; f < F; ++f) {
      const float v = x[row * F + f];
      const float* w = weights + f * H;
      for (i64 j = 0; j < H; ++j) sum[j] += v * w[j];
    }
  }
}

static void matmul_float_csr(const i64* indptr, const std::int32_t* indices, const float* values, const float* weights,
                             i64 H, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    float* sum = out + row * H;
    std::memset(sum, 0, H * sizeof(float));
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      const float v = values[e];
      const float* w = weights + indices[e] * H;
      for (i64 j = 0; j < H; ++j) sum[j] += v * w[j];
    }
  }
}

static void hidden_codes(const std::int32_t* acc, const float* row_scale, float weight_step, const float* bias,
                         float hidden_step, int bits, i64 H, std::int16_t* codes, i64 begin, i64 end) {
  const float top = static_cast<float>((1 << bits) - 1);
  for (i64 row = begin; row < end; ++row) {
    const float scale = row_scale[row] * weight_step;
    for (i64 j = 0; j < H; ++j) {
      const float v = static_cast<float>(acc[row * H + j]) * scale + bias[j];
      codes[row * H + j] = static_cast<std::int16_t>(round_small(clamp(v / hidden_step, 0.0f, top)));
    }
  }
}

static void scores_from_codes(const std::int32_t* acc, float scale, const float* bias, i64 C, float* out, i64 begin,
                              i64 end) {
  for (i64 row = begin; row < end; ++row)
    for (i64 c = 0; c < C; ++c) out[row * C + c] = static_cast<float>(acc[row * C + c]) * scale + bias[c];
}

// Philox4x32-10 (Salmon et al., SC 2011): four numbers of 32 bits from a counter and a key.
QGNN_INLINE void philox(std::uint32_t c[4], std::uint32_t k0, std::uint32_t k1) {
  for (int i = 0; i < 10; ++i) {
    const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const std::uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c[1] = static_cast<std::uint32_t>(b);
    c[2] = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c[3] = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Counter: row (40 bits), column/4 (24 bits), epoch (32), layer (16), stage (8), round (8); the lane is column mod 4.
QGNN_INLINE void draw(const Key& key, i64 row, i64 group, std::uint32_t out[4]) {
  const std::uint64_t r = static_cast<std::uint64_t>(row);
  out[0] = static_cast<std::uint32_t>(r);
  out[1] = static_cast<std::uint32_t>(r >> 32) | static_cast<std::uint32_t>(group) << 8;
  out[2] = key.epoch;
  out[3] = key.layer | key.stage << 16 | key.round << 24;
  philox(out, static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32));
}

static void keyed_bits(Key key, const i64* rows, i64 columns, std::uint32_t* out, i64 begin, i64 end) {
  std::uint32_t lanes[4];
  for (i64 row = begin; row < end; ++row)
    for (i64 c = 0; c < columns; ++c) {
      if (c % 4 == 0) draw(key, rows[row], c / 4, lanes);
      out[row * columns + c] = lanes[c % 4];
    }
}

static void dropout_dense(Key key, const i64* rows, i64 columns, std::uint64_t threshold, float kept, float* out,
                          i64 begin, i64 end) {
  std::uint32_t lanes[4];
  for (i64 row = begin; row < end; ++row)
    for (i64 c = 0; c < columns; ++c) {
      if (c % 4 == 0) draw(key, rows[row], c / 4, lanes);
      out[row * columns + c] = lanes[c % 4] >= threshold ? kept : 0.0f;
    }
}

static void dropout_csr(Key key, const i64* rows, const i64* indptr, const std::int32_t* indices,
                        std::uint64_t threshold, float kept, float* out, i64 begin, i64 end) {
  std::uint32_t lanes[4];
  for (i64 row = begin; row < end; ++row) {
    i64 last = -1;
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      const i64 group = indices[e] / 4;
      if (group != last) draw(key, rows[row], last = group, lanes);
      out[e] = lanes[indices[e] % 4] >= threshold ? kept : 0.0f;
    }
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn

#define QGNN_TABLE(NAME, ISA)                                                                                         \
  const Kernels NAME = {ISA, pack, unpack, aggregate_codes, aggregate_float, code_news, add_news, scale_rows,         \
                        propagated, half_step, apply_multiplier, midrise, row_moments, softmax, normalise_dense,      \
                        normalise_csr,                                                                                \
                        feature_codes_dense, feature_codes_csr, matmul_codes_dense, matmul_codes_csr,                 \
                        matmul_float_dense, matmul_float_csr, hidden_codes, scores_from_codes, keyed_bits,            \
                        dropout_dense, dropout_csr}
