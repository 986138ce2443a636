// AVX2 row of `linear_int8`: equal to scalar bit for bit. Many tokens: the codes of a block are expanded to bytes once.
#include "avx2_int8.h"

#if LOWBIT_X86
#include <vector>

namespace lowbit {
namespace {

using namespace avx2_int8;
constexpr int64_t kTurnBytes = 32768;  // of expanded codes that all tokens pass by

// acc += MR tokens times groups [g0, g1) of a block from bytes: w holds u (levels, for kSign) step after step, metas a
// group's scales and zeros. acc: [MR, 16], as part in memory, for the registers' sake.
template <Form F, int L, int MR>
LOWBIT_FN void many(const uint8_t* w, const float* metas, const Inputs& in, int64_t per_group, int64_t g0, int64_t g1,
                    float* acc) {
  const V ones = _mm256_set1_epi16(1);
  alignas(32) float part[MR][2][8];
  for (int j = 0; j < 2 * MR; ++j) _mm256_store_ps(part[j / 2][j % 2], _mm256_setzero_ps());
  int64_t s = g0 * per_group;
  const int8_t* q = in.q + s * L;
  w += s * L * kRows;
  for (int64_t g = g0; g < g1; ++g) {
    for (const int64_t end = s + per_group; s < end; ++s) {
      V dot[MR][2];
      LOWBIT_UNROLL8 for (int t = 0; t < L / 4; ++t, w += 64, q += 4) {
        const V u[2] = {load(w), load(w + 32)};
        for (int j = 0; j < MR; ++j) {
          const V x = four(q + j * in.ld);
          for (int h = 0; h < 2; ++h) {
            const V v = dot4<F>(u[h], x, ones);
            dot[j][h] = t == 0 ? v : add<F>(dot[j][h], v);
          }
        }
      }
      for (int j = 0; j < MR; ++j)
        for (int h = 0; h < 2; ++h) {
          const V sum = F == Form::kNarrow ? _mm256_madd_epi16(dot[j][h], ones) : dot[j][h];
          _mm256_store_ps(part[j][h], end_segment<F>(_mm256_load_ps(part[j][h]), sum, in.start + j * in.lds + s,
                                                     in.scale + j * in.lds + s));
        }
    }
    for (int h = 0; h < 2; ++h) {
      const float* at = metas + g * 2 * kRows + 8 * h;
      const Meta of_rows = {_mm256_load_ps(at), _mm256_load_ps(at + kRows)};
      for (int j = 0; j < MR; ++j) {
        float* to = acc + j * kRows + 8 * h;
        _mm256_store_ps(to, end_group(_mm256_load_ps(to), _mm256_load_ps(part[j][h]), of_rows, in.group_sum,
                                      j * in.groups + g));
        _mm256_store_ps(part[j][h], _mm256_setzero_ps());
      }
    }
  }
}

LOWBIT_FN void finish_all(const Packed& p, const float* acc, int64_t tokens, int64_t b, const float* bias, float* y) {
  for (int64_t m = 0; m < tokens; ++m)
    for (int h = 0; h < 2; ++h)
      finish(p, _mm256_load_ps(acc + m * kRows + 8 * h), b, h, bias, y + m * p.h.n);
}

// A block's u (levels, for kSign) as bytes.
template <PackedKind K, Form F, int L>
LOWBIT_FN void to_bytes(const Packed& p, int64_t block, uint8_t* out) {
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K), steps = L / 4;
  const int64_t stride = p.stride(block);
  const Grid grid = grid_of(p.h, F);
  for (int64_t unit = 0; unit < p.units; ++unit, out += steps * 128) {
    const uint8_t* from = p.codes(block, unit);
    if (block % 2 == 0) ask_for(from - block % Packed::kPanel * 64 + kAhead, p.vectors * stride);  // for all its blocks
    for (int t = 0; t < steps / S; ++t, from += kVectors * stride)
      for (int h = 0; h < 64; h += 32) {
        V a[4], b[4];
        expand<K, F, false>(from + h, stride, grid, a, b);
        for (int k = 0; k < S; ++k) {
          store(out + (t * S + k) * 64 + h, a[k]);
          store(out + (steps + t * S + k) * 64 + h, b[k]);
        }
      }
  }
}

// Scales and zeros of a block as floats: [groups, 2, 16].
LOWBIT_FN void to_floats(const Packed& p, int64_t block, float* out) {
  for (int64_t g = 0; g < p.h.groups; ++g, out += 2 * kRows)
    for (int h = 0; h < 2; ++h) {
      const Meta of_rows = meta(p.scales(block, g), p.h, h);
      _mm256_store_ps(out + 8 * h, of_rows.scale);
      _mm256_store_ps(out + kRows + 8 * h, of_rows.zero);
    }
}

using ManyFn = void (*)(const uint8_t*, const float*, const Inputs&, int64_t per_group, int64_t g0, int64_t g1, float*);
template <Form F, int L>
constexpr ManyFn kMany[kMostTokens + 1] = {nullptr, many<F, L, 1>, many<F, L, 2>, many<F, L, 3>, many<F, L, 4>};
template <int L>
const ManyFn* many_of(Form form) {
  return form == Form::kNarrow ? kMany<Form::kNarrow, L>
         : form == Form::kWide ? kMany<Form::kWide, L>
                               : kMany<Form::kSign, L>;
}

using BytesFn = void (*)(const Packed&, int64_t block, uint8_t* out);
template <PackedKind K>
BytesFn bytes_for(const Packed& p) {
  const bool sign = form_of(p) == Form::kSign;
  if (p.seg.length == 16) return sign ? to_bytes<K, Form::kSign, 16> : to_bytes<K, Form::kWide, 16>;
  return sign ? to_bytes<K, Form::kSign, 32> : to_bytes<K, Form::kWide, 32>;
}

BytesFn bytes_of(const Packed& p) {
  switch (p.h.kind) {
    case PackedKind::k1: return bytes_for<PackedKind::k1>(p);
    case PackedKind::k2: return bytes_for<PackedKind::k2>(p);
    case PackedKind::k3: return bytes_for<PackedKind::k3>(p);
    case PackedKind::k4: return bytes_for<PackedKind::k4>(p);
    case PackedKind::k2Table: return bytes_for<PackedKind::k2Table>(p);
    case PackedKind::k3Table: return bytes_for<PackedKind::k3Table>(p);
    case PackedKind::k4Table: return bytes_for<PackedKind::k4Table>(p);
    case PackedKind::kBytes: break;
  }
  return bytes_for<PackedKind::kBytes>(p);
}

}  // namespace

void linear_int8_avx2(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                      const float* bias, float* y) {
  static thread_local std::vector<uint8_t> room;
  static thread_local std::vector<int32_t> starts;
  static thread_local std::vector<float> scales;
  const int64_t tokens = m1 - m0, lds = p.seg.padded;
  const int32_t* start = o.start + m0 * lds;
  const float* scale = o.t.scale + m0 * lds;
  if (!o.unpacked) {  // theirs are of codes that are shifted otherwise
    const int32_t up = left_up(p.h.kind, tokens) ? 4 : 1;
    starts.resize(std::max(starts.size(), static_cast<size_t>(tokens * lds)));
    scales.resize(starts.size());
    for (int64_t i = 0; i < tokens * lds; ++i) {
      starts[static_cast<size_t>(i)] = up * p.h.low * o.t.sum[m0 * lds + i];
      scales[static_cast<size_t>(i)] = scale[i] / static_cast<float>(up);
    }
    start = starts.data();
    scale = scales.data();
  }
  const auto inputs = [&](int64_t m) {  // from m0 on
    const float* group_sum = o.group_sum ? o.group_sum + (m0 + m) * p.h.groups : nullptr;
    return Inputs{o.t.q + (m0 + m) * p.seg.row_size(), scale + m * lds, start + m * lds, group_sum,
                  p.seg.row_size(),                    lds,             p.h.groups};
  };
  y += m0 * p.h.n;
  if (tokens <= kMostTokens) {
    const Inputs in = inputs(0);
    const Few& few = few_of(p);
    for (int64_t b = b0; b < b1;) {
      const bool panel = b % Packed::kPanel == 0 && b + Packed::kPanel <= b1;
      (panel ? few.panel : few.of)[tokens](p, in, b, bias, y);
      b += panel ? Packed::kPanel : 1;
    }
    return;
  }
  const Form form = form_of(p);
  const BytesFn expand = bytes_of(p);
  const ManyFn* many = p.seg.length == 16 ? many_of<16>(form) : many_of<32>(form);
  const int64_t size = p.seg.row_size() * kRows, turn = std::max<int64_t>(1, kTurnBytes * p.h.groups / size);  // groups
  room.resize(std::max(room.size(), static_cast<size_t>(size + (p.h.groups * 2 + tokens) * kRows * 4 + 64)));
  uint8_t* bytes = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
  float* metas = reinterpret_cast<float*>(bytes + size);
  float* acc = metas + p.h.groups * 2 * kRows;
  for (int64_t b = b0; b < b1; ++b) {
    expand(p, b, bytes);
    to_floats(p, b, metas);
    std::fill(acc, acc + tokens * kRows, 0.0f);
    for (int64_t g = 0; g < p.h.groups; g += turn)
      for (int64_t m = 0; m < tokens; m += kMostTokens)
        many[std::min(kMostTokens, tokens - m)](bytes, metas, inputs(m), p.seg.per_group, g,
                                                std::min(g + turn, p.h.groups), acc + m * kRows);
    finish_all(p, acc, tokens, b, bias, y);
  }
}

}  // namespace lowbit
#endif
