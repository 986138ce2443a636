#include "peak.h"

#include <atomic>

#include "avx2.h"
#include "pool.h"

namespace lowbit {
namespace {

int64_t peak_scalar(int64_t steps, int32_t* sink) {
  int32_t acc[8] = {};
  volatile int8_t from[2] = {3, -5};
  const int8_t a = from[0], b = from[1];
  for (int64_t i = 0; i < steps; ++i)
    for (int j = 0; j < 8; ++j) acc[j] = (acc[j] + a * (b + j)) & 0xffff;
  for (int j = 0; j < 8; ++j) *sink += acc[j];
  return steps * 8;
}

#if LOWBIT_X86
// The cheapest exact step without VNNI: maddubs into int16, added in int16 while the levels are few.
LOWBIT_AVX2_INLINE __m256i add_products(__m256i acc, __m256i a, __m256i b) {
#if defined(__GNUC__)  // as it stands, or the product would be computed once
  __m256i product;
  __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  return acc;
#else
  return _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b));
#endif
}

LOWBIT_AVX2 int64_t peak_avx2(int64_t steps, int32_t* sink) {
  const __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  __m256i s0 = a, s1 = a, s2 = a, s3 = a;  // no array: GCC keeps one in memory
  for (int64_t i = 0; i < steps; ++i) {
    s0 = add_products(s0, a, b);
    s1 = add_products(s1, a, b);
    s2 = add_products(s2, a, b);
    s3 = add_products(s3, a, b);
  }
  *sink += _mm256_extract_epi32(_mm256_add_epi16(_mm256_add_epi16(s0, s1), _mm256_add_epi16(s2, s3)), 0);
  return steps * 4 * 32;
}

#if defined(__GNUC__)
#define LOWBIT_VNNI __attribute__((target("avx512f,avx512vnni")))
#else
#define LOWBIT_VNNI
#endif

LOWBIT_VNNI int64_t peak_vnni(int64_t steps, int32_t* sink) {
  constexpr int kChains = 12;
  __m512i acc[kChains], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int j = 0; j < kChains; ++j) acc[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < steps; ++i)
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
  alignas(64) int32_t lanes[16];
  for (int j = 0; j < kChains; ++j) {
    _mm512_store_si512(lanes, acc[j]);
    *sink += lanes[0];
  }
  return steps * kChains * 64;
}
#endif

const Row<PeakFn> kRows[] = {
#if LOWBIT_X86
    {"avx512", kAvx512 | kVnni, peak_vnni}, {"avx2", kAvx2, peak_avx2},
#endif
    {"scalar", 0, peak_scalar}};

}  // namespace

const Table<PeakFn> kInt8Peak = {"int8_peak", kRows, sizeof kRows / sizeof *kRows};

int64_t int8_peak(int64_t steps, int n_threads, const std::string& force) {
  const PeakFn fn = pick(kInt8Peak, force).fn;
  std::atomic<int64_t> macs{0};
  std::atomic<int32_t> sink{0};
  parallel_for(n_threads, n_threads, [&](int64_t) {
    int32_t mine = 0;
    macs += fn(steps, &mine);
    sink += mine;
  });
  return macs;
}

}  // namespace lowbit
