// AVX2 rows of `decode` (equal to scalar bit for bit) and `linear_float`.
//
// linear_float: a slab of a few rows of w is decoded into a scratch of at most 60 KiB, then a register block of
// MR x NR dot products runs down K with one 8-lane accumulator each. Every y[m,n] is summed in the same order
// whatever the tile, so it does not depend on M, on n or on the threads. Against scalar:
//   |y - y_scalar| <= (K/8 + 12) * 2^-24 * sum_k |x*w_hat|   (lane sums, then a tree of 8, then K/640 partial sums).
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>

namespace lowbit {
namespace {

enum class Kind { kEight, kSixteen, kAffine, kGather };

struct Lookup {
  Kind kind;
  const float* table;
  float base, step;
};

// int formats of any width are affine in the code. Used only where it gives the table's values exactly.
bool is_affine(const float* table, int count) {
  const float base = table[0], step = table[1] - table[0];
  for (int c = 0; c < count; ++c)
    if (!(table[c] == base + static_cast<float>(c) * step)) return false;
  return true;
}

Lookup lookup_for(const Weights& w, int64_t n) {
  const float* t = w.table_row(n);
  const int count = 1 << w.bits;
  Lookup lk{Kind::kGather, t, t[0], t[1] - t[0]};
  if (count <= 8) lk.kind = Kind::kEight;
  else if (count == 16) lk.kind = Kind::kSixteen;
  else if (w.table_rows == 1 && is_affine(t, count)) lk.kind = Kind::kAffine;  // for a shared table the test pays
  return lk;
}

struct Tables {
  __m256 lo, hi;
};

LOWBIT_AVX2_INLINE Tables load_tables(const Lookup& lk, int bits) {
  if (lk.kind == Kind::kEight) {
    const __m256 t = _mm256_maskload_ps(lk.table, first_lanes(1 << bits));
    return {t, t};
  }
  if (lk.kind == Kind::kSixteen) return {_mm256_loadu_ps(lk.table), _mm256_loadu_ps(lk.table + 8)};
  return {_mm256_set1_ps(lk.base), _mm256_set1_ps(lk.step)};
}

// scalar: table[code], for 8 codes
template <Kind kind>
LOWBIT_AVX2_INLINE __m256 levels_of(__m256i code, const Tables& t, const float* table) {
  if (kind == Kind::kEight) return _mm256_permutevar8x32_ps(t.lo, code);
  if (kind == Kind::kSixteen)  // bit 3 of the code, moved to the sign, picks the half
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.lo, code), _mm256_permutevar8x32_ps(t.hi, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  if (kind == Kind::kAffine) return _mm256_add_ps(t.lo, _mm256_mul_ps(_mm256_cvtepi32_ps(code), t.hi));
  return _mm256_i32gather_ps(table, code, 4);
}

constexpr int64_t kCodes = 512;  // codes unpacked at a time

// scalar: out = (table[code] - zero) * scale, group by group
template <Kind kind>
LOWBIT_AVX2_INLINE void decode_kind(const Weights& w, const Lookup& lk, int64_t n, int64_t k0, int64_t k1,
                                    float* out) {
  alignas(32) uint8_t codes[kCodes + 32];
  const Tables t = load_tables(lk, w.bits);
  const float *scale = w.scale + n * w.groups, *zero = w.zero ? w.zero + n * w.groups : nullptr;
  for (int64_t c0 = k0; c0 < k1; c0 += kCodes) {
    const int64_t c1 = std::min(c0 + kCodes, k1);
    unpack_avx2(w.row(n), w.row_bytes, w.bits, c0, c1, codes);
    for (int64_t k = c0, g = c0 / w.group; k < c1; ++g) {
      const int64_t end = std::min(c1, (g + 1) * w.group);
      const __m256 s = _mm256_set1_ps(scale[g]), z = _mm256_set1_ps(zero ? zero[g] : 0.0f);
      for (; k < end; k += 8) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + (k - c0))));
        const __m256 v = _mm256_mul_ps(_mm256_sub_ps(levels_of<kind>(code, t, lk.table), z), s);
        if (k + 8 <= end) _mm256_storeu_ps(out + (k - k0), v);
        else _mm256_maskstore_ps(out + (k - k0), first_lanes(end - k), v);
      }
      k = end;
    }
  }
}

LOWBIT_AVX2 void decode_with(const Weights& w, const Lookup& lk, int64_t n, int64_t k0, int64_t k1, float* out) {
  switch (lk.kind) {
    case Kind::kEight: return decode_kind<Kind::kEight>(w, lk, n, k0, k1, out);
    case Kind::kSixteen: return decode_kind<Kind::kSixteen>(w, lk, n, k0, k1, out);
    case Kind::kAffine: return decode_kind<Kind::kAffine>(w, lk, n, k0, k1, out);
    default: return decode_kind<Kind::kGather>(w, lk, n, k0, k1, out);
  }
}

LOWBIT_AVX2_INLINE float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// y[MR,NR] (+)= x[MR,kc] w[NR,kc]^T
template <int MR, int NR>
LOWBIT_AVX2_INLINE void block(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t kc, float* y,
                              int64_t ldy, bool first) {
  __m256 acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) acc[m][n] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= kc; k += 8) {
    __m256 b[NR];
    for (int n = 0; n < NR; ++n) b[n] = _mm256_loadu_ps(w + n * ldw + k);
    for (int m = 0; m < MR; ++m) {
      const __m256 a = _mm256_loadu_ps(x + m * ldx + k);
      for (int n = 0; n < NR; ++n) acc[m][n] = _mm256_fmadd_ps(a, b[n], acc[m][n]);
    }
  }
  if (k < kc) {  // the last 1..7 columns: neither x nor the scratch is read past its end
    const __m256i mask = first_lanes(kc - k);
    for (int m = 0; m < MR; ++m) {
      const __m256 a = _mm256_maskload_ps(x + m * ldx + k, mask);
      for (int n = 0; n < NR; ++n)
        acc[m][n] = _mm256_fmadd_ps(a, _mm256_maskload_ps(w + n * ldw + k, mask), acc[m][n]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) {
      float* to = y + m * ldy + n;
      const float sum = sum8(acc[m][n]);
      *to = first ? sum : *to + sum;
    }
}

template <int MR, int NR>
LOWBIT_AVX2 void strip(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t kc, int64_t rows, float* y,
                       int64_t ldy, bool first) {
  int64_t n = 0;
  for (; n + NR <= rows; n += NR) block<MR, NR>(x, ldx, w + n * ldw, ldw, kc, y + n, ldy, first);
  for (; n < rows; ++n) block<MR, 1>(x, ldx, w + n * ldw, ldw, kc, y + n, ldy, first);
}

constexpr int64_t kSlabRows = 24, kSlabCols = 640;

}  // namespace

LOWBIT_AVX2 void decode_avx2(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  decode_with(w, lookup_for(w, n), n, k0, k1, out);
}

LOWBIT_AVX2 void linear_float_avx2(const Weights& w, const float* x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                                   float* y) {
  alignas(32) float slab[kSlabRows * kSlabCols];
  const int64_t parts = (w.k + kSlabCols - 1) / kSlabCols;            // K in equal parts, each a multiple of 8
  const int64_t kc = ((w.k + parts - 1) / parts + 7) / 8 * 8;         // <= kSlabCols
  const int64_t slab_rows = m1 - m0 == 1 ? 8 : kSlabRows;             // one token: keep the slab in L1
  Lookup lk = lookup_for(w, n0);
  for (int64_t n = n0; n < n1; n += slab_rows) {
    const int64_t rows = std::min(slab_rows, n1 - n);
    for (int64_t k = 0; k < w.k; k += kc) {
      const int64_t cols = std::min(kc, w.k - k);
      for (int64_t i = 0; i < rows; ++i) {
        if (w.table_rows > 1) lk = lookup_for(w, n + i);
        decode_with(w, lk, n + i, k, k + cols, slab + i * kc);
      }
      const bool first = k == 0;
      int64_t m = m0;
      for (; m + 4 <= m1; m += 4) strip<4, 3>(x + m * w.k + k, w.k, slab, kc, cols, rows, y + m * w.n + n, w.n, first);
      for (; m + 2 <= m1; m += 2) strip<2, 4>(x + m * w.k + k, w.k, slab, kc, cols, rows, y + m * w.n + n, w.n, first);
      for (; m < m1; ++m) strip<1, 8>(x + m * w.k + k, w.k, slab, kc, cols, rows, y + m * w.n + n, w.n, first);
    }
  }
}

}  // namespace lowbit
#endif
