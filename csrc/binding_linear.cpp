// lowbit._kernels: a linear layer's constants, checked once; a call then takes two addresses.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "binding_sparse.h"
#include "linear_int8.h"
#include "pool.h"

using nb::literals::operator""_a;

namespace lowbit::binding {
namespace {

using Bytes = Array<const uint8_t, 1>;

std::string forced() {
  const char* isa = std::getenv("LOWBIT_ISA");
  return isa ? isa : "";
}

// What both kinds of layer have: exceptions, or none, and the row that runs as long as LOWBIT_ISA stays what it was.
class LinearPlan {
 public:
  LinearPlan(Bytes packed, std::optional<Exceptions> added, const std::string& isa, nb::dict buffers)
      : packed_(std::make_unique<Packed>(packed.data(), dim(packed, 0))), isa_(isa), forced_(forced()) {
    n_ = packed_->h.n, k_ = packed_->h.k;
    keep_ = nb::make_tuple(packed);
    add(added, buffers);
  }

  LinearPlan(Codes codes, Floats table, Floats scale, Floats zero, int bits, int64_t k, std::optional<Exceptions> added,
             const std::string& isa, nb::dict buffers)
      : weights_(weights(codes, scale, zero, bits, k)), isa_(isa), forced_(forced()) {
    weights_.table = table.data();
    weights_.table_rows = table_rows(table, weights_);
    n_ = weights_.n, k_ = k;
    keep_ = nb::make_tuple(codes, table, scale, zero);
    add(added, buffers);
  }

  // y [m, n] = x [m, k] @ w_hat.T + S x + bias, bare addresses that direct.py has checked; bias [n] or 0.
  // False, and nothing done, where LOWBIT_ISA has changed, or buffers holds other objects than when the plan was made.
  bool run(uintptr_t x, int64_t m, uintptr_t y, uintptr_t bias, nb::dict buffers, int n_threads) const {
    const char* isa = std::getenv("LOWBIT_ISA");
    if (forced_ != (isa ? isa : "") || !same(buffers)) return false;
    const float *from = reinterpret_cast<const float*>(x), *add = reinterpret_cast<const float*>(bias);
    float* const to = reinterpret_cast<float*>(y);
    nb::gil_scoped_release release;
    if (m == 0 || n_ == 0) return true;
    if (packed_) linear_int8(*packed_, from, m, steps_ ? nullptr : add, to, n_threads, isa_);
    else linear_float(weights_, from, m, to, n_threads, isa_);
    if (steps_) sparse_linear(places_, *steps_, from, m, to, n_threads, isa_);
    if (add && (steps_ || !packed_))  // last, so that every path rounds alike
      parallel_for(m, m * n_ < (1 << 16) ? 1 : n_threads, [&](int64_t i) {
        for (int64_t n = 0; n < n_; ++n) to[i * n_ + n] += add[n];
      });
    return true;
  }

 private:
  bool same(nb::dict buffers) const {
    if (buffers.size() != buffers_.size()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const nb::object& kept : buffers_)
      if (!PyDict_Next(buffers.ptr(), &at, &key, &value) || value != kept.ptr()) return false;
    return true;
  }

  void add(const std::optional<Exceptions>& added, nb::dict buffers) {
    for (const auto& [name, buffer] : buffers) buffers_.push_back(nb::borrow(buffer));
    if (!added) return;
    places_ = added->places(k_);
    steps_ = std::make_unique<Steps>(added->prepared_for(places_));
    need(places_.n == n_, "exceptions of " + str(places_.n) + " rows for a matrix of " + str(n_));
    keep_ = nb::make_tuple(keep_, *added);
  }

  std::vector<nb::object> buffers_;  // of the layer: kept alive, so that no other object takes their place
  nb::object keep_;  // owns the arrays that the pointers lead into
  std::unique_ptr<Packed> packed_;  // int8 activations, or
  Weights weights_;                 // floats
  Places places_{};
  std::unique_ptr<Steps> steps_;
  int64_t n_, k_;
  std::string isa_, forced_;
};

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Exceptions>(m, "Exceptions")
      .def(nb::init<Index, Indices, Vector, Bytes>(), "start"_a.noconvert(), "column"_a.noconvert(),
           "value"_a.noconvert(), "steps"_a.noconvert());
  nb::class_<LinearPlan>(m, "LinearPlan")
      .def(nb::init<Bytes, std::optional<Exceptions>, const std::string&, nb::dict>(), "packed"_a.noconvert(),
           "added"_a.none(), "isa"_a, "buffers"_a)
      .def(nb::init<Codes, Floats, Floats, Floats, int, int64_t, std::optional<Exceptions>, const std::string&,
                    nb::dict>(),
           "codes"_a.noconvert(), "table"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert(), "bits"_a, "k"_a,
           "added"_a.none(), "isa"_a, "buffers"_a)
      .def("run", &LinearPlan::run, "x"_a, "m"_a, "y"_a, "bias"_a, "buffers"_a, "n_threads"_a);
}

}  // namespace lowbit::binding
