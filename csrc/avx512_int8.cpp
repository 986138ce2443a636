// AVX-512 rows of `quantize` and `linear_int8`: equal to scalar bit for bit.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products to an int32 lane, without saturation on the way:
// a lane is one row of w. Bound: a segment adds at most 32 * 255 * 127 < 2^20; with u left at bit 4 of its byte 16 times
// as much as 32 * 15 * 127, the same again; the start value low * sum is at most 16 * 128 * 32 * 127 < 2^24.
//
// Few tokens: codes are masked out of their vectors as they are needed (one instruction for 64 codes of an even grid,
// without shifting them down: the accumulator is then a multiple of 16, and so is exact as a float).
// Many tokens: the codes of a tile are expanded to bytes once.
#include "avx512.h"

#if LOWBIT_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <algorithm>
#include <cstring>
#include <vector>

#define LOWBIT_FN LOWBIT_AVX512_WITH("f16c,avx512vnni")
#define LOWBIT_INLINE LOWBIT_AVX512_INLINE_WITH("f16c,avx512vnni")

namespace lowbit {
namespace {

using V = __m512i;
constexpr int64_t kRows = Packed::kRows;

LOWBIT_INLINE V load(const void* p) { return _mm512_loadu_si512(p); }
LOWBIT_INLINE V every(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
// acc += u * x, in place: around the intrinsic GCC 12 copies each accumulator twice a turn of `many`'s loop.
LOWBIT_INLINE V dot4(V acc, V u, V x) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(x));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, u, x);
#endif
}
LOWBIT_INLINE V four(const int8_t* q) {  // the same four activations for each row
  int32_t v;
  std::memcpy(&v, q, sizeof v);
  return _mm512_set1_epi32(v);
}
LOWBIT_INLINE V table_of(const PackedHeader& h) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h.lut)));
}

// A turn: so many vectors of a unit give so many steps of A and as many of B.
constexpr bool is_table(PackedKind k) {
  return k == PackedKind::k2Table || k == PackedKind::k3Table || k == PackedKind::k4Table;
}
constexpr int turn_steps(PackedKind k) {
  return k == PackedKind::k1 || k == PackedKind::k3 || k == PackedKind::k3Table ? 4
         : k == PackedKind::k2 || k == PackedKind::k2Table                     ? 2
                                                                               : 1;
}
constexpr int turn_vectors(PackedKind k) {
  return k == PackedKind::k3 || k == PackedKind::k3Table ? 3 : k == PackedKind::kBytes ? 2 : 1;
}

// u of one turn, its vectors `stride` apart: times Times (even grids) or looked up.
template <PackedKind K>
LOWBIT_INLINE void expand(const uint8_t* p, int64_t stride, V lut, V a[4], V b[4]) {
  const V v = load(p);
  if (K == PackedKind::kBytes) {
    a[0] = v;
    b[0] = load(p + stride);
  } else if (K == PackedKind::k4) {
    a[0] = _mm512_and_si512(v, every(0x0f));
    b[0] = _mm512_and_si512(v, every(0xf0));
  } else if (K == PackedKind::k4Table) {
    a[0] = _mm512_shuffle_epi8(lut, _mm512_and_si512(v, every(0x0f)));
    b[0] = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(v, 4), every(0x0f)));
  } else if (K == PackedKind::k2) {
    const V s = _mm512_srli_epi16(v, 2);
    a[0] = _mm512_and_si512(v, every(0x03));
    a[1] = _mm512_and_si512(s, every(0x03));
    b[0] = _mm512_and_si512(v, every(0x30));
    b[1] = _mm512_and_si512(s, every(0x30));
  } else if (K == PackedKind::k2Table) {
    a[0] = _mm512_shuffle_epi8(lut, _mm512_and_si512(v, every(0x03)));
    a[1] = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(v, 2), every(0x03)));
    b[0] = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(v, 4), every(0x03)));
    b[1] = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(v, 6), every(0x03)));
  } else if (K == PackedKind::k1) {  // at bits 1 and 5
    const V s[4] = {_mm512_slli_epi16(v, 1), v, _mm512_srli_epi16(v, 1), _mm512_srli_epi16(v, 2)};
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_and_si512(s[i], every(0x02));
      b[i] = _mm512_and_si512(s[i], every(0x20));
    }
  } else {  // three bits: the fourth step is spread over the upper two bits of three vectors
    V s[4] = {v, load(p + stride), load(p + 2 * stride)};
    const V low = _mm512_ternarylogic_epi32(_mm512_srli_epi16(s[0], 6), _mm512_srli_epi16(s[1], 4), every(0x03), 0xe4);
    s[3] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(s[2], 2), every(0x0f), 0xe4);
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_and_si512(s[i], every(0x07));
      b[i] = K == PackedKind::k3 ? _mm512_and_si512(s[i], every(0x38))
                                 : _mm512_and_si512(_mm512_srli_epi16(s[i], 3), every(0x07));
      if (K == PackedKind::k3Table) {
        a[i] = _mm512_shuffle_epi8(lut, a[i]);
        b[i] = _mm512_shuffle_epi8(lut, b[i]);
      }
    }
  }
}

constexpr int64_t kAhead = 2048;
LOWBIT_INLINE void ask_for(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

LOWBIT_INLINE __m512 meta(const uint8_t* p, bool wide, int i) {  // i = 0: scales, 1: zeros
  if (wide) return _mm512_loadu_ps(p + 64 * i);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
}

// scalar: part -= zero * group_sum;  acc += part * scale
LOWBIT_INLINE __m512 end_group(__m512 acc, __m512 part, const uint8_t* p, const PackedHeader& h,
                                      const float* group_sum, int64_t at) {
  if (group_sum) part = _mm512_fnmadd_ps(meta(p, h.wide, 1), _mm512_set1_ps(group_sum[at]), part);
  return _mm512_fmadd_ps(part, meta(p, h.wide, 0), acc);
}

// scalar: y = acc * step + bias
LOWBIT_INLINE void finish(const Packed& p, __m512 acc, int64_t block, const float* bias, float* y) {
  const int64_t n0 = block * kRows, rows = std::min<int64_t>(kRows, p.h.n - n0);
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  acc = _mm512_mul_ps(acc, _mm512_loadu_ps(p.step(block)));
  if (bias) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(mask, bias + n0));
  _mm512_mask_storeu_ps(y + n0, mask, acc);
}

// Token m times blocks [b, b+NB) of one panel, codes expanded in registers.
template <PackedKind K, int L, int NB>
LOWBIT_FN void one(const Packed& p, const Operand& o, int64_t m, int64_t b, const float* bias, float* y) {
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K);
  const int64_t lds = p.seg.padded;
  const int8_t* q = o.t.q + m * p.seg.row_size();
  const float* scale = o.scale + m * lds;
  const int32_t* start = o.start + m * lds;
  const int64_t stride = p.stride(b), side = b % Packed::kPanel, of_group = p.group_bytes();
  const int64_t of_panel = p.scales_bytes(p.width(b));
  const uint8_t* at = p.panel(b);
  __m512 part[NB], acc[NB];
  for (int i = 0; i < NB; ++i) part[i] = acc[i] = _mm512_setzero_ps();
  const V lut = table_of(p.h);
  int64_t in_group = 0, g = 0;
  for (int64_t s = 0; s < p.seg.padded; s += 2) {
    V dot[2][NB];
    for (int i = 0; i < NB; ++i)
      for (int ab = 0; ab < 2; ++ab) dot[ab][i] = _mm512_set1_epi32(start[s + ab]);
    for (int t = 0; t < L / 4 / S; ++t, at += kVectors * stride) {
      for (int i = 0; i < NB; ++i) {
        V u[2][4];
        expand<K>(at + (side + i) * 64, stride, lut, u[0], u[1]);
        for (int ab = 0; ab < 2; ++ab)
          for (int k = 0; k < S; ++k)
            dot[ab][i] = _mm512_dpbusd_epi32(dot[ab][i], u[ab][k], four(q + ab * L + (t * S + k) * 4));
      }
    }
    q += 2 * L;
    for (int ab = 0; ab < 2; ++ab) {
      for (int i = 0; i < NB; ++i)
        part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[ab][i]), _mm512_set1_ps(scale[s + ab]), part[i]);
      if (++in_group == p.seg.per_group && g < p.h.groups) {  // the last B may be nobody's
        for (int i = 0; i < NB; ++i) {
          acc[i] = end_group(acc[i], part[i], at + (side + i) * of_group, p.h, o.group_sum, m * p.h.groups + g);
          part[i] = _mm512_setzero_ps();
        }
        at += of_panel;
        in_group = 0;
        ++g;
      }
    }
  }
  for (int i = 0; i < NB; ++i) finish(p, acc[i], b + i, bias, y + m * p.h.n);
}

// Tokens [m, m+MR) times blocks [b, b+NB) of one panel: the sums of a block stay in registers for a unit, part and acc in
// memory. A unit is asked for as it lies before its blocks are visited: they are not read in memory's order.
template <PackedKind K, int L, int MR, int NB>
LOWBIT_FN void some(const Packed& p, const Operand& o, int64_t m, int64_t b, const float* bias, float* y) {
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K);
  const int64_t ld = p.seg.row_size(), lds = p.seg.padded;
  const int8_t* q = o.t.q + m * ld;
  const float* scale = o.scale + m * lds;
  const int32_t* start = o.start + m * lds;
  const int64_t stride = p.stride(b), side = b % Packed::kPanel, of_panel = p.scales_bytes(p.width(b));
  const V lut = table_of(p.h);
  __m512 part[NB][MR], acc[NB][MR];
  for (int i = 0; i < NB; ++i)
    for (int j = 0; j < MR; ++j) part[i][j] = acc[i][j] = _mm512_setzero_ps();
  const uint8_t* codes = p.panel(b);
  const int64_t ahead = p.vectors * stride / NB;  // bytes
  int64_t in_group = 0, g = 0;
  for (int64_t s = 0; s < p.seg.padded; s += 2, q += 2 * L) {
    const uint8_t* scales = codes + p.vectors * stride;
    const bool end_a = ++in_group == p.seg.per_group;
    if (end_a) in_group = 0;
    const bool end_b = ++in_group == p.seg.per_group && g + end_a < p.h.groups;  // the last B may be nobody's
    if (end_b) in_group = 0;
    const bool end[2] = {end_a, end_b};
    for (int i = 0; i < NB; ++i) {
      const uint8_t *from = codes + (side + i) * 64, *sc = scales + (side + i) * p.group_bytes();
      if (NB > 1) ask_for(codes + kAhead + i * ahead, ahead);
      V dot[2][MR];
      for (int j = 0; j < MR; ++j)
        for (int ab = 0; ab < 2; ++ab) dot[ab][j] = _mm512_set1_epi32(start[j * lds + s + ab]);
      for (int t = 0; t < L / 4 / S; ++t, from += kVectors * stride) {
        V u[2][4];
        expand<K>(from, stride, lut, u[0], u[1]);
        for (int ab = 0; ab < 2; ++ab)
          for (int k = 0; k < S; ++k)
            for (int j = 0; j < MR; ++j)
              dot[ab][j] = dot4(dot[ab][j], u[ab][k], four(q + j * ld + ab * L + (t * S + k) * 4));
      }
      int64_t group = g;
      for (int ab = 0; ab < 2; ++ab) {
        for (int j = 0; j < MR; ++j)
          part[i][j] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[ab][j]), _mm512_set1_ps(scale[j * lds + s + ab]), part[i][j]);
        if (!end[ab]) continue;
        for (int j = 0; j < MR; ++j) {
          acc[i][j] = end_group(acc[i][j], part[i][j], sc, p.h, o.group_sum, (m + j) * p.h.groups + group);
          part[i][j] = _mm512_setzero_ps();
        }
        sc += of_panel;
        ++group;
      }
    }
    g += end_a + end_b;
    codes = scales + (end_a + end_b) * of_panel;
  }
  for (int i = 0; i < NB; ++i)
    for (int j = 0; j < MR; ++j) finish(p, acc[i][j], b + i, bias, y + (m + j) * p.h.n);
}

// The same from bytes: w[i] holds u of block b+i, step after step. acc stays in memory, for the registers' sake.
template <int MR, int NB>
LOWBIT_FN void many(const Packed& p, const uint8_t* const* w, const Operand& o, int64_t m, int64_t b,
                        const float* bias, float* y) {
  const int64_t ld = p.seg.row_size(), lds = p.seg.padded, steps = p.seg.length / 4;
  const int8_t* q = o.t.q + m * ld;
  const float* scale = o.scale + m * lds;
  const int32_t* start = o.start + m * lds;
  const uint8_t* codes[NB];
  alignas(64) float acc[NB * MR * kRows] = {};
  for (int i = 0; i < NB; ++i) codes[i] = w[i];
  int64_t s = 0;
  for (int64_t g = 0; g < p.h.groups; ++g) {
    __m512 part[NB][MR];
    for (int i = 0; i < NB; ++i)
      for (int j = 0; j < MR; ++j) part[i][j] = _mm512_setzero_ps();
    for (const int64_t end = s + p.seg.per_group; s < end; ++s) {
      V dot[NB][MR];
      for (int i = 0; i < NB; ++i)
        for (int j = 0; j < MR; ++j) dot[i][j] = _mm512_set1_epi32(start[j * lds + s]);
      for (int64_t t = 0; t < steps; ++t, q += 4) {
        V u[NB];
        for (int i = 0; i < NB; ++i) {
          u[i] = load(codes[i]);
          codes[i] += 64;
        }
        for (int j = 0; j < MR; ++j) {
          const V x = four(q + j * ld);
          for (int i = 0; i < NB; ++i) dot[i][j] = dot4(dot[i][j], u[i], x);
        }
      }
      for (int i = 0; i < NB; ++i)
        for (int j = 0; j < MR; ++j)
          part[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][j]), _mm512_set1_ps(scale[j * lds + s]), part[i][j]);
    }
    for (int i = 0; i < NB; ++i)
      for (int j = 0; j < MR; ++j) {
        float* to = acc + (i * MR + j) * kRows;
        _mm512_store_ps(to, end_group(_mm512_load_ps(to), part[i][j], p.scales(b + i, g), p.h, o.group_sum,
                                      (m + j) * p.h.groups + g));
      }
  }
  for (int i = 0; i < NB; ++i)
    for (int j = 0; j < MR; ++j)
      finish(p, _mm512_load_ps(acc + (i * MR + j) * kRows), b + i, bias, y + (m + j) * p.h.n);
}

// A block's u as bytes, divided by Times.
template <PackedKind K, int L>
LOWBIT_FN void to_bytes(const Packed& p, int64_t block, uint8_t* out) {
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K), steps = L / 4;
  const int64_t stride = p.stride(block);
  const V lut = table_of(p.h);
  const Times times = packed_times(p.h);
  const int shift_a = times.a == 2, shift_b = times.b == 32 ? 5 : times.b == 16 ? 4 : times.b == 8 ? 3 : 0;
  for (int64_t unit = 0; unit < p.units; ++unit, out += steps * 128) {
    const uint8_t* from = p.codes(block, unit);
    if (block % 2 == 0) ask_for(from - block % Packed::kPanel * 64 + kAhead, p.vectors * stride);  // for all its blocks
    for (int t = 0; t < steps / S; ++t, from += kVectors * stride) {
      V a[4], b[4];
      expand<K>(from, stride, lut, a, b);
      for (int k = 0; k < S; ++k) {  // no bit crosses into the next byte: they are multiples
        _mm512_storeu_si512(out + (t * S + k) * 64, _mm512_srli_epi16(a[k], static_cast<unsigned>(shift_a)));
        _mm512_storeu_si512(out + (steps + t * S + k) * 64, _mm512_srli_epi16(b[k], static_cast<unsigned>(shift_b)));
      }
    }
  }
}

using FewFn = void (*)(const Packed&, const Operand&, int64_t m, int64_t b, const float* bias, float* y);
using ManyFn = void (*)(const Packed&, const uint8_t* const*, const Operand&, int64_t m, int64_t b, const float*,
                        float*);
using BytesFn = void (*)(const Packed&, int64_t block, uint8_t* out);

struct Kernels {
  FewFn one[3];    // one token: 4, 2, 1 blocks
  FewFn some[3];   // 4, 3, 2 tokens: a block
  FewFn panel[3];  // the same: 4 blocks
  BytesFn bytes;
};

template <PackedKind K, int L>
constexpr Kernels kernels_for() {
  return {{one<K, L, 4>, one<K, L, 2>, one<K, L, 1>},
          {some<K, L, 4, 1>, some<K, L, 3, 1>, some<K, L, 2, 1>},
          {some<K, L, 4, 4>, some<K, L, 3, 4>, some<K, L, 2, 4>},
          to_bytes<K, L>};
}

template <PackedKind K>
constexpr Kernels kKernels[2] = {kernels_for<K, 32>(), kernels_for<K, 16>()};

const Kernels& kernels_of(const Packed& p) {
  const int i = p.seg.length == 16;
  switch (p.h.kind) {
    case PackedKind::k1: return kKernels<PackedKind::k1>[i];
    case PackedKind::k2: return kKernels<PackedKind::k2>[i];
    case PackedKind::k3: return kKernels<PackedKind::k3>[i];
    case PackedKind::k2Table: return kKernels<PackedKind::k2Table>[i];
    case PackedKind::k3Table: return kKernels<PackedKind::k3Table>[i];
    case PackedKind::k4Table: return kKernels<PackedKind::k4Table>[i];
    case PackedKind::k4: return kKernels<PackedKind::k4>[i];
    case PackedKind::kBytes: break;
  }
  return kKernels<PackedKind::kBytes>[i];
}

constexpr ManyFn kMany1[7] = {nullptr,    many<1, 1>, many<2, 1>, many<3, 1>, many<4, 1>, many<5, 1>, many<6, 1>};
constexpr ManyFn kMany2[7] = {nullptr,    many<1, 2>, many<2, 2>, many<3, 2>, many<4, 2>, many<5, 2>, many<6, 2>};

void run_many(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias,
              float* y) {
  static thread_local std::vector<uint8_t> room;
  const int64_t size = p.seg.row_size() * kRows;
  if (static_cast<int64_t>(room.size()) < 2 * size + 64) room.resize(static_cast<size_t>(2 * size + 64));
  uint8_t* aligned = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
  for (int64_t b = b0; b < b1; b += 2) {
    const int64_t count = std::min<int64_t>(2, b1 - b);
    const uint8_t* w[2] = {aligned, aligned + size};
    for (int64_t i = 0; i < count; ++i) kernels_of(p).bytes(p, b + i, aligned + i * size);
    const ManyFn* fns = count == 2 ? kMany2 : kMany1;
    for (int64_t m = m0; m < m1; m += 6) {
      const int64_t tokens = std::min<int64_t>(6, m1 - m);
      fns[tokens](p, w, o, m, b, bias, y);
    }
  }
}

}  // namespace

void linear_int8_avx512(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                        const float* bias, float* y) {
  if (o.unpacked) return run_many(p, o, m0, m1, b0, b1, bias, y);
  const Kernels& k = kernels_of(p);
  int64_t m = m0;
  for (; m1 - m >= 2; m += std::min<int64_t>(4, m1 - m)) {
    const int64_t i = 4 - std::min<int64_t>(4, m1 - m);
    for (int64_t b = b0; b < b1;) {
      const bool panel = b % Packed::kPanel == 0 && b + Packed::kPanel <= b1;
      (panel ? k.panel : k.some)[i](p, o, m, b, bias, y);
      b += panel ? Packed::kPanel : 1;
    }
  }
  if (m == m1) return;
  for (int64_t b = b0; b < b1;) {
    const int64_t left = std::min(b1, (b / Packed::kPanel + 1) * Packed::kPanel) - b;  // in this panel
    const int i = left == 4 ? 0 : left >= 2 ? 1 : 2;
    k.one[i](p, o, m, b, bias, y);
    b += 4 >> i;
  }
}

// scalar: a = max|x|, q = round_to_even(x * 127/a)
LOWBIT_FN void quantize_avx512(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  constexpr float kTiny = 1e-30f;  // as scalar
  const V magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t s = 0; s < seg.padded; ++s, q += seg.length) {
    const int64_t len = s < seg.count ? seg.size(s) : 0;
    const uint32_t lanes = len >= 32 ? ~0u : (1u << len) - 1;
    const float* xs = x + (len ? seg.begin(s) : 0);
    const __m512 v0 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), xs);
    const __m512 v1 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), xs + (len > 16 ? 16 : 0));
    // bits of |x| are ordered like |x|, with NaN > Inf > all numbers
    const V most = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(v0), magnitude),
                                    _mm512_and_si512(_mm512_castps_si512(v1), magnitude));
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float a;
    std::memcpy(&a, &bits, sizeof a);
    const bool finite = bits < 0x7f800000, zero = !finite || a < kTiny;
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / a);
    const V i0 = zero ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse));
    const V i1 = zero ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse));
    scale[s] = zero ? (finite ? 0.0f : __builtin_nanf("")) : a / 127.0f;
    sum[s] = _mm512_reduce_add_epi32(_mm512_add_epi32(i0, i1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(i0));
    if (seg.length == 32) _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(i1));
  }
}

}  // namespace lowbit
#endif
