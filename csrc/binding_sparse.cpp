// lowbit._kernels: sparse products. Checks every size and index, releases the GIL, calls.
#include <nanobind/stl/string.h>

#include "binding_sparse.h"

using nb::literals::operator""_a;

namespace {

using namespace lowbit::binding;

nb::bytes pack_sparse(Index start, Indices column, Vector value, Vector factor, int64_t k, bool integer) {
  const lowbit::Places p = places(start, column, value, k);
  check(p);
  need(dim(factor, 0) == (integer ? p.n : 0), "one factor a row, for integers only");
  const auto out =
      lowbit::pack_sparse(p, integer ? lowbit::SparseKind::kInt : lowbit::SparseKind::kFloat, factor.data());
  return nb::bytes(reinterpret_cast<const char*>(out.data()), out.size());
}

void sparse_linear(Floats x, Index start, Indices column, Vector value, Array<const uint8_t, 1> steps,
                   Array<float, 2> y, int n_threads, const std::string& isa) {
  const Exceptions added(start, column, value, steps);
  const lowbit::Places p = added.places(dim(x, 1));
  const lowbit::Steps s = added.prepared_for(p);
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
