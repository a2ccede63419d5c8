// SPDX-License-Identifier: Apache-2.0
// Python's view of the passes that cut a graph.
#include <algorithm>
#include <memory>
#include <string>

#include "arrays.h"
#include "bindings.h"
#include "partition.h"

using namespace qgnn;

namespace {

template <typename T>
using Owned = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

// A NumPy array that keeps the vector's memory.
template <typename T>
Owned<T> handed_over(std::vector<T>&& values) {
  auto kept = std::make_unique<std::vector<T>>(std::move(values));
  std::vector<T>* raw = kept.get();
  nb::capsule owner(raw, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  kept.release();
  return Owned<T>(raw->data(), {raw->size()}, owner);
}

CutGraph graph(const In64& indptr, const In32& indices, std::optional<In64>& edge_weight) {
  return {indptr.data(), indices.data(), data_or_null(edge_weight), rows(indptr) - 1};
}

}  // namespace

void qgnn::bind_partition(nb::module_& m) {
  m.def("join_clusters", [](In64 indptr, In32 indices, std::optional<In64> edge_weight, In32 weight, i64 limit,
                            i64 most, std::uint32_t salt, bool gather, Out32x1 labels, Out32x1 sizes) {
    const CutGraph g = graph(indptr, indices, edge_weight);
    nb::gil_scoped_release free_threads;
    i64 longest = 0;
    for (i64 i = 0; i < g.N; ++i) longest = std::max(longest, g.indptr[i + 1] - g.indptr[i]);
    const std::size_t n = static_cast<std::size_t>(g.N);
    JoinScratch scratch{std::vector<i64>(n, 0), std::vector<std::int32_t>(n + 1, -1),
                        std::vector<std::int32_t>(static_cast<std::size_t>(std::min(g.N, longest)))};
    return join_clusters(g, weight.data(), limit, most, salt, gather, labels.data(), sizes.data(), scratch);
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());

  m.def("contract", [](In64 indptr, In32 indices, std::optional<In64> edge_weight, In32 labels, i64 groups, i64 most,
                       std::uint32_t salt, i64 room) -> nb::object {
    const CutGraph g = graph(indptr, indices, edge_weight);
    Contracted out;
    bool fits;
    {
      nb::gil_scoped_release free_threads;
      fits = contract(g, labels.data(), groups, most, salt, room, out);
    }
    if (!fits) return nb::none();
    return nb::make_tuple(handed_over(std::move(out.indptr)), handed_over(std::move(out.indices)),
                          handed_over(std::move(out.weights)));
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg());

  m.def("place_nodes", [](In64 indptr, In32 indices, std::optional<In64> edge_weight,
                          std::optional<Array<const i64, 2>> node_weight, std::optional<Array<const std::uint8_t, 1>> train,
                          std::optional<In32> order, std::optional<Array<const std::uint8_t, 1>> frozen, In64 capacity,
                          double pull, Out32x1 owners, Array<i64, 2> loads) {
    const CutGraph g = graph(indptr, indices, edge_weight);
    const Placement how{data_or_null(node_weight), data_or_null(train), data_or_null(order), data_or_null(frozen),
                        capacity.data(), rows(loads), pull};
    nb::gil_scoped_release free_threads;
    return place_nodes(g, how, owners.data(), loads.data());
  }, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(),
     nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert(),
     nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());
}
