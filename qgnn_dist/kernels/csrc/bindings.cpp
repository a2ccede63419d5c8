// SPDX-License-Identifier: Apache-2.0
// Python's view of the kernels: NumPy arrays in, caller's arrays out. Shapes are checked by qgnn_dist/kernels/dispatch.py,
// which names function and argument; types and layout are checked here again, and nothing is converted silently.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace qgnn;

namespace {

template <typename T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
using In8 = Array<const std::uint8_t, 2>;
using Out8 = Array<std::uint8_t, 2>;
using InF = Array<const float, 2>;
using OutF = Array<float, 2>;
using InF1 = Array<const float, 1>;
using OutF1 = Array<float, 1>;
using In64 = Array<const i64, 1>;
using In32 = Array<const std::int32_t, 1>;
using In32x2 = Array<const std::int32_t, 2>;
using Out32 = Array<std::int32_t, 2>;
using Out32x1 = Array<std::int32_t, 1>;
using In16 = Array<const std::int16_t, 2>;
using Out16 = Array<std::int16_t, 2>;
using In16x1 = Array<const std::int16_t, 1>;
using Out16x1 = Array<std::int16_t, 1>;
using InW = Array<const std::int8_t, 2>;
using OutD = Array<double, 2>;
using OutD1 = Array<double, 1>;

// Weights (F, H) as (num_blocks(H), F, kBlock), zero past H, from a multiple of 32 bytes on, for whole registers.
struct Free { void operator()(void* p) const { std::free(p); } };
template <typename To, typename From>
std::unique_ptr<To[], Free> blocked(const From* weights, i64 F, i64 H) {
  const std::size_t bytes = static_cast<std::size_t>(num_blocks(H) * F * kBlock) * sizeof(To);  // a multiple of 32
  void* memory = std::aligned_alloc(32, std::max<std::size_t>(bytes, 32));
  if (memory == nullptr) throw std::bad_alloc();
  std::unique_ptr<To[], Free> out(static_cast<To*>(memory));
  To* to = out.get();
  for (i64 j = 0; j < H; j += kBlock)
    for (i64 f = 0; f < F; ++f, to += kBlock) {
      const i64 width = std::min(kBlock, H - j);
      std::fill_n(std::copy_n(weights + f * H + j, width, to), kBlock - width, To{0});
    }
  return out;
}

// The other two arrays of CodeWeights.
template <typename T>
std::unique_ptr<T[], Free> aligned(i64 count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 32) / 32 * 32;
  void* memory = std::aligned_alloc(32, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0, bytes);
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

struct BlockedCodes {
  std::unique_ptr<std::int16_t[], Free> pairs;
  std::unique_ptr<std::int8_t[], Free> quads;
  std::unique_ptr<std::int32_t[], Free> sums;
  std::int32_t largest = 0;

  BlockedCodes(const std::int8_t* weights, i64 F, i64 H)
      : pairs(blocked<std::int16_t>(weights, F, H)),
        quads(aligned<std::int8_t>(num_blocks(H) * num_quads(F) * kBlock * 4)),
        sums(aligned<std::int32_t>(num_blocks(H) * kBlock)) {
    for (i64 f = 0; f < F; ++f)
      for (i64 j = 0; j < H; ++j) {
        const std::int8_t w = weights[f * H + j];
        quads[((j / kBlock * num_quads(F) + f / 4) * kBlock + j % kBlock) * 4 + f % 4] = w;
        sums[j] += w;
        largest = std::max(largest, std::abs(std::int32_t{w}));
      }
  }
  CodeWeights view() const { return {pairs.get(), quads.get(), sums.get(), largest}; }
};

i64 rows(const auto& a) { return static_cast<i64>(a.shape(0)); }
i64 columns(const auto& a) { return static_cast<i64>(a.shape(1)); }
template <typename A>
auto* data_or_null(std::optional<A>& a) { return a ? a->data() : nullptr; }

// Rows a chunk: enough work to pay for handing it out, few enough to even out long rows.
i64 grain(i64 work_per_row) { return std::clamp<i64>(65536 / std::max<i64>(work_per_row, 1), 16, 8192); }

// Sums of the rows that all threads add up together, each a piece of the neighbours: whole numbers, in any order.
class LongSums {
 public:
  LongSums(const char* function, const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M,
           i64 C, int bits, i64 begin, i64 end) {
    if (begin >= end || indptr[end] - indptr[begin] <= kLongRow) return;
    const i64 most = std::numeric_limits<std::int32_t>::max() / ((1 << bits) - 1);
    for (i64 row = begin; row < end; ++row) {
      const i64 count = indptr[row + 1] - indptr[row];
      if (count > most)
        throw nb::value_error((std::string(function) + ": row " + std::to_string(row) + " has " + std::to_string(count) +
                               " neighbours, expected at most " + std::to_string(most) +
                               ", whose codes' sum fits 32 bits; use fewer bits").c_str());
      if (count > kLongRow && C <= kLayerColumns) rows_.push_back(row);
    }
    sums_.resize(rows_.size() * static_cast<std::size_t>(C));
    const Kernels& k = active();
    std::mutex turn;
    nb::gil_scoped_release free_threads;
    for (std::size_t i = 0; i < rows_.size(); ++i)
      parallel(indptr[rows_[i]], indptr[rows_[i] + 1], kLongRow / 8, [&](i64 from, i64 to) {
        std::vector<std::int32_t> part(static_cast<std::size_t>(C + kSlack));
        k.sum_edges(indices, payload, M, C, bits, from, to, part.data());
        std::lock_guard<std::mutex> lock(turn);
        std::int32_t* sum = sums_.data() + static_cast<i64>(i) * C;
        for (i64 c = 0; c < C; ++c) sum[c] += part[static_cast<std::size_t>(c)];
      });
  }
  LongRows view() const { return {rows_.data(), sums_.data(), static_cast<i64>(rows_.size())}; }

 private:
  std::vector<i64> rows_;
  std::vector<std::int32_t> sums_;
};

void check_width(const char* function, i64 width) {
  if (width > kLayerColumns)
    throw nb::value_error((std::string(function) + ": h has " + std::to_string(width) + " columns, expected at most " +
                           std::to_string(kLayerColumns)).c_str());
}

// The power of two that half a step is of a unit; 0 for a round that is not sent.
int shift(const char* function, const char* argument, float step, float unit) {
  int exponent = 0;
  const float share = step * 0.5f / unit;
  if (step == 0.0f) return 0;
  if (!(unit > 0.0f) || std::frexp(unit, &exponent) != 0.5f || !(share >= 1.0f) || !(share < 32768.0f) ||
      std::frexp(share, &exponent) != 0.5f)
    throw nb::value_error((std::string(function) + ": " + argument + " is " + std::to_string(step) +
                           ", expected a power of two from 2 to 32768 times the unit " + std::to_string(unit)).c_str());
  return exponent - 1;
}

// Tables of LookupTables; none where the sums don't fit.
struct BlockedTables {
  std::unique_ptr<std::uint8_t[], Free> tables;
  LookupTables view{nullptr, 0, 0};

  BlockedTables(const std::int8_t* weights, i64 F, i64 H) {
    const auto [least, most] = std::minmax_element(weights, weights + F * H);
    const std::int32_t shift = F * H == 0 ? 0 : 6 * std::max(-std::int32_t{*least}, 0);
    const std::int32_t largest = F * H == 0 ? 0 : shift + 6 * std::max(std::int32_t{*most}, 0);
    const i64 pairs = (F + 1) / 2;
    if (F * H == 0 || largest > 127 || pairs * largest > 65535) return;
    tables = aligned<std::uint8_t>(H * pairs * 16);
    for (i64 j = 0; j < H; ++j)
      for (i64 p = 0; p < pairs; ++p) {
        const int one = weights[2 * p * H + j], two = 2 * p + 1 < F ? weights[(2 * p + 1) * H + j] : 0;
        std::uint8_t* to = tables.get() + (j * pairs + p) * 16;
        for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint8_t>(shift + (i & 3) * one + (i >> 2) * two);
      }
    view = {tables.get(), shift, 255 / std::max(largest, 1)};
  }
};

void run_perceptron(Perceptron net, i64 count, InF1& scale, InW& weight1, float step1, InF1& bias1, float hidden_step,
                    int hidden_bits, InW& weight2, float step2, InF1& bias2, double* moments, OutF& out) {
  net.scale = scale.data();
  net.weight1 = weight1.data();
  net.bias1 = bias1.data();
  net.bias2 = bias2.data();
  net.out = out.data();
  net.moments = moments;
  net.H = columns(weight1);
  net.C = columns(weight2);
  net.step1 = step1;
  net.hidden_step = hidden_step;
  net.scale2 = hidden_step * step2;
  net.hidden_bits = hidden_bits;
  const BlockedCodes blocks1(weight1.data(), net.F, net.H), blocks2(weight2.data(), net.H, net.C);
  net.blocks1 = blocks1.view();
  net.blocks2 = blocks2.view();
  const bool narrow = net.indptr == nullptr && hidden_bits <= 2;
  const BlockedTables tables1(weight1.data(), narrow ? net.F : 0, net.H), tables2(weight2.data(), narrow ? net.H : 0, net.C);
  net.lookup1 = tables1.view;
  net.lookup2 = tables2.view;
  const Kernels& k = active();
  nb::gil_scoped_release free_threads;
  parallel(0, count, 8 * kLookupRows, [&](i64 b, i64 e) {
    const auto scratch = aligned<std::uint8_t>(perceptron_scratch(net.F, net.H, net.C));
    k.perceptron(net, scratch.get(), b, e);
  });
}

std::uint64_t threshold(double p) { return static_cast<std::uint64_t>(std::llrint(p * 4294967296.0)); }
float kept(double p) { return static_cast<float>(1.0 / (1.0 - p)); }

}  // namespace

// The calls below hold no Python object but their arguments, so other Python threads may run meanwhile.
#define RUN(BEGIN, END, WORK, BODY)                                     \
  {                                                                     \
    const Kernels& k = active();                                        \
    nb::gil_scoped_release free_threads;                                \
    parallel(BEGIN, END, grain(WORK), [&](i64 b, i64 e) { BODY; });     \
  }

NB_MODULE(_kernels, m) {
  m.def("isa", [] { return active().isa; });
  m.def("select_isa", &select_isa, "name"_a);
  m.def("set_threads", &set_threads, "count"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("threads", &threads);

  m.def("pack", [](In8 codes, int bits, Out8 out) {
    const i64 C = columns(codes), count = rows(codes) * C;
    std::uint8_t used = 0;
    for (i64 i = 0; i < count; ++i) used |= codes.data()[i];
    if (used >> bits != 0) {
      const int largest = *std::max_element(codes.data(), codes.data() + count);
      throw nb::value_error(("pack: code " + std::to_string(largest) + " does not fit " + std::to_string(bits) +
                             " bits").c_str());
    }
    RUN(0, rows(codes), C, k.pack(codes.data(), C, bits, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  m.def("unpack", [](In8 payload, int bits, Out8 out) {
    const i64 C = columns(out);
    RUN(0, rows(out), C, k.unpack(payload.data(), C, bits, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  m.def("gather_rows", [](In8 payload, In32 index, Out8 out) {
    const i64 B = columns(payload);
    RUN(0, rows(index), B, {
      (void)k;
      for (i64 i = b; i < e; ++i) std::copy_n(payload.data() + index.data()[i] * B, B, out.data() + i * B);
    })
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("aggregate_codes", [](In64 indptr, In32 indices, In8 payload, int bits, i64 begin, i64 end, Out32 out) {
    const i64 C = columns(out);
    const LongSums longs("aggregate_codes", indptr.data(), indices.data(), payload.data(), rows(payload), C, bits, begin,
                         end);
    RUN(begin, end, 16 * C, k.aggregate_codes(indptr.data(), indices.data(), payload.data(), rows(payload), C, bits,
                                              longs.view(), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("aggregate_scaled", [](In64 indptr, In32 indices, In8 payload, Array<const std::int8_t, 1> exponents, int bits,
                               i64 begin, i64 end, OutF out) {
    RUN(begin, end, 32 * columns(out), k.aggregate_scaled(indptr.data(), indices.data(), payload.data(),
                                                          exponents.data(), columns(out), bits, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg().noconvert());

  m.def("aggregate_float", [](In64 indptr, In32 indices, InF x, i64 begin, i64 end, OutF out) {
    RUN(begin, end, 16 * columns(out),
        k.aggregate_float(indptr.data(), indices.data(), x.data(), columns(x), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("code_news", [](InF h, InF1 d, std::optional<OutF> believed, float step, int bits, i64 begin, i64 end,
                        Out8 payload, std::optional<OutD> moments) {
    float* known = data_or_null(believed);
    double* m3 = data_or_null(moments);
    RUN(begin, end, columns(h),
        k.code_news(h.data(), d.data(), known, step, bits, columns(h), payload.data(), m3, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none());

  m.def("add_news", [](In32x2 sums, In32 degree, float step, int bits, bool keep, i64 begin, i64 end, OutF r) {
    RUN(begin, end, columns(r),
        k.add_news(sums.data(), degree.data(), step, bits, keep, columns(r), r.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("layer", [](In64 indptr, In32 indices, In8 payload, int bits, float step, In32 degree, InF1 d, InF residual,
                    OutF r, InF h, std::optional<InF> before, OutF out, bool gradient, float coefficient, float a,
                    float b_, float c, std::optional<OutF> believed, float next_step, Out8 next,
                    std::optional<OutD> moments, std::optional<OutD1> dots, i64 begin, i64 end) {
    check_width("layer", columns(h));
    const LongSums longs("layer", indptr.data(), indices.data(), payload.data(), rows(payload), columns(h), bits, begin,
                         step != 0.0f ? end : begin);
    const Layer work{indptr.data(), indices.data(), payload.data(), degree.data(), d.data(), residual.data(), h.data(),
                     data_or_null(before), out.data(), r.data(), data_or_null(believed), next.data(),
                     data_or_null(moments), data_or_null(dots), nullptr, longs.view(), rows(payload), columns(h),
                     bits, step, next_step, a, b_, c, coefficient, believed.has_value(), gradient};
    RUN(begin, end, 32 * columns(h), k.layer(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert().none(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(),
     nb::arg().noconvert().none(), nb::arg(), nb::arg());

  m.def("fixed_layer", [](In64 indptr, In32 indices, In8 payload, int bits, float step, In32 degree, InF1 d,
                          InW residual, float residual_step, float unit, Out16 r, std::optional<In32> slot,
                          std::optional<OutF> far, InF h, std::optional<InF> before, OutF out, bool gradient,
                          float coefficient, float a, float b_, float c, std::optional<Out16> believed,
                          float next_step, Out8 next, std::optional<OutD> moments, std::optional<OutD1> dots,
                          i64 begin, i64 end) {
    check_width("fixed_layer", columns(h));
    const std::int32_t last = slot && begin < end ? *std::max_element(slot->data() + begin, slot->data() + end) : -1;
    const i64 places = far ? rows(*far) : 0;
    if (last >= places)
      throw nb::value_error(("fixed_layer: slot has " + std::to_string(last) + ", expected at most " +
                             std::to_string(places - 1) + ", the last row of far").c_str());
    const LongSums longs("fixed_layer", indptr.data(), indices.data(), payload.data(), rows(payload), columns(h), bits, begin,
                         step != 0.0f ? end : begin);
    const FixedLayer fixed{residual.data(), nullptr, r.data(), data_or_null(believed), data_or_null(slot),
                           data_or_null(far), columns(r), unit, residual_step,
                           shift("fixed_layer", "step", step, unit), shift("fixed_layer", "next_step", next_step, unit)};
    const Layer work{indptr.data(), indices.data(), payload.data(), degree.data(), d.data(), nullptr, h.data(),
                     data_or_null(before), out.data(), nullptr, nullptr, next.data(), data_or_null(moments),
                     data_or_null(dots), &fixed, longs.view(), rows(payload), columns(h), bits, step, next_step, a, b_, c,
                     coefficient, believed.has_value(), gradient};
    RUN(begin, end, 32 * columns(h), k.layer(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none(),
     nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(),
     nb::arg());

  m.def("fixed_start", [](InF h, InF1 d, float residual_step, int residual_bits, float unit, float step, int bits,
                          i64 begin, i64 end, Array<std::int8_t, 2> residual, std::optional<Out16> believed,
                          Out8 payload, std::optional<OutD> moments) {
    check_width("fixed_start", columns(h));
    shift("fixed_start", "residual_step", residual_step, residual_step * 0.5f);
    const FixedLayer fixed{nullptr, residual.data(), nullptr, data_or_null(believed), nullptr, nullptr,
                           columns(residual), unit, residual_step, 0, shift("fixed_start", "step", step, unit)};
    const Layer work{nullptr, nullptr, nullptr, nullptr, d.data(), nullptr, h.data(), nullptr, nullptr, nullptr,
                     nullptr, payload.data(), data_or_null(moments), nullptr, &fixed, {}, 0, columns(h), bits, 0.0f, step,
                     0.0f, 0.0f, 0.0f, 0.0f, believed.has_value(), true};
    RUN(begin, end, 8 * columns(h), k.fixed_start(work, residual_bits, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
     nb::arg().noconvert().none());

  m.def("layer_float", [](In64 indptr, In32 indices, InF y, InF1 d, InF h0, InF h, std::optional<InF> before, OutF out,
                          std::optional<OutF> p, bool first, bool second, float coefficient, float a, float b_, float c,
                          std::optional<OutF> next, std::optional<OutD1> dots, i64 begin, i64 end) {
    const bool looks_back = second || (dots.has_value() && !first);
    if (((looks_back || coefficient != 0.0f) && !p.has_value()) || (looks_back && !before.has_value()))
      throw nb::value_error("layer_float: a multiplier needs p, and its dots or second round need before");
    const FloatLayer work{indptr.data(), indices.data(), y.data(), d.data(), h0.data(), h.data(),
                          data_or_null(before), out.data(), data_or_null(p), data_or_null(next), data_or_null(dots),
                          columns(h), a, b_, c, coefficient, first, second};
    RUN(begin, end, 32 * columns(h), k.layer_float(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(), nb::arg());

  m.def("scale_rows", [](InF h, InF1 d, i64 begin, i64 end, OutF out) {
    RUN(begin, end, columns(h), k.scale_rows(h.data(), d.data(), columns(h), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("propagated", [](InF r, InF h, InF1 d, i64 begin, i64 end, OutF out) {
    RUN(begin, end, columns(h), k.propagated(r.data(), h.data(), d.data(), columns(h), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("half_step", [](InF h, InF p, InF h0, float a, float b_, float c, OutF out) {
    RUN(0, rows(h), columns(h), k.half_step(h.data(), p.data(), h0.data(), a, b_, c, columns(h), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("apply_multiplier", [](InF h, InF half, InF p, InF p_next, float coefficient, OutF out,
                               std::optional<OutD1> dots) {
    double* d = data_or_null(dots);
    RUN(0, rows(h), columns(h), k.apply_multiplier(h.data(), half.data(), p.data(), p_next.data(), coefficient,
                                                   columns(h), out.data(), d, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(),
     nb::arg().noconvert(), nb::arg().noconvert().none());

  m.def("midrise", [](InF x, float step, int bits, OutF out) {
    RUN(0, rows(x), columns(x), k.midrise(x.data(), step, bits, columns(x), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("affine_codes", [](InF x, std::optional<InF1> d, std::optional<OutF> believed, float low, float step,
                           float scale, float bias, int bits, i64 begin, i64 end, Out8 codes) {
    const float* by = data_or_null(d);
    float* known = data_or_null(believed);
    RUN(begin, end, columns(x), k.affine_codes(x.data(), by, known, low, step, scale, bias, bits, columns(x),
                                               codes.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("affine_values", [](In8 codes, float low, float step, OutF out) {
    RUN(0, rows(codes), columns(codes), k.affine_values(codes.data(), low, step, columns(codes), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("add_affine", [](In32x2 sums, In32 degree, float low, float step, bool keep, i64 begin, i64 end, OutF r) {
    RUN(begin, end, columns(r),
        k.add_affine(sums.data(), degree.data(), low, step, keep, columns(r), r.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("row_moments", [](InF x, OutD moments) {
    RUN(0, rows(x), columns(x), k.row_moments(x.data(), columns(x), moments.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert());

  m.def("level_histogram", [](InF h, InF1 d, Array<i64, 1> out) {
    const i64 C = columns(h);
    std::mutex turn;
    nb::gil_scoped_release free_threads;
    constexpr i64 few = 8192;  // rows, so that no count of theirs leaves 32 bits
    parallel(0, (rows(h) + few - 1) / few, 1, [&](i64 begin, i64 end) {
      for (i64 part = begin; part < end; ++part) {
        std::array<std::array<std::uint32_t, 4096>, 2> counts{};  // two: neighbours of one level would wait for each other
        for (i64 row = part * few; row < std::min((part + 1) * few, rows(h)); ++row)
          for (i64 c = 0; c < C; ++c) {
            const float v = d.data()[row] * h.data()[row * C + c];
            std::uint32_t word;
            std::memcpy(&word, &v, sizeof word);
            ++counts[c & 1][(word >> 19) & 4095];
          }
        std::lock_guard<std::mutex> lock(turn);
        for (std::size_t level = 0; level < 4096; ++level) out.data()[level] += i64{counts[0][level]} + counts[1][level];
      }
    });
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("softmax", [](InF scores, Out32x1 classes, OutF1 confidence, std::optional<OutF> probabilities) {
    if (columns(scores) == 0) throw nb::value_error("softmax: scores has no columns, expected at least 1");
    float* p = data_or_null(probabilities);
    RUN(0, rows(scores), 32 * columns(scores),
        k.softmax(scores.data(), columns(scores), classes.data(), confidence.data(), p, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none());

  m.def("normalise_dense", [](InF x, int norm, OutF out) {
    RUN(0, rows(x), columns(x), k.normalise_dense(x.data(), columns(x), norm, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  m.def("normalise_csr", [](In64 indptr, InF1 values, int norm, OutF1 out) {
    RUN(0, rows(indptr) - 1, 64, k.normalise_csr(indptr.data(), values.data(), norm, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  m.def("feature_codes_dense", [](InF x, int norm, int bits, bool is_signed, Out16 codes, OutF1 scale) {
    RUN(0, rows(x), 8 * columns(x), k.feature_codes_dense(x.data(), columns(x), norm, bits, is_signed, codes.data(),
                                                          scale.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("feature_codes_csr", [](In64 indptr, InF1 values, i64, int norm, int bits, bool is_signed, Out16x1 codes,
                                OutF1 scale) {
    RUN(0, rows(indptr) - 1, 256, k.feature_codes_csr(indptr.data(), values.data(), norm, bits, is_signed,
                                                      codes.data(), scale.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert());

  m.def("matmul_codes_dense", [](In16 codes, InW weights, Out32 out) {
    const i64 F = columns(codes), H = columns(weights);
    const BlockedCodes blocks(weights.data(), F, H);
    RUN(0, rows(codes), F * H / 16, k.matmul_codes_dense(codes.data(), blocks.view(), F, H, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("matmul_codes_csr", [](In64 indptr, In32 indices, In16x1 codes, InW weights, Out32 out) {
    RUN(0, rows(out), 8 * columns(out), k.matmul_codes_csr(indptr.data(), indices.data(), codes.data(),
                                                           weights.data(), columns(weights), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert());

  m.def("matmul_float_dense", [](InF x, InF weights, OutF out) {
    const i64 F = columns(x), H = columns(weights);
    const auto blocks = blocked<float>(weights.data(), F, H);
    RUN(0, rows(x), F * H / 8, k.matmul_float_dense(x.data(), blocks.get(), F, H, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("matmul_float_csr", [](In64 indptr, In32 indices, InF1 values, InF weights, OutF out) {
    RUN(0, rows(out), 8 * columns(out), k.matmul_float_csr(indptr.data(), indices.data(), values.data(),
                                                           weights.data(), columns(weights), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert());

  m.def("hidden_codes", [](In32x2 acc, InF1 row_scale, float weight_step, InF1 bias, float hidden_step, int bits,
                           Out16 codes, std::optional<OutD> moments) {
    double* m3 = data_or_null(moments);
    RUN(0, rows(acc), columns(acc), k.hidden_codes(acc.data(), row_scale.data(), weight_step, bias.data(), hidden_step,
                                                   bits, columns(acc), codes.data(), m3, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
     nb::arg().noconvert(), nb::arg().noconvert().none());

  m.def("perceptron_dense", [](In16 codes, InF1 scale, InW weight1, float step1, InF1 bias1, float hidden_step,
                               int hidden_bits, InW weight2, float step2, InF1 bias2, std::optional<OutD> moments,
                               OutF out) {
    Perceptron net{};
    net.codes = codes.data();
    net.F = columns(codes);
    run_perceptron(net, rows(codes), scale, weight1, step1, bias1, hidden_step, hidden_bits, weight2, step2, bias2,
                   data_or_null(moments), out);
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(),
     nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(),
     nb::arg().noconvert());

  m.def("perceptron_csr", [](In64 indptr, In32 indices, In16x1 codes, InF1 scale, InW weight1, float step1, InF1 bias1,
                             float hidden_step, int hidden_bits, InW weight2, float step2, InF1 bias2,
                             std::optional<OutD> moments, OutF out) {
    Perceptron net{};
    net.indptr = indptr.data();
    net.indices = indices.data();
    net.codes = codes.data();
    net.F = rows(weight1);
    run_perceptron(net, rows(indptr) - 1, scale, weight1, step1, bias1, hidden_step, hidden_bits, weight2, step2,
                   bias2, data_or_null(moments), out);
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(),
     nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert());

  m.def("scores_from_codes", [](In32x2 acc, float scale, InF1 bias, OutF out) {
    RUN(0, rows(acc), columns(acc),
        k.scores_from_codes(acc.data(), scale, bias.data(), columns(acc), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());

  // Philox alone, for the published known answers: counter (4,), key (2,), out (4,).
  m.def("philox", [](Array<const std::uint32_t, 1> counter, Array<const std::uint32_t, 1> key,
                     Array<std::uint32_t, 1> out) {
    if (rows(counter) != 4 || rows(key) != 2 || rows(out) != 4)
      throw nb::value_error("philox: expected counter (4,), key (2,), out (4,)");
    active().philox(counter.data(), key.data(), out.data());
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("keyed_bits", [](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer,
                         std::uint32_t round, In64 index, i64 width, Array<std::uint32_t, 2> out) {
    const Key key{seed, epoch, stage, layer, round};
    RUN(0, rows(index), 8 * width, k.keyed_bits(key, index.data(), width, out.data(), b, e))
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  m.def("dropout_dense", [](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer,
                            In64 index, i64 width, double p, OutF out) {
    const Key key{seed, epoch, stage, layer, 0};
    RUN(0, rows(index), 8 * width,
        k.dropout_dense(key, index.data(), width, threshold(p), kept(p), out.data(), b, e))
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

  m.def("dropout_csr", [](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer,
                          In64 index, In64 indptr, In32 indices, double p, OutF1 out) {
    const Key key{seed, epoch, stage, layer, 0};
    RUN(0, rows(index), 256, k.dropout_csr(key, index.data(), indptr.data(), indices.data(), threshold(p), kept(p),
                                           out.data(), b, e))
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());

  const auto thin = [&m](const char* name, auto example, auto which) {
    using Values = decltype(example);
    m.def(name, [which](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer, In64 index,
                        double p, Values x, OutF out) {
      const Key key{seed, epoch, stage, layer, 0};
      RUN(0, rows(index), 8 * columns(x),
          (k.*which)(key, index.data(), columns(x), threshold(p), x.data(), out.data(), b, e))
    }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
       nb::arg().noconvert());
  };
  thin("thin_codes", In16{}, &Kernels::thin_codes);
  thin("thin_values", InF{}, &Kernels::thin_values);

  m.def("matmul_thin", [](InF x, InF weights, OutF out) {
    const i64 F = columns(x), H = columns(weights);
    const auto blocks = blocked<float>(weights.data(), F, H);
    RUN(0, rows(x), F * H / 16, k.matmul_thin(x.data(), blocks.get(), F, H, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("add_transposed", [](InF x, InF1 scale, InF grad, OutF out) {
    const i64 F = columns(x), H = columns(grad);
    const i64 tiles = (F + kTileFeatures - 1) / kTileFeatures * ((H + kTileColumns - 1) / kTileColumns);
    const Kernels& k = active();
    nb::gil_scoped_release free_threads;
    parallel(0, tiles, 1, [&](i64 b, i64 e) {
      k.add_transposed(x.data(), scale.data(), grad.data(), rows(x), F, H, out.data(), b, e);
    });
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("add_transposed_csr", [](In64 indptr, In32 indices, InF1 values, InF1 scale, InF grad, OutF out) {
    const Kernels& k = active();
    nb::gil_scoped_release free_threads;
    parallel(0, columns(grad), kBlock, [&](i64 b, i64 e) {
      k.add_transposed_csr(indptr.data(), indices.data(), values.data(), scale.data(), grad.data(), rows(grad),
                           columns(grad), out.data(), b, e);
    });
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
     nb::arg().noconvert());

  m.def("activate", [](InF sums, InF1 row_scale, float weight_step, InF1 bias, float step, int bits, std::uint64_t seed,
                       std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer, In64 index, double p, OutF out,
                       std::optional<OutF> grad, std::optional<OutD1> errors, std::optional<OutD> moments) {
    if (errors.has_value() && !grad.has_value()) throw nb::value_error("activate: errors need grad");
    const Activation work{sums.data(), row_scale.data(), bias.data(), index.data(), out.data(), data_or_null(grad),
                          data_or_null(errors), data_or_null(moments), {seed, epoch, stage, layer, 0}, threshold(p),
                          columns(sums), bits, weight_step, step, p > 0.0};
    RUN(0, rows(sums), 8 * columns(sums), k.activate(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert().none());
}
