// AVX2 row of sparse products: many tokens side by side. AVX2 looks up 16 bytes at a time, too few for the steps of few
// tokens, which stay the scalar row's.
//   |y - y_scalar| <= (129 + K/128) * 2^-24 * sum |x*value|   (the terms of a tile at a time)
#include "avx2.h"
#include "sparse.h"

#if LOWBIT_X86
#include <algorithm>

namespace lowbit {
namespace {

constexpr int V = 2;  // vectors of eight tokens: with four rows, eight sums

LOWBIT_AVX2 void many(const Steps& s, const float* xt, int64_t down, float* yt) {
  const bool integer = s.h.kind == SparseKind::kInt;
  const SparseGroup* group = s.group + down * s.tiles_across() * Steps::kGroups;
  int64_t at = 4 * static_cast<int64_t>(s.quad[down]);
  std::fill(yt, yt + Steps::kTileRows * kSparseTokens, 0.0f);
  float value[4 * Steps::kTileColumns];
  for (int64_t tile = 0; tile < s.tiles_across(); ++tile, xt += Steps::kTileColumns * kSparseTokens)
    for (int64_t g = 0; g < Steps::kGroups; ++g, ++group) {
      const int64_t slots = 4 * group->count;
      for (int64_t i = 0; i < slots; ++i)
        value[i] = integer ? static_cast<const int8_t*>(s.tile_value)[at + i]
                           : static_cast<const float*>(s.tile_value)[at + i];
      for (int64_t m = 0; m < kSparseTokens; m += 8 * V) {
        __m256 acc[4][V];
        for (int r = 0; r < 4; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_ps();
        for (int64_t i = 0; i < slots; i += 4)
          for (int r = 0; r < 4; ++r) {
            const __m256 times = _mm256_set1_ps(value[i + r]);
            const float* from = xt + s.tile_offset[at + i + r] * kSparseTokens + m;
            for (int v = 0; v < V; ++v) acc[r][v] = _mm256_fmadd_ps(times, _mm256_loadu_ps(from + 8 * v), acc[r][v]);
          }
        for (int r = 0; r < 4; ++r)
          for (int v = 0; v < V; ++v) {
            float* to = yt + group->row[r] * kSparseTokens + m + 8 * v;
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), acc[r][v]));
          }
      }
      at += slots;
    }
  if (integer)
    for (int64_t r = 0; r < std::min(Steps::kTileRows, s.h.n - down * Steps::kTileRows); ++r)
      for (int64_t m = 0; m < kSparseTokens; ++m) yt[r * kSparseTokens + m] *= s.factor[down * Steps::kTileRows + r];
}

}  // namespace

const SparseRow sparse_avx2 = {sparse_scalar.few, sparse_scalar.few_int, many, sparse_scalar.turn};

}  // namespace lowbit
#endif
