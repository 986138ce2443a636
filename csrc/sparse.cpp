// The scalar row of sparse products, the layout of steps, and the threads.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kMany = 8;               // tokens from which they stand side by side
constexpr int64_t kInlinePlaces = 1 << 14;  // below this, waking a thread costs more than it saves
constexpr int64_t kPanels = 8;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Byte offsets of the arrays that follow the header.
struct Offsets {
  int64_t first, column, factor, sum, offset, value, code, table, quad, group, tile_offset, tile_value, end;

  explicit Offsets(const SparseHeader& h) {
    const SparseKind kind = h.kind;
    const int64_t n = h.n, steps = h.steps, each = kind == SparseKind::kInt ? 1 : 4;
    const int64_t down = (n + Steps::kTileRows - 1) / Steps::kTileRows;
    const int64_t across = (h.k + Steps::kTileColumns - 1) / Steps::kTileColumns;
    const int64_t panels = (n + Steps::kRows - 1) / Steps::kRows, places = steps * Steps::kRows * Steps::slots(kind);
    const int64_t rows = kind == SparseKind::kInt ? panels * Steps::kRows : 0;
    first = aligned(Steps::kHeader);
    column = first + aligned((panels + 1) * 4);
    factor = column + aligned(steps * 4);
    sum = factor + aligned(rows * 4);
    offset = sum + aligned(rows * 8);
    value = offset + aligned(places);
    code = value + aligned(places * each);
    table = code + (h.coded ? aligned(places / 2) : 0);
    quad = table + (h.coded ? panels * Steps::kRows * Steps::kValues : 0);
    group = quad + aligned((down + 1) * 4);
    tile_offset = group + aligned(down * across * Steps::kGroups * static_cast<int64_t>(sizeof(SparseGroup)));
    tile_value = tile_offset + aligned(h.quads * 4);
    end = tile_value + aligned(h.quads * 4 * each) + 64;  // kernels may read a line past the last value
  }
};

void few_scalar(const Steps& s, const float* const* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t n = p0 * Steps::kRows; n < std::min(p1 * Steps::kRows, s.h.n); ++n) {
      const int64_t p = n / Steps::kRows;
      double acc = 0;
      for (int64_t i = s.first[p]; i < s.first[p + 1]; ++i) {
        const int64_t at = i * Steps::kRows + n % Steps::kRows;
        acc += static_cast<double>(values[at]) * xs[t][s.column[i] + s.offset[at]];
      }
      y[n] += static_cast<float>(acc);
    }
}

// |sum| <= 2^15 * 127 * 2^31 places < 2^53: exact as a double too.
void few_int_scalar(const Steps& s, const Digits* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t p = p0; p < p1; ++p) {
      const Digits& x = xs[t];
      int64_t acc[Steps::kRows] = {};
      for (int64_t i = s.first[p]; i < s.first[p + 1]; ++i)
        for (int64_t at = i * 64; at < i * 64 + 64; ++at) {
          const int64_t k = s.column[i] + s.offset[at];
          acc[at / 4 % Steps::kRows] += ((x.d[0][k] << 7) + x.d[1][k]) * values[at];
        }
      for (int64_t r = 0, n = p * Steps::kRows; r < Steps::kRows && n < s.h.n; ++r, ++n)
        y[n] += static_cast<float>(static_cast<double>(acc[r] - s.sum[n] * (1 << 14)) *
                                   (static_cast<double>(x.scale) * s.factor[n]));
    }
}

void many_scalar(const Steps& s, const float* xt, int64_t down, float* yt) {
  const bool integer = s.h.kind == SparseKind::kInt;
  std::vector<double> acc(static_cast<size_t>(Steps::kTileRows * kSparseTokens));
  const SparseGroup* group = s.group + down * s.tiles_across() * Steps::kGroups;
  int64_t at = 4 * static_cast<int64_t>(s.quad[down]);
  for (int64_t tile = 0; tile < s.tiles_across(); ++tile)
    for (int64_t g = 0; g < Steps::kGroups; ++g, ++group)
      for (int64_t i = 0; i < 4 * group->count; ++i, ++at) {
        const float value = integer ? static_cast<const int8_t*>(s.tile_value)[at]
                                    : static_cast<const float*>(s.tile_value)[at];
        const float* x = xt + (tile * Steps::kTileColumns + s.tile_offset[at]) * kSparseTokens;
        double* to = acc.data() + group->row[i % 4] * kSparseTokens;
        for (int64_t m = 0; m < kSparseTokens; ++m) to[m] += static_cast<double>(value) * x[m];
      }
  for (int64_t r = 0; r < Steps::kTileRows; ++r) {
    const int64_t n = down * Steps::kTileRows + r;
    const double times = !integer ? 1.0 : n < s.h.n ? s.factor[n] : 0.0;
    for (int64_t m = 0; m < kSparseTokens; ++m)
      yt[r * kSparseTokens + m] = static_cast<float>(acc[static_cast<size_t>(r * kSparseTokens + m)] * times);
  }
}

struct Buffer {
  std::vector<float> x;
  std::vector<uint8_t> digits;
};

uint8_t* line(uint8_t* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 63); }  // of the cache

template <class T>
T* room(std::vector<T>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  return v.data();
}

Digits digits_scalar(const float* x, int64_t k, int64_t ld, uint8_t* d) { return digits_of(x, k, ld, d); }

void turn_scalar(const float* from, int64_t ld_from, float* to, int64_t ld_to, bool add) {
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t j = 0; j < 16; ++j) {
      float& at = to[j * ld_to + i];
      at = add ? at + from[i * ld_from + j] : from[i * ld_from + j];
    }
}

// to [columns][rows] = from [rows][columns], or += that, whole squares of sixteen by the row's own way.
void turn(const SparseRow& row, const float* from, int64_t rows, int64_t columns, int64_t ld_from, float* to,
          int64_t ld_to, bool add) {
  for (int64_t j = 0; j < columns; j += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      const float* square = from + i * ld_from + j;
      float* out = to + j * ld_to + i;
      if (i + 16 <= rows && j + 16 <= columns) {
        row.turn(square, ld_from, out, ld_to, add);
        continue;
      }
      for (int64_t a = 0; a < std::min<int64_t>(16, rows - i); ++a)
        for (int64_t b = 0; b < std::min<int64_t>(16, columns - j); ++b) {
          float& at = out[b * ld_to + a];
          at = add ? at + square[a * ld_from + b] : square[a * ld_from + b];
        }
    }
}

}  // namespace

Steps::Steps(const uint8_t* b, int64_t bytes) {
  if (bytes >= kHeader) std::memcpy(&h, b, sizeof h);
  if (bytes < kHeader || h.magic != kMagic || h.bytes != bytes || h.n < 0 || h.steps < 0 || h.n >= int64_t{1} << 31 ||
      h.steps >= int64_t{1} << 31 || (h.kind != SparseKind::kInt && h.kind != SparseKind::kFloat) ||
      h.k < 1 || h.k >= int64_t{1} << 31 || h.quads < 0 || h.quads >= int64_t{1} << 29 ||
      (h.coded != 0 && (h.coded != 1 || h.kind != SparseKind::kInt)) || Offsets(h).end != bytes)
    throw std::invalid_argument("the exceptions are no kernel layout of this version: prepare the layer again");
  const Offsets at(h);
  first = reinterpret_cast<const int32_t*>(b + at.first);
  column = reinterpret_cast<const int32_t*>(b + at.column);
  factor = reinterpret_cast<const float*>(b + at.factor);
  sum = reinterpret_cast<const int64_t*>(b + at.sum);
  offset = b + at.offset;
  value = b + at.value;
  code = b + at.code;
  table = reinterpret_cast<const int8_t*>(b + at.table);
  quad = reinterpret_cast<const int32_t*>(b + at.quad);
  group = reinterpret_cast<const SparseGroup*>(b + at.group);
  tile_offset = b + at.tile_offset;
  tile_value = b + at.tile_value;
}

namespace {

int64_t row_of(const Places& p, int64_t place) {
  return std::upper_bound(p.start, p.start + p.n + 1, place) - p.start - 1;
}

// Places by tiles: the groups, and for every slot of them its place, or -1.
struct Tiles {
  std::vector<int32_t> quad{0};
  std::vector<SparseGroup> group;
  std::vector<int64_t> taken;
};

Tiles tiles_of(const Places& p) {
  Tiles out;
  const int64_t rows = Steps::kTileRows, columns = Steps::kTileColumns;
  for (int64_t n0 = 0; n0 < p.n; n0 += rows) {
    int64_t next[Steps::kTileRows], end[Steps::kTileRows], order[Steps::kTileRows];
    for (int64_t r = 0; r < rows; ++r) end[r] = n0 + r < p.n ? p.start[n0 + r] : 0;
    for (int64_t k0 = 0; k0 < p.k; k0 += columns) {
      for (int64_t r = 0; r < rows; ++r) {
        order[r] = r;
        next[r] = end[r];
        if (n0 + r < p.n)
          while (end[r] < p.start[n0 + r + 1] && p.column[end[r]] < k0 + columns) ++end[r];
      }
      std::stable_sort(order, order + rows, [&](int64_t a, int64_t b) { return end[a] - next[a] > end[b] - next[b]; });
      for (int64_t g = 0; g < rows; g += 4) {
        SparseGroup group{};
        group.count = static_cast<uint8_t>(end[order[g]] - next[order[g]]);
        for (int64_t j = 0; j < 4; ++j) group.row[j] = static_cast<uint8_t>(order[g + j]);
        out.group.push_back(group);
        for (int64_t i = 0; i < group.count; ++i)
          for (int64_t j = 0; j < 4; ++j) {
            const int64_t r = order[g + j];
            out.taken.push_back(next[r] < end[r] ? next[r]++ : -1);
          }
      }
    }
    out.quad.push_back(static_cast<int32_t>(out.taken.size() / 4));
  }
  return out;
}

int8_t as_int8(float value, float factor) {
  const float times = factor > 0 ? std::nearbyint(value / factor) : 0.0f;
  return static_cast<int8_t>(std::max(-127.0f, std::min(127.0f, times)));
}

// [panels, 16, kValues]: 0, then a row's other values as they come; nothing where a row has too many.
std::vector<int8_t> tables_of(const Places& p, const float* factor, int64_t panels) {
  std::vector<int8_t> out(static_cast<size_t>(panels * Steps::kRows * Steps::kValues), 0);
  for (int64_t n = 0; n < p.n; ++n) {
    int8_t* const of_row = out.data() + n * Steps::kValues;
    int64_t count = 1;
    for (int64_t i = p.start[n]; i < p.start[n + 1]; ++i) {
      const int8_t v = as_int8(p.value[i], factor[n]);
      if (std::find(of_row, of_row + count, v) != of_row + count) continue;
      if (count == Steps::kValues) return {};
      of_row[count++] = v;
    }
  }
  return out;
}

}  // namespace

std::vector<uint8_t> pack_sparse(const Places& p, SparseKind kind, const float* factor) {
  const int64_t slots = Steps::slots(kind), window = Steps::window(kind), rows = Steps::kRows;
  const int64_t panels = (p.n + rows - 1) / rows;
  std::vector<int32_t> first{0}, column;
  std::vector<int64_t> taken, next(static_cast<size_t>(rows));  // taken: a place, or -1, for every slot
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t n0 = panel * rows, n1 = std::min(n0 + rows, p.n);
    std::copy(p.start + n0, p.start + n1, next.begin());
    for (;;) {
      int32_t low = INT32_MAX;
      for (int64_t n = n0; n < n1; ++n)
        if (next[n - n0] < p.start[n + 1]) low = std::min(low, p.column[next[n - n0]]);
      if (low == INT32_MAX) break;
      low -= low % static_cast<int32_t>(Steps::align(kind));
      column.push_back(low);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < slots; ++s) {
          const bool here = n0 + r < n1 && next[r] < p.start[n0 + r + 1] && p.column[next[r]] < low + window;
          taken.push_back(here ? next[r]++ : -1);
        }
    }
    first.push_back(static_cast<int32_t>(column.size()));
  }
  const Tiles tiles = tiles_of(p);
  const int64_t quads = static_cast<int64_t>(tiles.taken.size() / 4);
  if (quads >= int64_t{1} << 29) throw std::invalid_argument("too many exceptions");
  std::vector<int8_t> tables;
  if (kind == SparseKind::kInt) tables = tables_of(p, factor, panels);
  SparseHeader h{Steps::kMagic, 0, p.n, p.k, static_cast<int64_t>(column.size()), kind, quads, !tables.empty()};
  const Offsets at(h);
  h.bytes = at.end;
  std::vector<uint8_t> out(static_cast<size_t>(at.end));
  std::memcpy(out.data(), &h, sizeof h);
  std::memcpy(out.data() + at.first, first.data(), first.size() * 4);
  if (!column.empty()) std::memcpy(out.data() + at.column, column.data(), column.size() * 4);
  float* factors = reinterpret_cast<float*>(out.data() + at.factor);
  int64_t* sums = reinterpret_cast<int64_t*>(out.data() + at.sum);
  if (kind == SparseKind::kInt) std::copy(factor, factor + p.n, factors);
  // Writes place `from`, of row n, as number `to` of an array of values; returns what it is as an int8.
  const auto put = [&](int64_t array, size_t to, int64_t from, int64_t n) -> int64_t {
    if (kind == SparseKind::kFloat) {
      std::memcpy(out.data() + array + 4 * to, p.value + from, 4);
      return 0;
    }
    const int8_t v = as_int8(p.value[from], factors[n]);
    out[static_cast<size_t>(array) + to] = static_cast<uint8_t>(v);
    return v;
  };
  for (size_t i = 0; i < taken.size(); ++i) {
    if (taken[i] < 0) continue;
    const int64_t step = static_cast<int64_t>(i) / (rows * slots), n = row_of(p, taken[i]);
    out[static_cast<size_t>(at.offset) + i] = static_cast<uint8_t>(p.column[taken[i]] - column[step]);
    const int64_t v = put(at.value, i, taken[i], n);
    if (kind == SparseKind::kInt) sums[n] += v;
    if (!h.coded) continue;
    const int8_t* of_row = tables.data() + n * Steps::kValues;
    const int64_t code = std::find(of_row, of_row + Steps::kValues, static_cast<int8_t>(v)) - of_row;
    out[static_cast<size_t>(at.code) + i / 2] |= static_cast<uint8_t>(code << 4 * (i % 2));
  }
  if (h.coded) std::memcpy(out.data() + at.table, tables.data(), tables.size());
  std::memcpy(out.data() + at.quad, tiles.quad.data(), tiles.quad.size() * 4);
  if (!tiles.group.empty())
    std::memcpy(out.data() + at.group, tiles.group.data(), tiles.group.size() * sizeof(SparseGroup));
  for (size_t i = 0; i < tiles.taken.size(); ++i) {
    const int64_t from = tiles.taken[i];
    if (from < 0) continue;
    out[static_cast<size_t>(at.tile_offset) + i] = static_cast<uint8_t>(p.column[from] % Steps::kTileColumns);
    put(at.tile_value, i, from, row_of(p, from));
  }
  return out;
}

const SparseRow sparse_scalar = {few_scalar, few_int_scalar, many_scalar, turn_scalar, digits_scalar};

void sparse_linear(const Places& p, const Steps& s, const float* x, int64_t m, float* y, int n_threads,
                   const std::string& force) {
  static thread_local Buffer buffer;
  const SparseRow& row = *pick(kSparse, force).fn;
  const int64_t places = p.start[p.n];
  if (places * m < kInlinePlaces) n_threads = 1;
  const bool exact = s.h.kind == SparseKind::kFloat;
  if (m < kMany) {
    const int64_t ld = aligned(p.k + Steps::window(s.h.kind)), turns = (s.panels() + kPanels - 1) / kPanels;
    for (int64_t t = 0; t < m; t += kFewTokens) {
      const int64_t tokens = std::min(kFewTokens, m - t);
      const float* padded[kFewTokens];
      Digits digits[kFewTokens];
      for (int64_t j = 0; j < tokens; ++j) {
        const float* from = x + (t + j) * p.k;
        if (exact) {
          float* to = room(buffer.x, kFewTokens * ld) + j * ld;
          std::copy(from, from + p.k, to);
          std::fill(to + p.k, to + ld, 0.0f);
          padded[j] = to;
        } else {
          digits[j] = row.digits(from, p.k, ld, line(room(buffer.digits, kFewTokens * 2 * ld + 64)) + j * 2 * ld);
        }
      }
      parallel_for(turns, n_threads, [&](int64_t i) {
        const int64_t p0 = i * kPanels, p1 = std::min(p0 + kPanels, s.panels());
        if (exact) row.few(s, padded, tokens, p0, p1, y + t * p.n);
        else row.few_int(s, digits, tokens, p0, p1, y + t * p.n);
      });
    }
    return;
  }
  float* const xt = reinterpret_cast<float*>(
      line(reinterpret_cast<uint8_t*>(room(buffer.x, p.k * kSparseTokens + 16))));
  for (int64_t t = 0; t < m; t += kSparseTokens) {
    const int64_t tokens = std::min(kSparseTokens, m - t);
    if (tokens < kSparseTokens) std::fill(xt, xt + p.k * kSparseTokens, 0.0f);
    turn(row, x + t * p.k, tokens, p.k, p.k, xt, kSparseTokens, false);
    float* const to = y + t * p.n;
    parallel_for(s.tiles_down(), n_threads, [&](int64_t i) {
      const int64_t n0 = i * Steps::kTileRows, n1 = std::min(n0 + Steps::kTileRows, p.n);
      alignas(64) float yt[Steps::kTileRows * kSparseTokens];
      row.many(s, xt, i, yt);
      turn(row, yt, n1 - n0, tokens, kSparseTokens, to + n0, p.n, true);
    });
  }
}

}  // namespace lowbit
