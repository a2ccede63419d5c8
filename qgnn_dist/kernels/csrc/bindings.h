// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nanobind/nanobind.h>

namespace qgnn {

// Adds what bindings_perceptron.cpp binds to the module.
void bind_perceptron(nanobind::module_& m);
// What bindings_partition.cpp binds.
void bind_partition(nanobind::module_& m);

}  // namespace qgnn
