// Every row this CPU can run against the scalar row, without Python: odd shapes, ragged groups, extreme codes and
// activations, buffers that end where the heap ends (for the sanitizers). Prints a line for each operation and row, and
// ends with 1 if any differs. tests/kernels/test_native_rows.py builds it for 64-bit ARM and runs it under emulation,
// `make sanitize` for this machine. With arguments: the rows that must be there, else it ends with 2.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "binary.h"
#include "linear_int8.h"
#include "sparse.h"

namespace {

using namespace lowbit;

std::mt19937 random_bits(1);
int below(int n) { return static_cast<int>(random_bits() % static_cast<uint32_t>(n)); }
float normal() {
  static std::normal_distribution<float> d;
  return d(random_bits);
}
template <class T, class Make>
std::vector<T> filled(int64_t n, const Make& make) {
  std::vector<T> v(static_cast<size_t>(n));
  for (T& t : v) t = static_cast<T>(make());
  return v;
}

// Heap blocks of exactly the bytes a kernel may touch.
template <class T>
std::unique_ptr<T[]> tight(const std::vector<T>& v) {
  std::unique_ptr<T[]> p(new T[v.size()]);
  std::copy(v.begin(), v.end(), p.get());
  return p;
}

// Two bits of mantissa: 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, ... times 2^-6
float minifloat(int i) {
  const int a = i < 0 ? -i : i;
  const float v = std::ldexp(static_cast<float>(a < 4 ? a : 4 + a % 4), a < 4 ? -6 : a / 4 - 7);
  return i < 0 ? -v : v;
}

enum class Fill { kRandom, kLowest, kHighest };

struct Problem {
  std::vector<float> table, scale, zero, x;
  std::vector<int8_t> levels;
  std::unique_ptr<uint8_t[]> codes;
  Weights w;
  int64_t m;

  Problem(int bits, int64_t m_, int64_t n, int64_t k, int64_t groups, bool per_row, bool has_zero, bool even,
          Fill fill)
      : m(m_) {
    const int count = 1 << bits;
    w.n = n, w.k = k, w.groups = groups, w.group = k / groups, w.bits = bits, w.row_bytes = (k * bits + 7) / 8;
    w.table_rows = per_row ? n : 1;
    std::vector<uint8_t> packed(static_cast<size_t>(n * w.row_bytes));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const int code = fill == Fill::kRandom ? below(count) : fill == Fill::kLowest ? 0 : count - 1;
        for (int b = 0; b < bits; ++b)
          packed[static_cast<size_t>(i * w.row_bytes + (j * bits + b) / 8)] |=
              static_cast<uint8_t>((code >> b & 1) << ((j * bits + b) % 8));
      }
    codes = tight(packed);
    const bool extreme = fill != Fill::kRandom;
    levels = filled<int8_t>(w.table_rows * count, [&] { return below(256) - 128; });
    if (even)
      for (int c = 0; c < count; ++c)
        for (int64_t r = 0; r < w.table_rows; ++r)
          levels[static_cast<size_t>(r * count + c)] = static_cast<int8_t>(c - count / 2);
    if (extreme && !even) levels.front() = -128, levels.back() = 127;
    table = std::vector<float>(levels.begin(), levels.end());
    if (!even && bits != 5) table = filled<float>(w.table_rows * count, normal);
    if (bits > 5 && !even && m % 2 == 1)
      for (int64_t i = 0; i < w.table_rows * count; ++i)
        table[static_cast<size_t>(i)] = minifloat(static_cast<int>(i % count) - count / 2 + 1);
    scale = filled<float>(n * groups, normal);
    if (has_zero) zero = filled<float>(n * groups, normal);
    x = filled<float>(m * k, [&] { return extreme ? 127.0f : normal(); });
    w.codes = codes.get(), w.table = table.data(), w.levels = levels.data(), w.scale = scale.data();
    w.zero = has_zero ? zero.data() : nullptr;
  }
};

std::vector<float> decoded(const Problem& p, const std::string& isa) {
  std::vector<float> out(static_cast<size_t>(p.w.n * p.w.k));
  decode_rows(p.w, nullptr, p.w.n, out.data(), 1, isa);
  return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool decode_agrees(const Problem& p, const std::string& isa) { return same(decoded(p, isa), decoded(p, "scalar")); }

// |y - y_scalar| <= (K/8 + 12) * 2^-24 * sum |x*w_hat|
bool float_agrees(const Problem& p, const std::string& isa) {
  const std::vector<float> w = decoded(p, "scalar");
  std::vector<float> y(static_cast<size_t>(p.m * p.w.n)), want = y;
  linear_float(p.w, tight(p.x).get(), p.m, y.data(), 1, isa);
  linear_float(p.w, tight(p.x).get(), p.m, want.data(), 1, "scalar");
  for (int64_t m = 0; m < p.m; ++m)
    for (int64_t n = 0; n < p.w.n; ++n) {
      double size = 0;
      for (int64_t k = 0; k < p.w.k; ++k)
        size += std::fabs(static_cast<double>(p.x[static_cast<size_t>(m * p.w.k + k)]) *
                          w[static_cast<size_t>(n * p.w.k + k)]);
      const size_t at = static_cast<size_t>(m * p.w.n + n);
      if (!(std::fabs(y[at] - want[at]) <= (p.w.k / 8.0 + 12) * std::ldexp(size, -24) + 1e-30)) return false;
    }
  return true;
}

bool int8_agrees(const Problem& p, const std::string& isa) {
  const PackedHeader h = plan_packed(p.w);
  const std::vector<float> step = filled<float>(p.w.table_rows, normal), bias = filled<float>(p.w.n, normal);
  const int64_t bytes = Packed(h).bytes();
  std::unique_ptr<uint8_t[]> buffer(new uint8_t[static_cast<size_t>(bytes)]);
  pack(p.w, step.data(), h, buffer.get());
  const Packed packed(buffer.get(), bytes);
  std::vector<float> y(static_cast<size_t>(p.m * p.w.n)), want = y;
  linear_int8(packed, tight(p.x).get(), p.m, bias.data(), y.data(), 1, isa);
  linear_int8(packed, tight(p.x).get(), p.m, bias.data(), want.data(), 1, "scalar");
  return same(y, want);
}

bool quantize_agrees(const Problem& p, const std::string& isa) {
  const Segments seg(p.w.groups, p.w.group);
  std::vector<float> x = p.x;
  if (!x.empty() && below(4) == 0) x[static_cast<size_t>(below(static_cast<int>(x.size())))] = below(2) ? INFINITY : NAN;
  if (!x.empty()) x.back() = 0.5f, x.front() = 1e-38f;
  for (int64_t m = 0; m < p.m; ++m) {
    const auto row = tight(std::vector<float>(x.begin() + m * p.w.k, x.begin() + (m + 1) * p.w.k));
    std::vector<int8_t> q[2];
    std::vector<float> scale[2];
    std::vector<int32_t> sum[2];
    for (int i = 0; i < 2; ++i) {
      q[i].resize(static_cast<size_t>(seg.row_size())), scale[i].resize(static_cast<size_t>(seg.padded));
      sum[i].resize(static_cast<size_t>(seg.padded));
      pick(kQuantize, i ? "scalar" : isa).fn(row.get(), seg, q[i].data(), scale[i].data(), sum[i].data());
    }
    for (size_t i = 0; i < scale[0].size(); ++i)
      if (scale[0][i] != scale[1][i] && !(std::isnan(scale[0][i]) && std::isnan(scale[1][i]))) return false;
    if (q[0] != q[1] || sum[0] != sum[1]) return false;
  }
  return true;
}

constexpr int kShapes[][4] = {  // M, N, K, groups
    {1, 1, 1, 1},   {2, 3, 5, 5},    {3, 5, 33, 3},    {4, 7, 66, 66},   {5, 9, 70, 7},  {7, 13, 300, 2},
    {1, 17, 96, 3}, {6, 26, 641, 1}, {2, 33, 1300, 4}, {13, 40, 128, 1}, {1, 32, 48, 3}, {30, 18, 64, 2},
    {1, 112, 160, 5}, {13, 80, 96, 3}};

int report(const char* op, const char* isa, int wrong, int count) {
  std::printf("%-14s %-8s %s (%d of %d problems differ)\n", op, isa, wrong ? "FAILED" : "ok", wrong, count);
  return wrong > 0;
}

using Check = bool (*)(const Problem&, const std::string&);

template <class Fn>
int run(const char* op, const Table<Fn>& table, Check check, std::set<std::string>& seen) {
  int failed = 0;
  for (size_t r = 0; r < table.count; ++r) {
    const Row<Fn>& row = table.rows[r];
    if ((row.needs & cpu_features()) != row.needs) continue;
    seen.insert(row.isa);
    int count = 0, wrong = 0;
    for (int bits = 1; bits <= 8; ++bits)
      for (const auto& s : kShapes)
        for (int i = 0; i < 8; ++i, ++count) {
          const Fill fill = i < 4 ? Fill::kRandom : i < 6 ? Fill::kLowest : Fill::kHighest;
          const Problem p(bits, s[0], s[1], s[2], s[3], i % 4 == 1, i % 2 == 0, i % 2 == 1 && i > 2, fill);
          if (check(p, row.isa)) continue;
          if (wrong++ == 0)
            std::printf("  differs: %d bits, M %d, N %d, K %d, %d groups, case %d\n", bits, s[0], s[1], s[2], s[3], i);
        }
    failed += report(op, row.isa, wrong, count);
  }
  return failed;
}

// Convolutions of every kind, with bits all alike or random: the sums are whole, so they must be equal.
bool bits_agree(BitKind kind, int64_t n, int64_t channels, int side, int fill, const std::string& isa) {
  BitConv c;
  c.h = c.w = c.oh = c.ow = side;
  c.kh = c.kw = side > 1 ? 3 : 1, c.top = c.left = side > 1, c.batch = side > 1 ? 2 : 5;
  c.shape.n = n, c.shape.taps = c.kh * c.kw, c.shape.channels = channels, c.shape.kind = kind;
  const int64_t words = c.shape.words(), pixels = c.batch * side * side;
  const auto planes = [&](int64_t rows, int count) {
    std::vector<uint32_t> out(static_cast<size_t>(rows * count * words));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < channels; ++i) {
        const int level = fill == 0 ? below(count + 1) : fill - 1;  // of a ternary: none, first, second
        const size_t at = static_cast<size_t>(r * count * words + i / 32);
        if (level > 0) out[at + static_cast<size_t>((level - 1) * words)] |= 1u << (i % 32);
      }
    return out;
  };
  const auto rows = planes(n * c.shape.taps, weight_planes(kind)), input = planes(pixels, input_planes(kind));
  const std::vector<int32_t> tap_sum(static_cast<size_t>(c.shape.taps * n), 3), base(static_cast<size_t>(n), 7);
  const std::vector<float> scale(static_cast<size_t>(n), 1.0f);
  c.rows = rows.data();
  if (sign_input(kind)) c.tap_sum = tap_sum.data();
  std::vector<float> y[2];
  for (int i = 0; i < 2; ++i) {
    y[i].resize(static_cast<size_t>(pixels * n));
    BitEpilogue e{};
    e.base = base.data(), e.scale = scale.data(), e.y = y[i].data(), e.stride = n;
    bit_conv(c, tight(input).get(), e, 1, i ? "scalar" : isa);
  }
  return same(y[0], y[1]);
}

int run_bits(std::set<std::string>& seen) {
  int failed = 0;
  for (size_t r = 0; r < kBitTile.count; ++r) {
    const Row<BitKernel>& row = kBitTile.rows[r];
    if ((row.needs & cpu_features()) != row.needs) continue;
    seen.insert(row.isa);
    int count = 0, wrong = 0;
    for (int kind = 0; kind < kBitKinds; ++kind)
      for (const int64_t n : {1, 15, 16, 17, 64, 70})
        for (const int64_t channels : {1, 31, 32, 33, 100, 1100})
          for (const int side : {1, 5})
            for (int fill = 0; fill < 2 + weight_planes(static_cast<BitKind>(kind)); ++fill, ++count)
              wrong += !bits_agree(static_cast<BitKind>(kind), n, channels, side,
                                   std::min(fill, 1 + input_planes(static_cast<BitKind>(kind))), row.isa);
    failed += report("bit_conv", row.isa, wrong, count);
  }
  return failed;
}

// Exceptions of every kind. Few tokens of kInt are sums of whole numbers: equal. The rest may differ by the order of sums.
bool sparse_agree(SparseKind kind, int64_t n, int64_t k, int every, int64_t m, Fill fill, const std::string& isa) {
  std::vector<int64_t> start{0};
  std::vector<int32_t> column;
  std::vector<float> value, factor(static_cast<size_t>(n), 0.25f);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      if (below(every) != 0) continue;
      const int whole = fill == Fill::kRandom ? below(255) - 127 : fill == Fill::kLowest ? -127 : 127;
      column.push_back(static_cast<int32_t>(c));
      value.push_back(kind == SparseKind::kInt ? 0.25f * static_cast<float>(whole) : normal());
    }
    start.push_back(static_cast<int64_t>(column.size()));
  }
  const Places places{n, k, start.data(), column.data(), value.data()};
  const std::vector<uint8_t> packed = pack_sparse(places, kind, factor.data());
  const Steps steps(packed.data(), static_cast<int64_t>(packed.size()));
  const auto x = filled<float>(m * k, [&] { return fill == Fill::kRandom ? normal() : fill == Fill::kLowest ? -3.0f : 3.0f; });
  std::vector<float> y[2];
  for (int i = 0; i < 2; ++i) {
    y[i].assign(static_cast<size_t>(m * n), 0.0f);
    sparse_linear(places, steps, tight(x).get(), m, y[i].data(), 1, i ? "scalar" : isa);
  }
  if (kind == SparseKind::kInt && m < 8) return same(y[0], y[1]);
  for (int64_t t = 0; t < m; ++t)
    for (int64_t r = 0; r < n; ++r) {
      double size = 0;
      for (int64_t i = start[static_cast<size_t>(r)]; i < start[static_cast<size_t>(r + 1)]; ++i)
        size += std::fabs(static_cast<double>(x[static_cast<size_t>(t * k + column[static_cast<size_t>(i)])]) *
                          value[static_cast<size_t>(i)]);
      const size_t at = static_cast<size_t>(t * n + r);
      const double bound = (193.0 + static_cast<double>(k) / 64) * std::ldexp(size, -24);
      if (!(std::fabs(static_cast<double>(y[0][at]) - y[1][at]) <= bound)) return false;
    }
  return true;
}

int run_sparse(std::set<std::string>& seen) {
  int failed = 0;
  for (size_t r = 0; r < kSparse.count; ++r) {
    const Row<SparseFn>& row = kSparse.rows[r];
    if ((row.needs & cpu_features()) != row.needs) continue;
    seen.insert(std::string("sparse:") + row.isa);
    int count = 0, wrong = 0;
    for (const SparseKind kind : {SparseKind::kInt, SparseKind::kFloat})
      for (const int64_t n : {1, 15, 16, 33, 130})
        for (const int64_t k : {1, 31, 64, 129, 700})
          for (const int every : {1, 3, 20})
            for (const int64_t m : {1, 3, 7, 8, 33})
              for (const Fill fill : {Fill::kRandom, Fill::kLowest, Fill::kHighest}) {
                ++count;
                wrong += !sparse_agree(kind, n, k, every, m, fill, row.isa);
              }
    failed += report("sparse_linear", row.isa, wrong, count);
  }
  return failed;
}

}  // namespace

int main(int argc, char** argv) {
  std::set<std::string> seen;
  int failed = run("decode", kDecode, decode_agrees, seen) + run("linear_float", kLinearFloat, float_agrees, seen) +
               run("quantize", kQuantize, quantize_agrees, seen) + run("linear_int8", kLinearInt8, int8_agrees, seen) +
               run_bits(seen) + run_sparse(seen);
  for (int i = 1; i < argc; ++i)
    if (!seen.count(argv[i])) {
      std::printf("row %s is not there\n", argv[i]);
      return 2;
    }
  return failed ? 1 : 0;
}
