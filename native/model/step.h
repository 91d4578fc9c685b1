// One forward step of a batch: every layer, every thread, inside one run of the pool.
//
// Who computes what never shows in a result: an output element belongs to one worker, and the order
// of its float32 sums is fixed by the kernels. So work is handed out first come, first served.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "core/threadpool.h"
#include "earnest/step_kernels.h"
#include "model/kv.h"
#include "model/weights.h"

namespace earnest {

// As runners/base.py's Batch, valid, with the rotary angles of every token.
struct StepInput {
  int64_t tokens = 0, sequences = 0, table_width = 0, rows = 0, hidden_rows = 0;
  const int32_t* ids = nullptr;        // [tokens]
  const int32_t* positions = nullptr;  // [tokens]
  const int32_t* starts = nullptr;     // [sequences + 1]
  const int32_t* tables = nullptr;     // [sequences][table_width]
  const int32_t* wanted = nullptr;     // [rows]
  const int32_t* hidden_wanted = nullptr;  // [hidden_rows]
  const float* cosines = nullptr;      // [tokens][channels / 2]
  const float* sines = nullptr;
  float* logits = nullptr;         // [rows][vocab]
  float* hidden = nullptr;         // [hidden_rows][hidden size], after the final norm
  int32_t* experts = nullptr;      // [MoE layers][tokens][active], or null
  float* expert_weights = nullptr; // likewise
  // Asked now and then by the calling thread; true ends the step early.
  bool (*interrupted)() = nullptr;
};

// Hands out pieces of one block of memory, or only counts them. Under AddressSanitizer forbidden
// gaps lie between the pieces.
class Arena {
 public:
  explicit Arena(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += static_cast<size_t>(count) * sizeof(T);
#if defined(__SANITIZE_ADDRESS__)
    if (base_) __asan_poison_memory_region(base_ + used_, 64);
    used_ += 64;
#endif
    return at;
  }
  size_t used() const { return (used_ + 63) / 64 * 64; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// Rows of activations in every form that the matrices after them read.
struct Operand {
  int64_t columns = 0;  // padded to a multiple of 32
  int32_t planes = 1;
  int8_t* values = nullptr;
  ActivationBlock* blocks = nullptr;
  float* floats = nullptr;  // for f32 and f16 weights
  float* bf16 = nullptr;    // for bf16 weights, as their kernel wants them

  void take(Arena& arena, int64_t rows, int64_t width, int32_t planes_, uint32_t forms);
  // The same memory for rows of another (smaller) width: kernels step from row to row by it.
  Operand as(int64_t width) const {
    Operand other = *this;
    other.columns = width;
    return other;
  }
  Activations view(const Matrix& m, int64_t tokens, const int32_t* select, int64_t from) const;
};

struct Bands;
struct Grouping;

class Step {
 public:
  // Scratch for `max_tokens` tokens at a time (longer batches are run in pieces, with the same
  // result) and sequences of at most `max_positions`.
  Step(const Model& model, const KernelTable& kernels, ThreadPool& pool, const KvCache& cache,
       int64_t max_tokens, int64_t max_positions);
  ~Step();

  // Bytes that `useScratch` must be given, aligned to 64.
  size_t scratchBytes() const { return scratch_bytes_; }
  void useScratch(uint8_t* memory);

  // False if interrupted; what the batch has stored by then is incomplete.
  bool run(const StepInput& input);

 private:
  struct Worker;
  struct AttentionItem {
    int64_t row, tokens, kv_head;
    int64_t segment, segments;  // from the first on; none: all of them
    int64_t state;              // of the first segment: where its states go
    const int32_t* table;
  };
  struct Merge {
    int64_t row, tokens, kv_head, segments, state;
  };

  void layout(Arena& arena);
  void plan(const StepInput& input);
  void work(int ith, int nth);
  bool layer(Worker& w, int64_t index);
  void attention(Worker& w, int64_t index);
  void feedForward(Worker& w, int64_t index);
  void hiddenStates(Worker& w);
  void head(Worker& w);
  const Grouping& group(Worker& w, const Layer& layer);
  void gateUp(Worker& w, const FeedForward& f, const Operand& x, int64_t tokens,
              const int32_t* select, const Operand& out, int64_t from, int64_t begin, int64_t end);
  void down(Worker& w, const Layer& layer, const Grouping* grouping, int64_t begin, int64_t end);
  void attend(Worker& w, const AttentionItem& item, int64_t index);
  Attention attentionOf(int64_t row, int64_t tokens, int64_t kv_head, const int32_t* table,
                        int64_t index) const;
  void fill(Worker& w, const Operand& out, int64_t row, float* x, int64_t from, int64_t count,
            uint32_t forms) const;
  void multiply(Worker& w, const Matrix& m, const Activations& x, int64_t begin, int64_t end,
                float* out, int64_t stride) const;
  int64_t bufferPanels(int64_t tokens) const;
  int64_t bandPanels(int64_t panels, int64_t tokens) const;
  Bands bands(int64_t panels, int64_t tokens) const;
  // Rows of logits at a time.
  int64_t headRows() const;
  // Rows of the smallest run of heads that is also one of pairs of panels, for keys with a scale per head.
  int64_t wholeHeads() const {
    return cache_.scaled() ? std::lcm<int64_t>(model_.channels, 2 * kPanelRows) : 0;
  }
  template <class Body>
  void share(Worker& w, int64_t items, Body body);
  template <class Body>
  void rows(Worker& w, int64_t count, Body body);

  const Model& model_;
  const KernelTable& kernels_;
  const StepKernels& step_;
  ThreadPool& pool_;
  const KvCache cache_;
  const int64_t max_tokens_, max_positions_;
  const float attention_scale_;
  uint32_t forms_ = 0;  // of operands, over all matrices
  std::vector<uint32_t> ffn_forms_;  // of what each layer's feed-forward part reads
  int64_t states_capacity_ = 0;
  size_t scratch_bytes_ = 0;
  uint8_t* scratch_ = nullptr;

  // Scratch of all workers.
  float *x_ = nullptr, *q_ = nullptr, *attended_ = nullptr, *router_ = nullptr, *states_ = nullptr;
  Operand hidden_, heads_, routed_, shared_;
  std::vector<Worker> workers_;
  std::unique_ptr<std::atomic<int64_t>[]> counters_;
  int64_t counter_count_ = 0;
  // In this layer: workers that need the residual stream no more; panels done of the router, of the
  // shared experts' gate and up, and of those of each expert in use.
  std::unique_ptr<std::atomic<uint32_t>[]> done_;

  // The piece being run.
  StepInput in_;
  const int32_t* places_ = nullptr;  // of its rows among those asked for
  const int32_t* hidden_places_ = nullptr;
  int64_t all_tokens_ = 0;           // of the batch
  bool alone_ = false;  // few tokens: every worker does the row work itself, without a barrier
  std::vector<AttentionItem> attention_;
  std::vector<Merge> merges_;
  std::vector<int32_t> pages_, slots_;  // of the tokens
  std::atomic<bool> stop_{false};
  int64_t last_check_ = 0;
  ForkMutex turn_;
};

}  // namespace earnest
