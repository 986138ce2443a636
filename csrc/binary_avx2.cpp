// AVX2: look-ups instead of counting. A byte of an input chooses two tables of 16 counts, one for each of its halves;
// pshufb looks up the same eight weight bits of 16 outputs at once: one shuffle and one add for 128 products, where XOR
// and a shuffle-popcount take eight operations for 256.
#include <cstring>

#include "avx2.h"
#include "binary.h"

#if LOWBIT_X86
namespace lowbit {
namespace {

int bit_count(int v) { return (v & 1) + (v >> 1 & 1) + (v >> 2 & 1) + (v >> 3 & 1); }

// [input byte][half][weight bits]: pop(a ^ w), pop(a & w), pop(a & ~w) of that half
struct alignas(64) Tables {
  uint8_t differ[256][2][16], both[256][2][16], only[256][2][16];
  Tables() {
    for (int a = 0; a < 256; ++a)
      for (int half = 0; half < 2; ++half)
        for (int w = 0; w < 16; ++w) {
          const int bits = half ? a >> 4 : a & 15;
          differ[a][half][w] = static_cast<uint8_t>(bit_count(bits ^ w));
          both[a][half][w] = static_cast<uint8_t>(bit_count(bits & w));
          only[a][half][w] = static_cast<uint8_t>(bit_count(bits & ~w));
        }
  }
};
const Tables kTables;

LOWBIT_AVX2_INLINE __m256i look(const uint8_t (&table)[256][2][16], uint32_t a, __m256i w) {
  return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table[a])), w);
}

// Computed here and now: GCC would load a vector of weights once for each use, and would add up counts in another
// order, for which there are too few registers.
LOWBIT_AVX2_INLINE __m256i in_register(__m256i v) {
#if defined(__GNUC__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// What a step adds to a byte: at most 4, or 8 for the kinds that subtract (they add pop(a), which the end takes off).
constexpr int most(BitKind k) { return k == BitKind::kZeroOneTernary || k == BitKind::kTernary ? 8 : 4; }

template <BitKind K>
LOWBIT_AVX2_INLINE __m256i count(uint32_t a, uint32_t an, __m256i w, __m256i wn) {
  switch (K) {
    case BitKind::kSign: return look(kTables.differ, a, w);
    case BitKind::kZeroOne: return look(kTables.both, a, w);
    case BitKind::kSignTernary: return _mm256_add_epi8(look(kTables.both, a, w), look(kTables.both, a ^ 255, wn));
    case BitKind::kZeroOneTernary: return _mm256_add_epi8(look(kTables.both, a, w), look(kTables.only, a, wn));
    default:
      return _mm256_add_epi8(_mm256_add_epi8(look(kTables.both, a, w), look(kTables.both, an, wn)),
                             _mm256_add_epi8(look(kTables.only, a, wn), look(kTables.only, an, w)));
  }
}

// The counts of both halves into 16 sums of 16 bits.
LOWBIT_AVX2_INLINE void widen(__m256i counts, uint16_t* sums) {
  __m256i* to = reinterpret_cast<__m256i*>(sums);
  const __m256i lo = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(counts));
  const __m256i hi = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(counts, 1));
  _mm256_store_si256(to, _mm256_add_epi16(_mm256_load_si256(to), _mm256_add_epi16(lo, hi)));
}

// P positions times V vectors of 16 outputs.
// Bytes: kRun words of four bytes, kRun * 4 * most <= 240. 16 bits: kLong * 2 * 240 <= 65280. out takes over what they
// cannot hold.
template <BitKind K, int P, int V>
LOWBIT_AVX2 void tile(const BitTile& t, int64_t p0, int64_t v0) {
  constexpr int planes = weight_planes(K), kRun = 60 / most(K), kLong = 136;
  constexpr int factor = K == BitKind::kSign ? -2 : most(K) == 8 ? 1 : 2;
  const int64_t bytes = t.shape.bytes(), words = t.shape.words(), block = t.shape.taps * bytes * planes * 32;
  const uint8_t* w = static_cast<const uint8_t*>(t.w) + (t.n0 / 16 + v0) * block;
  alignas(32) uint16_t sums[P][V][16] = {};
  int32_t* out[P];
  int left = kRun, runs = kLong;
  __m256i acc[P][V];
  for (int p = 0; p < P; ++p) {
    out[p] = t.out + (p0 + p) * kBitBlock + v0 * 16;
    int32_t ones = 0;
    if (!sign_input(K))
      for (int64_t tap = 0; tap < t.shape.taps; ++tap)
        for (int64_t i = 0; i < words * input_planes(K); ++i)
          ones += static_cast<int32_t>(_mm_popcnt_u32(t.a[tap * t.stride + p0 + p][i]));
    for (int v = 0; v < V; ++v) acc[p][v] = _mm256_setzero_si256();
    for (int i = 0; i < V * 16; ++i) out[p][i] = -ones;
  }
  const auto flush = [&]() LOWBIT_AVX2_LAMBDA {  // bytes into 16 bits
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) {
        widen(acc[p][v], sums[p][v]);
        acc[p][v] = _mm256_setzero_si256();
      }
    left = kRun;
  };
  const auto spill = [&]() LOWBIT_AVX2_LAMBDA {  // 16 bits into out
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < 16; ++i) {
          out[p][v * 16 + i] += factor * sums[p][v][i];
          sums[p][v][i] = 0;
        }
    runs = kLong;
  };
  for (int64_t tap = 0; tap < t.shape.taps; ++tap) {
    const uint32_t* const* from = t.a + tap * t.stride + p0;
    for (int64_t i = 0; i < words; ++i) {
      uint32_t a[P], an[P];
      for (int p = 0; p < P; ++p) {
        a[p] = from[p][i];
        an[p] = K == BitKind::kTernary ? from[p][words + i] : 0;
      }
      const auto byte = [&]() LOWBIT_AVX2_LAMBDA {  // the lowest byte of every a
        __m256i wp[V], wn[V];
        for (int v = 0; v < V; ++v) {
          wp[v] = in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v * block)));
          wn[v] = planes == 2 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v * block + 32)) : wp[v];
        }
        for (int p = 0; p < P; ++p) {
          for (int v = 0; v < V; ++v)
            acc[p][v] = in_register(_mm256_add_epi8(acc[p][v], count<K>(a[p] & 255, an[p] & 255, wp[v], wn[v])));
          a[p] >>= 8;
          an[p] >>= 8;
        }
        w += planes * 32;
      };
      const int64_t rest = bytes - i * 4;
      if (rest >= 4) {
        byte(), byte(), byte(), byte();
      } else {
        for (int64_t j = 0; j < rest; ++j) byte();
      }
      if (--left > 0) continue;
      flush();
      if (--runs == 0) spill();
    }
  }
  flush();
  spill();
}

template <BitKind K, int P, int V>
LOWBIT_AVX2 void columns(const BitTile& t, int64_t v0) {
  int64_t p = 0;
  for (; p + P <= t.pixels; p += P) tile<K, P, V>(t, p, v0);
  for (; p < t.pixels; ++p) tile<K, 1, V>(t, p, v0);
}

template <BitKind K>
LOWBIT_AVX2 void rows(const BitTile& t) {
  switch ((t.n1 - t.n0 + 15) / 16) {
    case 4: return columns<K, 2, 4>(t, 0);
    case 3: columns<K, 4, 1>(t, 2);  // and the first two
      [[fallthrough]];
    case 2: return columns<K, 4, 2>(t, 0);
    case 1: return columns<K, 4, 1>(t, 0);
  }
}

// 32 channels of 8 positions whose channels lie far apart (an NCHW image)
LOWBIT_AVX2 void binarize_planes(const BinarizeJob& j) {
  const int64_t words = (j.channels + 31) / 32;
  for (int64_t p = 0; p < j.pixels; p += 8) {
    const int64_t count = j.pixels - p < 8 ? j.pixels - p : 8;
    const __m256i some = first_lanes(count);
    for (int64_t i = 0; i < words; ++i) {
      __m256i high = _mm256_setzero_si256(), low = high;
      const int64_t end = j.channels - i * 32 < 32 ? j.channels - i * 32 : 32;
      const float* x = j.x + p + i * 32 * j.channel_stride;
      for (int64_t c = 0; c < end; ++c, x += j.channel_stride) {
        const __m256 v = _mm256_maskload_ps(x, some);
        const __m256i bit = _mm256_set1_epi32(static_cast<int>(1u << c));
        const __m256 h = _mm256_cmp_ps(v, _mm256_set1_ps(j.high[i * 32 + c]), _CMP_GE_OQ);
        high = _mm256_or_si256(high, _mm256_and_si256(_mm256_castps_si256(h), bit));
        if (j.low) {
          const __m256 l = _mm256_cmp_ps(v, _mm256_set1_ps(j.low[i * 32 + c]), _CMP_LE_OQ);
          low = _mm256_or_si256(low, _mm256_and_si256(_mm256_castps_si256(l), bit));
        }
      }
      alignas(32) uint32_t lanes[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), high);
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), low);
      for (int64_t k = 0; k < count; ++k) {
        j.out[(p + k) * j.out_stride + i] = lanes[k];
        if (j.low) j.out[(p + k) * j.out_stride + words + i] = lanes[8 + k];
      }
    }
  }
}

// Masked moves are slow on some CPUs: only for what does not fill a vector.
LOWBIT_AVX2_INLINE __m256 load8(const float* x, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_lanes(count));
}

LOWBIT_AVX2 uint32_t word_of(const float* x, const float* than, int64_t count, bool at_least) {
  uint32_t word = 0;
  for (int64_t c = 0; c < count; c += 8) {
    const __m256 v = load8(x + c, count - c), limit = load8(than + c, count - c);
    const __m256 yes = at_least ? _mm256_cmp_ps(v, limit, _CMP_GE_OQ) : _mm256_cmp_ps(v, limit, _CMP_LE_OQ);
    word |= static_cast<uint32_t>(_mm256_movemask_ps(yes)) << c;
  }
  return count < 32 ? word & ((1u << count) - 1) : word;
}

}  // namespace

LOWBIT_AVX2 void bit_tile_avx2(const BitTile& t) {
  switch (t.shape.kind) {
    case BitKind::kSign: return rows<BitKind::kSign>(t);
    case BitKind::kZeroOne: return rows<BitKind::kZeroOne>(t);
    case BitKind::kSignTernary: return rows<BitKind::kSignTernary>(t);
    case BitKind::kZeroOneTernary: return rows<BitKind::kZeroOneTernary>(t);
    case BitKind::kTernary: return rows<BitKind::kTernary>(t);
  }
}

LOWBIT_AVX2 void bit_epilogue_avx2(const int32_t* dot, int64_t pixels, int64_t n0, int64_t n1, const BitEpilogue& e) {
  for (int64_t n = n0; n < n1; n += 8) {
    const int64_t left = n1 - n;
    const __m256i some = first_lanes(left);
    const __m256 zero = _mm256_setzero_ps();
    const __m256i base = _mm256_maskload_epi32(e.base + n, some);
    const __m256 scale = load8(e.scale + n, left);
    const __m256 bias = e.bias ? load8(e.bias + n, left) : zero, high = e.bits ? load8(e.high + n, left) : zero;
    const __m256 shift = e.slope ? load8(e.shift + n, left) : zero, slope = e.slope ? load8(e.slope + n, left) : zero;
    const __m256 offset = e.slope ? load8(e.offset + n, left) : zero;
    for (int64_t p = 0; p < pixels; ++p) {
      const __m256i sum =
          _mm256_add_epi32(base, _mm256_load_si256(reinterpret_cast<const __m256i*>(dot + p * kBitBlock + n - n0)));
      __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
      if (e.bias) v = _mm256_add_ps(v, bias);
      if (e.residual) v = _mm256_add_ps(v, load8(e.residual + p * e.stride + n, left));
      if (e.slope) {
        v = _mm256_sub_ps(v, shift);
        const __m256 up = _mm256_cmp_ps(v, zero, _CMP_GT_OQ);
        v = _mm256_add_ps(_mm256_blendv_ps(_mm256_mul_ps(v, slope), v, up), offset);
      }
      if (e.y && left >= 8) _mm256_storeu_ps(e.y + p * e.stride + n, v);
      if (e.y && left < 8) _mm256_maskstore_ps(e.y + p * e.stride + n, some, v);
      if (!e.bits) continue;
      const __m256 yes = _mm256_and_ps(_mm256_cmp_ps(v, high, _CMP_GE_OQ), _mm256_castsi256_ps(some));
      const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(yes));
      uint32_t& word = e.bits[p * e.bit_words + n / 32];
      word = n % 32 == 0 ? bits : word | bits << (n % 32);
    }
  }
}

LOWBIT_AVX2 void binarize_avx2(const BinarizeJob& j) {
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
