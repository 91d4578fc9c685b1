// `_native.Model`: named weights in, logits out. Arrays are used where they lie and kept alive.
#include "bind/model.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <stdexcept>

#include "core/threadpool.h"
#include "isa/isa.h"
#include "model/step.h"

namespace nb = nanobind;

namespace earnest {
namespace {

template <class T, int kDimensions>
using In = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int kDimensions>
using Out = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Ctrl-C reaches Python only when it asks; a step of many tokens may take seconds.
bool signalled() {
  const nb::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

class BoundModel {
 public:
  BoundModel(nb::object pool, const std::string& tier, nb::dict numbers)
      : pool_object_(pool), pool_(nb::cast<ThreadPool&>(pool)), kernels_(findTier(tier.c_str())) {
    require(kernels_ != nullptr, "instruction-set tier is not available: " + tier);
    const auto number = [&](const char* key) { return nb::cast<int64_t>(numbers[key]); };
    model_.vocab = number("vocab_size");
    model_.hidden = number("hidden_size");
    model_.heads = number("num_attention_heads");
    model_.kv_heads = number("num_key_value_heads");
    model_.channels = number("head_dim");
    model_.active = number("moe_k");
    model_.planes = static_cast<int32_t>(number("planes"));
    model_.eps = nb::cast<float>(numbers["rms_norm_eps"]);
    model_.norm_min = nb::cast<float>(numbers["moe_norm_min"]);
    layers_ = number("num_hidden_layers");
    require(model_.planes == kA8 || model_.planes == kA15, "planes must be 1 or 2");
  }

  // A matrix that `place` will bring; its size is all that planning needs.
  void addMatrix(const std::string& name, int codec, int64_t rows, int64_t columns) {
    require(!step_, "the model is in use");
    require(codec >= 0 && codec < kCodecs, "codec number");
    const int64_t padded = roundUp(columns, kBlock);
    require(columns > 0 && rows > 0 && padded % kPanelShapes[codec].block_columns == 0,
            name + ": columns");
    static const uint8_t kNotYet = 0;
    matrices_[name] = {{&kNotYet, codec, rows, padded, nullptr}, columns, false};
  }

  void place(const std::string& name, In<uint8_t, 2> panels) {
    require(!step_, "the model is in use");
    const auto found = matrices_.find(name);
    require(found != matrices_.end(), "no matrix " + name);
    Matrix& m = found->second.matrix;
    require(int64_t(panels.shape(0)) == m.panelCount(), name + ": number of panels");
    require(int64_t(panels.shape(1)) == panelBytes(m.codec, m.columns), name + ": bytes of a panel");
    m.panels = panels.data();
    found->second.placed = true;
    kept_.push_back(nb::cast(panels));
  }

  void addVector(const std::string& name, In<float, 1> values) {
    require(!step_, "the model is in use");
    vectors_[name] = {values.data(), int64_t(values.shape(0))};
    kept_.push_back(nb::cast(values));
  }

  // Bytes of scratch. All names must be there; nothing is taken yet.
  size_t plan(int kv_type, int64_t pages, int64_t page, int64_t max_tokens,
                int64_t max_positions) {
    require(!step_, "the model is in use");
    require(kv_type >= kKvF32 && kv_type <= kKvInt16, "KV type");
    require((kv_type != kKvInt8 && kv_type != kKvInt16) || model_.channels <= kScaledChannelsMax,
            "heads are too wide for 8-bit keys");
    require(pages > 0 && page > 0 && page % 16 == 0, "pages hold a multiple of 16 positions");
    require(max_tokens > 0 && max_positions > 0, "positive sizes");
    cache_ = {nullptr, kv_type, pages, page, model_.kv_heads, model_.channels};
    max_positions_ = max_positions;
    max_tokens_ = max_tokens;
    resolve();
    return Step(model_, *kernels_, pool_, cache_, max_tokens, max_positions).scratchBytes();
  }

  int64_t kvBytes() const { return cache_.bytes(layers_); }

  void use(Out<uint8_t, 1> scratch, Out<uint8_t, 1> cache) {
    require(max_tokens_ > 0 && !step_, "plan first, use once");
    for (const auto& [name, named] : matrices_) require(named.placed, "no panels of " + name);
    require(int64_t(cache.shape(0)) == kvBytes(), "bytes of the KV cache");
    cache_.data = cache.data();
    resolve();
    auto step =
        std::make_unique<Step>(model_, *kernels_, pool_, cache_, max_tokens_, max_positions_);
    const uintptr_t from = reinterpret_cast<uintptr_t>(scratch.data());
    const uintptr_t aligned = (from + 63) / 64 * 64;
    require(scratch.shape(0) >= step->scratchBytes() + (aligned - from), "bytes of scratch");
    step->useScratch(reinterpret_cast<uint8_t*>(aligned));
    step_ = std::move(step);
    kept_.push_back(nb::cast(scratch));
    kept_.push_back(nb::cast(cache));
  }

  // The batch has been checked by the caller; here only what memory safety needs.
  void run(In<int32_t, 1> tokens, In<int32_t, 1> positions, In<int32_t, 1> starts,
           In<int32_t, 2> tables, In<int32_t, 1> rows, In<int32_t, 1> hidden_rows,
           In<float, 2> cosines, In<float, 2> sines, Out<float, 2> logits, Out<float, 2> hidden,
           nb::object experts, nb::object weights) {
    require(step_ != nullptr, "the model is not in use yet");
    StepInput in;
    in.tokens = tokens.shape(0);
    in.sequences = tables.shape(0);
    in.table_width = tables.shape(1);
    in.rows = rows.shape(0);
    in.hidden_rows = hidden_rows.shape(0);
    const int64_t T = in.tokens, F = model_.channels / 2;
    require(int64_t(positions.shape(0)) == T, "positions");
    require(int64_t(starts.shape(0)) == in.sequences + 1, "sequence starts");
    require(int64_t(cosines.shape(0)) == T && int64_t(cosines.shape(1)) == F, "cosines");
    require(int64_t(sines.shape(0)) == T && int64_t(sines.shape(1)) == F, "sines");
    require(int64_t(logits.shape(0)) == in.rows && int64_t(logits.shape(1)) == model_.vocab,
            "logits");
    require(int64_t(hidden.shape(0)) == in.hidden_rows && int64_t(hidden.shape(1)) == model_.hidden,
            "hidden states");
    in.ids = tokens.data();
    in.positions = positions.data();
    in.starts = starts.data();
    in.tables = tables.data();
    in.wanted = rows.data();
    in.hidden_wanted = hidden_rows.data();
    for (int64_t t = 0; t < T; ++t) require(in.ids[t] >= 0 && in.ids[t] < model_.vocab, "token id");
    for (int64_t r = 0; r < in.rows; ++r) require(in.wanted[r] >= 0 && in.wanted[r] < T, "row");
    for (int64_t r = 0; r < in.hidden_rows; ++r)
      require(in.hidden_wanted[r] >= 0 && in.hidden_wanted[r] < T, "hidden row");
    require(in.starts[0] == 0 && in.starts[in.sequences] == T, "sequence starts");
    for (int64_t s = 0; s < in.sequences; ++s) {
      const int64_t begin = in.starts[s], end = in.starts[s + 1];
      require(begin <= end && end <= T, "sequence starts");
      if (begin == end) continue;
      const int64_t first = in.positions[begin], last = in.positions[end - 1];
      require(first >= 0 && last - first == end - begin - 1 && last < max_positions_, "positions");
      for (int64_t t = begin; t < end; ++t)
        require(in.positions[t] == first + t - begin, "positions");
      require(last / cache_.page < in.table_width, "block table");
      for (int64_t p = 0; p <= last / cache_.page; ++p) {
        const int64_t page = in.tables[s * in.table_width + p];
        require(page >= 0 && page < cache_.pages, "block table");
      }
    }
    in.cosines = cosines.data();
    in.sines = sines.data();
    in.logits = logits.data();
    in.hidden = hidden.data();
    if (!experts.is_none()) {
      auto ids = nb::cast<Out<int32_t, 3>>(experts, false);
      auto factors = nb::cast<Out<float, 3>>(weights, false);
      int64_t moe = 0;
      for (const Layer& layer : model_.layers) moe += !layer.experts.empty();
      require(int64_t(ids.shape(0)) == moe && int64_t(ids.shape(1)) == T &&
                  int64_t(ids.shape(2)) == model_.active && ids.size() == factors.size(),
              "routing");
      in.experts = ids.data();
      in.expert_weights = factors.data();
    }
    in.interrupted = &signalled;
    bool complete;
    {
      const nb::gil_scoped_release release;
      complete = step_->run(in);
    }
    if (!complete) throw nb::python_error();
  }

 private:
  struct Named {
    Matrix matrix;
    int64_t columns;
    bool placed;
  };

  // From names to layers.
  void resolve() {
    const int64_t D = model_.hidden, Q = model_.qSize(), K = model_.kvSize();
    model_.layers.clear();
    model_.embedding = matrix("model.embed_tokens", model_.vocab, D);
    model_.head = matrices_.count("lm_head") ? matrix("lm_head", model_.vocab, D)
                                             : model_.embedding;
    if (vectors_.count("lm_head.bias")) model_.head.bias = vector("lm_head.bias", model_.vocab);
    model_.final_norm = vector("model.norm", D);
    for (int64_t i = 0; i < layers_; ++i) {
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      Layer layer;
      layer.input_norm = vector(prefix + "input_layernorm", D);
      layer.post_norm = vector(prefix + "post_attention_layernorm", D);
      layer.q = matrix(prefix + "self_attn.q_proj", Q, D);
      layer.k = matrix(prefix + "self_attn.k_proj", K, D);
      layer.v = matrix(prefix + "self_attn.v_proj", K, D);
      layer.o = matrix(prefix + "self_attn.o_proj", D, Q);
      const std::string mlp = prefix + "mlp.";
      if (!matrices_.count(mlp + "gate")) {
        layer.shared = feedForward(mlp);
      } else {
        const int64_t experts = matrices_[mlp + "gate"].matrix.rows;
        require(model_.active >= 1 && model_.active <= experts, mlp + ": experts per token");
        layer.router = matrix(mlp + "gate", experts, D);
        require(layer.router.codec == kF32, mlp + "gate must be float32");
        layer.correction = vector(mlp + "moe_statics.e_score_correction_bias", experts);
        for (int64_t e = 0; e < experts; ++e) {
          layer.experts.push_back(feedForward(mlp + "experts." + std::to_string(e) + "."));
          require(layer.experts[e].gate.rows == layer.experts[0].gate.rows, mlp + "experts differ");
        }
        if (matrices_.count(mlp + "shared_experts.down_proj"))
          layer.shared = feedForward(mlp + "shared_experts.");
      }
      model_.layers.push_back(std::move(layer));
    }
  }

  Matrix matrix(const std::string& name, int64_t rows, int64_t columns) {
    const auto found = matrices_.find(name);
    require(found != matrices_.end(), "no matrix " + name);
    Matrix m = found->second.matrix;
    require(m.rows == rows && found->second.columns == columns, "shape of " + name);
    if (vectors_.count(name + ".bias")) m.bias = vector(name + ".bias", rows);
    return m;
  }

  FeedForward feedForward(const std::string& prefix) {
    const auto found = matrices_.find(prefix + "gate_proj");
    require(found != matrices_.end(), "no matrix " + prefix + "gate_proj");
    const int64_t width = found->second.matrix.rows;
    return {matrix(prefix + "gate_proj", width, model_.hidden),
            matrix(prefix + "up_proj", width, model_.hidden),
            matrix(prefix + "down_proj", model_.hidden, width)};
  }

  const float* vector(const std::string& name, int64_t size) {
    const auto found = vectors_.find(name);
    require(found != vectors_.end(), "no vector " + name);
    require(found->second.second == size, "size of " + name);
    return found->second.first;
  }

  nb::object pool_object_;
  ThreadPool& pool_;
  const KernelTable* kernels_;
  Model model_;
  int64_t layers_ = 0, max_tokens_ = 0, max_positions_ = 0;
  std::map<std::string, Named> matrices_;
  std::map<std::string, std::pair<const float*, int64_t>> vectors_;
  std::vector<nb::object> kept_;
  KvCache cache_;
  std::unique_ptr<Step> step_;
};

}  // namespace

void bindModel(nb::module_& module) {
  nb::class_<BoundModel>(module, "Model")
      .def(nb::init<nb::object, const std::string&, nb::dict>(), nb::arg("pool"), nb::arg("tier"),
           nb::arg("numbers"))
      .def("matrix", &BoundModel::addMatrix, nb::arg("name"), nb::arg("codec"),
           nb::arg("rows"), nb::arg("columns"))
      .def("place", &BoundModel::place, nb::arg("name"), nb::arg("panels").noconvert())
      .def("vector", &BoundModel::addVector, nb::arg("name"), nb::arg("values").noconvert())
      .def("plan", &BoundModel::plan, nb::arg("kv_type"), nb::arg("pages"), nb::arg("page"),
           nb::arg("max_tokens"), nb::arg("max_positions"))
      .def_prop_ro("kv_bytes", &BoundModel::kvBytes)
      .def("use", &BoundModel::use, nb::arg("scratch").noconvert(), nb::arg("cache").noconvert())
      .def("step", &BoundModel::run, nb::arg("tokens").noconvert(),
           nb::arg("positions").noconvert(), nb::arg("starts").noconvert(),
           nb::arg("tables").noconvert(), nb::arg("rows").noconvert(),
           nb::arg("hidden_rows").noconvert(), nb::arg("cosines").noconvert(),
           nb::arg("sines").noconvert(), nb::arg("logits").noconvert(),
           nb::arg("hidden").noconvert(), nb::arg("experts").none(), nb::arg("weights").none());
}

}  // namespace earnest
