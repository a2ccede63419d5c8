// SPDX-License-Identifier: Apache-2.0
// The perceptron where features, hidden values and weights have 2 bits: products by look-up. Two neighbouring codes of a
// row are the index into a table of the 16 sums that a column's two weights can give; one vpshufb looks 32 rows up, 64
// products an instruction. Rows lie side by side in the registers, and stay so from the features to the scores: what one
// product gives for two columns is coded into the next one's indices at once.
// Included once, into the AVX2 build.

namespace qgnn {
namespace avx2 {

// Sums of table entries for two columns of weights and kLookupRows rows. `index`: (pairs, kLookupRows); `tables`: of a
// column, 16 bytes a pair; 8-bit sums are moved to 16 bits before they could overflow.
QGNN_INLINE void look_up(const std::uint8_t* index, const std::uint8_t* first, const std::uint8_t* second, i64 pairs,
                         i64 flush, std::uint16_t (*sums)[kLookupRows]) {
  std::memset(sums, 0, 2 * sizeof sums[0]);
  for (i64 from = 0; from < pairs; from += flush) {
    const i64 to = from + flush < pairs ? from + flush : pairs;
    __m256i acc[2][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[0][r] = acc[1][r] = _mm256_setzero_si256();
    for (i64 p = from; p < to; ++p) {
      const __m256i a = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(first + 16 * p)));
      const __m256i b = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(second + 16 * p)));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m256i at = _mm256_load_si256(reinterpret_cast<const __m256i*>(index + p * kLookupRows + 32 * r));
        acc[0][r] = _mm256_add_epi8(acc[0][r], _mm256_shuffle_epi8(a, at));
        acc[1][r] = _mm256_add_epi8(acc[1][r], _mm256_shuffle_epi8(b, at));
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        auto* to16 = reinterpret_cast<__m256i*>(sums[k] + 32 * r);
        const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(acc[k][r]));
        const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(acc[k][r], 1));
        _mm256_store_si256(to16, _mm256_add_epi16(_mm256_load_si256(to16), low));
        _mm256_store_si256(to16 + 1, _mm256_add_epi16(_mm256_load_si256(to16 + 1), high));
      }
  }
}

// 16 indices of pairs from 32 codes, each less `low`.
QGNN_INLINE __m128i pair_up(const std::int16_t* codes, __m128i low) {
  const __m128i one_four = _mm_set1_epi32(4 << 16 | 1);
  __m128i pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pairs[i] = _mm_madd_epi16(
        _mm_sub_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8 * i)), low), one_four);
  return _mm_packus_epi16(_mm_packs_epi32(pairs[0], pairs[1]), _mm_packs_epi32(pairs[2], pairs[3]));
}

// 16 by 16 bytes: four rounds that each interleave the two halves.
QGNN_INLINE void transpose16(__m128i* rows) {
  __m128i other[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    __m128i *from = round % 2 == 0 ? rows : other, *to = round % 2 == 0 ? other : rows;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
    }
  }
}

// Rows of codes, each less `low`, to indices of pairs; rows past `count` and a feature without partner have code 0.
QGNN_INLINE void pair_indices(const std::int16_t* codes, i64 count, i64 F, std::int16_t low, std::uint8_t* index) {
  const i64 pairs = (F + 1) / 2;
  const __m128i lowest = _mm_set1_epi16(low);
  for (i64 first = 0; first < kLookupRows; first += 16)
    for (i64 p = 0; p < pairs; p += 16) {
      __m128i block[16];
      for (i64 i = 0; i < 16; ++i) {
        const std::int16_t* in = codes + (first + i) * F + 2 * p;
        if (first + i < count && 2 * p + 32 <= F) {
          block[i] = pair_up(in, lowest);
          continue;
        }
        alignas(16) std::int16_t part[32];
        const i64 there = first + i < count ? F - 2 * p : 0;
        for (i64 f = 0; f < 32; ++f) part[f] = f < there ? in[f] : low;
        block[i] = pair_up(part, lowest);
      }
      transpose16(block);
      const i64 there = pairs - p < 16 ? pairs - p : 16;
      for (i64 i = 0; i < there; ++i)
        _mm_store_si128(reinterpret_cast<__m128i*>(index + (p + i) * kLookupRows + first), block[i]);
    }
}

QGNN_INLINE bool within_four(const std::int16_t* codes, i64 count, std::int16_t* low) {
  std::int16_t least = codes[0], most = codes[0];
  for (i64 i = 0; i < count; ++i) {
    least = codes[i] < least ? codes[i] : least;
    most = codes[i] > most ? codes[i] : most;
  }
  *low = least;
  return most - least <= 3;
}

// 8 sums of 16 bits as numbers, less what the tables and the codes' lowest value add to them.
QGNN_INLINE F8 lookup_sums(const std::uint16_t* sums, std::int32_t surplus) {
  const I8 whole = (I8)_mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(sums)));
  return __builtin_convertvector(whole - surplus, F8);
}

QGNN_INLINE I8 hidden8(F8 acc, F8 scale, float bias, float step, float top) {
  F8 v = (acc * scale + bias) / step;
  v = v > 0.0f ? v : F8{};
  const F8 high = F8{} + top;
  v = v < high ? v : high;
  return __builtin_convertvector((v + 12582912.0f) - 12582912.0f, I8);  // half to even
}

// As perceptron_rows, `count` rows up to kLookupRows. `scratch`: kLookupRows bytes for each pair of features and of
// hidden columns, from a multiple of 32 on. False where the codes are not within four numbers of each other.
static bool perceptron_lookup(const Perceptron& net, i64 row, i64 count, std::uint8_t* scratch) {
  const i64 F = net.F, H = net.H, C = net.C, pairs1 = (F + 1) / 2, pairs2 = (H + 1) / 2;
  std::int16_t low = 0;
  if (!within_four(net.codes + row * F, count * F, &low)) return false;
  std::uint8_t* index1 = scratch;
  std::uint8_t* index2 = scratch + pairs1 * kLookupRows;
  pair_indices(net.codes + row * F, count, F, low, index1);
  alignas(32) std::uint16_t sums[2][kLookupRows];
  alignas(32) float scale[kLookupRows] = {0};
  for (i64 k = 0; k < count; ++k) scale[k] = net.scale[row + k] * net.step1;
  const float top = static_cast<float>((1 << net.hidden_bits) - 1);
  const LookupTables &one = net.lookup1, &two = net.lookup2;
  for (i64 j = 0; j < H; j += 2) {
    const bool partner = j + 1 < H;
    const std::uint8_t* tables = one.tables + j * pairs1 * 16;
    look_up(index1, tables, partner ? tables + pairs1 * 16 : tables, pairs1, one.flush, sums);
    const std::int32_t surplus0 = static_cast<std::int32_t>(pairs1) * one.shift - low * net.blocks1.sums[j];
    const std::int32_t surplus1 = partner ? static_cast<std::int32_t>(pairs1) * one.shift - low * net.blocks1.sums[j + 1] : 0;
    for (i64 k = 0; k < kLookupRows; k += 8) {
      const F8 by = load8(scale + k, 8);
      I8 codes = hidden8(lookup_sums(sums[0] + k, surplus0), by, net.bias1[j], net.hidden_step, top);
      if (partner)
        codes |= hidden8(lookup_sums(sums[1] + k, surplus1), by, net.bias1[j + 1], net.hidden_step, top) << 2;
      store_low_bytes(narrow16(codes), index2 + j / 2 * kLookupRows + k);
    }
  }
  for (i64 j = 0; j < C; j += 2) {
    const bool partner = j + 1 < C;
    const std::uint8_t* tables = two.tables + j * pairs2 * 16;
    look_up(index2, tables, partner ? tables + pairs2 * 16 : tables, pairs2, two.flush, sums);
    const std::int32_t surplus = static_cast<std::int32_t>(pairs2) * two.shift;
    for (i64 k = 0; k < count; k += 8) {
      alignas(32) float scores[2][8];
      for (int half = 0; half < 1 + partner; ++half)
        store8(lookup_sums(sums[half] + k, surplus) * net.scale2 + net.bias2[j + half], scores[half], 8);
      float* out = net.out + (row + k) * C + j;
      const i64 n = count - k < 8 ? count - k : 8;
      for (i64 i = 0; i < n; ++i)
        for (int half = 0; half < 1 + partner; ++half) out[i * C + half] = scores[half][i];
    }
  }
  return true;
}

// 8 by 8 numbers of 16 bits.
QGNN_INLINE void transpose8(__m128i* rows) {
  __m128i other[8];
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    __m128i *from = round % 2 == 0 ? rows : other, *to = round % 2 == 0 ? other : rows;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]);
      to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
    }
  }
  for (int i = 0; i < 8; ++i) rows[i] = other[i];
}

// Up to kLookupRows rows of codes (F) times the weights of `s`, to `out` (count, H). `index`: kLookupRows bytes for each
// pair of features, from a multiple of 32 on. False where the codes are not within four numbers of each other.
static bool lookup_product(const ThinnedProduct& s, const std::int16_t* codes, i64 count, float* out,
                           std::uint8_t* index) {
  const i64 F = s.F, H = s.H, pairs = (F + 1) / 2;
  std::int16_t low = 0;
  if (!within_four(codes, count * F, &low)) return false;
  pair_indices(codes, count, F, low, index);
  alignas(32) std::uint16_t sums[16][kLookupRows];  // of 16 columns, rows side by side
  alignas(32) std::int32_t surplus[16] = {};
  for (i64 j = 0; j < H; j += 16) {
    const i64 width = H - j < 16 ? H - j : 16;
    for (i64 k = 0; k < width; k += 2) {
      const std::uint8_t* tables = s.lookup.tables + (j + k) * pairs * 16;
      look_up(index, tables, k + 1 < width ? tables + pairs * 16 : tables, pairs, s.lookup.flush, sums + k);
    }
    for (i64 k = 0; k < width; ++k)
      surplus[k] = static_cast<std::int32_t>(pairs) * s.lookup.shift - low * s.column_sums[j + k];
    for (i64 c = 0; c < width; c += 8) {
      const i64 there = width - c < 8 ? width - c : 8;
      const I8 less = (I8)_mm256_load_si256(reinterpret_cast<const __m256i*>(surplus + c));
      for (i64 k = 0; k < count; k += 8) {
        __m128i block[8];
        for (i64 i = 0; i < 8; ++i) block[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(sums[c + (i < there ? i : 0)] + k));
        transpose8(block);
        for (i64 i = 0; i < 8 && k + i < count; ++i) {
          const I8 whole = (I8)_mm256_cvtepu16_epi32(block[i]) - less;
          store8(__builtin_convertvector(whole, F8), out + (k + i) * H + j + c, there);
        }
      }
    }
  }
  return true;
}

}  // namespace avx2
}  // namespace qgnn
