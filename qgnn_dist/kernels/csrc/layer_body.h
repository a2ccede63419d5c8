// SPDX-License-Identifier: Apache-2.0
// A whole round in one pass over the rows: the neighbours' codes are added up, R, P and H follow, and what is new about H
// is coded for the next round. Each operation is rounded as in the kernels that do one of these things each, so that
// both ways give the same bits. Included after what each instruction set has of its own: sums of a row's codes, and
// conversions of eight numbers.
//
// R, Ŷ and the residual term are float32 rows of C columns, or fixed point in rows of `stride` columns. There Ŷ and R are
// sums of codes as they come, shifted by what their round's step is of the least one: whole numbers from 0 on, in 16
// bits, and Ŷ in 8 where it fits. Less what stands for 0 (`middle`, the half of the highest code in every round so far;
// for R of each neighbour) they are exactly what float32 would hold, as steps are powers of two. Rows of so many
// neighbours that R might not fit keep it in float32, in `far`.

namespace qgnn {
namespace QGNN_ISA {

constexpr std::int32_t kExactDegree = 4000000;

// Sums of the neighbours begin..end, up to kLayerColumns wide; `sum` has room for kSlack more.
static void sum_long_row(const CodeSums& sums, i64 begin, i64 end, std::int32_t* sum) {
  alignas(32) std::uint16_t part[kLayerColumns + kSlack];
  const i64 piece = 65535 >> sums.bits;
  for (i64 e = begin; e == begin || e < end; e += piece) {
    sums(e, e + piece < end ? e + piece : end, part);
    if (e == begin)
      for (i64 i = 0; i < sums.C; ++i) sum[i] = part[i];
    else
      for (i64 i = 0; i < sums.C; ++i) sum[i] += part[i];
  }
}

static void sum_edges(const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C, int bits, i64 begin,
                      i64 end, std::int32_t* out) {
  sum_long_row(CodeSums(indices, payload, M, C, bits, end), begin, end, out);
}

static void aggregate_codes(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                            int bits, const LongRows& long_rows, std::int32_t* out, i64 begin, i64 end) {
  alignas(32) std::int32_t sum[kLayerColumns + kSlack];
  const CodeSums sums(indices, payload, M, C, bits, indptr[end]);
  for (i64 row = begin; row < end; ++row) {
    if (C > kLayerColumns) {
      sum_planes(indices, payload, C, bits, indptr[row], indptr[row + 1], out + row * C);
      continue;
    }
    const std::int32_t* ready = long_rows.find(row, C);
    if (ready == nullptr) sum_long_row(sums, indptr[row], indptr[row + 1], sum);
    std::memcpy(out + row * C, ready == nullptr ? sum : ready, C * sizeof(std::int32_t));
  }
}

// Levels -half..half-1 of values on a mid-rise grid, as 16 bits each; NaN becomes the lowest.
QGNN_INLINE U16x8 level8(F8 x, float half) {
  const F8 low = F8{} - half, high = F8{} + (half - 1.0f);
  x = x > low ? x : low;
  x = x < high ? x : high;
  const I8 whole = __builtin_convertvector(x, I8);
  return narrow16(whole + (__builtin_convertvector(whole, F8) > x));  // comparisons give -1
}

// Ŷ in 16 bits, as each instruction set has it in 8.
QGNN_INLINE U16x8 load16(const std::uint16_t* p) {
  U16x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
QGNN_INLINE I8 load_whole(const std::uint16_t* p) { return widen_whole(load16(p)); }
QGNN_INLINE void add_whole(U16x8 v, std::uint16_t* p) {
  v += load16(p);
  std::memcpy(p, &v, sizeof v);
}

// R in fixed point: what came is added, and the sum before and after is handed on as whole numbers.
template <bool usual>
struct NearRow {
  std::uint16_t* r;
  const std::uint16_t* sums;
  float zero_before, zero_now;  // what stands for 0
  int shift;
  bool keep;
  float scale;  // D̃^-½ · what 1 means

  QGNN_MEMBER void take(i64 j, i64, F8& before, F8& now) const {
    const U16x8 old = load16(r + j);
    U16x8 fresh = load16(sums + j) << shift;
    if (usual || keep) fresh += old;
    std::memcpy(r + j, &fresh, sizeof fresh);
    before = __builtin_convertvector(widen_whole(old), F8) - zero_before;
    now = __builtin_convertvector(widen_whole(fresh), F8) - zero_now;
  }
};

// R in float32, and `news` what comes to it.
struct WideRow {
  float* r;
  const float* news;
  bool keep;
  float scale;

  QGNN_MEMBER void take(i64 j, i64 n, F8& before, F8& now) const {
    before = load8(r + j, n);
    now = load8(news + j, n);
    if (keep) now = before + now;
    store8(now, r + j, n);
  }
};

// What each row codes against and pulls towards: in fixed point, Ŷ in numbers of the type `Known` ...
template <bool usual, class Known>
struct FixedState {
  Known* known;
  const std::int8_t* residual;
  float unit, inverse, half, one, zero;  // `zero`: what stands for 0 in Ŷ
  int shift;

  QGNN_MEMBER F8 pull(i64 j, i64) const {
    return __builtin_convertvector(widen8(residual + j), F8) + 0.5f;
  }
  // The levels of news about `x`, and Ŷ with them; `note` takes the news.
  template <class Note>
  QGNN_MEMBER U16x8 code(F8 x, i64 j, i64 n, Note note) const {
    F8 believed{};
    if (usual || known != nullptr) believed = __builtin_convertvector(load_whole(known + j), F8) - zero;
    note(first_of(x * one - believed * unit, n));
    const U16x8 level = level8(x * (one * inverse) - believed * (unit * inverse), half);
    if (usual || known != nullptr) add_whole((level + static_cast<std::uint16_t>(half)) << shift, known + j);
    return level;
  }
};

// ... and in float32.
struct FloatState {
  float* known;
  const float* residual;
  float step, by, half, one;
  bool exact;  // by is 1/step: a division costs several products

  QGNN_MEMBER F8 pull(i64 j, i64 n) const { return load8(residual + j, n); }
  template <class Note>
  QGNN_MEMBER U16x8 code(F8 x, i64 j, i64 n, Note note) const {
    F8 held{}, news = one * x;
    if (known != nullptr) news = news - (held = load8(known + j, n));
    note(news);
    const U16x8 level = level8(exact ? news * by : news / by, half);
    if (known != nullptr)
      store8(held + (__builtin_convertvector(widen16(level), F8) + 0.5f) * step, known + j, n);
    return level;
  }
};

// Codes of C bytes at `codes`, kSlack more behind them, to B packed bytes.
template <int bits>
QGNN_INLINE void pack_bytes(std::uint8_t* codes, i64 C, std::uint8_t* packed) {
  constexpr i64 planes = 8 / bits;
  const i64 B = row_bytes(C, bits);
  for (i64 i = C; i < planes * B; ++i) codes[i] = 0;
  for (i64 first = 0; first < B; first += 16) {
    U16x8 bytes, plane;
    std::memcpy(&bytes, codes + first, sizeof bytes);
    for (i64 k = 1; k < planes; ++k) {  // codes are small: no bit leaves its byte
      std::memcpy(&plane, codes + k * B + first, sizeof plane);
      bytes |= plane << static_cast<int>(k * bits);
    }
    alignas(16) std::uint8_t part[16];
    std::memcpy(part, &bytes, sizeof part);
    std::uint8_t* to = packed + first;
    const i64 n = B - first;
    if (n >= 16) {
      std::memcpy(to, part, 16);
    } else if (n >= 8) {  // two that overlap: a row's end is another thread's beginning
      std::memcpy(to, part, 8);
      std::memcpy(to + n - 8, part + n - 8, 8);
    } else {
      for (i64 i = 0; i < n; ++i) to[i] = part[i];
    }
  }
}

QGNN_INLINE void pack_row(std::uint8_t* codes, i64 C, int bits, std::uint8_t* packed) {
  switch (bits) {
    case 1: return pack_bytes<1>(codes, C, packed);
    case 2: return pack_bytes<2>(codes, C, packed);
    case 4: return pack_bytes<4>(codes, C, packed);
    default: std::memcpy(packed, codes, C);
  }
}

// Numbers on their way, of as many rows at a time as fit: what one pass stores, the next one loads only once the stores
// are through, as they overlap and the processor could not forward them.
struct Scratch {
  static constexpr i64 kMost = 8;
  const i64 stride, rows;
  alignas(32) float news[kLayerColumns + kSlack];          // what came, in float32
  alignas(32) std::uint16_t sums[kLayerColumns + kSlack];  // what came, in fixed point
  alignas(32) std::uint8_t codes[kLayerColumns + kSlack];
  float* far[kMost];  // R of a row whose R is not in fixed point, else null
  alignas(32) std::int32_t wide_sums[kLayerColumns + kSlack];  // of one row

  explicit Scratch(i64 C)
      : stride((C + kSlack + 31) / 32 * 32), rows(kLayerColumns / stride < 1 ? 1
                                                  : kLayerColumns / stride < kMost ? kLayerColumns / stride : kMost) {}
};

// What is known of a round when this is compiled. gradient: a gradient step is taken. corrected: the multiplier's term is
// added. counts: moments of what is coded and the constraint's dots are wanted. usual: news are coded and added.
template <bool gradient_, bool corrected_, bool counts_, bool usual_>
struct Kind {
  static constexpr bool gradient = gradient_, corrected = corrected_, counts = counts_, usual = usual_;
};

// One row, see ops.layer.
template <class Kind, class Row, class State>
QGNN_INLINE void layer_row(const Layer& a, i64 row, const Row received, const State state, const float pull,
                           std::uint8_t* codes) {
  const float one = a.d[row], two = one * one, of_h = a.a, of_p = a.b, coefficient = a.coefficient;
  const float* h = a.h + row * a.C;
  const float* before = a.before == nullptr ? nullptr : a.before + row * a.C;
  float* out = a.out + row * a.C;
  const std::uint16_t half_levels = static_cast<std::uint16_t>(1 << (a.bits - 1));
  const bool sends = Kind::usual || a.next_step != 0.0f;
  const bool noted = Kind::counts && a.moments != nullptr, dotted = Kind::counts && a.dots != nullptr;
  Moments moments;
  Product dot;
  const auto note = [&](F8 news) __attribute__((always_inline)) {
    if (noted) moments.add(news);
  };
  each_eight(a.C, [&](i64 j, i64 n) __attribute__((always_inline)) {
    F8 r_before, r_now;
    received.take(j, n, r_before, r_now);
    const F8 x = load8(h + j, n), p = received.scale * r_now + two * x;
    F8 next = x;
    if (Kind::gradient) next = (of_h * x + of_p * p) + pull * state.pull(j, n);
    if (Kind::corrected || dotted) {
      const F8 x_before = before == nullptr ? x : load8(before + j, n);
      const F8 held = before == nullptr ? p : received.scale * r_before + two * x_before;
      if (dotted) dot.add(x - x_before, (x - x_before) - (p - held));
      if (Kind::corrected) next = next + coefficient * ((next - (Kind::gradient ? x : x_before)) - (p - held));
    }
    store8(next, out + j, n);
    if (sends) store_low_bytes(state.code(next, j, n, note) + half_levels, codes + j);
  });
  if (dotted) a.dots[row] = dot.total();
  if (sends && noted) moments.store(a.moments + row * 3);
}

QGNN_INLINE i64 degree_of(const Layer& a, i64 row) { return a.indptr[row + 1] - a.indptr[row]; }

// What came to a row, in float32.
QGNN_INLINE void receive_wide(const Layer& a, const CodeSums& codes, i64 row, Scratch& scratch, float* news) {
  if (a.step == 0.0f) {
    std::memset(news, 0, a.C * sizeof(float));
    return;
  }
  const float half_step = a.step * 0.5f;
  const i64 degree = degree_of(a, row), offset = ((1 << a.bits) - 1) * degree;
  const std::int32_t* sums = degree > kLongRow ? a.long_rows.find(row, a.C) : nullptr;
  if (sums == nullptr) {
    sum_long_row(codes, a.indptr[row], a.indptr[row + 1], scratch.wide_sums);
    sums = scratch.wide_sums;
  }
  if (degree > kExactDegree) {  // twice its sums would not fit 32 bits
    for (i64 i = 0; i < a.C; ++i) news[i] = delivered<i64>(0.0f, sums[i], offset, half_step, false);
  } else {
    const std::int32_t small = static_cast<std::int32_t>(offset);
    for (i64 i = 0; i < a.C; ++i) news[i] = delivered<std::int32_t>(0.0f, sums[i], small, half_step, false);
  }
}

// Rows in float32.
template <class Kind>
struct FloatRows {
  const Layer& a;
  Scratch& scratch;
  const CodeSums sum_codes;
  const bool exact = a.next_step != 0.0f && is_power_of_two(a.next_step), keep = a.keep || a.step == 0.0f;
  const float by = exact ? 1.0f / a.next_step : a.next_step, half = static_cast<float>(1 << (a.bits - 1));

  QGNN_MEMBER void start(i64) {}
  QGNN_MEMBER void receive(i64 row, i64 k) {
    receive_wide(a, sum_codes, row, scratch, scratch.news + k * scratch.stride);
  }
  QGNN_MEMBER void advance(i64 row, i64 k) {
    const i64 at = row * a.C;
    float* known = a.believed == nullptr ? nullptr : a.believed + at;
    layer_row<Kind>(a, row, WideRow{a.r + at, scratch.news + k * scratch.stride, keep, a.d[row]},
                    FloatState{known, a.residual + at, a.next_step, by, half, a.d[row], exact}, a.c,
                    scratch.codes + k * scratch.stride);
  }
};

// Rows in fixed point, and those in between whose R is not.
template <class Kind, class Known>
struct FixedRows {
  const Layer& a;
  Scratch& scratch;
  const CodeSums sum_codes;
  const FixedLayer& f = *a.fixed;
  const bool sent = a.step != 0.0f, keep = a.keep || !sent;
  const float inverse = a.next_step != 0.0f ? 1.0f / a.next_step : 0.0f, half = static_cast<float>(1 << (a.bits - 1));
  const float pull = a.c * f.residual_step;
  const float middle = (keep ? f.middle : 0.0f) + (sent ? 0.5f * static_cast<float>(((1 << a.bits) - 1) << f.shift) : 0.0f);
  i64 next_far = 0;  // the first of the far rows that is still to come

  QGNN_MEMBER void start(i64 begin) {
    i64 after = f.num_far;
    while (next_far < after) {
      const i64 between = (next_far + after) / 2;
      if (f.far_rows[between] < begin) next_far = between + 1;
      else after = between;
    }
  }
  QGNN_MEMBER void receive(i64 row, i64 k) {
    std::uint16_t* sums = scratch.sums + k * scratch.stride;
    scratch.far[k] = next_far < f.num_far && f.far_rows[next_far] == row ? f.far + next_far++ * a.C : nullptr;
    if (scratch.far[k] != nullptr) receive_wide(a, sum_codes, row, scratch, scratch.news + k * scratch.stride);
    else if (!sent) std::memset(sums, 0, f.stride * sizeof *sums);
    else sum_codes(a.indptr[row], a.indptr[row + 1], sums);
  }
  QGNN_MEMBER void advance(i64 row, i64 k) {
    const i64 at = row * f.stride, own = k * scratch.stride;
    Known* known = f.believed == nullptr ? nullptr : static_cast<Known*>(f.believed) + at;
    const FixedState<Kind::usual, Known> state{known, f.residual + at, f.unit, inverse, half, a.d[row], middle,
                                               f.next_shift};
    std::uint8_t* codes = scratch.codes + own;
    if (scratch.far[k] != nullptr) {
      layer_row<Kind>(a, row, WideRow{scratch.far[k], scratch.news + own, keep, a.d[row]}, state, pull, codes);
      return;
    }
    const float degree = static_cast<float>(degree_of(a, row));
    layer_row<Kind>(a, row, NearRow<Kind::usual>{f.r + at, scratch.sums + own, degree * f.middle, degree * middle,
                                                 f.shift, keep, a.d[row] * f.unit}, state, pull, codes);
  }
};

QGNN_INLINE void pack_rows(const Layer& a, i64 first, i64 count, Scratch& scratch) {
  const i64 B = row_bytes(a.C, a.bits);
  for (i64 k = 0; k < count; ++k) pack_row(scratch.codes + k * scratch.stride, a.C, a.bits, a.next + (first + k) * B);
}

template <class Rows>
static void layer_rows(const Layer& a, i64 begin, i64 end) {
  Scratch scratch(a.C);
  Rows rows{a, scratch, CodeSums(a.indices, a.payload, a.M, a.C, a.bits, a.indptr[end])};
  rows.start(begin);
  for (i64 first = begin; first < end; first += scratch.rows) {
    const i64 count = end - first < scratch.rows ? end - first : scratch.rows;
    for (i64 k = 0; k < count; ++k) rows.receive(first + k, k);
    for (i64 k = 0; k < count; ++k) rows.advance(first + k, k);
    if (a.next_step != 0.0f) pack_rows(a, first, count, scratch);
  }
}

template <template <class> class Rows, bool counts, bool usual>
static void layer_of(const Layer& a, i64 begin, i64 end) {
  if (!a.gradient) layer_rows<Rows<Kind<false, true, counts, usual>>>(a, begin, end);
  else if (a.coefficient != 0.0f) layer_rows<Rows<Kind<true, true, counts, usual>>>(a, begin, end);
  else layer_rows<Rows<Kind<true, false, counts, usual>>>(a, begin, end);
}

template <class Kind>
using NarrowRows = FixedRows<Kind, std::uint8_t>;
template <class Kind>
using WideRows = FixedRows<Kind, std::uint16_t>;

template <template <class> class Rows>
static void layer_fixed(const Layer& a, i64 begin, i64 end) {
  const bool usual = a.next_step != 0.0f && a.keep, counts = a.moments != nullptr || a.dots != nullptr;
  if (!usual) layer_of<Rows, true, false>(a, begin, end);
  else if (counts) layer_of<Rows, true, true>(a, begin, end);
  else layer_of<Rows, false, true>(a, begin, end);
}

// What prediction and training do is compiled for each of them, all else once for fixed point and once for float32.
static void layer(const Layer& a, i64 begin, i64 end) {
  if (a.fixed == nullptr) layer_of<FloatRows, true, false>(a, begin, end);
  else if (a.fixed->narrow) layer_fixed<NarrowRows>(a, begin, end);
  else layer_fixed<WideRows>(a, begin, end);
}

// The state before the first layer in fixed point: codes of the residual term, of the first round's news, and Ŷ.
template <class Known>
static void fixed_start_of(const Layer& a, int residual_bits, i64 begin, i64 end) {
  Scratch scratch(a.C);
  const FixedLayer& f = *a.fixed;
  const float half = static_cast<float>(1 << (a.bits - 1)), residual_half = static_cast<float>(1 << (residual_bits - 1));
  const float inverse = 1.0f / a.next_step, residual_inverse = 1.0f / f.residual_step;
  const std::uint16_t half_levels = static_cast<std::uint16_t>(1 << (a.bits - 1));
  const bool noted = a.moments != nullptr;
  for (i64 first = begin; first < end; first += scratch.rows) {
    const i64 count = end - first < scratch.rows ? end - first : scratch.rows;
    for (i64 k = 0; k < count; ++k) {
      const i64 row = first + k, at = row * f.stride;
      Known* known = f.believed == nullptr ? nullptr : static_cast<Known*>(f.believed) + at;
      const FixedState<false, Known> state{known, nullptr, f.unit, inverse, half, a.d[row], 0.0f, f.next_shift};
      if (known != nullptr) std::memset(known, 0, f.stride * sizeof(Known));
      Moments moments;
      const auto note = [&](F8 news) __attribute__((always_inline)) {
        if (noted) moments.add(news);
      };
      each_eight(a.C, [&](i64 j, i64 n) __attribute__((always_inline)) {
        const F8 x = load8(a.h + row * a.C + j, n);
        store_low_bytes(level8(x * residual_inverse, residual_half),
                        reinterpret_cast<std::uint8_t*>(f.first_residual + at + j));
        store_low_bytes(state.code(x, j, n, note) + half_levels, scratch.codes + k * scratch.stride + j);
      });
      if (noted) moments.store(a.moments + row * 3);
    }
    pack_rows(a, first, count, scratch);
  }
}

static void fixed_start(const Layer& a, int residual_bits, i64 begin, i64 end) {
  if (a.fixed->narrow) fixed_start_of<std::uint8_t>(a, residual_bits, begin, end);
  else fixed_start_of<std::uint16_t>(a, residual_bits, begin, end);
}

}  // namespace QGNN_ISA
}  // namespace qgnn
