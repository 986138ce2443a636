// Unpacking 1..8-bit codes to bytes, 32 at a time, one method for every width.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

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
  const UnpackPlan& plan = kUnpackPlans[bits];
  const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.shuffle));
  const __m256i multiply = _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.multiply));
  const __m256i mask = _mm256_set1_epi16(static_cast<short>((1 << bits) - 1));
  for (int64_t i = 0; i < k1 - k0; i += 32, p += 4 * bits) {
    uint8_t tail[kUnpackReads] = {};
    const uint8_t* from = p;
    if (end - p < kUnpackReads) {  // near the end of the row: read a copy, so that no load leaves the row
      std::memcpy(tail, p, static_cast<size_t>(end - p));
      from = tail;
    }
    const __m256i v = bits == 4 ? step4(from) : unpack32(from, bits, shuffle, multiply, mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
  }
}

}  // namespace lowbit
#endif
