#include "model/step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "model/worker.h"

namespace earnest {
namespace {

int64_t milliseconds() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Turns neighbouring channels `[from, from + count)` of heads laid side by side.
void rotate(float* x, int64_t from, int64_t count, int64_t channels, const float* cosines,
            const float* sines) {
  int64_t f = from % channels / 2;
  for (int64_t i = 0; i < count; i += 2) {
    const float a = x[i], b = x[i + 1], c = cosines[f], s = sines[f];
    x[i] = a * c - b * s;
    x[i + 1] = b * c + a * s;
    if (++f == channels / 2) f = 0;
  }
}

}  // namespace

int64_t Model::experts() const {
  int64_t most = 0;
  for (const Layer& layer : layers)
    most = std::max(most, static_cast<int64_t>(layer.experts.size()));
  return most;
}

void Operand::take(Arena& arena, int64_t rows, int64_t width, int32_t planes_, uint32_t forms) {
  columns = roundUp(width, kBlock);
  planes = planes_;
  if (forms & kIntegerForm) {
    values = arena.take<int8_t>(rows * columns * planes);
    blocks = arena.take<ActivationBlock>(rows * columns / kBlock);
  }
  if (forms & kFloatForm) floats = arena.take<float>(rows * columns);
  if (forms & kBf16Form) bf16 = arena.take<float>(rows * columns);
}

Activations Operand::view(const Matrix& m, int64_t tokens, const int32_t* select,
                          int64_t from) const {
  Activations a{tokens, columns, planes, nullptr, nullptr, nullptr, select};
  const uint32_t form = formOf(m);
  if (form == kIntegerForm) {
    a.values = values + from * columns * planes;
    a.blocks = blocks + from * columns / kBlock;
  } else {
    a.floats = (form == kBf16Form ? bf16 : floats) + from * columns;
  }
  return a;
}

Step::Step(const Model& model, const KernelTable& kernels, ThreadPool& pool, const KvCache& cache,
           int64_t max_tokens, int64_t max_positions)
    : model_(model), kernels_(kernels), step_(*kernels.step), pool_(pool), cache_(cache),
      max_tokens_(max_tokens), max_positions_(max_positions),
      attention_scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(model.channels)))),
      workers_(pool.workers()) {
  for (const Layer& layer : model.layers) {
    for (const Matrix* m : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.router})
      forms_ |= formOf(*m);
    uint32_t read = formOf(layer.router) | formOf(layer.shared.gate) | formOf(layer.shared.up);
    for (const FeedForward& f : layer.experts) {
      read |= formOf(f.gate) | formOf(f.up);
      forms_ |= formOf(f.down);
    }
    ffn_forms_.push_back(read);
    forms_ |= read | formOf(layer.shared.down);
  }
  forms_ |= formOf(model.head);
  const int64_t segments = (max_positions + kAttentionSegment - 1) / kAttentionSegment;
  if (segments > 1)
    states_capacity_ = kSplitTokens * model.heads * segments * step_.stateFloats(model.channels);
  done_ = std::make_unique<std::atomic<uint32_t>[]>(kDoneExperts + model.experts());
  Arena count(nullptr);
  layout(count);
  scratch_bytes_ = count.used();
}

Step::~Step() {
#if defined(__SANITIZE_ADDRESS__)
  if (scratch_) __asan_unpoison_memory_region(scratch_, scratch_bytes_);
#endif
}

void Step::useScratch(uint8_t* memory) {
  scratch_ = memory;
  Arena arena(memory);
  layout(arena);
}

void Step::layout(Arena& arena) {
  const Model& m = model_;
  const int64_t T = max_tokens_;
  int64_t routed = 0, shared = 0, widest = std::max(m.hidden, m.qSize());
  for (const Layer& layer : m.layers) {
    shared = std::max(shared, layer.shared.gate.rows);
    for (const FeedForward& f : layer.experts) routed = std::max(routed, f.gate.rows);
  }
  x_ = arena.take<float>(T * m.hidden);
  q_ = arena.take<float>(T * m.qSize());
  attended_ = arena.take<float>(T * m.qSize());
  hidden_.take(arena, T, m.hidden, m.planes, forms_);
  heads_.take(arena, T, m.qSize(), m.planes, forms_);
  shared_.take(arena, T, shared, m.planes, forms_);
  const int64_t experts = m.experts();
  if (experts) {
    routed_.take(arena, T * m.active, routed, m.planes, forms_);
    router_ = arena.take<float>(T * experts);
  }
  states_ = arena.take<float>(states_capacity_);
  const int64_t matmul = kernels_.scratchBytes(
      roundUp(std::max({widest, routed, shared}), 256), T);
  const int64_t group = m.heads / m.kv_heads * step_.stateFloats(m.channels) * kChunk;
  for (Worker& w : workers_) {
    w.row = arena.take<float>(roundUp(std::max({widest, routed, shared}), kBlock));
    w.hidden.take(arena, kAloneTokens, m.hidden, m.planes, forms_);
    w.heads.take(arena, kAloneTokens, m.qSize(), m.planes, forms_);
    w.matmul = arena.take<uint8_t>(matmul);
    w.first = arena.take<float>(kBandFloats + T * (32 + wholeHeads()));
    w.second = arena.take<float>(kBandFloats + T * 32);
    w.states = arena.take<float>(group);
    w.more_states = arena.take<float>(group);
    w.attention = arena.take<uint8_t>(
        step_.attendScratchBytes(m.heads / m.kv_heads * kChunk, m.channels));
    w.grouping.take(arena, &w == workers_.data() ? T : kAloneTokens, experts, m.active);
    w.logits = arena.take<float>(experts);
  }
}

// x[from, from + count) of a row into the forms that its readers want. `from` and `count` are
// multiples of 32.
void Step::fill(Worker&, const Operand& out, int64_t row, float* x, int64_t from, int64_t count,
                uint32_t forms) const {
  const int64_t at = row * out.columns + from;
  if (forms & kIntegerForm)
    kernels_.quantize(x, count, out.planes, out.values + at * out.planes,
                      out.blocks + at / kBlock);
  if (forms & kFloatForm) std::memcpy(out.floats + at, x, count * sizeof(float));
  if (forms & kBf16Form) kernels_.prepare(x, count, kBf16, out.bf16 + at);
}

void Step::multiply(Worker& w, const Matrix& m, const Activations& x, int64_t begin, int64_t end,
                    float* out, int64_t stride) const {
  const Matmul task{m.panels, m.codec, m.rows, m.columns, x, out, stride};
  kernels_.matmul(task, begin, end, w.matmul);
}

// Panels of which a worker's buffers hold the results of all tokens.
int64_t Step::bufferPanels(int64_t tokens) const {
  return std::max<int64_t>(2, kBandFloats / (tokens * kPanelRows) / 2 * 2);
}

// Panels of an item: two items a worker. Each begins a new stream of weights, so more of them cost
// more than an even end gains (docs/log.md).
int64_t Step::bandPanels(int64_t panels, int64_t tokens) const {
  const int64_t items = pool_.workers() == 1 ? 1 : 2 * pool_.workers();
  const int64_t wanted = std::max<int64_t>(2, roundUp((panels + items - 1) / items, 2));
  return std::min(wanted, bufferPanels(tokens));
}

// For what ends at a barrier. One or two tokens: most of it in one long stream of weights for each
// worker, the rest in pieces that are short enough to end together (docs/log.md).
Bands Step::bands(int64_t panels, int64_t tokens) const {
  const int64_t workers = pool_.workers(), most = bufferPanels(tokens);
  if (workers == 1 || tokens > kAloneTokens) return {panels, 0, 0, bandPanels(panels, tokens)};
  const int64_t large = std::min(most, panels * 17 / (20 * workers) / 2 * 2);
  const int64_t rest = panels - workers * large;
  const int64_t small = std::clamp<int64_t>(roundUp(rest / (2 * workers), 2), 2, most);
  return {panels, large ? workers : 0, large, small};
}

bool Step::run(const StepInput& input) {
  const std::lock_guard<ForkMutex> mine(turn_);
  stop_ = false;
  last_check_ = milliseconds();
  std::vector<int32_t> starts(input.sequences + 1), wanted, places, hidden, hidden_places;
  // Of the rows asked for, those of a piece, and their places among all.
  const auto pick = [](const int32_t* rows, int64_t count, int64_t from, int64_t to,
                       std::vector<int32_t>& found, std::vector<int32_t>& places) {
    found.clear();
    places.clear();
    for (int64_t r = 0; r < count; ++r)
      if (rows[r] >= from && rows[r] < to) {
        found.push_back(static_cast<int32_t>(rows[r] - from));
        places.push_back(static_cast<int32_t>(r));
      }
  };
  for (int64_t from = 0; from < input.tokens; from += max_tokens_) {
    const int64_t to = std::min(from + max_tokens_, input.tokens);
    StepInput piece = input;
    piece.tokens = to - from;
    piece.ids += from;
    piece.positions += from;
    piece.cosines += from * (model_.channels / 2);
    piece.sines += from * (model_.channels / 2);
    for (int64_t s = 0; s <= input.sequences; ++s)
      starts[s] = static_cast<int32_t>(std::clamp<int64_t>(input.starts[s], from, to) - from);
    piece.starts = starts.data();
    pick(input.wanted, input.rows, from, to, wanted, places);
    pick(input.hidden_wanted, input.hidden_rows, from, to, hidden, hidden_places);
    piece.hidden_rows = static_cast<int64_t>(hidden.size());
    piece.hidden_wanted = hidden.data();
    hidden_places_ = hidden_places.data();
    piece.rows = static_cast<int64_t>(wanted.size());
    piece.wanted = wanted.data();
    places_ = places.data();
    all_tokens_ = input.tokens;
    if (input.experts) {
      piece.experts += from * model_.active;
      piece.expert_weights += from * model_.active;
    }
    plan(piece);
    auto body = [this](int ith, int nth) { work(ith, nth); };
    pool_.runCrew(body);
    if (stop_) return false;
  }
  return true;
}

// What all layers share: where tokens are stored, and how attention is divided.
void Step::plan(const StepInput& input) {
  in_ = input;
  alone_ = in_.tokens <= kAloneTokens;
  const int64_t phases = kLayerPhases * static_cast<int64_t>(model_.layers.size()) +
                         (in_.rows + headRows() - 1) / headRows();
  if (phases > counter_count_) {
    counters_ = std::make_unique<std::atomic<int64_t>[]>(phases * kCounterStride);
    counter_count_ = phases;
  }
  for (int64_t i = 0; i < counter_count_; ++i) counters_[i * kCounterStride] = 0;
  attention_.clear();
  merges_.clear();
  pages_.resize(in_.tokens);
  slots_.resize(in_.tokens);
  const int64_t group = model_.heads / model_.kv_heads;
  const auto segmentsOf = [this](int64_t s) {
    return in_.positions[in_.starts[s + 1] - 1] / kAttentionSegment + 1;
  };
  int64_t state = 0, all = 0;
  for (int64_t s = 0; s < in_.sequences; ++s) {
    const int64_t tokens = in_.starts[s + 1] - in_.starts[s];
    if (tokens) all += tokens * segmentsOf(s) * model_.kv_heads;
  }
  const int64_t portion = all / (2 * pool_.workers());  // of an item: two items a worker
  for (int64_t s = 0; s < in_.sequences; ++s) {
    const int64_t begin = in_.starts[s], end = in_.starts[s + 1], tokens = end - begin;
    if (tokens == 0) continue;
    const int32_t* table = in_.tables + s * in_.table_width;
    for (int64_t t = begin; t < end; ++t) {
      pages_[t] = table[in_.positions[t] / cache_.page];
      slots_[t] = static_cast<int32_t>(in_.positions[t] % cache_.page);
    }
    const int64_t segments = segmentsOf(s);
    const int64_t run = std::max<int64_t>(1, (portion + tokens - 1) / tokens);
    const int64_t floats = tokens * group * step_.stateFloats(model_.channels);
    // A few queries over a past longer than a portion: it is divided, too.
    const bool split = segments > run && tokens <= kSplitTokens && pool_.workers() > 1 &&
                       state + floats * segments * model_.kv_heads <= states_capacity_;
    for (int64_t head = 0; head < model_.kv_heads; ++head) {
      if (split) {
        merges_.push_back({begin, tokens, head, segments, state});
        for (int64_t i = 0; i < segments; i += run)
          attention_.push_back(
              {begin, tokens, head, i, std::min(run, segments - i), state + i * floats, table});
        state += segments * floats;
      } else {
        for (int64_t t = begin; t < end; t += kChunk)
          attention_.push_back({t, std::min(kChunk, end - t), head, 0, 0, 0, table});
      }
    }
  }
  // The longest first: what comes last should be short.
  std::stable_sort(attention_.begin(), attention_.end(),
                   [this](const AttentionItem& a, const AttentionItem& b) {
                     const auto cost = [this](const AttentionItem& i) {
                       return i.tokens * (i.segments ? i.segments * kAttentionSegment
                                                     : in_.positions[i.row] + int64_t{1});
                     };
                     return cost(a) > cost(b);
                   });
}

void Step::work(int ith, int nth) {
  Worker& w = workers_[ith];
  w.ith = ith;
  w.nth = nth;
  w.phase = 0;
  w.moe_index = 0;
  for (int64_t t = ith; t < in_.tokens; t += nth)
    decodeRow(model_.embedding, in_.ids[t], model_.hidden, x_ + t * model_.hidden);
  pool_.barrier();
  for (int64_t i = 0; i < static_cast<int64_t>(model_.layers.size()); ++i)
    if (!layer(w, i)) return;
  hiddenStates(w);
  head(w);
}

bool Step::layer(Worker& w, int64_t index) {
  if (w.ith == 0 && in_.interrupted && milliseconds() - last_check_ >= kCheckMilliseconds) {
    last_check_ = milliseconds();
    if (in_.interrupted()) stop_ = true;
  }
  // The last layer's barrier is behind all who used these, this one's before all who will. Only what
  // was used: each of their cache lines is in the other workers' caches.
  if (w.ith == 0)
    for (int64_t i = 0; i < w.done; ++i) done_[i].store(0, std::memory_order_relaxed);
  attention(w, index);
  // Between two barriers that follow worker 0's check, all workers read the same.
  if (stop_.load(std::memory_order_relaxed)) return false;
  feedForward(w, index);
  return true;
}

void Step::attention(Worker& w, int64_t index) {
  const Layer& layer = model_.layers[index];
  const int64_t T = in_.tokens, D = model_.hidden, C = model_.channels;
  const Operand& x = alone_ ? w.hidden : hidden_;
  const uint32_t forms = formOf(layer.q) | formOf(layer.k) | formOf(layer.v);
  rows(w, T, [&](int64_t t) {
    step_.rmsNorm(x_ + t * D, layer.input_norm, D, x.columns, model_.eps, w.row);
    fill(w, x, t, w.row, 0, x.columns, forms);
  });

  const Matrix* const parts[] = {&layer.q, &layer.k, &layer.v};
  // Keys and values are little beside the queries and go in bands as wide as theirs, those with a
  // scale per head by whole heads.
  const int64_t band = bandPanels(layer.q.panelCount(), T);
  const int64_t kv_band = cache_.scaled() ? roundUp(band, wholeHeads() / kPanelRows) : band;
  const int64_t widths[] = {band, kv_band, kv_band};
  int64_t ends[3], items = 0;
  for (int i = 0; i < 3; ++i) ends[i] = items += (parts[i]->panelCount() + widths[i] - 1) / widths[i];
  share(w, items, [&](int64_t item) {
    const int part = item < ends[0] ? 0 : item < ends[1] ? 1 : 2;
    const Matrix& m = *parts[part];
    const int64_t begin = (item - (part ? ends[part - 1] : 0)) * widths[part];
    const int64_t end = std::min(begin + widths[part], m.panelCount());
    const int64_t from = begin * kPanelRows, count = std::min(end * kPanelRows, m.rows) - from;
    float* out = part == 0 ? q_ + from : w.first;
    const int64_t stride = part == 0 ? m.rows : count;
    multiply(w, m, x.view(m, T, nullptr, 0), begin, end, out - from, stride);
    for (int64_t t = 0; t < T; ++t) {
      float* row = out + t * stride;
      if (m.bias) step_.add(row, m.bias + from, count);
      if (part < 2)
        rotate(row, from, count, C, in_.cosines + t * (C / 2), in_.sines + t * (C / 2));
      if (part == 1) cache_.storeKeys(step_, index, pages_[t], slots_[t], from, count, row);
      if (part == 2) cache_.storeValues(step_, index, pages_[t], slots_[t], from, count, row);
    }
  });
  pool_.barrier();

  share(w, static_cast<int64_t>(attention_.size()),
        [&](int64_t item) { attend(w, attention_[item], index); });
  pool_.barrier();
  if (!merges_.empty()) {
    const int64_t G = model_.heads / model_.kv_heads, floats = step_.stateFloats(C);
    share(w, static_cast<int64_t>(merges_.size()), [&](int64_t item) {
      const Merge& m = merges_[item];
      for (int64_t i = 0; i < m.tokens * G; ++i) {
        const int64_t t = m.row + i / G;
        float* state = states_ + m.state + i * floats;
        const int64_t seen = in_.positions[t] / kAttentionSegment + 1;
        for (int64_t s = 1; s < seen; ++s)
          step_.mergeState(state, state + s * m.tokens * G * floats, C);
        step_.finishState(state, C, attended_ + t * model_.qSize() + (m.kv_head * G + i % G) * C);
      }
    });
    pool_.barrier();
  }

  const Matrix& o = layer.o;
  const Operand& heads = alone_ ? w.heads : heads_;
  rows(w, T, [&](int64_t t) {
    std::memcpy(w.row, attended_ + t * model_.qSize(), model_.qSize() * sizeof(float));
    std::fill(w.row + model_.qSize(), w.row + heads.columns, 0.0f);
    fill(w, heads, t, w.row, 0, heads.columns, formOf(o));
  });
  const Bands pieces = bands(o.panelCount(), T);
  share(w, pieces.count(), [&](int64_t item) {
    const int64_t begin = pieces.begin(item), end = pieces.begin(item + 1);
    const int64_t from = begin * kPanelRows, count = std::min(end * kPanelRows, o.rows) - from;
    multiply(w, o, heads.view(o, T, nullptr, 0), begin, end, w.first - from, count);
    for (int64_t t = 0; t < T; ++t) {
      if (o.bias) step_.add(w.first + t * count, o.bias + from, count);
      step_.add(x_ + t * D + from, w.first + t * count, count);
    }
  });
  pool_.barrier();
}

Attention Step::attentionOf(int64_t row, int64_t tokens, int64_t kv_head, const int32_t* table,
                            int64_t index) const {
  const int64_t G = model_.heads / model_.kv_heads, C = model_.channels;
  Attention a;
  a.kv = cache_.view(index, kv_head, table);
  a.type = cache_.type;
  a.heads = static_cast<int32_t>(G);
  a.channels = static_cast<int32_t>(C);
  a.tokens = tokens;
  a.first = in_.positions[row];
  a.scale = attention_scale_;
  a.q_stride = model_.qSize();
  a.q = q_ + row * a.q_stride + kv_head * G * C;
  return a;
}

void Step::attend(Worker& w, const AttentionItem& item, int64_t index) {
  const Attention a = attentionOf(item.row, item.tokens, item.kv_head, item.table, index);
  const int64_t G = a.heads, C = a.channels, floats = step_.stateFloats(C);
  if (item.segments) {
    float* states = states_ + item.state;
    for (int64_t i = 0; i < item.segments; ++i, states += a.tokens * G * floats)
      step_.attendSegment(a, item.segment + i, states, w.attention);
    return;
  }
  step_.attendSegment(a, 0, w.states, w.attention);
  const int64_t segments = (a.first + a.tokens - 1) / kAttentionSegment + 1;
  for (int64_t s = 1; s < segments; ++s) {
    step_.attendSegment(a, s, w.more_states, w.attention);
    for (int64_t i = 0; i < a.tokens * G; ++i)
      if (a.first + i / G >= s * kAttentionSegment)
        step_.mergeState(w.states + i * floats, w.more_states + i * floats, C);
  }
  for (int64_t i = 0; i < a.tokens * G; ++i)
    step_.finishState(w.states + i * floats, C,
                      attended_ + (item.row + i / G) * a.q_stride + (item.kv_head * G + i % G) * C);
}

void Step::hiddenStates(Worker& w) {
  const int64_t D = model_.hidden, columns = roundUp(D, kBlock);
  for (int64_t r = w.ith; r < in_.hidden_rows; r += w.nth) {
    step_.rmsNorm(x_ + in_.hidden_wanted[r] * D, model_.final_norm, D, columns, model_.eps, w.row);
    std::memcpy(in_.hidden + hidden_places_[r] * D, w.row, D * sizeof(float));
  }
}

int64_t Step::headRows() const { return alone_ ? kAloneTokens : max_tokens_; }

void Step::head(Worker& w) {
  const Matrix& m = model_.head;
  const int64_t D = model_.hidden, most = headRows();
  const Operand& x = alone_ ? w.hidden : hidden_;
  for (int64_t from = 0; from < in_.rows; from += most) {
    const int64_t R = std::min(most, in_.rows - from);
    rows(w, R, [&](int64_t r) {
      step_.rmsNorm(x_ + in_.wanted[from + r] * D, model_.final_norm, D, x.columns, model_.eps,
                    w.row);
      fill(w, x, r, w.row, 0, x.columns, formOf(m));
    });
    const Bands pieces = bands(m.panelCount(), R);
    share(w, pieces.count(), [&](int64_t item) {
      const int64_t begin = pieces.begin(item), end = pieces.begin(item + 1);
      const int64_t at = begin * kPanelRows, count = std::min(end * kPanelRows, m.rows) - at;
      multiply(w, m, x.view(m, R, nullptr, 0), begin, end, w.first - at, count);
      for (int64_t r = 0; r < R; ++r) {
        if (m.bias) step_.add(w.first + r * count, m.bias + at, count);
        std::memcpy(in_.logits + places_[from + r] * model_.vocab + at, w.first + r * count,
                    count * sizeof(float));
      }
    });
    pool_.barrier();
  }
}

}  // namespace earnest
