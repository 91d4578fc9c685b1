// Rows of a codec to panels and back (docs/formats/panel.md): permutations of bits, bit for bit
// those of src/earnest/codecs/panel.py. Portable code, no tier: it runs at the speed of memory.
#pragma once

#include <cstdint>

namespace earnest {

// `rows` rows of `row_bytes` bytes, one after the other, to ceil(rows / 16) panels. What the last
// panel lacks in rows, and the last block of a plain codec in columns, becomes zeros.
void packPanels(int32_t codec, const uint8_t* source, int64_t rows, int64_t row_bytes,
                uint8_t* panels);

// The way back; the padding is dropped.
void unpackPanels(int32_t codec, const uint8_t* panels, int64_t rows, int64_t row_bytes,
                  uint8_t* out);

}  // namespace earnest
