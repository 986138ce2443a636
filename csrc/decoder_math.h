// What a decoder does between its products: normalization, rotary positions, gated activation, attention over the
// key-value cache. Plain float32 in 16 lanes, sums folded in one fixed order: every row gives the same bits.
//
// The cache of one sequence, layer and key-value head, for tokens 0..length-1, dim = head_dim:
//   keys    [ceil(length/16), dim, 16]   16 tokens side by side: 16 scores come out of one pass over dim
//   values  [length, dim]
// float32, or int8 with one scale per token (absmax/127): key_scale, value_scale [length].
#pragma once
#include "kernels.h"

namespace lowbit {

struct HeadCache {
  static constexpr int64_t kTokens = 16;  // of one key block
  float *keys = nullptr, *values = nullptr;
  int8_t *keys8 = nullptr, *values8 = nullptr;  // instead of the floats
  float *key_scale = nullptr, *value_scale = nullptr;
};

// What one query row sees: tokens [first, last) of the cache; score = scale * q.k
struct Query {
  const float* q;  // [dim]
  float* out;      // [dim]
  int64_t first, last;
};

struct DecoderMath {
  // y = x / sqrt(mean(x^2) + eps) * w
  void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* y);
  // (a, b) = (a cos - b sin, b cos + a sin) for a = x[0, half), b = x[half, 2 half)
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  // gate = silu(gate) * up, silu(g) = g / (1 + exp(-g))
  void (*gated_silu)(float* gate, const float* up, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);  // x += y
  float (*dot)(const float* x, const float* y, int64_t n);
  void (*append)(const HeadCache&, const float* key, const float* value, int64_t token, int64_t dim);
  // count <= kQueries queries of one head; scores: scratch of kQueries * (last rounded up to 16) floats
  void (*attend)(const HeadCache&, const Query* queries, int64_t count, int64_t dim, float scale, float* scores);
  static constexpr int64_t kQueries = 4;
};
extern const Table<DecoderMath> kDecoderMath;

}  // namespace lowbit
