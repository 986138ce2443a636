// AVX2 row of sparse products.
//   kInt    equals scalar bit for bit: |sum of digits * values| <= 2^31 / (255*127) > 66000 places in a row, which
//           `few_int` cuts in pieces of kPieces steps of 4
//   kFloat  |y - y_scalar| <= (64 + places/64) * 2^-24 * sum |x*value|   (64 terms at a time)
//   many    |y - y_scalar| <= (129 + K/128) * 2^-24 * sum |x*value|   (the terms of a tile at a time)
#include "avx2.h"
#include "sparse.h"

#if LOWBIT_X86
#include <algorithm>

namespace lowbit {
namespace {

constexpr int64_t kRows = Steps::kRows, kPieces = 1 << 14;

// A window of 32 floats is four registers: each gives its own answer to the low three bits, the others choose.
LOWBIT_AVX2_INLINE __m256 look_up(const float* window, __m256i at) {
  __m256 found[4];
  for (int i = 0; i < 4; ++i) found[i] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 8 * i), at);
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)), bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));
  return _mm256_blendv_ps(_mm256_blendv_ps(found[0], found[1], bit3), _mm256_blendv_ps(found[2], found[3], bit3), bit4);
}

template <int T>
LOWBIT_AVX2 void few(const Steps& s, const float* const* x, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t p = p0; p < p1; ++p) {
    __m256 total[T][2];
    for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m256 acc[T][2];
      for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
      for (const int64_t end = std::min<int64_t>(i + kPartial, s.first[p + 1]); i < end; ++i)
        for (int h = 0; h < 2; ++h) {
          const int64_t slot = i * kRows + 8 * h;
          const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(s.offset + slot)));
          const __m256 value = _mm256_loadu_ps(values + slot);
          for (int t = 0; t < T; ++t) acc[t][h] = _mm256_fmadd_ps(look_up(x[t] + s.column[i], at), value, acc[t][h]);
        }
      for (int t = 0; t < T; ++t)
        for (int h = 0; h < 2; ++h) total[t][h] = _mm256_add_ps(total[t][h], acc[t][h]);
    }
    for (int t = 0; t < T; ++t) {
      float found[kRows];
      for (int h = 0; h < 2; ++h) _mm256_storeu_ps(found + 8 * h, total[t][h]);
      for (int64_t r = 0, n = p * kRows; r < kRows && n < s.h.n; ++r, ++n) y[t * s.h.n + n] += found[r];
    }
  }
}

// A window of 128 bytes is eight tables of sixteen: an offset of another table gets its high bit, for which the shuffle
// gives 0. Digits are at most 255 and 127: only the products of the second fit 16 bits in pairs.
template <int T>
LOWBIT_AVX2 void few_int(const Steps& s, const Digits* x, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  const __m256i one = _mm256_set1_epi16(1), low_byte = _mm256_set1_epi16(255), most = _mm256_set1_epi8(0x70);
  for (int64_t p = p0; p < p1; ++p) {
    int64_t total[T][kRows] = {};
    for (int64_t i = s.first[p]; i < s.first[p + 1];) {
      __m256i acc[T][2][2];  // of token, half of the rows, digit
      for (int t = 0; t < T; ++t)
        for (int h = 0; h < 2; ++h) acc[t][h][0] = acc[t][h][1] = _mm256_setzero_si256();
      for (const int64_t end = std::min<int64_t>(i + kPieces, s.first[p + 1]); i < end; ++i)
        for (int h = 0; h < 2; ++h) {
          const int64_t slot = i * 64 + 32 * h, column = s.column[i];
          const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.offset + slot));
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + slot));
          const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
          __m256i d[T][2];
          for (int t = 0; t < T; ++t) d[t][0] = d[t][1] = _mm256_setzero_si256();
          for (int table = 0; table < 8; ++table) {
            const __m256i mine = _mm256_xor_si256(at, _mm256_set1_epi8(static_cast<char>(16 * table)));
            const __m256i index = _mm256_adds_epu8(mine, most);
            for (int t = 0; t < T; ++t)
              for (int j = 0; j < 2; ++j) {
                const __m256i from = _mm256_broadcastsi128_si256(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[t].d[j] + column + 16 * table)));
                d[t][j] = _mm256_or_si256(d[t][j], _mm256_shuffle_epi8(from, index));
              }
          }
          for (int t = 0; t < T; ++t) {
            const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(d[t][0], low_byte), even),
                                                  _mm256_madd_epi16(_mm256_srli_epi16(d[t][0], 8), odd));
            acc[t][h][0] = _mm256_add_epi32(acc[t][h][0], high);
            acc[t][h][1] = _mm256_add_epi32(acc[t][h][1], _mm256_madd_epi16(_mm256_maddubs_epi16(d[t][1], v), one));
          }
        }
      for (int t = 0; t < T; ++t)
        for (int h = 0; h < 2; ++h) {
          int32_t found[2][8];
          for (int j = 0; j < 2; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(found[j]), acc[t][h][j]);
          for (int r = 0; r < 8; ++r) total[t][8 * h + r] += int64_t{found[0][r]} * 128 + found[1][r];
        }
    }
    for (int t = 0; t < T; ++t)
      for (int64_t r = 0, n = p * kRows; r < kRows && n < s.h.n; ++r, ++n)
        y[t * s.h.n + n] += static_cast<float>(static_cast<double>(total[t][r] - s.sum[n] * (1 << 14)) *
                                               (static_cast<double>(x[t].scale) * s.factor[n]));
  }
}

void few_tokens(const Steps& s, const float* const* x, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  constexpr decltype(&few<1>) of[kFewTokens] = {few<1>, few<2>, few<3>, few<4>};
  of[tokens - 1](s, x, p0, p1, y);
}

void few_int_tokens(const Steps& s, const Digits* x, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  constexpr decltype(&few_int<1>) of[kFewTokens] = {few_int<1>, few_int<2>, few_int<3>, few_int<4>};
  of[tokens - 1](s, x, p0, p1, y);
}

constexpr int V = 2;  // vectors of eight tokens: with four rows, eight sums

LOWBIT_AVX2 void many(const Steps& s, const float* xt, int64_t down, float* yt) {
  const bool integer = s.h.kind == SparseKind::kInt;
  const SparseGroup* group = s.group + down * s.tiles_across() * Steps::kGroups;
  int64_t at = 4 * static_cast<int64_t>(s.quad[down]);
  std::fill(yt, yt + Steps::kTileRows * kSparseTokens, 0.0f);
  float value[4 * Steps::kTileColumns];
  for (int64_t tile = 0; tile < s.tiles_across(); ++tile, xt += Steps::kTileColumns * kSparseTokens)
    for (int64_t g = 0; g < Steps::kGroups; ++g, ++group) {
      const int64_t slots = 4 * group->count;
      for (int64_t i = 0; i < slots; ++i)
        value[i] = integer ? static_cast<const int8_t*>(s.tile_value)[at + i]
                           : static_cast<const float*>(s.tile_value)[at + i];
      for (int64_t m = 0; m < kSparseTokens; m += 8 * V) {
        __m256 acc[4][V];
        for (int r = 0; r < 4; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_ps();
        for (int64_t i = 0; i < slots; i += 4)
          for (int r = 0; r < 4; ++r) {
            const __m256 times = _mm256_set1_ps(value[i + r]);
            const float* from = xt + s.tile_offset[at + i + r] * kSparseTokens + m;
            for (int v = 0; v < V; ++v) acc[r][v] = _mm256_fmadd_ps(times, _mm256_loadu_ps(from + 8 * v), acc[r][v]);
          }
        for (int r = 0; r < 4; ++r)
          for (int v = 0; v < V; ++v) {
            float* to = yt + group->row[r] * kSparseTokens + m + 8 * v;
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), acc[r][v]));
          }
      }
      at += slots;
    }
  if (integer)
    for (int64_t r = 0; r < std::min(Steps::kTileRows, s.h.n - down * Steps::kTileRows); ++r)
      for (int64_t m = 0; m < kSparseTokens; ++m) yt[r * kSparseTokens + m] *= s.factor[down * Steps::kTileRows + r];
}

LOWBIT_AVX2 Digits digits(const float* x, int64_t k, int64_t ld, uint8_t* d) { return digits_of(x, k, ld, d); }

}  // namespace

const SparseRow sparse_avx2 = {few_tokens, few_int_tokens, many, sparse_scalar.turn, digits};

}  // namespace lowbit
#endif
