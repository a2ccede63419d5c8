// SPDX-License-Identifier: Apache-2.0
// Coded gradients: rows of codes with a scale each, rounded at random by a key and a place alone. Included after
// layer_body.h, which packs, and after what each instruction set has of its own: ScaledSums, the sums of such rows, and
// registers of random numbers and their largest.

namespace qgnn {
namespace QGNN_ISA {

typedef std::uint32_t W8 __attribute__((vector_size(32)));

// As many rows at a time as fit, so that each pass over them loads what was stored long before.
struct GradientScratch {
  static constexpr i64 kMost = kGroups;
  const i64 stride, rows, groups;
  alignas(32) float sums[kLayerColumns + kSlack];
  alignas(32) std::uint8_t codes[kLayerColumns + kSlack];
  std::uint8_t scale[kMost];

  explicit GradientScratch(i64 C)
      : stride((C + kSlack + 31) / 32 * 32), rows(kLayerColumns / stride < 1 ? 1
                                                  : kLayerColumns / stride < kMost ? kLayerColumns / stride : kMost),
        groups((C + 15) / 16) {}

  // Draws the numbers of `count` rows, four for every 16 columns.
  QGNN_MEMBER void draw(const Key& key, const i64* places, i64 count) {
    if (rows == kMost) {  // eight rows at a time
      i64 place[kMost], same[kMost];
      for (i64 k = 0; k < kMost; ++k) place[k] = places[k < count ? k : count - 1];
      for (i64 group = 0; group < groups; ++group) {
        for (i64& one : same) one = group;
        draw_places(key, place, same, words_ + group * 4 * kMost);
      }
    } else {
      for (i64 k = 0; k < count; ++k)
        for (i64 group = 0; group < groups; group += kGroups)
          draw_groups(key, places[k], group, words_ + (k * padded() + group) * 4);
    }
  }
  // Those of columns 16·group.. of a row.
  QGNN_MEMBER const std::uint32_t* words(i64 k, i64 group) const {
    return words_ + (rows == kMost ? group * kMost + k : k * padded() + group) * 4;
  }

 private:
  QGNN_MEMBER i64 padded() const { return (groups + kGroups - 1) / kGroups * kGroups; }
  alignas(32) std::uint32_t words_[kLayerColumns / 4 + 32 * kGroups];
};

// Of columns j..j+7, 31 bits each. Four columns share a number, turned by a byte each: every one is uniform, and the
// upper bytes, which nearly always decide, are independent.
QGNN_INLINE I8 chances(const GradientScratch& scratch, i64 k, i64 j) {
  const W8 w = (W8)four_twice(scratch.words(k, j / 16));
  const W8 turn = j % 16 == 0 ? W8{0, 0, 0, 0, 8, 8, 8, 8} : W8{16, 16, 16, 16, 24, 24, 24, 24};
  return (I8)((w << turn | w >> 1 >> (31 - turn)) >> 1);
}

// The exponent of the least power of two of which `levels` reach the number with these bits: 2^(b-1), or one fewer.
QGNN_INLINE int least_exponent(std::int32_t word, int bits, bool one_fewer) {
  const int exponent = (word >> 23) - 127, fraction = word & 0x7FFFFF;
  if (!one_fewer) return exponent - (bits - 1) + (fraction != 0);
  return exponent - (bits - 2) + (fraction > (1 << 23) - (1 << (25 - bits)));
}

// The scale byte of one·x.
QGNN_INLINE std::uint8_t scale_byte(const float* x, float one, i64 C, int bits) {
  I8 above{}, below{};  // positive floats are ordered as their bits are, NaN is past all of them
  for (i64 j = 0; j < C; j += 8) {
    const I8 up = (I8)(one * load8(x + j, C - j < 8 ? C - j : 8)), down = up ^ static_cast<std::int32_t>(0x80000000);
    above = up > above ? up : above;
    below = down > below ? down : below;
  }
  const std::int32_t high = largest(above), low = largest(below), most = low > high ? low : high;
  if (most == 0) return kZeroRow;
  int e = least_exponent(most, bits, false);
  const int other = least_exponent(low > high ? high : low, bits, true);
  e = other > e ? other : e;
  e = kLeastExponent > e ? kLeastExponent : e;
  if (most >= 0x7F800000 || e > kMostExponent) return kOddRow;
  return static_cast<std::uint8_t>(e + kExponentBias) | (low > high ? kNegated : 0);
}

// Levels of row k of the scratch, before packing.
QGNN_INLINE void code_levels(const float* x, float one, i64 C, int bits, i64 k, GradientScratch& scratch) {
  const std::uint8_t scale = scratch.scale[k];
  std::uint8_t* codes = scratch.codes + k * scratch.stride;
  const std::int32_t flip = scale & kNegated ? -1 : 0, zero = zero_code(bits);
  const std::uint32_t word = static_cast<std::uint32_t>(127 + kExponentBias - (scale & 127)) << 23;
  float inverse;
  std::memcpy(&inverse, &word, sizeof inverse);
  for (i64 j = 0; j < C; j += 8) {
    const I8 y = (I8)(one * load8(x + j, C - j < 8 ? C - j : 8)), sign = y >> 31 ^ flip;
    const F8 size = (F8)(y & 0x7FFFFFFF) * inverse;
    const I8 whole = __builtin_convertvector(size, I8);
    const F8 rest = size - __builtin_convertvector(whole, F8);  // exact, and less than 1
    const I8 level = whole - (chances(scratch, k, j) < __builtin_convertvector(rest * 2147483648.0f, I8));
    store_low_bytes(narrow16(((level ^ sign) - sign) + zero), codes + j);
  }
}

QGNN_INLINE bool is_plain(std::uint8_t scale) { return scale != kZeroRow && scale != kOddRow; }

// Rows first..first+count of D̃^-½·x, as many as the scratch holds.
QGNN_INLINE void code_rows(const GradientRows& g, const float* x, const float* d, i64 C, i64 first, i64 count,
                           GradientScratch& scratch) {
  const i64 B = row_bytes(C, g.bits);
  scratch.draw(g.key, g.rows + first, count);
  std::uint8_t* scale = scratch.scale;
  for (i64 k = 0; k < count; ++k) scale[k] = scale_byte(x + (first + k) * C, d[first + k], C, g.bits);
  for (i64 k = 0; k < count; ++k)
    if (is_plain(scale[k]))
      code_levels(x + (first + k) * C, d[first + k], C, g.bits, k, scratch);
  for (i64 k = 0; k < count; ++k) {
    std::uint8_t* to = g.next + (first + k) * (B + 1);
    if (is_plain(scale[k])) pack_row(scratch.codes + k * scratch.stride, C, g.bits, to);
    else std::memset(to, 0, B);
    to[B] = scale[k];
  }
}

static void code_gradients(const GradientRows& g, const float* h, const float* d, i64 C, i64 begin, i64 end) {
  GradientScratch scratch(C);
  for (i64 first = begin; first < end; first += scratch.rows)
    code_rows(g, h, d, C, first, end - first < scratch.rows ? end - first : scratch.rows, scratch);
}

static void aggregate_scaled(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                             int bits, float* out, i64 begin, i64 end) {
  alignas(32) float sum[kLayerColumns + kSlack];
  const ScaledSums sums(indices, payload, M, C, bits, indptr[end]);
  for (i64 row = begin; row < end; ++row) {
    sums(indptr[row], indptr[row + 1], sum);
    std::memcpy(out + row * C, sum, C * sizeof(float));
  }
}

static void layer_scaled(const FloatLayer& s, const GradientRows& g, i64 begin, i64 end) {
  const i64 C = s.C;
  GradientScratch scratch(C);
  const ScaledSums sums(s.indices, g.payload, g.M, C, g.bits, s.indptr[end]);
  for (i64 first = begin; first < end; first += scratch.rows) {
    const i64 count = end - first < scratch.rows ? end - first : scratch.rows;
    for (i64 k = 0; k < count; ++k)
      sums(s.indptr[first + k], s.indptr[first + k + 1], scratch.sums + k * scratch.stride);
    for (i64 k = 0; k < count; ++k)
      for (i64 at = 0; at < C; at += kTile)
        advance_row(s, first + k, at, C - at < kTile ? C - at : kTile, scratch.sums + k * scratch.stride + at, nullptr);
    if (g.next != nullptr) code_rows(g, s.out, s.d, C, first, count, scratch);
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
