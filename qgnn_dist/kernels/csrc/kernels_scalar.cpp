// SPDX-License-Identifier: Apache-2.0
// The scalar twin: baseline instructions only, and the specification that the AVX2 build is tested against.
#define QGNN_ISA scalar
#include "kernels_body.h"

namespace qgnn {
namespace scalar {

// Less than eight numbers, for kernels_body.h.
QGNN_INLINE F8 load_some(const float* p, i64 n, float rest) {
  alignas(32) float part[8];
  for (i64 i = 0; i < 8; ++i) part[i] = i < n ? p[i] : rest;
  F8 v;
  std::memcpy(&v, part, sizeof v);
  return v;
}
QGNN_INLINE void store_some(F8 v, float* p, i64 n) {
  alignas(32) float part[8];
  std::memcpy(part, &v, sizeof v);
  for (i64 i = 0; i < n; ++i) p[i] = part[i];
}
QGNN_INLINE F8 keep_some(F8 v, i64 n) {
  for (i64 i = n; i < 8; ++i) v[i] = 0.0f;
  return v;
}

// Eight numbers between widths, for layer_body.h.
QGNN_INLINE I8 widen16(U16x8 v) {
  I8 out{};
  for (int i = 0; i < 8; ++i) out[i] = static_cast<std::int16_t>(v[i]);
  return out;
}
QGNN_INLINE I8 widen_whole(U16x8 v) {
  I8 out{};
  for (int i = 0; i < 8; ++i) out[i] = v[i];
  return out;
}
QGNN_INLINE I8 load_whole(const std::uint8_t* p) {
  I8 out{};
  for (int i = 0; i < 8; ++i) out[i] = p[i];
  return out;
}
QGNN_INLINE void add_whole(U16x8 v, std::uint8_t* p) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<std::uint8_t>(p[i] + v[i]);
}
QGNN_INLINE I8 widen8(const std::int8_t* p) {
  I8 out{};
  for (int i = 0; i < 8; ++i) out[i] = p[i];
  return out;
}
QGNN_INLINE U16x8 narrow16(I8 v) {
  U16x8 out{};
  for (int i = 0; i < 8; ++i) out[i] = static_cast<std::uint16_t>(v[i]);
  return out;
}
QGNN_INLINE void store_low_bytes(U16x8 v, std::uint8_t* out) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<std::uint8_t>(v[i]);
}

// For gradients_body.h: four numbers in both halves of a register, and the largest of eight.
QGNN_INLINE I8 four_twice(const std::uint32_t* four) {
  I8 out{};
  for (int i = 0; i < 8; ++i) out[i] = static_cast<std::int32_t>(four[i % 4]);
  return out;
}
QGNN_INLINE std::int32_t largest(I8 v) {
  std::int32_t most = v[0];
  for (int i = 1; i < 8; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// As in sums_avx2.h, one code after the other.
struct CodeSums {
  const std::int32_t* indices;
  const std::uint8_t* payload;
  const i64 C;
  const int bits;

  CodeSums(const std::int32_t* indices, const std::uint8_t* payload, i64, i64 C, int bits, i64)
      : indices(indices), payload(payload), C(C), bits(bits) {}
  void operator()(i64 begin, i64 end, std::uint16_t* sum) const {
    sum_planes(indices, payload, C, bits, begin, end, sum);
  }
};

// As in gradients_avx2.h, one code after the other.
struct ScaledSums {
  const std::int32_t* indices;
  const std::uint8_t* payload;
  const i64 C;
  const int bits;

  ScaledSums(const std::int32_t* indices, const std::uint8_t* payload, i64, i64 C, int bits, i64)
      : indices(indices), payload(payload), C(C), bits(bits) {}
  void operator()(i64 begin, i64 end, float* __restrict sum) const {
    const i64 B = row_bytes(C, bits);
    const std::int32_t mask = (1 << bits) - 1, zero = zero_code(bits);
    std::memset(sum, 0, C * sizeof(float));
    for (i64 e = begin; e < end; ++e) {
      const std::uint8_t* __restrict packed = payload + indices[e] * (B + 1);
      const float scale = kScales.at[packed[B]];
      for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
        const i64 n = C - first < B ? C - first : B;
        for (i64 i = 0; i < n; ++i)
          sum[first + i] += scale * static_cast<float>((packed[i] >> shift & mask) - zero);
      }
    }
  }
};

// sum += x·w in products of 16 by 16 bits, which baseline instructions have.
QGNN_INLINE void add_scaled(std::int16_t x, const std::int16_t* __restrict w, i64 n, std::int32_t* __restrict sum) {
  for (i64 i = 0; i < n; ++i) sum[i] += x * w[i];
}

static void matmul_codes_dense(const std::int16_t* codes, const CodeWeights& weights, i64 F, i64 H,
                               std::int32_t* out, i64 begin, i64 end) {
  const std::int16_t* blocks = weights.pairs;
  const i64 whole = H / kBlock * kBlock;
  for (i64 row = begin; row < end; ++row) {
    std::int32_t* sum = out + row * H;
    std::memset(sum, 0, H * sizeof(std::int32_t));
    for (i64 f = 0; f < F; ++f) {
      const std::int16_t x = codes[row * F + f];
      for (i64 j = 0; j < whole; j += kBlock) add_scaled(x, blocks + j * F + f * kBlock, kBlock, sum + j);
      if (whole < H) add_scaled(x, blocks + whole * F + f * kBlock, H - whole, sum + whole);
    }
  }
}

static void draw_groups(const Key& key, i64 row, i64 group, std::uint32_t out[4 * kGroups]) {
  for (int i = 0; i < kGroups; ++i) draw(key, row, group + i, out + 4 * i);
}

static void draw_places(const Key& key, const i64 rows[kGroups], const i64 groups[kGroups],
                        std::uint32_t out[4 * kGroups]) {
  for (int i = 0; i < kGroups; ++i) draw(key, rows[i], groups[i], out + 4 * i);
}

}  // namespace scalar
}  // namespace qgnn

#include "layer_body.h"
#include "gradients_body.h"
#include "network_body.h"

namespace qgnn {
using namespace scalar;
QGNN_TABLE(kernels_scalar, "scalar");

}  // namespace qgnn
