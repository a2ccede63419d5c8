// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace qgnn {
namespace {

#ifdef QGNN_HAVE_AVX2
// The builtin also asks whether the system saves the wide registers. Products that are added in one step are exact ones.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const Kernels* best() {
#ifdef QGNN_HAVE_AVX2
  if (has_avx2()) return &kernels_avx2;
#endif
  return &kernels_scalar;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& active() {
  const Kernels* table = chosen.load();
  if (table == nullptr) chosen.store(table = best());
  return *table;
}

bool select_isa(const char* name) {
  if (std::strcmp(name, "scalar") == 0) {
    chosen.store(&kernels_scalar);
    return true;
  }
#ifdef QGNN_HAVE_AVX2
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) {
    chosen.store(&kernels_avx2);
    return true;
  }
#endif
  return false;
}

}  // namespace qgnn
