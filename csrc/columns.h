// The inner loops of the layer-wise solvers: a block of columns, each rounded and its error fed to the others.
#pragma once
#include <cstdint>

namespace lowbit {

// Grids of a block of columns, one grid per row of w and group. Integer levels: code = clamp(rint(x/divisor) + zero),
// or rint(x/divisor + zero) with real zeros. Other levels: code = number of thresholds below x/divisor.
struct ColumnGrids {
  const float *scale, *divisor, *zero;  // [groups, out]; zero null for none
  const int32_t* group_of;              // [count], group of each column
  const float *thresholds, *values;     // [levels-1], [levels] ascending; thresholds null for consecutive integers
  int levels;                           // 2..256
  bool real_zero;
};

// count columns of out weights each, one column after the other.
struct ColumnBlock {
  float* columns;   // [count, out] feedback: compensated weights; descent: the rounded weights, replaced
  float* other;     // [count, out] feedback: the errors, written; descent: the gradient H (w - q), updated in the block
  float* moved;     // [count, out] descent: what each column moved by; null: error feedback
  const float* u;   // [count, count] feedback: U, upper; descent: H
  uint8_t* codes;   // [count, out]
  int64_t count, out;
};

// feedback: q = round(c_j), e_j = (c_j - q) / U_jj, c_k -= U_jk e_j for k > j in the block
// descent:  q' = round(q_j + g_j / H_jj), moved_j = q' - q_j, g_k -= H_kj moved_j for all k in the block
void solve_columns(const ColumnBlock&, const ColumnGrids&, int n_threads);

}  // namespace lowbit
