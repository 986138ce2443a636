// Products with int8 activations: quantize the tokens, arrange them for a matrix, hand tiles to the threads.
#include "linear_int8.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kChunkM = 1024;         // tokens at a time: bounds the buffers
constexpr int64_t kUnpackFrom = 12;       // tokens from which a matrix is expanded to bytes first
constexpr int64_t kTileM = 240;           // tokens that share one expansion: their activations stay in the cache
constexpr int64_t kInlineMacs = 1 << 17;  // below this, waking a thread costs more than it saves

int threads_for(int64_t macs, int n_threads) { return macs < kInlineMacs ? 1 : n_threads; }

template <class T>
T* room(std::vector<T>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  return v.data();
}

// What depends on the matrix as well: see Operand.
Operand arrange(const Packed& p, const Tokens& t, bool unpacked, OperandBuffer& buffer) {
  const Times times = unpacked ? Times{1, 1} : packed_times(p.h);
  const int64_t count = t.m * p.seg.padded;
  float* scale = room(buffer.scale, count);
  int32_t* start = room(buffer.start, count);
  const float inverse[2] = {1.0f / static_cast<float>(times.a), 1.0f / static_cast<float>(times.b)};
  for (int64_t i = 0; i < count; i += 2) {
    scale[i] = t.scale[i] * inverse[0];
    scale[i + 1] = t.scale[i + 1] * inverse[1];
    start[i] = t.sum[i] * (p.h.low * times.a);
    start[i + 1] = t.sum[i + 1] * (p.h.low * times.b);
  }
  if (!p.h.has_zero) return {t, scale, start, nullptr, unpacked};
  float* group_sum = room(buffer.group_sum, t.m * p.h.groups);
  for (int64_t m = 0; m < t.m; ++m)
    for (int64_t g = 0; g < p.h.groups; ++g) {
      float sum = 0;
      for (int64_t s = m * p.seg.padded + g * p.seg.per_group, end = s + p.seg.per_group; s < end; ++s)
        sum = std::fma(static_cast<float>(t.sum[s]), t.scale[s], sum);
      group_sum[m * p.h.groups + g] = sum;
    }
  return {t, scale, start, group_sum, unpacked};
}

}  // namespace

Tokens quantize_tokens(const Segments& seg, int64_t k, const float* x, int64_t m, TokenBuffer& buffer, int n_threads,
                       const std::string& force) {
  const QuantizeFn quantize = pick(kQuantize, force).fn;
  const int64_t row = seg.row_size();
  int8_t* q = room(buffer.q, m * row);
  float* scale = room(buffer.scale, m * seg.padded);
  int32_t* sum = room(buffer.sum, m * seg.padded);
  parallel_for(m, threads_for(m * k * 4, n_threads), [&](int64_t i) {
    quantize(x + i * k, seg, q + i * row, scale + i * seg.padded, sum + i * seg.padded);
  });
  return {q, scale, sum, m};
}

void linear_int8(const Packed& p, const Tokens& t, const float* bias, float* y, int n_threads,
                 const std::string& force) {
  static thread_local OperandBuffer buffer;
  const LinearInt8Fn fn = pick(kLinearInt8, force).fn;
  const bool unpacked = t.m >= kUnpackFrom;
  const Operand o = arrange(p, t, unpacked, buffer);
  n_threads = threads_for(t.m * p.h.n * p.h.k, n_threads);
  const int64_t tiles_m = unpacked ? (t.m + kTileM - 1) / kTileM : 1;
  const int64_t step_b = unpacked ? 2 : n_threads == 1 ? p.block_count : 4;
  const int64_t tiles_b = (p.block_count + step_b - 1) / std::max<int64_t>(step_b, 1);
  parallel_for(tiles_b * tiles_m, n_threads, [&](int64_t i) {
    const int64_t m0 = i / tiles_b * kTileM, b0 = i % tiles_b * step_b;
    fn(p, o, m0, unpacked ? std::min(m0 + kTileM, t.m) : t.m, b0, std::min(b0 + step_b, p.block_count), bias, y);
  });
}

void linear_int8(const Packed& p, const float* x, int64_t m, const float* bias, float* y, int n_threads,
                 const std::string& force) {
  static thread_local TokenBuffer buffer;
  for (int64_t c = 0; c < m; c += kChunkM) {
    const Tokens t = quantize_tokens(p.seg, p.h.k, x + c * p.h.k, std::min(kChunkM, m - c), buffer, n_threads, force);
    linear_int8(p, t, bias, y + c * p.h.n, n_threads, force);
  }
}

}  // namespace lowbit
