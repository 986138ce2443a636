// What every kernel file shares: the packed weight, the table rows, and how one row is picked.
//
//   w_hat[n,k] = (table[code[n,k]] - zero[n,g]) * scale[n,g],  g = k / (K/G)
//
// Codes are a little-endian bit stream per row: code k occupies bits [k*bits, (k+1)*bits), and each row starts on
// a byte. No Python and no torch in here; binding.cpp checks every number before a kernel sees it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if !defined(LOWBIT_X86)  // -DLOWBIT_X86=0 (-DLOWBIT_NEON=0) builds the scalar rows alone
#if defined(__x86_64__) || defined(_M_X64)
#define LOWBIT_X86 1
#else
#define LOWBIT_X86 0
#endif
#endif

#if !defined(LOWBIT_NEON)
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define LOWBIT_NEON 1
#else
#define LOWBIT_NEON 0
#endif
#endif

namespace lowbit {

// A packed matrix [N,K]; all pointers are borrowed. `table` serves the float ops, `levels` the integer op.
struct Weights {
  const uint8_t* codes = nullptr;  // [N, row_bytes], row_bytes = ceil(K*bits/8)
  const float* table = nullptr;    // [table_rows, 2^bits]
  const int8_t* levels = nullptr;  // [table_rows, 2^bits]
  const float* scale = nullptr;    // [N, groups]
  const float* zero = nullptr;     // [N, groups], or null for none
  int64_t n = 0, k = 0, row_bytes = 0, groups = 1, group = 0, table_rows = 1;
  int bits = 8;

  const uint8_t* row(int64_t i) const { return codes + i * row_bytes; }
  const float* table_row(int64_t i) const { return table + (table_rows == 1 ? 0 : i << bits); }
  const int8_t* levels_row(int64_t i) const { return levels + (table_rows == 1 ? 0 : i << bits); }
};

// How the integer op cuts K: each weight group into segments of `length` columns that share one activation scale, the
// last of a group ragged, each padded with zeros to `length`. 32: language models have single huge activations, and
// whatever shares their scale loses its bits (SmolLM2 at 4 bits: perplexity +0.8% with segments of 64, +0.3% with 32).
// 16 for small groups that would be mostly padding otherwise.
struct Segments {
  int64_t group, length, per_group, count, padded;  // padded: count, made even (the kernels take segments in pairs)

  Segments(int64_t groups, int64_t group_)
      : group(group_),
        length(group_ <= 112 && (group_ + 15) / 16 % 2 ? 16 : 32),
        per_group((group_ + length - 1) / length),
        count(groups * per_group),
        padded(count + count % 2) {}

  int64_t begin(int64_t s) const { return s / per_group * group + s % per_group * length; }
  int64_t size(int64_t s) const {
    const int64_t left = group - s % per_group * length;
    return left < length ? left : length;
  }
  int64_t row_size() const { return padded * length; }
};

// One table per operation; a row is one instruction set. Every fn works on a tile, so that threads (linear.cpp)
// only decide who computes which tile, never how: results do not depend on the number of threads.
using DecodeFn = void (*)(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);  // k0 a multiple of 8
// A row may want the columns of x in an order of its own: then x is [M, columns(w)], made token by token.
struct LinearFloat {
  int64_t (*columns)(const Weights&);                         // null: x as it is, [M,K]
  void (*arrange)(const Weights&, const float* x, float* out);  // one token
  void (*tile)(const Weights&, const float* x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
               float* y);  // y [M,N]; writes the tile [m0,m1) x [n0,n1)
};
using LinearFloatFn = const LinearFloat*;
// One token [K] to q [padded * length], scale [padded] and sum of q [padded]; zeros in all padding.
using QuantizeFn = void (*)(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);

template <class Fn>
struct Row {
  const char* isa;
  uint32_t needs;  // cpu_features() bits
  Fn fn;
};

enum : uint32_t {
  kAvx2 = 1,       // AVX2 + FMA, and an OS that saves the wide registers
  kAvx512 = 2,     // AVX-512 F, BW, DQ, VL, and an OS that saves these
  kVnni = 4,       // AVX-512 VNNI
  kVpopcnt = 8,    // AVX-512 VPOPCNTDQ
  kVbmi = 16,      // AVX-512 VBMI
  kNeon = 32,      // 64-bit ARM
  kDotprod = 64,   // SDOT and UDOT
};
uint32_t cpu_features();

// LOWBIT_ISA names the best instruction set that may be used ("avx512", "avx2", "scalar"; "dotprod", "neon", "scalar"); an operation without a row
// of that name, or whose row needs more than this CPU has, takes its next one. Returns the rank (0 is best, "" too);
// throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
int isa_rank(const std::string& isa, const char* op);
int rank_of(const std::string& isa);  // of a known name

template <class Fn>
struct Table {
  const char* op;
  const Row<Fn>* rows;  // best first, "scalar" last
  size_t count;
};
extern const Table<DecodeFn> kDecode;
extern const Table<LinearFloatFn> kLinearFloat;
extern const Table<QuantizeFn> kQuantize;

// The first row this CPU can run and that `force` (LOWBIT_ISA) allows.
template <class Fn>
const Row<Fn>& pick(const Table<Fn>& table, const std::string& force) {
  const int best = isa_rank(force, table.op);
  const uint32_t cpu = cpu_features();
  size_t i = 0;
  while (i + 1 < table.count && ((table.rows[i].needs & cpu) != table.rows[i].needs || rank_of(table.rows[i].isa) < best))
    ++i;
  return table.rows[i];
}

// The operations, threaded. `force` as in pick(); n_threads <= 1 runs on the caller.
void decode_rows(const Weights&, const int64_t* rows, int64_t count, float* out, int n_threads,
                 const std::string& force);  // rows may be null: 0..count-1
void linear_float(const Weights&, const float* x, int64_t m, float* y, int n_threads, const std::string& force);

}  // namespace lowbit
