#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "decoder_math.h"
#include "linear_int8.h"
#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kInlineWork = 1 << 15;  // floats touched below which a second thread costs more than it saves
constexpr int64_t kRowsPerTurn = 16;      // outputs of a dense product computed in one turn

int threads_for(int64_t work, int n_threads) { return work < kInlineWork ? 1 : n_threads; }

struct Product {
  const Linear& l;
  float* y;
};

bool same_segments(const Linear& a, const Linear& b) {
  return a.packed && b.packed && a.packed->seg.group == b.packed->seg.group &&
         a.packed->seg.count == b.packed->seg.count;
}

struct Run {
  const DecoderMath& math;
  int n_threads;
  const std::string& isa;
  TokenBuffer& buffer;

  template <class Fn>
  void rows(int64_t m, int64_t floats, const Fn& fn) const {
    parallel_for(m, threads_for(m * floats, n_threads), fn);
  }

  // y [m,n] = x [m,k] @ w_hat.T + bias, for all that read one x: those cut in the same segments share its rounding
  void products(std::initializer_list<Product> all, const float* x, int64_t m) const {
    std::vector<ProductInt8> together;
    for (const Product* p = all.begin(); p != all.end(); ++p) {
      const Linear& l = p->l;
      if (l.kind == Linear::Kind::kDense) dense_product(l, x, m, p->y);
      else if (l.kind == Linear::Kind::kFloat) linear_float(l.w, x, m, p->y, n_threads, isa);
      else {
        together.push_back({*l.packed, nullptr, p->y});
        if (p + 1 != all.end() && same_segments(l, p[1].l)) continue;
        const Tokens tokens = quantize_tokens(l.packed->seg, l.w.k, x, m, buffer, n_threads, isa);
        linear_int8(together, tokens, n_threads, isa);
        together.clear();
      }
    }
    for (const auto& [l, y] : all) {
      const int64_t n = l.w.n;
      if (l.places) sparse_linear(*l.places, *l.steps, x, m, y, n_threads, isa);
      if (l.bias) rows(m, n, [&, y_ = y, bias = l.bias](int64_t i) { math.add(y_ + i * n, bias, n); });
    }
  }
  void product(const Linear& l, const float* x, int64_t m, float* y) const { products({{l, y}}, x, m); }

  void dense_product(const Linear& l, const float* x, int64_t m, float* y) const {
    const int64_t n = l.w.n, k = l.w.k, turns = (n + kRowsPerTurn - 1) / kRowsPerTurn;
    parallel_for(turns, threads_for(m * n * k, n_threads), [&](int64_t t) {
      for (int64_t i = 0; i < m; ++i)
        for (int64_t r = t * kRowsPerTurn; r < std::min(n, (t + 1) * kRowsPerTurn); ++r)
          y[i * n + r] = math.dot(x + i * k, l.dense + r * k, k);
    });
  }

  void norm(const float* x, const float* w, int64_t m, int64_t n, float eps, float* y) const {
    rows(m, n, [&](int64_t i) { math.rms_norm(x + i * n, w, n, eps, y + i * n); });
  }
};

using Buffer = std::vector<float>;

Buffer floats(int64_t count) { return Buffer(static_cast<size_t>(count)); }

void embed(const Linear& e, const int64_t* tokens, int64_t m, float* x, const Run& run) {
  const int64_t k = e.w.k;
  if (e.kind == Linear::Kind::kDense) {
    for (int64_t i = 0; i < m; ++i)
      std::memcpy(x + i * k, e.dense + tokens[i] * k, static_cast<size_t>(k) * sizeof(float));
  } else {
    decode_rows(e.w, tokens, m, x, threads_for(m * k, run.n_threads), run.isa);
  }
  if (!e.places) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t at = e.places->start[tokens[i]]; at < e.places->start[tokens[i] + 1]; ++at)
      x[i * k + e.places->column[at]] += e.places->value[at];
}

}  // namespace

namespace {
// Whole huge pages inside [p, p + bytes): a step reads the whole cache, and each small page costs a translation.
void advise_huge(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  if (p && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: may be refused
#else
  (void)p, (void)bytes;
#endif
}
}  // namespace

// One block of memory: [layer, sequence, head] -> keys (whole blocks), then values; the int8 scales in a second one.
KeyValueCache::KeyValueCache(const DecoderShape& s, int64_t layers_, int64_t sequences_, int64_t capacity_, bool int8_)
    : layers(layers_),
      sequences(sequences_),
      capacity(capacity_),
      int8(int8_),
      length(static_cast<size_t>(sequences_), 0),
      heads_(s.kv_heads),
      dim_(s.head_dim),
      blocks_((capacity_ + HeadCache::kTokens - 1) / HeadCache::kTokens * HeadCache::kTokens) {
  const size_t heads = static_cast<size_t>(layers * sequences * heads_), tokens = static_cast<size_t>(blocks_);
  // calloc: large blocks come as untouched zero pages, and a key block's unwritten columns must be numbers
  data_ = std::calloc(heads * tokens * 2 * static_cast<size_t>(dim_) + 1, int8 ? 1 : sizeof(float));
  advise_huge(data_, heads * tokens * 2 * static_cast<size_t>(dim_) * (int8 ? 1 : sizeof(float)));
  if (int8) scales_ = static_cast<float*>(std::calloc(heads * tokens * 2 + 1, sizeof(float)));
  if (!data_ || (int8 && !scales_)) {
    std::free(data_);
    throw std::bad_alloc();
  }
}

KeyValueCache::~KeyValueCache() {
  std::free(data_);
  std::free(scales_);
}

int64_t KeyValueCache::bytes() const {
  int64_t tokens = 0;
  for (int64_t n : length) tokens += n;
  const int64_t vector = int8 ? dim_ + static_cast<int64_t>(sizeof(float)) : dim_ * static_cast<int64_t>(sizeof(float));
  return tokens * layers * heads_ * 2 * vector;
}

namespace {

HeadCache head_cache(void* data, float* scales, bool int8, int64_t index, int64_t tokens, int64_t dim) {
  HeadCache c;
  const int64_t at = index * 2 * tokens * dim;
  if (int8) {
    c.keys8 = static_cast<int8_t*>(data) + at;
    c.values8 = c.keys8 + tokens * dim;
    c.key_scale = scales + index * 2 * tokens;
    c.value_scale = c.key_scale + tokens;
  } else {
    c.keys = static_cast<float*>(data) + at;
    c.values = c.keys + tokens * dim;
  }
  return c;
}

// Queries that read the same keys: neighbouring rows of one sequence, and the heads of one group.
struct Group {
  int64_t row, rows;  // of the batch
};

std::vector<Group> groups_of(const int64_t* sequence, int64_t m, int64_t most) {
  std::vector<Group> out;
  for (int64_t i = 0; i < m; ++i) {
    if (!out.empty() && sequence[out.back().row] == sequence[i] && out.back().rows < most) ++out.back().rows;
    else out.push_back({i, 1});
  }
  return out;
}

}  // namespace

void Decoder::forward(KeyValueCache& cache, const int64_t* tokens, const int64_t* sequence, int64_t m,
                      const int64_t* wanted, int64_t count, float* logits, int n_threads,
                      const std::string& isa) const {
  static thread_local TokenBuffer buffer;
  const DecoderShape& s = shape;
  const Run run{pick(kDecoderMath, isa == "scalar" ? isa : "").fn, n_threads, isa, buffer};
  const DecoderMath& math = run.math;
  const Hot hot;
  const int64_t half = s.head_dim / 2, wide = s.heads * s.head_dim, narrow = s.kv_heads * s.head_dim;
  const int64_t share = s.heads / s.kv_heads;

  std::vector<int64_t> position(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) position[i] = cache.length[sequence[i]]++;
  Buffer cosine = floats(m * half), sine = floats(m * half);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t d = 0; d < half; ++d) {
      const float angle = static_cast<float>(position[i]) * inverse_frequency[d];
      cosine[i * half + d] = std::cos(angle) * s.rotary_scale;
      sine[i * half + d] = std::sin(angle) * s.rotary_scale;
    }

  Buffer x = floats(m * s.hidden), h = floats(m * s.hidden), q = floats(m * wide), k = floats(m * narrow),
         v = floats(m * narrow), mixed = floats(m * wide), gate = floats(m * s.intermediate),
         up = floats(m * s.intermediate);
  embed(embedding, tokens, m, x.data(), run);
  const int64_t longest = *std::max_element(position.begin(), position.end()) + 1;
  const int64_t ld = (longest + HeadCache::kTokens - 1) / HeadCache::kTokens * HeadCache::kTokens;
  const std::vector<Group> groups = groups_of(sequence, m, 2 * DecoderMath::kQueries);

  for (size_t l = 0; l < layers.size(); ++l) {
    const DecoderLayer& layer = layers[l];
    const auto head_of = [&](int64_t seq, int64_t kv) {
      const int64_t index = (static_cast<int64_t>(l) * cache.sequences + seq) * cache.heads_ + kv;
      return head_cache(cache.data_, cache.scales_, cache.int8, index, cache.blocks_, s.head_dim);
    };
    run.norm(x.data(), layer.norm_attention, m, s.hidden, s.eps, h.data());
    run.products({{layer.q, q.data()}, {layer.k, k.data()}, {layer.v, v.data()}}, h.data(), m);
    run.rows(m, wide + 2 * narrow, [&](int64_t i) {
      const float *c = cosine.data() + i * half, *sn = sine.data() + i * half;
      for (int64_t j = 0; j < s.heads; ++j) math.rotate(q.data() + i * wide + j * s.head_dim, c, sn, half);
      for (int64_t j = 0; j < s.kv_heads; ++j) {
        float* key = k.data() + i * narrow + j * s.head_dim;
        math.rotate(key, c, sn, half);
        math.append(head_of(sequence[i], j), key, v.data() + i * narrow + j * s.head_dim, position[i], s.head_dim);
      }
    });
    const int64_t items = static_cast<int64_t>(groups.size()) * s.kv_heads;
    parallel_for(items, threads_for(m * s.heads * longest * s.head_dim, n_threads), [&](int64_t item) {
      static thread_local Buffer scores;
      scores.resize(static_cast<size_t>(DecoderMath::kQueries * ld));
      const Group g = groups[static_cast<size_t>(item / s.kv_heads)];
      const int64_t kv = item % s.kv_heads;
      const HeadCache head = head_of(sequence[g.row], kv);
      Query queries[DecoderMath::kQueries];
      int64_t n = 0;
      for (int64_t j = 0; j < g.rows * share; ++j) {
        const int64_t i = g.row + j / share, at = i * wide + (kv * share + j % share) * s.head_dim;
        const int64_t last = position[i] + 1, first = layer.window ? std::max<int64_t>(0, last - layer.window) : 0;
        queries[n++] = {q.data() + at, mixed.data() + at, first, last};
        if (n == DecoderMath::kQueries || j + 1 == g.rows * share) {
          math.attend(head, queries, n, s.head_dim, s.attention_scale, scores.data());
          n = 0;
        }
      }
    });
    run.product(layer.o, mixed.data(), m, h.data());
    run.rows(m, s.hidden, [&](int64_t i) { math.add(x.data() + i * s.hidden, h.data() + i * s.hidden, s.hidden); });

    run.norm(x.data(), layer.norm_mlp, m, s.hidden, s.eps, h.data());
    run.products({{layer.gate, gate.data()}, {layer.up, up.data()}}, h.data(), m);
    run.rows(m, s.intermediate, [&](int64_t i) {
      math.gated_silu(gate.data() + i * s.intermediate, up.data() + i * s.intermediate, s.intermediate);
    });
    run.product(layer.down, gate.data(), m, h.data());
    run.rows(m, s.hidden, [&](int64_t i) { math.add(x.data() + i * s.hidden, h.data() + i * s.hidden, s.hidden); });
  }

  if (count == 0) return;
  for (int64_t i = 0; i < count; ++i)  // wanted rows first, normalized
    math.rms_norm(x.data() + wanted[i] * s.hidden, norm, s.hidden, s.eps, h.data() + i * s.hidden);
  run.product(head, h.data(), count, logits);
}

}  // namespace lowbit
