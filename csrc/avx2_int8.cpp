// AVX2 row of `linear_int8`: equal to scalar bit for bit.
//
// A step's 64 bytes are two vectors of eight rows. maddubs(u, q) adds two products in int16 *with saturation*, so the
// integer dot product takes one of three forms, by the span of the levels:
//   narrow  u <= 16 (32 for segments of 16): int16 sums over a whole segment, 16*2*127*8 = 32512, widened once
//   wide    u <= 129: 2*129*127 = 32766, widened at every step
//   sign    any int8 level: maddubs(|level|, q with the level's sign), 2*128*127 = 32512, widened at every step;
//           activations are never -128, which would survive the change of sign
// In the first two dot = low * sum(q) + sum u*q.
//
// Few tokens: codes are expanded in registers, and what bounds the loop is the count of vector instructions. Many tokens:
// the codes of a block are expanded to bytes once.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cstring>
#include <vector>

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_FN
#define LOWBIT_INLINE static __forceinline
#define LOWBIT_LAMBDA
#else
#define LOWBIT_LAMBDA __attribute__((target("avx2,fma,f16c"), always_inline))
#define LOWBIT_FN __attribute__((target("avx2,fma,f16c")))
#define LOWBIT_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))
#endif

#if defined(__GNUC__)
#define LOWBIT_UNROLL8 _Pragma("GCC unroll 8")
#else
#define LOWBIT_UNROLL8
#endif

namespace lowbit {
namespace {

using V = __m256i;
using F8 = __m256;
constexpr int64_t kRows = Packed::kRows;
enum class Form { kNarrow, kWide, kSign };

LOWBIT_INLINE V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
LOWBIT_INLINE void store(uint8_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
LOWBIT_INLINE V low_bits(V v, int shift, int mask) {
  return _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8(static_cast<char>(mask)));
}

// What turns codes into u: a table of the table kinds and of k1. The sign form takes levels instead.
struct Grid {
  V lut, low;
};

LOWBIT_FN Grid grid_of(const PackedHeader& h, Form form) {
  alignas(16) uint8_t lut[16];
  for (int i = 0; i < 16; ++i) lut[i] = static_cast<uint8_t>(h.lut[i] + (form == Form::kSign ? h.low : 0));
  if (h.kind == PackedKind::k1) lut[1] = static_cast<uint8_t>(h.times);
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(lut))),
          _mm256_set1_epi8(static_cast<char>(h.low))};
}

template <PackedKind K>
LOWBIT_INLINE V look(V code, V lut) {
  return K == PackedKind::k2 || K == PackedKind::k3 || K == PackedKind::k4 ? code : _mm256_shuffle_epi8(lut, code);
}

// A turn: so many vectors of a unit give so many steps of A and as many of B.
constexpr int turn_steps(PackedKind k) {
  return k == PackedKind::k1 || k == PackedKind::k3 || k == PackedKind::k3Table ? 4
         : k == PackedKind::k2 || k == PackedKind::k2Table                     ? 2
                                                                               : 1;
}
constexpr int turn_vectors(PackedKind k) {
  return k == PackedKind::k3 || k == PackedKind::k3Table ? 3 : k == PackedKind::kBytes ? 2 : 1;
}

// u of one turn, of eight rows; its vectors are `stride` apart. k2 leaves the odd steps two bits up if it may: with
// accumulators of their own that saves a third of the instructions.
template <PackedKind K, Form F, bool kUp>
LOWBIT_INLINE void expand(const uint8_t* p, int64_t stride, const Grid& grid, V a[4], V b[4]) {
  const V v = load(p), lut = grid.lut;
  if (K == PackedKind::kBytes) {
    a[0] = v;
    b[0] = load(p + stride);
    if (F != Form::kSign) return;
    a[0] = _mm256_add_epi8(a[0], grid.low);
    b[0] = _mm256_add_epi8(b[0], grid.low);
  } else if (kUp) {
    const V s = _mm256_srli_epi16(v, 4);
    for (int i = 0; i < 2; ++i) {
      a[i] = _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(3 << 2 * i)));
      b[i] = _mm256_and_si256(s, _mm256_set1_epi8(static_cast<char>(3 << 2 * i)));
    }
  } else if (K == PackedKind::k4 || K == PackedKind::k4Table) {
    a[0] = look<K>(low_bits(v, 0, 15), lut);
    b[0] = look<K>(low_bits(v, 4, 15), lut);
  } else if (K == PackedKind::k2 || K == PackedKind::k2Table) {
    for (int i = 0; i < 2; ++i) {
      a[i] = look<K>(low_bits(v, 2 * i, 3), lut);
      b[i] = look<K>(low_bits(v, 4 + 2 * i, 3), lut);
    }
  } else if (K == PackedKind::k1) {
    for (int i = 0; i < 4; ++i) {
      a[i] = look<K>(low_bits(v, i, 1), lut);
      b[i] = look<K>(low_bits(v, 4 + i, 1), lut);
    }
  } else {  // three bits: the fourth step is spread over the upper two bits of three vectors
    V s[4] = {v, load(p + stride), load(p + 2 * stride)};
    s[3] = _mm256_or_si256(_mm256_or_si256(low_bits(s[0], 6, 3), low_bits(s[1], 4, 12)), low_bits(s[2], 2, 48));
    for (int i = 0; i < 4; ++i) {
      a[i] = look<K>(low_bits(s[i], 0, 7), lut);
      b[i] = look<K>(low_bits(s[i], 3, 7), lut);
    }
  }
}

// acc += v in place: GCC reassociates the sums of an unrolled loop and spills every product.
LOWBIT_INLINE V add16(V acc, V v) {
#if defined(__GNUC__)
  __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(v));
  return acc;
#else
  return _mm256_add_epi16(acc, v);
#endif
}
LOWBIT_INLINE V add32(V acc, V v) {
#if defined(__GNUC__)
  __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(v));
  return acc;
#else
  return _mm256_add_epi32(acc, v);
#endif
}

// u * q (kSign: level * q) of four columns of eight rows: pairs in int16 (narrow), else sums in int32
template <Form F>
LOWBIT_INLINE V dot4(V u, V x, V ones) {
  if (F == Form::kNarrow) return _mm256_maddubs_epi16(u, x);
  if (F == Form::kWide) return _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), ones);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)), ones);
}
template <Form F>
LOWBIT_INLINE V add(V dot, V v) {
  return F == Form::kNarrow ? add16(dot, v) : add32(dot, v);
}

LOWBIT_INLINE V four(const int8_t* q) {  // the same four activations for each row
  int32_t v;
  std::memcpy(&v, q, sizeof v);
  return _mm256_set1_epi32(v);
}

// scalar: part += (dot + start) * scale
template <Form F>
LOWBIT_INLINE F8 end_segment(F8 part, V dot, const int32_t* start, const float* scale) {
  if (F != Form::kSign) dot = _mm256_add_epi32(dot, _mm256_set1_epi32(*start));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(*scale), part);
}

struct Meta {
  F8 scale, zero;
};
LOWBIT_INLINE Meta meta(const uint8_t* p, const PackedHeader& h, int half) {
  const auto at = [&](int i) LOWBIT_LAMBDA {
    if (h.wide) return _mm256_loadu_ps(reinterpret_cast<const float*>(p + 64 * i + 32 * half));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32 * i + 16 * half)));
  };
  return {at(0), h.has_zero ? at(1) : _mm256_setzero_ps()};
}

// scalar: part -= zero * group_sum;  acc += part * scale
LOWBIT_INLINE F8 end_group(F8 acc, F8 part, const Meta& m, const float* group_sum, int64_t at) {
  if (group_sum) part = _mm256_fnmadd_ps(m.zero, _mm256_set1_ps(group_sum[at]), part);
  return _mm256_fmadd_ps(part, m.scale, acc);
}

// scalar: y = acc * step + bias
LOWBIT_INLINE void finish(const Packed& p, F8 acc, int64_t block, int half, const float* bias, float* y) {
  const int64_t n0 = block * kRows + 8 * half, rows = p.h.n - n0;
  acc = _mm256_mul_ps(acc, _mm256_loadu_ps(p.step(block) + 8 * half));
  if (rows >= 8) {  // a masked store takes many times as long
    if (bias) acc = _mm256_add_ps(acc, _mm256_loadu_ps(bias + n0));
    _mm256_storeu_ps(y + n0, acc);
  } else if (rows > 0) {
    const V mask = first_lanes(rows);
    if (bias) acc = _mm256_add_ps(acc, _mm256_maskload_ps(bias + n0, mask));
    _mm256_maskstore_ps(y + n0, mask, acc);
  }
}

struct Inputs {  // what one tile reads of its tokens; rows are ld and lds apart
  const int8_t* q;
  const float* scale;
  const int32_t* start;
  const float* group_sum;  // or null
  int64_t ld, lds, groups;
};

// Sums are then four times too large: so are `start`s, and the scales are a fourth. 12*2*127*4 steps fit in int16.
constexpr bool left_up(PackedKind k, int64_t tokens) { return k == PackedKind::k2 && tokens <= 2; }

// The blocks of a unit are visited one after the other, the processor fetches ahead what is read in memory's order.
constexpr int64_t kAhead = 2048;
LOWBIT_INLINE void ask_for(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// MR tokens times blocks [b, b+NB) of one panel, codes expanded in registers.
template <PackedKind K, Form F, int L, int MR, int NB>
LOWBIT_FN void few(const Packed& p, const Inputs& in, int64_t b, const float* bias, float* y) {
  constexpr bool kUp = left_up(K, MR);
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K);
  const int64_t stride = p.stride(b), side = b % Packed::kPanel, of_panel = p.scales_bytes(p.width(b));
  const Grid grid = grid_of(p.h, F);
  const V ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
  F8 part[NB][2][MR], acc[NB][2][MR];
  for (int i = 0; i < 2 * NB; ++i)
    for (int j = 0; j < MR; ++j) part[i / 2][i % 2][j] = acc[i / 2][i % 2][j] = _mm256_setzero_ps();
  const uint8_t* codes = p.panel(b);
  const int8_t* q = in.q;
  const int64_t ahead = p.vectors * stride / (2 * NB);  // bytes
  int64_t in_group = 0, g = 0;
  for (int64_t s = 0; s < p.seg.padded; s += 2, q += 2 * L) {
    const uint8_t* scales = codes + p.vectors * stride;
    const bool end_a = ++in_group == p.seg.per_group;
    if (end_a) in_group = 0;
    const bool end_b = ++in_group == p.seg.per_group && g + end_a < p.h.groups;  // the last B may be nobody's
    if (end_b) in_group = 0;
    const bool end[2] = {end_a, end_b};
    for (int i = 0; i < NB; ++i)
      for (int h = 0; h < 2; ++h) {
        const uint8_t *from = codes + (side + i) * 64 + 32 * h, *sc = scales + (side + i) * p.group_bytes();
        if (NB > 1) ask_for(codes + kAhead + (2 * i + h) * ahead, ahead);
        V dot[2][MR], up[2][MR];
        LOWBIT_UNROLL8 for (int t = 0; t < L / 4 / S; ++t, from += kVectors * stride) {
          V u[2][4];
          expand<K, F, kUp>(from, stride, grid, u[0], u[1]);
          for (int ab = 0; ab < 2; ++ab)
            for (int k = 0; k < S; ++k)
              for (int j = 0; j < MR; ++j) {
                const V v = dot4<F>(u[ab][k], four(q + j * in.ld + ab * L + (t * S + k) * 4), ones);
                V& to = kUp && k == 1 ? up[ab][j] : dot[ab][j];
                to = t == 0 && (k == 0 || (kUp && k == 1)) ? v : add<F>(to, v);
              }
        }
        int64_t group = g;
        for (int ab = 0; ab < 2; ++ab) {
          for (int j = 0; j < MR; ++j) {
            V sum = dot[ab][j];
            if (F == Form::kNarrow) sum = _mm256_madd_epi16(sum, kUp ? fours : ones);
            if (kUp) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(up[ab][j], ones));
            part[i][h][j] = end_segment<F>(part[i][h][j], sum, in.start + j * in.lds + s + ab,
                                           in.scale + j * in.lds + s + ab);
          }
          if (!end[ab]) continue;
          const Meta of_rows = meta(sc, p.h, h);
          for (int j = 0; j < MR; ++j) {
            acc[i][h][j] = end_group(acc[i][h][j], part[i][h][j], of_rows, in.group_sum, j * in.groups + group);
            part[i][h][j] = _mm256_setzero_ps();
          }
          sc += of_panel;
          ++group;
        }
      }
    g += end_a + end_b;
    codes = scales + (end_a + end_b) * of_panel;
  }
  for (int i = 0; i < NB; ++i)
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < MR; ++j) finish(p, acc[i][h][j], b + i, h, bias, y + j * p.h.n);
}

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

using FewFn = void (*)(const Packed&, const Inputs&, int64_t b, const float*, float*);
using ManyFn = void (*)(const uint8_t*, const float*, const Inputs&, int64_t per_group, int64_t g0, int64_t g1, float*);
using BytesFn = void (*)(const Packed&, int64_t block, uint8_t* out);
constexpr int64_t kMostTokens = 4;    // at a time: their sums stay in registers
constexpr int64_t kTurnBytes = 32768;  // of expanded codes that all tokens pass by

struct Kernels {
  FewFn of[kMostTokens + 1];  // tokens times one block
  FewFn panel;                // one token times four blocks
  BytesFn bytes;
};

template <PackedKind K, Form F, int L>
constexpr Kernels kernels_for() {
  return {{nullptr, few<K, F, L, 1, 1>, few<K, F, L, 2, 1>, few<K, F, L, 3, 1>, few<K, F, L, 4, 1>},
          few<K, F, L, 1, 4>,
          to_bytes<K, F, L>};
}
template <PackedKind K, Form F>
constexpr Kernels kKernels[2] = {kernels_for<K, F, 32>(), kernels_for<K, F, 16>()};
template <PackedKind K>
const Kernels& any_form(Form form, int i) {
  return form == Form::kNarrow ? kKernels<K, Form::kNarrow>[i]
         : form == Form::kWide ? kKernels<K, Form::kWide>[i]
                               : kKernels<K, Form::kSign>[i];
}

template <Form F, int L>
constexpr ManyFn kMany[kMostTokens + 1] = {nullptr, many<F, L, 1>, many<F, L, 2>, many<F, L, 3>, many<F, L, 4>};

Form form_of(const Packed& p) {
  if (p.h.span * 2 * 127 * p.seg.length / 4 <= 32767) return Form::kNarrow;  // even grids always: 15*2*127*8 = 30480
  return p.h.span <= 129 ? Form::kWide : Form::kSign;
}

const Kernels& kernels_of(const Packed& p) {
  const int i = p.seg.length == 16;
  switch (p.h.kind) {
    case PackedKind::k1: return kKernels<PackedKind::k1, Form::kNarrow>[i];
    case PackedKind::k2: return kKernels<PackedKind::k2, Form::kNarrow>[i];
    case PackedKind::k3: return kKernels<PackedKind::k3, Form::kNarrow>[i];
    case PackedKind::k4: return kKernels<PackedKind::k4, Form::kNarrow>[i];
    case PackedKind::k2Table: return any_form<PackedKind::k2Table>(form_of(p), i);
    case PackedKind::k3Table: return any_form<PackedKind::k3Table>(form_of(p), i);
    case PackedKind::k4Table: return any_form<PackedKind::k4Table>(form_of(p), i);
    case PackedKind::kBytes: break;
  }
  return any_form<PackedKind::kBytes>(form_of(p), i);
}

template <int L>
const ManyFn* many_of(Form form) {
  return form == Form::kNarrow ? kMany<Form::kNarrow, L>
         : form == Form::kWide ? kMany<Form::kWide, L>
                               : kMany<Form::kSign, L>;
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
  const Kernels& k = kernels_of(p);
  y += m0 * p.h.n;
  if (tokens <= kMostTokens) {
    const Inputs in = inputs(0);
    for (int64_t b = b0; b < b1;) {
      const bool panel = tokens == 1 && b % Packed::kPanel == 0 && b + Packed::kPanel <= b1;
      (panel ? k.panel : k.of[tokens])(p, in, b, bias, y);
      b += panel ? Packed::kPanel : 1;
    }
    return;
  }
  const Form form = form_of(p);
  const ManyFn* many = p.seg.length == 16 ? many_of<16>(form) : many_of<32>(form);
  const int64_t size = p.seg.row_size() * kRows, turn = std::max<int64_t>(1, kTurnBytes * p.h.groups / size);  // groups
  room.resize(std::max(room.size(), static_cast<size_t>(size + (p.h.groups * 2 + tokens) * kRows * 4 + 64)));
  uint8_t* bytes = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
  float* metas = reinterpret_cast<float*>(bytes + size);
  float* acc = metas + p.h.groups * 2 * kRows;
  for (int64_t b = b0; b < b1; ++b) {
    k.bytes(p, b, bytes);
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
