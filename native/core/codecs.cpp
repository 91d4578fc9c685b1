#include "earnest/kernels.h"

namespace earnest {

// Bytes of a panel block = 16 rows x bytes of the codec's block (docs/formats/panel.md).
const PanelShape kPanelShapes[kCodecs] = {
    {"f32", 32, 2048}, {"f16", 32, 1024}, {"bf16", 32, 1024}, {"q8_0", 32, 544},
    {"q4_0", 32, 288}, {"q4_1", 32, 320}, {"q5_0", 32, 352},  {"q5_1", 32, 384},
    {"q4_k", 256, 2304}, {"q5_k", 256, 2816}, {"q6_k", 256, 3360},
};

int64_t panelBytes(int32_t codec, int64_t columns) {
  const PanelShape& shape = kPanelShapes[codec];
  return columns / shape.block_columns * shape.block_bytes;
}

}  // namespace earnest
