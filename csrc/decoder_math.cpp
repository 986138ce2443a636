// The rows of decoder_math.h from one source (decoder_math.inc), for as many instruction sets as the compiler can aim
// at function by function. -ffp-contract=off and a fixed number of lanes: the rows are equal bit for bit.
#include "decoder_math.h"

#include <cmath>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define LOWBIT_VECTORS 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between static functions of this file only
#endif
#else
#define LOWBIT_VECTORS 0
#endif

namespace lowbit {
namespace {

namespace scalar_row {
#define LOWBIT_FN
#if LOWBIT_VECTORS
constexpr int W = 4;
#else
constexpr int W = 1;
#endif
#include "decoder_math.inc"
#undef LOWBIT_FN
}  // namespace scalar_row

#if LOWBIT_X86 && LOWBIT_VECTORS
namespace avx2_row {
#define LOWBIT_FN __attribute__((target("avx2,fma")))
constexpr int W = 8;
#include "decoder_math.inc"
#undef LOWBIT_FN
}  // namespace avx2_row

namespace avx512_row {
#define LOWBIT_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
constexpr int W = 16;
#include "decoder_math.inc"
#undef LOWBIT_FN
}  // namespace avx512_row
#endif

const Row<DecoderMath> kRows[] = {
#if LOWBIT_X86 && LOWBIT_VECTORS
    {"avx512", kAvx512, avx512_row::kRow},
    {"avx2", kAvx2, avx2_row::kRow},
#endif
    {"scalar", 0, scalar_row::kRow}};

}  // namespace

const Table<DecoderMath> kDecoderMath = {"decoder_math", kRows, sizeof kRows / sizeof *kRows};

}  // namespace lowbit
