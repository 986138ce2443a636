// AVX-512 row of `linear_float`: float_rows.inc with 16 lanes. A table of 16 levels is one register and one shuffle,
// which looks at the low four bits of a lane only, so codes need no masking; 32 levels are two registers; 64 to 256
// are pairs of registers and blends. Codes that do not divide 32 bits become bytes with vpmultishiftqb (VBMI).
//
//   |y - y_scalar| <= (K/16 + K/512 + 12) * 2^-24 * sum_k |x*w_hat|   (sums of lanes, a tree of 16, partial sums)
#include "avx512.h"
#include "float_rows.h"

#if LOWBIT_X86

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#endif

#define LOWBIT_FN LOWBIT_AVX512_WITH("avx512vbmi")
#define LOWBIT_INLINE LOWBIT_AVX512_INLINE_WITH("avx512vbmi")
#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_INLINE_MEMBER __forceinline
#define LOWBIT_NOINLINE __declspec(noinline)
#define LOWBIT_UNROLL
#else
#define LOWBIT_INLINE_MEMBER \
  inline __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"), always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))
#define LOWBIT_UNROLL _Pragma("GCC unroll 4")
#endif

namespace lowbit {
namespace {

constexpr int W = 16;
using F = __m512;
using I = __m512i;

constexpr int kTokens = 6, kRowsAtOnce = 4;  // 24 sums, 4 rows of w and a token: 29 registers
constexpr int64_t kSlabRows = 8;

LOWBIT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
LOWBIT_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
LOWBIT_INLINE F zeros() { return _mm512_setzero_ps(); }
LOWBIT_INLINE F set1(float v) { return _mm512_set1_ps(v); }
LOWBIT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
LOWBIT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
LOWBIT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
LOWBIT_INLINE F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
LOWBIT_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
LOWBIT_INLINE I low_byte(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(255)); }
LOWBIT_INLINE I shift_right(I v, int n) { return _mm512_srli_epi32(v, static_cast<unsigned>(n)); }

LOWBIT_INLINE float sum(F v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// count numbers, each for 2^shift lanes
LOWBIT_INLINE F spread(const float* p, int64_t count, int shift) {
  const F v = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift)), v);
}

constexpr int64_t kReads = 64;  // bytes one load of codes may read
LOWBIT_INLINE I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }

struct Spread8 {
  alignas(64) int8_t byte[64];
};
// Byte q*bits + i of a row to byte i of quadword q: eight codes a quadword.
constexpr Spread8 spread8(int bits) {
  Spread8 s{};
  for (int i = 0; i < 64; ++i) s.byte[i] = static_cast<int8_t>(std::min(i / 8 * bits + i % 8, 63));
  return s;
}
constexpr Spread8 kSpread8[9] = {spread8(1), spread8(1), spread8(2), spread8(3), spread8(4),
                                 spread8(5), spread8(6), spread8(7), spread8(8)};

// 64 codes as bytes
template <int B>
LOWBIT_INLINE I bytes_of(const uint8_t* p) {
  const I v = load_codes(p);
  if (B == 8) return v;
  const I eights = _mm512_permutexvar_epi8(_mm512_load_si512(kSpread8[B].byte), v);
  constexpr uint64_t at = uint64_t{0x0706050403020100} * B;  // byte i starts at bit i*B
  const I codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(at)), eights);
  return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>((1 << B) - 1)));
}

LOWBIT_INLINE F mini(I code, const Mini& f) {
  const I i = _mm512_min_epi32(_mm512_sub_epi32(code, _mm512_set1_epi32(f.middle)), _mm512_set1_epi32(f.top));
  const I a = _mm512_abs_epi32(i);
  const I bits = _mm512_add_epi32(_mm512_sllv_epi32(a, _mm512_set1_epi32(f.shift)), _mm512_set1_epi32(f.bias));
  const __mmask16 small = _mm512_cmplt_epi32_mask(a, _mm512_set1_epi32(f.limit));
  const F v = _mm512_mask_mul_ps(_mm512_castsi512_ps(bits), small, _mm512_cvtepi32_ps(a), set1(f.smallest));
  constexpr int kSignOfB = 0xd8;  // bit by bit: c ? b : a
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), i, _mm512_set1_epi32(INT32_MIN), kSignOfB));
}

template <int B>
struct Table {
  static constexpr int kRegisters = B <= 4 ? 1 : 1 << (B - 4);
  F t[kRegisters];

  LOWBIT_INLINE_MEMBER void load(const float* table) {
    if (B >= 4) {
      for (int i = 0; i < kRegisters; ++i) t[i] = _mm512_loadu_ps(table + 16 * i);
    } else {  // repeated: what the bits above a code are does not matter
      const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const F v = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (1 << B)) - 1), table);
      t[0] = _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << B) - 1)), v);
    }
  }
  LOWBIT_INLINE_MEMBER Table map(F z, F s) const {
    Table r;
    r.t[0] = _mm512_mul_ps(_mm512_sub_ps(t[0], z), s);
    return r;
  }
  LOWBIT_INLINE_MEMBER F at_in_lane(I code) const { return _mm512_permutevar_ps(t[0], code); }
  LOWBIT_INLINE_MEMBER F pair(I code, int i) const { return _mm512_permutex2var_ps(t[2 * i], code, t[2 * i + 1]); }
  LOWBIT_INLINE_MEMBER F at(I code) const {
    if constexpr (B <= 4) {
      return _mm512_permutexvar_ps(code, t[0]);
    } else {
      F v[kRegisters / 2];
      for (int i = 0; i < kRegisters / 2; ++i) v[i] = pair(code, i);
      for (int bit = 5, n = kRegisters / 4; n > 0; ++bit, n /= 2) {
        const __mmask16 high = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < n; ++i) v[i] = _mm512_mask_blend_ps(high, v[2 * i], v[2 * i + 1]);
      }
      return v[0];
    }
  }
};

void decode_natural(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) { decode_avx2(w, n, k0, k1, out); }

#include "float_rows.inc"

}  // namespace

const LinearFloat linear_float_avx512 = {arranged, arrange, tile};

}  // namespace lowbit
#endif
