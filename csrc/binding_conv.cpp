// Binding of the int8 convolution: checks every size and hands over.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "conv.h"

using namespace nb::literals;

namespace lowbit::binding {
namespace {

using Bytes = Array<const uint8_t, 1>;
using Floats1 = Array<const float, 1>;
using Grid = std::tuple<float, float, float>;  // scale, low, high

IntQuantizer quantizer(const Grid& g, bool may_be_dynamic) {
  const auto& [scale, low, high] = g;
  need(std::isfinite(scale) && (scale > 0 || (may_be_dynamic && scale == 0)) && low >= -127 && high <= 127 && low <= high,
       "a grid of int8 activations needs a positive scale and levels within -127 and 127");
  return {scale, low, high};
}

// A layer's constants, checked once. `run` takes bare addresses, as BinaryPlan's does: conv_kernels.py has checked them.
class ConvPlan {
 public:
  // geometry: groups, channels, kh, kw, sh, sw, top, left, dh, dw. weights: one kernel layout a group, or none and taps
  ConvPlan(const std::array<int64_t, 10>& geometry, const std::vector<Bytes>& weights,
       std::optional<Array<const int8_t, 2>> taps, std::optional<Floats1> scale, std::optional<Floats1> bias,
       const Grid& input, const std::string& isa)
      : keep_(nb::make_tuple(weights, taps, scale, bias)), isa_(isa) {
    const auto& [groups, channels, kh, kw, sh, sw, top, left, dh, dw] = geometry;
    for (const int64_t v : geometry) need(v >= 0 && v < kMaxSmall, "an impossible number in the geometry");
    need(groups >= 1 && channels >= 1 && channels % groups == 0 && kh >= 1 && kw >= 1 && sh >= 1 && sw >= 1 && dh >= 1 && dw >= 1,
         "an impossible number in the geometry");
    need(kh * kw <= kMaxTaps, "too many taps");
    c_.groups = groups, c_.c = channels, c_.kh = kh, c_.kw = kw, c_.sh = sh, c_.sw = sw;
    c_.top = top, c_.left = left, c_.dh = dh, c_.dw = dw;
    c_.input = quantizer(input, true);
    if (taps) {
      need(groups == channels && dim(*taps, 0) == kh * kw && dim(*taps, 1) == channels, "taps must be [kh * kw, channels]");
      need(scale && dim(*scale, 0) == channels, "a depthwise convolution needs a scale for each channel");
      c_.taps = taps->data();
      c_.scale = scale->data();
      c_.n = channels;
    } else {
      need(static_cast<int64_t>(weights.size()) == groups, "one packed matrix for each group");
      for (const Bytes& w : weights) {
        packed_.emplace_back(w.data(), dim(w, 0));
        need(packed_.back().h.k == kh * kw * (channels / groups), "a packed matrix whose columns are not those of the kernel");
        need(packed_.back().h.n == packed_.front().h.n, "groups of different sizes");
      }
      c_.n = packed_.front().h.n * groups;
    }
    if (bias) need(dim(*bias, 0) == c_.n, "bias must be [" + str(c_.n) + "]");
    c_.bias = bias ? bias->data() : nullptr;
  }

  // strides in elements, of floats; all 0: x is int8 [batch, h, w, channels]. next: the grid of `q`, read where q is not 0
  void run(uintptr_t x, const std::array<int64_t, 5>& size, const std::array<int64_t, 3>& strides, uintptr_t residual,
           bool relu, uintptr_t y, uintptr_t q, const Grid& next, int n_threads) const {
    IntConv c = c_;
    c.weights = packed_.data();
    c.batch = size[0], c.h = size[1], c.w = size[2], c.oh = size[3], c.ow = size[4];
    for (const int64_t v : size) need(v >= 0 && v < kMaxSmall, "impossible image size");
    const bool floats = strides[2] != 0;
    need(floats || c.input.scale > 0, "int8 inputs need the grid they are on");
    IntImage in;
    in.x = floats ? reinterpret_cast<const float*>(x) : nullptr;
    in.q = floats ? nullptr : reinterpret_cast<const int8_t*>(x);
    in.batch_stride = strides[0], in.pixel_stride = strides[1], in.channel_stride = strides[2];
    IntEpilogue e;
    e.residual = reinterpret_cast<const float*>(residual);
    e.relu = relu;
    e.y = reinterpret_cast<float*>(y);
    e.q = reinterpret_cast<int8_t*>(q);
    if (q) e.next = quantizer(next, false);
    nb::gil_scoped_release release;
    if (c.batch * c.oh * c.ow * c.n == 0) return;
    int_conv(c, in, e, n_threads, isa_);
  }

  int64_t outputs() const { return c_.n; }

 private:
  static constexpr int64_t kMaxSmall = int64_t{1} << 24, kMaxTaps = int64_t{1} << 16;
  nb::tuple keep_;  // owns the arrays that the pointers below lead into
  std::string isa_;
  IntConv c_;
  std::vector<Packed> packed_;
};

nb::list conv_table() {
  nb::list out;
  for (size_t i = 0; i < kConvInt8.count; ++i) {
    const auto& row = kConvInt8.rows[i];
    out.append(nb::make_tuple(kConvInt8.op, row.isa, (row.needs & cpu_features()) == row.needs));
  }
  return out;
}

}  // namespace

void bind_conv(nb::module_& m) {
  m.def("conv_table", &conv_table, "[(op, isa, supported by this CPU)], best row first");
  m.def("conv_pick", [](const std::string& isa) { return std::string(pick(kConvInt8, isa).isa); }, "isa"_a,
        "Name of the row that runs when LOWBIT_ISA is `isa` ('' for the best)");
  nb::class_<ConvPlan>(m, "ConvPlan")
      .def(nb::init<const std::array<int64_t, 10>&, const std::vector<Bytes>&, std::optional<Array<const int8_t, 2>>,
                    std::optional<Floats1>, std::optional<Floats1>, const Grid&, const std::string&>(),
           "geometry"_a, "weights"_a, "taps"_a.noconvert().none(), "scale"_a.noconvert().none(),
           "bias"_a.noconvert().none(), "input"_a, "isa"_a)
      .def("run", &ConvPlan::run, "x"_a, "size"_a, "strides"_a, "residual"_a, "relu"_a, "y"_a, "q"_a, "next"_a,
           "n_threads"_a)
      .def_prop_ro("outputs", &ConvPlan::outputs);
}

}  // namespace lowbit::binding
