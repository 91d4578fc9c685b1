// Adds the class `Model` to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace earnest {

void bindModel(nanobind::module_& module);

}  // namespace earnest
