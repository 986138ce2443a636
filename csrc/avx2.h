// What the AVX2 files share. Each function carries the target attribute, so that no other code of the library (and
// no inline function of a standard header) is compiled for AVX2. MSVC needs no attribute for intrinsics.
#pragma once
#include "rows.h"

#if LOWBIT_X86
#include <immintrin.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_AVX2
#define LOWBIT_AVX2_INLINE static __forceinline
#else
#define LOWBIT_AVX2 __attribute__((target("avx2,fma")))
#define LOWBIT_AVX2_INLINE static inline __attribute__((target("avx2,fma"), always_inline))
#endif

namespace lowbit {
// Codes [k0,k1) of a row to bytes; k0 a multiple of 8. Writes whole vectors: up to 31 bytes past out + (k1-k0).
// Never reads outside [row, row + row_bytes).
void unpack_avx2(const uint8_t* row, int64_t row_bytes, int bits, int64_t k0, int64_t k1, uint8_t* out);

// All-ones in the first n (0..8) 32-bit lanes.
LOWBIT_AVX2_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
}  // namespace lowbit
#endif
