// Compares one tier's kernels with the generic tier's, bit for bit, for tiers that the machine at
// hand cannot execute: linked with that tier compiled against a model of its instructions, or run
// under qemu. The generic tier itself is compared with the numpy twin by tests/native. A loop takes
// its place for avx512bf16's products of pairs, whose order of sums is their own.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "earnest/kernels.h"
#include "earnest/step_kernels.h"
#include "emulate/bf16_model.h"
#include "emulate/random.h"

namespace earnest {
extern const KernelTable kGeneric;
extern const KernelTable EARNEST_TIER;
}  // namespace earnest

using namespace earnest;

namespace {

// Random bits; half floats (and bf16) get exponents of moderate size by clearing their top bits.
std::vector<uint8_t> randomPanels(int codec, int64_t panels, int64_t bytes) {
  std::vector<uint8_t> out(panels * bytes);
  for (uint8_t& b : out) b = static_cast<uint8_t>(random32());
  const PanelShape& shape = kPanelShapes[codec];
  const bool minima = codec == kQ4_1 || codec == kQ5_1 || codec == kQ4_K || codec == kQ5_K;
  for (size_t at = 0; at < out.size(); at += shape.block_bytes) {
    if (codec == kF32) {
      for (int i = 0; i < shape.block_bytes; i += 4) {
        const float x = uniform();
        std::memcpy(&out[at + i], &x, 4);
      }
    } else {
      const int end = codec <= kBf16 ? shape.block_bytes : minima ? 64 : 32;
      for (int i = 1; i < end; i += 2) out[at + i] = (out[at + i] & 0x83) | 0x30;
    }
  }
  return out;
}

struct Product {
  std::vector<int8_t> values;
  std::vector<ActivationBlock> blocks;
  std::vector<float> floats, out;
};

void run(const KernelTable& quantizer, const KernelTable& table, int codec, int planes,
         const std::vector<uint8_t>& panels, int64_t rows, int64_t columns, int64_t tokens,
         const std::vector<float>& x, const std::vector<int32_t>& select, Product& p) {
  const int64_t sources = static_cast<int64_t>(x.size()) / columns;
  p.values.assign(sources * columns * planes, 0);
  p.blocks.assign(sources * columns / kBlock, {});
  p.floats.assign(sources * columns, 0);
  p.out.assign(tokens * rows, -1);
  for (int64_t t = 0; t < sources; ++t) {
    quantizer.quantize(&x[t * columns], columns, planes, &p.values[t * columns * planes],
                       &p.blocks[t * columns / kBlock]);
    quantizer.prepare(&x[t * columns], columns, codec, &p.floats[t * columns]);
  }
  Matmul m{};
  m.panels = panels.data();
  m.codec = codec;
  m.rows = rows;
  m.columns = columns;
  m.x = {tokens,          columns,         planes, p.values.data(), p.blocks.data(),
         p.floats.data(), select.empty() ? nullptr : select.data()};
  m.out = p.out.data();
  m.out_stride = rows;
  const int64_t count = (rows + 15) / 16;
  void* scratch = std::aligned_alloc(64, (table.scratchBytes(columns, tokens) + 127) / 64 * 64);
  table.matmul(m, 0, count / 2, scratch);
  table.matmul(m, count / 2, count, scratch);
  std::free(scratch);
}

// bf16 weights, activations rounded to bf16, [tokens][rows]: kernels/bf16_pairs.inl, spelled out.
void multiplyPairs(const std::vector<uint8_t>& panels, int64_t rows, int64_t columns,
                   int64_t tokens, const std::vector<float>& x, const std::vector<int32_t>& select,
                   std::vector<float>& out) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < rows; ++n) {
      const float* values = &x[(select.empty() ? t : select[t]) * columns];
      const uint8_t* pairs = &panels[n / 16 * panelBytes(kBf16, columns) + n % 16 * 4];
      float sum = 0;
      for (int64_t k = 0; k < columns; k += 2, pairs += 64) {
        uint32_t w;
        std::memcpy(&w, pairs, 4);
        sum = modelPair(sum, w, modelRound(values[k]) | uint32_t{modelRound(values[k + 1])} << 16);
      }
      out[t * rows + n] = sum;
    }
}

// Of all sizes, with NaN and infinity.
void checkHalves(const KernelTable& table, int& checked, int& wrong) {
  std::vector<float> x;
  for (int i = 0; i < 400000; ++i) {
    const uint32_t bits = random32() << 16 ^ random32();
    float v;
    std::memcpy(&v, &bits, 4);
    x.push_back(v);
    x.push_back(uniform() * (i % 2 ? 0x1p-15f : 70000.0f));
  }
  std::vector<uint8_t> a(2 * x.size()), b(a);
  kGeneric.step->storeHalves(x.data(), static_cast<int64_t>(x.size()), a.data());
  table.step->storeHalves(x.data(), static_cast<int64_t>(x.size()), b.data());
  ++checked;
  if (a != b) {
    ++wrong;
    std::printf("%s: half floats differ\n", table.name);
  }
}

}  // namespace

int main() {
  const KernelTable& table = EARNEST_TIER;
  int checked = 0, wrong = 0;
  checkHalves(table, checked, wrong);
  for (int codec = 0; codec < kCodecs; ++codec)
    for (int planes = 1; planes <= 2; ++planes)
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 17, 40, 64})
        for (const int64_t columns : {256, 768, 1280}) {
          if (columns == 1280 && tokens != 5 && tokens != 17) continue;
          const int64_t rows = 53;
          const auto panels = randomPanels(codec, (rows + 15) / 16, panelBytes(codec, columns));
          std::vector<float> x(tokens * columns);
          for (float& v : x) v = uniform();
          std::vector<int32_t> select;
          if (columns == 768)
            for (int64_t t = 0; t < tokens; ++t)
              select.push_back(static_cast<int32_t>(random32() % tokens));
          Product a, b;
          run(table, kGeneric, codec, planes, panels, rows, columns, tokens, x, select, a);
          if (codec == kBf16 && planes == kA8 && std::strcmp(table.name, "avx512bf16") == 0)
            multiplyPairs(panels, rows, columns, tokens, x, select, a.out);
          run(table, table, codec, planes, panels, rows, columns, tokens, x, select, b);
          Product plain;  // the generic tier's own activations: integers must be the same
          run(kGeneric, kGeneric, codec, planes, panels, rows, columns, tokens, x, select, plain);
          const bool same = std::memcmp(a.out.data(), b.out.data(), 4 * a.out.size()) == 0 &&
                            plain.values == b.values;
          ++checked;
          if (!same) {
            ++wrong;
            std::printf("%s: %s planes %d tokens %d columns %d differs\n", table.name,
                        kPanelShapes[codec].name, planes, int(tokens), int(columns));
          }
        }
  std::printf("%s: %d results checked, %d wrong\n", table.name, checked, wrong);
  return wrong != 0;
}
