// The scalar rows of the bit-plane products: the definition of every answer.
#include "binary.h"

namespace lowbit {
namespace {

inline int32_t pop(uint32_t v) {
  v = v - ((v >> 1) & 0x55555555u);
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  return static_cast<int32_t>((((v + (v >> 4)) & 0x0F0F0F0Fu) * 0x01010101u) >> 24);
}

// One word of every plane; a and w step by `words` from plane to plane. Without the constant part.
int32_t word_dot(BitKind kind, const uint32_t* a, const uint32_t* w, int64_t words) {
  switch (kind) {
    case BitKind::kSign: return -2 * pop(a[0] ^ w[0]);
    case BitKind::kZeroOne: return 2 * pop(a[0] & w[0]) - pop(a[0]);
    case BitKind::kSignTernary: return 2 * pop((a[0] & w[0]) | (~a[0] & w[words]));
    case BitKind::kZeroOneTernary: return pop(a[0] & w[0]) - pop(a[0] & w[words]);
    default:
      return pop((a[0] & w[0]) | (a[words] & w[words])) - pop((a[0] & w[words]) | (a[words] & w[0]));
  }
}

}  // namespace

// |dot| <= taps * channels < 2^31: binding_binary.cpp refuses larger ones.
void bit_tile_scalar(const BitTile& t) {
  const BitShape& s = t.shape;
  const int64_t words = s.words(), row = s.taps * s.planes() * words;
  for (int64_t p = 0; p < t.pixels; ++p)
    for (int64_t n = t.n0; n < t.n1; ++n) {
      const uint32_t* w = static_cast<const uint32_t*>(t.w) + n * row;
      int32_t dot = 0;
      for (int64_t tap = 0; tap < s.taps; ++tap, w += s.planes() * words)
        for (int64_t i = 0; i < words; ++i) dot += word_dot(s.kind, t.a[tap * t.stride + p] + i, w + i, words);
      t.out[p * kBitBlock + n - t.n0] = dot;
    }
}

void bit_epilogue_scalar(const int32_t* dot, int64_t pixels, int64_t n0, int64_t n1, const BitEpilogue& e) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t n = n0; n < n1; ++n) {
      float v = static_cast<float>(e.base[n] + dot[p * kBitBlock + n - n0]) * e.scale[n];
      if (e.bias) v += e.bias[n];
      if (e.residual) v += e.residual[p * e.stride + n];
      if (e.slope) {
        v -= e.shift[n];
        v = (v > 0 ? v : v * e.slope[n]) + e.offset[n];
      }
      if (e.y) e.y[p * e.stride + n] = v;
      if (!e.bits) continue;
      uint32_t& word = e.bits[p * e.bit_words + n / 32];
      if (n % 32 == 0) word = 0;
      word |= static_cast<uint32_t>(v >= e.high[n]) << (n % 32);
    }
}

// A NaN is neither >= nor <= anything: bit 0.
void binarize_scalar(const BinarizeJob& j) {
  const int64_t words = (j.channels + 31) / 32;
  for (int64_t p = 0; p < j.pixels; ++p) {
    uint32_t* out = j.out + p * j.out_stride;
    for (int64_t i = 0; i < words * (j.low ? 2 : 1); ++i) out[i] = 0;
    for (int64_t c = 0; c < j.channels; ++c) {
      const float x = j.x[p * j.pixel_stride + c * j.channel_stride];
      out[c / 32] |= static_cast<uint32_t>(x >= j.high[c]) << (c % 32);
      if (j.low) out[words + c / 32] |= static_cast<uint32_t>(x <= j.low[c]) << (c % 32);
    }
  }
}

}  // namespace lowbit
