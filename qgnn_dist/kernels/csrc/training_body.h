// SPDX-License-Identifier: Apache-2.0
// The perceptron in training: rows that dropout has thinned, their products in both directions, and the hidden layer
// with its gradient. Included by kernels_body.h, once for each instruction set.

namespace qgnn {
namespace QGNN_ISA {

constexpr i64 kWord = kTileFeatures;  // values that one word tells the non-zeros of

// keep[i] is 1 where dropout keeps column first + i of a row, else 0; first is a multiple of 4.
QGNN_INLINE void draw_kept(const Key& key, i64 row, i64 first, i64 n, std::uint64_t threshold, float* keep) {
  std::uint32_t numbers[4 * kGroups];
  for (i64 c = 0; c < n; c += 4 * kGroups) {
    const i64 count = n - c < 4 * kGroups ? n - c : 4 * kGroups;
    draw_groups(key, row, (first + c) / 4, numbers);
    if (threshold > 0xFFFFFFFFull) {
      std::memset(keep + c, 0, count * sizeof(float));
      continue;
    }
    const std::uint32_t least = static_cast<std::uint32_t>(threshold);
    for (i64 i = 0; i < count; ++i) keep[c + i] = numbers[i] >= least ? 1.0f : 0.0f;
  }
}

// The values that dropout keeps, 0 in place of the others.
template <typename T, typename To>
QGNN_INLINE void thin(Key key, const i64* rows, i64 columns, std::uint64_t threshold, const T* x, To* out, i64 begin,
                      i64 end) {
  float keep[kRun];
  for (i64 row = begin; row < end; ++row)
    for (i64 first = 0; first < columns; first += kRun) {
      const i64 n = columns - first < kRun ? columns - first : kRun;
      draw_kept(key, rows[row], first, n, threshold, keep);
      const T* __restrict from = x + row * columns + first;
      To* __restrict to = out + row * columns + first;
      for (i64 i = 0; i < n; ++i) {
        const To v = static_cast<To>(from[i]);  // read in any case: a load that depends is not vectorised
        to[i] = keep[i] != 0.0f ? v : To{0};
      }
    }
}

static void thin_codes(Key key, const i64* rows, i64 columns, std::uint64_t threshold, const std::int16_t* x,
                       float* out, i64 begin, i64 end) {
  thin(key, rows, columns, threshold, x, out, begin, end);
}

static void thin_values(Key key, const i64* rows, i64 columns, std::uint64_t threshold, const float* x, float* out,
                        i64 begin, i64 end) {
  thin(key, rows, columns, threshold, x, out, begin, end);
}

// Bit i: whether x[i] is not zero (NaN is not), for n values, at most kWord.
QGNN_INLINE std::uint64_t nonzeros(const float* x, i64 n) {
  std::uint64_t bits = 0;
  i64 i = 0;
#ifdef __AVX2__
  for (; i + 8 <= n; i += 8)
    bits |= static_cast<std::uint64_t>(_mm256_movemask_ps(
                _mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_setzero_ps(), _CMP_NEQ_UQ))) << i;
#endif
  for (; i < n; ++i) bits |= static_cast<std::uint64_t>(x[i] != 0.0f) << i;
  return bits;
}

// One row by `count` blocks of columns, in registers over its non-zeros; `w` is the first block, each (F, kBlock).
template <int count>
QGNN_INLINE void thin_row(const float* x, const float* w, i64 F, i64 width, float* out) {
  constexpr int parts = kBlock / kLanes;
  Lanes sum[count * parts] = {};
  for (i64 first = 0; first < F; first += kWord) {
    std::uint64_t bits = nonzeros(x + first, F - first < kWord ? F - first : kWord);
    for (; bits != 0; bits &= bits - 1) {
      const i64 f = first + __builtin_ctzll(bits);
      const float v = x[f];
      for (int j = 0; j < count; ++j)
        for (int k = 0; k < parts; ++k)
          sum[j * parts + k] = sum[j * parts + k] + v * load_lanes(w + (j * F + f) * kBlock + k * kLanes);
    }
  }
  float row[count * kBlock];
  for (int i = 0; i < count * parts; ++i) store_lanes(row + i * kLanes, sum[i]);
  std::memcpy(out, row, width * sizeof(float));
}

static void matmul_thin(const float* x, const float* blocks, i64 F, i64 H, float* out, i64 begin, i64 end) {
  for (i64 j = 0; j < H; j += 4 * kBlock) {  // a group of blocks stays in the first level over all rows
    const float* w = blocks + j * F;
    const i64 width = H - j < 4 * kBlock ? H - j : 4 * kBlock;
    for (i64 row = begin; row < end; ++row) {
      const float* from = x + row * F;
      float* to = out + row * H + j;
      switch (num_blocks(width)) {
        case 1: thin_row<1>(from, w, F, width, to); break;
        case 2: thin_row<2>(from, w, F, width, to); break;
        case 3: thin_row<3>(from, w, F, width, to); break;
        default: thin_row<4>(from, w, F, width, to);
      }
    }
  }
}

// kWord rows of out += xᵀ·(scale·g), `parts` registers of columns, for rows 0..N in their order; the tile is 0 at first.
template <int parts>
QGNN_INLINE void add_tile(const float* x, const float* scale, const float* g, i64 N, i64 F, i64 H, i64 height,
                          i64 width, float* out) {
  alignas(32) float tile[kWord * parts * kLanes];
  alignas(32) float row[parts * kLanes] = {};
  std::memset(tile, 0, sizeof tile);
  for (i64 n = 0; n < N; ++n) {
    std::uint64_t bits = nonzeros(x + n * F, height);
    if (bits == 0) continue;
    std::memcpy(row, g + n * H, width * sizeof(float));
    Lanes from[parts];
    for (int k = 0; k < parts; ++k) from[k] = scale[n] * load_lanes(row + k * kLanes);
    for (; bits != 0; bits &= bits - 1) {
      const int f = __builtin_ctzll(bits);
      const float v = x[n * F + f];
      float* to = tile + f * parts * kLanes;
      for (int k = 0; k < parts; ++k) store_lanes(to + k * kLanes, load_lanes(to + k * kLanes) + v * from[k]);
    }
  }
  for (i64 f = 0; f < height; ++f)
    for (i64 j = 0; j < width; ++j) out[f * H + j] += tile[f * parts * kLanes + j];
}

// Tiles begin..end of kWord features by kTileColumns columns; a tile's sums do not depend on who has the others.
static void add_transposed(const float* x, const float* scale, const float* g, i64 N, i64 F, i64 H, float* out,
                           i64 begin, i64 end) {
  const i64 across = (H + kTileColumns - 1) / kTileColumns;
  for (i64 tile = begin; tile < end; ++tile) {
    const i64 f = tile / across * kWord, j = tile % across * kTileColumns;
    const i64 height = F - f < kWord ? F - f : kWord, width = H - j < kTileColumns ? H - j : kTileColumns;
    float* to = out + f * H + j;
    with_parts<kTileColumns / kLanes>((width + kLanes - 1) / kLanes, [=]<int parts>() __attribute__((always_inline)) {
      add_tile<parts>(x + f, scale, g + j, N, F, H, height, width, to);
    });
  }
}

// `parts` registers of columns of a row's gradient, which stay there for all its stored values begin..end.
template <int parts>
QGNN_INLINE void add_stored(const std::int32_t* indices, const float* values, i64 begin, i64 end, float scale,
                            const float* g, i64 H, float* out) {
  Lanes from[parts];
  for (int k = 0; k < parts; ++k) from[k] = scale * load_lanes(g + k * kLanes);
  for (i64 e = begin; e < end; ++e) {
    const float v = values[e];
    float* to = out + static_cast<i64>(indices[e]) * H;
    for (int k = 0; k < parts; ++k) store_lanes(to + k * kLanes, load_lanes(to + k * kLanes) + v * from[k]);
  }
}

// Columns begin..end of out += Xᵀ·(scale·g) of CSR rows, in the order of the rows.
static void add_transposed_csr(const i64* indptr, const std::int32_t* indices, const float* values, const float* scale,
                               const float* g, i64 N, i64 H, float* out, i64 begin, i64 end) {
  for (i64 j = begin; j < end; j += kTile) {  // a tile of all features stays near over all rows
    const i64 n = end - j < kTile ? end - j : kTile, whole = n - n % kLanes;
    for (i64 row = 0; row < N; ++row) {
      const i64 first = indptr[row], stop = indptr[row + 1];
      const float* from = g + row * H + j;
      if (whole > 0)
        with_parts<kMostParts>(whole / kLanes, [=]<int parts>() __attribute__((always_inline)) {
          add_stored<parts>(indices, values, first, stop, scale[row], from, H, out + j);
        });
      for (i64 e = first; whole < n && e < stop; ++e) {
        float* __restrict to = out + static_cast<i64>(indices[e]) * H + j;
        for (i64 c = whole; c < n; ++c) to[c] += values[e] * (scale[row] * from[c]);
      }
    }
  }
}

// relu, grid and dropout of n columns, and the gradient through them; `grad` may be null. Returns what a learned step's
// gradient grows by. Without a grid (`gridded` false) codes are the values.
template <bool gridded>
QGNN_INLINE void activate_columns(const float* __restrict value, const float* __restrict keep, float step, float top,
                                  i64 n, float* __restrict out, float* __restrict grad, double* error) {
  if (error != nullptr) {
    double sum = *error;
    for (i64 i = 0; i < n; ++i) {
      const float q = gridded ? value[i] / step : value[i];
      const float code = gridded ? round_small(clamp(q, 0.0f, top)) : q;
      const float through = value[i] > 0.0f && (!gridded || q <= top) ? q : 0.0f;
      sum += static_cast<double>(keep[i] * grad[i]) * static_cast<double>(code - through);
    }
    *error = sum;
  }
  for (i64 i = 0; i < n; ++i) {
    const float q = gridded ? value[i] / step : value[i];
    const float code = gridded ? round_small(clamp(q, 0.0f, top)) : q;
    out[i] = keep[i] != 0.0f ? code : 0.0f;
    if (grad == nullptr) continue;
    const float g = grad[i], within = !gridded || q <= top ? g : 0.0f, passed = value[i] > 0.0f ? within : 0.0f;
    grad[i] = keep[i] != 0.0f ? passed : 0.0f;
  }
}

// n columns of what `recall` reads: `codes` and `flags` are where their bytes begin.
QGNN_INLINE void keep_columns(const float* value, const float* keep, const float* out, float step, float top, int bits,
                              i64 n, std::uint8_t* codes, std::uint8_t* flags) {
  std::uint8_t code[kRun], passes[kRun];
  for (i64 i = 0; i < n; ++i) {
    code[i] = static_cast<std::uint8_t>(out[i]);
    passes[i] = static_cast<std::uint8_t>((keep[i] != 0.0f) & (value[i] > 0.0f) & (value[i] / step <= top));
  }
  pack(code, n, bits, codes, 0, 1);
  pack(passes, n, 1, flags, 0, 1);
}

// Codes of the hidden layer as floats, and the gradient through what they were made of.
static void recall(const std::uint8_t* kept, int bits, i64 H, float* out, float* grad, i64 begin, i64 end) {
  std::uint8_t code[kRun], passes[kRun];
  const i64 flags = row_bytes(H, bits);
  for (i64 row = begin; row < end; ++row) {
    const std::uint8_t* from = kept + row * kept_bytes(H, bits);
    for (i64 first = 0; first < H; first += kRun) {
      const i64 n = H - first < kRun ? H - first : kRun;
      unpack(from + first * bits / 8, n, bits, code, 0, 1);
      unpack(from + flags + first / 8, n, 1, passes, 0, 1);
      float* __restrict to = out + row * H + first;
      float* __restrict g = grad + row * H + first;
      for (i64 i = 0; i < n; ++i) {
        to[i] = static_cast<float>(code[i]);
        g[i] = passes[i] != 0 ? g[i] : 0.0f;
      }
    }
  }
}

static void activate(const Activation& s, i64 begin, i64 end) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  float value[kRun], keep[kRun];
  for (i64 row = begin; row < end; ++row) {
    const float scale = s.row_scale[row] * s.weight_step;
    Moments moments;
    double error = 0.0;
    for (i64 first = 0; first < s.H; first += kRun) {
      const i64 n = s.H - first < kRun ? s.H - first : kRun, at = row * s.H + first;
      for (i64 i = 0; i < n; ++i) {
        const float v = s.sums[at + i] * scale + s.bias[first + i];
        value[i] = v < 0.0f ? 0.0f : v;
      }
      if (s.moments != nullptr) moments.add(n, [&](i64 i) { return value[i]; });
      if (s.dropped) draw_kept(s.key, s.rows[row], first, n, s.threshold, keep);
      else
        for (i64 i = 0; i < n; ++i) keep[i] = 1.0f;
      float* grad = s.grad == nullptr ? nullptr : s.grad + at;
      double* errors = s.errors == nullptr ? nullptr : &error;
      if (s.step != 0.0f) activate_columns<true>(value, keep, s.step, top, n, s.out + at, grad, errors);
      else activate_columns<false>(value, keep, 1.0f, top, n, s.out + at, grad, errors);
      if (s.kept != nullptr) {
        std::uint8_t* kept = s.kept + row * kept_bytes(s.H, s.bits);
        keep_columns(value, keep, s.out + at, s.step, top, s.bits, n, kept + first * s.bits / 8,
                     kept + row_bytes(s.H, s.bits) + first / 8);
      }
    }
    if (s.moments != nullptr) moments.store(s.moments + row * 3);
    if (s.errors != nullptr) s.errors[row] = error;
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
