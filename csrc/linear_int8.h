// y = x @ w_hat.T + bias with int8 activations, threaded. `force` as in pick(); n_threads <= 1 runs on the caller.
#pragma once
#include <vector>

#include "packed.h"

namespace lowbit {

struct TokenBuffer {  // memory that calls may share one after the other
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;
};
struct OperandBuffer {
  std::vector<float> scale, group_sum;
  std::vector<int32_t> start;
};

// x [m, k] float32 -> y [m, n]; bias [n] or null.
void linear_int8(const Packed&, const float* x, int64_t m, const float* bias, float* y, int n_threads,
                 const std::string& force);

// In two halves, for matrices that read the same x in the same segments (query, key and value; gate and up): `seg`
// is the `seg` of any of them, k its columns. The result borrows from the buffer.
Tokens quantize_tokens(const Segments& seg, int64_t k, const float* x, int64_t m, TokenBuffer&, int n_threads,
                       const std::string& force);
struct ProductInt8 {
  const Packed& w;
  const float* bias;  // [n] or null
  float* y;           // [m, n]
};
void linear_int8(const std::vector<ProductInt8>&, const Tokens&, int n_threads, const std::string& force);

}  // namespace lowbit
