// What the NEON files share. NEON is part of every 64-bit ARM; dot products of bytes (SDOT) are asked for function by
// function where the build does not have them anyway.
#pragma once
#include "rows.h"

#if LOWBIT_NEON
#include <arm_neon.h>

#if defined(__ARM_FEATURE_DOTPROD)
#define LOWBIT_DOT
#elif defined(__clang__)
#define LOWBIT_DOT __attribute__((target("dotprod")))
#else
#define LOWBIT_DOT __attribute__((target("arch=armv8.2-a+dotprod")))  // the set that its arm_neon.h wants
#endif
#define LOWBIT_NEON_INLINE static inline __attribute__((always_inline))

namespace lowbit {
// Codes [k0,k1) of a row to bytes; k0 a multiple of 8. Writes whole vectors: up to 15 bytes past out + (k1-k0).
// Never reads outside [row, row + row_bytes).
void unpack_neon(const uint8_t* row, int64_t row_bytes, int bits, int64_t k0, int64_t k1, uint8_t* out);

// Eight codes fill `bits` bytes; code i starts at bit i*bits % 8 of byte i*bits / 8 and ends in that byte or the next.
struct NeonPlan {
  alignas(16) uint8_t shuffle[16];  // the two bytes of each code
  alignas(16) int16_t shift[8];     // down to bit 0, so negative
};

constexpr NeonPlan neon_plan(int bits) {
  NeonPlan p{};
  for (int i = 0; i < 8; ++i) {
    p.shuffle[2 * i] = static_cast<uint8_t>(i * bits / 8);
    p.shuffle[2 * i + 1] = static_cast<uint8_t>(i * bits / 8 + 1);
    p.shift[i] = static_cast<int16_t>(-(i * bits % 8));
  }
  return p;
}
constexpr NeonPlan kNeonPlans[9] = {neon_plan(1), neon_plan(1), neon_plan(2), neon_plan(3), neon_plan(4),
                                    neon_plan(5), neon_plan(6), neon_plan(7), neon_plan(8)};

// 8 codes from the first `bits` bytes of 16 that are read.
LOWBIT_NEON_INLINE uint8x8_t unpack8(const uint8_t* p, const NeonPlan& plan, uint16x8_t mask) {
  const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(plan.shuffle)));
  return vmovn_u16(vandq_u16(vshlq_u16(pairs, vld1q_s16(plan.shift)), mask));
}

// 16 codes from 2*bits bytes; reads at most kNeonReads.
constexpr int64_t kNeonReads = 24;
LOWBIT_NEON_INLINE uint8x16_t unpack16(const uint8_t* p, int bits) {
  if (bits == 8) return vld1q_u8(p);
  const uint16x8_t mask = vdupq_n_u16(static_cast<uint16_t>((1 << bits) - 1));
  return vcombine_u8(unpack8(p, kNeonPlans[bits], mask), unpack8(p + bits, kNeonPlans[bits], mask));
}
}  // namespace lowbit
#endif
