// `_native.pack` and `_native.unpack`: rows of a codec to panels and back. Sizes are checked by
// earnest.codecs.panel, and again here as far as memory safety needs it.
#include "bind/pack.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "core/pack.h"
#include "earnest/kernels.h"

namespace nb = nanobind;

namespace earnest {
namespace {

using In = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The codec's number, if panels of [panels, panel bytes] hold rows of [rows, row bytes].
int32_t checked(const std::string& name, size_t rows, size_t row_bytes, size_t panels,
                size_t panel_bytes) {
  int32_t codec = 0;
  while (codec < kCodecs && name != kPanelShapes[codec].name) ++codec;
  if (codec == kCodecs) throw std::invalid_argument("codec without a panel layout: " + name);
  const size_t block = kPanelShapes[codec].block_bytes / kPanelRows;  // of a row
  const bool whole = codec <= kBf16 || row_bytes % block == 0;
  if (!whole || panels != (rows + kPanelRows - 1) / kPanelRows ||
      panel_bytes != (row_bytes + block - 1) / block * block * kPanelRows)
    throw std::invalid_argument("panels do not fit rows of " + name);
  return codec;
}

void pack(const std::string& name, In rows, Out panels) {
  const int32_t codec =
      checked(name, rows.shape(0), rows.shape(1), panels.shape(0), panels.shape(1));
  const nb::gil_scoped_release release;
  packPanels(codec, rows.data(), rows.shape(0), rows.shape(1), panels.data());
}

void unpack(const std::string& name, In panels, Out rows) {
  const int32_t codec =
      checked(name, rows.shape(0), rows.shape(1), panels.shape(0), panels.shape(1));
  const nb::gil_scoped_release release;
  unpackPanels(codec, panels.data(), rows.shape(0), rows.shape(1), rows.data());
}

}  // namespace

void bindPack(nb::module_& module) {
  module.def("pack", &pack, nb::arg("codec"), nb::arg("rows").noconvert(),
             nb::arg("panels").noconvert());
  module.def("unpack", &unpack, nb::arg("codec"), nb::arg("panels").noconvert(),
             nb::arg("rows").noconvert());
}

}  // namespace earnest
