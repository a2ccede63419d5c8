// SPDX-License-Identifier: Apache-2.0
// Rows of so many neighbours that one thread would hold up the others.
#pragma once
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "arrays.h"

namespace qgnn {

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

}  // namespace qgnn
