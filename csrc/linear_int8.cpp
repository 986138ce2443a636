// Products with int8 activations: quantize the tokens, arrange them for a matrix, hand tiles to the threads.
#include "linear_int8.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kChunkM = 1024;         // tokens at a time: bounds the buffers
constexpr int64_t kUnpackFrom = 12;       // tokens from which a matrix is expanded to bytes first
constexpr int64_t kTileM = 256;           // tokens that share one expansion: their activations stay in the cache
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

// Panels are read from memory, and the processor fetches ahead what lies behind: each thread gets one long stretch of
// three quarters of its share, and what is left in short ones evens out who was late.
int64_t stretch_begin(int64_t i, int64_t panels, int threads) {
  const int64_t longs = panels * 3 / 4, shorts = 2 * threads;
  return i < threads ? longs * i / threads : longs + (panels - longs) * (i - threads) / shorts;
}

void few_tokens(LinearInt8Fn fn, const std::vector<ProductInt8>& all, const std::vector<Operand>& operands,
                int n_threads) {
  int64_t panels = 0, macs = 0;
  const auto panels_of = [](const Packed& w) { return (w.block_count + Packed::kPanel - 1) / Packed::kPanel; };
  for (const auto& [w, bias, y] : all) {
    panels += panels_of(w);
    macs += operands[0].t.m * w.h.n * w.h.k;
  }
  const int threads = threads_for(macs, n_threads);
  parallel_for(threads > 1 ? 3 * threads : 1, threads, [&](int64_t item) {
    int64_t from = threads > 1 ? stretch_begin(item, panels, threads) : 0;
    int64_t to = threads > 1 ? stretch_begin(item + 1, panels, threads) : panels;
    for (size_t i = 0; i < all.size() && to > 0; ++i) {
      const auto& [w, bias, y] = all[i];
      const int64_t count = panels_of(w), b1 = std::min(to * Packed::kPanel, w.block_count);
      if (from < std::min(to, count)) fn(w, operands[i], 0, operands[i].t.m, from * Packed::kPanel, b1, bias, y);
      from = std::max<int64_t>(from - count, 0);
      to -= count;
    }
  });
}

void many_tokens(LinearInt8Fn fn, const std::vector<ProductInt8>& all, const std::vector<Operand>& operands,
                 int n_threads) {
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [w, bias, y] = all[i];
    const int64_t m = operands[i].t.m, tiles_m = (m + kTileM - 1) / kTileM, tiles_b = (w.block_count + 1) / 2;
    parallel_for(tiles_b * tiles_m, threads_for(m * w.h.n * w.h.k, n_threads), [&, &w = w, bias = bias, y = y](int64_t at) {
      const int64_t m0 = at / tiles_b * kTileM, b0 = at % tiles_b * 2;
      fn(w, operands[i], m0, std::min(m0 + kTileM, m), b0, std::min(b0 + 2, w.block_count), bias, y);
    });
  }
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

void linear_int8(const std::vector<ProductInt8>& all, const Tokens& t, int n_threads, const std::string& force) {
  static thread_local std::vector<OperandBuffer> buffers;
  if (buffers.size() < all.size()) buffers.resize(all.size());
  const LinearInt8Fn fn = pick(kLinearInt8, force).fn;
  const bool unpacked = t.m >= kUnpackFrom;
  std::vector<Operand> operands;
  for (size_t i = 0; i < all.size(); ++i) operands.push_back(arrange(all[i].w, t, unpacked, buffers[i]));
  (unpacked ? many_tokens : few_tokens)(fn, all, operands, n_threads);
}

void linear_int8(const Packed& p, const float* x, int64_t m, const float* bias, float* y, int n_threads,
                 const std::string& force) {
  static thread_local TokenBuffer buffer;
  for (int64_t c = 0; c < m; c += kChunkM) {
    const Tokens t = quantize_tokens(p.seg, p.h.k, x + c * p.h.k, std::min(kChunkM, m - c), buffer, n_threads, force);
    linear_int8({{p, bias, y + c * p.h.n}}, t, n_threads, force);
  }
}

}  // namespace lowbit
