// SPDX-License-Identifier: Apache-2.0
// The AVX2 build: the same body, vectorised by the compiler, and two kernels by hand. Codes are added in 8 bits, 32 of
// them an instruction, and moved to 32 bits before they could overflow; shift-and-mask needs no shuffle because the bit
// order is planar. Products of codes use vpmaddwd: 16-bit pairs cannot saturate it.
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
static void aggregate(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                      std::int32_t* out, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits), last_edge = indptr[end];
  for (i64 row = begin; row < end; ++row) {
    std::int32_t* sum = out + row * C;
    std::memset(sum, 0, C * sizeof(std::int32_t));
    i64 first = 0;
    for (; first + 32 <= B; first += 32) sum_bytes32<bits>(indptr, indices, payload, B, C, row, last_edge, first, sum);
    for (; first < B; first += 16)
      sum_bytes16<bits>(indptr, indices, payload, M * B, B, C, row, last_edge, first, sum);
  }
}

static void aggregate_codes(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                            int bits, std::int32_t* out, i64 begin, i64 end) {
  switch (bits) {
    case 1: return aggregate<1>(indptr, indices, payload, M, C, out, begin, end);
    case 2: return aggregate<2>(indptr, indices, payload, M, C, out, begin, end);
    case 4: return aggregate<4>(indptr, indices, payload, M, C, out, begin, end);
    default: return aggregate<8>(indptr, indices, payload, M, C, out, begin, end);
  }
}

// Four rows by sixteen columns stay in registers over all pairs of features.
static void matmul_codes_dense(const std::int16_t* codes, const std::int16_t* pairs, i64 F, i64 H, std::int32_t* out,
                               i64 begin, i64 end) {
  const i64 P = (F + 1) / 2;
  for (i64 row = begin; row < end; row += 4) {
    const i64 height = end - row < 4 ? end - row : 4;
    for (i64 j = 0; j < H; j += 16) {
      const i64 width = H - j < 16 ? H - j : 16;
      __m256i acc[4][2];
      for (auto& a : acc) a[0] = a[1] = _mm256_setzero_si256();
      for (i64 p = 0; p < P; ++p) {
        const std::int16_t* w = pairs + (p * H + j) * 2;
        __m256i w0, w1;
        if (width == 16) {
          w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16));
        } else {
          alignas(32) std::int16_t tail[32] = {0};
          std::memcpy(tail, w, width * 2 * sizeof(std::int16_t));
          w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tail));
          w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tail + 16));
        }
        for (i64 r = 0; r < height; ++r) {
          const std::int16_t* x = codes + (row + r) * F + 2 * p;
          const std::uint32_t low = static_cast<std::uint16_t>(x[0]);
          const std::uint32_t high = 2 * p + 1 < F ? static_cast<std::uint16_t>(x[1]) : 0u;
          const __m256i both = _mm256_set1_epi32(static_cast<std::int32_t>(low | high << 16));
          acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(both, w0));
          acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(both, w1));
        }
      }
      for (i64 r = 0; r < height; ++r) {
        alignas(32) std::int32_t sums[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums), acc[r][0]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8), acc[r][1]);
        std::memcpy(out + (row + r) * H + j, sums, width * sizeof(std::int32_t));
      }
    }
  }
}

}  // namespace avx2

using namespace avx2;
QGNN_TABLE(kernels_avx2, "avx2");

}  // namespace qgnn
