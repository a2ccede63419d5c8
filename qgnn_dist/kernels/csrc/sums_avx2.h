// SPDX-License-Identifier: Apache-2.0
// Sums of packed codes with AVX2, 32 bytes an instruction. Codes are added in the fields that they come in: two fields
// of b bits move to two registers of 2b bits, which take 2^b + 1 vectors before they move on in turn, so that most
// vectors cost five instructions whatever their width. Shift-and-mask needs no shuffle because the bit order is planar.
// Rows of a byte or two, as few classes have, are looked up instead. Included once, into the AVX2 build.

namespace qgnn {
namespace avx2 {

constexpr i64 kAhead = 48;  // neighbours: far enough to hide a cache miss, near enough to stay in the first level

// The neighbours' rows. `first`: the byte of a row that a block begins with.
struct CodeSums {
  const std::int32_t* indices;
  const std::uint8_t* payload;
  const i64 C, B, limit, last_edge;
  const int bits;

  CodeSums(const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C, int bits, i64 last_edge)
      : indices(indices), payload(payload), C(C), B(row_bytes(C, bits)), limit(M * B), last_edge(last_edge),
        bits(bits) {}

  QGNN_MEMBER i64 place(i64 e, i64 first) const { return static_cast<i64>(indices[e]) * B + first; }
  // Of a row that ends at `end`: how far to look ahead without leaving the edges.
  QGNN_MEMBER i64 ahead(i64 end) const { return last_edge - end < kAhead ? last_edge - end : kAhead; }
  QGNN_MEMBER void prefetch(i64 e, i64 first) const {
    _mm_prefetch(reinterpret_cast<const char*>(payload + place(e, first)), _MM_HINT_T0);
  }
  template <class Register>
  QGNN_MEMBER Register load(i64 e, i64 first) const {
    const i64 at = place(e, first);
    Register v;
    if (__builtin_expect(at + static_cast<i64>(sizeof v) <= limit, 1)) {
      std::memcpy(&v, payload + at, sizeof v);
    } else {  // the buffer's last rows: never read past its end
      alignas(32) std::uint8_t tail[sizeof v] = {0};
      std::memcpy(tail, payload + at, limit - at);
      std::memcpy(&v, tail, sizeof v);
    }
    return v;
  }

  // Of the neighbours begin..end, too few for a sum to leave 16 bits; `sum` has room for kSlack more than C.
  void operator()(i64 begin, i64 end, std::uint16_t* sum) const;
};

// 16 bytes of two neighbours side by side; their sums are added up at the end.
struct TwoRows {
  static constexpr int edges = 2, parts = 1;
  QGNN_INLINE __m256i load(const CodeSums& s, i64 e, i64 stop, i64 ahead, i64 first) {
    const i64 both = e + 1 < stop;  // an odd neighbour stands beside nothing; a branch would be guessed wrong half the time
    s.prefetch(e + ahead, first);
    s.prefetch(e + ahead + both, first);
    const __m128i other = _mm_and_si128(s.load<__m128i>(e + both, first), _mm_set1_epi64x(-both));
    return _mm256_set_m128i(other, s.load<__m128i>(e, first));
  }
  QGNN_INLINE __m256i part(__m256i v, int) {
    return _mm256_add_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(v)),
                            _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1)));
  }
};

// 32 bytes of one neighbour.
struct OneRow {
  static constexpr int edges = 1, parts = 2;
  QGNN_INLINE __m256i load(const CodeSums& s, i64 e, i64, i64 ahead, i64 first) {
    s.prefetch(e + ahead, first);
    return s.load<__m256i>(e, first);
  }
  QGNN_INLINE __m256i part(__m256i v, int i) {
    return _mm256_cvtepu8_epi16(i == 0 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1));
  }
};

// Fields of `width` bits; register q holds the planes q, q + width/bits, ...
template <int bits, int width>
struct Fields {
  __m256i at[width / bits];
};

// Adds up neighbours from e on, as many as the fields hold, and moves e behind them.
template <class Rows, int bits, int width>
QGNN_INLINE Fields<bits, width> collect(const CodeSums& s, i64& e, i64 stop, i64 ahead, i64 first) {
  Fields<bits, width> sum;
  if constexpr (width == bits) {
    sum.at[0] = Rows::load(s, e, stop, ahead, first);
    e += Rows::edges;
  } else {
    constexpr int narrow = width / 2, count = narrow / bits, room = (1 << narrow) + 1;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(width == 8 ? 0x0F : width == 4 ? 0x33 : 0x55));
#pragma GCC unroll 8
    for (int q = 0; q < 2 * count; ++q) sum.at[q] = _mm256_setzero_si256();
    for (int i = 0; i < room && e < stop; ++i) {
      const Fields<bits, narrow> more = collect<Rows, bits, narrow>(s, e, stop, ahead, first);
#pragma GCC unroll 8
      for (int q = 0; q < count; ++q) {
        sum.at[q] = _mm256_add_epi8(sum.at[q], _mm256_and_si256(more.at[q], mask));
        sum.at[q + count] = _mm256_add_epi8(
            sum.at[q + count], _mm256_and_si256(_mm256_srli_epi16(more.at[q], narrow), mask));
      }
    }
  }
  return sum;
}

// Bytes first.. of the neighbours begin..end, added up into the columns that they hold. Whole registers are stored:
// where a row is shorter than one, a plane's surplus falls on the next plane, which is stored later, or behind the row,
// where `out` must have kSlack more.
template <class Rows, int bits>
QGNN_INLINE void sum_block(const CodeSums& s, i64 begin, i64 end, i64 first, std::uint16_t* out) {
  constexpr int planes = 8 / bits, parts = Rows::parts;
  const i64 ahead = s.ahead(end);
  i64 e = begin;
  __m256i wide[planes * parts];
#pragma GCC unroll 16
  for (int k = 0; k < planes * parts; ++k) wide[k] = _mm256_setzero_si256();
  while (e < end) {
    const Fields<bits, 8> sum = collect<Rows, bits, 8>(s, e, end, ahead, first);
#pragma GCC unroll 16
    for (int k = 0; k < planes * parts; ++k)
      wide[k] = _mm256_add_epi16(wide[k], Rows::part(sum.at[k / parts], k % parts));
  }
#pragma GCC unroll 16
  for (int k = 0; k < planes * parts; ++k)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k / parts * s.B + first + 16 * (k % parts)), wide[k]);
}

// A byte's codes, each in a field of its own: 16 bits, or 8 where there are eight.
template <int bits>
struct Spread {
  static constexpr int planes = 8 / bits, field = 64 / planes < 16 ? 64 / planes : 16;
  static constexpr i64 room = field < 16 ? (1 << field) - 1 : 65535 >> bits;  // neighbours that a field takes
  std::uint64_t at[256];
  constexpr Spread() : at() {
    for (int byte = 0; byte < 256; ++byte)
      for (int k = 0; k < planes; ++k)
        at[byte] |= static_cast<std::uint64_t>((byte >> (k * bits)) & ((1 << bits) - 1)) << (k * field);
  }
};
template <int bits>
static constexpr Spread<bits> kSpread;

// Rows of `bytes` bytes. The processor runs ahead of loads as small as these by itself.
template <int bits, int bytes>
static void sum_bytes(const CodeSums& s, i64 begin, i64 end, std::uint16_t* out) {
  using Codes = Spread<bits>;
  std::uint16_t sum[Codes::planes * bytes] = {0};
  for (i64 e = begin; e < end;) {
    const i64 stop = end - e < Codes::room ? end : e + Codes::room;
    std::uint64_t fields[bytes] = {0};
    for (; e < stop; ++e) {
      const std::uint8_t* row = s.payload + s.place(e, 0);
#pragma GCC unroll 4
      for (int i = 0; i < bytes; ++i) fields[i] += kSpread<bits>.at[row[i]];
    }
    for (int k = 0; k < Codes::planes; ++k)
      for (int i = 0; i < bytes; ++i)
        sum[k * bytes + i] += static_cast<std::uint16_t>((fields[i] >> (k * Codes::field)) & ((1 << Codes::field) - 1));
  }
  std::memcpy(out, sum, sizeof sum);
}

// Blocks of whole registers; the last one is moved back to end with the row, and adds some columns up again.
template <int bits>
static void sum_row(const CodeSums& s, i64 begin, i64 end, std::uint16_t* sum) {
  if (s.B == 1) return sum_bytes<bits, 1>(s, begin, end, sum);
  if (s.B == 2) return sum_bytes<bits, 2>(s, begin, end, sum);
  if (s.B <= 16) return sum_block<TwoRows, bits>(s, begin, end, 0, sum);
  i64 first = 0;
  for (; first + 32 <= s.B; first += 32) sum_block<OneRow, bits>(s, begin, end, first, sum);
  const i64 left = s.B - first;
  if (left > 16 && s.B >= 32) return sum_block<OneRow, bits>(s, begin, end, s.B - 32, sum);
  if (left > 16) sum_block<TwoRows, bits>(s, begin, end, 0, sum);  // two blocks that overlap
  if (left > 0) sum_block<TwoRows, bits>(s, begin, end, s.B - 16, sum);
}

inline void CodeSums::operator()(i64 begin, i64 end, std::uint16_t* sum) const {
  switch (bits) {
    case 1: return sum_row<1>(*this, begin, end, sum);
    case 2: return sum_row<2>(*this, begin, end, sum);
    case 4: return sum_row<4>(*this, begin, end, sum);
    default: return sum_row<8>(*this, begin, end, sum);
  }
}

}  // namespace avx2
}  // namespace qgnn
