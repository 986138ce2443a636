// Products of one-bit and ternary operands, stored as bit planes; used by linear layers and convolutions alike.
//
// A row of `channels` levels is `words` 32-bit words a plane, level c at bit c%32 of word c/32; bits past the last
// channel are zero in both operands. One plane: bit 1 means +1 and bit 0 means -1 (sign) or 0 (zero-one).
// Two planes (ternary): the first marks +1, the second -1.
#pragma once
#include "kernels.h"

namespace lowbit {

// activation x weight, and its dot product for one row pair
enum class BitKind : int {
  kSign = 0,            // {-1,1} x {-1,1}:     n - 2 pop(a ^ w)
  kZeroOne = 1,         // {0,1}  x {-1,1}:     2 pop(a & w) - pop(a)
  kSignTernary = 2,     // {-1,1} x {-1,0,1}:   2 pop(a ? wp : wn) - pop(wp | wn)
  kZeroOneTernary = 3,  // {0,1}  x {-1,0,1}:   pop(a & wp) - pop(a & wn)
  kTernary = 4,         // {-1,0,1}^2:          pop(ap&wp | an&wn) - pop(ap&wn | an&wp)
};
constexpr int kBitKinds = 5;
constexpr int weight_planes(BitKind k) { return k >= BitKind::kSignTernary ? 2 : 1; }
constexpr int input_planes(BitKind k) { return k == BitKind::kTernary ? 2 : 1; }
constexpr bool sign_input(BitKind k) { return k == BitKind::kSign || k == BitKind::kSignTernary; }

// How weights lie in memory. Rows is what everything else is made from; each instruction set reads its own.
enum class BitLayout : int {
  kRows = 0,     // [N, taps, planes, words] uint32
  kLanes16 = 1,  // [ceil(N/16), taps, words, planes, 16] uint32: a vector holds one word of 16 outputs
  kNibbles = 2,  // [ceil(N/16), taps, bytes, planes, 2, 16] uint8: a vector holds one byte of 16 outputs, low halves first
};

// Sizes of a weight: n outputs of one group, `taps` positions of `channels` levels each.
struct BitShape {
  int64_t n = 0, taps = 1, channels = 0;
  BitKind kind = BitKind::kSign;

  int64_t words() const { return (channels + 31) / 32; }
  int64_t bytes() const { return (channels + 7) / 8; }
  int planes() const { return weight_planes(kind); }
  int64_t pixel() const { return words() * input_planes(kind); }  // words of one input position
  int64_t size(BitLayout) const;                                  // bytes of the whole
};
// One group's weight from kRows to another layout; `to` has shape.size(layout) bytes.
void relayout(const BitShape&, const uint32_t* rows, BitLayout, uint8_t* to);

// A tile of outputs: positions [0,pixels) times outputs [n0,n1), n0 a multiple of 64, n1 - n0 <= 64.
//   a[t * stride + p]   the words of tap t of position p
//   out[p * 64 + n-n0]  = dot product without its constant part: dot - bit_base(n)
struct BitTile {
  const uint32_t* const* a;
  int64_t stride, pixels;
  const void* w;  // of this group, in the row's layout
  BitShape shape;
  int64_t n0, n1;
  int32_t* out;
};
constexpr int64_t kBitBlock = 64;   // outputs of a tile
constexpr int64_t kBitChunk = 64;   // positions of a tile, at most
using BitTileFn = void (*)(const BitTile&);
struct BitKernel {
  BitTileFn tile;
  BitLayout layout;
};

// What happens to the dot products of a tile, in this order, each a float32 step of its own (no fused multiply-add):
//   v = float(base[n] + dot) * scale[n] + bias[n] (+ residual[p,n])
//   v = v > shift[n] ? v - shift[n] : (v - shift[n]) * slope[n],  then + offset[n]       where slope is given
//   y[p,n] = v;   bit n of bits[p] = v >= high[n]
struct BitEpilogue {
  const int32_t* base;
  const float *scale, *bias;                     // bias may be null
  const float* residual;                         // [pixels, stride] or null
  const float *slope, *shift, *offset;           // slope null for none; then shift and offset are not read
  float* y;                                      // [pixels, stride] or null
  uint32_t* bits;                                // [pixels, bit_words] or null
  const float* high;
  int64_t stride = 0, bit_words = 0;
};
// dot [pixels, 64] of outputs [n0,n1); the pointers above are at the tile's first position and at output 0.
using BitEpilogueFn = void (*)(const int32_t* dot, int64_t pixels, int64_t n0, int64_t n1, const BitEpilogue&);

// Floats to bits: x[p * pixel_stride + c * channel_stride] >= high[c] (and, with low, <= low[c] in a second plane).
struct BinarizeJob {
  const float* x;
  int64_t pixel_stride, channel_stride, pixels, channels;
  const float *high, *low;  // low null: one plane
  uint32_t* out;            // position p starts at out + p * out_stride; the second plane `words` later
  int64_t out_stride;
};
using BinarizeFn = void (*)(const BinarizeJob&);

extern const Table<BinarizeFn> kBinarize;
extern const Table<BitKernel> kBitTile;
extern const Table<BitEpilogueFn> kBitEpilogue;

// A 2-D convolution (a linear layer: 1 x 1 image of 1 x 1 taps, the rows as batch).
struct BitConv {
  int64_t batch = 1, h = 1, w = 1, groups = 1;
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, top = 0, left = 0, dh = 1, dw = 1, oh = 1, ow = 1;
  int pad = 0;     // what lies outside the image when inputs are {-1,1}: -1, 0 or 1. Others: 0
  BitShape shape;  // of one group
  const uint32_t* rows = nullptr;     // [groups * n, taps, planes, words]
  const uint8_t* fast = nullptr;      // the same in `layout`, group after group, or null
  BitLayout layout = BitLayout::kRows;
  const int32_t* tap_sum = nullptr;   // [taps, groups * n], sum of the weight's levels; null where pads need none
};

// Input: bits [batch, h, w, groups, planes, words].
void bit_conv(const BitConv&, const uint32_t* bits, const BitEpilogue&, int n_threads, const std::string& isa);

// Floats of any strides (in elements) to the bits of bit_conv.
struct BitInput {
  const float* x;
  int64_t batch, pixels, groups, channels;  // channels of a group
  int64_t batch_stride, pixel_stride, channel_stride;
  const float *high, *low;  // [groups * channels]
};
void binarize(const BitInput&, uint32_t* bits, int n_threads, const std::string& isa);

// rows
void binarize_scalar(const BinarizeJob&);
void bit_tile_scalar(const BitTile&);
void bit_epilogue_scalar(const int32_t*, int64_t, int64_t, int64_t, const BitEpilogue&);
void binarize_avx2(const BinarizeJob&);
void bit_tile_avx2(const BitTile&);
void bit_epilogue_avx2(const int32_t*, int64_t, int64_t, int64_t, const BitEpilogue&);
void binarize_avx512(const BinarizeJob&);
void bit_tile_avx512(const BitTile&);
void bit_epilogue_avx512(const int32_t*, int64_t, int64_t, int64_t, const BitEpilogue&);
void bit_tile_neon(const BitTile&);  // the floats before and after are the scalar row's

}  // namespace lowbit
