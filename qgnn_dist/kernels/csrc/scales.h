// SPDX-License-Identifier: Apache-2.0
// The scale byte of a coded gradient row (ops in kernels/gradients.py). Included by kernels_body.h, once for each
// instruction set.

namespace qgnn {
namespace QGNN_ISA {

constexpr int kLeastExponent = -89, kMostExponent = 36, kExponentBias = 90;
constexpr std::uint8_t kZeroRow = 0, kOddRow = 127, kNegated = 128;

// What 1 means in a row, by its scale byte: bits 0-6 are the exponent above -90; 0 is a row of zeros, 127 one with
// numbers that are not finite. Bit 7: values are negated.
struct Scales {
  float at[256];
  constexpr Scales() : at() {
    for (int byte = 0; byte < 256; ++byte) {
      const int low = byte & 127;
      float size = 1.0f;
      for (int e = low - kExponentBias; e > 0; --e) size *= 2.0f;
      for (int e = low - kExponentBias; e < 0; ++e) size *= 0.5f;
      at[byte] = low == kZeroRow ? 0.0f : low == kOddRow ? __builtin_nanf("") : byte >= kNegated ? -size : size;
    }
  }
};
static constexpr Scales kScales;

// The level 0 of b bits: levels are -zero..zero+1.
QGNN_INLINE constexpr std::int32_t zero_code(int bits) { return (1 << (bits - 1)) - 1; }

}  // namespace QGNN_ISA
}  // namespace qgnn
