// SPDX-License-Identifier: Apache-2.0
// Passes over the nodes of a graph that decide who owns them; qgnn_dist/kernels/partition.py says what each computes.
// Each node sees what the ones before it did, so a pass runs on one thread, and there is one build of it.
#pragma once
#include <vector>

#include "kernels.h"

namespace qgnn {

// CSR, both directions; `edge_weight` null: 1 each.
struct CutGraph {
  const i64* indptr;
  const std::int32_t* indices;
  const i64* edge_weight;
  i64 N;
};

constexpr int kLoads = 3;  // nodes, directed edges, training nodes

struct JoinScratch {
  std::vector<i64> votes;                      // (N) zeros
  std::vector<std::int32_t> waiting, touched;  // (N + 1) of -1; as many as a node has votes
};

i64 join_clusters(const CutGraph& g, const std::int32_t* weight, i64 limit, i64 most, std::uint32_t salt, bool gather,
                  std::int32_t* labels, std::int32_t* sizes, JoinScratch& scratch);

// The graph of groups: sorted pairs, `indptr` (groups + 1).
struct Contracted {
  std::vector<i64> indptr, weights;
  std::vector<std::int32_t> indices;
};

// False where more than `room` pairs of groups have edges.
bool contract(const CutGraph& g, const std::int32_t* labels, i64 groups, i64 most, std::uint32_t salt, i64 room,
              Contracted& out);

// `node_weight` (N, kLoads), or null: 1, the degree, `train`; `train`, `order`, `frozen` may be null.
struct Placement {
  const i64* node_weight;
  const std::uint8_t* train;
  const std::int32_t* order;
  const std::uint8_t* frozen;
  const i64* capacity;  // (kLoads)
  i64 P;
  double pull;
};

i64 place_nodes(const CutGraph& g, const Placement& how, std::int32_t* owners, i64* loads);

}  // namespace qgnn
