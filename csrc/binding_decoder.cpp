// lowbit._kernels.Decoder and KeyValueCache: checks every number, keeps the arrays alive, releases the GIL, calls.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>
#include <optional>
#include <vector>

#include "binding_sparse.h"
#include "decoder.h"
#include "peak.h"

using nb::literals::operator""_a;

namespace {

using namespace lowbit::binding;

struct BoundDecoder {
  lowbit::Decoder decoder;
  std::vector<nb::object> keep;  // every array a pointer was taken from

  template <class A>
  auto pointer(const A& a) {
    keep.push_back(nb::cast(a));
    return a.data();
  }
  const float* vector(const Vector& v, int64_t size, const char* what) {
    need(dim(v, 0) == size, std::string(what) + " has shape " + shape(v) + "; it must be [" + str(size) + "]");
    return pointer(v);
  }
};

lowbit::Linear& linear_at(BoundDecoder& d, int64_t layer, const std::string& name) {
  if (name == "embedding") return d.decoder.embedding;
  if (name == "head") return d.decoder.head;
  need(layer >= 0 && layer < static_cast<int64_t>(d.decoder.layers.size()), "no layer " + str(layer));
  lowbit::DecoderLayer& l = d.decoder.layers[static_cast<size_t>(layer)];
  if (name == "q") return l.q;
  if (name == "k") return l.k;
  if (name == "v") return l.v;
  if (name == "o") return l.o;
  if (name == "gate") return l.gate;
  if (name == "up") return l.up;
  need(name == "down", "no product is called '" + name + "'");
  return l.down;
}

// What [n, k] a product of this name must be.
void check_sizes(const lowbit::DecoderShape& s, const std::string& name, const lowbit::Linear& l) {
  const int64_t wide = s.heads * s.head_dim, narrow = s.kv_heads * s.head_dim;
  int64_t n = s.hidden, k = s.hidden;
  if (name == "q") n = wide;
  if (name == "k" || name == "v") n = narrow;
  if (name == "o") k = wide;
  if (name == "gate" || name == "up") n = s.intermediate;
  if (name == "down") k = s.intermediate;
  if (name == "embedding" || name == "head") n = s.vocabulary;
  need(l.w.n == n && l.w.k == k, name + " is [" + str(l.w.n) + ", " + str(l.w.k) + "]; it must be [" + str(n) + ", " +
                                     str(k) + "]");
}

void create(BoundDecoder* self, int64_t layers, int64_t vocabulary, int64_t hidden, int64_t heads, int64_t kv_heads,
            int64_t head_dim, int64_t intermediate, float eps, float attention_scale, float rotary_scale, Vector norm,
            Vector inverse_frequency) {
  for (int64_t v : {layers, vocabulary, hidden, heads, kv_heads, head_dim, intermediate})
    need(v >= 1 && v < kMaxDim, "every size must be 1 to 2^31-1, not " + str(v));
  need(heads % kv_heads == 0, str(heads) + " heads do not share " + str(kv_heads) + " key-value heads");
  need(head_dim % 2 == 0, "head_dim is odd");
  new (self) BoundDecoder{};
  self->decoder.shape = {vocabulary, hidden, heads,           kv_heads,    head_dim, intermediate,
                         eps,        attention_scale, rotary_scale};
  self->decoder.layers.resize(static_cast<size_t>(layers));
  self->decoder.norm = self->vector(norm, hidden, "norm");
  self->decoder.inverse_frequency = self->vector(inverse_frequency, head_dim / 2, "inverse_frequency");
}

void set_layer(BoundDecoder& d, int64_t layer, Vector norm_attention, Vector norm_mlp, int64_t window) {
  need(layer >= 0 && layer < static_cast<int64_t>(d.decoder.layers.size()) && window >= 0, "no layer " + str(layer));
  lowbit::DecoderLayer& l = d.decoder.layers[static_cast<size_t>(layer)];
  l.norm_attention = d.vector(norm_attention, d.decoder.shape.hidden, "norm_attention");
  l.norm_mlp = d.vector(norm_mlp, d.decoder.shape.hidden, "norm_mlp");
  l.window = window;
}

void set_common(BoundDecoder& d, lowbit::Linear& l, const std::string& name, const std::optional<Vector>& bias) {
  check_sizes(d.decoder.shape, name, l);
  l.bias = bias ? d.vector(*bias, l.w.n, "bias") : nullptr;
}

void set_float(BoundDecoder& d, int64_t layer, const std::string& name, Codes codes, Floats table, Floats scale,
               Floats zero, int bits, int64_t k, std::optional<Vector> bias) {
  lowbit::Linear l;
  l.kind = lowbit::Linear::Kind::kFloat;
  l.w = weights(codes, scale, zero, bits, k);
  l.w.table_rows = table_rows(table, l.w);
  l.w.table = d.pointer(table);
  d.pointer(codes), d.pointer(scale), d.pointer(zero);
  set_common(d, l, name, bias);
  linear_at(d, layer, name) = l;
}

void set_int8(BoundDecoder& d, int64_t layer, const std::string& name, Array<const uint8_t, 1> packed,
              std::optional<Vector> bias) {
  need(name != "embedding", "an embedding has no int8 product");
  lowbit::Linear l;
  l.kind = lowbit::Linear::Kind::kInt8;
  l.packed.emplace(d.pointer(packed), dim(packed, 0));
  l.w.n = l.packed->h.n;
  l.w.k = l.packed->h.k;
  set_common(d, l, name, bias);
  linear_at(d, layer, name) = l;
}

void set_dense(BoundDecoder& d, int64_t layer, const std::string& name, Floats w, std::optional<Vector> bias) {
  lowbit::Linear l;
  l.w.n = dim(w, 0);
  l.w.k = dim(w, 1);
  l.dense = d.pointer(w);
  set_common(d, l, name, bias);
  linear_at(d, layer, name) = l;
}

// Sparse corrections, as runtime/sparse.py prepares them.
void set_exceptions(BoundDecoder& d, int64_t layer, const std::string& name, Index start, Indices column, Vector value,
                    Array<const uint8_t, 1> steps) {
  lowbit::Linear& l = linear_at(d, layer, name);
  const lowbit::Places p = places(start, column, value, l.w.k);
  need(p.n == l.w.n, name + ": exceptions of another matrix");
  check(p);
  const lowbit::Steps s(steps.data(), dim(steps, 0));
  need(s.h.n == p.n && s.h.k == p.k, name + ": exceptions of another matrix");
  l.places = {p.n, p.k, d.pointer(start), d.pointer(column), d.pointer(value)};
  d.pointer(steps);
  l.steps = s;
}

std::unique_ptr<lowbit::KeyValueCache> new_cache(const BoundDecoder& d, int64_t sequences, int64_t capacity, bool int8) {
  need(sequences >= 1 && sequences < kMaxDim && capacity >= 1 && capacity < kMaxDim,
       "sequences and capacity must be 1 to 2^31-1");
  const auto layers = static_cast<int64_t>(d.decoder.layers.size());
  const double bytes = static_cast<double>(layers) * sequences * capacity * 2 * d.decoder.shape.kv_heads *
                       d.decoder.shape.head_dim * 4;
  need(bytes < 1e15, "a cache of so many tokens fits no memory");
  return std::make_unique<lowbit::KeyValueCache>(d.decoder.shape, layers, sequences, capacity, int8);
}

void check_complete(const lowbit::Decoder& d) {
  const auto set = [](const lowbit::Linear& l) { return l.w.n > 0; };
  need(set(d.embedding) && set(d.head), "embedding or head is missing");
  for (const lowbit::DecoderLayer& l : d.layers)
    need(set(l.q) && set(l.k) && set(l.v) && set(l.o) && set(l.gate) && set(l.up) && set(l.down) && l.norm_attention,
         "a layer is not complete");
}

void forward(const BoundDecoder& d, lowbit::KeyValueCache& cache, Index tokens, Index sequence, Index wanted,
             Array<float, 2> logits, int n_threads, const std::string& isa) {
  check_complete(d.decoder);
  const lowbit::DecoderShape& s = d.decoder.shape;
  const int64_t m = dim(tokens, 0), count = dim(wanted, 0);
  need(cache.layers == static_cast<int64_t>(d.decoder.layers.size()), "the cache belongs to another model");
  need(m >= 1 && m < kMaxDim && dim(sequence, 0) == m, "tokens and sequence must be of one length, 1 or more");
  need(dim(logits, 0) == count && dim(logits, 1) == s.vocabulary,
       "logits has shape " + shape(logits) + "; it must be [" + str(count) + ", " + str(s.vocabulary) + "]");
  need(count <= m, "more rows wanted than there are");
  std::vector<int64_t> length = cache.length;
  for (int64_t i = 0; i < m; ++i) {
    if (tokens(i) < 0 || tokens(i) >= s.vocabulary) throw nb::index_error(("no token " + str(tokens(i))).c_str());
    need(sequence(i) >= 0 && sequence(i) < cache.sequences, "no sequence " + str(sequence(i)));
    need(++length[sequence(i)] <= cache.capacity, "the cache holds " + str(cache.capacity) + " tokens and is full");
  }
  for (int64_t i = 0; i < count; ++i) need(wanted(i) >= 0 && wanted(i) < m, "no row " + str(wanted(i)));
  const int64_t *t = tokens.data(), *q = sequence.data(), *w = wanted.data();
  float* to = logits.data();
  nb::gil_scoped_release release;
  d.decoder.forward(cache, t, q, m, w, count, to, n_threads, isa);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def("int8_peak", [](int64_t steps, int n_threads, const std::string& isa) {
    need(steps >= 1 && steps < kMaxDim && n_threads >= 1, "steps and n_threads must be 1 or more");
    const nb::gil_scoped_release release;
    return lowbit::int8_peak(steps, n_threads, isa);
  }, "steps"_a, "n_threads"_a, "isa"_a, "Multiply-adds done; `isa` as for pick");
  nb::class_<lowbit::KeyValueCache>(m, "KeyValueCache")
      .def_ro("capacity", &lowbit::KeyValueCache::capacity)
      .def("length", [](const lowbit::KeyValueCache& c, int64_t i) {
        need(i >= 0 && i < c.sequences, "no sequence " + str(i));
        return c.length[static_cast<size_t>(i)];
      })
      .def("nbytes", &lowbit::KeyValueCache::bytes);
  nb::class_<BoundDecoder>(m, "Decoder")
      .def("__init__", &create, "layers"_a, "vocabulary"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "intermediate"_a, "eps"_a, "attention_scale"_a, "rotary_scale"_a, "norm"_a.noconvert(),
           "inverse_frequency"_a.noconvert())
      .def("set_layer", &set_layer, "layer"_a, "norm_attention"_a.noconvert(), "norm_mlp"_a.noconvert(), "window"_a)
      .def("set_float", &set_float, "layer"_a, "name"_a, "codes"_a.noconvert(), "table"_a.noconvert(),
           "scale"_a.noconvert(), "zero"_a.noconvert(), "bits"_a, "k"_a, "bias"_a.noconvert().none())
      .def("set_int8", &set_int8, "layer"_a, "name"_a, "packed"_a.noconvert(),
           "bias"_a.noconvert().none())
      .def("set_dense", &set_dense, "layer"_a, "name"_a, "w"_a.noconvert(), "bias"_a.noconvert().none())
      .def("set_exceptions", &set_exceptions, "layer"_a, "name"_a, "start"_a.noconvert(), "column"_a.noconvert(),
           "value"_a.noconvert(), "steps"_a.noconvert())
      .def("new_cache", &new_cache, "sequences"_a, "capacity"_a, "int8"_a)
      .def("forward", &forward, "cache"_a, "tokens"_a.noconvert(), "sequence"_a.noconvert(), "wanted"_a.noconvert(),
           "logits"_a.noconvert(), "n_threads"_a, "isa"_a);
}
