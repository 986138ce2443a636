// AVX2 row of sparse products: many tokens side by side. AVX2 looks up 16 bytes at a time, too few for the steps of few
// tokens, which stay the scalar row's.
//   |y - y_scalar| <= (64 + places/64) * 2^-24 * sum |x*value|   (64 terms at a time)
#include "avx2.h"
#include "sparse.h"

#if LOWBIT_X86
#include <algorithm>

namespace lowbit {
namespace {

constexpr int V = kSparseTokens / 8;

LOWBIT_AVX2 void many(const Places& s, const float* xt, int64_t n0, int64_t n1, float* yt) {
  for (int64_t n = n0; n < n1; ++n) {
    __m256 total[V];
    for (int v = 0; v < V; ++v) total[v] = _mm256_setzero_ps();
    for (int64_t i = s.start[n]; i < s.start[n + 1];) {
      __m256 acc[V];
      for (int v = 0; v < V; ++v) acc[v] = _mm256_setzero_ps();
      for (const int64_t end = std::min(i + kPartial, s.start[n + 1]); i < end; ++i) {
        const __m256 value = _mm256_set1_ps(s.value[i]);
        const float* from = xt + s.column[i] * kSparseTokens;
        for (int v = 0; v < V; ++v) acc[v] = _mm256_fmadd_ps(value, _mm256_loadu_ps(from + 8 * v), acc[v]);
      }
      for (int v = 0; v < V; ++v) total[v] = _mm256_add_ps(total[v], acc[v]);
    }
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(yt + (n - n0) * kSparseTokens + 8 * v, total[v]);
  }
}

}  // namespace

const SparseRow sparse_avx2 = {sparse_scalar.few, sparse_scalar.few_int, many};

}  // namespace lowbit
#endif
