// Adds `pack` and `unpack` to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace earnest {

void bindPack(nanobind::module_& module);

}  // namespace earnest
