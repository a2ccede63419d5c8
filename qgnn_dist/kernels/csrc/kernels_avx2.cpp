// SPDX-License-Identifier: Apache-2.0
// The AVX2 build: the same body, vectorised by the compiler, and three kernels by hand. Codes are added in 8 bits, 32 of
// them an instruction, and moved to 32 bits before they could overflow; shift-and-mask needs no shuffle because the bit
// order is planar. Products of codes use vpmaddwd: 16-bit pairs cannot saturate it. Random numbers use vpmuludq.
#include <immintrin.h>

#define QGNN_ISA avx2
#include "kernels_body.h"
#include "sums_avx2.h"

namespace qgnn {
namespace avx2 {

// Less than eight numbers, for kernels_body.h. A masked load leaves places that it does not load alone, also where they
// are no memory; a masked store would do as much, and is slow on some processors.
alignas(32) constexpr std::int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
QGNN_INLINE __m256i mask_of(i64 n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + 8 - n)); }
QGNN_INLINE F8 load_some(const float* p, i64 n, float rest) {
  const __m256i mask = mask_of(n);
  return (F8)_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
QGNN_INLINE F8 keep_some(F8 v, i64 n) { return (F8)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(mask_of(n))); }
QGNN_INLINE void store_some(F8 v, float* p, i64 n) {
  __m128 four = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, four);
    p += 4;
    four = _mm256_extractf128_ps((__m256)v, 1);
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), four);
    p += 2;
    four = _mm_movehl_ps(four, four);
  }
  if (n & 1) _mm_store_ss(p, four);
}

// Eight numbers between widths, for layer_body.h.
QGNN_INLINE I8 widen16(U16x8 v) { return (I8)_mm256_cvtepi16_epi32((__m128i)v); }
QGNN_INLINE I8 widen_whole(U16x8 v) { return (I8)_mm256_cvtepu16_epi32((__m128i)v); }
QGNN_INLINE I8 load_whole(const std::uint8_t* p) {
  return (I8)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
QGNN_INLINE void add_whole(U16x8 v, std::uint8_t* p) {
  __m128i* const eight = reinterpret_cast<__m128i*>(p);
  _mm_storel_epi64(eight, _mm_add_epi8(_mm_loadl_epi64(eight), _mm_packus_epi16((__m128i)v, (__m128i)v)));
}
QGNN_INLINE I8 widen8(const std::int8_t* p) {
  return (I8)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
QGNN_INLINE U16x8 narrow16(I8 v) {
  return (U16x8)_mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
QGNN_INLINE void store_low_bytes(U16x8 v, std::uint8_t* out) {
  const __m128i bytes = _mm_and_si128((__m128i)v, _mm_set1_epi16(255));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(bytes, bytes));
}

// For gradients_body.h: four numbers in both halves of a register, and the largest of eight.
QGNN_INLINE I8 four_twice(const std::uint32_t* four) {
  return (I8)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)));
}
QGNN_INLINE std::int32_t largest(I8 v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

// Row after row: all rows' factors loaded first, the compiler has to send sums to memory and back.
QGNN_INLINE void keep_in_registers(__m256i& a, __m256i& b) { asm volatile("" : "+x"(a), "+x"(b)); }

// `height` rows by one block of columns stay in registers over all pairs of features. Interleaving two rows of weights
// leaves columns 0-3, 8-11 in one register and 4-7, 12-15 in the other; they are put in order once, at the end.
template <int height>
QGNN_INLINE void code_tile(const std::int16_t* codes, const std::int16_t* w, i64 F, i64 width, i64 H,
                           std::int32_t* out) {
  __m256i acc[height][2];
  for (auto& a : acc) a[0] = a[1] = _mm256_setzero_si256();
  const auto add_pair = [&](i64 f, bool whole) __attribute__((always_inline)) {
    const auto* at = reinterpret_cast<const __m256i*>(w + f * kBlock);
    const __m256i first = _mm256_load_si256(at), second = whole ? _mm256_load_si256(at + 1) : _mm256_setzero_si256();
    const __m256i w0 = _mm256_unpacklo_epi16(first, second), w1 = _mm256_unpackhi_epi16(first, second);
    for (int r = 0; r < height; ++r) {
      std::int32_t pair = 0;
      std::memcpy(&pair, codes + r * F + f, whole ? 4 : 2);
      const __m256i both = _mm256_set1_epi32(pair);
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(both, w0));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(both, w1));
      keep_in_registers(acc[r][0], acc[r][1]);
    }
  };
  for (i64 f = 0; f + 1 < F; f += 2) add_pair(f, true);
  if (F % 2 != 0) add_pair(F - 1, false);  // no partner to read
  for (int r = 0; r < height; ++r) {
    alignas(32) std::int32_t sums[kBlock];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), _mm256_permute2x128_si256(acc[r][0], acc[r][1], 0x20));
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8), _mm256_permute2x128_si256(acc[r][0], acc[r][1], 0x31));
    std::memcpy(out + r * H, sums, width * sizeof(std::int32_t));
  }
}

constexpr i64 kRows = 6, kNarrowFeatures = 8192;

// The same for narrow codes: four features an element, vpmaddubsw multiplies bytes and adds pairs in 16 bits, which
// `groups` quads at a time cannot overflow. `codes` are kRows rows of num_quads(F)·4 bytes, each code less `low`.
template <int height>
QGNN_INLINE void narrow_tile(const std::uint8_t* codes, const std::int8_t* w, i64 quads, i64 groups, std::int32_t low,
                             const std::int32_t* column_sums, i64 width, i64 H, std::int32_t* out) {
  const __m256i ones = _mm256_set1_epi16(1), lowest = _mm256_set1_epi32(low);
  __m256i wide[height][2];
  for (auto& row : wide)
    for (int half = 0; half < 2; ++half)
      row[half] = _mm256_mullo_epi32(lowest, _mm256_load_si256(reinterpret_cast<const __m256i*>(column_sums) + half));
  for (i64 from = 0; from < quads; from += groups) {
    const i64 to = from + groups < quads ? from + groups : quads;
    __m256i acc[height][2];
    for (auto& row : acc) row[0] = row[1] = _mm256_setzero_si256();
    for (i64 q = from; q < to; ++q) {
      const auto* at = reinterpret_cast<const __m256i*>(w + q * kBlock * 4);
      const __m256i w0 = _mm256_load_si256(at), w1 = _mm256_load_si256(at + 1);
      for (int r = 0; r < height; ++r) {
        std::int32_t four;
        std::memcpy(&four, codes + (r * quads + q) * 4, 4);
        const __m256i x = _mm256_set1_epi32(four);
        acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(x, w0));
        acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(x, w1));
        keep_in_registers(acc[r][0], acc[r][1]);
      }
    }
    for (int r = 0; r < height; ++r)
      for (int half = 0; half < 2; ++half)
        wide[r][half] = _mm256_add_epi32(wide[r][half], _mm256_madd_epi16(acc[r][half], ones));
  }
  for (int r = 0; r < height; ++r) {
    if (width == kBlock) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * H), wide[r][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * H + 8), wide[r][1]);
    } else {
      alignas(32) std::int32_t sums[kBlock];
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums), wide[r][0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8), wide[r][1]);
      std::memcpy(out + r * H, sums, width * sizeof(std::int32_t));
    }
  }
}

// Rows of codes as bytes above their lowest one; false where 16-bit sums of two products could overflow.
QGNN_INLINE bool narrow_rows(const std::int16_t* codes, i64 rows, i64 F, std::int32_t largest_weight,
                             std::uint8_t* bytes, std::int32_t* low, i64* groups) {
  std::int16_t least = codes[0], most = codes[0];
  for (i64 i = 0; i < rows * F; ++i) {
    least = codes[i] < least ? codes[i] : least;
    most = codes[i] > most ? codes[i] : most;
  }
  const std::int32_t range = most - least, pair = 2 * range * largest_weight;
  if (range > 255 || pair > 32767) return false;
  const i64 padded = num_quads(F) * 4;
  for (i64 row = 0; row < rows; ++row) {
    std::uint8_t* to = bytes + row * padded;
    for (i64 f = 0; f < F; ++f) to[f] = static_cast<std::uint8_t>(codes[row * F + f] - least);
    std::memset(to + F, 0, padded - F);
  }
  *low = least;
  *groups = pair == 0 ? num_quads(F) : 32767 / pair;
  return true;
}

static void matmul_codes_dense(const std::int16_t* codes, const CodeWeights& weights, i64 F, i64 H, std::int32_t* out,
                               i64 begin, i64 end) {
  alignas(32) std::uint8_t bytes[kRows * kNarrowFeatures];
  const i64 quads = num_quads(F);
  for (i64 row = begin; row < end;) {
    const i64 height = end - row < kRows ? 1 : kRows;
    std::int32_t low = 0;
    i64 groups = 0;
    const bool narrow = F > 0 && F <= kNarrowFeatures &&
                        narrow_rows(codes + row * F, height, F, weights.largest, bytes, &low, &groups);
    for (i64 j = 0; j < H; j += kBlock) {
      const i64 width = H - j < kBlock ? H - j : kBlock;
      std::int32_t* to = out + row * H + j;
      if (narrow) {
        const std::int8_t* w = weights.quads + j * quads * 4;
        if (height == kRows) narrow_tile<kRows>(bytes, w, quads, groups, low, weights.sums + j, width, H, to);
        else narrow_tile<1>(bytes, w, quads, groups, low, weights.sums + j, width, H, to);
      } else {
        const std::int16_t* w = weights.pairs + j * F;
        if (height == kRows) code_tile<kRows>(codes + row * F, w, F, width, H, to);
        else code_tile<1>(codes + row * F, w, F, width, H, to);
      }
    }
    row += height;
  }
}

// Four groups a register, each number in the low half of 64 bits: what vpmuludq reads, whatever the high half holds.
QGNN_INLINE void philox_groups(const Key& key, __m256i c[2][4], std::uint32_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  std::uint32_t k0 = static_cast<std::uint32_t>(key.seed), k1 = static_cast<std::uint32_t>(key.seed >> 32);
  for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (int half = 0; half < 2; ++half) {
      __m256i* x = c[half];
      const __m256i a = _mm256_mul_epu32(m0, x[0]), b = _mm256_mul_epu32(m1, x[2]);
      x[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), x[1]), key0);
      x[1] = b;
      x[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), x[3]), key1);
      x[3] = a;
    }
  }
  for (int half = 0; half < 2; ++half) {  // to four numbers of each group, side by side
    const __m256i* x = c[half];
    const __m256i first = _mm256_or_si256(_mm256_and_si256(x[0], low), _mm256_slli_epi64(x[1], 32));
    const __m256i second = _mm256_or_si256(_mm256_and_si256(x[2], low), _mm256_slli_epi64(x[3], 32));
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
    auto* to = reinterpret_cast<__m256i*>(out + half * 16);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}

// Counters of four groups.
QGNN_INLINE void set_counters(const Key& key, __m256i rows, __m256i groups, __m256i c[4]) {
  c[0] = rows;
  c[1] = _mm256_or_si256(_mm256_srli_epi64(rows, 32), _mm256_slli_epi64(groups, 8));
  c[2] = _mm256_set1_epi64x(key.epoch);
  c[3] = _mm256_set1_epi64x(key.layer | key.stage << 16 | key.round << 24);
}

static void draw_groups(const Key& key, i64 row, i64 group, std::uint32_t out[4 * kGroups]) {
  __m256i c[2][4];
  for (int half = 0; half < 2; ++half)
    set_counters(key, _mm256_set1_epi64x(row),
                 _mm256_add_epi64(_mm256_set1_epi64x(group + 4 * half), _mm256_set_epi64x(3, 2, 1, 0)), c[half]);
  philox_groups(key, c, out);
}

static void draw_places(const Key& key, const i64 rows[kGroups], const i64 groups[kGroups],
                        std::uint32_t out[4 * kGroups]) {
  __m256i c[2][4];
  for (int half = 0; half < 2; ++half)
    set_counters(key, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows) + half),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups) + half), c[half]);
  philox_groups(key, c, out);
}

}  // namespace avx2
}  // namespace qgnn

#include "layer_body.h"
#include "gradients_avx2.h"
#include "gradients_body.h"
#include "lookup_avx2.h"
#include "network_body.h"

namespace qgnn {
using namespace avx2;
QGNN_TABLE(kernels_avx2, "avx2");

}  // namespace qgnn
