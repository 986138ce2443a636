// NEON row of the bit-plane products: four vectors hold one word of 16 outputs, and CNT counts the bits of each byte.
// Bytes hold the counts of 31 words (8 * 31 = 248), then join sums of 32 bits (at most taps * channels < 2^31).
#include <cstring>

#include "binary.h"
#include "neon.h"

#if LOWBIT_NEON
namespace lowbit {
namespace {

constexpr int kRun = 31;

// scalar: word_dot of 4 outputs, `plus` taken and `minus` taken off; a factor 2 comes at the end.
template <BitKind K>
LOWBIT_NEON_INLINE void count(uint8x16_t a, uint8x16_t an, const uint32_t* w, uint8x16_t& plus, uint8x16_t& minus) {
  const uint8x16_t wp = vreinterpretq_u8_u32(vld1q_u32(w));
  const uint8x16_t wn = weight_planes(K) == 2 ? vreinterpretq_u8_u32(vld1q_u32(w + 16)) : wp;
  switch (K) {
    case BitKind::kSign: minus = vaddq_u8(minus, vcntq_u8(veorq_u8(a, wp))); break;
    case BitKind::kZeroOne: plus = vaddq_u8(plus, vcntq_u8(vandq_u8(a, wp))); break;
    case BitKind::kSignTernary: plus = vaddq_u8(plus, vcntq_u8(vbslq_u8(a, wp, wn))); break;
    case BitKind::kZeroOneTernary:
      plus = vaddq_u8(plus, vcntq_u8(vandq_u8(a, wp)));
      minus = vaddq_u8(minus, vcntq_u8(vandq_u8(a, wn)));
      break;
    default:
      plus = vaddq_u8(plus, vcntq_u8(vorrq_u8(vandq_u8(a, wp), vandq_u8(an, wn))));
      minus = vaddq_u8(minus, vcntq_u8(vorrq_u8(vandq_u8(a, wn), vandq_u8(an, wp))));
  }
}

LOWBIT_NEON_INLINE int32x4_t widen(uint8x16_t counts) {
  return vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(counts)));
}

LOWBIT_NEON_INLINE uint8x16_t word(uint32_t v) { return vreinterpretq_u8_u32(vdupq_n_u32(v)); }

// P positions times 16 outputs.
template <BitKind K, int P>
void tile(const BitTile& t, int64_t p0, int64_t n) {
  constexpr int planes = weight_planes(K);
  constexpr int factor = K == BitKind::kZeroOneTernary || K == BitKind::kTernary ? 1 : 2;
  const int64_t words = t.shape.words();
  const uint32_t* w = static_cast<const uint32_t*>(t.w) + n / 16 * t.shape.taps * words * planes * 16;
  uint8x16_t plus[P][4], minus[P][4];
  int32x4_t sum[P][4];
  int32_t ones[P] = {};
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < 4; ++i) sum[p][i] = vdupq_n_s32(0), plus[p][i] = minus[p][i] = vdupq_n_u8(0);
  const auto flush = [&] {
    for (int p = 0; p < P; ++p)
      for (int i = 0; i < 4; ++i) {
        sum[p][i] = vaddq_s32(sum[p][i], vsubq_s32(widen(plus[p][i]), widen(minus[p][i])));
        plus[p][i] = minus[p][i] = vdupq_n_u8(0);
      }
  };
  int left = kRun;
  for (int64_t tap = 0; tap < t.shape.taps; ++tap) {
    const uint32_t* const* from = t.a + tap * t.stride + p0;
    for (int64_t i = 0; i < words; ++i, w += planes * 16) {
      for (int p = 0; p < P; ++p) {
        const uint8x16_t a = word(from[p][i]), an = word(input_planes(K) == 2 ? from[p][words + i] : 0);
        for (int j = 0; j < 4; ++j) count<K>(a, an, w + 4 * j, plus[p][j], minus[p][j]);
        if (K == BitKind::kZeroOne) ones[p] += __builtin_popcount(from[p][i]);
      }
      if (--left == 0) flush(), left = kRun;
    }
  }
  flush();
  for (int p = 0; p < P; ++p)
    for (int j = 0; j < 4; ++j)
      vst1q_s32(t.out + (p0 + p) * kBitBlock + n - t.n0 + 4 * j,
                vsubq_s32(vmulq_n_s32(sum[p][j], factor), vdupq_n_s32(ones[p])));
}

template <BitKind K>
void rows(const BitTile& t) {
  for (int64_t n = t.n0; n < t.n1; n += 16) {
    int64_t p = 0;
    for (; p + 2 <= t.pixels; p += 2) tile<K, 2>(t, p, n);
    for (; p < t.pixels; ++p) tile<K, 1>(t, p, n);
  }
}

}  // namespace

void bit_tile_neon(const BitTile& t) {
  switch (t.shape.kind) {
    case BitKind::kSign: return rows<BitKind::kSign>(t);
    case BitKind::kZeroOne: return rows<BitKind::kZeroOne>(t);
    case BitKind::kSignTernary: return rows<BitKind::kSignTernary>(t);
    case BitKind::kZeroOneTernary: return rows<BitKind::kZeroOneTernary>(t);
    case BitKind::kTernary: return rows<BitKind::kTernary>(t);
  }
}

}  // namespace lowbit
#endif
