// The bit-plane operations of lowbit._kernels: checks every shape against the others, releases the GIL, calls.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <memory>
#include <optional>
#include <string>

#include "binary.h"
#include "binding.h"

using nb::literals::operator""_a;

namespace lowbit::binding {
namespace {

using Ints1 = Array<const int32_t, 1>;
using Floats1 = Array<const float, 1>;
using Pixels = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;  // [batch, h, w, channels], any strides
using Rows = Array<const int32_t, 4>;                                   // [n, taps, planes, words]
using Geometry = std::array<int64_t, 10>;  // groups, kh, kw, stride, padding top and left, dilation, pad value

constexpr int64_t kMaxProducts = int64_t{1} << 30;  // 2 * taps * channels must fit int32

BitKind kind_of(int kind) {
  need(kind >= 0 && kind < kBitKinds, "kind is " + str(kind) + "; it must be 0 to " + str(kBitKinds - 1));
  return static_cast<BitKind>(kind);
}

BitLayout layout_of(int layout) {
  need(layout >= 0 && layout <= 2, "layout is " + str(layout) + "; it must be 0, 1 or 2");
  return static_cast<BitLayout>(layout);
}

const uint32_t* words(const int32_t* p) { return reinterpret_cast<const uint32_t*>(p); }

BitShape shape_of(const Rows& rows, int64_t channels, int64_t groups, int kind) {
  BitShape s;
  s.kind = kind_of(kind);
  need(groups >= 1 && channels >= 1 && channels < kMaxDim && dim(rows, 0) < kMaxDim && dim(rows, 0) % groups == 0,
       "weight of shape " + shape(rows) + " does not divide into " + str(groups) + " groups");
  s.n = dim(rows, 0) / groups;
  s.taps = dim(rows, 1);
  s.channels = channels;
  need(s.taps >= 1 && dim(rows, 2) == s.planes() && dim(rows, 3) == s.words(),
       "weight has shape " + shape(rows) + "; " + str(channels) + " channels need [N, taps, " + str(s.planes()) + ", " +
           str(s.words()) + "]");
  need(s.taps < kMaxProducts && s.channels * s.taps <= kMaxProducts, "more than 2^30 products in one sum");
  return s;
}

template <class A>
auto of_channels(const std::optional<A>& a, int64_t n, const char* name) -> decltype(a->data()) {
  if (!a) return nullptr;
  need(dim(*a, 0) == n, std::string(name) + " has shape " + shape(*a) + "; it must be [" + str(n) + "]");
  return a->data();
}

void prepack(Rows rows, int64_t channels, int64_t groups, int kind, int layout, Array<uint8_t, 1> to) {
  const BitShape s = shape_of(rows, channels, groups, kind);
  const BitLayout l = layout_of(layout);
  need(dim(to, 0) == groups * s.size(l), "the target must have " + str(groups * s.size(l)) + " bytes");
  const int64_t row = s.taps * s.planes() * s.words();
  for (int64_t g = 0; g < groups; ++g)
    relayout(s, words(rows.data()) + g * s.n * row, l, to.data() + g * s.size(l));
}

int64_t packed_size(Rows rows, int64_t channels, int64_t groups, int kind, int layout) {
  return groups * shape_of(rows, channels, groups, kind).size(layout_of(layout));
}

// x [batch, h, w, channels] in groups; the pixels of an image must lie at one stride.
BitInput floats(const Pixels& x, int64_t groups, const std::optional<Floats1>& high, const std::optional<Floats1>& low) {
  const int64_t channels = dim(x, 3), h = dim(x, 1), w = dim(x, 2);
  need(groups >= 1 && channels >= 1 && channels % groups == 0, str(channels) + " channels do not divide into " + str(groups) + " groups");
  need(h <= 1 || w <= 1 || x.stride(1) == w * x.stride(2), "the pixels of x must lie at one stride");
  need(bool(high), "a threshold for each channel is needed");
  return {x.data(), dim(x, 0), h * w, groups, channels / groups, x.stride(0), w > 1 ? x.stride(2) : x.stride(1),
          channels > 1 ? x.stride(3) : 1, of_channels(high, channels, "high"), of_channels(low, channels, "low")};
}

void binarize_bits(Pixels x, int64_t groups, std::optional<Floats1> high, std::optional<Floats1> low,
                   Array<int32_t, 6> bits, int n_threads, const std::string& isa) {
  const BitInput in = floats(x, groups, high, low);
  need(dim(bits, 0) == in.batch && dim(bits, 1) * dim(bits, 2) == in.pixels && dim(bits, 3) == groups &&
           dim(bits, 4) == (low ? 2 : 1) && dim(bits, 5) == (in.channels + 31) / 32,
       "bits have shape " + shape(bits) + ", which does not fit x");
  uint32_t* to = reinterpret_cast<uint32_t*>(bits.data());
  nb::gil_scoped_release release;
  if (in.batch * in.pixels > 0) binarize(in, to, n_threads, isa);
}

// The steps along one axis; their products must not overflow.
void check_axis(int64_t k, int64_t stride, int64_t before, int64_t dilation, const char* axis) {
  constexpr int64_t most = int64_t{1} << 31;
  need(k >= 1 && k < most && stride >= 1 && stride < most && dilation >= 1 && dilation < most && before >= 0 &&
           before < most && (k - 1) < (int64_t{1} << 40) / dilation,
       std::string("impossible kernel, stride, padding or dilation along the ") + axis);
}

// A layer's constants, checked once. `run` takes bare addresses (what torch's data_ptr gives): binary_kernels.py, which
// alone calls it, has checked the tensors behind them against these sizes.
class Plan {
 public:
  Plan(Rows rows, std::optional<Array<const uint8_t, 1>> fast, int layout, int kind, int64_t channels,
       const Geometry& geometry, Ints1 base, std::optional<Array<const int32_t, 2>> tap_sum, Floats1 scale,
       std::optional<Floats1> bias, std::optional<Array<const float, 2>> prelu, std::optional<Floats1> high,
       std::optional<Floats1> low, const std::string& isa)
      : keep_(nb::make_tuple(rows, fast, base, tap_sum, scale, bias, prelu, high, low)), isa_(isa) {
    const auto& [groups, kh, kw, sh, sw, top, left, dh, dw, pad] = geometry;
    c_.groups = groups, c_.kh = kh, c_.kw = kw, c_.sh = sh, c_.sw = sw, c_.top = top, c_.left = left;
    c_.dh = dh, c_.dw = dw;
    need(groups >= 1 && channels >= 1 && channels % groups == 0,
         str(channels) + " channels do not divide into " + str(groups) + " groups");
    c_.shape = shape_of(rows, channels / groups, groups, kind);
    const BitShape& s = c_.shape;
    const int64_t n = dim(rows, 0);
    check_axis(kh, sh, top, dh, "height");
    check_axis(kw, sw, left, dw, "width");
    need(kh < kMaxProducts / kw && kh * kw == s.taps,
         "a kernel of " + str(kh) + " x " + str(kw) + " does not fit weight " + shape(rows));
    need(pad >= -1 && pad <= 1 && (pad == 0 || sign_input(s.kind)),
         "pad is " + str(pad) + "; it must be -1, 0 or 1, and 0 unless inputs are signs");
    c_.pad = static_cast<int>(pad);
    c_.rows = words(rows.data());
    if (fast) {
      c_.layout = layout_of(layout);
      need(dim(*fast, 0) == groups * s.size(c_.layout), "the prepared weight has the wrong size");
      c_.fast = fast->data();
    }
    if (tap_sum) need(dim(*tap_sum, 0) == s.taps && dim(*tap_sum, 1) == n, "tap_sum must be [taps, N]");
    tap_sum_ = tap_sum && sign_input(s.kind) && pad != -1 ? tap_sum->data() : nullptr;
    need(dim(base, 0) == n && dim(scale, 0) == n, "base and scale must be [" + str(n) + "]");
    e_.base = base.data();
    e_.scale = scale.data();
    e_.bias = of_channels(bias, n, "bias");
    if (prelu) {
      need(dim(*prelu, 0) == 3 && dim(*prelu, 1) == n, "prelu has shape " + shape(*prelu) + "; it must be [3, " + str(n) + "]");
      e_.shift = prelu->data(), e_.slope = prelu->data() + n, e_.offset = prelu->data() + 2 * n;
    }
    e_.stride = n;
    e_.bit_words = (n + 31) / 32;
    high_ = of_channels(high, channels, "high");
    low_ = of_channels(low, channels, "low");
    need(high_ == nullptr || (input_planes(s.kind) == 2) == (low_ != nullptr),
         "a second threshold goes with ternary inputs, and only with them");
  }

  // x: floats of the given strides (in elements), or with strides of 0 bits [batch, h, w, groups, planes, words]
  void run(uintptr_t x, const std::array<int64_t, 5>& size, const std::array<int64_t, 3>& strides, uintptr_t residual,
           uintptr_t next_high, uintptr_t y, uintptr_t next_bits, int n_threads) const {
    BitConv c = c_;
    BitEpilogue e = e_;
    c.batch = size[0], c.h = size[1], c.w = size[2], c.oh = size[3], c.ow = size[4];
    for (const int64_t v : size) need(v >= 0 && v < kMaxDim, "impossible image size");
    const auto reaches = [](int64_t out, int64_t k, int64_t stride, int64_t dilation, int64_t before, int64_t in) {
      return out > 0 && (out - 1) * stride - before + (k - 1) * dilation >= in;
    };
    const bool pads = c.top > 0 || c.left > 0 || reaches(c.oh, c.kh, c.sh, c.dh, c.top, c.h) ||
                      reaches(c.ow, c.kw, c.sw, c.dw, c.left, c.w);
    need(!pads || tap_sum_ || !sign_input(c.shape.kind) || c.pad == -1, "tap_sum is needed where an image is padded");
    if (pads) c.tap_sum = tap_sum_;
    const bool floats = strides[2] != 0;
    need(!floats || high_, "thresholds are needed for floats");
    need(next_bits == 0 || (c.groups == 1 && next_high != 0), "bits come out of convolutions without groups, and with next_high");
    e.residual = reinterpret_cast<const float*>(residual);
    e.high = reinterpret_cast<const float*>(next_high);
    e.y = reinterpret_cast<float*>(y);
    e.bits = reinterpret_cast<uint32_t*>(next_bits);
    nb::gil_scoped_release release;
    if (c.batch * c.oh * c.ow * c.groups * c.shape.n == 0) return;
    std::unique_ptr<uint32_t[]> made;
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    if (floats) {
      made.reset(new uint32_t[static_cast<size_t>(c.batch * c.h * c.w * c.groups * c.shape.pixel())]);
      if (c.h * c.w > 0)
        binarize({reinterpret_cast<const float*>(x), c.batch, c.h * c.w, c.groups, c.shape.channels, strides[0],
                  strides[1], strides[2], high_, low_},
                 made.get(), n_threads, isa_);
      bits = made.get();
    }
    bit_conv(c, bits, e, n_threads, isa_);
  }

 private:
  nb::tuple keep_;  // owns the arrays that the pointers below lead into
  std::string isa_;
  BitConv c_;
  BitEpilogue e_{};
  const int32_t* tap_sum_ = nullptr;
  const float *high_ = nullptr, *low_ = nullptr;
};

template <class Fn>
void list_rows(const Table<Fn>& table, nb::list& out) {
  for (size_t i = 0; i < table.count; ++i)
    out.append(nb::make_tuple(table.op, table.rows[i].isa, (table.rows[i].needs & cpu_features()) == table.rows[i].needs));
}

nb::list binary_table() {
  nb::list out;
  list_rows(kBinarize, out);
  list_rows(kBitTile, out);
  list_rows(kBitEpilogue, out);
  return out;
}

}  // namespace

void bind_binary(nb::module_& m) {
  m.def("binary_table", &binary_table, "[(op, isa, supported by this CPU)], best row of each operation first");
  m.def("binary_size", &packed_size, "rows"_a.noconvert(), "channels"_a, "groups"_a, "kind"_a, "layout"_a);
  m.def("binary_prepack", &prepack, "rows"_a.noconvert(), "channels"_a, "groups"_a, "kind"_a, "layout"_a,
        "to"_a.noconvert());
  m.def("binary_pick", [](const std::string& isa) { return std::string(pick(kBitTile, isa).isa); }, "isa"_a,
        "Name of the row that runs when LOWBIT_ISA is `isa` ('' for the best)");
  m.def("binary_layout", [](const std::string& isa) { return static_cast<int>(pick(kBitTile, isa).fn.layout); }, "isa"_a);
  m.def("binarize", &binarize_bits, "x"_a.noconvert(), "groups"_a, "high"_a.noconvert().none(),
        "low"_a.noconvert().none(), "bits"_a.noconvert(), "n_threads"_a, "isa"_a);
  nb::class_<Plan>(m, "BinaryPlan")
      .def(nb::init<Rows, std::optional<Array<const uint8_t, 1>>, int, int, int64_t, const Geometry&, Ints1,
                    std::optional<Array<const int32_t, 2>>, Floats1, std::optional<Floats1>,
                    std::optional<Array<const float, 2>>, std::optional<Floats1>, std::optional<Floats1>,
                    const std::string&>(),
           "rows"_a.noconvert(), "fast"_a.noconvert().none(), "layout"_a, "kind"_a, "channels"_a, "geometry"_a,
           "base"_a.noconvert(), "tap_sum"_a.noconvert().none(), "scale"_a.noconvert(), "bias"_a.noconvert().none(),
           "prelu"_a.noconvert().none(), "high"_a.noconvert().none(), "low"_a.noconvert().none(), "isa"_a)
      .def("run", &Plan::run, "x"_a, "size"_a, "strides"_a, "residual"_a, "next_high"_a, "y"_a, "next_bits"_a,
           "n_threads"_a);
}

}  // namespace lowbit::binding
