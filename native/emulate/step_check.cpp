// Whole forward steps of small random models in one tier after the other: the logits must be the
// generic tier's, bit for bit, on 1 and on 3 threads, in one batch and in many chunks. Dense and
// MoE layers, every codec, both planes, every sort of keys and values, a past of more than one
// attention segment.
//
// With EARNEST_TIER that tier is compared with the generic one (run.sh: under emulation), otherwise
// every tier that this machine executes. The amx tier rounds the activations
// of bf16 weights, and so does avx512bf16 if they have 8 bits: there a tier is compared with itself.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulate/random.h"
#include "isa/isa.h"
#include "model/step.h"

namespace earnest {
extern const KernelTable kGeneric;
#ifdef EARNEST_TIER
extern const KernelTable EARNEST_TIER;
#endif
}  // namespace earnest

using namespace earnest;

namespace {

struct Shape {
  int64_t heads, kv_heads, channels;
};

// Weights of about 1/16, so that neither the softmax nor the router is sure of itself: a one-hot
// softmax would hide what differs.
class RandomModel {
 public:
  RandomModel(int codec, int planes, const Shape& shape) {
    model.vocab = 201;
    model.hidden = 256;
    model.heads = shape.heads;
    model.kv_heads = shape.kv_heads;
    model.channels = shape.channels;
    model.active = 3;
    model.eps = 1e-5f;
    model.norm_min = 1e-12f;
    model.planes = planes;
    model.embedding = matrix(codec, model.vocab, model.hidden);
    model.head = model.embedding;
    model.head.bias = vector(model.vocab, 0, 0.1f);
    model.final_norm = vector(model.hidden, 1, 0.3f);
    for (int i = 0; i < 3; ++i) {
      Layer layer;
      layer.input_norm = vector(model.hidden, 1, 0.3f);
      layer.post_norm = vector(model.hidden, 1, 0.3f);
      layer.q = matrix(codec, model.qSize(), model.hidden);
      layer.k = matrix(codec, model.kvSize(), model.hidden);
      layer.v = matrix(codec, model.kvSize(), model.hidden);
      layer.o = matrix(codec, model.hidden, model.qSize());
      if (i != 1) layer.q.bias = vector(model.qSize(), 0, 0.1f);
      if (i < 2) layer.shared = feedForward(codec, 512);
      if (i > 0) {
        const int64_t experts = 11;
        layer.router = matrix(kF32, experts, model.hidden);
        layer.correction = vector(experts, 0, 0.01f);
        for (int64_t e = 0; e < experts; ++e) layer.experts.push_back(feedForward(codec, 256));
      }
      model.layers.push_back(std::move(layer));
    }
  }

  Model model;

 private:
  const float* vector(int64_t count, float middle, float spread) {
    vectors_.push_back(std::make_unique<float[]>(count));
    for (int64_t i = 0; i < count; ++i) vectors_.back()[i] = middle + spread * uniform();
    return vectors_.back().get();
  }

  FeedForward feedForward(int codec, int64_t width) {
    return {matrix(codec, width, model.hidden), matrix(codec, width, model.hidden),
            matrix(codec, model.hidden, width)};
  }

  // Random bits, but for the exponents of the half floats (or bf16) at the head of a block.
  Matrix matrix(int codec, int64_t rows, int64_t columns) {
    Matrix m;
    m.codec = codec, m.rows = rows, m.columns = columns;
    const int64_t bytes = m.panelCount() * panelBytes(codec, columns);
    panels_.push_back(std::make_unique<uint8_t[]>(bytes));
    uint8_t* p = panels_.back().get();
    for (int64_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(random32());
    const PanelShape& shape = kPanelShapes[codec];
    const bool minima = codec == kQ4_1 || codec == kQ5_1 || codec == kQ4_K || codec == kQ5_K;
    const auto halves = [](uint8_t* at, int count, int exponent) {
      for (int i = 0; i < count; ++i)
        at[2 * i + 1] = static_cast<uint8_t>((at[2 * i + 1] & 0x83) | (exponent + 15) << 2);
    };
    constexpr int kScale[kCodecs] = {0, -5, 0, -11, -7, -10, -8, -11, -15, -15, -15};
    for (int64_t at = 0; at < bytes; at += shape.block_bytes) {
      if (codec == kF32) {
        for (int i = 0; i < shape.block_bytes; i += 4) {
          const float x = uniform() / 8;
          std::memcpy(p + at + i, &x, 4);
        }
      } else if (codec == kBf16) {
        for (int i = 1; i < shape.block_bytes; i += 2) p[at + i] = (p[at + i] & 0x80) | 0x3d;
      } else {
        halves(p + at, codec == kF16 ? shape.block_bytes / 2 : 16, kScale[codec]);
        if (minima) halves(p + at + 32, 16, codec < kQ4_K ? -7 : -12);
      }
    }
    m.panels = p;
    return m;
  }

  std::vector<std::unique_ptr<uint8_t[]>> panels_;
  std::vector<std::unique_ptr<float[]>> vectors_;
};

constexpr int64_t kPage = 32, kPages = 36, kLongPast = 1018, kFresh = 37, kLong = 12;
constexpr int64_t kWidth = (kLongPast + kLong + kPage - 1) / kPage;

// Two sequences: one of kFresh tokens from the beginning, one of kLong after a past of kLongPast.
struct Text {
  std::vector<int32_t> ids, tables;
  std::vector<float> past, cosines, sines;  // past: [layer][position][keys, values]

  explicit Text(const Model& m) {
    for (int64_t t = 0; t < kFresh + kLong; ++t)
      ids.push_back(static_cast<int32_t>(random32() % m.vocab));
    // Pages in no order, each used once: a multiple of 5 modulo 36 for the long sequence, and two
    // of the three that it leaves.
    for (int64_t i = 0; i < kWidth; ++i) tables.push_back(i == 1 ? 5 : 0);
    for (int64_t i = 0; i < kWidth; ++i) tables.push_back(static_cast<int32_t>((i + 3) * 5 % kPages));
    for (int64_t i = 0; i < int64_t(m.layers.size()) * kLongPast * 2 * m.kvSize(); ++i)
      past.push_back(uniform());
    for (int64_t p = 0; p < kLongPast + kLong; ++p)
      for (int64_t f = 0; f < m.channels / 2; ++f) {
        const double angle = p * std::pow(500000.0, -2.0 * f / m.channels);
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
  }
};

// How many tokens of each sequence a step takes.
struct Turn {
  int64_t fresh, later;
};

// Logits of every token, [kFresh + kLong][vocab].
std::vector<float> logits(const Model& m, const Text& text, const KernelTable& tier, int threads,
                          int kv_type, int64_t max_tokens, const std::vector<Turn>& turns) {
  ThreadPool pool(threads);
  KvCache cache;
  cache.type = kv_type;
  cache.pages = kPages, cache.page = kPage;
  cache.kv_heads = m.kv_heads, cache.channels = m.channels;
  const int64_t layers = int64_t(m.layers.size()), bytes = (cache.bytes(layers) + 63) / 64 * 64;
  const auto take = [](size_t size) {
    auto* p = static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64));
    std::memset(p, 0, size);
    return std::unique_ptr<uint8_t, decltype(&std::free)>(p, &std::free);
  };
  const auto memory = take(bytes);
  cache.data = memory.get();
  const int32_t* long_table = text.tables.data() + kWidth;
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t p = 0; p < kLongPast; ++p) {
      const float* x = text.past.data() + (l * kLongPast + p) * 2 * m.kvSize();
      cache.storeKeys(*tier.step, l, long_table[p / kPage], p % kPage, 0, m.kvSize(), x);
      cache.storeValues(*tier.step, l, long_table[p / kPage], p % kPage, 0, m.kvSize(), x + m.kvSize());
    }
  Step step(m, tier, pool, cache, max_tokens, kLongPast + kLong);
  const auto scratch = take(step.scratchBytes());
  step.useScratch(scratch.get());

  std::vector<float> all((kFresh + kLong) * m.vocab);
  int64_t done[2] = {0, 0};
  for (const Turn& turn : turns) {
    const int64_t counts[2] = {turn.fresh, turn.later}, tokens = turn.fresh + turn.later;
    std::vector<int32_t> ids, positions, starts = {0}, wanted, place;
    std::vector<float> cosines, sines, out(tokens * m.vocab);
    for (int s = 0; s < 2; ++s) {
      for (int64_t i = done[s]; i < done[s] + counts[s]; ++i) {
        const int64_t position = i + (s ? kLongPast : 0), half = m.channels / 2;
        place.push_back(static_cast<int32_t>(i + (s ? kFresh : 0)));
        ids.push_back(text.ids[place.back()]);
        positions.push_back(static_cast<int32_t>(position));
        wanted.push_back(static_cast<int32_t>(wanted.size()));
        const float *c = &text.cosines[position * half], *n = &text.sines[position * half];
        cosines.insert(cosines.end(), c, c + half);
        sines.insert(sines.end(), n, n + half);
      }
      done[s] += counts[s];
      starts.push_back(static_cast<int32_t>(ids.size()));
    }
    StepInput in;
    in.tokens = tokens, in.sequences = 2, in.table_width = kWidth, in.rows = tokens;
    in.ids = ids.data(), in.positions = positions.data(), in.starts = starts.data();
    in.tables = text.tables.data(), in.wanted = wanted.data();
    in.cosines = cosines.data(), in.sines = sines.data(), in.logits = out.data();
    if (!step.run(in)) std::abort();
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(&all[place[t] * m.vocab], &out[t * m.vocab], m.vocab * sizeof(float));
  }
  if (done[0] != kFresh || done[1] != kLong) std::abort();
  return all;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
#ifdef EARNEST_TIER
  const std::vector<const KernelTable*> tiers = {&kGeneric, &EARNEST_TIER};
#else
  const std::vector<const KernelTable*>& tiers = availableTiers();
#endif
  const std::vector<Turn> together = {{kFresh, kLong}};
  const std::vector<Turn> chunks = {{1, 1}, {2, 0}, {3, 1}, {8, 2}, {0, 1}, {17, 0}, {0, 5}, {6, 2}};
  int checked = 0, wrong = 0;
  const auto expect = [&](bool right, const char* tier, int codec, int planes, const char* what) {
    ++checked;
    if (right) return;
    ++wrong;
    std::printf("%s: step %s planes %d: %s\n", tier, kPanelShapes[codec].name, planes, what);
  };
  for (int codec = 0; codec < kCodecs; ++codec)
    for (int planes = 1; planes <= (codec < kBf16 ? 1 : 2); ++planes) {
      // 5 query heads per key/value head are those of the 21B model; 3 need tiles of another size.
      const Shape shape = codec % 3 == 0 ? Shape{10, 2, 128} : Shape{4 + 8 * (codec % 2), 4, 64};
      const RandomModel random(codec, planes, shape);
      const Model& m = random.model;
      Text text(m);
      const int kv_type = (codec + planes) % 5;  // each KvType
      const auto generic = logits(m, text, kGeneric, 1, kv_type, 64, together);
      // Logits that did not depend on one far position would prove nothing about attention.
      Text other = text;
      for (int64_t c = 0; c < m.kvSize(); ++c) other.past[2 * m.kvSize() * 3 + m.kvSize() + c] += 0.5f;
      const auto moved = logits(m, other, kGeneric, 1, kv_type, 64, together);
      const size_t last = moved.size() - m.vocab;
      expect(std::memcmp(&moved[last], &generic[last], m.vocab * sizeof(float)) != 0, "generic",
             codec, planes, "the past does not matter");
      bool finite = true;
      for (const float x : generic) finite &= std::isfinite(x);
      expect(finite, "generic", codec, planes, "not finite");
      for (const KernelTable* tier : tiers) {
        const char* name = tier->name;
        const bool pairs = planes == kA8 && std::strcmp(name, "avx512bf16") == 0;
        const bool rounds = codec == kBf16 && (pairs || std::strcmp(name, "amx") == 0);
        const auto one =
            tier == &kGeneric ? generic : logits(m, text, *tier, 1, kv_type, 64, together);
        if (!rounds) expect(same(one, generic), tier->name, codec, planes, "differs from generic");
        expect(same(logits(m, text, *tier, 3, kv_type, 16, chunks), one), tier->name, codec, planes,
               "differs by threads or chunks");
      }
    }
  for (const KernelTable* tier : tiers)
    if (tier != &kGeneric || tiers.size() == 1) std::printf("%s ", tier->name);
  std::printf("steps: %d checked, %d wrong\n", checked, wrong);
  return wrong != 0;
}
