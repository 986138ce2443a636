// lowbit._kernels: checks every shape, size and index against the others, releases the GIL, calls. Nothing else.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "binding.h"
#include "columns.h"
#include "linear_int8.h"
#include "search.h"
#include "sparse.h"

using nb::literals::operator""_a;

namespace {

using namespace lowbit::binding;

int64_t tokens(const Floats& x, const Array<float, 2>& y, const lowbit::Weights& w) {
  const int64_t m = dim(x, 0);
  need(m < kMaxDim, "too many tokens: " + str(m));
  need(dim(y, 0) == m && dim(y, 1) == w.n, "y has shape " + shape(y) + "; it must be [" + str(m) + ", " + str(w.n) + "]");
  return m;
}

void linear_float(Floats x, Codes codes, Floats table, Floats scale, Floats zero, int bits, Array<float, 2> y,
                  int n_threads, const std::string& isa) {
  lowbit::Weights w = weights(codes, scale, zero, bits, dim(x, 1));
  w.table = table.data();
  w.table_rows = table_rows(table, w);
  const int64_t m = tokens(x, y, w);
  const float* from = x.data();
  float* to = y.data();
  nb::gil_scoped_release release;
  if (m > 0 && w.n > 0) lowbit::linear_float(w, from, m, to, n_threads, isa);
}

lowbit::Weights int8_weights(const Codes& codes, const Levels& levels, const Floats& scale, const Floats& zero,
                             const Array<const float, 1>& step, int bits, int64_t k) {
  lowbit::Weights w = weights(codes, scale, zero, bits, k);
  w.levels = levels.data();
  w.table_rows = table_rows(levels, w);
  need(dim(step, 0) == w.table_rows, "step must have one number for each row of levels");
  return w;
}

int64_t packed_bytes(Codes codes, Levels levels, Floats scale, Floats zero, Array<const float, 1> step, int bits,
                     int64_t k) {
  const lowbit::Weights w = int8_weights(codes, levels, scale, zero, step, bits, k);
  nb::gil_scoped_release release;
  return lowbit::Packed(lowbit::plan_packed(w)).bytes();
}

void pack(Codes codes, Levels levels, Floats scale, Floats zero, Array<const float, 1> step, int bits, int64_t k,
          Array<uint8_t, 1> out) {
  const lowbit::Weights w = int8_weights(codes, levels, scale, zero, step, bits, k);
  const float* steps = step.data();
  uint8_t* to = out.data();
  const int64_t room = dim(out, 0);
  nb::gil_scoped_release release;
  const lowbit::PackedHeader header = lowbit::plan_packed(w);
  if (lowbit::Packed(header).bytes() != room) throw std::invalid_argument("out does not have packed_bytes() bytes");
  lowbit::pack(w, steps, header, to);
}

void linear_int8(Floats x, Array<const uint8_t, 1> packed, std::optional<Array<const float, 1>> bias,
                 Array<float, 2> y, int n_threads, const std::string& isa) {
  const lowbit::Packed p(packed.data(), dim(packed, 0));
  need(dim(x, 1) == p.h.k, "x has " + str(dim(x, 1)) + " columns; the packed matrix has " + str(p.h.k));
  need(!bias || dim(*bias, 0) == p.h.n, "bias must have " + str(p.h.n) + " numbers");
  lowbit::Weights w;
  w.n = p.h.n;
  const int64_t m = tokens(x, y, w);
  const float *from = x.data(), *add = bias ? bias->data() : nullptr;
  float* to = y.data();
  nb::gil_scoped_release release;
  if (m > 0 && p.h.n > 0) lowbit::linear_int8(p, from, m, add, to, n_threads, isa);
}

void decode(Codes codes, Floats table, Floats scale, Floats zero, int bits, std::optional<Array<const int64_t, 1>> rows,
            Array<float, 2> out, int n_threads, const std::string& isa) {
  lowbit::Weights w = weights(codes, scale, zero, bits, dim(out, 1));
  w.table = table.data();
  w.table_rows = table_rows(table, w);
  const int64_t count = dim(out, 0);
  const int64_t* index = nullptr;
  if (rows) {
    need(dim(*rows, 0) == count, "out has shape " + shape(out) + " for " + str(dim(*rows, 0)) + " rows");
    index = rows->data();
    for (int64_t i = 0; i < count; ++i)
      if (index[i] < 0 || index[i] >= w.n)
        throw nb::index_error(("row " + str(index[i]) + " is outside 0.." + str(w.n - 1)).c_str());
  } else {
    need(count == w.n, "out has shape " + shape(out) + "; it must be [" + str(w.n) + ", K]");
  }
  float* to = out.data();
  nb::gil_scoped_release release;
  if (count > 0) lowbit::decode_rows(w, index, count, to, n_threads, isa);
}

void quantize(Floats x, int64_t groups, Array<int8_t, 2> q, Array<float, 2> scale, Array<int32_t, 2> sum,
              const std::string& isa) {
  const int64_t m = dim(x, 0), k = dim(x, 1);
  need(groups >= 1 && k >= 1 && k < kMaxDim && k % groups == 0,
       "K = " + str(k) + " does not divide into " + str(groups) + " groups");
  const lowbit::Segments seg(groups, k / groups);
  need(dim(q, 0) == m && dim(q, 1) == seg.row_size(), "q must be [" + str(m) + ", " + str(seg.row_size()) + "]");
  need(dim(scale, 0) == m && dim(scale, 1) == seg.padded && dim(sum, 0) == m && dim(sum, 1) == seg.padded,
       "scale and sum must be [" + str(m) + ", " + str(seg.padded) + "]");
  const lowbit::QuantizeFn fn = lowbit::pick(lowbit::kQuantize, isa).fn;
  for (int64_t i = 0; i < m; ++i)
    fn(x.data() + i * k, seg, q.data() + i * seg.row_size(), scale.data() + i * seg.padded,
       sum.data() + i * seg.padded);
}

nb::tuple segments(int64_t groups, int64_t group) {
  need(groups >= 1 && group >= 1 && groups < kMaxDim && group < kMaxDim, "groups and group must be 1 to 2^31-1");
  const lowbit::Segments seg(groups, group);
  return nb::make_tuple(seg.count, seg.length, seg.padded, seg.per_group);
}

// One block of columns of a layer-wise solver. moved: [count, out] for coordinate descent, empty for error feedback.
void solve_columns(Array<float, 2> columns, Array<float, 2> other, Array<float, 2> moved, Floats u,
                   Array<uint8_t, 2> codes, Array<const int32_t, 1> group_of, Floats scale, Floats divisor, Floats zero,
                   Array<const float, 1> thresholds, Array<const float, 1> values, bool real_zero, int n_threads) {
  const int64_t count = dim(columns, 0), out = dim(columns, 1), levels = dim(values, 0);
  const auto like = [&](const auto& a) { return dim(a, 0) == count && dim(a, 1) == out; };
  need(like(other) && like(codes) && (moved.size() == 0 || like(moved)), "columns, other, moved, codes differ in shape");
  need(dim(u, 0) == count && dim(u, 1) == count && dim(group_of, 0) == count, "u or group_of does not fit the columns");
  need(dim(scale, 1) == out && dim(divisor, 0) == dim(scale, 0) && dim(divisor, 1) == out, "scale or divisor: [G, out]");
  need(zero.size() == 0 || (dim(zero, 0) == dim(scale, 0) && dim(zero, 1) == out), "zero must be [G, out] or empty");
  need(levels >= 2 && levels <= 256 && (thresholds.size() == 0 || dim(thresholds, 0) == levels - 1), "2 to 256 levels");
  for (int64_t j = 0; j < count; ++j)
    need(group_of.data()[j] >= 0 && group_of.data()[j] < dim(scale, 0), "group_of names a group that is not there");
  const lowbit::ColumnBlock block{columns.data(), other.data(), moved.size() ? moved.data() : nullptr, u.data(),
                                  codes.data(), count, out};
  const lowbit::ColumnGrids grids{scale.data(), divisor.data(), zero.size() ? zero.data() : nullptr, group_of.data(),
                                  thresholds.size() ? thresholds.data() : nullptr, values.data(),
                                  static_cast<int>(levels), real_zero};
  nb::gil_scoped_release release;
  lowbit::solve_columns(block, grids, n_threads);
}

// error [candidates, blocks] of each candidate scale of blocks of weights.
void scale_errors(Floats w, Floats importance, Floats scale, Floats zero, float bottom, float top, bool real_zero,
                  float norm, Array<float, 2> error, int n_threads, const std::string& isa) {
  const int64_t blocks = dim(w, 0), n = dim(w, 1), candidates = dim(scale, 0);
  const auto fits = [&](const auto& a) { return dim(a, 0) == candidates && dim(a, 1) == blocks; };
  need(importance.size() == 0 || (dim(importance, 0) == blocks && dim(importance, 1) == n), "importance must be as w");
  need(fits(scale) && fits(error) && (zero.size() == 0 || fits(zero)), "scale, zero, error: [candidates, blocks]");
  need(norm > 0 && bottom <= top, "norm must be positive, and the levels ascending");
  const lowbit::ScaleSearch search{w.data(), importance.size() ? importance.data() : nullptr, scale.data(),
                                   zero.size() ? zero.data() : nullptr, blocks, n, candidates, bottom, top, real_zero,
                                   norm, error.data()};
  nb::gil_scoped_release release;
  lowbit::scale_errors(search, n_threads, isa);
}

template <class Fn>
void list_rows(const lowbit::Table<Fn>& table, nb::list& out) {
  for (size_t i = 0; i < table.count; ++i)
    out.append(nb::make_tuple(table.op, table.rows[i].isa,
                              (table.rows[i].needs & lowbit::cpu_features()) == table.rows[i].needs));
}

nb::list table() {
  nb::list out;
  list_rows(lowbit::kDecode, out);
  list_rows(lowbit::kLinearFloat, out);
  list_rows(lowbit::kQuantize, out);
  list_rows(lowbit::kLinearInt8, out);
  list_rows(lowbit::kSparse, out);
  return out;
}

std::string picked(const std::string& op, const std::string& isa) {
  if (op == lowbit::kDecode.op) return lowbit::pick(lowbit::kDecode, isa).isa;
  if (op == lowbit::kLinearFloat.op) return lowbit::pick(lowbit::kLinearFloat, isa).isa;
  if (op == lowbit::kQuantize.op) return lowbit::pick(lowbit::kQuantize, isa).isa;
  if (op == lowbit::kSparse.op) return lowbit::pick(lowbit::kSparse, isa).isa;
  need(op == lowbit::kLinearInt8.op, "unknown operation '" + op + "'");
  return lowbit::pick(lowbit::kLinearInt8, isa).isa;
}

}  // namespace

void bind_decoder(nb::module_&);  // binding_decoder.cpp
void bind_sparse(nb::module_&);   // binding_sparse.cpp

NB_MODULE(_kernels, m) {
  m.doc() = "Kernels of lowbit. Internal: arguments are checked, nothing is converted. Use lowbit.runtime.";
  m.attr("ABI") = 2;  // raised, here and in kernels.py, whenever a signature below or a layout changes
  m.def("table", &table, "[(op, isa, supported by this CPU)], best row of each operation first");
  m.def("pick", &picked, "op"_a, "isa"_a, "Name of the row that runs `op` when LOWBIT_ISA is `isa` ('' for the best)");
  m.def("segments", &segments, "groups"_a, "group"_a, "(count, length, padded, per_group) of the segments");
  m.def("linear_float", &linear_float, "x"_a.noconvert(), "codes"_a.noconvert(), "table"_a.noconvert(),
        "scale"_a.noconvert(), "zero"_a.noconvert(), "bits"_a, "y"_a.noconvert(), "n_threads"_a, "isa"_a);
  m.def("packed_bytes", &packed_bytes, "codes"_a.noconvert(), "levels"_a.noconvert(), "scale"_a.noconvert(),
        "zero"_a.noconvert(), "step"_a.noconvert(), "bits"_a, "k"_a, "Size of the kernel layout `pack` writes");
  m.def("pack", &pack, "codes"_a.noconvert(), "levels"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert(),
        "step"_a.noconvert(), "bits"_a, "k"_a, "out"_a.noconvert());
  m.def("linear_int8", &linear_int8, "x"_a.noconvert(), "packed"_a.noconvert(), "bias"_a.noconvert().none(),
        "y"_a.noconvert(), "n_threads"_a, "isa"_a);
  m.def("decode", &decode, "codes"_a.noconvert(), "table"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert(),
        "bits"_a, "rows"_a.noconvert().none(), "out"_a.noconvert(), "n_threads"_a, "isa"_a);
  m.def("solve_columns", &solve_columns, "columns"_a.noconvert(), "other"_a.noconvert(), "moved"_a.noconvert(),
        "u"_a.noconvert(), "codes"_a.noconvert(), "group_of"_a.noconvert(), "scale"_a.noconvert(),
        "divisor"_a.noconvert(), "zero"_a.noconvert(), "thresholds"_a.noconvert(), "values"_a.noconvert(),
        "real_zero"_a, "n_threads"_a);
  m.def("scale_errors", &scale_errors, "w"_a.noconvert(), "importance"_a.noconvert(), "scale"_a.noconvert(),
        "zero"_a.noconvert(), "bottom"_a, "top"_a, "real_zero"_a, "norm"_a, "error"_a.noconvert(), "n_threads"_a,
        "isa"_a);
  m.def("quantize", &quantize, "x"_a.noconvert(), "groups"_a, "q"_a.noconvert(), "scale"_a.noconvert(),
        "sum"_a.noconvert(), "isa"_a);
  bind_decoder(m);
  bind_sparse(m);
  bind_binary(m);
  bind_conv(m);
  bind_linear(m);
}
