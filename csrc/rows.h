// Every row by name: scalar.cpp defines the answers (built with -ffp-contract=off: a*b+c stays two roundings),
// avx2_*.cpp are x86 only. rows.cpp puts them into the tables.
#pragma once
#include "kernels.h"

namespace lowbit {
void decode_scalar(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);
extern const LinearFloat linear_float_scalar;
void quantize_scalar(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_scalar(const Weights&, const Segments&, const Activations&, int64_t m0, int64_t m1, int64_t n0,
                        int64_t n1, float* y);

void decode_avx2(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);
extern const LinearFloat linear_float_avx2, linear_float_avx512;
void quantize_avx2(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_avx2(const Weights&, const Segments&, const Activations&, int64_t m0, int64_t m1, int64_t n0,
                      int64_t n1, float* y);
}  // namespace lowbit
