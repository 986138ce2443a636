// AVX2 rows of `quantize` and `linear_int8`: equal to scalar bit for bit.
//
// The integer dot product is exact in each of three forms, picked by the level table. With U = level - min(level):
//   narrow  U small: maddubs(U, q) is summed in int16 for the whole segment, then widened once
//   offset  U <= 129: maddubs(U, q), widened at every step
//   sign    any int8 level: maddubs(|level|, q with level's sign), widened at every step
// maddubs adds two products in int16 *with saturation*: 2*129*127 = 32766 and 2*128*127 = 32512 fit, because
// activations are never -128 (which would also survive the sign flip unchanged).
// In the first two forms dot = sum U*q - offset * sum q, offset = -min(level).
// Floats are combined per segment with the operations and the order of the scalar row, without FMA.
#include "avx2.h"

#if LOWBIT_X86
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace lowbit {
namespace {

enum class Form { kNarrow, kOffset, kSign };

constexpr int kTileRows = 4;
constexpr int64_t kPad = Segments::kPad;

struct Range {
  int lo, hi;
};

Range range_of(const int8_t* levels, int count) {
  const auto mm = std::minmax_element(levels, levels + count);
  return {*mm.first, *mm.second};
}

// 2 products a step and lane, each at most span*127
Form form_for(int span, int64_t steps) {
  if (static_cast<int64_t>(span) * 2 * 127 * steps <= 32767) return Form::kNarrow;
  return span <= 129 ? Form::kOffset : Form::kSign;
}

// Byte table from code to what the dot product multiplies: U, or the level itself in the sign form.
struct ByteTable {
  alignas(32) uint8_t value[256];
  bool affine;  // value[c] == value[0] + c (mod 256)
};

void fill_table(const int8_t* levels, int count, int offset, ByteTable& t) {
  t.affine = true;
  for (int c = 0; c < count; ++c) {
    t.value[c] = static_cast<uint8_t>(levels[c] + offset);
    t.affine = t.affine && t.value[c] == static_cast<uint8_t>(t.value[0] + c);
  }
  for (int c = count; c < 256; ++c) t.value[c] = 0;
}

// One row to the segment layout. Past a segment's end the bytes are arbitrary: the activations are zero there.
LOWBIT_AVX2 void decode_segments(const Weights& w, const Segments& seg, int64_t n, const ByteTable& t, uint8_t* codes,
                                 uint8_t* out) {
  unpack_avx2(w.row(n), w.row_bytes, w.bits, 0, w.k, codes);
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.value)));
  const __m256i base = _mm256_set1_epi8(static_cast<char>(t.value[0]));
  for (int64_t s = 0; s < seg.count; ++s, out += seg.padded) {
    const uint8_t* from = codes + seg.begin(s);
    for (int64_t i = 0; i < seg.padded; i += kPad) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      if (w.bits <= 4) {  // codes < 16, so pshufb never sees bit 7 set where it matters
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_shuffle_epi8(table, c));
      } else if (t.affine) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_add_epi8(c, base));
      } else {
        for (int64_t j = i; j < i + kPad; ++j) out[j] = t.value[from[j]];
      }
    }
  }
}

struct Tile {               // four decoded rows of w; missing ones have scale 0
  const uint8_t* bytes;     // [4, row_size]
  const float *scale, *zero;  // [groups, 4]; zero may be null
  int32_t offset[kTileRows];
};

LOWBIT_AVX2_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// lane i of the result = sum of the 8 lanes of v[i]
LOWBIT_AVX2_INLINE __m128i sum_rows(const __m256i v[kTileRows]) {
  const __m256i h = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

// scalar: for i: dot += w[i]*q[i], for MR tokens and 4 rows of w at once
template <int MR, Form form>
LOWBIT_AVX2_INLINE void dots(const uint8_t* w, const int8_t* q, int64_t ld, int64_t padded, __m256i acc[MR][kTileRows]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < kTileRows; ++n) acc[m][n] = _mm256_setzero_si256();
  for (int64_t i = 0; i < padded; i += kPad) {
    __m256i a[MR];
    for (int m = 0; m < MR; ++m) a[m] = load(q + m * ld + i);
    for (int n = 0; n < kTileRows; ++n) {
      const __m256i b = load(w + n * ld + i);
      for (int m = 0; m < MR; ++m) {
        if (form == Form::kNarrow) {
          acc[m][n] = _mm256_add_epi16(acc[m][n], _mm256_maddubs_epi16(b, a[m]));
        } else {
          const __m256i p = form == Form::kOffset
                                ? _mm256_maddubs_epi16(b, a[m])
                                : _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(a[m], b));
          acc[m][n] = _mm256_add_epi32(acc[m][n], _mm256_madd_epi16(p, ones));
        }
      }
    }
  }
  if (form == Form::kNarrow)
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < kTileRows; ++n) acc[m][n] = _mm256_madd_epi16(acc[m][n], ones);
}

// scalar: part = dot - zero*sum;  acc += part * scale * act_scale
template <int MR, Form form>
LOWBIT_AVX2_INLINE void block(const Segments& seg, const Tile& t, const Activations& a, int64_t m0, __m128 y[MR]) {
  const int64_t ld = seg.row_size();
  const __m128i offset = _mm_loadu_si128(reinterpret_cast<const __m128i*>(t.offset));
  for (int m = 0; m < MR; ++m) y[m] = _mm_setzero_ps();
  for (int64_t g = 0, s = 0; s < seg.count; ++g) {
    const __m128 scale = _mm_loadu_ps(t.scale + g * kTileRows);
    for (const int64_t end = s + seg.per_group; s < end; ++s) {
      __m256i acc[MR][kTileRows];
      dots<MR, form>(t.bytes + s * seg.padded, a.q + m0 * ld + s * seg.padded, ld, seg.padded, acc);
      for (int m = 0; m < MR; ++m) {
        const int64_t at = (m0 + m) * seg.count + s;
        __m128i dot = sum_rows(acc[m]);
        if (form != Form::kSign) dot = _mm_sub_epi32(dot, _mm_mullo_epi32(offset, _mm_set1_epi32(a.sum[at])));
        __m128 part = _mm_cvtepi32_ps(dot);
        if (t.zero)
          part = _mm_sub_ps(part, _mm_mul_ps(_mm_loadu_ps(t.zero + g * kTileRows),
                                             _mm_set1_ps(static_cast<float>(a.sum[at]))));
        y[m] = _mm_add_ps(y[m], _mm_mul_ps(_mm_mul_ps(part, scale), _mm_set1_ps(a.scale[at])));
      }
    }
  }
}

LOWBIT_AVX2_INLINE void store_rows(float* y, __m128 v, int64_t rows) {
  if (rows == kTileRows) _mm_storeu_ps(y, v);
  else _mm_maskstore_ps(y, _mm256_castsi256_si128(first_lanes(rows)), v);
}

template <Form form>
LOWBIT_AVX2 void tile_form(const Segments& seg, const Tile& t, const Activations& a, int64_t m0, int64_t m1,
                           int64_t rows, float* y, int64_t ldy) {
  int64_t m = m0;
  for (; m + 2 <= m1; m += 2) {
    __m128 v[2];
    block<2, form>(seg, t, a, m, v);
    store_rows(y + m * ldy, v[0], rows);
    store_rows(y + (m + 1) * ldy, v[1], rows);
  }
  for (; m < m1; ++m) {
    __m128 v[1];
    block<1, form>(seg, t, a, m, v);
    store_rows(y + m * ldy, v[0], rows);
  }
}

// [rows, groups] -> [groups, 4], zeros for missing rows
void transpose(const float* from, int64_t groups, int64_t rows, float* to) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < kTileRows; ++i) to[g * kTileRows + i] = i < rows ? from[i * groups + g] : 0.0f;
}

struct Scratch {
  std::vector<uint8_t> codes, bytes;
  std::vector<float> scale, zero;
  ByteTable table;
};

}  // namespace

// scalar: a = max|x|; q = nearbyint(x * (127/a)); sum += q
LOWBIT_AVX2 void quantize_avx2(const float* x, const Segments& seg, int8_t* q, float* scale, int32_t* sum) {
  constexpr float kTiny = 1e-30f;  // as in scalar.cpp
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the per-lane packs
  for (int64_t s = 0; s < seg.count; ++s, q += seg.padded) {
    const float* xs = x + seg.begin(s);
    const int64_t len = seg.size(s);
    __m256i most = _mm256_setzero_si256();  // bits of |x| are ordered like |x|, with NaN > Inf > all numbers
    for (int64_t i = 0; i < len; i += 8) {
      const __m256 v = i + 8 <= len ? _mm256_loadu_ps(xs + i) : _mm256_maskload_ps(xs + i, first_lanes(len - i));
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    const int32_t bits = *std::max_element(lanes, lanes + 8);
    float a;
    std::memcpy(&a, &bits, sizeof a);
    sum[s] = 0;
    const bool finite = bits < 0x7f800000;
    scale[s] = finite ? 0.0f : std::nanf("");
    if (!finite || a < kTiny) {
      std::memset(q, 0, static_cast<size_t>(seg.padded));
      continue;
    }
    scale[s] = a / 127.0f;
    const __m256 inverse = _mm256_set1_ps(127.0f / a);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < seg.padded; i += kPad) {
      __m256i v[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + 8 * j;
        const __m256 f = at + 8 <= len ? _mm256_loadu_ps(xs + at)
                         : at < len    ? _mm256_maskload_ps(xs + at, first_lanes(len - at))
                                       : _mm256_setzero_ps();
        v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(f, inverse));  // ties to even, as nearbyint
        total = _mm256_add_epi32(total, v[j]);
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    for (int32_t lane : lanes) sum[s] += lane;
  }
}

LOWBIT_AVX2 void linear_int8_avx2(const Weights& w, const Segments& seg, const Activations& a, int64_t m0, int64_t m1,
                                  int64_t n0, int64_t n1, float* y) {
  static thread_local Scratch scratch;
  const int64_t row = seg.row_size();
  const int count = 1 << w.bits;
  scratch.codes.resize(static_cast<size_t>(w.k + Segments::kMaxSegment + kPad));
  scratch.bytes.resize(static_cast<size_t>(kTileRows * row));
  scratch.scale.resize(static_cast<size_t>(w.groups * kTileRows));
  scratch.zero.resize(w.zero ? static_cast<size_t>(w.groups * kTileRows) : 0);
  Range shared = range_of(w.levels, count);
  for (int64_t n = n0; n < n1; n += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, n1 - n);
    int span = shared.hi - shared.lo;
    if (w.table_rows > 1)
      for (int64_t i = 0; i < rows; ++i) {
        const Range r = range_of(w.levels_row(n + i), count);
        span = i == 0 ? r.hi - r.lo : std::max(span, r.hi - r.lo);
      }
    const Form form = form_for(span, seg.padded / kPad);
    Tile t{scratch.bytes.data(), scratch.scale.data(), w.zero ? scratch.zero.data() : nullptr, {}};
    for (int64_t i = 0; i < rows; ++i) {
      const Range r = w.table_rows > 1 ? range_of(w.levels_row(n + i), count) : shared;
      t.offset[i] = form == Form::kSign ? 0 : -r.lo;
      if (w.table_rows > 1 || (n == n0 && i == 0)) fill_table(w.levels_row(n + i), count, t.offset[i], scratch.table);
      decode_segments(w, seg, n + i, scratch.table, scratch.codes.data(), scratch.bytes.data() + i * row);
    }
    transpose(w.scale + n * w.groups, w.groups, rows, scratch.scale.data());
    if (w.zero) transpose(w.zero + n * w.groups, w.groups, rows, scratch.zero.data());
    switch (form) {
      case Form::kNarrow: tile_form<Form::kNarrow>(seg, t, a, m0, m1, rows, y + n, w.n); break;
      case Form::kOffset: tile_form<Form::kOffset>(seg, t, a, m0, m1, rows, y + n, w.n); break;
      case Form::kSign: tile_form<Form::kSign>(seg, t, a, m0, m1, rows, y + n, w.n); break;
    }
  }
}

}  // namespace lowbit
#endif
