// Few tokens: codes are expanded in registers, and what bounds the loop is the count of vector instructions.
#include "avx2_int8.h"

#if LOWBIT_X86
namespace lowbit::avx2_int8 {
namespace {

// MR tokens times blocks [b, b+NB) of one panel, codes expanded in registers.
template <PackedKind K, Form F, int L, int MR, int NB>
LOWBIT_FN void few(const Packed& p, const Inputs& in, int64_t b, const float* bias, float* y) {
  constexpr bool kUp = left_up(K, MR);
  constexpr int S = turn_steps(K), kVectors = turn_vectors(K);
  const int64_t stride = p.stride(b), side = b % Packed::kPanel, of_panel = p.scales_bytes(p.width(b));
  const Grid grid = grid_of(p.h, F);
  const V ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
  F8 part[NB][2][MR], acc[NB][2][MR];
  for (int i = 0; i < 2 * NB; ++i)
    for (int j = 0; j < MR; ++j) part[i / 2][i % 2][j] = acc[i / 2][i % 2][j] = _mm256_setzero_ps();
  const uint8_t* codes = p.panel(b);
  const int8_t* q = in.q;
  const int64_t ahead = p.vectors * stride / (2 * NB);  // bytes
  int64_t in_group = 0, g = 0;
  for (int64_t s = 0; s < p.seg.padded; s += 2, q += 2 * L) {
    const uint8_t* scales = codes + p.vectors * stride;
    const bool end_a = ++in_group == p.seg.per_group;
    if (end_a) in_group = 0;
    const bool end_b = ++in_group == p.seg.per_group && g + end_a < p.h.groups;  // the last B may be nobody's
    if (end_b) in_group = 0;
    const bool end[2] = {end_a, end_b};
    for (int i = 0; i < NB; ++i)
      for (int h = 0; h < 2; ++h) {
        const uint8_t *from = codes + (side + i) * 64 + 32 * h, *sc = scales + (side + i) * p.group_bytes();
        if (NB > 1) ask_for(codes + kAhead + (2 * i + h) * ahead, ahead);
        V dot[2][MR], up[2][MR];
        LOWBIT_UNROLL8 for (int t = 0; t < L / 4 / S; ++t, from += kVectors * stride) {
          V u[2][4];
          expand<K, F, kUp>(from, stride, grid, u[0], u[1]);
          for (int ab = 0; ab < 2; ++ab)
            for (int k = 0; k < S; ++k)
              for (int j = 0; j < MR; ++j) {
                const V v = dot4<F>(u[ab][k], four(q + j * in.ld + ab * L + (t * S + k) * 4), ones);
                V& to = kUp && k == 1 ? up[ab][j] : dot[ab][j];
                to = t == 0 && (k == 0 || (kUp && k == 1)) ? v : add<F>(to, v);
              }
        }
        int64_t group = g;
        for (int ab = 0; ab < 2; ++ab) {
          for (int j = 0; j < MR; ++j) {
            V sum = dot[ab][j];
            if (F == Form::kNarrow) sum = _mm256_madd_epi16(sum, kUp ? fours : ones);
            if (kUp) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(up[ab][j], ones));
            part[i][h][j] = end_segment<F>(part[i][h][j], sum, in.start + j * in.lds + s + ab,
                                           in.scale + j * in.lds + s + ab);
          }
          if (!end[ab]) continue;
          const Meta of_rows = meta(sc, p.h, h);
          for (int j = 0; j < MR; ++j) {
            acc[i][h][j] = end_group(acc[i][h][j], part[i][h][j], of_rows, in.group_sum, j * in.groups + group);
            part[i][h][j] = _mm256_setzero_ps();
          }
          sc += of_panel;
          ++group;
        }
      }
    g += end_a + end_b;
    codes = scales + (end_a + end_b) * of_panel;
  }
  for (int i = 0; i < NB; ++i)
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < MR; ++j) finish(p, acc[i][h][j], b + i, h, bias, y + j * p.h.n);
}

template <PackedKind K, Form F, int L>
constexpr Few few_for() {
  return {{nullptr, few<K, F, L, 1, 1>, few<K, F, L, 2, 1>, few<K, F, L, 3, 1>, few<K, F, L, 4, 1>},
          {nullptr, few<K, F, L, 1, 4>, few<K, F, L, 2, 4>, few<K, F, L, 3, 4>, few<K, F, L, 4, 4>}};
}
template <PackedKind K, Form F>
constexpr Few kFew[2] = {few_for<K, F, 32>(), few_for<K, F, 16>()};
template <PackedKind K>
const Few& any_form(Form form, int i) {
  return form == Form::kNarrow ? kFew<K, Form::kNarrow>[i]
         : form == Form::kWide ? kFew<K, Form::kWide>[i]
                               : kFew<K, Form::kSign>[i];
}

}  // namespace

const Few& few_of(const Packed& p) {
  const int i = p.seg.length == 16;
  switch (p.h.kind) {
    case PackedKind::k1: return kFew<PackedKind::k1, Form::kNarrow>[i];
    case PackedKind::k2: return kFew<PackedKind::k2, Form::kNarrow>[i];
    case PackedKind::k3: return kFew<PackedKind::k3, Form::kNarrow>[i];
    case PackedKind::k4: return kFew<PackedKind::k4, Form::kNarrow>[i];
    case PackedKind::k2Table: return any_form<PackedKind::k2Table>(form_of(p), i);
    case PackedKind::k3Table: return any_form<PackedKind::k3Table>(form_of(p), i);
    case PackedKind::k4Table: return any_form<PackedKind::k4Table>(form_of(p), i);
    case PackedKind::kBytes: break;
  }
  return any_form<PackedKind::kBytes>(form_of(p), i);
}

}  // namespace lowbit::avx2_int8
#endif
