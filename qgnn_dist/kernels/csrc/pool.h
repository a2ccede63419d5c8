// SPDX-License-Identifier: Apache-2.0
// One pool of threads for the process. Each thread begins with its own share of the rows and then takes chunks of what
// others have left; no kernel's result depends on who takes what.
#pragma once
#include <functional>

#include "kernels.h"

namespace qgnn {

void set_threads(int count);
int threads();

// Calls work(begin, end) over [begin, end) in chunks of `grain` rows. Callers from several threads take turns.
void parallel(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work);

}  // namespace qgnn
