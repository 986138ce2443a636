// AVX2 rows of `quantize` and `linear_int8`: equal to scalar bit for bit.
//
// A step's 64 bytes are two vectors of eight rows. maddubs(u, q) adds two products in int16 *with saturation*, so the
// integer dot product takes one of three forms, by the span of the levels:
//   narrow  u <= 16 (32 for segments of 16): int16 sums over a whole segment, 16*2*127*8 = 32512, widened once
//   wide    u <= 129: 2*129*127 = 32766, widened at every step
//   sign    any int8 level: maddubs(|level|, q with the level's sign), 2*128*127 = 32512, widened at every step;
//           activations are never -128, which would survive the change of sign
// In the first two dot = low * sum(q) + sum u*q.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_FN
#define LOWBIT_INLINE static __forceinline
#else
#define LOWBIT_FN __attribute__((target("avx2,fma,f16c")))
#define LOWBIT_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))
#endif

namespace lowbit {
namespace {

constexpr float kTiny = 1e-30f;  // as scalar
using V = __m256i;
using F8 = __m256;
constexpr int64_t kRows = Packed::kRows, kMostSteps = 8;
enum class Form { kNarrow, kWide, kSign };

LOWBIT_INLINE V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
LOWBIT_INLINE void store(uint8_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
LOWBIT_INLINE V low_bits(V v, int shift, int mask) {
  return _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8(static_cast<char>(mask)));
}

struct Luts {  // code -> u of the table kinds and of k1
  alignas(16) uint8_t v[16];
};

Luts luts_of(const PackedHeader& h) {
  Luts t;
  std::memcpy(t.v, h.lut, 16);
  if (h.kind == PackedKind::k1) t.v[1] = static_cast<uint8_t>(h.times);
  return t;
}

template <PackedKind K>
LOWBIT_INLINE V look(V code, V lut) {
  return K == PackedKind::k2 || K == PackedKind::k3 || K == PackedKind::k4 ? code : _mm256_shuffle_epi8(lut, code);
}

// One unit's u as bytes, of NB blocks side by side, `room` bytes for each: A's steps, then B's. The vectors of a block are
// `stride` apart; they are read in the order of memory.
template <PackedKind K, int NB>
LOWBIT_INLINE void expand_unit(const uint8_t* p, int64_t stride, int64_t steps, V lut, uint8_t* out, int64_t room) {
  constexpr bool kEven2 = K == PackedKind::k2 || K == PackedKind::k2Table;
  constexpr int kPer = K == PackedKind::k1 || K == PackedKind::k3 || K == PackedKind::k3Table ? 4 : kEven2 ? 2 : 1;
  constexpr int kVectors = K == PackedKind::k3 || K == PackedKind::k3Table ? 3 : K == PackedKind::kBytes ? 2 : 1;
  for (int64_t j = 0; j < steps / kPer; ++j, p += kVectors * stride)
    for (int at = 0; at < 64 * NB; at += 32) {
      uint8_t *a = out + at / 64 * room + at % 64 + 64 * kPer * j, *b = a + steps * 64;
      const V v = load(p + at);
      if (K == PackedKind::kBytes) {
        store(a, v);
        store(b, load(p + stride + at));
      } else if (K == PackedKind::k4 || K == PackedKind::k4Table) {
        store(a, look<K>(low_bits(v, 0, 15), lut));
        store(b, look<K>(low_bits(v, 4, 15), lut));
      } else if (kEven2) {
        for (int i = 0; i < 2; ++i) {
          store(a + 64 * i, look<K>(low_bits(v, 2 * i, 3), lut));
          store(b + 64 * i, look<K>(low_bits(v, 4 + 2 * i, 3), lut));
        }
      } else if (K == PackedKind::k1) {
        for (int i = 0; i < 4; ++i) {
          store(a + 64 * i, look<K>(low_bits(v, i, 1), lut));
          store(b + 64 * i, look<K>(low_bits(v, 4 + i, 1), lut));
        }
      } else {  // three bits: the fourth step is spread over the upper two bits of three vectors
        const V w[3] = {v, load(p + stride + at), load(p + 2 * stride + at)};
        const V fourth = _mm256_or_si256(_mm256_or_si256(low_bits(w[0], 6, 3), low_bits(w[1], 4, 12)),
                                         low_bits(w[2], 2, 48));
        for (int i = 0; i < 4; ++i) {
          const V s = i < 3 ? w[i] : fourth;
          store(a + 64 * i, look<K>(low_bits(s, 0, 7), lut));
          store(b + 64 * i, look<K>(low_bits(s, 3, 7), lut));
        }
      }
    }
}

// scalar: dot = sum level * q over one segment, 16 rows in two halves, for MR tokens
template <Form F, int MR>
LOWBIT_INLINE void dots(const uint8_t* u, const int8_t* q, int64_t ld, int64_t steps, V low, V dot[MR][2]) {
  const V ones = _mm256_set1_epi16(1);
  for (int j = 0; j < MR; ++j) dot[j][0] = dot[j][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < steps; ++t, u += 64, q += 4) {
    V w[2] = {load(u), load(u + 32)}, magnitude[2];
    if (F == Form::kSign)
      for (int h = 0; h < 2; ++h) {
        w[h] = _mm256_add_epi8(w[h], low);
        magnitude[h] = _mm256_abs_epi8(w[h]);
      }
    for (int j = 0; j < MR; ++j) {
      int32_t four;
      std::memcpy(&four, q + j * ld, sizeof four);
      const V x = _mm256_set1_epi32(four);
      for (int h = 0; h < 2; ++h) {
        if (F == Form::kNarrow)
          dot[j][h] = _mm256_add_epi16(dot[j][h], _mm256_maddubs_epi16(w[h], x));
        else if (F == Form::kWide)
          dot[j][h] = _mm256_add_epi32(dot[j][h], _mm256_madd_epi16(_mm256_maddubs_epi16(w[h], x), ones));
        else
          dot[j][h] = _mm256_add_epi32(
              dot[j][h], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(x, w[h])), ones));
      }
    }
  }
  if (F == Form::kNarrow)
    for (int j = 0; j < MR; ++j)
      for (int h = 0; h < 2; ++h) dot[j][h] = _mm256_madd_epi16(dot[j][h], ones);
}

LOWBIT_INLINE F8 meta(const uint8_t* p, bool wide, int i, int half) {  // i = 0: scales, 1: zeros
  if (wide) return _mm256_loadu_ps(reinterpret_cast<const float*>(p + 64 * i + 32 * half));
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32 * i + 16 * half)));
}

// scalar: y = acc * step + bias
LOWBIT_INLINE void finish(const Packed& p, F8 acc, int64_t block, int half, const float* bias, float* y) {
  const int64_t n0 = block * kRows + 8 * half;
  if (n0 >= p.h.n) return;
  const V mask = first_lanes(std::min<int64_t>(8, p.h.n - n0));
  acc = _mm256_mul_ps(acc, _mm256_loadu_ps(p.step(block) + 8 * half));
  if (bias) acc = _mm256_add_ps(acc, _mm256_maskload_ps(bias + n0, mask));
  _mm256_maskstore_ps(y + n0, mask, acc);
}

// Tokens [m, m+MR) times blocks [b, b+NB) of one panel: codes expanded unit by unit, or (one block, K is kBytes) their
// u as `bytes`.
template <PackedKind K, Form F, int MR, int NB>
LOWBIT_FN void tile(const Packed& p, const uint8_t* bytes, const Operand& o, int64_t m, int64_t b, const float* bias,
                    float* y) {
  const int64_t ld = p.seg.row_size(), lds = p.seg.padded, steps = p.seg.length / 4;
  const Luts luts = luts_of(p.h);
  const V lut = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(luts.v)));
  const V low = _mm256_set1_epi8(static_cast<char>(p.h.low));
  alignas(64) uint8_t room[NB][kMostSteps * 128];
  F8 part[NB][MR][2], acc[NB][MR][2];
  for (int i = 0; i < NB; ++i)
    for (int j = 0; j < MR; ++j)
      for (int h = 0; h < 2; ++h) part[i][j][h] = acc[i][j][h] = _mm256_setzero_ps();
  const int64_t stride = p.stride(b), side = b % Packed::kPanel, of_panel = p.scales_bytes(p.width(b));
  const uint8_t* from = p.panel(b);
  int64_t in_group = 0, g = 0;
  for (int64_t s = 0; s < p.seg.count; ++s) {
    if (s % 2 == 0) {
      if (!bytes) expand_unit<K, NB>(from + side * 64, stride, steps, lut, room[0], sizeof room[0]);
      from += p.vectors * stride;
    }
    for (int i = 0; i < NB; ++i) {
      V dot[MR][2];
      dots<F, MR>(bytes ? bytes + s * steps * 64 : room[i] + s % 2 * steps * 64, o.t.q + m * ld + s * p.seg.length, ld, steps, low, dot);
      for (int j = 0; j < MR; ++j) {
        const int64_t at = (m + j) * lds + s;
        const V start = _mm256_set1_epi32(F == Form::kSign ? 0 : p.h.low * o.t.sum[at]);
        const F8 scale = _mm256_set1_ps(o.t.scale[at]);
        for (int h = 0; h < 2; ++h)
          part[i][j][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(dot[j][h], start)), scale, part[i][j][h]);
      }
    }
    if (++in_group < p.seg.per_group) continue;
    for (int i = 0; i < NB; ++i) {
      const uint8_t* scales = from + (side + i) * p.group_bytes();
      for (int h = 0; h < 2; ++h) {  // scalar: part -= zero * group_sum;  acc += part * scale
        const F8 scale = meta(scales, p.h.wide, 0, h);
        for (int j = 0; j < MR; ++j) {
          if (o.group_sum)
            part[i][j][h] = _mm256_fnmadd_ps(meta(scales, p.h.wide, 1, h),
                                             _mm256_set1_ps(o.group_sum[(m + j) * p.h.groups + g]), part[i][j][h]);
          acc[i][j][h] = _mm256_fmadd_ps(part[i][j][h], scale, acc[i][j][h]);
          part[i][j][h] = _mm256_setzero_ps();
        }
      }
    }
    from += of_panel;
    in_group = 0;
    ++g;
  }
  for (int i = 0; i < NB; ++i)
    for (int j = 0; j < MR; ++j)
      for (int h = 0; h < 2; ++h) finish(p, acc[i][j][h], b + i, h, bias, y + (m + j) * p.h.n);
}

template <PackedKind K>
LOWBIT_FN void to_bytes(const Packed& p, int64_t block, uint8_t* out) {
  const int64_t steps = p.seg.length / 4;
  const Luts luts = luts_of(p.h);
  const V lut = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(luts.v)));
  for (int64_t unit = 0; unit < p.units; ++unit)
    expand_unit<K, 1>(p.codes(block, unit), p.stride(block), steps, lut, out + unit * steps * 128, 0);
}

using TileFn = void (*)(const Packed&, const uint8_t*, const Operand&, int64_t m, int64_t b, const float*, float*);
using BytesFn = void (*)(const Packed&, int64_t block, uint8_t* out);
constexpr int64_t kMostTokens = 4;
struct Tiles {
  TileFn of[kMostTokens + 1];  // tokens times one block
  TileFn panel;                // one token times four blocks
};
struct Kernels {
  Tiles narrow, wide, sign;
  BytesFn bytes;
};

template <PackedKind K, Form F>
constexpr Tiles tiles() {
  return {{nullptr, tile<K, F, 1, 1>, tile<K, F, 2, 1>, tile<K, F, 3, 1>, tile<K, F, 4, 1>}, tile<K, F, 1, 4>};
}
template <PackedKind K>
constexpr Kernels kEven = {tiles<K, Form::kNarrow>(), {}, {}, to_bytes<K>};
template <PackedKind K>
constexpr Kernels kAny = {tiles<K, Form::kNarrow>(), tiles<K, Form::kWide>(), tiles<K, Form::kSign>(), to_bytes<K>};
constexpr Kernels kFromBytes = {tiles<PackedKind::kBytes, Form::kNarrow>(), tiles<PackedKind::kBytes, Form::kWide>(),
                                tiles<PackedKind::kBytes, Form::kSign>(), to_bytes<PackedKind::kBytes>};

const Kernels& kernels_of(PackedKind kind) {
  switch (kind) {
    case PackedKind::k1: return kEven<PackedKind::k1>;
    case PackedKind::k2: return kEven<PackedKind::k2>;
    case PackedKind::k3: return kEven<PackedKind::k3>;
    case PackedKind::k4: return kEven<PackedKind::k4>;
    case PackedKind::k2Table: return kAny<PackedKind::k2Table>;
    case PackedKind::k3Table: return kAny<PackedKind::k3Table>;
    case PackedKind::k4Table: return kAny<PackedKind::k4Table>;
    case PackedKind::kBytes: break;
  }
  return kFromBytes;
}

const Tiles& tiles_of(const Packed& p, const Kernels& k) {
  const int64_t steps = p.seg.length / 4;
  if (p.h.span * 2 * 127 * steps <= 32767) return k.narrow;  // even grids always: 15*2*127*8 = 30480
  return p.h.span <= 129 ? k.wide : k.sign;
}

LOWBIT_INLINE F8 load_part(const float* x, int64_t at, int64_t len) {
  return at + 8 <= len ? _mm256_loadu_ps(x + at)
         : at < len    ? _mm256_maskload_ps(x + at, first_lanes(len - at))
                       : _mm256_setzero_ps();
}

}  // namespace

void linear_int8_avx2(const Packed& p, const Operand& o, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                      const float* bias, float* y) {
  static thread_local std::vector<uint8_t> room;
  const Kernels& k = kernels_of(p.h.kind);
  const bool expand = m1 - m0 > kMostTokens;
  const Tiles& tiles = tiles_of(p, expand ? kFromBytes : k);
  if (expand) room.resize(std::max(room.size(), static_cast<size_t>(p.seg.row_size() * kRows)));
  int64_t b = b0;
  for (; m1 - m0 == 1 && b % Packed::kPanel == 0 && b + Packed::kPanel <= b1; b += Packed::kPanel)
    tiles.panel(p, nullptr, o, m0, b, bias, y);
  for (; b < b1; ++b) {
    if (expand) k.bytes(p, b, room.data());
    for (int64_t m = m0; m < m1; m += kMostTokens) {
      const int64_t tokens = std::min(kMostTokens, m1 - m);
      tiles.of[tokens](p, expand ? room.data() : nullptr, o, m, b, bias, y);
    }
  }
}

// scalar: a = max|x|, q = round_to_even(x * 127/a)
LOWBIT_FN void quantize_avx2(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t s = 0; s < seg.padded; ++s, q += seg.length) {
    const int64_t len = s < seg.count ? seg.size(s) : 0;
    const float* xs = x + (len ? seg.begin(s) : 0);
    __m256i most = _mm256_setzero_si256();  // bits of |x| are ordered like |x|, with NaN > Inf > all numbers
    for (int64_t i = 0; i < len; i += 8)
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load_part(xs, i, len)), magnitude));
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    const int32_t bits = *std::max_element(lanes, lanes + 8);
    float a;
    std::memcpy(&a, &bits, sizeof a);
    sum[s] = 0;
    const bool finite = bits < 0x7f800000;
    scale[s] = finite ? 0.0f : std::nanf("");
    if (!finite || a < kTiny) {
      std::memset(q, 0, static_cast<size_t>(seg.length));
      continue;
    }
    scale[s] = a / 127.0f;
    const __m256 inverse = _mm256_set1_ps(127.0f / a);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < seg.length; i += 16) {  // cvtps rounds ties to even, as nearbyint
      const __m256i v0 = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(xs, i, len), inverse));
      const __m256i v1 = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(xs, i + 8, len), inverse));
      total = _mm256_add_epi32(total, _mm256_add_epi32(v0, v1));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v0, v1), 0xd8);  // undoes the per-lane pack
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), bytes);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    for (int32_t lane : lanes) sum[s] += lane;
  }
}

}  // namespace lowbit
#endif
