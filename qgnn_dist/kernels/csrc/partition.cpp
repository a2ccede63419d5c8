// SPDX-License-Identifier: Apache-2.0
#include "partition.h"

#include <algorithm>
#include <limits>

namespace qgnn {

namespace {

std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of a node's edges: all of them, or about `most` at equal distances.
struct Sample {
  i64 first, end, step;
  Sample(const CutGraph& g, i64 node, i64 most, std::uint32_t salt)
      : first(g.indptr[node]), end(g.indptr[node + 1]), step(1) {
    if (most == 0 || end - first <= most) return;
    step = (end - first + most - 1) / most;
    first += mix(static_cast<std::uint32_t>(node) ^ salt) % static_cast<std::uint64_t>(step);
  }
};

// Counts of pairs by their key, in open addressing.
class Pairs {
 public:
  Pairs(i64 room, i64 expected) : room_(room) {
    std::size_t count = 1 << 10;
    while (count < static_cast<std::size_t>(expected)) count *= 2;
    resize(count);
  }
  bool add(std::uint64_t key, i64 weight) {
    Entry* entry = find(key);
    if (entry->weight == 0) {
      if (used_ == room_) return false;
      if (2 * (used_ + 1) > static_cast<i64>(entries_.size())) {
        grow();
        entry = find(key);
      }
      entry->key = key;
      ++used_;
    }
    entry->weight += weight;
    return true;
  }
  i64 used() const { return used_; }
  void for_each(const auto& work) const {
    for (const Entry& e : entries_)
      if (e.weight != 0) work(e.key, e.weight);
  }

 private:
  struct Entry { std::uint64_t key; i64 weight; };  // weight 0: free
  void resize(std::size_t count) {
    entries_.assign(count, Entry{0, 0});
    mask_ = count - 1;
  }
  Entry* find(std::uint64_t key) {
    std::uint64_t at = (key * 0x9e3779b97f4a7c15ull) >> 20 & mask_;
    while (entries_[at].weight != 0 && entries_[at].key != key) at = (at + 1) & mask_;
    return &entries_[at];
  }
  void grow() {
    std::vector<Entry> before;
    before.swap(entries_);
    resize(2 * before.size());
    for (const Entry& e : before)
      if (e.weight != 0) *find(e.key) = e;
  }
  std::vector<Entry> entries_;
  std::uint64_t mask_ = 0;
  i64 used_ = 0, room_;
};

}  // namespace

i64 join_clusters(const CutGraph& g, const std::int32_t* weight, i64 limit, i64 most, std::uint32_t salt, bool gather,
                  std::int32_t* labels, std::int32_t* sizes, JoinScratch& scratch) {
  i64* votes = scratch.votes.data();
  std::int32_t *waiting = scratch.waiting.data(), *touched = scratch.touched.data();
  i64 moves = 0;
  for (i64 node = 0; node < g.N; ++node) {
    const Sample some(g, node, most, salt);
    i64 count = 0;
    for (i64 j = some.first; j < some.end; j += some.step) {
      const std::int32_t cluster = labels[g.indices[j]];
      if (votes[cluster] == 0) touched[count++] = cluster;
      votes[cluster] += g.edge_weight ? g.edge_weight[j] : 1;
    }
    const std::int32_t own = labels[node];
    std::int32_t goal = own;
    i64 best = votes[own], most_full = 0, full = g.N;
    std::uint32_t rank = 0;
    for (i64 i = 0; i < count; ++i) {
      const std::int32_t cluster = touched[i];
      const i64 mine = votes[cluster];
      if (mine < best || (mine == best && goal == own)) continue;  // its own cluster wins ties
      if (i64{sizes[cluster]} + weight[node] > limit) {
        if (mine > most_full) { most_full = mine; full = cluster; }
        continue;
      }
      const std::uint32_t here = mix(static_cast<std::uint32_t>(cluster) ^ salt);
      if (mine > best || here < rank) { best = mine; goal = cluster; rank = here; }
    }
    // Whoever stays alone, since its neighbours' cluster is full or it has none, joins the last one alike.
    if (gather && goal == own && sizes[own] == weight[node] && (full != g.N || count == 0)) {
      const std::int32_t last = waiting[full];
      if (last >= 0 && last != own && i64{sizes[last]} + weight[node] <= limit) goal = last;
      else waiting[full] = own;
    }
    for (i64 i = 0; i < count; ++i) votes[touched[i]] = 0;
    if (goal != own) {
      sizes[own] -= weight[node];
      sizes[goal] += weight[node];
      labels[node] = goal;
      ++moves;
    }
  }
  return moves;
}

bool contract(const CutGraph& g, const std::int32_t* labels, i64 groups, i64 most, std::uint32_t salt, i64 room,
              Contracted& out) {
  Pairs pairs(room, std::min(room, g.N));
  for (i64 node = 0; node < g.N; ++node) {
    const Sample some(g, node, most, salt);
    const std::uint64_t row = static_cast<std::uint64_t>(labels[node]);
    for (i64 j = some.first; j < some.end; j += some.step) {
      const std::uint64_t column = static_cast<std::uint64_t>(labels[g.indices[j]]);
      if (column != row && !pairs.add(row << 32 | column, some.step * (g.edge_weight ? g.edge_weight[j] : 1)))
        return false;
    }
  }
  // Sorted by two stable distributions, by column and then by row.
  const std::size_t used = static_cast<std::size_t>(pairs.used()), rows = static_cast<std::size_t>(groups);
  std::vector<i64> places(rows + 1, 0), by_column(used);
  std::vector<std::uint64_t> keys(used);
  pairs.for_each([&](std::uint64_t key, i64) { ++places[(key & 0xffffffffu) + 1]; });
  for (std::size_t i = 0; i < rows; ++i) places[i + 1] += places[i];
  pairs.for_each([&](std::uint64_t key, i64 weight) {
    const i64 at = places[key & 0xffffffffu]++;
    keys[at] = key;
    by_column[at] = weight;
  });
  out.indptr.assign(rows + 1, 0);
  out.indices.resize(used);
  out.weights.resize(used);
  for (const std::uint64_t key : keys) ++out.indptr[(key >> 32) + 1];
  for (std::size_t i = 0; i < rows; ++i) out.indptr[i + 1] += out.indptr[i];
  places.assign(out.indptr.begin(), out.indptr.end());
  for (std::size_t i = 0; i < used; ++i) {
    const i64 at = places[keys[i] >> 32]++;
    out.indices[at] = static_cast<std::int32_t>(keys[i] & 0xffffffffu);
    out.weights[at] = by_column[i];
  }
  return true;
}

namespace {

// `Owner` may be narrow, so that those of many nodes lie in a near cache; its largest value: in no part.
template <typename Owner>
i64 place(const CutGraph& g, const Placement& how, Owner* owners, i64* loads, i64* ties) {
  constexpr Owner none = std::numeric_limits<Owner>::max();
  double share[kLoads];  // of a part's capacity, that one unit takes
  for (int d = 0; d < kLoads; ++d) share[d] = how.capacity[d] > 0 ? 1.0 / static_cast<double>(how.capacity[d]) : 0.0;
  const auto over = [&](const i64* load) {
    return load[0] > how.capacity[0] || load[1] > how.capacity[1] || load[2] > how.capacity[2];
  };
  i64 moves = 0;
  for (i64 turn = 0; turn < g.N; ++turn) {
    const i64 node = how.order ? how.order[turn] : turn, begin = g.indptr[node], end = g.indptr[node + 1];
    if (how.frozen && how.frozen[node]) continue;
    const i64 own = owners[node] == none ? -1 : static_cast<i64>(owners[node]);
    bool torn = own < 0 || over(loads + own * kLoads);
    std::fill_n(ties, how.P, 0);
    for (i64 j = begin; j < end; ++j) {
      const Owner part = owners[g.indices[j]];
      if (part == none) continue;
      ties[part] += g.edge_weight ? g.edge_weight[j] : 1;
      torn |= static_cast<i64>(part) != own;
    }
    if (!torn) continue;  // no other part is nearer, as long as pull is at most 1
    i64 weight[kLoads] = {1, end - begin, how.train ? how.train[node] : 0};
    if (how.node_weight) std::copy_n(how.node_weight + node * kLoads, kLoads, weight);
    if (own >= 0)
      for (int d = 0; d < kLoads; ++d) loads[own * kLoads + d] -= weight[d];
    i64 goal = -1, spare = -1;
    double best = 0, fill_of_goal = 0, fill_of_spare = 0;
    bool spare_has_place = false;
    for (i64 p = 0; p < how.P; ++p) {
      if (goal >= 0 && static_cast<double>(ties[p]) < best) continue;
      const i64 after[kLoads] = {loads[p * kLoads] + weight[0], loads[p * kLoads + 1] + weight[1],
                                 loads[p * kLoads + 2] + weight[2]};
      const double fill = std::max(static_cast<double>(after[0]) * share[0],
                                   std::max(static_cast<double>(after[1]) * share[1],
                                            static_cast<double>(after[2]) * share[2]));
      if (over(after)) {
        const bool place = after[0] <= how.capacity[0];
        if (spare < 0 || (place && !spare_has_place) || (place == spare_has_place && fill < fill_of_spare)) {
          spare = p;
          fill_of_spare = fill;
          spare_has_place = place;
        }
        continue;
      }
      const double score = static_cast<double>(ties[p]) - how.pull * static_cast<double>(weight[1]) * fill;
      if (goal < 0 || score > best || (score == best && goal != own && (p == own || fill < fill_of_goal))) {
        goal = p;
        best = score;
        fill_of_goal = fill;
      }
    }
    if (goal < 0) goal = own >= 0 ? own : spare;
    for (int d = 0; d < kLoads; ++d) loads[goal * kLoads + d] += weight[d];
    if (goal != own) {
      owners[node] = static_cast<Owner>(goal);
      ++moves;
    }
  }
  return moves;
}

}  // namespace

i64 place_nodes(const CutGraph& g, const Placement& how, std::int32_t* owners, i64* loads) {
  const auto run = [&]<typename Owner>(Owner none) {
    std::vector<Owner> found(static_cast<std::size_t>(g.N));
    std::vector<i64> ties(static_cast<std::size_t>(how.P));
    for (i64 i = 0; i < g.N; ++i) found[i] = owners[i] < 0 ? none : static_cast<Owner>(owners[i]);
    const i64 moves = place(g, how, found.data(), loads, ties.data());
    for (i64 i = 0; i < g.N; ++i) owners[i] = found[i] == none ? -1 : static_cast<std::int32_t>(found[i]);
    return moves;
  };
  if (how.P < 255) return run(std::numeric_limits<std::uint8_t>::max());
  return run(std::numeric_limits<std::uint32_t>::max());
}

}  // namespace qgnn
