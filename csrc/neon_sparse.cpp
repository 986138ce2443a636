// NEON row of sparse products.
//   kInt    equals scalar bit for bit: a lane adds two products of at most 255 * 127 a step, and kPieces steps stay
//           below 2^31
//   kFloat  |y - y_scalar| <= (64 + places/64) * 2^-24 * sum |x*value|   (64 terms at a time)
//   many    |y - y_scalar| <= (129 + K/128) * 2^-24 * sum |x*value|   (the terms of a tile at a time)
#include "neon.h"
#include "sparse.h"

#if LOWBIT_NEON
#include <algorithm>

namespace lowbit {
namespace {

constexpr int64_t kRows = Steps::kRows, kPieces = 1 << 14;

void few(const Steps& s, const float* const* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const float* values = static_cast<const float*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t p = p0; p < p1; ++p) {
      float32x4_t total[4];
      for (int q = 0; q < 4; ++q) total[q] = vdupq_n_f32(0);
      for (int64_t i = s.first[p]; i < s.first[p + 1];) {
        float32x4_t acc[4];
        for (int q = 0; q < 4; ++q) acc[q] = vdupq_n_f32(0);
        for (const int64_t end = std::min<int64_t>(i + kPartial, s.first[p + 1]); i < end; ++i) {
          const float* x = xs[t] + s.column[i];
          const uint8_t* at = s.offset + i * kRows;
          float found[kRows];
          for (int64_t r = 0; r < kRows; ++r) found[r] = x[at[r]];
          for (int q = 0; q < 4; ++q)
            acc[q] = vfmaq_f32(acc[q], vld1q_f32(found + 4 * q), vld1q_f32(values + i * kRows + 4 * q));
        }
        for (int q = 0; q < 4; ++q) total[q] = vaddq_f32(total[q], acc[q]);
      }
      float found[kRows];
      for (int q = 0; q < 4; ++q) vst1q_f32(found + 4 * q, total[q]);
      for (int64_t r = 0, n = p * kRows; r < kRows && n < s.h.n; ++r, ++n) y[n] += found[r];
    }
}

// A window of 128 bytes is two tables of 64: what lies outside the first is looked up in the second.
LOWBIT_NEON_INLINE uint8x16_t look_up(const uint8x16x4_t window[2], uint8x16_t at) {
  return vqtbx4q_u8(vqtbl4q_u8(window[0], at), window[1], vsubq_u8(at, vdupq_n_u8(64)));
}

LOWBIT_NEON_INLINE uint8x16x4_t table(const uint8_t* p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}

// Sixteen products: four rows, two sums each.
LOWBIT_NEON_INLINE void add(int32x4_t acc[2], uint8x16_t d, int8x16_t v) {
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(d)));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(d)));
  acc[0] = vpadalq_s16(acc[0], vmulq_s16(low, vmovl_s8(vget_low_s8(v))));
  acc[1] = vpadalq_s16(acc[1], vmulq_s16(high, vmovl_s8(vget_high_s8(v))));
}

void few_int(const Steps& s, const Digits* xs, int64_t tokens, int64_t p0, int64_t p1, float* y) {
  const int8_t* values = static_cast<const int8_t*>(s.value);
  for (int64_t t = 0; t < tokens; ++t, y += s.h.n)
    for (int64_t p = p0; p < p1; ++p) {
      const Digits& x = xs[t];
      int64_t total[kRows] = {};
      for (int64_t i = s.first[p]; i < s.first[p + 1];) {
        int32x4_t acc[2][4][2];  // of digit, four rows
        for (auto& digit : acc)
          for (auto& rows : digit) rows[0] = rows[1] = vdupq_n_s32(0);
        for (const int64_t end = std::min<int64_t>(i + kPieces, s.first[p + 1]); i < end; ++i)
          for (int j = 0; j < 2; ++j) {
            const uint8_t* d = x.d[j] + s.column[i];
            const uint8x16x4_t window[2] = {table(d), table(d + 64)};
            for (int q = 0; q < 4; ++q)
              add(acc[j][q], look_up(window, vld1q_u8(s.offset + i * 64 + 16 * q)), vld1q_s8(values + i * 64 + 16 * q));
          }
        for (int q = 0; q < 4; ++q) {
          int32_t found[2][4];
          for (int j = 0; j < 2; ++j) vst1q_s32(found[j], vpaddq_s32(acc[j][q][0], acc[j][q][1]));
          for (int r = 0; r < 4; ++r) total[4 * q + r] += int64_t{found[0][r]} * 128 + found[1][r];
        }
      }
      for (int64_t r = 0, n = p * kRows; r < kRows && n < s.h.n; ++r, ++n)
        y[n] += static_cast<float>(static_cast<double>(total[r] - s.sum[n] * (1 << 14)) *
                                   (static_cast<double>(x.scale) * s.factor[n]));
    }
}

constexpr int V = 4;  // vectors of four tokens: with four rows, sixteen sums

void many(const Steps& s, const float* xt, int64_t down, float* yt) {
  const bool integer = s.h.kind == SparseKind::kInt;
  const SparseGroup* group = s.group + down * s.tiles_across() * Steps::kGroups;
  int64_t at = 4 * static_cast<int64_t>(s.quad[down]);
  std::fill(yt, yt + Steps::kTileRows * kSparseTokens, 0.0f);
  float value[4 * Steps::kTileColumns];
  for (int64_t tile = 0; tile < s.tiles_across(); ++tile, xt += Steps::kTileColumns * kSparseTokens)
    for (int64_t g = 0; g < Steps::kGroups; ++g, ++group) {
      const int64_t slots = 4 * group->count;
      for (int64_t i = 0; i < slots; ++i)
        value[i] = integer ? static_cast<const int8_t*>(s.tile_value)[at + i]
                           : static_cast<const float*>(s.tile_value)[at + i];
      for (int64_t m = 0; m < kSparseTokens; m += 4 * V) {
        float32x4_t acc[4][V];
        for (auto& row : acc)
          for (auto& v : row) v = vdupq_n_f32(0);
        for (int64_t i = 0; i < slots; i += 4)
          for (int r = 0; r < 4; ++r) {
            const float* from = xt + s.tile_offset[at + i + r] * kSparseTokens + m;
            for (int v = 0; v < V; ++v) acc[r][v] = vfmaq_n_f32(acc[r][v], vld1q_f32(from + 4 * v), value[i + r]);
          }
        for (int r = 0; r < 4; ++r)
          for (int v = 0; v < V; ++v) {
            float* to = yt + group->row[r] * kSparseTokens + m + 4 * v;
            vst1q_f32(to, vaddq_f32(vld1q_f32(to), acc[r][v]));
          }
      }
      at += slots;
    }
  if (integer)
    for (int64_t r = 0; r < std::min(Steps::kTileRows, s.h.n - down * Steps::kTileRows); ++r)
      for (int64_t m = 0; m < kSparseTokens; ++m) yt[r * kSparseTokens + m] *= s.factor[down * Steps::kTileRows + r];
}

// Four by four, as trn1 and trn2 of pairs and then of halves.
void turn(const float* from, int64_t ld_from, float* to, int64_t ld_to, bool add) {
  for (int64_t i = 0; i < 16; i += 4)
    for (int64_t j = 0; j < 16; j += 4) {
      float32x4_t row[4];
      for (int r = 0; r < 4; ++r) row[r] = vld1q_f32(from + (i + r) * ld_from + j);
      const float32x4x2_t a = vtrnq_f32(row[0], row[1]), b = vtrnq_f32(row[2], row[3]);
      const float32x4_t out[4] = {vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])),
                                  vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])),
                                  vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])),
                                  vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]))};
      for (int r = 0; r < 4; ++r) {
        float* at = to + (j + r) * ld_to + i;
        vst1q_f32(at, add ? vaddq_f32(vld1q_f32(at), out[r]) : out[r]);
      }
    }
}

}  // namespace

const SparseRow sparse_neon = {few, few_int, many, turn, sparse_scalar.digits};

}  // namespace lowbit
#endif
