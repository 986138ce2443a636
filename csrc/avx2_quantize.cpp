// AVX2 row of `quantize`: equal to scalar bit for bit.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cmath>
#include <cstring>

namespace lowbit {
namespace {

constexpr float kTiny = 1e-30f;  // as scalar

LOWBIT_AVX2_INLINE __m256 load_part(const float* x, int64_t at, int64_t len) {
  return at + 8 <= len ? _mm256_loadu_ps(x + at)
         : at < len    ? _mm256_maskload_ps(x + at, first_lanes(len - at))
                       : _mm256_setzero_ps();
}

}  // namespace

// scalar: a = max|x|, q = round_to_even(x * 127/a)
LOWBIT_AVX2 void quantize_avx2(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t s = 0; s < seg.padded; ++s, q += seg.length) {
    const int64_t len = s < seg.count ? seg.size(s) : 0;
    const float* xs = x + (len ? seg.begin(s) : 0);
    __m256i most = _mm256_setzero_si256();  // bits of |x| are ordered like |x|, with NaN > Inf > all numbers
    for (int64_t i = 0; i < len; i += 8)
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load_part(xs, i, len)), magnitude));
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    const int32_t bits = *std::max_element(lanes, lanes + 8);
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
    const __m256 inverse = _mm256_set1_ps(127.0f / a);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < seg.length; i += 16) {  // cvtps rounds ties to even, as nearbyint
      const __m256i v0 = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(xs, i, len), inverse));
      const __m256i v1 = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(xs, i + 8, len), inverse));
      total = _mm256_add_epi32(total, _mm256_add_epi32(v0, v1));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v0, v1), 0xd8);  // undoes the per-lane pack
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), bytes);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    for (int32_t lane : lanes) sum[s] += lane;
  }
}

}  // namespace lowbit
#endif
