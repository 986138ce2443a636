// AVX-512 row of sparse products: a window of x is two registers, and one shuffle fetches what a step's places want.
//   kInt    equals scalar bit for bit: |sum of digits * values| <= 2^31 / (255*127) > 66000 places in a row, which
//           `few_int` cuts in pieces of kPieces steps of 4
//   kFloat  |y - y_scalar| <= (64 + places/64) * 2^-24 * sum |x*value|   (64 terms at a time)
//   many    |y - y_scalar| <= (129 + K/128) * 2^-24 * sum |x*value|   (the terms of a tile at a time)
#include "avx512.h"
#include "sparse.h"

#if LOWBIT_X86
#include <algorithm>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define LOWBIT_FN LOWBIT_AVX512_WITH("avx512vbmi,avx512vnni")
#define LOWBIT_INLINE LOWBIT_AVX512_INLINE_WITH("avx512vbmi,avx512vnni")

namespace lowbit {
namespace {

constexpr int64_t kRows = Steps::kRows, kPieces = 1 << 14;

LOWBIT_INLINE __mmask16 rows_of(const Steps& s, int64_t p) {
  return static_cast<__mmask16>((1u << std::min(kRows, s.h.n - p * kRows)) - 1);
}

constexpr int64_t kAhead = 16;  // steps: their places come from the last-level cache, faster when asked for in time

LOWBIT_INLINE void ask_for(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

template <int T>
LOWBIT_FN void few(const Steps& s, const float* const* x, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t p = p0; p < p1; ++p) {
    __m512 total[T];
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m512 acc[T];
      for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
      for (const int64_t end = std::min<int64_t>(i + kPartial, s.first[p + 1]); i < end; ++i) {
        ask_for(values + (i + kAhead) * kRows);
        const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.offset + i * kRows)));
        const __m512 value = _mm512_loadu_ps(values + i * kRows);
        for (int t = 0; t < T; ++t) {
          const float* from = x[t] + s.column[i];
          acc[t] = _mm512_fmadd_ps(_mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + 16)), value,
                                   acc[t]);
        }
      }
      for (int t = 0; t < T; ++t) total[t] = _mm512_add_ps(total[t], acc[t]);
    }
    const __mmask16 mask = rows_of(s, p);
    float* to = y + p * kRows;
    for (int t = 0; t < T; ++t, to += s.h.n)
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), total[t]));
  }
}

// acc += d * v, in place: around the intrinsic GCC 12 copies each accumulator once a turn.
LOWBIT_INLINE __m512i dot4(__m512i acc, __m512i d, __m512i v) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(d), "v"(v));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, d, v);
#endif
}

// Eight rows: 2^7 a + b
LOWBIT_INLINE __m512i whole(__m256i a, __m256i b) {
  return _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(a), 7), _mm512_cvtepi32_epi64(b));
}

// scalar: (acc - sum * 2^14) * (scale * factor), eight rows
LOWBIT_INLINE __m256 finish(__m512i acc, const int64_t* sum, __m512d scale, const float* factor) {
  acc = _mm512_sub_epi64(acc, _mm512_slli_epi64(_mm512_loadu_si512(sum), 14));
  return _mm512_cvtpd_ps(
      _mm512_mul_pd(_mm512_cvtepi64_pd(acc), _mm512_mul_pd(scale, _mm512_cvtps_pd(_mm256_loadu_ps(factor)))));
}

// kCoded: a step's 64 codes are spread to bytes, and looked up in the panel's table of sixteen rows.
template <int T, bool kCoded>
LOWBIT_FN void few_int(const Steps& s, const Digits* x, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  const __m512i shifts = _mm512_set1_epi64(0x1c1814100c080400), three = _mm512_set1_epi8(Steps::kValues - 1);
  const __m512i of_row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(0x01010101 * Steps::kValues));
  for (int64_t p = p0; p < p1; ++p) {
    const int8_t* table = s.table + p * kRows * Steps::kValues;
    const __m512i table0 = kCoded ? _mm512_loadu_si512(table) : of_row;
    const __m512i table1 = kCoded ? _mm512_loadu_si512(table + 64) : of_row;
    __m512i low[T], high[T];
    for (int t = 0; t < T; ++t) low[t] = high[t] = _mm512_setzero_si512();
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m512i acc[T][2];
      for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_si512();
      for (const int64_t end = std::min<int64_t>(i + kPieces, s.first[p + 1]); i < end; ++i) {
        ask_for(s.offset + (i + kAhead) * 64);
        if (kCoded) ask_for(s.code + (i + kAhead) * 32);
        else ask_for(values + (i + kAhead) * 64);
        const __m512i at = _mm512_loadu_si512(s.offset + i * 64);
        __m512i v;
        if (kCoded) {
          const __m512i pairs =
              _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.code + i * 32)));
          const __m512i codes = _mm512_multishift_epi64_epi8(shifts, pairs);
          v = _mm512_permutex2var_epi8(table0, _mm512_ternarylogic_epi32(codes, three, of_row, 0xea), table1);
        } else {
          v = _mm512_loadu_si512(values + i * 64);
        }
        const int64_t column = s.column[i];
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < 2; ++j) {
            const uint8_t* from = x[t].d[j] + column;
            const __m512i d = _mm512_permutex2var_epi8(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + 64));
            acc[t][j] = dot4(acc[t][j], d, v);
          }
      }
      for (int t = 0; t < T; ++t) {
        low[t] = _mm512_add_epi64(low[t], whole(_mm512_castsi512_si256(acc[t][0]), _mm512_castsi512_si256(acc[t][1])));
        high[t] = _mm512_add_epi64(high[t], whole(_mm512_extracti64x4_epi64(acc[t][0], 1),
                                                  _mm512_extracti64x4_epi64(acc[t][1], 1)));
      }
    }
    const int64_t n = p * kRows;
    const __mmask16 mask = rows_of(s, p);
    float* to = y + n;
    for (int t = 0; t < T; ++t, to += s.h.n) {
      const __m512d scale = _mm512_set1_pd(x[t].scale);
      const __m512 found = _mm512_insertf32x8(_mm512_castps256_ps512(finish(low[t], s.sum + n, scale, s.factor + n)),
                                              finish(high[t], s.sum + n + 8, scale, s.factor + n + 8), 1);
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), found));
    }
  }
}

void few_tokens(const Steps& s, const float* const* x, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  constexpr decltype(&few<1>) of[kFewTokens] = {few<1>, few<2>, few<3>, few<4>};
  of[tokens - 1](s, x, p0, p1, y);
}

void few_int_tokens(const Steps& s, const Digits* x, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  constexpr decltype(&few_int<1, false>) of[2][kFewTokens] = {
      {few_int<1, false>, few_int<2, false>, few_int<3, false>, few_int<4, false>},
      {few_int<1, true>, few_int<2, true>, few_int<3, true>, few_int<4, true>}};
  of[s.h.coded][tokens - 1](s, x, p0, p1, y);
}

// Pairs, then fours of rows change places within lanes of 128 bits; then the lanes.
LOWBIT_FN void turn(const float* from, int64_t ld_from, float* to, int64_t ld_to, bool add) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[i + h]), high = _mm512_castps_pd(b[i + 2 + h]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 even[2] = {_mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd), _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd)};
    b[c] = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
    b[12 + c] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
  }
  for (int j = 0; j < 16; ++j) {
    float* out = to + j * ld_to;
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), b[j]) : b[j]);
  }
}

constexpr int V = kSparseTokens / 16;

// A tile's group: four rows take a place each in turn, so that no sum waits for itself.
LOWBIT_INLINE void add_group(const SparseGroup& g, const float* value, const uint8_t* offset, const float* xt, float* yt) {
  __m512 acc[4][V];
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < g.count; ++i)
    for (int r = 0; r < 4; ++r) {
      const __m512 times = _mm512_set1_ps(value[4 * i + r]);
      const float* from = xt + offset[4 * i + r] * kSparseTokens;
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(times, _mm512_load_ps(from + 16 * v), acc[r][v]);
    }
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = yt + g.row[r] * kSparseTokens + 16 * v;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), acc[r][v]));
    }
}

LOWBIT_FN void many(const Steps& s, const float* xt, int64_t down, float* yt) {
  const bool integer = s.h.kind == SparseKind::kInt;
  const SparseGroup* group = s.group + down * s.tiles_across() * Steps::kGroups;
  const int64_t first = 4 * static_cast<int64_t>(s.quad[down]);
  const uint8_t* offset = s.tile_offset + first;
  const float* floats = static_cast<const float*>(s.tile_value) + (integer ? 0 : first);
  const int8_t* bytes = static_cast<const int8_t*>(s.tile_value) + first;
  alignas(64) float value[4 * Steps::kTileColumns];
  for (int64_t i = 0; i < Steps::kTileRows * kSparseTokens; i += 16) _mm512_store_ps(yt + i, _mm512_setzero_ps());
  for (int64_t tile = 0; tile < s.tiles_across(); ++tile, xt += Steps::kTileColumns * kSparseTokens)
    for (int64_t g = 0; g < Steps::kGroups; ++g, ++group) {
      const int64_t slots = 4 * group->count;
      if (slots == 0) continue;
      if (integer) {
        for (int64_t i = 0; i < slots; i += 16)
          _mm512_store_ps(value + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)))));
        add_group(*group, value, offset, xt, yt);
      } else {
        add_group(*group, floats, offset, xt, yt);
        floats += slots;
      }
      offset += slots;
      bytes += slots;
    }
  if (integer)
    for (int64_t r = 0; r < std::min(Steps::kTileRows, s.h.n - down * Steps::kTileRows); ++r) {
      const __m512 factor = _mm512_set1_ps(s.factor[down * Steps::kTileRows + r]);
      for (int v = 0; v < V; ++v) {
        float* to = yt + r * kSparseTokens + 16 * v;
        _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), factor));
      }
    }
}

LOWBIT_FN Digits digits(const float* x, int64_t k, int64_t ld, uint8_t* d) { return digits_of(x, k, ld, d); }

}  // namespace

const SparseRow sparse_avx512 = {few_tokens, few_int_tokens, many, turn, digits};

}  // namespace lowbit
#endif
