// SPDX-License-Identifier: Apache-2.0
// Weights laid out as the products read them; made at every call, since that costs less than one block of rows.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace qgnn {

struct Free { void operator()(void* p) const { std::free(p); } };
template <typename T>
using Aligned = std::unique_ptr<T[], Free>;

// `count` zeros, from a multiple of 32 bytes on.
template <typename T>
Aligned<T> aligned(i64 count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 32) / 32 * 32;
  void* memory = std::aligned_alloc(32, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0, bytes);
  return Aligned<T>(static_cast<T*>(memory));
}

// Weights (F, H) as (num_blocks(H), F, kBlock), zero past H, for whole registers.
template <typename To, typename From>
Aligned<To> blocked(const From* weights, i64 F, i64 H) {
  Aligned<To> out = aligned<To>(num_blocks(H) * F * kBlock);
  To* to = out.get();
  for (i64 j = 0; j < H; j += kBlock)
    for (i64 f = 0; f < F; ++f, to += kBlock) std::copy_n(weights + f * H + j, std::min(kBlock, H - j), to);
  return out;
}

// All of CodeWeights.
struct BlockedCodes {
  Aligned<std::int16_t> pairs;
  Aligned<std::int8_t> quads;
  Aligned<std::int32_t> sums;
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

// Whether sums of LookupTables fit their bytes, and the two numbers beside the tables.
struct LookupFit {
  bool fits = false;
  std::int32_t shift = 0;
  i64 flush = 0;

  LookupFit(const std::int8_t* weights, i64 F, i64 H) {
    if (F * H == 0) return;
    const auto [least, most] = std::minmax_element(weights, weights + F * H);
    shift = 6 * std::max(-std::int32_t{*least}, 0);
    const std::int32_t largest = shift + 6 * std::max(std::int32_t{*most}, 0);
    fits = largest <= 127 && (F + 1) / 2 * largest <= 65535;
    flush = 255 / std::max(largest, 1);
  }
};

// Tables of LookupTables; none where the sums don't fit.
struct BlockedTables {
  Aligned<std::uint8_t> tables;
  LookupTables view{nullptr, 0, 0};

  BlockedTables(const std::int8_t* weights, i64 F, i64 H) {
    const LookupFit fit(weights, F, H);
    if (!fit.fits) return;
    const std::int32_t shift = fit.shift;
    const i64 pairs = (F + 1) / 2;
    tables = aligned<std::uint8_t>(H * pairs * 16);
    for (i64 j = 0; j < H; ++j)
      for (i64 p = 0; p < pairs; ++p) {
        const int one = weights[2 * p * H + j], two = 2 * p + 1 < F ? weights[(2 * p + 1) * H + j] : 0;
        std::uint8_t* to = tables.get() + (j * pairs + p) * 16;
        for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint8_t>(shift + (i & 3) * one + (i >> 2) * two);
      }
    view = {tables.get(), shift, fit.flush};
  }
};

}  // namespace qgnn
