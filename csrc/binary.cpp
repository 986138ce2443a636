// The bit-plane operations: weights' layouts, which input a tap of an output sees, and the work cut in tiles.
#include "binary.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "pool.h"

namespace lowbit {
namespace {

#if LOWBIT_X86
#define LOWBIT_BIT_ROWS(avx512, avx2, scalar) \
  {"avx512", kAvx2 | kAvx512 | kVpopcnt, avx512}, {"avx2", kAvx2, avx2}, {"scalar", 0, scalar}
#else
#define LOWBIT_BIT_ROWS(avx512, avx2, scalar) {"scalar", 0, scalar}
#endif

const Row<BinarizeFn> kBinarizeRows[] = {LOWBIT_BIT_ROWS(binarize_avx512, binarize_avx2, binarize_scalar)};
const Row<BitKernel> kBitTileRows[] = {
#if LOWBIT_NEON
    {"neon", kNeon, {bit_tile_neon, BitLayout::kLanes16}},
#endif
    LOWBIT_BIT_ROWS((BitKernel{bit_tile_avx512, BitLayout::kLanes16}), (BitKernel{bit_tile_avx2, BitLayout::kNibbles}),
                    (BitKernel{bit_tile_scalar, BitLayout::kRows}))};
const Row<BitEpilogueFn> kBitEpilogueRows[] = {
    LOWBIT_BIT_ROWS(bit_epilogue_avx512, bit_epilogue_avx2, bit_epilogue_scalar)};

constexpr int64_t kInlineBits = 1 << 20;  // products below this number are not worth waking a thread for

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// First and one past the last output position along one axis whose tap lies inside the image.
struct Span {
  int64_t lo, hi;
};
Span inside(int64_t out, int64_t in, int64_t first, int64_t stride) {  // input position = first + o * stride
  const int64_t lo = first >= 0 ? 0 : ceil_div(-first, stride);
  const int64_t hi = first >= in ? 0 : ceil_div(in - first, stride);
  return {std::min(lo, out), std::max(std::min(hi, out), std::min(lo, out))};
}

// Positions [p0,p1) of one image cut at the ends of image rows: f(first position, count, oy, ox of the first).
template <class F>
void for_row_parts(int64_t p0, int64_t p1, int64_t ow, const F& f) {
  for (int64_t p = p0; p < p1;) {
    const int64_t ox = p % ow, count = std::min(ow - ox, p1 - p);
    f(p - p0, count, p / ow, ox);
    p += count;
  }
}

// a[t * kBitChunk + p]: the words that tap t of position p0 + p sees; `nothing` outside the image, and these places
// t * kBitChunk + p in `outside`.
void find_inputs(const BitConv& c, const uint32_t* image, const uint32_t* nothing, int64_t p0, int64_t p1,
                 const uint32_t** a, std::vector<int64_t>& outside) {
  const int64_t step = c.groups * c.shape.pixel();
  outside.clear();
  for_row_parts(p0, p1, c.ow, [&](int64_t at, int64_t count, int64_t oy, int64_t ox) {
    for (int64_t t = 0; t < c.shape.taps; ++t) {
      const uint32_t** to = a + t * kBitChunk + at;
      const int64_t iy = oy * c.sh - c.top + t / c.kw * c.dh, first = t % c.kw * c.dw - c.left;
      Span in = inside(c.ow, c.w, first, c.sw);
      if (iy < 0 || iy >= c.h) in = {0, 0};
      const int64_t lo = std::min(std::max(in.lo - ox, int64_t{0}), count);
      const int64_t hi = std::max(std::min(in.hi - ox, count), lo);
      const int64_t from = (iy * c.w + first + ox * c.sw) * step;
      for (int64_t i = lo; i < hi; ++i) to[i] = image + from + i * c.sw * step;
      for (int64_t i = lo > 0 ? 0 : hi; i < count; i = i + 1 == lo ? hi : i + 1) {
        to[i] = nothing;
        outside.push_back(t * kBitChunk + at + i);
      }
    }
  });
}

// Taps outside the image were counted as inputs of -1, so they gave -tap_sum; what lies there counts pad * tap_sum.
void correct_border(const BitConv& c, const std::vector<int64_t>& outside, int64_t n0, int64_t n1, int64_t group,
                    int32_t* dot) {
  for (const int64_t place : outside) {
    const int32_t* sum = c.tap_sum + (place / kBitChunk * c.groups + group) * c.shape.n;
    int32_t* to = dot + place % kBitChunk * kBitBlock - n0;
    for (int64_t n = n0; n < n1; ++n) to[n] += (1 + c.pad) * sum[n];
  }
}

BitEpilogue at(BitEpilogue e, int64_t pixel, int64_t channel) {
  e.base += channel;
  e.scale += channel;
  if (e.bias) e.bias += channel;
  if (e.residual) e.residual += pixel * e.stride + channel;
  if (e.slope) e.slope += channel, e.shift += channel, e.offset += channel;
  if (e.y) e.y += pixel * e.stride + channel;
  if (e.bits) e.bits += pixel * e.bit_words;
  return e;
}

}  // namespace

int64_t BitShape::size(BitLayout layout) const {
  switch (layout) {
    case BitLayout::kRows: return n * taps * planes() * words() * 4;
    case BitLayout::kLanes16: return ceil_div(n, 16) * taps * words() * planes() * 64;
    default: return ceil_div(n, 16) * taps * bytes() * planes() * 32;
  }
}

void relayout(const BitShape& s, const uint32_t* rows, BitLayout layout, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(s.size(layout)));
  if (layout == BitLayout::kRows) {
    std::memcpy(to, rows, static_cast<size_t>(s.size(layout)));
    return;
  }
  const int64_t planes = s.planes(), words = s.words(), bytes = s.bytes();
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t t = 0; t < s.taps; ++t)
      for (int64_t plane = 0; plane < planes; ++plane, rows += words) {
        if (layout == BitLayout::kLanes16) {
          for (int64_t i = 0; i < words; ++i)
            std::memcpy(to + ((((n / 16 * s.taps + t) * words + i) * planes + plane) * 16 + n % 16) * 4, rows + i, 4);
        } else {
          for (int64_t i = 0; i < bytes; ++i) {
            uint8_t* at = to + (((n / 16 * s.taps + t) * bytes + i) * planes + plane) * 32 + n % 16;
            const uint32_t byte = rows[i / 4] >> (i % 4 * 8);
            at[0] = byte & 15;
            at[16] = byte >> 4 & 15;
          }
        }
      }
}

void binarize(const BitInput& in, uint32_t* bits, int n_threads, const std::string& isa) {
  const BinarizeFn fn = pick(kBinarize, isa).fn;
  const int64_t words = (in.channels + 31) / 32 * (in.low ? 2 : 1);
  const int64_t part = std::max<int64_t>(16, (1 << 15) / std::max<int64_t>(1, in.groups * in.channels) / 16 * 16);
  const int64_t parts = ceil_div(in.pixels, part);
  parallel_for(in.batch * parts, n_threads, [&](int64_t i) {
    const int64_t b = i / parts, p = i % parts * part, count = std::min(part, in.pixels - p);
    for (int64_t g = 0; g < in.groups; ++g)
      fn({in.x + b * in.batch_stride + p * in.pixel_stride + g * in.channels * in.channel_stride, in.pixel_stride,
          in.channel_stride, count, in.channels, in.high + g * in.channels, in.low ? in.low + g * in.channels : nullptr,
          bits + ((b * in.pixels + p) * in.groups + g) * words, in.groups * words});
  });
}

void bit_conv(const BitConv& c, const uint32_t* bits, const BitEpilogue& epilogue, int n_threads,
              const std::string& isa) {
  const BitKernel kernel = pick(kBitTile, isa).fn;
  const BitEpilogueFn finish = pick(kBitEpilogue, isa).fn;
  const BitShape& s = c.shape;
  const int64_t group_rows = s.n * s.taps * s.planes() * s.words(), group_bytes = s.size(kernel.layout);
  std::unique_ptr<uint8_t[]> made;  // the layer keeps the weight ready; without it, it is laid out here
  const uint8_t* w = reinterpret_cast<const uint8_t*>(c.rows);
  if (kernel.layout != BitLayout::kRows) {
    w = c.layout == kernel.layout ? c.fast : nullptr;
    if (w == nullptr) {
      made.reset(new uint8_t[static_cast<size_t>(c.groups * group_bytes)]);
      for (int64_t g = 0; g < c.groups; ++g)
        relayout(s, c.rows + g * group_rows, kernel.layout, made.get() + g * group_bytes);
      w = made.get();
    }
  }
  // A linear layer has one position an image: its batch counts as the positions of one image.
  const bool linear = c.h * c.w == 1 && c.oh * c.ow == 1 && s.taps == 1 && c.top == 0 && c.left == 0;
  BitConv flat = c;
  if (linear) flat.batch = 1, flat.w = flat.ow = c.batch;
  const std::vector<uint32_t> nothing(static_cast<size_t>(s.pixel()));
  const int64_t pixels = flat.oh * flat.ow, chunks = ceil_div(pixels, kBitChunk), blocks = ceil_div(s.n, kBitBlock);
  const int64_t image = flat.h * flat.w * c.groups * s.pixel(), work = pixels * flat.batch * s.n * c.groups * s.taps;
  parallel_for(blocks * c.groups * flat.batch * chunks, work * s.channels < kInlineBits ? 1 : n_threads, [&](int64_t i) {
    const int64_t chunk = i % chunks, b = i / chunks % flat.batch, g = i / chunks / flat.batch % c.groups;
    const int64_t n0 = i / chunks / flat.batch / c.groups * kBitBlock, n1 = std::min(n0 + kBitBlock, s.n);
    const int64_t p0 = chunk * kBitChunk, p1 = std::min(p0 + kBitChunk, pixels);
    thread_local std::vector<const uint32_t*> a;
    thread_local std::vector<int64_t> outside;
    alignas(64) int32_t dot[kBitChunk * kBitBlock];
    a.resize(static_cast<size_t>(s.taps * kBitChunk));
    find_inputs(flat, bits + b * image + g * s.pixel(), nothing.data(), p0, p1, a.data(), outside);
    kernel.tile({a.data(), kBitChunk, p1 - p0, w + g * group_bytes, s, n0, n1, dot});
    if (c.tap_sum && c.pad != -1) correct_border(c, outside, n0, n1, g, dot);
    finish(dot, p1 - p0, n0, n1, at(epilogue, b * pixels + p0, g * s.n));
  });
}

const Table<BinarizeFn> kBinarize = {"binarize", kBinarizeRows, sizeof kBinarizeRows / sizeof kBinarizeRows[0]};
const Table<BitKernel> kBitTile = {"binary_dot", kBitTileRows, sizeof kBitTileRows / sizeof kBitTileRows[0]};
const Table<BitEpilogueFn> kBitEpilogue = {"binary_epilogue", kBitEpilogueRows,
                                           sizeof kBitEpilogueRows / sizeof kBitEpilogueRows[0]};

}  // namespace lowbit
