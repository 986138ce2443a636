// The rows of search.h from one source (search.inc). -ffp-contract=off and a fixed number of lanes: equal bit for bit.
#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"

namespace lowbit {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int64_t kBlocks = 64;        // a piece of work

#if defined(__GNUC__) || defined(__clang__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file only
#endif
constexpr size_t kLanes = 16;  // of whatever width the machine has: the compiler cuts a vector into what fits
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
#define LOWBIT_CONVERT(v, T) __builtin_convertvector(v, T)
#else
constexpr size_t kLanes = 1;
typedef float V;
typedef int32_t I;
#define LOWBIT_CONVERT(v, T) static_cast<T>(v)
#endif

namespace scalar_row {
#define LOWBIT_FN
#include "search.inc"
#undef LOWBIT_FN
}  // namespace scalar_row

#if LOWBIT_X86 && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_AIMED 1
namespace avx2_row {
#define LOWBIT_FN __attribute__((target("avx2,fma")))
#include "search.inc"
#undef LOWBIT_FN
}  // namespace avx2_row

namespace avx512_row {
#define LOWBIT_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#include "search.inc"
#undef LOWBIT_FN
}  // namespace avx512_row
#endif

const Row<ScaleSearchRow> kRows[] = {
#if LOWBIT_AIMED
    {"avx512", kAvx512, avx512_row::kRow},
    {"avx2", kAvx2, avx2_row::kRow},
#endif
    {"scalar", 0, scalar_row::kRow}};

}  // namespace

const Table<ScaleSearchRow> kScaleSearch = {"scale_search", kRows, sizeof kRows / sizeof *kRows};

void scale_errors(const ScaleSearch& s, int n_threads, const std::string& isa) {
  const ScaleSearchRow& row = pick(kScaleSearch, isa).fn;
  parallel_for((s.blocks + kBlocks - 1) / kBlocks, n_threads, [&](int64_t i) {
    row.errors(s, i * kBlocks, std::min(s.blocks, (i + 1) * kBlocks));
  });
}

}  // namespace lowbit
