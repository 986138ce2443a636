// Sparse matrices out of arrays, checked: for sparse products and for the decoder's exceptions.
#pragma once
#include "binding.h"
#include "sparse.h"

namespace lowbit::binding {

using Index = Array<const int64_t, 1>;
using Indices = Array<const int32_t, 1>;
using Vector = Array<const float, 1>;

inline Places places(const Index& start, const Indices& column, const Vector& value, int64_t k) {
  const int64_t n = dim(start, 0) - 1, count = dim(column, 0);
  need(n >= 0 && n < kMaxDim && k >= 1 && k < kMaxDim, "a sparse matrix of " + str(n) + " x " + str(k));
  need(count == dim(value, 0) && start(0) == 0 && start(static_cast<size_t>(n)) == count,
       "offsets, columns and values of contradicting sizes");
  return {n, k, start.data(), column.data(), value.data()};
}

// Rows that rise, columns that rise within them and lie in 0 .. k-1.
inline void check(const Places& p) {
  for (int64_t n = 0; n < p.n; ++n) {
    need(p.start[n] <= p.start[n + 1], "offsets do not rise at row " + str(n));
    for (int64_t i = p.start[n]; i < p.start[n + 1]; ++i)
      need(p.column[i] >= 0 && p.column[i] < p.k && (i == p.start[n] || p.column[i - 1] < p.column[i]),
           "column " + str(p.column[i]) + " of row " + str(n) + " is outside 0.." + str(p.k - 1) + " or does not rise");
  }
}

// The arrays of a sparse matrix prepared for the kernels.
struct Exceptions {
  Index start;
  Indices column;
  Vector value;
  Array<const uint8_t, 1> steps;

  Exceptions(Index start_, Indices column_, Vector value_, Array<const uint8_t, 1> steps_)
      : start(start_), column(column_), value(value_), steps(steps_) {}

  Places places(int64_t k) const { return binding::places(start, column, value, k); }
  Steps prepared_for(const Places& p) const {
    const Steps s(steps.data(), dim(steps, 0));
    need(s.h.n == p.n && s.h.k == p.k, "the exceptions were prepared for another matrix");
    return s;
  }
};

}  // namespace lowbit::binding
