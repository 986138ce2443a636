// The scalar row of sparse products, the layout of steps, and the threads.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kMany = 8;               // tokens from which they stand side by side
constexpr int64_t kInlinePlaces = 1 << 14;  // below this, waking a thread costs more than it saves
constexpr int64_t kPanels = 8, kRowsAtOnce = 64;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Byte offsets of the arrays that follow the header.
struct Offsets {
  int64_t first, column, factor, sum, offset, value, end;

  Offsets(SparseKind kind, int64_t n, int64_t steps) {
    const int64_t panels = (n + Steps::kRows - 1) / Steps::kRows, places = steps * Steps::kRows * Steps::slots(kind);
    const int64_t rows = kind == SparseKind::kInt ? panels * Steps::kRows : 0;
    first = aligned(Steps::kHeader);
    column = first + aligned((panels + 1) * 4);
    factor = column + aligned(steps * 4);
    sum = factor + aligned(rows * 4);
    offset = sum + aligned(rows * 8);
    value = offset + aligned(places);
    end = value + aligned(places * (kind == SparseKind::kInt ? 1 : 4));
  }
};

void few_scalar(const Steps& s, const float* const* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t n = p0 * Steps::kRows; n < std::min(p1 * Steps::kRows, s.h.n); ++n) {
      const int64_t p = n / Steps::kRows;
      double acc = 0;
      for (int64_t i = s.first[p]; i < s.first[p + 1]; ++i) {
        const int64_t at = i * Steps::kRows + n % Steps::kRows;
        acc += static_cast<double>(values[at]) * xs[t][s.column[i] + s.offset[at]];
      }
      y[n] += static_cast<float>(acc);
    }
}

// |sum| <= 2^15 * 127 * 2^31 places < 2^53: exact as a double too.
void few_int_scalar(const Steps& s, const Digits* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t p = p0; p < p1; ++p) {
      const Digits& x = xs[t];
      int64_t acc[Steps::kRows] = {};
      for (int64_t i = s.first[p]; i < s.first[p + 1]; ++i)
        for (int64_t at = i * 64; at < i * 64 + 64; ++at) {
          const int64_t k = s.column[i] + s.offset[at];
          acc[at / 4 % Steps::kRows] += ((x.d[0][k] << 7) + x.d[1][k]) * values[at];
        }
      for (int64_t r = 0, n = p * Steps::kRows; r < Steps::kRows && n < s.h.n; ++r, ++n)
        y[n] += static_cast<float>(static_cast<double>(acc[r] - s.sum[n] * (1 << 14)) *
                                   (static_cast<double>(x.scale) * s.factor[n]));
    }
}

void many_scalar(const Places& s, const float* xt, int64_t n0, int64_t n1, float* yt) {
  for (int64_t n = n0; n < n1; ++n) {
    double acc[kSparseTokens] = {};
    for (int64_t i = s.start[n]; i < s.start[n + 1]; ++i)
      for (int64_t m = 0; m < kSparseTokens; ++m)
        acc[m] += static_cast<double>(s.value[i]) * xt[s.column[i] * kSparseTokens + m];
    for (int64_t m = 0; m < kSparseTokens; ++m) yt[(n - n0) * kSparseTokens + m] = static_cast<float>(acc[m]);
  }
}

struct Buffer {
  std::vector<float> x;
  std::vector<uint8_t> digits;
};

uint8_t* line(uint8_t* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 63); }  // of the cache

template <class T>
T* room(std::vector<T>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  return v.data();
}

// Loops without branches: compilers make vectors of them. Adding 1.5 * 2^23 rounds to whole numbers, ties to even.
Digits digits_of(const float* x, int64_t k, int64_t ld, uint8_t* d) {
  float most = 0;
  uint32_t odd = 0;
  for (int64_t i = 0; i < k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    odd |= (bits & 0x7f800000u) == 0x7f800000u;
    most = std::max(most, std::fabs(x[i]));
  }
  Digits out{{d, d + ld}, odd ? std::numeric_limits<float>::quiet_NaN() : most / 16383.0f};
  const float inverse = odd || most < 1e-30f ? 0.0f : 16383.0f / most;
  if (inverse == 0.0f && !odd) out.scale = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float shifted = (odd ? 0.0f : x[i]) * inverse + 12582912.0f;
    int32_t u;
    std::memcpy(&u, &shifted, sizeof u);
    u += (1 << 14) - 0x4b400000;
    d[i] = static_cast<uint8_t>(u >> 7);
    d[ld + i] = static_cast<uint8_t>(u & 127);
  }
  for (int j = 0; j < 2; ++j) std::memset(d + j * ld + k, 0, static_cast<size_t>(ld - k));
  return out;
}

// Sixteen columns, a line of the cache, of one token after the other: tokens often lie a multiple of the cache's way apart.
void transpose_in(const float* x, int64_t k, int64_t tokens, float* xt) {
  if (tokens < kSparseTokens) std::fill(xt, xt + k * kSparseTokens, 0.0f);
  for (int64_t i0 = 0; i0 < k; i0 += 16)
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t i = i0; i < std::min(i0 + 16, k); ++i) xt[i * kSparseTokens + m] = x[m * k + i];
}

}  // namespace

Steps::Steps(const uint8_t* b, int64_t bytes) {
  if (bytes >= kHeader) std::memcpy(&h, b, sizeof h);
  if (bytes < kHeader || h.magic != kMagic || h.bytes != bytes || h.n < 0 || h.steps < 0 || h.n >= int64_t{1} << 31 ||
      h.steps >= int64_t{1} << 31 || (h.kind != SparseKind::kInt && h.kind != SparseKind::kFloat) ||
      Offsets(h.kind, h.n, h.steps).end != bytes)
    throw std::invalid_argument("the exceptions are no kernel layout of this version: prepare the layer again");
  const Offsets at(h.kind, h.n, h.steps);
  first = reinterpret_cast<const int32_t*>(b + at.first);
  column = reinterpret_cast<const int32_t*>(b + at.column);
  factor = reinterpret_cast<const float*>(b + at.factor);
  sum = reinterpret_cast<const int64_t*>(b + at.sum);
  offset = b + at.offset;
  value = b + at.value;
}

std::vector<uint8_t> pack_sparse(const Places& p, SparseKind kind, const float* factor) {
  const int64_t slots = Steps::slots(kind), window = Steps::window(kind), rows = Steps::kRows;
  const int64_t panels = (p.n + rows - 1) / rows;
  std::vector<int32_t> first{0}, column;
  std::vector<int64_t> taken, next(static_cast<size_t>(rows));  // taken: a place, or -1, for every slot
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t n0 = panel * rows, n1 = std::min(n0 + rows, p.n);
    std::copy(p.start + n0, p.start + n1, next.begin());
    for (;;) {
      int32_t low = INT32_MAX;
      for (int64_t n = n0; n < n1; ++n)
        if (next[n - n0] < p.start[n + 1]) low = std::min(low, p.column[next[n - n0]]);
      if (low == INT32_MAX) break;
      low -= low % static_cast<int32_t>(Steps::align(kind));
      column.push_back(low);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < slots; ++s) {
          const bool here = n0 + r < n1 && next[r] < p.start[n0 + r + 1] && p.column[next[r]] < low + window;
          taken.push_back(here ? next[r]++ : -1);
        }
    }
    first.push_back(static_cast<int32_t>(column.size()));
  }
  const Offsets at(kind, p.n, static_cast<int64_t>(column.size()));
  std::vector<uint8_t> out(static_cast<size_t>(at.end));
  const SparseHeader h{Steps::kMagic, at.end, p.n, p.k, static_cast<int64_t>(column.size()), kind};
  std::memcpy(out.data(), &h, sizeof h);
  std::memcpy(out.data() + at.first, first.data(), first.size() * 4);
  if (!column.empty()) std::memcpy(out.data() + at.column, column.data(), column.size() * 4);
  float* factors = reinterpret_cast<float*>(out.data() + at.factor);
  int64_t* sums = reinterpret_cast<int64_t*>(out.data() + at.sum);
  if (kind == SparseKind::kInt) std::copy(factor, factor + p.n, factors);
  for (size_t i = 0; i < taken.size(); ++i) {
    if (taken[i] < 0) continue;
    const int64_t step = static_cast<int64_t>(i) / (rows * slots);
    out[static_cast<size_t>(at.offset) + i] = static_cast<uint8_t>(p.column[taken[i]] - column[step]);
    if (kind == SparseKind::kFloat) {
      std::memcpy(out.data() + at.value + 4 * i, p.value + taken[i], 4);
      continue;
    }
    const int64_t n = std::upper_bound(p.start, p.start + p.n + 1, taken[i]) - p.start - 1;
    const float times = factors[n] > 0 ? std::nearbyint(p.value[taken[i]] / factors[n]) : 0.0f;
    const int8_t v = static_cast<int8_t>(std::max(-127.0f, std::min(127.0f, times)));
    out[static_cast<size_t>(at.value) + i] = static_cast<uint8_t>(v);
    sums[n] += v;
  }
  return out;
}

const SparseRow sparse_scalar = {few_scalar, few_int_scalar, many_scalar};

void sparse_linear(const Places& p, const Steps& s, const float* x, int64_t m, float* y, int n_threads,
                   const std::string& force) {
  static thread_local Buffer buffer;
  const SparseRow& row = *pick(kSparse, force).fn;
  const int64_t places = p.start[p.n];
  if (places * m < kInlinePlaces) n_threads = 1;
  const bool exact = s.h.kind == SparseKind::kFloat;
  if (m < kMany) {
    const int64_t ld = aligned(p.k + Steps::window(s.h.kind)), turns = (s.panels() + kPanels - 1) / kPanels;
    for (int64_t t = 0; t < m; t += kFewTokens) {
      const int64_t tokens = std::min(kFewTokens, m - t);
      const float* padded[kFewTokens];
      Digits digits[kFewTokens];
      for (int64_t j = 0; j < tokens; ++j) {
        const float* from = x + (t + j) * p.k;
        if (exact) {
          float* to = room(buffer.x, kFewTokens * ld) + j * ld;
          std::copy(from, from + p.k, to);
          std::fill(to + p.k, to + ld, 0.0f);
          padded[j] = to;
        } else {
          digits[j] = digits_of(from, p.k, ld, line(room(buffer.digits, kFewTokens * 2 * ld + 64)) + j * 2 * ld);
        }
      }
      parallel_for(turns, n_threads, [&](int64_t i) {
        const int64_t p0 = i * kPanels, p1 = std::min(p0 + kPanels, s.panels());
        if (exact) row.few(s, padded, tokens, p0, p1, y + t * p.n);
        else row.few_int(s, digits, tokens, p0, p1, y + t * p.n);
      });
    }
    return;
  }
  float* const xt = room(buffer.x, p.k * kSparseTokens);
  for (int64_t t = 0; t < m; t += kSparseTokens) {
    const int64_t tokens = std::min(kSparseTokens, m - t);
    transpose_in(x + t * p.k, p.k, tokens, xt);
    float* const to = y + t * p.n;
    parallel_for((p.n + kRowsAtOnce - 1) / kRowsAtOnce, n_threads, [&](int64_t i) {
      const int64_t n0 = i * kRowsAtOnce, n1 = std::min(n0 + kRowsAtOnce, p.n);
      float yt[kRowsAtOnce * kSparseTokens];  // stays in the first cache, as xt does in the second
      row.many(p, xt, n0, n1, yt);
      for (int64_t j = 0; j < tokens; ++j)
        for (int64_t n = n0; n < n1; ++n) to[j * p.n + n] += yt[(n - n0) * kSparseTokens + j];
    });
  }
}

}  // namespace lowbit
