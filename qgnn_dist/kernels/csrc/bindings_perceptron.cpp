// SPDX-License-Identifier: Apache-2.0
// Python's view of the perceptron's kernels, in prediction and training, and of random numbers.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "weights.h"

namespace qgnn {
namespace {

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

[[noreturn]] void throw_pairs(const char* function, i64 features) {
  throw nb::value_error((std::string(function) + ": tables expected " + std::to_string((features + 1) / 2) +
                         " along axis 1, half the features").c_str());
}

std::uint64_t threshold(double p) { return static_cast<std::uint64_t>(std::llrint(p * 4294967296.0)); }
float kept(double p) { return static_cast<float>(1.0 / (1.0 - p)); }

}  // namespace

void bind_perceptron(nb::module_& m) {
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

  // Entries are counted before they are moved, so that rows may be any thread's.
  m.def("thin_csr", [](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer, In64 index,
                       double p, In64 indptr, In32 indices, InF1 values, Out64 kept_indptr, Out32x1 kept_indices,
                       OutF1 kept_values) {
    const Key key{seed, epoch, stage, layer, 0};
    const Kernels& k = active();
    const i64 N = rows(index), *from = indptr.data();
    i64* to = kept_indptr.data();
    nb::gil_scoped_release free_threads;
    const std::unique_ptr<std::uint8_t[]> keep(new std::uint8_t[values.size()]);
    parallel(0, N, grain(256), [&](i64 begin, i64 end) {
      k.keep_csr(key, index.data(), from, indices.data(), threshold(p), keep.get(), begin, end);
      for (i64 row = begin; row < end; ++row) {
        i64 count = 0;
        for (i64 e = from[row]; e < from[row + 1]; ++e) count += keep[e] &= values.data()[e] != 0.0f;
        to[row + 1] = count;
      }
    });
    to[0] = 0;
    for (i64 row = 0; row < N; ++row) to[row + 1] += to[row];
    parallel(0, N, grain(256), [&](i64 begin, i64 end) {
      i64 at = to[begin];
      const i64 stop = to[end];  // the next thread's entries begin there
      for (i64 e = from[begin]; at < stop; ++e) {
        kept_indices.data()[at] = indices.data()[e];
        kept_values.data()[at] = values.data()[e];
        at += keep[e];
      }
    });
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

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

  // Tables of LookupTables for `matmul_thinned`, which takes none where they don't fit.
  m.def("lookup_tables", [](InW weights, Array<std::uint8_t, 3> out) {
    if (static_cast<i64>(out.shape(1)) != (rows(weights) + 1) / 2) throw_pairs("lookup_tables", rows(weights));
    const BlockedTables made(weights.data(), rows(weights), columns(weights));
    const std::size_t bytes = out.size();
    if (made.view.tables == nullptr) std::memset(out.data(), 0, bytes);
    else std::memcpy(out.data(), made.view.tables, bytes);
  }, nb::arg().noconvert(), nb::arg().noconvert());

  m.def("matmul_thinned", [](std::uint64_t seed, std::uint32_t epoch, std::uint32_t stage, std::uint32_t layer,
                             In64 index, double p, In16 codes, InW weights,
                             std::optional<Array<const std::uint8_t, 3>> tables, OutF out) {
    const i64 F = columns(codes), H = columns(weights);
    if (tables.has_value() && static_cast<i64>(tables->shape(1)) != (F + 1) / 2) throw_pairs("matmul_thinned", F);
    const LookupFit fit(weights.data(), F, H);
    const bool looked_up = tables.has_value() && fit.fits;
    const BlockedCodes blocks(weights.data(), looked_up ? 0 : F, H);
    std::vector<std::int32_t> sums(looked_up ? H : 0);
    for (i64 f = 0; f < (looked_up ? F : 0); ++f)
      for (i64 j = 0; j < H; ++j) sums[j] += weights.data()[f * H + j];
    const ThinnedProduct product{codes.data(), index.data(), weights.data(), sums.data(),
                                 looked_up ? CodeWeights{} : blocks.view(),
                                 {looked_up ? tables->data() : nullptr, fit.shift, fit.flush}, out.data(),
                                 {seed, epoch, stage, layer, 0}, threshold(p), F, H, p > 0.0};
    const Kernels& k = active();
    nb::gil_scoped_release free_threads;
    parallel(0, rows(codes), kLookupRows, [&](i64 b, i64 e) {
      const auto scratch = aligned<std::uint8_t>(thinned_scratch(F));
      k.matmul_thinned(product, scratch.get(), b, e);
    });
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert());

  m.def("recall", [](In8 kept, int bits, OutF out, OutF grad) {
    RUN(0, rows(out), 4 * columns(out), k.recall(kept.data(), bits, columns(out), out.data(), grad.data(), b, e))
  }, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());

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
                       std::optional<OutF> grad, std::optional<OutD1> errors, std::optional<OutD> moments,
                       std::optional<Out8> kept) {
    if (errors.has_value() && !grad.has_value()) throw nb::value_error("activate: errors need grad");
    if (kept.has_value() && step == 0.0f) throw nb::value_error("activate: kept needs a grid, step is 0");
    const Activation work{sums.data(), row_scale.data(), bias.data(), index.data(), out.data(), data_or_null(grad),
                          data_or_null(errors), data_or_null(moments), data_or_null(kept),
                          {seed, epoch, stage, layer, 0}, threshold(p), columns(sums), bits, weight_step, step, p > 0.0};
    RUN(0, rows(sums), 8 * columns(sums), k.activate(work, b, e))
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert().none(),
     nb::arg().noconvert().none());
}

}  // namespace qgnn
