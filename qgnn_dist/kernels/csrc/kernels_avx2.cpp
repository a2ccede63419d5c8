// SPDX-License-Identifier: Apache-2.0
// The AVX2 build: the same body, vectorised by the compiler, and three kernels by hand. Codes are added in 8 bits, 32 of
// them an instruction, and moved to 32 bits before they could overflow; shift-and-mask needs no shuffle because the bit
// order is planar. Products of codes use vpmaddwd: 16-bit pairs cannot saturate it. Random numbers use vpmuludq.
#include <immintrin.h>

#define QGNN_ISA avx2
#include "kernels_body.h"

namespace qgnn {
namespace avx2 {

constexpr i64 kAhead = 12;  // neighbours: far enough to hide a cache miss, near enough to stay in the first level

// Adds a row's neighbours, bytes first..first+16 of each; `out` are that row's C sums.
template <int bits>
QGNN_INLINE void sum_bytes16(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 limit,
                             i64 B, i64 C, i64 row, i64 last_edge, i64 first, std::int32_t* out) {
  constexpr int planes = 8 / bits;
  constexpr i64 flush = 255 / ((1 << bits) - 1);
  const __m128i mask = _mm_set1_epi8(static_cast<char>((1 << bits) - 1));
  const i64 n = B - first < 16 ? B - first : 16;
  alignas(16) std::uint8_t sums[16];
  for (i64 e = indptr[row]; e < indptr[row + 1];) {
    const i64 stop = e + flush < indptr[row + 1] ? e + flush : indptr[row + 1];
    __m128i acc[planes];
    for (int k = 0; k < planes; ++k) acc[k] = _mm_setzero_si128();
    for (; e < stop; ++e) {
      _mm_prefetch(reinterpret_cast<const char*>(
          payload + static_cast<i64>(indices[e + kAhead < last_edge ? e + kAhead : e]) * B + first), _MM_HINT_T0);
      const i64 at = static_cast<i64>(indices[e]) * B + first;
      __m128i v;
      if (at + 16 <= limit) {
        v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(payload + at));
      } else {  // the buffer's last rows: never read past its end
        alignas(16) std::uint8_t tail[16] = {0};
        std::memcpy(tail, payload + at, limit - at);
        v = _mm_load_si128(reinterpret_cast<const __m128i*>(tail));
      }
      for (int k = 0; k < planes; ++k)
        acc[k] = _mm_add_epi8(acc[k], bits == 8 ? v : _mm_and_si128(_mm_srli_epi16(v, k * bits), mask));
    }
    for (int k = 0; k < planes; ++k) {
      const i64 column = k * B + first;
      _mm_store_si128(reinterpret_cast<__m128i*>(sums), acc[k]);
      const i64 count = C - column < n ? C - column : n;
      for (i64 i = 0; i < count; ++i) out[column + i] += sums[i];
    }
  }
}

template <int bits>
QGNN_INLINE void sum_bytes32(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 B, i64 C,
                             i64 row, i64 last_edge, i64 first, std::int32_t* out) {
  constexpr int planes = 8 / bits;
  constexpr i64 flush = 255 / ((1 << bits) - 1);
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
  alignas(32) std::uint8_t sums[32];
  for (i64 e = indptr[row]; e < indptr[row + 1];) {
    const i64 stop = e + flush < indptr[row + 1] ? e + flush : indptr[row + 1];
    __m256i acc[planes];
    for (int k = 0; k < planes; ++k) acc[k] = _mm256_setzero_si256();
    for (; e < stop; ++e) {
      _mm_prefetch(reinterpret_cast<const char*>(
          payload + static_cast<i64>(indices[e + kAhead < last_edge ? e + kAhead : e]) * B + first), _MM_HINT_T0);
      const __m256i v = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(payload + static_cast<i64>(indices[e]) * B + first));
      for (int k = 0; k < planes; ++k)
        acc[k] = _mm256_add_epi8(acc[k], bits == 8 ? v : _mm256_and_si256(_mm256_srli_epi16(v, k * bits), mask));
    }
    for (int k = 0; k < planes; ++k) {
      const i64 column = k * B + first;
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums), acc[k]);
      const i64 count = C - column < 32 ? C - column : 32;
      for (i64 i = 0; i < count; ++i) out[column + i] += sums[i];
    }
  }
}

template <int bits>
QGNN_INLINE void sum_row(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                         i64 row, i64 last_edge, std::int32_t* sum) {
  const i64 B = row_bytes(C, bits);
  std::memset(sum, 0, C * sizeof(std::int32_t));
  i64 first = 0;
  for (; first + 32 <= B; first += 32) sum_bytes32<bits>(indptr, indices, payload, B, C, row, last_edge, first, sum);
  for (; first < B; first += 16)
    sum_bytes16<bits>(indptr, indices, payload, M * B, B, C, row, last_edge, first, sum);
}

static void sum_codes_row(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                          int bits, i64 row, i64 last_edge, std::int32_t* sum) {
  switch (bits) {
    case 1: return sum_row<1>(indptr, indices, payload, M, C, row, last_edge, sum);
    case 2: return sum_row<2>(indptr, indices, payload, M, C, row, last_edge, sum);
    case 4: return sum_row<4>(indptr, indices, payload, M, C, row, last_edge, sum);
    default: return sum_row<8>(indptr, indices, payload, M, C, row, last_edge, sum);
  }
}

static void aggregate_codes(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                            int bits, std::int32_t* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    sum_codes_row(indptr, indices, payload, M, C, bits, row, indptr[end], out + row * C);
}

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

static void matmul_codes_dense(const std::int16_t* codes, const std::int16_t* blocks, i64 F, i64 H, std::int32_t* out,
                               i64 begin, i64 end) {
  for (i64 row = begin; row < end;) {
    const i64 height = end - row < 6 ? 1 : 6;
    for (i64 j = 0; j < H; j += kBlock) {
      const std::int16_t* w = blocks + j * F;
      const i64 width = H - j < kBlock ? H - j : kBlock;
      if (height == 6) code_tile<6>(codes + row * F, w, F, width, H, out + row * H + j);
      else code_tile<1>(codes + row * F, w, F, width, H, out + row * H + j);
    }
    row += height;
  }
}

// Four groups a register, each number in the low half of 64 bits: what vpmuludq reads, whatever the high half holds.
static void draw_groups(const Key& key, i64 row, i64 group, std::uint32_t out[4 * kGroups]) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  __m256i c[2][4];
  for (int half = 0; half < 2; ++half) {
    const __m256i groups = _mm256_add_epi64(_mm256_set1_epi64x(group + 4 * half), _mm256_set_epi64x(3, 2, 1, 0));
    c[half][0] = _mm256_set1_epi64x(row);
    c[half][1] = _mm256_or_si256(_mm256_set1_epi64x(row >> 32), _mm256_slli_epi64(groups, 8));
    c[half][2] = _mm256_set1_epi64x(key.epoch);
    c[half][3] = _mm256_set1_epi64x(key.layer | key.stage << 16 | key.round << 24);
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key.seed), k1 = static_cast<std::uint32_t>(key.seed >> 32);
  for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (auto& x : c) {
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

}  // namespace avx2
}  // namespace qgnn

#include "layer_body.h"

namespace qgnn {
using namespace avx2;
QGNN_TABLE(kernels_avx2, "avx2");

}  // namespace qgnn
