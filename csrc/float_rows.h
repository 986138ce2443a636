// What the files that include float_rows.inc share with it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"

namespace lowbit {

// Minifloat of code a: a*smallest below `limit` (no exponent yet), else the float32 of bits (a << shift) + bias.
struct Mini {
  int32_t middle, top, limit, shift, bias;
  float smallest;

  float at(int32_t c) const {
    const int32_t i = std::min(c - middle, top), a = i < 0 ? -i : i;
    const int32_t bits = a * (1 << shift) + bias;
    float v = static_cast<float>(a) * smallest;
    if (a >= limit) std::memcpy(&v, &bits, sizeof v);
    return i < 0 ? -v : v;
  }
};

}  // namespace lowbit
