// What the AVX2 files share. Each function carries the target attribute, so that no other code of the library (and
// no inline function of a standard header) is compiled for AVX2. MSVC needs no attribute for intrinsics.
#pragma once
#include "rows.h"

#if LOWBIT_X86
#include <immintrin.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_AVX2
#define LOWBIT_AVX2_INLINE static __forceinline
#define LOWBIT_AVX2_LAMBDA
#else
#define LOWBIT_AVX2 __attribute__((target("avx2,fma")))
#define LOWBIT_AVX2_INLINE static inline __attribute__((target("avx2,fma"), always_inline))
#define LOWBIT_AVX2_LAMBDA __attribute__((target("avx2,fma"), always_inline))  // [&]() LOWBIT_AVX2_LAMBDA { ... }
#endif

namespace lowbit {
// Codes [k0,k1) of a row to bytes; k0 a multiple of 8. Writes whole vectors: up to 31 bytes past out + (k1-k0).
// Never reads outside [row, row + row_bytes).
void unpack_avx2(const uint8_t* row, int64_t row_bytes, int bits, int64_t k0, int64_t k1, uint8_t* out);

// All-ones in the first n (0..8) 32-bit lanes.
LOWBIT_AVX2_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Eight codes fill `bits` bytes. Code i starts at bit s = i*bits % 8 of byte i*bits / 8 and ends in that byte or the
// next, so a 16-bit lane with these two bytes holds it:  (lane >> s) & mask.  There is no 16-bit variable shift in
// AVX2; (lane * 2^(8-s) mod 2^16) >> 8 gives bits s..s+7 of the lane, which is all we need (bits <= 8).
struct UnpackPlan {
  alignas(32) int8_t shuffle[32];
  alignas(32) int16_t multiply[16];
};

constexpr UnpackPlan unpack_plan(int bits) {
  UnpackPlan p{};
  for (int i = 0; i < 16; ++i) {
    const int bit = i % 8 * bits;
    p.shuffle[2 * i] = static_cast<int8_t>(bit / 8);
    p.shuffle[2 * i + 1] = static_cast<int8_t>(bit / 8 + 1);
    p.multiply[i] = static_cast<int16_t>(1 << (8 - bit % 8));
  }
  return p;
}
constexpr UnpackPlan kUnpackPlans[9] = {unpack_plan(1), unpack_plan(1), unpack_plan(2), unpack_plan(3), unpack_plan(4),
                                        unpack_plan(5), unpack_plan(6), unpack_plan(7), unpack_plan(8)};

constexpr int64_t kUnpackReads = 40;  // bytes one step may read: 3*8 + 16

LOWBIT_AVX2_INLINE __m256i two_halves(const uint8_t* lo, const uint8_t* hi) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lo))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(hi)), 1);
}

// 32 codes from 4*bits bytes. packus works per 128-bit lane, so lane 0 takes codes 0..15 and lane 1 codes 16..31.
LOWBIT_AVX2_INLINE __m256i unpack32(const uint8_t* p, int bits, __m256i shuffle, __m256i multiply, __m256i mask) {
  __m256i a = _mm256_shuffle_epi8(two_halves(p, p + 2 * bits), shuffle);
  __m256i b = _mm256_shuffle_epi8(two_halves(p + bits, p + 3 * bits), shuffle);
  a = _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(a, multiply), 8), mask);
  b = _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(b, multiply), 8), mask);
  return _mm256_packus_epi16(a, b);
}
}  // namespace lowbit
#endif
