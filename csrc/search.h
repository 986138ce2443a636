// What each candidate scale of a block of weights would cost: the inner loop of searched scales.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace lowbit {

// blocks of n weights; candidates scales (and zeros) for each. Integer levels bottom .. top.
struct ScaleSearch {
  const float *w, *importance;  // [blocks, n]; importance null: all 1
  const float *scale, *zero;    // [candidates, blocks]; zero null for none
  int64_t blocks, n, candidates;
  float bottom, top;
  bool real_zero;
  float norm;    // > 0
  float* error;  // [candidates, blocks]
};

struct ScaleSearchRow {
  // error = sum_i importance |w_hat - w|^norm of blocks b0 .. b1, w_hat the nearest level. |.|^norm to 1e-6 relative.
  void (*errors)(const ScaleSearch&, int64_t b0, int64_t b1);
};

extern const Table<ScaleSearchRow> kScaleSearch;
void scale_errors(const ScaleSearch&, int n_threads, const std::string& isa);

}  // namespace lowbit
