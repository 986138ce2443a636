// A packed matrix arranged for int8 activations: the kernel layout, built once from the canonical bit stream.
//
//   w_hat[n,k] = (level[n,k] - zero[n,g]) * scale[n,g] * step[n],   level = low + u,   u = what the codes say, 0..255
//
// Integer dot products want four neighbouring columns of one row in a 32-bit lane, and neighbouring rows in
// neighbouring lanes: then one broadcast of four activations serves every row, sums need no shuffle, and a scale per
// segment of 32 columns costs two instructions for each eight that multiply. So the buffer is
//
//   header (256 bytes) | panel | panel | ...      a panel is 4 blocks side by side (the last one 1 to 4)
//   block = 16 rows; missing rows have scale 0
//   panel = for each unit:  vector 0 of all its blocks, vector 1 of all its blocks, ..; then, for each group that ends in
//                           this unit, block after block, scale [16] (and zero [16]) in float16 or float32, up to a
//                           multiple of 64 bytes
//           then step [16] float32, block after block
//   unit  = two segments, A and B, of `length` (32 or 16) columns each, in length/4 steps of four columns
//
// So a product with the four blocks of a panel reads it from its first byte to its last: one stream, which the processor
// fetches ahead as fast as memory is (35 GB/s on Zen 4; four streams, one a block, reached 21).
//
// One step of one segment is 16 x 4 codes, the byte of row r and column c being byte 4*r + c of a 64-byte vector. Codes
// of less than 8 bits share vectors, at places that one mask extracts:
//
//   bits  vectors  bits of each byte
//   8     length/2      2j: A step j, 2j+1: B step j         u itself
//   4     length/4     j:  3-0 A step j                     7-4 B step j
//   2     length/8     j:  1-0 A step 2j, 3-2 A step 2j+1,  5-4 B step 2j, 7-6 B step 2j+1
//   1     length/16    j:  i   A step 4j+i                  4+i B step 4j+i       (i = 0..3)
//   3     3*length/16  3j+i: 2-0 A step 4j+i, 5-3 B step 4j+i (i = 0..2), and in 7-6 of the three vectors together,
//                      low bits first, the six bits of A step 4j+3 (2-0) and B step 4j+3 (5-3)
//
// Columns past a segment's end, and the B of an odd last segment, hold code 0 and meet activations 0.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace lowbit {

// How codes become u. kCodes: u = code (for one bit: code * d, d = 1 or 2). kTable: u = lut[code]. kBytes: 8 bits.
enum class PackedKind : int32_t { k1, k2, k3, k4, k2Table, k3Table, k4Table, kBytes };

struct PackedHeader {
  uint64_t magic;         // layout and version
  int64_t bytes;          // of the whole buffer
  int64_t n, k, groups;
  PackedKind kind;
  int32_t low, span;      // level = low + u, 0 <= u <= span <= 255
  int32_t times;          // k1: u = code * times
  int32_t wide;           // scales and zeros in float32, else float16
  int32_t has_zero;
  uint8_t lut[16];        // of the table kinds
};

struct Packed {  // a view; the buffer is borrowed
  static constexpr int64_t kRows = 16, kPanel = 4, kHeader = 256;
  static constexpr uint64_t kMagic = 0x32306b626c776f6c;

  PackedHeader h;
  Segments seg;
  const uint8_t* panels;
  int64_t block_count, units, vectors;  // vectors: of 64 bytes, in a unit

  // Throws std::invalid_argument for a buffer that is no kernel layout or does not have the size it states.
  Packed(const uint8_t* buffer, int64_t bytes);
  explicit Packed(const PackedHeader&);  // the sizes only

  int64_t bytes() const {
    return kHeader + block_count / kPanel * panel_bytes(kPanel) + panel_bytes(block_count % kPanel);
  }
  int64_t unit_bytes() const { return vectors * 64; }
  int64_t group_bytes() const { return kRows * (h.wide ? 4 : 2) * (h.has_zero ? 2 : 1); }  // scales, then zeros
  int64_t scales_bytes(int64_t width) const { return (width * group_bytes() + 63) / 64 * 64; }  // of a panel's group
  int64_t panel_bytes(int64_t width) const {
    return width * (units * unit_bytes() + kRows * 4) + h.groups * scales_bytes(width);
  }

  // Of a block: how many blocks its panel has, where it starts, and where in it lies what belongs to the block. The
  // vectors of a unit are stride() apart.
  int64_t width(int64_t block) const { return std::min(kPanel, block_count - block / kPanel * kPanel); }
  int64_t stride(int64_t block) const { return 64 * width(block); }
  const uint8_t* panel(int64_t block) const { return panels + block / kPanel * panel_bytes(kPanel); }
  const uint8_t* codes(int64_t block, int64_t unit) const {
    const int64_t side = width(block), groups_before = 2 * unit / seg.per_group;
    return panel(block) + side * unit * unit_bytes() + groups_before * scales_bytes(side) +
           block % kPanel * 64;
  }
  const uint8_t* scales(int64_t block, int64_t group) const {
    const int64_t side = width(block), units_before = ((group + 1) * seg.per_group + 1) / 2;
    return panel(block) + side * units_before * unit_bytes() + group * scales_bytes(side) +
           block % kPanel * group_bytes();
  }
  const float* step(int64_t block) const {
    const int64_t side = width(block);
    return reinterpret_cast<const float*>(panel(block) + panel_bytes(side)) + (block % kPanel - side) * kRows;
  }
};

// Levels may differ per row (table_rows = n), then they are kept as bytes. step: [table_rows].
PackedHeader plan_packed(const Weights& w);
void pack(const Weights& w, const float* step, const PackedHeader&, uint8_t* out);

// u of one weight, from the layout.
int packed_u(const Packed&, int64_t n, int64_t segment, int64_t column);
void packed_scale_zero(const Packed&, int64_t n, int64_t group, float* scale, float* zero);

// Activations quantized per token and segment: x ~ q * scale, |q| <= 127 (never -128: see the AVX2 kernel). Segments
// are padded to whole units: the last B may be nobody's, with q, scale and sum 0.
struct Tokens {
  const int8_t* q;       // [m, segments.padded * segments.length]
  const float* scale;    // [m, segments.padded]
  const int32_t* sum;    // [m, segments.padded], sum of q
  int64_t m;
};

// Tokens as one matrix wants them. A kernel may leave u where it lies in its byte, `times` too large: its accumulators
// start at times * low * sum, and the scale is divided by `times`, both exactly. Others use `t` and `low`.
struct Operand {
  Tokens t;
  const float* scale;      // [m, padded]: t.scale / times
  const int32_t* start;    // [m, padded]: times * low * sum
  const float* group_sum;  // [m, groups]: sum over a group's segments of sum * scale, or null without zeros
  bool unpacked;           // for kernels that expand u to bytes first: times = 1 everywhere
};

// Rows [16*b0, 16*b1) of y [m, n] for tokens [m0, m1). bias [n] or null.
using LinearInt8Fn = void (*)(const Packed&, const Operand&, int64_t m0, int64_t m1, int64_t b0, int64_t b1,
                              const float* bias, float* y);
extern const Table<LinearInt8Fn> kLinearInt8;

// `times` of the segments A and B of a unit.
struct Times {
  int32_t a, b;
};
Times packed_times(const PackedHeader&);

}  // namespace lowbit
