// y += S x for a sparse matrix S [N,K]: the exceptions of a packed weight.
//
// Few tokens: x is looked up with byte shuffles, which see a window of W columns (128 bytes, or 32 floats). Sixteen rows
// make a panel; each step of a panel names the window's first column and gives every row up to S places in it, each an
// offset below W and a value. Rows move on as fast as their places allow, so few slots stay empty (offset 0, value 0).
//
//   kInt    W = 128, S = 4    values int8 times a factor per row, x rounded to 15 bits of its token's largest; where
//                             rows have few different values, also as codes of four bits: a quarter less to read
//   kFloat  W = 32,  S = 1    values and x as they are
//
// Many tokens stand side by side, a column of x for 32 of them being 128 bytes, and places are visited in tiles of 64
// rows and 128 columns, whose part of x and of y stay in the first cache. The rows of a tile are sorted by how many
// places they have there; four of about equal many make a group, and take a place each in turn (the shorter ones an
// empty one in the end: offset 0, value 0).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
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
  int64_t quads;  // slots of the tiles / 4
  int64_t coded;  // kInt: has every row at most kValues - 1 different values beside 0?
};

struct SparseGroup {
  uint8_t row[4], count, unused[3];  // rows within the tile's 64; count: places of the longest
};

// A view of the steps of all panels; the buffer is borrowed.
struct Steps {
  static constexpr int64_t kRows = 16, kHeader = 64;
  static constexpr uint64_t kMagic = 0x3330737073776f6c;

  SparseHeader h;
  const int32_t* first;   // [panels+1]: steps of a panel
  const int32_t* column;  // [steps]: where the window begins
  const float* factor;    // kInt: [panels*16], and sums of the rows' values below
  const int64_t* sum;
  const uint8_t* offset;  // [steps][16][S]
  const void* value;      // the same, int8 or float
  const uint8_t* code;    // coded: [steps][32], value as the number, of four bits, of one of its row's
  const int8_t* table;    // coded: [panels][16][kValues], 0 first

  const int32_t* quad;         // [tiles down + 1]: its first quad
  const SparseGroup* group;    // [tiles down][tiles across][16]
  const uint8_t* tile_offset;  // [quads][4]
  const void* tile_value;      // the same, int8 or float

  // Throws std::invalid_argument for a buffer that does not have the size it states.
  Steps(const uint8_t* buffer, int64_t bytes);

  static constexpr int64_t window(SparseKind kind) { return kind == SparseKind::kInt ? 128 : 32; }
  static constexpr int64_t align(SparseKind kind) { return kind == SparseKind::kInt ? 64 : 1; }  // of windows
  static constexpr int64_t slots(SparseKind kind) { return kind == SparseKind::kInt ? 4 : 1; }
  static constexpr int64_t kValues = 8;
  static constexpr int64_t kTileRows = 64, kTileColumns = 128, kGroups = kTileRows / 4;
  int64_t tiles_down() const { return (h.n + kTileRows - 1) / kTileRows; }
  int64_t tiles_across() const { return (h.k + kTileColumns - 1) / kTileColumns; }
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
  // yt [kTileRows][kTokens] = S xt for the rows of the tiles `down`, xt [k][kTokens]
  void (*many)(const Steps&, const float* xt, int64_t down, float* yt);
  // to[j][i] = from[i][j], or += that, for 16 x 16 numbers; ld: from one row to the next
  void (*turn)(const float* from, int64_t ld_from, float* to, int64_t ld_to, bool add);
  // d [2][ld], zeros from k on
  Digits (*digits)(const float* x, int64_t k, int64_t ld, uint8_t* d);
};

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_ALWAYS_INLINE __forceinline
#else
#define LOWBIT_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

// Loops without branches: compilers make vectors of them. Adding 1.5 * 2^23 rounds to whole numbers, ties to even.
LOWBIT_ALWAYS_INLINE Digits digits_of(const float* x, int64_t k, int64_t ld, uint8_t* d) {
  int32_t bits = 0;  // of |x|, which are ordered like |x|, NaN > Inf > all numbers
  for (int64_t i = 0; i < k; ++i) {
    int32_t each;
    std::memcpy(&each, x + i, sizeof each);
    bits = std::max(bits, each & 0x7fffffff);
  }
  const bool odd = bits >= 0x7f800000;
  float most;
  std::memcpy(&most, &bits, sizeof most);
  Digits out{{d, d + ld}, odd ? std::numeric_limits<float>::quiet_NaN() : most / 16383.0f};
  const float inverse = odd || most < 1e-30f ? 0.0f : 16383.0f / most;
  if (inverse == 0.0f && !odd) out.scale = 0;
  const float* __restrict from = x;  // bytes may be anything: without this each write could change x
  uint8_t *__restrict high = d, *__restrict low = d + ld;
  for (int64_t i = 0; i < k; ++i) {
    const float shifted = (odd ? 0.0f : from[i]) * inverse + 12582912.0f;
    int32_t u;
    std::memcpy(&u, &shifted, sizeof u);
    u += (1 << 14) - 0x4b400000;
    high[i] = static_cast<uint8_t>(u >> 7);
    low[i] = static_cast<uint8_t>(u & 127);
  }
  for (int j = 0; j < 2; ++j) std::memset(d + j * ld + k, 0, static_cast<size_t>(ld - k));
  return out;
}

constexpr int64_t kSparseTokens = 32, kPartial = 64;  // tokens of a tile; terms `few` sums before they join the total
constexpr int64_t kFewTokens = 4;
using SparseFn = const SparseRow*;
extern const Table<SparseFn> kSparse;
extern const SparseRow sparse_scalar, sparse_avx2, sparse_avx512, sparse_neon;

void sparse_linear(const Places&, const Steps&, const float* x, int64_t m, float* y, int n_threads,
                   const std::string& force);

}  // namespace lowbit
