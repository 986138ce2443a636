// What the AVX2 row of `linear_int8` is made of: steps of the products of few tokens and of many.
//
// A step's 64 bytes are two vectors of eight rows. maddubs(u, q) adds two products in int16 *with saturation*, so the
// integer dot product takes one of three forms, by the span of the levels:
//   narrow  u <= 16 (32 for segments of 16): int16 sums over a whole segment, 16*2*127*8 = 32512, widened once
//   wide    u <= 129: 2*129*127 = 32766, widened at every step
//   sign    any int8 level: maddubs(|level|, q with the level's sign), 2*128*127 = 32512, widened at every step;
//           activations are never -128, which would survive the change of sign
// In the first two dot = low * sum(q) + sum u*q.
#pragma once
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cstring>

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

namespace lowbit::avx2_int8 {

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

LOWBIT_INLINE Grid grid_of(const PackedHeader& h, Form form) {
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

inline Form form_of(const Packed& p) {
  if (p.h.span * 2 * 127 * p.seg.length / 4 <= 32767) return Form::kNarrow;  // even grids always: 15*2*127*8 = 30480
  return p.h.span <= 129 ? Form::kWide : Form::kSign;
}

// The blocks of a unit are visited one after the other, the processor fetches ahead what is read in memory's order.
constexpr int64_t kAhead = 2048;
LOWBIT_INLINE void ask_for(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Sums are then four times too large: so are `start`s, and the scales are a fourth. 12*2*127*4 steps fit in int16.
constexpr bool left_up(PackedKind k, int64_t tokens) { return k == PackedKind::k2 && tokens <= 2; }

constexpr int64_t kMostTokens = 4;  // at a time: their sums stay in registers

// Tokens times one block, and times the four blocks of a panel.
using FewFn = void (*)(const Packed&, const Inputs&, int64_t b, const float* bias, float* y);
struct Few {
  FewFn of[kMostTokens + 1], panel[kMostTokens + 1];
};
const Few& few_of(const Packed&);

}  // namespace lowbit::avx2_int8
#endif
