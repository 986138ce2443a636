// lowbit._kernels: sparse products. Checks every size and index, releases the GIL, calls.
#include <nanobind/stl/string.h>

#include "binding.h"
#include "sparse.h"

using nb::literals::operator""_a;

namespace {

using namespace lowbit::binding;
using Index = Array<const int64_t, 1>;
using Columns = Array<const int32_t, 1>;
using Values = Array<const float, 1>;

lowbit::Places places(const Index& start, const Columns& column, const Values& value, int64_t k) {
  const int64_t n = dim(start, 0) - 1, count = dim(column, 0);
  need(n >= 0 && n < kMaxDim && k >= 1 && k < kMaxDim, "a sparse matrix of " + str(n) + " x " + str(k));
  need(count == dim(value, 0) && start(0) == 0 && start(static_cast<size_t>(n)) == count,
       "offsets, columns and values of contradicting sizes");
  return {n, k, start.data(), column.data(), value.data()};
}

// Rows that rise, columns that rise within them and lie in 0 .. k-1.
void check(const lowbit::Places& p) {
  for (int64_t n = 0; n < p.n; ++n) {
    need(p.start[n] <= p.start[n + 1], "offsets do not rise at row " + str(n));
    for (int64_t i = p.start[n]; i < p.start[n + 1]; ++i)
      need(p.column[i] >= 0 && p.column[i] < p.k && (i == p.start[n] || p.column[i - 1] < p.column[i]),
           "column " + str(p.column[i]) + " of row " + str(n) + " is outside 0.." + str(p.k - 1) + " or does not rise");
  }
}

nb::bytes pack_sparse(Index start, Columns column, Values value, Values factor, int64_t k, bool integer) {
  const lowbit::Places p = places(start, column, value, k);
  check(p);
  need(dim(factor, 0) == (integer ? p.n : 0), "one factor a row, for integers only");
  const auto out =
      lowbit::pack_sparse(p, integer ? lowbit::SparseKind::kInt : lowbit::SparseKind::kFloat, factor.data());
  return nb::bytes(reinterpret_cast<const char*>(out.data()), out.size());
}

void sparse_linear(Floats x, Index start, Columns column, Values value, Array<const uint8_t, 1> steps,
                   Array<float, 2> y, int n_threads, const std::string& isa) {
  const lowbit::Places p = places(start, column, value, dim(x, 1));
  const lowbit::Steps s(steps.data(), dim(steps, 0));
  need(s.h.n == p.n && s.h.k == p.k, "the exceptions were prepared for another matrix");
  need(dim(y, 0) == dim(x, 0) && dim(y, 1) == p.n, "y has shape " + shape(y) + " for x " + shape(x));
  const float* from = x.data();
  const int64_t m = dim(x, 0);
  float* to = y.data();
  nb::gil_scoped_release release;
  if (m > 0 && p.n > 0) lowbit::sparse_linear(p, s, from, m, to, n_threads, isa);
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def("pack_sparse", &pack_sparse, "start"_a.noconvert(), "column"_a.noconvert(), "value"_a.noconvert(),
        "factor"_a.noconvert(), "k"_a, "integer"_a);
  m.def("sparse_linear", &sparse_linear, "x"_a.noconvert(), "start"_a.noconvert(), "column"_a.noconvert(),
        "value"_a.noconvert(), "steps"_a.noconvert(), "y"_a.noconvert(), "n_threads"_a, "isa"_a,
        "y += x @ S.T; `steps` from pack_sparse of the same matrix, unchanged");
}
