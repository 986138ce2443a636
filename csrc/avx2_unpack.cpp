// Unpacking 1..8-bit codes to bytes, 32 at a time, one method for every width.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

// Eight codes fill `bits` bytes. Code i starts at bit s = i*bits % 8 of byte i*bits / 8 and ends in that byte or the
// next, so a 16-bit lane with these two bytes holds it:  (lane >> s) & mask.  There is no 16-bit variable shift in
// AVX2; (lane * 2^(8-s) mod 2^16) >> 8 gives bits s..s+7 of the lane, which is all we need (bits <= 8).
struct Plan {
  alignas(32) int8_t shuffle[32];
  alignas(32) int16_t multiply[16];
};

constexpr Plan plan(int bits) {
  Plan p{};
  for (int i = 0; i < 16; ++i) {
    const int bit = i % 8 * bits;
    p.shuffle[2 * i] = static_cast<int8_t>(bit / 8);
    p.shuffle[2 * i + 1] = static_cast<int8_t>(bit / 8 + 1);
    p.multiply[i] = static_cast<int16_t>(1 << (8 - bit % 8));
  }
  return p;
}
constexpr Plan kPlans[9] = {plan(1), plan(1), plan(2), plan(3), plan(4), plan(5), plan(6), plan(7), plan(8)};

constexpr int64_t kReads = 40;  // bytes one step may read: 3*8 + 16

LOWBIT_AVX2_INLINE __m256i two(const uint8_t* lo, const uint8_t* hi) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lo))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(hi)), 1);
}

// 32 codes from 4*bits bytes. packus works per 128-bit lane, so lane 0 takes codes 0..15 and lane 1 codes 16..31.
LOWBIT_AVX2_INLINE __m256i step(const uint8_t* p, int bits, __m256i shuffle, __m256i multiply, __m256i mask) {
  __m256i a = _mm256_shuffle_epi8(two(p, p + 2 * bits), shuffle);
  __m256i b = _mm256_shuffle_epi8(two(p + bits, p + 3 * bits), shuffle);
  a = _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(a, multiply), 8), mask);
  b = _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(b, multiply), 8), mask);
  return _mm256_packus_epi16(a, b);
}

// 4 bits: low nibbles are the even codes, high nibbles the odd ones.
LOWBIT_AVX2_INLINE __m256i step4(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(v, mask), odd = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

}  // namespace

LOWBIT_AVX2 void unpack_avx2(const uint8_t* row, int64_t row_bytes, int bits, int64_t k0, int64_t k1, uint8_t* out) {
  const uint8_t *p = row + k0 * bits / 8, *end = row + row_bytes;
  if (bits == 8) {
    std::memcpy(out, p, static_cast<size_t>(k1 - k0));
    return;
  }
  const Plan& plan = kPlans[bits];
  const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.shuffle));
  const __m256i multiply = _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.multiply));
  const __m256i mask = _mm256_set1_epi16(static_cast<short>((1 << bits) - 1));
  for (int64_t i = 0; i < k1 - k0; i += 32, p += 4 * bits) {
    uint8_t tail[kReads] = {};
    const uint8_t* from = p;
    if (end - p < kReads) {  // near the end of the row: read a copy, so that no load leaves the row
      std::memcpy(tail, p, static_cast<size_t>(end - p));
      from = tail;
    }
    const __m256i v = bits == 4 ? step4(from) : step(from, bits, shuffle, multiply, mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
  }
}

}  // namespace lowbit
#endif
