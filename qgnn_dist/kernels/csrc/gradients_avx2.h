// SPDX-License-Identifier: Apache-2.0
// Sums of coded gradient rows with AVX2. Eight bytes of a row are widened to eight numbers, from which every plane is a
// shift away; at 2 bits a row's four values are looked up in a register. Each term is exact, so its sums are those of
// the scalar twin. Included once, into the AVX2 build.

namespace qgnn {
namespace avx2 {

// The values of a row's codes, from numbers of which the lowest bits are a code.
template <int bits>
struct RowValues {
  __m256 scale, zero;
  QGNN_MEMBER explicit RowValues(float s)
      : scale(_mm256_set1_ps(s)), zero(_mm256_mul_ps(scale, _mm256_set1_ps(static_cast<float>(zero_code(bits))))) {}
  QGNN_MEMBER __m256 operator()(__m256i v, bool last) const {
    if (!last) v = _mm256_and_si256(v, _mm256_set1_epi32((1 << bits) - 1));
    return _mm256_fmsub_ps(_mm256_cvtepi32_ps(v), scale, zero);  // exact, so that it rounds as two steps would
  }
};

template <>
struct RowValues<2> {
  __m256 table;
  QGNN_MEMBER explicit RowValues(float s)
      : table(_mm256_mul_ps(_mm256_set1_ps(s), _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2))) {}
  QGNN_MEMBER __m256 operator()(__m256i v, bool) const { return _mm256_permutevar_ps(table, v); }
};

// A byte's values at scale 1, one after the other.
template <int bits>
struct ByteValues {
  static constexpr int planes = 8 / bits;
  float at[256][planes];
  constexpr ByteValues() : at() {
    for (int byte = 0; byte < 256; ++byte)
      for (int k = 0; k < planes; ++k)
        at[byte][k] = static_cast<float>(((byte >> (k * bits)) & ((1 << bits) - 1)) - zero_code(bits));
  }
  QGNN_MEMBER __m128 operator()(std::uint8_t byte) const {
    const float* values = at[byte];
    if constexpr (planes == 4) return _mm_loadu_ps(values);
    else if constexpr (planes == 2) return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
    else return _mm_load_ss(values);
  }
};
template <int bits>
static constexpr ByteValues<bits> kByteValues;

struct ScaledSums {
  static constexpr i64 kScaledAhead = 24;
  static constexpr int kAccumulators = 8;
  const std::int32_t* indices;
  const std::uint8_t* payload;
  const i64 C, B, limit, last_edge;
  const int bits;

  ScaledSums(const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C, int bits, i64 last_edge)
      : indices(indices), payload(payload), C(C), B(row_bytes(C, bits)), limit(M * (B + 1)), last_edge(last_edge),
        bits(bits) {}

  // Eight bytes from `at` on; rows shorter than that may be the buffer's last ones.
  template <bool narrow>
  QGNN_MEMBER __m256i load(i64 at) const {
    if (narrow && __builtin_expect(at + 8 > limit, 0)) {
      alignas(8) std::uint8_t part[8] = {0};
      std::memcpy(part, payload + at, limit - at);
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(part)));
    }
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(payload + at)));
  }

  // `blocks` times eight bytes of the neighbours begin..end, from `first` on, the last block from `last` on.
  template <int b, int blocks, bool narrow>
  QGNN_MEMBER void add(i64 begin, i64 end, i64 first, i64 last, float* sum) const {
    constexpr int planes = 8 / b;
    __m256 acc[blocks][planes];
    for (auto& block : acc)
      for (auto& plane : block) plane = _mm256_setzero_ps();
    for (i64 e = begin; e < end; ++e) {
      const std::uint8_t* later =
          payload + static_cast<i64>(indices[e + kScaledAhead < last_edge ? e + kScaledAhead : e]) * (B + 1);
      _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(later + B), _MM_HINT_T0);
      const i64 at = static_cast<i64>(indices[e]) * (B + 1);
      const RowValues<b> values(kScales.at[payload[at + B]]);
#pragma GCC unroll 8
      for (int i = 0; i < blocks; ++i) {
        const __m256i v = load<narrow>(at + (i + 1 < blocks ? first + 8 * i : last));
#pragma GCC unroll 4
        for (int k = 0; k < planes; ++k)
          acc[i][k] = _mm256_add_ps(acc[i][k], values(k == 0 ? v : _mm256_srli_epi32(v, k * b), k + 1 == planes));
      }
    }
    // In order of the planes: what a narrow row's plane has too much falls on the next plane, which is stored later.
    for (int i = 0; i < blocks; ++i)
      for (int k = 0; k < planes; ++k)
        _mm256_storeu_ps(sum + k * B + (i + 1 < blocks ? first + 8 * i : last), acc[i][k]);
  }

  // Rows of `bytes` bytes, as few classes have: a look-up a byte.
  template <int b, int bytes>
  QGNN_MEMBER void add_bytes(i64 begin, i64 end, float* sum) const {
    constexpr int planes = 8 / b;
    __m128 acc[bytes];
    for (auto& part : acc) part = _mm_setzero_ps();
    for (i64 e = begin; e < end; ++e) {
      const i64 later = indices[e + kScaledAhead < last_edge ? e + kScaledAhead : e];
      _mm_prefetch(reinterpret_cast<const char*>(payload + later * (bytes + 1)), _MM_HINT_T0);
      const std::uint8_t* row = payload + static_cast<i64>(indices[e]) * (bytes + 1);
      const __m128 scale = _mm_broadcast_ss(&kScales.at[row[bytes]]);
#pragma GCC unroll 4
      for (int i = 0; i < bytes; ++i) acc[i] = _mm_add_ps(acc[i], _mm_mul_ps(kByteValues<b>(row[i]), scale));
    }
    for (int i = 0; i < bytes; ++i) {
      float values[4];
      _mm_storeu_ps(values, acc[i]);
      for (int k = 0; k < planes; ++k) sum[k * bytes + i] = values[k];
    }
  }

  template <int b>
  QGNN_MEMBER void row(i64 begin, i64 end, float* sum) const {
    constexpr int most = kAccumulators * b / 8;
    if (B == 1) return add_bytes<b, 1>(begin, end, sum);
    if (B == 2) return add_bytes<b, 2>(begin, end, sum);
    if (B < 8) return add<b, 1, true>(begin, end, 0, 0, sum);
    for (i64 first = 0; first < B; first += 8 * most) {  // the last block is moved back to end with the row
      const i64 left = B - first, blocks = left < 8 * most ? (left + 7) / 8 : most;
      const i64 last = first + 8 * blocks > B ? B - 8 : first + 8 * (blocks - 1);
      with_parts<most>(blocks, [=, this]<int parts>() __attribute__((always_inline)) {
        add<b, parts, false>(begin, end, first, last, sum);
      });
    }
  }

  // Columns of the neighbours begin..end, in the order of the row; `sum` has room for kSlack more than C.
  void operator()(i64 begin, i64 end, float* sum) const {
    switch (bits) {
      case 2: return row<2>(begin, end, sum);
      case 4: return row<4>(begin, end, sum);
      default: return row<8>(begin, end, sum);
    }
  }
};

}  // namespace avx2
}  // namespace qgnn
