// What the AVX-512 files share: target attributes, as in avx2.h. LOWBIT_AVX512_WITH("avx512vnni") adds to the base set.
#pragma once
#include "avx2.h"

#if LOWBIT_X86
#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_AVX512_WITH(more)
#define LOWBIT_AVX512_INLINE_WITH(more) static __forceinline
#else
#define LOWBIT_AVX512_WITH(more) __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl," more)))
#define LOWBIT_AVX512_INLINE_WITH(more) \
  static inline __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl," more), always_inline))
#endif
#endif
