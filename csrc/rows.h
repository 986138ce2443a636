// Every row by name: scalar.cpp defines the answers (built with -ffp-contract=off: a*b+c stays two roundings),
// avx2_*.cpp and avx512_*.cpp are x86 only, neon_*.cpp 64-bit ARM. rows.cpp puts them into the tables.
#pragma once
#include "packed.h"

namespace lowbit {
void decode_scalar(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);
extern const LinearFloat linear_float_scalar;
void quantize_scalar(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_scalar(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                        const float* bias, float* y);

void decode_avx2(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);
extern const LinearFloat linear_float_avx2, linear_float_avx512;
void quantize_avx2(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_avx2(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias,
                      float* y);

void quantize_avx512(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_avx512(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                        const float* bias, float* y);

void decode_neon(const Weights&, int64_t n, int64_t k0, int64_t k1, float* out);
extern const LinearFloat linear_float_neon;
void quantize_neon(const float* x, const Segments&, int8_t* q, float* scale, int32_t* sum);
void linear_int8_neon(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias,
                      float* y);
void linear_int8_dotprod(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                         const float* bias, float* y);
}  // namespace lowbit
