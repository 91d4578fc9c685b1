// The Python module `earnest._native`. Thin: every argument is checked by the typed wrappers in
// src/earnest/runners/native, and again here as far as memory safety needs it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdlib>
#include <ctime>
#include <stdexcept>

#include "bind/model.h"
#include "bind/pack.h"
#include "core/threadpool.h"
#include "isa/isa.h"

namespace nb = nanobind;

namespace earnest {
namespace {

template <class T, int kDimensions>
using In = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int kDimensions>
using Out = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

const KernelTable& tierNamed(const std::string& name) {
  const KernelTable* tier = findTier(name.c_str());
  if (tier == nullptr) throw std::invalid_argument("instruction-set tier is not available: " + name);
  return *tier;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

std::vector<std::string> names(const std::vector<const KernelTable*>& tiers) {
  std::vector<std::string> out;
  for (const KernelTable* tier : tiers) out.emplace_back(tier->name);
  return out;
}

// Memory from 64-byte boundaries, freed with the object.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* get() const { return static_cast<uint8_t*>(data_); }

 private:
  void* data_;
};

void quantizeRows(const std::string& tier, In<float, 2> x, int planes, Out<int8_t, 2> values,
                  Out<float, 3> blocks) {
  const KernelTable& table = tierNamed(tier);
  const size_t rows = x.shape(0), columns = x.shape(1);
  require(columns % kBlock == 0, "columns must be a multiple of 32");
  require(planes == kA8 || planes == kA15, "planes must be 1 or 2");
  require(values.shape(0) == rows && values.shape(1) == columns * planes, "shape of values");
  require(blocks.shape(0) == rows && blocks.shape(1) == columns / kBlock && blocks.shape(2) == 4,
          "shape of blocks");
  static_assert(sizeof(ActivationBlock) == 16);
  const nb::gil_scoped_release release;
  for (size_t t = 0; t < rows; ++t)
    table.quantize(x.data() + t * columns, columns, planes, values.data() + t * columns * planes,
                   reinterpret_cast<ActivationBlock*>(blocks.data()) + t * columns / kBlock);
}

// x [T, K] -> out [T, N]; quantises (or prepares) the activations, then multiplies, in one run.
void panelMatmul(ThreadPool& pool, const std::string& tier, int codec, In<uint8_t, 2> panels,
                 In<float, 2> x, int planes, nb::object select, Out<float, 2> out) {
  const KernelTable& table = tierNamed(tier);
  require(codec >= 0 && codec < kCodecs, "codec number");
  const int64_t rows = out.shape(1), tokens = out.shape(0), columns = x.shape(1);
  const PanelShape& shape = kPanelShapes[codec];
  require(columns > 0 && columns % shape.block_columns == 0, "columns must be whole panel blocks");
  require(planes == kA8 || planes == kA15, "planes must be 1 or 2");
  const int64_t count = (rows + kPanelRows - 1) / kPanelRows;
  require(int64_t(panels.shape(0)) == count, "number of panels");
  require(int64_t(panels.shape(1)) == panelBytes(codec, columns), "bytes of a panel");
  std::vector<int32_t> chosen;
  const int64_t sources = x.shape(0);
  if (!select.is_none()) {
    auto list = nb::cast<In<int32_t, 1>>(select, false);
    require(int64_t(list.shape(0)) == tokens, "one selected row for every row of the result");
    chosen.assign(list.data(), list.data() + tokens);
    for (const int32_t row : chosen) require(row >= 0 && row < sources, "selected row");
  } else {
    require(sources == tokens, "rows of x and of the result");
  }
  if (tokens == 0 || rows == 0) return;

  const nb::gil_scoped_release release;
  const bool plain = codec <= kBf16;
  const int64_t blocks = columns / kBlock;
  const Scratch values(plain ? 0 : sources * columns * planes);
  const Scratch heads(plain ? 0 : sources * blocks * sizeof(ActivationBlock));
  const Scratch floats(plain ? sources * columns * sizeof(float) : 0);
  const size_t each = (table.scratchBytes(columns, tokens) + 63) / 64 * 64;
  const Scratch scratch(each * pool.workers());

  Matmul m{};
  m.panels = panels.data();
  m.codec = codec;
  m.rows = rows;
  m.columns = columns;
  m.x = {tokens,
         columns,
         planes,
         reinterpret_cast<int8_t*>(values.get()),
         reinterpret_cast<ActivationBlock*>(heads.get()),
         reinterpret_cast<float*>(floats.get()),
         chosen.empty() ? nullptr : chosen.data()};
  m.out = out.data();
  m.out_stride = rows;
  auto body = [&](int ith, int nth) {
    for (int64_t t = ith; t < sources; t += nth) {
      const float* row = x.data() + t * columns;
      if (plain)
        table.prepare(row, columns, codec, const_cast<float*>(m.x.floats) + t * columns);
      else
        table.quantize(row, columns, planes, const_cast<int8_t*>(m.x.values) + t * columns * planes,
                       const_cast<ActivationBlock*>(m.x.blocks) + t * blocks);
    }
    pool.barrier();
    table.matmul(m, count * ith / nth, count * (ith + 1) / nth, scratch.get() + each * ith);
  };
  pool.run(body);
}

double secondsOf(auto&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second that all workers read together from `data`.
double readRate(ThreadPool& pool, const std::string& tier, In<uint8_t, 1> data, int streams) {
  const KernelTable& table = tierNamed(tier);
  const nb::gil_scoped_release release;
  const size_t part = data.shape(0) / pool.workers() / 4096 * 4096;
  std::atomic<uint64_t> sink{0};
  auto body = [&](int ith, int) { sink += table.read(data.data() + part * ith, part, streams); };
  const double seconds = secondsOf([&] { pool.run(body); });
  return part * pool.workers() / seconds;
}

// Integer operations (a product and a sum are two) per second of all workers together.
double integerRate(ThreadPool& pool, const std::string& tier, uint64_t rounds) {
  const KernelTable& table = tierNamed(tier);
  const nb::gil_scoped_release release;
  std::atomic<uint64_t> done{0};
  auto body = [&](int, int) { done += table.peak(rounds); };
  const double seconds = secondsOf([&] { pool.run(body); });
  return done / seconds;
}

// Every worker adds to a shared total before and after `barriers` barriers and checks it: a pool
// that lost or reordered anything would show it.
uint64_t stressPool(ThreadPool& pool, int barriers, bool crew) {
  const nb::gil_scoped_release release;
  std::vector<uint64_t> slots(pool.workers(), 0);
  std::atomic<uint64_t> wrong{0};
  std::atomic<uint32_t> done{0};
  auto body = [&](int ith, int nth) {
    for (int i = 1; i <= barriers; ++i) {
      slots[ith] += i;
      if (i % 2 != 0) {
        pool.barrier();
      } else {
        pool.report(done, 1);
        pool.await(done, static_cast<uint32_t>(nth * (i / 2)));
      }
      if (slots[(ith + 1) % nth] != uint64_t(i) * (i + 1) / 2) ++wrong;
      pool.barrier();
    }
  };
  crew ? pool.runCrew(body) : pool.run(body);
  return wrong;
}

// The same with `milliseconds` of a processor's time before each of a few barriers, for as many
// workers as an adaptive pool takes.
uint64_t busyCrew(ThreadPool& pool, int milliseconds) {
  const nb::gil_scoped_release release;
  std::vector<uint64_t> slots(pool.workers(), 0);
  std::atomic<uint64_t> wrong{0};
  auto body = [&](int ith, int nth) {
    for (uint64_t i = 1; i <= 3; ++i) {
      const std::clock_t begun = std::clock();  // of the whole process
      while (std::clock() - begun < milliseconds * (CLOCKS_PER_SEC / 1000)) ++slots[ith];
      slots[ith] = i;
      pool.barrier();
      if (slots[(ith + 1) % nth] != i) ++wrong;
      pool.barrier();
    }
  };
  pool.runCrew(body);
  return wrong;
}

NB_MODULE(_native, module) {
  // A model that lives until Python ends is no mistake of its user, who would read of leaks otherwise.
  nb::set_leak_warnings(false);
  bindModel(module);
  bindPack(module);
  module.def("compiled_tiers", [] { return names(compiledTiers()); });
  module.def("available_tiers", [] { return names(availableTiers()); });
  module.def("usable_threads", &usableThreads);
  module.def("panel_shapes", [] {
    nb::list out;
    for (const PanelShape& s : kPanelShapes)
      out.append(nb::make_tuple(s.name, s.block_columns, s.block_bytes));
    return out;
  });
  nb::class_<ThreadPool>(module, "ThreadPool")
      .def(nb::init<int, bool>(), nb::arg("workers"), nb::arg("adaptive") = false)
      .def_prop_ro("workers", &ThreadPool::workers)
      .def_prop_ro("active", &ThreadPool::active);
  nb::class_<Crew>(module, "Crew")  // for its tests
      .def(nb::init<int>(), nb::arg("most"))
      .def("size", &Crew::size, nb::arg("now"))
      .def("ran", &Crew::ran, nb::arg("now"), nb::arg("wall"), nb::arg("lost"));
  module.def("quantize", &quantizeRows, nb::arg("tier"), nb::arg("x").noconvert(),
             nb::arg("planes"), nb::arg("values").noconvert(), nb::arg("blocks").noconvert());
  module.def("matmul", &panelMatmul, nb::arg("pool"), nb::arg("tier"), nb::arg("codec"),
             nb::arg("panels").noconvert(), nb::arg("x").noconvert(), nb::arg("planes"),
             nb::arg("select").none(), nb::arg("out").noconvert());
  module.def("read_rate", &readRate, nb::arg("pool"), nb::arg("tier"), nb::arg("data").noconvert(),
             nb::arg("streams"));
  module.def("integer_rate", &integerRate, nb::arg("pool"), nb::arg("tier"), nb::arg("rounds"));
  module.def("busy_crew", &busyCrew, nb::arg("pool"), nb::arg("milliseconds"));
  module.def("stress_pool", &stressPool, nb::arg("pool"), nb::arg("barriers"),
             nb::arg("crew") = false);
}

}  // namespace
}  // namespace earnest
