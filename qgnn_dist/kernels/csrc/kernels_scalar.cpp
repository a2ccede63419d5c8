// SPDX-License-Identifier: Apache-2.0
// The scalar twin: baseline instructions only, and the specification that the AVX2 build is tested against.
#define QGNN_ISA scalar
#include "kernels_body.h"

namespace qgnn {
namespace scalar {

static void aggregate_codes(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64, i64 C,
                            int bits, std::int32_t* out, i64 begin, i64 end) {
  const i64 B = row_bytes(C, bits);
  const std::int32_t mask = (1 << bits) - 1;
  for (i64 row = begin; row < end; ++row) {
    std::int32_t* sum = out + row * C;
    std::memset(sum, 0, C * sizeof(std::int32_t));
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      const std::uint8_t* packed = payload + indices[e] * B;
      for (i64 first = 0, shift = 0; first < C; first += B, shift += bits) {
        const i64 n = C - first < B ? C - first : B;
        for (i64 i = 0; i < n; ++i) sum[first + i] += (packed[i] >> shift) & mask;
      }
    }
  }
}

static void matmul_codes_dense(const std::int16_t* codes, const std::int16_t* pairs, i64 F, i64 H, std::int32_t* out,
                               i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    std::int32_t* sum = out + row * H;
    std::memset(sum, 0, H * sizeof(std::int32_t));
    for (i64 f = 0; f < F; ++f) {
      const std::int32_t x = codes[row * F + f];
      const std::int16_t* w = pairs + (f / 2) * H * 2 + f % 2;
      for (i64 j = 0; j < H; ++j) sum[j] += x * static_cast<std::int32_t>(w[2 * j]);
    }
  }
}

}  // namespace scalar

using namespace scalar;
QGNN_TABLE(kernels_scalar, "scalar");

}  // namespace qgnn
