// One row out of a panel, for the embedding. The formulas and their float32 roundings are those of
// the codecs' numpy specifications; the places are those of docs/formats/panel.md.
#include <algorithm>
#include <cstring>

#include "model/weights.h"

namespace earnest {
namespace {

float floatFromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float halfAt(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00) return floatFromBits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return floatFromBits(sign | (magnitude + ((127 - 15) << 10)) << 13);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// Weight `i` (0-31) of a run of 32: nibbles, after `bits - 4` planes of upper bits.
int weightAt(const uint8_t* run, int bits, int row, int i) {
  const int group = i / 4, place = 4 * row + i % 4;
  const uint8_t both = run[64 * (bits - 4) + 64 * (group / 2) + place];
  const int low = group % 2 ? both >> 4 : both & 15;
  if (bits == 5) return low | (run[place] >> group & 1) << 4;
  if (bits == 6) return low | (run[64 * (group / 4) + place] >> (2 * (group % 4)) & 3) << 4;
  return low;
}

// A block of 32 columns of a codec with one scale and perhaps one minimum.
void legacyBlock(const uint8_t* p, int bits, bool minimum, int offset, int row, float* out) {
  const float d = halfAt(p + 2 * row), m = minimum ? halfAt(p + 32 + 2 * row) : 0.0f;
  const uint8_t* run = p + (minimum ? 64 : 32);
  for (int i = 0; i < 32; ++i) {
    const float q = static_cast<float>(weightAt(run, bits, row, i) - offset);
    out[i] = minimum ? d * q + m : d * q;
  }
}

void sixBitBlock(const uint8_t* p, int bits, int row, float* out) {
  const float d = halfAt(p + 2 * row), m = halfAt(p + 32 + 2 * row);
  for (int run = 0; run < 8; ++run) {
    const int low = p[64 + 16 * run + row], high = p[192 + 16 * (run % 4) + row] >> (run / 4 * 4);
    const float scale = d * static_cast<float>((low & 15) | (high & 3) << 4);
    const float minimum = m * static_cast<float>(low >> 4 | (high >> 2 & 3) << 4);
    const uint8_t* weights = p + 256 + run * 64 * bits;
    for (int i = 0; i < 32; ++i)
      out[32 * run + i] = scale * static_cast<float>(weightAt(weights, bits, row, i)) - minimum;
  }
}

void q6Block(const uint8_t* p, int row, float* out) {
  const float d = halfAt(p + 2 * row);
  for (int k = 0; k < 256; ++k) {
    const int8_t s = static_cast<int8_t>(p[32 + 16 * (k / 16) + row]);
    const int q = weightAt(p + 288 + k / 32 * 384, 6, row, k % 32) - 32;
    out[k] = d * static_cast<float>(s) * static_cast<float>(q);
  }
}

void block(int32_t codec, const uint8_t* p, int row, float* out) {
  switch (codec) {
    case kF32:
      for (int k = 0; k < 32; ++k) std::memcpy(out + k, p + 4 * (16 * k + row), 4);
      return;
    case kF16:
      for (int k = 0; k < 32; ++k) out[k] = halfAt(p + 2 * (16 * k + row));
      return;
    case kBf16:
      for (int k = 0; k < 32; ++k) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * (32 * (k / 2) + 2 * row + k % 2), 2);
        out[k] = floatFromBits(uint32_t{bits} << 16);
      }
      return;
    case kQ8_0:
      for (int k = 0; k < 32; ++k) {
        const int8_t q = static_cast<int8_t>(p[32 + 64 * (k / 4) + 4 * row + k % 4]);
        out[k] = halfAt(p + 2 * row) * static_cast<float>(q);
      }
      return;
    case kQ4_0: return legacyBlock(p, 4, false, 8, row, out);
    case kQ4_1: return legacyBlock(p, 4, true, 0, row, out);
    case kQ5_0: return legacyBlock(p, 5, false, 16, row, out);
    case kQ5_1: return legacyBlock(p, 5, true, 0, row, out);
    case kQ4_K: return sixBitBlock(p, 4, row, out);
    case kQ5_K: return sixBitBlock(p, 5, row, out);
    default: return q6Block(p, row, out);
  }
}

}  // namespace

void decodeRow(const Matrix& matrix, int64_t row, int64_t columns, float* out) {
  const PanelShape& shape = kPanelShapes[matrix.codec];
  const uint8_t* p =
      matrix.panels + row / kPanelRows * panelBytes(matrix.codec, matrix.columns);
  float all[256];
  for (int64_t k = 0; k < columns; k += shape.block_columns, p += shape.block_bytes) {
    block(matrix.codec, p, static_cast<int>(row % kPanelRows), all);
    const int64_t count = std::min<int64_t>(shape.block_columns, columns - k);
    std::memcpy(out + k, all, static_cast<size_t>(count) * sizeof(float));
  }
}

}  // namespace earnest
