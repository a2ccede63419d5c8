// SPDX-License-Identifier: Apache-2.0
// The whole perceptron, from codes of features to scores, and its first product in training. Included after what they
// call, once for each instruction set.

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

// One tile of `matmul_thinned`, of at most kLookupRows rows; whole numbers, made floats at the end.
QGNN_INLINE void thinned_tile(const ThinnedProduct& s, const std::int16_t* codes, i64 count, float* out,
                              [[maybe_unused]] std::uint8_t* index) {
#ifdef __AVX2__
  if (s.lookup.tables != nullptr && lookup_product(s, codes, count, out, index)) return;
#endif
  auto* sums = reinterpret_cast<std::int32_t*>(out);
  if (s.blocks.pairs != nullptr) {
    matmul_codes_dense(codes, s.blocks, s.F, s.H, sums, 0, count);
  } else {
    std::memset(sums, 0, count * s.H * sizeof *sums);
    for (i64 row = 0; row < count; ++row)
      for (i64 f = 0; f < s.F; ++f) {
        const std::int32_t x = codes[row * s.F + f];
        if (x == 0) continue;
        for (i64 j = 0; j < s.H; ++j) sums[row * s.H + j] += x * s.weights[f * s.H + j];
      }
  }
  for (i64 i = 0; i < count * s.H; ++i) {
    std::int32_t sum;
    std::memcpy(&sum, out + i, sizeof sum);
    out[i] = static_cast<float>(sum);
  }
}

static void matmul_thinned(const ThinnedProduct& s, std::uint8_t* scratch, i64 begin, i64 end) {
  auto* thinned = reinterpret_cast<std::int16_t*>(scratch);
  std::uint8_t* index = scratch + 2 * kLookupRows * s.F;
  for (i64 row = begin; row < end; row += kLookupRows) {
    const i64 count = end - row < kLookupRows ? end - row : kLookupRows;
    const std::int16_t* codes = s.codes + row * s.F;
    if (s.dropped) {
      thin(s.key, s.rows + row, s.F, s.threshold, codes, thinned, 0, count);
      codes = thinned;
    }
    thinned_tile(s, codes, count, s.out + row * s.H, index);
  }
}

}  // namespace QGNN_ISA
}  // namespace qgnn
