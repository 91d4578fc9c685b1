// The feed-forward part of a layer: dense block or mixture of experts, which differ only in what is
// empty. Tokens are grouped by expert, so each expert in use is read once a step.
#include <cstring>

#include "model/worker.h"

namespace earnest {

void Step::feedForward(Worker& w, int64_t index) {
  const Layer& layer = model_.layers[index];
  const int64_t T = in_.tokens, D = model_.hidden, E = static_cast<int64_t>(layer.experts.size());
  const Operand& x = alone_ ? w.hidden : hidden_;
  rows(w, T, [&](int64_t t) {
    step_.rmsNorm(x_ + t * D, layer.post_norm, D, x.columns, model_.eps, w.row);
    fill(w, x, t, w.row, 0, x.columns, ffn_forms_[index]);
  });
  pool_.report(done_[kDoneNorm], 1);

  // The router, and what does not depend on it.
  const int64_t router = E ? layer.router.panelCount() : 0;
  const int64_t shared = layer.shared ? layer.shared.gate.panelCount() : 0;
  const int64_t router_band = bandPanels(router, T), band = bandPanels(shared, T);
  const int64_t router_items = (router + router_band - 1) / router_band;
  share(w, router_items + (shared + band - 1) / band, [&](int64_t item) {
    if (item < router_items) {
      const int64_t begin = item * router_band;
      const int64_t end = std::min(begin + router_band, router);
      multiply(w, layer.router, x.view(layer.router, T, nullptr, 0), begin, end, router_, E);
      pool_.report(done_[kDoneRouter], end - begin);
    } else {
      const int64_t begin = (item - router_items) * band, end = std::min(begin + band, shared);
      gateUp(w, layer.shared, x, T, nullptr, shared_, 0, begin, end);
      pool_.report(done_[kDoneShared], end - begin);
    }
  });

  // No barriers from here to the end, but those of `group` for many tokens: who has nothing left to
  // do goes on to what is ready.
  const Grouping* g = nullptr;
  if (E) {
    pool_.await(done_[kDoneRouter], router);
    g = &group(w, layer);
    const int64_t panels = layer.experts[0].gate.panelCount();
    const int64_t unit = std::min(bandPanels(panels * g->used_count, T), roundUp(panels, 2));
    const int64_t bands = (panels + unit - 1) / unit;
    share(w, bands * g->used_count, [&](int64_t item) {
      const int32_t e = g->used[item / bands];
      const int64_t begin = item % bands * unit, end = std::min(begin + unit, panels);
      gateUp(w, layer.experts[e], x, g->starts[e + 1] - g->starts[e], g->tokens + g->starts[e],
             routed_, g->starts[e], begin, end);
      pool_.report(done_[kDoneExperts + item / bands], end - begin);
    });
  }

  w.done = kDoneExperts + (g ? g->used_count : 0);
  const int64_t panels = (E ? layer.experts[0] : layer.shared).down.panelCount();
  const Bands pieces = bands(panels, T);
  // `down` writes the residual stream, which a late worker may not have normed yet.
  pool_.await(done_[kDoneNorm], static_cast<uint32_t>(w.nth));
  share(w, pieces.count(), [&](int64_t item) {
    down(w, layer, g, pieces.begin(item), pieces.begin(item + 1));
  });
  pool_.barrier();
}

// Panels [begin, end) of gate and up for some rows of x, through SwiGLU, to rows from `from` of
// `out`. `begin` is even, so the blocks of 32 columns are whole.
void Step::gateUp(Worker& w, const FeedForward& f, const Operand& x, int64_t tokens,
                  const int32_t* select, const Operand& out, int64_t from, int64_t begin,
                  int64_t end) {
  const int64_t at = begin * kPanelRows;
  const int64_t count = std::min(end * kPanelRows, f.gate.rows) - at;
  const int64_t padded = roundUp(count, kBlock);
  multiply(w, f.gate, x.view(f.gate, tokens, select, 0), begin, end, w.first - at, padded);
  multiply(w, f.up, x.view(f.up, tokens, select, 0), begin, end, w.second - at, padded);
  for (int64_t t = 0; t < tokens; ++t) {
    float *gate = w.first + t * padded, *up = w.second + t * padded;
    if (f.gate.bias) step_.add(gate, f.gate.bias + at, count);
    if (f.up.bias) step_.add(up, f.up.bias + at, count);
    step_.swiglu(gate, up, count);
    std::fill(gate + count, gate + padded, 0.0f);
    fill(w, out.as(f.down.columns), from + t, gate, at, padded, formOf(f.down));
  }
}

// Output rows of panels [begin, end): all experts in ascending order, then the shared ones, then
// the residual stream.
void Step::down(Worker& w, const Layer& layer, const Grouping* g, int64_t begin, int64_t end) {
  const int64_t T = in_.tokens, D = model_.hidden, at = begin * kPanelRows;
  const int64_t count = std::min(end * kPanelRows, D) - at;
  if (g) {
    std::fill(w.second, w.second + T * count, 0.0f);
    for (int64_t i = 0; i < g->used_count; ++i) {
      const int32_t e = g->used[i];
      const int64_t from = g->starts[e], tokens = g->starts[e + 1] - from;
      const Matrix& m = layer.experts[e].down;
      pool_.await(done_[kDoneExperts + i], layer.experts[e].gate.panelCount());
      multiply(w, m, routed_.as(m.columns).view(m, tokens, nullptr, from), begin, end, w.first - at, count);
      for (int64_t t = 0; t < tokens; ++t)
        step_.addScaled(w.second + g->tokens[from + t] * count, w.first + t * count,
                        g->factors[from + t], count);
    }
  }
  if (layer.shared) {
    const Matrix& m = layer.shared.down;
    pool_.await(done_[kDoneShared], layer.shared.gate.panelCount());
    multiply(w, m, shared_.as(m.columns).view(m, T, nullptr, 0), begin, end, w.first - at, count);
    for (int64_t t = 0; t < T; ++t) {
      float* y = w.first + t * count;
      if (m.bias) step_.add(y, m.bias + at, count);
      if (g) step_.add(y, w.second + t * count, count);
    }
  }
  const float* y = layer.shared ? w.first : w.second;
  for (int64_t t = 0; t < T; ++t) step_.add(x_ + t * D + at, y + t * count, count);
}

// Chooses the experts of every token and sorts the tokens by expert.
const Grouping& Step::group(Worker& w, const Layer& layer) {
  const int64_t T = in_.tokens, A = model_.active;
  const int64_t E = static_cast<int64_t>(layer.experts.size());
  Grouping& g = alone_ ? w.grouping : workers_[0].grouping;
  const int64_t moe_index = w.moe_index++;
  rows(w, T, [&](int64_t t) {
    std::memcpy(w.logits, router_ + t * E, E * sizeof(float));
    selectExperts(w.logits, layer.correction, E, A, model_.norm_min, g.chosen + t * A,
                  g.weights + t * A);
    if (in_.experts && (!alone_ || w.ith == 0)) {
      const int64_t at = (moe_index * all_tokens_ + t) * A;
      std::memcpy(in_.experts + at, g.chosen + t * A, A * sizeof(int32_t));
      std::memcpy(in_.expert_weights + at, g.weights + t * A, A * sizeof(float));
    }
  });
  if (alone_ || w.ith == 0) {
    std::fill(g.starts, g.starts + E + 1, 0);
    for (int64_t i = 0; i < T * A; ++i) ++g.starts[g.chosen[i] + 1];
    g.used_count = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (g.starts[e + 1]) g.used[g.used_count++] = static_cast<int32_t>(e);
      g.starts[e + 1] += g.starts[e];
    }
    // Filling moves each start to its end, which is the next one's start: shift them back after.
    for (int64_t i = 0; i < T * A; ++i) {
      const int32_t place = g.starts[g.chosen[i]]++;
      g.tokens[place] = static_cast<int32_t>(i / A);
      g.factors[place] = g.weights[i];
    }
    for (int64_t e = E; e > 0; --e) g.starts[e] = g.starts[e - 1];
    g.starts[0] = 0;
  }
  if (!alone_) pool_.barrier();
  return g;
}

}  // namespace earnest
