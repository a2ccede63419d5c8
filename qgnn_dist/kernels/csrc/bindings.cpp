// SPDX-License-Identifier: Apache-2.0
// Python's view of the kernels: NumPy arrays in, caller's arrays out. Here messages and layers; bindings_perceptron.cpp
// has the rest.
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>

#include "arrays.h"
#include "bindings.h"
#include "long_rows.h"

using namespace qgnn;

namespace {

void check_width(const char* function, i64 width, const char* argument = "h") {
  if (width > kLayerColumns)
    throw nb::value_error((std::string(function) + ": " + argument + " has " + std::to_string(width) + " columns, expected at most " +
                           std::to_string(kLayerColumns)).c_str());
}

// The power of two that a step is of a unit; 0 for a round that is not sent.
int shift(const char* function, const char* argument, float step, float unit) {
  int exponent = 0;
  const float share = step / unit;
  if (step == 0.0f) return 0;
  if (!(unit > 0.0f) || std::frexp(unit, &exponent) != 0.5f || !(share >= 1.0f) || !(share < 32768.0f) ||
      std::frexp(share, &exponent) != 0.5f)
    throw nb::value_error((std::string(function) + ": " + argument + " is " + std::to_string(step) +
                           ", expected a power of two from 1 to 16384 times the unit " + std::to_string(unit)).c_str());
  return exponent - 1;
}

// Ŷ in fixed point, of either type that it may have (dispatch.py names the argument).
using Whole = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutWhole = Array<std::uint16_t, 2>;

bool is_narrow(const std::optional<Whole>& believed) {
  if (believed && believed->dtype() != nb::dtype<std::uint8_t>() && believed->dtype() != nb::dtype<std::uint16_t>())
    throw nb::type_error("believed is neither uint8 nor uint16");
  return believed && believed->dtype() == nb::dtype<std::uint8_t>();
}

}  // namespace

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
    RUN(0, rows(index), B, k.gather_rows(payload.data(), rows(payload), index.data(), B, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("aggregate_codes", [](In64 indptr, In32 indices, In8 payload, int bits, i64 begin, i64 end, Out32 out) {
    const i64 C = columns(out);
    const LongSums longs("aggregate_codes", indptr.data(), indices.data(), payload.data(), rows(payload), C, bits, begin,
                         end);
    RUN(begin, end, 16 * C, k.aggregate_codes(indptr.data(), indices.data(), payload.data(), rows(payload), C, bits,
                                              longs.view(), out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("aggregate_scaled", [](In64 indptr, In32 indices, In8 payload, int bits, i64 begin, i64 end, OutF out) {
    check_width("aggregate_scaled", columns(out), "out");
    RUN(begin, end, 16 * columns(out), k.aggregate_scaled(indptr.data(), indices.data(), payload.data(), rows(payload),
                                                          columns(out), bits, out.data(), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert());

  m.def("code_gradients", [](InF h, InF1 d, int bits, std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage,
                             std::uint32_t layer, std::uint32_t round, In64 index, i64 begin, i64 end, Out8 payload) {
    check_width("code_gradients", columns(h));
    const GradientRows work{nullptr, payload.data(), index.data(), {seed, epoch, stage, layer, round}, 0, bits};
    RUN(begin, end, 8 * columns(h), k.code_gradients(work, h.data(), d.data(), columns(h), b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert());

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

  m.def("layer", [](In64 indptr, In32 indices, In8 payload, int bits, float step, InF1 d, InF residual, OutF r, InF h, std::optional<InF> before, OutF out, bool gradient, float coefficient, float a,
                    float b_, float c, std::optional<OutF> believed, float next_step, Out8 next,
                    std::optional<OutD> moments, std::optional<OutD1> dots, i64 begin, i64 end) {
    check_width("layer", columns(h));
    const LongSums longs("layer", indptr.data(), indices.data(), payload.data(), rows(payload), columns(h), bits, begin,
                         step != 0.0f ? end : begin);
    const Layer work{indptr.data(), indices.data(), payload.data(), d.data(), residual.data(), h.data(),
                     data_or_null(before), out.data(), r.data(), data_or_null(believed), next.data(),
                     data_or_null(moments), data_or_null(dots), nullptr, longs.view(), rows(payload), columns(h),
                     bits, step, next_step, a, b_, c, coefficient, believed.has_value(), gradient};
    RUN(begin, end, 32 * columns(h), k.layer(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(),
     nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(),
     nb::arg());

  m.def("fixed_layer", [](In64 indptr, In32 indices, In8 payload, int bits, float step, InF1 d, InW residual,
                          float residual_step, float unit, float middle, OutWhole r, std::optional<In32> far_rows,
                          std::optional<OutF> far, InF h, std::optional<InF> before, OutF out, bool gradient,
                          float coefficient, float a, float b_, float c, std::optional<Whole> believed,
                          float next_step, Out8 next, std::optional<OutD> moments, std::optional<OutD1> dots,
                          i64 begin, i64 end) {
    check_width("fixed_layer", columns(h));
    if (far_rows.has_value() != far.has_value())
      throw nb::value_error("fixed_layer: one of far_rows and far is None; expected both or none");
    const LongSums longs("fixed_layer", indptr.data(), indices.data(), payload.data(), rows(payload), columns(h), bits, begin,
                         step != 0.0f ? end : begin);
    const FixedLayer fixed{residual.data(), nullptr, r.data(), data_or_null(believed), data_or_null(far_rows),
                           data_or_null(far), far ? rows(*far) : 0, columns(r), unit, residual_step, middle,
                           shift("fixed_layer", "step", step, unit), shift("fixed_layer", "next_step", next_step, unit),
                           is_narrow(believed)};
    const Layer work{indptr.data(), indices.data(), payload.data(), d.data(), nullptr, h.data(),
                     data_or_null(before), out.data(), nullptr, nullptr, next.data(), data_or_null(moments),
                     data_or_null(dots), &fixed, longs.view(), rows(payload), columns(h), bits, step, next_step, a, b_, c,
                     coefficient, believed.has_value(), gradient};
    RUN(begin, end, 32 * columns(h), k.layer(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none(),
     nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(),
     nb::arg());

  m.def("fixed_start", [](InF h, InF1 d, float residual_step, int residual_bits, float unit, float step, int bits,
                          i64 begin, i64 end, Array<std::int8_t, 2> residual, std::optional<Whole> believed,
                          Out8 payload, std::optional<OutD> moments) {
    check_width("fixed_start", columns(h));
    shift("fixed_start", "residual_step", residual_step, residual_step);
    const FixedLayer fixed{nullptr, residual.data(), nullptr, data_or_null(believed), nullptr, nullptr, 0,
                           columns(residual), unit, residual_step, 0.0f, 0, shift("fixed_start", "step", step, unit),
                           is_narrow(believed)};
    const Layer work{nullptr, nullptr, nullptr, d.data(), nullptr, h.data(), nullptr, nullptr, nullptr,
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

  m.def("layer_scaled", [](In64 indptr, In32 indices, In8 payload, int bits, InF1 d, InF h0, InF h,
                           std::optional<InF> before, OutF out, std::optional<OutF> p, bool first, bool second,
                           float coefficient, float a, float b_, float c, std::optional<Out8> next, std::uint64_t seed,
                           std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer, std::uint32_t round,
                           In64 index, i64 begin, i64 end) {
    check_width("layer_scaled", columns(h));
    if (((second || coefficient != 0.0f) && !p.has_value()) || (second && !before.has_value()))
      throw nb::value_error("layer_scaled: a multiplier needs p, and its second round needs before");
    const FloatLayer work{indptr.data(), indices.data(), nullptr, d.data(), h0.data(), h.data(), data_or_null(before),
                          out.data(), data_or_null(p), nullptr, nullptr, columns(h), a, b_, c, coefficient, first,
                          second};
    const GradientRows messages{payload.data(), data_or_null(next), index.data(), {seed, epoch, stage, layer, round},
                                rows(payload), bits};
    RUN(begin, end, 32 * columns(h), k.layer_scaled(work, messages, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg().noconvert().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
     nb::arg(), nb::arg());

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

  bind_perceptron(m);
  bind_partition(m);
}
