// AVX2 rows of `decode` (equal to scalar bit for bit) and `linear_float`: float_rows.inc with 8 lanes. Up to 8 levels
// are one register and one shuffle, 16 are two and a blend; integers of more bits are computed, other levels gathered.
//
//   |y - y_scalar| <= (K/8 + 12) * 2^-24 * sum_k |x*w_hat|   (sums of at most 80 in a lane, a tree of 8, partial sums)
#include "avx2.h"
#include "float_rows.h"

#if LOWBIT_X86

#define LOWBIT_FN LOWBIT_AVX2
#define LOWBIT_INLINE LOWBIT_AVX2_INLINE
#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_INLINE_MEMBER __forceinline
#define LOWBIT_NOINLINE __declspec(noinline)
#define LOWBIT_UNROLL
#else
#define LOWBIT_INLINE_MEMBER inline __attribute__((target("avx2,fma"), always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))
#define LOWBIT_UNROLL _Pragma("GCC unroll 4")
#endif

namespace lowbit {
namespace {

constexpr int W = 8;
using F = __m256;
using I = __m256i;

constexpr int kTokens = 4, kRowsAtOnce = 3;  // 12 sums, 3 rows of w and a token: 16 registers
constexpr int64_t kSlabRows = 12;

LOWBIT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
LOWBIT_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
LOWBIT_INLINE F zeros() { return _mm256_setzero_ps(); }
LOWBIT_INLINE F set1(float v) { return _mm256_set1_ps(v); }
LOWBIT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
LOWBIT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
LOWBIT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
LOWBIT_INLINE F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
LOWBIT_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
LOWBIT_INLINE I low_byte(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(255)); }
LOWBIT_INLINE I shift_right(I v, int n) { return _mm256_srli_epi32(v, n); }

LOWBIT_INLINE float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// count numbers, each for 2^shift lanes
LOWBIT_INLINE F spread(const float* p, int64_t count, int shift) {
  const F v = _mm256_maskload_ps(p, first_lanes(count));
  const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_permutevar8x32_ps(v, _mm256_srl_epi32(lane, _mm_cvtsi32_si128(shift)));
}

constexpr int64_t kReads = kUnpackReads;  // bytes one load of codes may read
LOWBIT_INLINE I load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }

// 32 codes as bytes
template <int B>
LOWBIT_INLINE I bytes_of(const uint8_t* p) {
  if (B == 8) return load_codes(p);
  const UnpackPlan& plan = kUnpackPlans[B];
  return unpack32(p, B, _mm256_load_si256(reinterpret_cast<const I*>(plan.shuffle)),
                  _mm256_load_si256(reinterpret_cast<const I*>(plan.multiply)),
                  _mm256_set1_epi16(static_cast<short>((1 << B) - 1)));
}

LOWBIT_INLINE F mini(I code, const Mini& f) {
  const I i = _mm256_min_epi32(_mm256_sub_epi32(code, _mm256_set1_epi32(f.middle)), _mm256_set1_epi32(f.top));
  const I a = _mm256_abs_epi32(i);
  const I bits = _mm256_add_epi32(_mm256_sllv_epi32(a, _mm256_set1_epi32(f.shift)), _mm256_set1_epi32(f.bias));
  const I normal = _mm256_cmpgt_epi32(a, _mm256_set1_epi32(f.limit - 1));
  const F v = _mm256_blendv_ps(mul(to_float(a), set1(f.smallest)), _mm256_castsi256_ps(bits), _mm256_castsi256_ps(normal));
  return _mm256_or_ps(v, _mm256_and_ps(_mm256_castsi256_ps(i), set1(-0.0f)));
}

template <int B>
struct Table {
  static constexpr int kRegisters = B == 4 ? 2 : 1;
  F t[kRegisters];
  const float* all;

  LOWBIT_INLINE_MEMBER void load(const float* table) {
    all = table;
    if (B >= 3) {
      for (int i = 0; i < kRegisters; ++i) t[i] = _mm256_loadu_ps(table + 8 * i);
    } else {  // repeated: what the bits above a code are does not matter
      const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      t[0] = _mm256_permutevar8x32_ps(_mm256_maskload_ps(table, first_lanes(1 << B)),
                                      _mm256_and_si256(lane, _mm256_set1_epi32((1 << B) - 1)));
    }
  }
  LOWBIT_INLINE_MEMBER Table map(F z, F s) const {
    Table r;
    for (int i = 0; i < kRegisters; ++i) r.t[i] = _mm256_mul_ps(_mm256_sub_ps(t[i], z), s);
    return r;
  }
  LOWBIT_INLINE_MEMBER F at_in_lane(I code) const { return _mm256_permutevar_ps(t[0], code); }
  LOWBIT_INLINE_MEMBER F at(I code) const {
    if constexpr (B <= 3) {
      return _mm256_permutevar8x32_ps(t[0], code);
    } else if constexpr (B == 4) {  // bit 3 of the code, moved to the sign, picks the half
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t[0], code), _mm256_permutevar8x32_ps(t[1], code),
                              _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    } else {
      return _mm256_i32gather_ps(all, low_byte(code), 4);
    }
  }
};


void decode_natural(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) { decode_avx2(w, n, k0, k1, out); }

#include "float_rows.inc"

enum class Kind { kEight, kSixteen, kAffine, kGather };

struct Lookup {
  Kind kind;
  const float* table;
  float base, step;
};

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
        __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + (k - c0))));
        if (kind == Kind::kGather && k + 8 > end)  // what lies behind the last code may be anything: stay in the table
          code = _mm256_and_si256(code, _mm256_set1_epi32((1 << w.bits) - 1));
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

}  // namespace

LOWBIT_AVX2 void decode_avx2(const Weights& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  decode_with(w, lookup_for(w, n), n, k0, k1, out);
}

const LinearFloat linear_float_avx2 = {arranged, arrange, tile};

}  // namespace lowbit
#endif
