// NEON rows of `decode` (equal to scalar bit for bit) and `linear_float`: float_rows.inc with 8 lanes, as two vectors
// of four. Up to 16 levels are looked up as bytes (TBL): four registers hold 16 floats.
//
//   |y - y_scalar| <= (K/8 + 12) * 2^-24 * sum_k |x*w_hat|   (sums of at most 80 in a lane, a tree of 8, partial sums)
#include "float_rows.h"
#include "neon.h"

#if LOWBIT_NEON

#define LOWBIT_FN
#define LOWBIT_INLINE LOWBIT_NEON_INLINE
#define LOWBIT_INLINE_MEMBER inline __attribute__((always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))
#define LOWBIT_UNROLL _Pragma("GCC unroll 4")

namespace lowbit {
namespace {

constexpr int W = 8;
using F = float32x4x2_t;
using I = uint32x4x2_t;

constexpr int kTokens = 4, kRowsAtOnce = 3;  // 24 vectors of sums, 6 of rows and 2 of a token: 32 registers
constexpr int64_t kSlabRows = 12;

LOWBIT_INLINE F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
LOWBIT_INLINE void store(float* p, F v) {
  vst1q_f32(p, v.val[0]);
  vst1q_f32(p + 4, v.val[1]);
}
LOWBIT_INLINE F set1(float v) { return {{vdupq_n_f32(v), vdupq_n_f32(v)}}; }
LOWBIT_INLINE F zeros() { return set1(0.0f); }
LOWBIT_INLINE F add(F a, F b) { return {{vaddq_f32(a.val[0], b.val[0]), vaddq_f32(a.val[1], b.val[1])}}; }
LOWBIT_INLINE F sub(F a, F b) { return {{vsubq_f32(a.val[0], b.val[0]), vsubq_f32(a.val[1], b.val[1])}}; }
LOWBIT_INLINE F mul(F a, F b) { return {{vmulq_f32(a.val[0], b.val[0]), vmulq_f32(a.val[1], b.val[1])}}; }
LOWBIT_INLINE F fmadd(F a, F b, F c) {
  return {{vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1])}};
}
LOWBIT_INLINE F to_float(I v) { return {{vcvtq_f32_u32(v.val[0]), vcvtq_f32_u32(v.val[1])}}; }
LOWBIT_INLINE I low_byte(I v) {
  const uint32x4_t mask = vdupq_n_u32(255);
  return {{vandq_u32(v.val[0], mask), vandq_u32(v.val[1], mask)}};
}
LOWBIT_INLINE I shift_right(I v, int n) {
  const int32x4_t by = vdupq_n_s32(-n);
  return {{vshlq_u32(v.val[0], by), vshlq_u32(v.val[1], by)}};
}

LOWBIT_INLINE float sum(F v) {
  const float32x4_t s = vaddq_f32(v.val[0], v.val[1]);
  const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}

// count numbers, each for 2^shift lanes
LOWBIT_INLINE F spread(const float* p, int64_t count, int shift) {
  float v[W];
  for (int j = 0; j < W; ++j) v[j] = (j >> shift) < count ? p[j >> shift] : 0.0f;
  return load(v);
}

constexpr int64_t kReads = 40;  // bytes one load of codes may read: 2*8 + kNeonReads
LOWBIT_INLINE I load_codes(const uint8_t* p) {
  return {{vreinterpretq_u32_u8(vld1q_u8(p)), vreinterpretq_u32_u8(vld1q_u8(p + 16))}};
}

// 32 codes as bytes
template <int B>
LOWBIT_INLINE I bytes_of(const uint8_t* p) {
  return {{vreinterpretq_u32_u8(unpack16(p, B)), vreinterpretq_u32_u8(unpack16(p + 2 * B, B))}};
}

LOWBIT_INLINE float32x4_t mini4(uint32x4_t code, const Mini& f) {
  const int32x4_t i = vminq_s32(vsubq_s32(vreinterpretq_s32_u32(code), vdupq_n_s32(f.middle)), vdupq_n_s32(f.top));
  const int32x4_t a = vabsq_s32(i), bits = vaddq_s32(vshlq_s32(a, vdupq_n_s32(f.shift)), vdupq_n_s32(f.bias));
  const float32x4_t v = vbslq_f32(vcgeq_s32(a, vdupq_n_s32(f.limit)), vreinterpretq_f32_s32(bits),
                                  vmulq_n_f32(vcvtq_f32_s32(a), f.smallest));
  return vbslq_f32(vdupq_n_u32(0x80000000u), vreinterpretq_f32_s32(i), v);  // the sign of i
}
LOWBIT_INLINE F mini(I code, const Mini& f) { return {{mini4(code.val[0], f), mini4(code.val[1], f)}}; }

// The registers of a table: with up to 4 levels one for each half of the lanes, which may be scaled apart.
template <int B>
struct Table {
  static constexpr int kRegisters = B == 4 ? 4 : 2;
  float32x4_t t[kRegisters];
  const float* all;

  LOWBIT_INLINE_MEMBER void load(const float* table) {
    all = table;
    if (B >= 3) {
      for (int i = 0; i < kRegisters; ++i) t[i] = vld1q_f32(table + 4 * i);
    } else {
      float four[4];
      for (int i = 0; i < 4; ++i) four[i] = table[i & ((1 << B) - 1)];
      t[0] = t[1] = vld1q_f32(four);
    }
  }
  LOWBIT_INLINE_MEMBER Table map(F z, F s) const {
    Table r;
    r.all = all;
    for (int i = 0; i < kRegisters; ++i) r.t[i] = vmulq_f32(vsubq_f32(t[i], z.val[i & 1]), s.val[i & 1]);
    return r;
  }
  LOWBIT_INLINE_MEMBER F at_in_lane(I code) const { return at(code); }
  LOWBIT_INLINE_MEMBER F at(I code) const {
    if constexpr (B > 4) {
      const I c = low_byte(code);
      uint32_t index[W];
      float v[W];
      vst1q_u32(index, c.val[0]);
      vst1q_u32(index + 4, c.val[1]);
      for (int j = 0; j < W; ++j) v[j] = all[index[j]];
      return {{vld1q_f32(v), vld1q_f32(v + 4)}};
    } else {
      return {{four<0>(code.val[0]), four<1>(code.val[1])}};
    }
  }
  // The four bytes of level c are 4c .. 4c+3.
  template <int Half>
  LOWBIT_INLINE_MEMBER float32x4_t four(uint32x4_t code) const {
    const uint32x4_t c = vandq_u32(code, vdupq_n_u32((1 << B) - 1));
    const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), c, 0x04040404u));
    if constexpr (B <= 2) {
      return vreinterpretq_f32_u8(vqtbl1q_u8(bytes(Half), at));
    } else if constexpr (B == 3) {
      return vreinterpretq_f32_u8(vqtbl2q_u8({{bytes(0), bytes(1)}}, at));
    } else {
      return vreinterpretq_f32_u8(vqtbl4q_u8({{bytes(0), bytes(1), bytes(2), bytes(3)}}, at));
    }
  }
  LOWBIT_INLINE_MEMBER uint8x16_t bytes(int i) const { return vreinterpretq_u8_f32(t[i]); }
};

void decode_natural(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) { decode_neon(w, n, k0, k1, out); }

#include "float_rows.inc"

constexpr int64_t kCodes = 512;  // codes unpacked at a time

// scalar: out = (table[code] - zero) * scale, group by group
template <int B>
void decode_bits(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  uint8_t codes[kCodes + 16];
  Table<B> table;
  table.load(w.table_row(n));
  const float *scale = w.scale + n * w.groups, *zero = w.zero ? w.zero + n * w.groups : nullptr;
  for (int64_t c0 = k0; c0 < k1; c0 += kCodes) {
    const int64_t c1 = std::min(c0 + kCodes, k1);
    unpack_neon(w.row(n), w.row_bytes, w.bits, c0, c1, codes);
    for (int64_t k = c0, g = c0 / w.group; k < c1; ++g) {
      const int64_t end = std::min(c1, (g + 1) * w.group);
      const F s = set1(scale[g]), z = set1(zero ? zero[g] : 0.0f);
      for (; k < end; k += W) {
        const uint16x8_t code = vmovl_u8(vld1_u8(codes + (k - c0)));
        const F v = mul(sub(table.at({{vmovl_u16(vget_low_u16(code)), vmovl_u16(vget_high_u16(code))}}), z), s);
        float eight[W];
        if (k + W > end) store(eight, v), std::copy(eight, eight + (end - k), out + (k - k0));
        else store(out + (k - k0), v);
      }
      k = end;
    }
  }
}

}  // namespace

void unpack_neon(const uint8_t* row, int64_t row_bytes, int bits, int64_t k0, int64_t k1, uint8_t* out) {
  const uint8_t *p = row + k0 * bits / 8, *end = row + row_bytes;
  for (int64_t i = 0; i < k1 - k0; i += 16, p += 2 * bits) {
    uint8_t tail[kNeonReads] = {};
    const bool near = end - p < kNeonReads;  // read a copy, so that no load leaves the row
    if (near) std::copy(p, end, tail);
    vst1q_u8(out + i, unpack16(near ? tail : p, bits));
  }
}

void decode_neon(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  switch (w.bits) {
    case 1: return decode_bits<1>(w, n, k0, k1, out);
    case 2: return decode_bits<2>(w, n, k0, k1, out);
    case 3: return decode_bits<3>(w, n, k0, k1, out);
    case 4: return decode_bits<4>(w, n, k0, k1, out);
    default: return decode_bits<8>(w, n, k0, k1, out);  // all are looked up in memory
  }
}

const LinearFloat linear_float_neon = {arranged, arrange, tile};

}  // namespace lowbit
#endif
