// The scalar rows: readable, always built, and the definition of every answer.
#include <cmath>
#include <cstring>
#include <vector>

#include "rows.h"

namespace lowbit {
namespace {

// Code k of a row. A code spans at most two bytes, and the second is read only if the code reaches into it.
inline int code_at(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  const int shift = static_cast<int>(bit & 7);
  int v = row[bit >> 3] >> shift;
  if (shift + bits > 8) v |= row[(bit >> 3) + 1] << (8 - shift);
  return v & ((1 << bits) - 1);
}

constexpr float kTiny = 1e-30f;  // below it 127/absmax could overflow: the segment counts as zeros

}  // namespace

void decode_scalar(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  const uint8_t* row = w.row(n);
  const float* table = w.table_row(n);
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t g = n * w.groups + k / w.group;
    const float level = table[code_at(row, k, w.bits)];
    out[k - k0] = (w.zero ? level - w.zero[g] : level) * w.scale[g];
  }
}

// y = sum_k x*w_hat, w_hat as float32, products and sum in double, one rounding at the end.
static void linear_float_tile(const Weights& w, const float* x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                              float* y) {
  std::vector<float> wn(static_cast<size_t>(w.k));
  for (int64_t n = n0; n < n1; ++n) {
    decode_scalar(w, n, 0, w.k, wn.data());
    for (int64_t m = m0; m < m1; ++m) {
      double acc = 0;
      for (int64_t k = 0; k < w.k; ++k) acc += static_cast<double>(x[m * w.k + k]) * wn[k];
      y[m * w.n + n] = static_cast<float>(acc);
    }
  }
}
const LinearFloat linear_float_scalar = {nullptr, nullptr, linear_float_tile};

// Per segment: a = max|x|, q = round_to_even(x * (127/a)), scale = a/127. |q| <= 127, since x*(127/a) is at most
// 127 plus a rounding error far below 0.5. A segment with Inf or NaN gets scale NaN, so that y shows it.
void quantize_scalar(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  std::memset(q, 0, static_cast<size_t>(seg.row_size()));
  for (int64_t s = 0; s < seg.padded; ++s, q += seg.length) {
    scale[s] = 0.0f;
    sum[s] = 0;
    if (s == seg.count) break;
    const float* xs = x + seg.begin(s);
    const int64_t len = seg.size(s);
    float a = 0;
    bool finite = true;
    for (int64_t i = 0; i < len; ++i) {
      finite = finite && std::isfinite(xs[i]);
      a = std::fabs(xs[i]) > a ? std::fabs(xs[i]) : a;
    }
    if (!finite) scale[s] = std::nanf("");
    if (!finite || a < kTiny) continue;
    scale[s] = a / 127.0f;
    const float inverse = 127.0f / a;
    for (int64_t i = 0; i < len; ++i) {
      q[i] = static_cast<int8_t>(std::nearbyintf(xs[i] * inverse));
      sum[s] += q[i];
    }
  }
}

// dot_s = sum over a segment of level * q, an exact integer: |dot_s| <= 32*128*127 < 2^24, so float(dot_s) is exact too.
// Per group: part = sum_s dot_s * scale_s; part -= zero * sum_s sum(q_s) * scale_s; y += part * scale, each a fused
// multiply-add in float32, left to right. In the end y = y * step + bias, two roundings.
void linear_int8_scalar(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                        const float* bias, float* y) {
  const Segments& seg = p.seg;
  std::vector<int8_t> level(static_cast<size_t>(seg.row_size()));
  for (int64_t n = b0 * Packed::kRows; n < b1 * Packed::kRows && n < p.h.n; ++n) {
    for (int64_t s = 0; s < seg.count; ++s)
      for (int64_t i = 0; i < seg.size(s); ++i)
        level[s * seg.length + i] = static_cast<int8_t>(p.h.low + packed_u(p, n, s, i));
    for (int64_t m = m0; m < m1; ++m) {
      const int8_t* q = o.t.q + m * seg.row_size();
      float acc = 0;
      for (int64_t g = 0; g < p.h.groups; ++g) {
        float part = 0, group_sum = 0, scale, zero;
        for (int64_t s = g * seg.per_group; s < (g + 1) * seg.per_group; ++s) {
          int32_t dot = 0;
          for (int64_t i = s * seg.length; i < s * seg.length + seg.size(s); ++i) dot += level[i] * q[i];
          const int64_t at = m * seg.padded + s;
          part = std::fma(static_cast<float>(dot), o.t.scale[at], part);
          group_sum = std::fma(static_cast<float>(o.t.sum[at]), o.t.scale[at], group_sum);
        }
        packed_scale_zero(p, n, g, &scale, &zero);
        if (p.h.has_zero) part = std::fma(-zero, group_sum, part);
        acc = std::fma(part, scale, acc);
      }
      float step;  // the packed bytes may start anywhere
      std::memcpy(&step, p.step(n / Packed::kRows) + n % Packed::kRows, sizeof step);
      acc *= step;
      y[m * p.h.n + n] = bias ? acc + bias[n] : acc;
    }
  }
}

}  // namespace lowbit
