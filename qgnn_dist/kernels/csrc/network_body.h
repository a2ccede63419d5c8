// SPDX-License-Identifier: Apache-2.0
// The whole perceptron, from codes of features to scores. Included after what it calls, once for each instruction set.

namespace qgnn {
namespace QGNN_ISA {

// Rows through the perceptron, kPerceptronRows at a time, so that nothing of what lies between leaves the caches.
static void perceptron(const Perceptron& net, std::uint8_t* scratch, i64 begin, i64 end) {
  const i64 H = net.H, C = net.C;
  auto* sums = reinterpret_cast<std::int32_t*>(scratch);
  auto* scores = sums + kPerceptronRows * H;
  auto* hidden = reinterpret_cast<std::int16_t*>(scores + kPerceptronRows * C);
  for (i64 row = begin; row < end;) {
#ifdef __AVX2__
    if (net.lookup1.tables != nullptr && net.lookup2.tables != nullptr && net.moments == nullptr) {
      const i64 count = end - row < kLookupRows ? end - row : kLookupRows;
      if (perceptron_lookup(net, row, count, scratch)) {
        row += count;
        continue;
      }
    }
#endif
    const i64 count = end - row < kPerceptronRows ? end - row : kPerceptronRows;
    if (net.indptr == nullptr) matmul_codes_dense(net.codes + row * net.F, net.blocks1, net.F, H, sums, 0, count);
    else matmul_codes_csr(net.indptr + row, net.indices, net.codes, net.weight1, H, sums, 0, count);
    hidden_codes(sums, net.scale + row, net.step1, net.bias1, net.hidden_step, net.hidden_bits, H, hidden,
                 net.moments == nullptr ? nullptr : net.moments + row * 3, 0, count);
    matmul_codes_dense(hidden, net.blocks2, H, C, scores, 0, count);
    scores_from_codes(scores, net.scale2, net.bias2, C, net.out + row * C, 0, count);
    row += count;
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
