// The tables: best row first, "scalar" last and always there. And what this CPU can run.
#include "rows.h"
#include "sparse.h"

#if LOWBIT_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif LOWBIT_NEON && defined(__APPLE__)
#include <sys/sysctl.h>
#elif LOWBIT_NEON && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace {

#if LOWBIT_X86
void cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4]) {
#if defined(_MSC_VER)
  int r[4];
  __cpuidex(r, static_cast<int>(leaf), static_cast<int>(sub));
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint32_t>(r[i]);
#else
  __cpuid_count(leaf, sub, out[0], out[1], out[2], out[3]);
#endif
}

uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

uint32_t detect() {
  uint32_t r[4];
  cpuid(0, 0, r);
  if (r[0] < 7) return 0;
  cpuid(1, 0, r);
  const bool fma = (r[2] >> 12 & 1) && (r[2] >> 29 & 1), osxsave = r[2] >> 27 & 1, avx = r[2] >> 28 & 1;
  if (!fma || !osxsave || !avx) return 0;
  const uint64_t saved = xcr0();
  if ((saved & 6) != 6) return 0;  // the OS must save XMM and YMM state
  cpuid(7, 0, r);
  const uint32_t b = r[1], c = r[2];
  if (!(b >> 5 & 1)) return 0;
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  if ((saved & 0xe0) != 0xe0 || !f || !dq || !bw || !vl) return kAvx2;  // and the mask and ZMM state
  return kAvx2 | kAvx512 | (c >> 11 & 1) * kVnni | (c >> 14 & 1) * kVpopcnt | (c >> 1 & 1) * kVbmi;
}
#elif LOWBIT_NEON
uint32_t detect() {
#if defined(__APPLE__)
  int dot = 0;
  size_t size = sizeof dot;
  if (sysctlbyname("hw.optional.arm.FEAT_DotProd", &dot, &size, nullptr, 0) != 0) dot = 0;
  return kNeon | (dot != 0) * kDotprod;
#elif defined(__linux__)
  return kNeon | ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) * kDotprod;
#else
  return kNeon;
#endif
}
#else
uint32_t detect() { return 0; }
#endif

#if LOWBIT_X86
#define LOWBIT_ROWS(name) {"avx2", kAvx2, name##_avx2}, {"scalar", 0, name##_scalar}
#elif LOWBIT_NEON
#define LOWBIT_ROWS(name) {"neon", kNeon, name##_neon}, {"scalar", 0, name##_scalar}
#else
#define LOWBIT_ROWS(name) {"scalar", 0, name##_scalar}
#endif

const Row<DecodeFn> kDecodeRows[] = {LOWBIT_ROWS(decode)};
const Row<LinearFloatFn> kLinearFloatRows[] = {
#if LOWBIT_X86
    {"avx512", kAvx2 | kAvx512 | kVbmi, &linear_float_avx512},
    {"avx2", kAvx2, &linear_float_avx2},
#elif LOWBIT_NEON
    {"neon", kNeon, &linear_float_neon},
#endif
    {"scalar", 0, &linear_float_scalar}};
const Row<SparseFn> kSparseRows[] = {
#if LOWBIT_X86
    {"avx512", kAvx2 | kAvx512 | kVbmi | kVnni, &sparse_avx512},
    {"avx2", kAvx2, &sparse_avx2},
#elif LOWBIT_NEON
    {"neon", kNeon, &sparse_neon},
#endif
    {"scalar", 0, &sparse_scalar}};
const Row<QuantizeFn> kQuantizeRows[] = {
#if LOWBIT_X86
    {"avx512", kAvx2 | kAvx512, quantize_avx512},
#endif
    LOWBIT_ROWS(quantize)};
const Row<LinearInt8Fn> kLinearInt8Rows[] = {
#if LOWBIT_X86
    {"avx512", kAvx2 | kAvx512 | kVnni, linear_int8_avx512},
#elif LOWBIT_NEON
    {"dotprod", kNeon | kDotprod, linear_int8_dotprod},
#endif
    LOWBIT_ROWS(linear_int8)};

struct Isa {
  const char* name;
  uint32_t needs;
};
constexpr Isa kIsas[] = {{"avx512", kAvx2 | kAvx512},  // best first
                         {"avx2", kAvx2},
                         {"dotprod", kNeon | kDotprod},
                         {"neon", kNeon},
                         {"scalar", 0}};

template <class Fn, size_t N>
constexpr Table<Fn> make(const char* op, const Row<Fn> (&rows)[N]) {
  return {op, rows, N};
}

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

int rank_of(const std::string& isa) {
  int rank = 0;
  while (isa != kIsas[rank].name) ++rank;
  return rank;
}

int isa_rank(const std::string& isa, const char* op) {
  std::string can;
  for (const Isa& known : kIsas) {
    if ((known.needs & cpu_features()) != known.needs) continue;
    if (isa.empty()) return 0;
    if (isa == known.name) return rank_of(isa);
    can += (can.empty() ? "" : " or ") + std::string("LOWBIT_ISA=") + known.name;
  }
  throw std::invalid_argument("LOWBIT_ISA=" + isa + " is unknown or not supported by this CPU for " + op +
                              "; unset it, or type " + can);
}

const Table<DecodeFn> kDecode = make("decode", kDecodeRows);
const Table<LinearFloatFn> kLinearFloat = make("linear_float", kLinearFloatRows);
const Table<SparseFn> kSparse = make("sparse_linear", kSparseRows);
const Table<QuantizeFn> kQuantize = make("quantize", kQuantizeRows);
const Table<LinearInt8Fn> kLinearInt8 = make("linear_int8", kLinearInt8Rows);

}  // namespace lowbit
