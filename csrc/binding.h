// What the binding files share: array types, and the checks that every number of a packed weight goes through.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "kernels.h"

namespace nb = nanobind;

namespace lowbit::binding {

template <class T, size_t Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Codes = Array<const uint8_t, 2>;
using Floats = Array<const float, 2>;
using Levels = Array<const int8_t, 2>;

// No product of two sizes used below may overflow int64.
constexpr int64_t kMaxDim = int64_t{1} << 31;

inline void need(bool ok, const std::string& what) {
  if (!ok) throw nb::value_error(what.c_str());
}

inline std::string str(int64_t v) { return std::to_string(v); }

template <class A>
std::string shape(const A& a) {
  std::string s = "[";
  for (size_t i = 0; i < a.ndim(); ++i) s += (i ? ", " : "") + std::to_string(a.shape(i));
  return s + "]";
}

template <class A>
int64_t dim(const A& a, size_t i) {
  return static_cast<int64_t>(a.shape(i));
}

// All of a packed weight but its table. K comes from the caller (x's columns): the codes alone do not tell it.
inline lowbit::Weights weights(const Codes& codes, const Floats& scale, const Floats& zero, int bits, int64_t k) {
  lowbit::Weights w;
  need(bits >= 1 && bits <= 8, "bits is " + str(bits) + "; it must be 1 to 8");
  need(k >= 1 && k < kMaxDim, "K is " + str(k) + "; it must be 1 to 2^31-1");
  w.bits = bits;
  w.k = k;
  w.n = dim(codes, 0);
  w.row_bytes = dim(codes, 1);
  need(w.n < kMaxDim, "too many rows: " + str(w.n));
  const int64_t bytes = (k * bits + 7) / 8;
  need(w.row_bytes == bytes, "codes have shape " + shape(codes) + "; " + str(k) + " codes of " + str(bits) +
                                 " bits need [N, " + str(bytes) + "]");
  w.groups = dim(scale, 1);
  need(dim(scale, 0) == w.n && w.groups >= 1, "scale has shape " + shape(scale) + "; it must be [" + str(w.n) + ", G]");
  need(k % w.groups == 0, "K = " + str(k) + " does not divide into " + str(w.groups) + " groups");
  w.group = k / w.groups;
  if (zero.size() != 0)
    need(dim(zero, 0) == w.n && dim(zero, 1) == w.groups,
         "zero has shape " + shape(zero) + "; it must be that of scale, " + shape(scale) + ", or empty");
  w.codes = codes.data();
  w.scale = scale.data();
  w.zero = zero.size() == 0 ? nullptr : zero.data();
  return w;
}

template <class A>
int64_t table_rows(const A& table, const lowbit::Weights& w) {
  need((dim(table, 0) == 1 || dim(table, 0) == w.n) && dim(table, 1) == int64_t{1} << w.bits,
       "table has shape " + shape(table) + "; it must be [1 or " + str(w.n) + ", " + str(1 << w.bits) + "]");
  return dim(table, 0);
}

void bind_binary(nb::module_& m);  // binding_binary.cpp
void bind_conv(nb::module_& m);    // binding_conv.cpp
void bind_linear(nb::module_& m);  // binding_linear.cpp

}  // namespace lowbit::binding
