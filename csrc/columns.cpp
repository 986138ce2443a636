// Rows of w are independent, so a strip of rows goes through all columns of the block while it lies in the cache.
// Plain loops over a strip: compilers turn them into vectors of whatever width the build allows, and since nothing is
// summed across a strip, the result is the same for all widths.
#include "columns.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kStrip = 64;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds half to even for |x| < 2^22

struct Strip {
  const float *scale, *divisor, *zero;  // of this column's group
  int64_t n;
};

void round_integers(const ColumnGrids& g, const Strip& s, const float* x, float* q, uint8_t* codes) {
  const float bottom = g.values[0], top = g.values[g.levels - 1];
  for (int64_t r = 0; r < s.n; ++r) {
    const float zero = s.zero ? s.zero[r] : 0.0f;
    float v = x[r] / s.divisor[r];
    if (g.real_zero) v += zero;
    v = std::min(std::max(v, -2097152.0f), 2097152.0f);
    v = (v + kRound) - kRound;
    if (!g.real_zero) v += zero;
    v = std::min(std::max(v, bottom), top);
    q[r] = (v - zero) * s.scale[r];
    codes[r] = static_cast<uint8_t>(static_cast<int>(v - bottom));
  }
}

void round_table(const ColumnGrids& g, const Strip& s, const float* x, float* q, uint8_t* codes) {
  for (int64_t r = 0; r < s.n; ++r) {
    const float zero = s.zero ? s.zero[r] : 0.0f;
    const float v = x[r] / s.divisor[r] + zero;
    float value = g.values[0];
    int code = 0;
    for (int i = 0; i + 1 < g.levels; ++i) {
      const bool above = v > g.thresholds[i];
      value = above ? g.values[i + 1] : value;
      code += above;
    }
    q[r] = (value - zero) * s.scale[r];
    codes[r] = static_cast<uint8_t>(code);
  }
}

void subtract(float* to, const float* from, float factor, int64_t n) {
  for (int64_t r = 0; r < n; ++r) to[r] -= factor * from[r];
}

void strip(const ColumnBlock& b, const ColumnGrids& g, int64_t r0, int64_t n) {
  float target[kStrip], q[kStrip];
  for (int64_t j = 0; j < b.count; ++j) {
    const int64_t at = g.group_of[j] * b.out + r0, row = j * b.out + r0;
    const Strip s{g.scale + at, g.divisor + at, g.zero ? g.zero + at : nullptr, n};
    float *column = b.columns + row, *other = b.other + row;
    const float diagonal = b.u[j * b.count + j];
    const float* x = column;
    if (b.moved) {
      for (int64_t r = 0; r < n; ++r) target[r] = column[r] + other[r] / diagonal;
      x = target;
    }
    (g.thresholds ? round_table : round_integers)(g, s, x, q, b.codes + row);
    if (b.moved) {
      float* moved = b.moved + row;
      for (int64_t r = 0; r < n; ++r) moved[r] = q[r] - column[r];
      std::memcpy(column, q, sizeof(float) * static_cast<size_t>(n));
      for (int64_t k = 0; k < b.count; ++k) subtract(b.other + k * b.out + r0, moved, b.u[k * b.count + j], n);
    } else {
      for (int64_t r = 0; r < n; ++r) other[r] = (column[r] - q[r]) / diagonal;
      for (int64_t k = j + 1; k < b.count; ++k) subtract(b.columns + k * b.out + r0, other, b.u[j * b.count + k], n);
    }
  }
}

}  // namespace

void solve_columns(const ColumnBlock& b, const ColumnGrids& g, int n_threads) {
  parallel_for((b.out + kStrip - 1) / kStrip, n_threads, [&](int64_t i) {
    strip(b, g, i * kStrip, std::min(kStrip, b.out - i * kStrip));
  });
}

}  // namespace lowbit
