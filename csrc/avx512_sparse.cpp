// AVX-512 row of sparse products: a window of x is two registers, and one shuffle fetches what a step's places want.
//   kInt    equals scalar bit for bit: |sum of digits * values| <= 2^31 / (255*127) > 66000 places in a row, which
//           `few_int` cuts in pieces of kPieces steps of 4
//   kFloat  |y - y_scalar| <= (64 + places/64) * 2^-24 * sum |x*value|   (64 terms at a time)
#include "avx512.h"
#include "sparse.h"

#if LOWBIT_X86
#include <algorithm>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#endif

#define LOWBIT_FN LOWBIT_AVX512_WITH("avx512vbmi,avx512vnni")
#define LOWBIT_INLINE LOWBIT_AVX512_INLINE_WITH("avx512vbmi,avx512vnni")

namespace lowbit {
namespace {

constexpr int64_t kRows = Steps::kRows, kPieces = 1 << 14;

LOWBIT_INLINE __mmask16 rows_of(const Steps& s, int64_t p) {
  return static_cast<__mmask16>((1u << std::min(kRows, s.h.n - p * kRows)) - 1);
}

LOWBIT_FN void few(const Steps& s, const float* x, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t p = p0; p < p1; ++p) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m512 acc = _mm512_setzero_ps();
      for (const int64_t end = std::min<int64_t>(i + kPartial, s.first[p + 1]); i < end; ++i) {
        const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.offset + i * kRows)));
        const float* from = x + s.column[i];
        const __m512 v = _mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + 16));
        acc = _mm512_fmadd_ps(v, _mm512_loadu_ps(values + i * kRows), acc);
      }
      total = _mm512_add_ps(total, acc);
    }
    const __mmask16 mask = rows_of(s, p);
    float* to = y + p * kRows;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), total));
  }
}

// Eight rows: 2^7 a + b
LOWBIT_INLINE __m512i whole(__m256i a, __m256i b) {
  return _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(a), 7), _mm512_cvtepi32_epi64(b));
}

// scalar: (acc - sum * 2^14) * (scale * factor), eight rows
LOWBIT_INLINE __m256 finish(__m512i acc, const int64_t* sum, __m512d scale, const float* factor) {
  acc = _mm512_sub_epi64(acc, _mm512_slli_epi64(_mm512_loadu_si512(sum), 14));
  return _mm512_cvtpd_ps(
      _mm512_mul_pd(_mm512_cvtepi64_pd(acc), _mm512_mul_pd(scale, _mm512_cvtps_pd(_mm256_loadu_ps(factor)))));
}

LOWBIT_FN void few_int(const Steps& s, const Digits& x, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  const __m512d scale = _mm512_set1_pd(x.scale);
  for (int64_t p = p0; p < p1; ++p) {
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m512i acc[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (const int64_t end = std::min<int64_t>(i + kPieces, s.first[p + 1]); i < end; ++i) {
        const __m512i at = _mm512_loadu_si512(s.offset + i * 64), v = _mm512_loadu_si512(values + i * 64);
        for (int j = 0; j < 2; ++j) {
          const uint8_t* from = x.d[j] + s.column[i];
          const __m512i d = _mm512_permutex2var_epi8(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + 64));
          acc[j] = _mm512_dpbusd_epi32(acc[j], d, v);
        }
      }
      low = _mm512_add_epi64(low, whole(_mm512_castsi512_si256(acc[0]), _mm512_castsi512_si256(acc[1])));
      high = _mm512_add_epi64(high, whole(_mm512_extracti64x4_epi64(acc[0], 1), _mm512_extracti64x4_epi64(acc[1], 1)));
    }
    const int64_t n = p * kRows;
    const __m512 found = _mm512_insertf32x8(_mm512_castps256_ps512(finish(low, s.sum + n, scale, s.factor + n)),
                                            finish(high, s.sum + n + 8, scale, s.factor + n + 8), 1);
    const __mmask16 mask = rows_of(s, p);
    _mm512_mask_storeu_ps(y + n, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + n), found));
  }
}

constexpr int V = kSparseTokens / 16;

LOWBIT_FN void many(const Places& s, const float* xt, int64_t n0, int64_t n1, float* yt) {
  for (int64_t n = n0; n < n1; ++n) {
    __m512 total[V];
    for (int v = 0; v < V; ++v) total[v] = _mm512_setzero_ps();
    for (int64_t i = s.start[n]; i < s.start[n + 1];) {
      __m512 acc[V];
      for (int v = 0; v < V; ++v) acc[v] = _mm512_setzero_ps();
      for (const int64_t end = std::min(i + kPartial, s.start[n + 1]); i < end; ++i) {
        const __m512 value = _mm512_set1_ps(s.value[i]);
        const float* from = xt + s.column[i] * kSparseTokens;
        for (int v = 0; v < V; ++v) acc[v] = _mm512_fmadd_ps(value, _mm512_loadu_ps(from + 16 * v), acc[v]);
      }
      for (int v = 0; v < V; ++v) total[v] = _mm512_add_ps(total[v], acc[v]);
    }
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(yt + n * kSparseTokens + 16 * v, total[v]);
  }
}

}  // namespace

const SparseRow sparse_avx512 = {few, few_int, many};

}  // namespace lowbit
#endif
