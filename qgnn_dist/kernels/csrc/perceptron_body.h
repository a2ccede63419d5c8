// SPDX-License-Identifier: Apache-2.0
// The perceptron: features to codes, products, the hidden grid, scores to classes.
// Included by kernels_body.h, once for each instruction set.

namespace qgnn {
namespace QGNN_ISA {

// e^x for x <= 0: x = n·ln2 + r, a polynomial in r, then the exponent n. Within a few units of the last place, 0 where
// the result would be denormal, and the same bits on every host, which a mathematical library does not promise.
QGNN_INLINE F8 exp_negative(const F8 exact) {
  const F8 least = F8{} - 87.0f, magic = F8{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds, in the lowest bits
  const F8 x = exact > least ? exact : least;
  const F8 shifted = x * 1.44269504f + magic, n = shifted - magic;
  const F8 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // n times the first, of few bits, is exact
  F8 s = F8{} + 1.0f / 5040.0f;
  const float inverse[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 8
  for (float k : inverse) s = s * r + k;
  const I8 exponent = ((I8)shifted - 0x4B400000 + 127) << 23;
  s = s * (F8)exponent;
  return exact > least ? s : F8{};
}

// Scores are taken eight at a time: eight sums of exponentials, of the columns that are equal modulo 8, then those.
static void softmax(const float* scores, i64 C, std::int32_t* classes, float* confidence, float* probabilities,
                    i64 begin, i64 end) {
  const float lowest = -__builtin_inff();
  for (i64 row = begin; row < end; ++row) {
    const float* s = scores + row * C;
    i64 best = 0;
    bool unknown = false;
    for (i64 c = 0; c < C; ++c) {
      unknown |= s[c] != s[c];
      if (s[c] > s[best]) best = c;
    }
    const float top = s[best];
    const bool odd = unknown || top - top != 0.0f;  // an infinite maximum has no probability
    classes[row] = unknown ? 0 : static_cast<std::int32_t>(best);
    confidence[row] = __builtin_nanf("");
    if (odd) {
      for (i64 c = 0; probabilities != nullptr && c < C; ++c) probabilities[row * C + c] = __builtin_nanf("");
      continue;
    }
    F8 lanes{};
    for (i64 c = 0; c < C; c += 8) lanes = lanes + exp_negative(load8(s + c, C - c < 8 ? C - c : 8, lowest) - top);
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i) sum += lanes[i];
    confidence[row] = 1.0f / sum;
    if (probabilities == nullptr) continue;
    for (i64 c = 0; c < C; c += 8) {
      const i64 n = C - c < 8 ? C - c : 8;
      store8(exp_negative(load8(s + c, n, lowest) - top) / sum, probabilities + row * C + c, n);
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

// Σv² or max v of a row, v its values after the norm.
QGNN_INLINE double figure_of(const float* x, i64 n, double by, bool is_signed) {
  double figure = 0.0;
  for (i64 i = 0; i < n; ++i) {
    const double v = static_cast<double>(static_cast<float>(static_cast<double>(x[i]) / by));
    if (is_signed) figure += v * v;
    else figure = v > figure ? v : figure;
  }
  return figure;
}

// Σx² of four rows side by side: one row's sum waits for each addition in turn.
QGNN_INLINE void four_square_sums(const float* x, i64 n, double* sums) {
  double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
  for (i64 i = 0; i < n; ++i) {
    const double v = x[i], w = x[n + i], y = x[2 * n + i], z = x[3 * n + i];
    a += v * v;
    b += w * w;
    c += y * y;
    d += z * z;
  }
  sums[0] = a;
  sums[1] = b;
  sums[2] = c;
  sums[3] = d;
}

// `by` is 1 where there is no norm, and dividing by it is left out.
QGNN_INLINE void code_values(const float* __restrict x, i64 n, double by, float low, float top, float step,
                             std::int16_t* __restrict codes) {
  if (by == 1.0) {
    for (i64 i = 0; i < n; ++i) codes[i] = static_cast<std::int16_t>(round_small(clamp(x[i] / step, low, top)));
    return;
  }
  for (i64 i = 0; i < n; ++i) {
    const float v = static_cast<float>(static_cast<double>(x[i]) / by) / step;
    codes[i] = static_cast<std::int16_t>(round_small(clamp(v, low, top)));
  }
}

QGNN_INLINE void code_row(const float* x, i64 n, double by, double figure, int bits, bool is_signed,
                          std::int16_t* codes, float* scale) {
  const int top = is_signed ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  const int low = is_signed ? -(1 << (bits - 1)) : 0;
  // Best steps of a signed mid-tread grid for a Gaussian, in units of its rms.
  const double share = bits == 2 ? 1.0 : bits == 4 ? 0.335 : 0.0308;
  float step = is_signed ? static_cast<float>(share * __builtin_sqrt(figure / static_cast<double>(n > 0 ? n : 1)))
                         : static_cast<float>(figure / static_cast<double>(top));
  if (step == 0.0f) step = 1.0f;
  *scale = step;
  code_values(x, n, by, static_cast<float>(low), static_cast<float>(top), step, codes);
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
  for (i64 row = begin; row < end;) {
    if (norm == 0 && is_signed && end - row >= 4) {
      double figures[4];
      four_square_sums(x + row * F, F, figures);
      for (i64 k = 0; k < 4; ++k, ++row)
        code_row(x + row * F, F, 1.0, figures[k], bits, is_signed, codes + row * F, scale + row);
      continue;
    }
    const double by = norm_of(x + row * F, F, norm);
    code_row(x + row * F, F, by, figure_of(x + row * F, F, by, is_signed), bits, is_signed, codes + row * F,
             scale + row);
    ++row;
  }
}

static void feature_codes_csr(const i64* indptr, const float* values, int norm, int bits, bool is_signed,
                              std::int16_t* codes, float* scale, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    const float* x = values + indptr[row];
    const i64 n = indptr[row + 1] - indptr[row];
    const double by = norm_of(x, n, norm);
    code_row(x, n, by, figure_of(x, n, by, is_signed), bits, is_signed, codes + indptr[row], scale + row);
  }
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

// Registers of the build: four floats at baseline, eight with AVX2. The product is rounded before it is added.
#ifdef __AVX2__
constexpr int kLanes = 8, kTileRows = 4;
#else
constexpr int kLanes = 4, kTileRows = 2;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float LooseLanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));  // any place in memory
constexpr int kMostParts = 8;               // registers that hold sums
constexpr i64 kTile = kMostParts * kLanes;  // columns that are summed at a time

QGNN_INLINE Lanes load_lanes(const float* at) { return *reinterpret_cast<const LooseLanes*>(at); }
QGNN_INLINE void store_lanes(float* at, Lanes v) { *reinterpret_cast<LooseLanes*>(at) = v; }

// `height` rows by one block of columns, held in registers over all features.
template <int height>
QGNN_INLINE void float_tile(const float* x, const float* w, i64 F, i64 width, i64 H, float* out) {
  constexpr int parts = kBlock / kLanes;
  Lanes sum[height][parts] = {};
  for (i64 f = 0; f < F; ++f)
    for (int k = 0; k < parts; ++k) {
      const Lanes weight = *reinterpret_cast<const LooseLanes*>(w + f * kBlock + k * kLanes);
      for (int r = 0; r < height; ++r) sum[r][k] = sum[r][k] + x[r * F + f] * weight;
    }
  for (int r = 0; r < height; ++r) {
    float row[kBlock];
    for (int k = 0; k < parts; ++k) *reinterpret_cast<LooseLanes*>(row + k * kLanes) = sum[r][k];
    std::memcpy(out + r * H, row, width * sizeof(float));
  }
}

static void matmul_float_dense(const float* x, const float* blocks, i64 F, i64 H, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end;) {
    const i64 height = end - row < kTileRows ? 1 : kTileRows;
    for (i64 j = 0; j < H; j += kBlock) {
      const float* w = blocks + j * F;
      const i64 width = H - j < kBlock ? H - j : kBlock;
      if (height == kTileRows) float_tile<kTileRows>(x + row * F, w, F, width, H, out + row * H + j);
      else float_tile<1>(x + row * F, w, F, width, H, out + row * H + j);
    }
    row += height;
  }
}

// `parts` registers of columns of a row's stored values begin..end times their weights; the last one starts at column
// `last`, where it may overlap the one before. `w` points at the first column of the first feature.
template <int parts>
QGNN_INLINE void stored_tile(const std::int32_t* indices, const float* values, i64 begin, i64 end, const float* w, i64 H,
                             i64 last, float* out) {
  Lanes sum[parts] = {};
  for (i64 e = begin; e < end; ++e) {
    const float v = values[e];
    const float* in = w + static_cast<i64>(indices[e]) * H;
    for (int k = 0; k + 1 < parts; ++k) sum[k] = sum[k] + v * load_lanes(in + k * kLanes);
    sum[parts - 1] = sum[parts - 1] + v * load_lanes(in + last);
  }
  for (int k = 0; k + 1 < parts; ++k) store_lanes(out + k * kLanes, sum[k]);
  store_lanes(out + last, sum[parts - 1]);
}

// The same of n columns, less than a register has.
QGNN_INLINE void stored_few(const std::int32_t* indices, const float* values, i64 begin, i64 end, const float* w, i64 H,
                            i64 n, float* out) {
  F8 sum{};
  for (i64 e = begin; e < end; ++e) sum = sum + values[e] * load8(w + static_cast<i64>(indices[e]) * H, n);
  store8(sum, out, n);
}

static void matmul_float_csr(const i64* indptr, const std::int32_t* indices, const float* values, const float* weights,
                             i64 H, float* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    float* sum = out + row * H;
    const i64 first = indptr[row], stop = indptr[row + 1];
    for (i64 j = 0; j < H; j += kTile) {
      const i64 n = H - j < kTile ? H - j : kTile;
      if (n < kLanes) {
        stored_few(indices, values, first, stop, weights + j, H, n, sum + j);
        continue;
      }
      with_parts<kMostParts>((n + kLanes - 1) / kLanes, [=]<int parts>() __attribute__((always_inline)) {
        stored_tile<parts>(indices, values, first, stop, weights + j, H, n - kLanes, sum + j);
      });
    }
  }
}

static void hidden_codes(const std::int32_t* acc, const float* row_scale, float weight_step, const float* bias,
                         float hidden_step, int bits, i64 H, std::int16_t* codes, double* moments, i64 begin,
                         i64 end) {
  const float top = static_cast<float>((1 << bits) - 1);
  for (i64 row = begin; row < end; ++row) {
    const float scale = row_scale[row] * weight_step;
    for (i64 j = 0; j < H; ++j) {
      const float v = static_cast<float>(acc[row * H + j]) * scale + bias[j];
      codes[row * H + j] = static_cast<std::int16_t>(round_small(clamp(v / hidden_step, 0.0f, top)));
    }
    if (moments == nullptr) continue;
    Moments m;
    m.add(H, [&](i64 j) {
      const float v = static_cast<float>(acc[row * H + j]) * scale + bias[j];
      return v < 0.0f ? 0.0f : v;
    });
    m.store(moments + row * 3);
  }
}

static void scores_from_codes(const std::int32_t* acc, float scale, const float* bias, i64 C, float* out, i64 begin,
                              i64 end) {
  for (i64 row = begin; row < end; ++row)
    for (i64 c = 0; c < C; ++c) out[row * C + c] = static_cast<float>(acc[row * C + c]) * scale + bias[c];
}

}  // namespace QGNN_ISA
}  // namespace qgnn
