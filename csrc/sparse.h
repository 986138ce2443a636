// y += S x for a sparse matrix S [N,K]: the exceptions of a packed weight.
//
// Few tokens: x is looked up with byte shuffles, which see a window of W columns (128 bytes, or 32 floats). Sixteen rows
// make a panel; each step of a panel names the window's first column and gives every row up to S places in it, each an
// offset below W and a value. Rows move on as fast as their places allow, so few slots stay empty (offset 0, value 0).
//
//   kInt    W = 128, S = 4    values int8 times a factor per row, x rounded to 15 bits of its token's largest
//   kFloat  W = 32,  S = 1    values and x as they are
//
// Many tokens: one place after the other, with all tokens of a tile side by side.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace lowbit {

enum class SparseKind : int64_t { kFloat = 0, kInt = 1 };

struct Places {  // row by row, columns rising; all borrowed
  int64_t n, k;
  const int64_t* start;  // [n+1]
  const int32_t* column;
  const float* value;    // kInt: whole multiples of the row's factor, at most 127 of them
};

struct SparseHeader {
  uint64_t magic;
  int64_t bytes, n, k, steps;
  SparseKind kind;
};

// A view of the steps of all panels; the buffer is borrowed.
struct Steps {
  static constexpr int64_t kRows = 16, kHeader = 64;
  static constexpr uint64_t kMagic = 0x3130737073776f6c;

  SparseHeader h;
  const int32_t* first;   // [panels+1]: steps of a panel
  const int32_t* column;  // [steps]: where the window begins
  const float* factor;    // kInt: [panels*16], and sums of the rows' values below
  const int64_t* sum;
  const uint8_t* offset;  // [steps][16][S]
  const void* value;      // the same, int8 or float

  // Throws std::invalid_argument for a buffer that does not have the size it states.
  Steps(const uint8_t* buffer, int64_t bytes);

  static constexpr int64_t window(SparseKind kind) { return kind == SparseKind::kInt ? 128 : 32; }
  static constexpr int64_t align(SparseKind kind) { return kind == SparseKind::kInt ? 64 : 1; }  // of windows
  static constexpr int64_t slots(SparseKind kind) { return kind == SparseKind::kInt ? 4 : 1; }
  int64_t panels() const { return (h.n + kRows - 1) / kRows; }
};

// factor [n]: kInt only.
std::vector<uint8_t> pack_sparse(const Places&, SparseKind, const float* factor);

// One token, rounded: x ~ (u - 2^14) * scale, u = 2^7 d[0] + d[1]. Digits are padded by a window of zeros, and begin at
// a multiple of 64 bytes, as the windows of kInt do.
struct Digits {
  const uint8_t* d[2];
  float scale;
};

struct SparseRow {
  // Panels [p0,p1) of 1 to kFewTokens tokens, which share what is read of the steps; x[t] padded by a window of zeros,
  // y [tokens, n].
  void (*few)(const Steps&, const float* const* x, int64_t tokens, int64_t p0, int64_t p1, float* y);
  void (*few_int)(const Steps&, const Digits* x, int64_t tokens, int64_t p0, int64_t p1, float* y);
  // yt [n1-n0][kTokens] = S xt for rows [n0,n1), xt [k][kTokens]
  void (*many)(const Places&, const float* xt, int64_t n0, int64_t n1, float* yt);
};
constexpr int64_t kSparseTokens = 32, kPartial = 64;  // tokens of a tile; terms summed before they join the total
constexpr int64_t kFewTokens = 4;
using SparseFn = const SparseRow*;
extern const Table<SparseFn> kSparse;
extern const SparseRow sparse_scalar, sparse_avx2, sparse_avx512;

void sparse_linear(const Places&, const Steps&, const float* x, int64_t m, float* y, int n_threads,
                   const std::string& force);

}  // namespace lowbit
