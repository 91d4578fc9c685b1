// A panel interleaves 16 rows by words of 32 bits: in nearly every codec a word of a row (four
// columns, or scales of a block) lands in a vector that holds the same word of all rows. So a block
// of 16 rows is first gathered as such vectors, bits then move inside the words, all rows together,
// and the vectors are written out one after the other. A panel's source is 16 neighbouring rows,
// some ten kilobytes, which stay in a core's own cache while their blocks are visited.
#include "core/pack.h"

#include <cstring>

#include "earnest/kernels.h"

namespace earnest {
namespace {

constexpr int kRows = kPanelRows;

// A word of each of 16 rows. The compiler's own vectors become whatever registers the target has.
using Lanes = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));

template <class T>
inline void store(uint8_t* to, const T& x) {
  std::memcpy(to, &x, sizeof x);
}

template <class T>
inline T load(const uint8_t* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The word at `at` of each row. Two rows and two words at a time, which halves the stores.
template <int kWords>
inline void gather(const uint8_t* rows, int64_t stride, Lanes* words) {
  auto* out = reinterpret_cast<uint8_t*>(words);
  for (int r = 0; r < kRows; r += 2) {
    const uint8_t* a = rows + r * stride;
    const uint8_t* b = a + stride;
    for (int i = 0; i + 1 < kWords; i += 2) {
      const uint64_t x = load<uint64_t>(a + 4 * i), y = load<uint64_t>(b + 4 * i);
      store(out + 64 * i + 4 * r, (x & 0xffffffff) | y << 32);
      store(out + 64 * (i + 1) + 4 * r, x >> 32 | (y >> 32 << 32));
    }
    if (kWords % 2) {
      store(out + 64 * (kWords - 1) + 4 * r, load<uint32_t>(a + 4 * (kWords - 1)));
      store(out + 64 * (kWords - 1) + 4 * r + 4, load<uint32_t>(b + 4 * (kWords - 1)));
    }
  }
}

template <int kWords>
inline void scatter(const Lanes* words, uint8_t* rows, int64_t stride) {
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  for (int r = 0; r < kRows; r += 2) {
    uint8_t* a = rows + r * stride;
    uint8_t* b = a + stride;
    for (int i = 0; i + 1 < kWords; i += 2) {
      const uint64_t x = load<uint64_t>(in + 64 * i + 4 * r);
      const uint64_t y = load<uint64_t>(in + 64 * (i + 1) + 4 * r);
      store(a + 4 * i, (x & 0xffffffff) | y << 32);
      store(b + 4 * i, x >> 32 | (y >> 32 << 32));
    }
    if (kWords % 2) {
      store(a + 4 * (kWords - 1), load<uint32_t>(in + 64 * (kWords - 1) + 4 * r));
      store(b + 4 * (kWords - 1), load<uint32_t>(in + 64 * (kWords - 1) + 4 * r + 4));
    }
  }
}

// The two halves of a word of all rows, 32 bytes each; the four bytes of one, 16 bytes each.
inline void storeHalves(uint8_t* out, const Lanes& word) {
  store(out, __builtin_convertvector(word & 0xffff, Halves));
  store(out + 32, __builtin_convertvector(word >> 16, Halves));
}

inline Lanes loadHalves(const uint8_t* in) {
  return __builtin_convertvector(load<Halves>(in), Lanes) |
         __builtin_convertvector(load<Halves>(in + 32), Lanes) << 16;
}

inline void storeBytes(uint8_t* out, const Lanes& word) {
  for (int i = 0; i < 4; ++i)
    store(out + 16 * i, __builtin_convertvector(word >> (8 * i) & 0xff, Bytes));
}

inline Lanes loadBytes(const uint8_t* in) {
  Lanes word{};
  for (int i = 0; i < 4; ++i)
    word |= __builtin_convertvector(load<Bytes>(in + 16 * i), Lanes) << (8 * i);
  return word;
}

constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0;  // nibbles of the four bytes of a word

// Bytes of a panel block are written `[word][row]`.
template <int kWords>
inline void storeWords(uint8_t* out, const Lanes* words) {
  std::memcpy(out, words, 64 * kWords);
}

template <int kWords>
inline void loadWords(const uint8_t* in, Lanes* words) {
  std::memcpy(words, in, 64 * kWords);
}

// --- codecs -----------------------------------------------------------------------------------
//
// Each says how many bytes a block of a row has, at which byte its words begin and how many there
// are, and where a half float lies that belongs to no word (-1: nowhere); its place in the panel
// block is the first 32 bytes. `pack` and `unpack` see the words, and the panel block behind that
// half float.

// f32 and bf16: a word is one or two columns as they lie.
template <int kSize>
struct Whole {
  static constexpr int kBytes = kSize, kStart = 0, kWords = kSize / 4, kHalf = -1;
  static void pack(const Lanes* w, uint8_t* out) { storeWords<kWords>(out, w); }
  static void unpack(const uint8_t* in, Lanes* w) { loadWords<kWords>(in, w); }
};

struct Float16 {
  static constexpr int kBytes = 64, kStart = 0, kWords = 16, kHalf = -1;
  static void pack(const Lanes* w, uint8_t* out) {
    for (int i = 0; i < kWords; ++i) storeHalves(out + 64 * i, w[i]);
  }
  static void unpack(const uint8_t* in, Lanes* w) {
    for (int i = 0; i < kWords; ++i) w[i] = loadHalves(in + 64 * i);
  }
};

struct Q8_0 {
  static constexpr int kBytes = 34, kStart = 2, kWords = 8, kHalf = 0;
  static void pack(const Lanes* w, uint8_t* out) { storeWords<kWords>(out, w); }
  static void unpack(const uint8_t* in, Lanes* w) { loadWords<kWords>(in, w); }
};

// Exchanges bits i and i + kShift wherever `mask` has bit i.
template <int kShift>
inline Lanes exchange(const Lanes& x, uint32_t mask) {
  const Lanes t = (x ^ x >> kShift) & mask;
  return x ^ t ^ t << kShift;
}

// Bit 4 g + c of a word to bit 8 c + g and back: the fifth bits of 32 weights, whose place is bit g
// of byte c. The five bits of the index are rotated by two, an exchange of two of them at a time.
inline Lanes spreadFifth(const Lanes& x) {
  return exchange<1>(
      exchange<2>(exchange<7>(exchange<14>(x, 0x0000cccc), 0x00aa00aa), 0x0c0c0c0c), 0x22222222);
}

inline Lanes collectFifth(const Lanes& x) {
  return exchange<14>(
      exchange<7>(exchange<2>(exchange<1>(x, 0x22222222), 0x0c0c0c0c), 0x00aa00aa), 0x0000cccc);
}

// q4_0, q4_1, q5_0, q5_1: one or two half floats, fifth bits or none, 16 bytes of nibbles: the low
// ones are columns 0-15.
template <bool kMinimum, bool kFifth>
struct Legacy {
  static constexpr int kFirst = kMinimum + kFifth;  // word of the nibbles
  static constexpr int kWords = 4 + kFirst;
  static constexpr int kStart = kMinimum ? 0 : 2, kHalf = kMinimum ? -1 : 0;
  static constexpr int kBytes = kStart + 4 * kWords;

  static void pack(const Lanes* w, uint8_t* out) {
    if (kMinimum) storeHalves(out, w[0]), out += 64;
    if (kFifth) store(out, spreadFifth(w[kFirst - 1])), out += 64;
    for (int j = 0; j < 2; ++j) {
      const Lanes a = w[kFirst + 2 * j], b = w[kFirst + 2 * j + 1];
      store(out + 64 * j, Lanes((a & kLow) | (b & kLow) << 4));
      store(out + 128 + 64 * j, Lanes((a & kHigh) >> 4 | (b & kHigh)));
    }
  }

  static void unpack(const uint8_t* in, Lanes* w) {
    if (kMinimum) w[0] = loadHalves(in), in += 64;
    if (kFifth) w[kFirst - 1] = collectFifth(load<Lanes>(in)), in += 64;
    for (int j = 0; j < 2; ++j) {
      const Lanes low = load<Lanes>(in + 64 * j), high = load<Lanes>(in + 128 + 64 * j);
      w[kFirst + 2 * j] = (low & kLow) | (high & kLow) << 4;
      w[kFirst + 2 * j + 1] = (low & kHigh) >> 4 | (high & kHigh);
    }
  }
};

// q4_k and q5_k. Words of a row: d and m; 6-bit scales and minima a, b, c; for q5_k 8 words of fifth
// bits, bit r of a byte for run r; then for every two runs 8 words of nibbles, the low ones for the
// first run. (A run is 32 columns.)
template <bool kFifth>
struct SixBit {
  static constexpr int kFirst = kFifth ? 12 : 4, kWords = kFirst + 32, kBytes = 4 * kWords;
  static constexpr int kStart = 0, kHalf = -1, kHead = 64 + 128 + 64, kRun = kFifth ? 320 : 256;

  static void pack(const Lanes* w, uint8_t* out) {
    storeHalves(out, w[0]);
    const Lanes a = w[1], b = w[2], c = w[3];
    storeBytes(out + 64, (a & kLow) | (b & kLow) << 4);
    storeBytes(out + 128, c);
    storeBytes(out + 192, (a >> 4 & 0x03030303) | (b >> 2 & 0x0c0c0c0c) | (a >> 2 & 0x30303030) |
                              (b & 0xc0c0c0c0));
    out += kHead;
    for (int run = 0; run < 8; ++run, out += kRun) {
      uint8_t* to = out;
      if (kFifth) {
        Lanes bits{};
        for (int g = 0; g < 8; ++g) bits |= (w[4 + g] >> run & 0x01010101) << g;
        store(to, bits);
        to += 64;
      }
      const Lanes* q = w + kFirst + run / 2 * 8;
      for (int j = 0; j < 4; ++j) {
        const Lanes x = q[2 * j], y = q[2 * j + 1];
        store(to + 64 * j, run % 2 ? Lanes((x & kHigh) >> 4 | (y & kHigh))
                                   : Lanes((x & kLow) | (y & kLow) << 4));
      }
    }
  }

  static void unpack(const uint8_t* in, Lanes* w) {
    w[0] = loadHalves(in);
    const Lanes low = loadBytes(in + 64), high = loadBytes(in + 192);
    w[1] = (low & kLow) | (high & 0x03030303) << 4 | (high & 0x30303030) << 2;
    w[2] = (low & kHigh) >> 4 | (high & 0x0c0c0c0c) << 2 | (high & 0xc0c0c0c0);
    w[3] = loadBytes(in + 128);
    in += kHead;
    if (kFifth) {
      Lanes bits[8];
      for (int run = 0; run < 8; ++run) bits[run] = load<Lanes>(in + run * kRun);
      for (int g = 0; g < 8; ++g) {
        Lanes word{};
        for (int run = 0; run < 8; ++run) word |= (bits[run] >> g & 0x01010101) << run;
        w[4 + g] = word;
      }
      in += 64;
    }
    for (int pair = 0; pair < 4; ++pair, in += 2 * kRun) {
      for (int j = 0; j < 4; ++j) {
        const Lanes x = load<Lanes>(in + 64 * j), y = load<Lanes>(in + kRun + 64 * j);
        w[kFirst + 8 * pair + 2 * j] = (x & kLow) | (y & kLow) << 4;
        w[kFirst + 8 * pair + 2 * j + 1] = (x & kHigh) >> 4 | (y & kHigh);
      }
    }
  }
};

// q6_k. Words of a row, for each half of four runs: 16 of nibbles (runs 0 and 1 the low ones, 2 and
// 3 the high ones); then for each half 8 of upper bits, bits 2 r and 2 r + 1 of a byte for run r;
// then 4 of signed scales; d.
struct Q6_K {
  static constexpr int kBytes = 210, kStart = 0, kWords = 52, kHalf = 208;
  static constexpr int kUpper = 32, kScales = 48;
  static constexpr uint32_t kTwo = 0x03030303;

  static void pack(const Lanes* w, uint8_t* out) {
    for (int i = 0; i < 4; ++i) storeBytes(out + 64 * i, w[kScales + i]);
    out += 256;
    for (int run = 0; run < 8; ++run, out += 384) {
      const Lanes* upper = w + kUpper + run / 4 * 8;
      for (int i = 0; i < 2; ++i) {
        Lanes bits{};
        for (int g = 0; g < 4; ++g)
          bits |= (upper[4 * i + g] >> (2 * (run % 4)) & kTwo) << (2 * g);
        store(out + 64 * i, bits);
      }
      const Lanes* q = w + run / 4 * 16 + run % 2 * 8;
      for (int j = 0; j < 4; ++j) {
        const Lanes x = q[2 * j], y = q[2 * j + 1];
        store(out + 128 + 64 * j, run % 4 < 2 ? Lanes((x & kLow) | (y & kLow) << 4)
                                              : Lanes((x & kHigh) >> 4 | (y & kHigh)));
      }
    }
  }

  static void unpack(const uint8_t* in, Lanes* w) {
    for (int i = 0; i < 4; ++i) w[kScales + i] = loadBytes(in + 64 * i);
    in += 256;
    for (int half = 0; half < 2; ++half, in += 4 * 384) {
      for (int i = 0; i < 2; ++i) {
        Lanes bits[4];
        for (int run = 0; run < 4; ++run) bits[run] = load<Lanes>(in + 384 * run + 64 * i);
        for (int g = 0; g < 4; ++g) {
          Lanes word{};
          for (int run = 0; run < 4; ++run) word |= (bits[run] >> (2 * g) & kTwo) << (2 * run);
          w[kUpper + 8 * half + 4 * i + g] = word;
        }
      }
      for (int run = 0; run < 2; ++run) {
        for (int j = 0; j < 4; ++j) {
          const uint8_t* from = in + 384 * run + 128 + 64 * j;
          const Lanes x = load<Lanes>(from), y = load<Lanes>(from + 2 * 384);
          w[16 * half + 8 * run + 2 * j] = (x & kLow) | (y & kLow) << 4;
          w[16 * half + 8 * run + 2 * j + 1] = (x & kHigh) >> 4 | (y & kHigh);
        }
      }
    }
  }
};

// --- whole matrices ---------------------------------------------------------------------------

template <class C>
void packBlock(const uint8_t* rows, int64_t stride, uint8_t* out) {
  Lanes words[C::kWords];
  gather<C::kWords>(rows + C::kStart, stride, words);
  if (C::kHalf >= 0) {
    for (int r = 0; r < kRows; ++r)
      store(out + 2 * r, load<uint16_t>(rows + r * stride + C::kHalf));
    out += 2 * kRows;
  }
  C::pack(words, out);
}

template <class C>
void unpackBlock(const uint8_t* in, uint8_t* rows, int64_t stride) {
  Lanes words[C::kWords];
  if (C::kHalf >= 0) {
    for (int r = 0; r < kRows; ++r)
      store(rows + r * stride + C::kHalf, load<uint16_t>(in + 2 * r));
    in += 2 * kRows;
  }
  C::unpack(in, words);
  scatter<C::kWords>(words, rows + C::kStart, stride);
}

// Blocks at the lower and right edge go through `part`, 16 whole rows of one block.
template <class C>
void packMatrix(const uint8_t* source, int64_t rows, int64_t row_bytes, uint8_t* panels) {
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = rows - first < kRows ? rows - first : kRows;
    const uint8_t* panel = source + first * row_bytes;
    for (int64_t at = 0; at < row_bytes; at += C::kBytes, panels += kRows * C::kBytes) {
      const int64_t width = row_bytes - at < C::kBytes ? row_bytes - at : C::kBytes;
      if (count == kRows && width == C::kBytes) {
        packBlock<C>(panel + at, row_bytes, panels);
        continue;
      }
      uint8_t part[kRows * C::kBytes] = {};
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(part + r * C::kBytes, panel + r * row_bytes + at, width);
      packBlock<C>(part, C::kBytes, panels);
    }
  }
}

template <class C>
void unpackMatrix(const uint8_t* panels, int64_t rows, int64_t row_bytes, uint8_t* out) {
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = rows - first < kRows ? rows - first : kRows;
    uint8_t* panel = out + first * row_bytes;
    for (int64_t at = 0; at < row_bytes; at += C::kBytes, panels += kRows * C::kBytes) {
      const int64_t width = row_bytes - at < C::kBytes ? row_bytes - at : C::kBytes;
      if (count == kRows && width == C::kBytes) {
        unpackBlock<C>(panels, panel + at, row_bytes);
        continue;
      }
      uint8_t part[kRows * C::kBytes];
      unpackBlock<C>(panels, part, C::kBytes);
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(panel + r * row_bytes + at, part + r * C::kBytes, width);
    }
  }
}

using PackMatrix = void (*)(const uint8_t*, int64_t, int64_t, uint8_t*);

struct Packer {
  PackMatrix pack, unpack;
};

template <class C>
constexpr Packer packer() {
  return {packMatrix<C>, unpackMatrix<C>};
}

// In the order of `Codec`.
constexpr Packer kPackers[kCodecs] = {
    packer<Whole<128>>(),          packer<Float16>(),
    packer<Whole<64>>(),           packer<Q8_0>(),
    packer<Legacy<false, false>>(), packer<Legacy<true, false>>(),
    packer<Legacy<false, true>>(), packer<Legacy<true, true>>(),
    packer<SixBit<false>>(),       packer<SixBit<true>>(),
    packer<Q6_K>(),
};

}  // namespace

void packPanels(int32_t codec, const uint8_t* source, int64_t rows, int64_t row_bytes,
                uint8_t* panels) {
  kPackers[codec].pack(source, rows, row_bytes, panels);
}

void unpackPanels(int32_t codec, const uint8_t* panels, int64_t rows, int64_t row_bytes,
                  uint8_t* out) {
  kPackers[codec].unpack(panels, rows, row_bytes, out);
}

}  // namespace earnest
