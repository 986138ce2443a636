// Building the kernel layout, and reading single weights back out of it.
#include "packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace lowbit {
namespace {

int stored_bits(PackedKind kind) {
  switch (kind) {
    case PackedKind::k1: return 1;
    case PackedKind::k2: case PackedKind::k2Table: return 2;
    case PackedKind::k3: case PackedKind::k3Table: return 3;
    case PackedKind::k4: case PackedKind::k4Table: return 4;
    case PackedKind::kBytes: break;
  }
  return 8;
}

bool uses_lut(PackedKind kind) {
  return kind == PackedKind::k2Table || kind == PackedKind::k3Table || kind == PackedKind::k4Table;
}

// One row's codes as bytes.
void unpack_row(const uint8_t* row, int bits, int64_t k, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, row, static_cast<size_t>(k));
    return;
  }
  const int mask = (1 << bits) - 1;
  uint32_t held = 0;
  int have = 0;
  for (int64_t i = 0; i < k; ++i) {
    if (have < bits) {
      held |= static_cast<uint32_t>(*row++) << have;
      have += 8;
    }
    out[i] = static_cast<uint8_t>(held & mask);
    held >>= bits;
    have -= bits;
  }
}

// Where a kind keeps step `s` of segment A or B: up to three pieces of (vector, shift down to bit 0 of the code).
struct Place {
  int vector[3], shift[3], to[3], width[3], pieces;
};

Place place(PackedKind kind, int which, int s) {
  switch (stored_bits(kind)) {
    case 8: return {{2 * s + which}, {0}, {0}, {8}, 1};
    case 4: return {{s}, {4 * which}, {0}, {4}, 1};
    case 2: return {{s / 2}, {4 * which + 2 * (s % 2)}, {0}, {2}, 1};
    case 1: return {{s / 4}, {4 * which + s % 4}, {0}, {1}, 1};
    default: break;
  }
  const int t = s / 4 * 3, i = s % 4;
  if (i < 3) return {{t + i}, {3 * which}, {0}, {3}, 1};
  // six bits over three vectors: A has bits 0-2 of them, B has 3-5
  if (which == 0) return {{t, t + 1}, {6, 6}, {0, 2}, {2, 1}, 2};
  return {{t + 1, t + 2}, {7, 6}, {0, 1}, {1, 2}, 2};
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  float f;
  if (e == 0) {
    f = std::ldexp(static_cast<float>(m), -24);
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// The float16 that has exactly this value, or false.
bool exact_half(float f, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const int e = static_cast<int>(bits >> 23 & 255) - 127;
  const uint32_t m = bits & 0x7fffff;
  uint16_t h;
  if ((bits & 0x7fffffff) == 0) h = 0;
  else if (e >= -14 && e <= 15) h = static_cast<uint16_t>((e + 15) << 10 | m >> 13);
  else if (e >= -24 && e < -14) h = static_cast<uint16_t>((m | 0x800000) >> (-1 - e));
  else return false;
  h |= sign;
  *out = h;
  const float back = half_to_float(h);
  return std::memcmp(&back, &f, sizeof f) == 0;
}

bool all_half(const float* v, int64_t count) {
  uint16_t h;
  for (int64_t i = 0; i < count; ++i)
    if (!exact_half(v[i], &h)) return false;
  return true;
}

// Which codes occur: those that do not may mean anything.
std::vector<bool> used_codes(const Weights& w) {
  std::vector<bool> used(256, false);
  std::vector<uint8_t> codes(static_cast<size_t>(w.k));
  for (int64_t n = 0; n < w.n; ++n) {
    unpack_row(w.row(n), w.bits, w.k, codes.data());
    for (uint8_t c : codes) used[c] = true;
  }
  return used;
}

}  // namespace

Packed::Packed(const PackedHeader& header) : h(header), seg(h.groups, h.k / std::max<int64_t>(h.groups, 1)) {
  panels = nullptr;
  block_count = (h.n + kRows - 1) / kRows;
  units = seg.padded / 2;
  vectors = seg.length / 2 * stored_bits(h.kind) / 8;
}

namespace {
PackedHeader header_of(const uint8_t* buffer, int64_t bytes) {
  static_assert(sizeof(PackedHeader) <= Packed::kHeader, "the header has room");
  PackedHeader h{};
  if (bytes >= Packed::kHeader) std::memcpy(&h, buffer, sizeof h);
  const bool good = h.magic == Packed::kMagic && h.bytes == bytes && h.n >= 0 && h.k >= 1 && h.groups >= 1 &&
                    h.n <= INT32_MAX && h.k <= INT32_MAX && h.k % h.groups == 0 && h.kind >= PackedKind::k1 &&
                    h.kind <= PackedKind::kBytes && (h.times == 1 || h.times == 2) && h.span >= 0 && h.span <= 255 &&
                    h.low >= -128 && h.low + h.span <= 127;
  if (!good) throw std::invalid_argument("not a packed matrix of this version of lowbit");
  return h;
}
}  // namespace

Packed::Packed(const uint8_t* buffer, int64_t size) : Packed(header_of(buffer, size)) {
  if (bytes() != size) throw std::invalid_argument("a packed matrix whose size contradicts its shape");
  panels = buffer + kHeader;
}

Times packed_times(const PackedHeader& h) {
  switch (h.kind) {
    case PackedKind::k1: return {2 / h.times, 32 / h.times};  // extracted at bits 1 and 5: code * 2 and code * 32
    case PackedKind::k2: case PackedKind::k4: return {1, 16};
    case PackedKind::k3: return {1, 8};
    default: return {1, 1};
  }
}

PackedHeader plan_packed(const Weights& w) {
  PackedHeader h{};
  h.magic = Packed::kMagic;
  h.n = w.n;
  h.k = w.k;
  h.groups = w.groups;
  h.times = 1;
  h.has_zero = w.zero != nullptr;
  h.wide = !all_half(w.scale, w.n * w.groups) || (w.zero && !all_half(w.zero, w.n * w.groups));
  const std::vector<bool> used = used_codes(w);
  const int count = 1 << w.bits;
  int lo = 127, hi = -128;
  for (int64_t i = 0; i < w.table_rows * count; ++i)
    if (used[static_cast<size_t>(i % count)]) {
      lo = std::min<int>(lo, w.levels[i]);
      hi = std::max<int>(hi, w.levels[i]);
    }
  if (lo > hi) lo = hi = 0;  // no weights at all
  h.low = lo;
  h.span = hi - lo;
  h.kind = PackedKind::kBytes;
  if (w.bits > 4 || w.table_rows != 1) return h;
  const auto spaced = [&](int by) {
    for (int c = 0; c < count; ++c)
      if (used[static_cast<size_t>(c)] && w.levels[c] != w.levels[0] + by * c) return false;
    h.low = w.levels[0];
    h.span = std::max(hi - h.low, 0);
    return true;
  };
  if (w.bits == 1) {
    for (int by = 1; by <= 2; ++by)
      if (spaced(by)) {
        h.kind = PackedKind::k1;
        h.times = by;
        break;
      }
    return h;
  }
  const bool affine = spaced(1);
  constexpr PackedKind kinds[3][2] = {{PackedKind::k2Table, PackedKind::k2},
                                      {PackedKind::k3Table, PackedKind::k3},
                                      {PackedKind::k4Table, PackedKind::k4}};
  h.kind = kinds[w.bits - 2][affine];
  if (!affine)
    for (int c = 0; c < 16; ++c)
      h.lut[c] = c < count && used[static_cast<size_t>(c)] ? static_cast<uint8_t>(w.levels[c] - lo) : 0;
  return h;
}

namespace {

// 64 bytes of one step into their places in a unit.
void put(const Packed& p, int which, int s, const uint8_t from[64], uint8_t* unit, int64_t stride) {
  const Place at = place(p.h.kind, which, s);
  for (int i = 0; i < at.pieces; ++i) {
    uint8_t* v = unit + stride * at.vector[i];
    const int mask = (1 << at.width[i]) - 1;
    for (int j = 0; j < 64; ++j) v[j] |= static_cast<uint8_t>((from[j] >> at.to[i] & mask) << at.shift[i]);
  }
}

void put_float(bool wide, float f, int64_t index, uint8_t* to) {
  uint16_t half = 0;
  if (wide) std::memcpy(to + 4 * index, &f, 4);
  else if (exact_half(f, &half)) std::memcpy(to + 2 * index, &half, 2);
}

}  // namespace

void pack(const Weights& w, const float* step, const PackedHeader& header, uint8_t* out) {
  Packed p(header);
  PackedHeader h = header;
  h.bytes = p.bytes();
  std::memset(out, 0, static_cast<size_t>(p.bytes()));
  std::memcpy(out, &h, sizeof h);
  p.panels = out + Packed::kHeader;
  const int64_t row = p.seg.padded * p.seg.length;
  std::vector<uint8_t> codes(static_cast<size_t>(w.k)), rows(static_cast<size_t>(Packed::kRows * row));
  for (int64_t b = 0; b < p.block_count; ++b) {
    std::fill(rows.begin(), rows.end(), uint8_t{0});
    const int64_t n0 = b * Packed::kRows, count = std::min(Packed::kRows, w.n - n0);
    for (int64_t r = 0; r < count; ++r) {
      unpack_row(w.row(n0 + r), w.bits, w.k, codes.data());
      if (h.kind == PackedKind::kBytes)
        for (uint8_t& c : codes) c = static_cast<uint8_t>(w.levels_row(n0 + r)[c] - h.low);
      for (int64_t s = 0; s < p.seg.count; ++s)
        std::memcpy(rows.data() + r * row + s * p.seg.length, codes.data() + p.seg.begin(s),
                    static_cast<size_t>(p.seg.size(s)));
    }
    const auto place_of = [&](const void* at) { return out + (static_cast<const uint8_t*>(at) - out); };  // ours: not const
    for (int64_t s = 0; s < p.seg.padded; ++s)
      for (int64_t j = 0; j < p.seg.length / 4; ++j) {
        uint8_t vector[64];
        for (int64_t r = 0; r < Packed::kRows; ++r)
          std::memcpy(vector + 4 * r, rows.data() + r * row + s * p.seg.length + 4 * j, 4);
        put(p, static_cast<int>(s & 1), static_cast<int>(j), vector, place_of(p.codes(b, s / 2)), p.stride(b));
      }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t from = (n0 + r) * w.groups + g;
        uint8_t* scales = place_of(p.scales(b, g));
        put_float(h.wide, w.scale[from], r, scales);
        if (w.zero) put_float(h.wide, w.zero[from], Packed::kRows + r, scales);
      }
      std::memcpy(place_of(p.step(b)) + 4 * r, step + (w.table_rows == 1 ? 0 : n0 + r), 4);
    }
  }
}

int packed_u(const Packed& p, int64_t n, int64_t segment, int64_t column) {
  const Place at = place(p.h.kind, static_cast<int>(segment & 1), static_cast<int>(column / 4));
  const uint8_t* unit = p.codes(n / Packed::kRows, segment / 2);
  const int64_t stride = p.stride(n / Packed::kRows), lane = n % Packed::kRows * 4 + column % 4;
  int code = 0;
  for (int i = 0; i < at.pieces; ++i)
    code |= (unit[stride * at.vector[i] + lane] >> at.shift[i] & ((1 << at.width[i]) - 1)) << at.to[i];
  return uses_lut(p.h.kind) ? p.h.lut[code] : code * p.h.times;
}

void packed_scale_zero(const Packed& p, int64_t n, int64_t group, float* scale, float* zero) {
  const uint8_t* from = p.scales(n / Packed::kRows, group);
  const auto value = [&](int64_t i) {
    float f;
    uint16_t half;
    if (p.h.wide) {
      std::memcpy(&f, from + 4 * i, 4);
      return f;
    }
    std::memcpy(&half, from + 2 * i, 2);
    return half_to_float(half);
  };
  *scale = value(n % Packed::kRows);
  *zero = p.h.has_zero ? value(Packed::kRows + n % Packed::kRows) : 0.0f;
}

}  // namespace lowbit
