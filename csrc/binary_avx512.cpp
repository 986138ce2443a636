// AVX-512 with VPOPCNTDQ: a vector holds one 32-bit word of 16 outputs; lanes count, so nothing is summed across.
#include "avx512.h"
#include "binary.h"

#if LOWBIT_X86
namespace lowbit {
namespace {

#define TARGET LOWBIT_AVX512_WITH("avx512vpopcntdq,popcnt")
#define INLINE LOWBIT_AVX512_INLINE_WITH("avx512vpopcntdq,popcnt")

// Three-input logic, truth tables with the inputs in the order A, B, C = 0xF0, 0xCC, 0xAA.
constexpr int kSelect = (0xF0 & 0xCC) | (~0xF0 & 0xAA & 0xFF);  // A ? B : C
constexpr int kOrAnd = 0xF0 | (0xCC & 0xAA);                    // A | (B & C)

// acc += what one word adds (see word_dot in binary_scalar.cpp); the factor 2 and its sign come at the end.
template <BitKind K>
INLINE __m512i step(__m512i acc, __m512i a, __m512i an, __m512i w, __m512i wn) {
  switch (K) {
    case BitKind::kSign: return _mm512_add_epi32(acc, _mm512_popcnt_epi32(_mm512_xor_si512(a, w)));
    case BitKind::kZeroOne: return _mm512_add_epi32(acc, _mm512_popcnt_epi32(_mm512_and_si512(a, w)));
    case BitKind::kSignTernary:
      return _mm512_add_epi32(acc, _mm512_popcnt_epi32(_mm512_ternarylogic_epi32(a, w, wn, kSelect)));
    case BitKind::kZeroOneTernary:
      acc = _mm512_add_epi32(acc, _mm512_popcnt_epi32(_mm512_and_si512(a, w)));
      return _mm512_sub_epi32(acc, _mm512_popcnt_epi32(_mm512_and_si512(a, wn)));
    default: {
      const __m512i same = _mm512_ternarylogic_epi32(_mm512_and_si512(a, w), an, wn, kOrAnd);
      const __m512i other = _mm512_ternarylogic_epi32(_mm512_and_si512(a, wn), an, w, kOrAnd);
      return _mm512_sub_epi32(_mm512_add_epi32(acc, _mm512_popcnt_epi32(same)), _mm512_popcnt_epi32(other));
    }
  }
}

// P positions times V vectors of 16 outputs, the sums in registers. Lanes: at most taps * channels < 2^31.
// W: words of a tap where they are few and known, else 0.
template <BitKind K, int W, int P, int V>
TARGET void tile(const BitTile& t, int64_t p0, int64_t v0) {
  constexpr int planes = weight_planes(K);
  const int64_t words = W ? W : t.shape.words(), block = t.shape.taps * words * planes * 16;
  const uint32_t* w = static_cast<const uint32_t*>(t.w) + (t.n0 / 16 + v0) * block;
  __m512i acc[P][V];
  int32_t ones[P] = {};
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) acc[p][v] = _mm512_setzero_si512();
  for (int64_t tap = 0; tap < t.shape.taps; ++tap) {
    const uint32_t* const* from = t.a + tap * t.stride + p0;
    for (int64_t i = 0; i < words; ++i, w += planes * 16) {
      __m512i wp[V], wn[V];
      for (int v = 0; v < V; ++v) {
        wp[v] = _mm512_loadu_si512(w + v * block);
        wn[v] = planes == 2 ? _mm512_loadu_si512(w + v * block + 16) : wp[v];
      }
      for (int p = 0; p < P; ++p) {
        const __m512i a = _mm512_set1_epi32(static_cast<int>(from[p][i]));
        const __m512i an = K == BitKind::kTernary ? _mm512_set1_epi32(static_cast<int>(from[p][words + i])) : a;
        if (K == BitKind::kZeroOne) ones[p] += _mm_popcnt_u32(from[p][i]);
        for (int v = 0; v < V; ++v) acc[p][v] = step<K>(acc[p][v], a, an, wp[v], wn[v]);
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) {
      __m512i sum = acc[p][v];
      if (K == BitKind::kSign) sum = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 1));
      if (K == BitKind::kZeroOne)
        sum = _mm512_sub_epi32(_mm512_slli_epi32(sum, 1), _mm512_set1_epi32(ones[p]));
      if (K == BitKind::kSignTernary) sum = _mm512_slli_epi32(sum, 1);
      _mm512_storeu_si512(t.out + (p0 + p) * kBitBlock + (v0 + v) * 16, sum);
    }
}

template <BitKind K, int W, int V>
TARGET void columns(const BitTile& t, int64_t v0) {
  int64_t p = 0;
  for (; p + 4 <= t.pixels; p += 4) tile<K, W, 4, V>(t, p, v0);
  for (; p < t.pixels; ++p) tile<K, W, 1, V>(t, p, v0);
}

template <BitKind K, int W>
TARGET void rows(const BitTile& t) {
  switch ((t.n1 - t.n0 + 15) / 16) {
    case 4: return columns<K, W, 4>(t, 0);
    case 3: columns<K, W, 1>(t, 2);  // and the first two
      [[fallthrough]];
    case 2: return columns<K, W, 2>(t, 0);
    case 1: return columns<K, W, 1>(t, 0);
  }
}

template <BitKind K>
TARGET void any_words(const BitTile& t) {
  if (K == BitKind::kSign && t.shape.words() == 1) return rows<BitKind::kSign, 1>(t);
  if (K == BitKind::kSign && t.shape.words() == 2) return rows<BitKind::kSign, 2>(t);
  rows<K, 0>(t);
}

// bit c of word c/32 of position p, 16 positions at a time, for channels far apart (an NCHW image)
TARGET void binarize_planes(const BinarizeJob& j) {
  const int64_t words = (j.channels + 31) / 32;
  for (int64_t p = 0; p < j.pixels; p += 16) {
    const int64_t count = j.pixels - p < 16 ? j.pixels - p : 16;
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < words; ++i) {
      __m512i high = _mm512_setzero_si512(), low = high;
      const int64_t end = j.channels - i * 32 < 32 ? j.channels - i * 32 : 32;
      const float* x = j.x + p + i * 32 * j.channel_stride;
      for (int64_t c = 0; c < end; ++c, x += j.channel_stride) {
        const __m512 v = _mm512_maskz_loadu_ps(some, x);
        const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << c));
        const __mmask16 h = _mm512_cmp_ps_mask(v, _mm512_set1_ps(j.high[i * 32 + c]), _CMP_GE_OQ);
        high = _mm512_mask_or_epi32(high, h, high, bit);
        if (j.low) {
          const __mmask16 l = _mm512_cmp_ps_mask(v, _mm512_set1_ps(j.low[i * 32 + c]), _CMP_LE_OQ);
          low = _mm512_mask_or_epi32(low, l, low, bit);
        }
      }
      alignas(64) uint32_t lanes[32];
      _mm512_store_si512(lanes, high);
      _mm512_store_si512(lanes + 16, low);
      for (int64_t k = 0; k < count; ++k) {
        j.out[(p + k) * j.out_stride + i] = lanes[k];
        if (j.low) j.out[(p + k) * j.out_stride + words + i] = lanes[16 + k];
      }
    }
  }
}

TARGET uint32_t word_of(const float* x, const float* than, int64_t count, bool at_least) {
  uint32_t word = 0;
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 some = static_cast<__mmask16>(count - c >= 16 ? 0xFFFF : (1u << (count - c)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(some, x + c), limit = _mm512_maskz_loadu_ps(some, than + c);
    const __mmask16 bits = at_least ? _mm512_mask_cmp_ps_mask(some, v, limit, _CMP_GE_OQ)
                                    : _mm512_mask_cmp_ps_mask(some, v, limit, _CMP_LE_OQ);
    word |= static_cast<uint32_t>(bits) << c;
  }
  return word;
}

}  // namespace

TARGET void bit_tile_avx512(const BitTile& t) {
  switch (t.shape.kind) {
    case BitKind::kSign: return any_words<BitKind::kSign>(t);
    case BitKind::kZeroOne: return any_words<BitKind::kZeroOne>(t);
    case BitKind::kSignTernary: return any_words<BitKind::kSignTernary>(t);
    case BitKind::kZeroOneTernary: return any_words<BitKind::kZeroOneTernary>(t);
    case BitKind::kTernary: return any_words<BitKind::kTernary>(t);
  }
}

TARGET void bit_epilogue_avx512(const int32_t* dot, int64_t pixels, int64_t n0, int64_t n1, const BitEpilogue& e) {
  for (int64_t n = n0; n < n1; n += 16) {
    const __mmask16 some = static_cast<__mmask16>(n1 - n >= 16 ? 0xFFFF : (1u << (n1 - n)) - 1);
    const auto load = [&](const float* f) TARGET { return _mm512_maskz_loadu_ps(some, f + n); };
    const __m512i base = _mm512_maskz_loadu_epi32(some, e.base + n);
    const __m512 zero = _mm512_setzero_ps(), scale = load(e.scale), bias = e.bias ? load(e.bias) : zero;
    const __m512 shift = e.slope ? load(e.shift) : zero, slope = e.slope ? load(e.slope) : zero;
    const __m512 offset = e.slope ? load(e.offset) : zero, high = e.bits ? load(e.high) : zero;
    for (int64_t p = 0; p < pixels; ++p) {
      const __m512i sum = _mm512_add_epi32(base, _mm512_load_si512(dot + p * kBitBlock + n - n0));
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
      if (e.bias) v = _mm512_add_ps(v, bias);
      if (e.residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(some, e.residual + p * e.stride + n));
      if (e.slope) {
        v = _mm512_sub_ps(v, shift);
        const __mmask16 down = _mm512_cmp_ps_mask(v, zero, _CMP_NGT_UQ);
        v = _mm512_add_ps(_mm512_mask_mul_ps(v, down, v, slope), offset);
      }
      if (e.y) _mm512_mask_storeu_ps(e.y + p * e.stride + n, some, v);
      if (!e.bits) continue;
      const uint32_t bits = _mm512_mask_cmp_ps_mask(some, v, high, _CMP_GE_OQ);
      uint32_t& word = e.bits[p * e.bit_words + n / 32];
      word = n % 32 == 0 ? bits : word | bits << 16;
    }
  }
}

TARGET void binarize_avx512(const BinarizeJob& j) {
  if (j.pixel_stride == 1 && j.channel_stride != 1) return binarize_planes(j);
  if (j.channel_stride != 1) return binarize_scalar(j);
  const int64_t words = (j.channels + 31) / 32;
  for (int64_t p = 0; p < j.pixels; ++p)
    for (int64_t i = 0; i < words; ++i) {
      const int64_t count = j.channels - i * 32 < 32 ? j.channels - i * 32 : 32;
      const float* x = j.x + p * j.pixel_stride + i * 32;
      j.out[p * j.out_stride + i] = word_of(x, j.high + i * 32, count, true);
      if (j.low) j.out[p * j.out_stride + words + i] = word_of(x, j.low + i * 32, count, false);
    }
}

}  // namespace lowbit
#endif
