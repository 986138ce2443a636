// NEON rows of `quantize` and `linear_int8`, equal to scalar bit for bit. A block is 16 rows: a step of four columns is
// four vectors of four rows. Levels are looked up as signed bytes (TBL, or u + low for codes of 8 bits), and
//
//   dotprod  SDOT adds four products to each row's sum
//   neon     SMULL and SMLAL add the products of two steps in int16: 2*128*127 = 32512; SADALP adds pairs of them to
//            int32. Sums of a row stand in two lanes, folded at the end of a segment
//
// int32 sums: at most 32*128*127 < 2^20 in a segment.
#include "neon.h"

#if LOWBIT_NEON
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace lowbit {
namespace {

constexpr float kTiny = 1e-30f;  // as scalar
constexpr int64_t kRows = Packed::kRows, kMostSteps = 8, kMostTokens = 4;

namespace neon_row {
#define LOWBIT_SDOT 0
#define LOWBIT_FN
#include "neon_int8.inc"
#undef LOWBIT_FN
#undef LOWBIT_SDOT
}  // namespace neon_row

namespace dotprod_row {
#define LOWBIT_SDOT 1
#define LOWBIT_FN LOWBIT_DOT
#include "neon_int8.inc"
}  // namespace dotprod_row

}  // namespace

void linear_int8_neon(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                      const float* bias, float* y) {
  neon_row::linear(p, o, m0, m1, b0, b1, bias, y);
}

void linear_int8_dotprod(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                         const float* bias, float* y) {
  dotprod_row::linear(p, o, m0, m1, b0, b1, bias, y);
}

// scalar: a = max|x|, q = round_to_even(x * 127/a)
void quantize_neon(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  for (int64_t s = 0; s < seg.padded; ++s, q += seg.length) {
    float v[32] = {};
    if (s < seg.count) std::memcpy(v, x + seg.begin(s), static_cast<size_t>(seg.size(s)) * 4);
    uint32x4_t most = vdupq_n_u32(0);  // bits of |x| are ordered like |x|, with NaN > Inf > all numbers
    for (int64_t i = 0; i < seg.length; i += 4)
      most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + i))));
    const uint32_t bits = vmaxvq_u32(most);
    float a;
    std::memcpy(&a, &bits, sizeof a);
    sum[s] = 0;
    const bool finite = bits < 0x7f800000;
    scale[s] = finite ? 0.0f : std::nanf("");
    if (!finite || a < kTiny) {
      std::memset(q, 0, static_cast<size_t>(seg.length));
      continue;
    }
    scale[s] = a / 127.0f;
    const float inverse = 127.0f / a;
    for (int64_t i = 0; i < seg.length; i += 8) {  // FCVTNS rounds ties to even, as nearbyint
      const int16x4_t lo = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i), inverse)));
      const int16x4_t hi = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i + 4), inverse)));
      const int8x8_t eight = vmovn_s16(vcombine_s16(lo, hi));
      vst1_s8(q + i, eight);
      sum[s] += vaddlv_s8(eight);
    }
  }
}

}  // namespace lowbit
#endif
