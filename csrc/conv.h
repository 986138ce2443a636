// 2-D convolution of int8 images with packed weights of at most 8 bits, and what follows it.
//
// An image is quantized once, q = clip(round_to_even(x / scale), low, high) with |q| <= 127 and one scale, into a frame
// of zeros (the padding). Then, a tile of output positions at a time, the patches of the tile are gathered and given to
// the int8 product of linear_int8.h: no im2col of the whole image exists. With one channel a group (depthwise) the taps
// are multiplied where they lie.
#pragma once
#include "linear_int8.h"

namespace lowbit {

struct IntQuantizer {
  float scale = 0, low = -127, high = 127;  // scale 0: 1/127 of the largest |x| of an image
};

struct IntConv {
  int64_t batch = 1, h = 1, w = 1, c = 1, groups = 1, n = 1;  // n outputs in all
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, top = 0, left = 0, dh = 1, dw = 1, oh = 1, ow = 1;
  const Packed* weights = nullptr;  // one for each group: n / groups rows, columns in the order (ky, kx, channel); or
  const int8_t* taps = nullptr;     // [kh * kw, c] levels of a depthwise convolution, and
  const float* scale = nullptr;     // [c] theirs
  const float* bias = nullptr;      // [n] or null
  IntQuantizer input;
};

// The image: floats of any strides (in elements), or the q of a layer before, [batch, h, w, c].
struct IntImage {
  const float* x = nullptr;
  const int8_t* q = nullptr;
  int64_t batch_stride = 0, pixel_stride = 0, channel_stride = 0;
};

// v = product + bias (+ residual);  v = v > 0 ? v : 0 where relu;  y = v and, or, q = v quantized for the next layer.
struct IntEpilogue {
  const float* residual = nullptr;  // [batch, oh, ow, n]
  bool relu = false;
  float* y = nullptr;
  int8_t* q = nullptr;
  IntQuantizer next;
};

void int_conv(const IntConv&, const IntImage&, const IntEpilogue&, int n_threads, const std::string& isa);

// The parts that have a row of their own; each gives the scalar row's numbers exactly.
struct ConvRow {
  void (*quantize)(const float* x, int64_t count, float scale, float low, float high, int8_t* q);  // NaN gives low
  uint32_t (*most)(const float* x, int64_t count);  // largest |x| as bits: NaN above infinity above all numbers
  void (*sums)(const int8_t* q, int64_t length, int64_t count, int32_t* sum);  // of each segment of 16 or 32
  // out[c] = float(sum over taps of q[at[t] + c] * w[t * channels + c]) * (scale_x * scale[c]), a rounding each
  void (*depthwise)(const int8_t* q, const int64_t* at, int64_t taps, int64_t channels, const int8_t* w,
                    const float* scale, float scale_x, float* out);
};
extern const Table<const ConvRow*> kConvInt8;

}  // namespace lowbit
