// Convolution by the int8 product: frames, patches, tiles for the threads, and the steps after the sums.
#include "conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"
#if LOWBIT_X86
#include "avx512.h"
#endif

namespace lowbit {
namespace {

// Two taps of a depthwise convolution at once: int16 pairs of neighbouring taps times pairs of weights, added up in
// int32. Sums holds kDepth channels in the order that the unpacking leaves them; a missing second tap is null.
#if LOWBIT_X86
namespace scalar {
constexpr int64_t kDepth = 8;
struct Sums {
  int32_t of[kDepth];
};
Sums zero_sums() { return {}; }
void add_taps(Sums& acc, const int8_t* q0, const int8_t* q1, const int8_t* w0, const int8_t* w1) {
  for (int64_t c = 0; c < kDepth; ++c) acc.of[c] += q0[c] * w0[c] + (q1 ? q1[c] * w1[c] : 0);
}
void store_sums(const Sums& acc, const float* scale, float scale_x, float* out) {
  for (int64_t c = 0; c < kDepth; ++c) out[c] = static_cast<float>(acc.of[c]) * (scale_x * scale[c]);
}
}  // namespace scalar

namespace avx2 {
constexpr int64_t kDepth = 16;
struct Sums {
  __m256i low, high;  // channels 0-3 and 8-11; 4-7 and 12-15
};
LOWBIT_AVX2_INLINE Sums zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LOWBIT_AVX2_INLINE __m256i wide(const int8_t* p) {
  return p ? _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) : _mm256_setzero_si256();
}
LOWBIT_AVX2_INLINE void add_taps(Sums& acc, const int8_t* q0, const int8_t* q1, const int8_t* w0, const int8_t* w1) {
  const __m256i a = wide(q0), b = wide(q1), v = wide(w0), w = wide(w1);
  acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), _mm256_unpacklo_epi16(v, w)));
  acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), _mm256_unpackhi_epi16(v, w)));
}
LOWBIT_AVX2_INLINE void store_sums(const Sums& acc, const float* scale, float scale_x, float* out) {
  const __m256i part[2] = {_mm256_permute2x128_si256(acc.low, acc.high, 0x20),
                           _mm256_permute2x128_si256(acc.low, acc.high, 0x31)};
  for (int i = 0; i < 2; ++i) {
    const __m256 by = _mm256_mul_ps(_mm256_set1_ps(scale_x), _mm256_loadu_ps(scale + 8 * i));
    _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(_mm256_cvtepi32_ps(part[i]), by));
  }
}
}  // namespace avx2

namespace avx512 {
#define LOWBIT_FN LOWBIT_AVX512_INLINE_WITH("avx512vnni")
constexpr int64_t kDepth = 32;
struct Sums {
  __m512i low, high;  // of each eight channels the first four; the last four
};
LOWBIT_FN Sums zero_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
LOWBIT_FN __m512i wide(const int8_t* p) {
  return p ? _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) : _mm512_setzero_si512();
}
LOWBIT_FN void add_taps(Sums& acc, const int8_t* q0, const int8_t* q1, const int8_t* w0, const int8_t* w1) {
  const __m512i a = wide(q0), b = wide(q1), v = wide(w0), w = wide(w1);
  acc.low = _mm512_dpwssd_epi32(acc.low, _mm512_unpacklo_epi16(a, b), _mm512_unpacklo_epi16(v, w));
  acc.high = _mm512_dpwssd_epi32(acc.high, _mm512_unpackhi_epi16(a, b), _mm512_unpackhi_epi16(v, w));
}
LOWBIT_FN void store_sums(const Sums& acc, const float* scale, float scale_x, float* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512i part[2] = {_mm512_permutex2var_epi32(acc.low, first, acc.high),
                           _mm512_permutex2var_epi32(acc.low, second, acc.high)};
  for (int i = 0; i < 2; ++i) {
    const __m512 by = _mm512_mul_ps(_mm512_set1_ps(scale_x), _mm512_loadu_ps(scale + 16 * i));
    _mm512_storeu_ps(out + 16 * i, _mm512_mul_ps(_mm512_cvtepi32_ps(part[i]), by));
  }
}
#undef LOWBIT_FN
}  // namespace avx512
#endif

namespace scalar {
#define LOWBIT_FN
#include "conv_rows.inc"
#undef LOWBIT_FN
}  // namespace scalar
#if LOWBIT_X86
namespace avx2 {
#define LOWBIT_FN LOWBIT_AVX2
#include "conv_rows.inc"
#undef LOWBIT_FN
}  // namespace avx2
namespace avx512 {
#define LOWBIT_FN LOWBIT_AVX512_WITH("avx512vnni")
#include "conv_rows.inc"
#undef LOWBIT_FN
}  // namespace avx512
#endif

const Row<const ConvRow*> kConvRows[] = {
#if LOWBIT_X86
    {"avx512", kAvx2 | kAvx512 | kVnni, &avx512::kRow},
    {"avx2", kAvx2, &avx2::kRow},
#endif
    {"scalar", 0, &scalar::kRow}};

constexpr int64_t kPatchBytes = 1 << 17;  // of a tile: beside the expanded weights they stay in the second cache
constexpr int64_t kMostPixels = 240, kFewestPixels = 12;
constexpr int64_t kInlineMacs = 1 << 18;  // below this, waking a thread costs more than it saves
constexpr float kTiny = 1e-30f;           // as in quantize

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T* room(std::vector<T>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  return v.data();
}

// All images with what lies around them, as far as taps reach: [batch, h, w, c] int8, and the scale of each image.
struct Frame {
  int64_t h, w, row;  // row: bytes
  int8_t* q;
  float* scale;

  Frame(const IntConv& c, std::vector<int8_t>& bytes, std::vector<float>& scales)
      : h((c.oh - 1) * c.sh + (c.kh - 1) * c.dh + 1),
        w((c.ow - 1) * c.sw + (c.kw - 1) * c.dw + 1),
        row(w * c.c),
        q(room(bytes, c.batch * h * row)),
        scale(room(scales, c.batch)) {}
};

constexpr int64_t kSquare = 16;

// to[i * step + j] = from[j * ld + i] for i < count <= 16 and j < 16; 16 bytes of each line are read.
void turn(const int8_t* from, int64_t ld, int64_t count, int8_t* to, int64_t step) {
#if LOWBIT_X86
  __m128i v[2][16];
  for (int j = 0; j < 16; ++j) v[0][j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j * ld));
  for (int round = 0; round < 4; ++round)  // lines j and j + 8 interleaved, four times: rows become columns
    for (int j = 0; j < 8; ++j) {
      const __m128i a = v[round & 1][j], b = v[round & 1][j + 8];
      v[~round & 1][2 * j] = _mm_unpacklo_epi8(a, b);
      v[~round & 1][2 * j + 1] = _mm_unpackhi_epi8(a, b);
    }
  for (int64_t i = 0; i < count; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * step), v[0][i]);
#else
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < kSquare; ++j) to[i * step + j] = from[j * ld + i];
#endif
}

// One row of an image, floats of any strides, to q [count, c].
void quantize_row(const ConvRow& r, const IntImage& in, const float* x, int64_t count, int64_t c, float scale,
                  const IntQuantizer& to, int8_t* q) {
  if (in.channel_stride == 1 && in.pixel_stride == c) return r.quantize(x, count * c, scale, to.low, to.high, q);
  if (in.channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i) r.quantize(x + i * in.pixel_stride, c, scale, to.low, to.high, q + i * c);
    return;
  }
  thread_local std::vector<int8_t> lines;
  thread_local std::vector<float> dense;
  const int64_t ld = ceil_div(count, kSquare) * kSquare;
  int8_t* tmp = room(lines, c * ld);
  for (int64_t j = 0; j < c; ++j) {
    const float* from = x + j * in.channel_stride;
    if (in.pixel_stride != 1) {
      float* copy = room(dense, count);
      for (int64_t i = 0; i < count; ++i) copy[i] = from[i * in.pixel_stride];
      from = copy;
    }
    r.quantize(from, count, scale, to.low, to.high, tmp + j * ld);
  }
  for (int64_t j = 0; j < c && c >= kSquare; j += kSquare) {
    const int64_t j0 = std::min(j, c - kSquare);  // the last square overlaps the one before
    for (int64_t i = 0; i < count; i += kSquare)
      turn(tmp + j0 * ld + i, ld, std::min(kSquare, count - i), q + i * c + j0, c);
  }
  for (int64_t i = 0; i < count && c < kSquare; ++i)
    for (int64_t j = 0; j < c; ++j) q[i * c + j] = tmp[j * ld + i];
}

uint32_t most_of(const ConvRow& r, const IntConv& c, const IntImage& in, const float* x) {
  const int64_t pixels = c.h * c.w;
  if (in.channel_stride == 1 && in.pixel_stride == c.c) return r.most(x, pixels * c.c);
  uint32_t found = 0;
  if (in.pixel_stride == 1) {
    for (int64_t j = 0; j < c.c; ++j) found = std::max(found, r.most(x + j * in.channel_stride, pixels));
    return found;
  }
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t j = 0; j < c.c; ++j) found = std::max(found, r.most(x + i * in.pixel_stride + j * in.channel_stride, 1));
  return found;
}

// scalar: as linear_int8's activations: an image with NaN or infinity has scale NaN, one of zeros scale 0
float scale_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return bits >= 0x7f800000 ? std::nanf("") : a < kTiny ? 0.0f : a / 127.0f;
}

void fill_frame(const IntConv& c, const IntImage& in, const ConvRow& r, const Frame& f, int n_threads) {
  for (int64_t b = 0; b < c.batch; ++b)
    f.scale[b] = c.input.scale > 0 ? c.input.scale : scale_of(most_of(r, c, in, in.x + b * in.batch_stride));
  const int64_t x0 = std::max<int64_t>(0, -c.left), from = std::min(f.w, std::max<int64_t>(c.left, 0));
  const int64_t count = std::max<int64_t>(0, std::min(c.w - x0, f.w - from));
  parallel_for(c.batch * f.h, c.batch * c.h * c.w * c.c < kInlineMacs ? 1 : n_threads, [&](int64_t i) {
    const int64_t b = i / f.h, y = i % f.h - c.top;
    int8_t* row = f.q + i * f.row;
    const float scale = f.scale[b];
    if (y < 0 || y >= c.h || count == 0 || !(scale > 0)) {  // NaN too: its scale says all
      std::memset(row, 0, static_cast<size_t>(f.row));
      return;
    }
    int8_t* to = row + from * c.c;
    std::memset(row, 0, static_cast<size_t>(from * c.c));
    std::memset(to + count * c.c, 0, static_cast<size_t>((f.w - from - count) * c.c));
    if (in.q)
      std::memcpy(to, in.q + ((b * c.h + y) * c.w + x0) * c.c, static_cast<size_t>(count * c.c));
    else
      quantize_row(r, in, in.x + b * in.batch_stride + (y * c.w + x0) * in.pixel_stride, count, c.c, scale, c.input, to);
  });
}

// memcpy of few bytes, in line; the last piece may overlap the one before.
inline void copy(int8_t* to, const int8_t* from, int64_t n) {
  if (n >= 16) {
    for (int64_t i = 0; i + 16 <= n; i += 16) std::memcpy(to + i, from + i, 16);
    std::memcpy(to + n - 16, from + n - 16, 16);
  } else if (n >= 8) {
    std::memcpy(to, from, 8);
    std::memcpy(to + n - 8, from + n - 8, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// The patches of positions [p0, p0 + m) of one image and group as tokens of a packed matrix.
Tokens gather(const IntConv& c, const Frame& f, const ConvRow& r, const Segments& seg, const int8_t* image, float scale,
              int64_t group, int64_t p0, int64_t m, TokenBuffer& buffer) {
  const int64_t width = seg.row_size(), per = c.c / c.groups, used = c.kh * c.kw * per;
  int8_t* q = room(buffer.q, m * width);
  float* scales = room(buffer.scale, m * seg.padded);
  int32_t* sum = room(buffer.sum, m * seg.padded);
  const bool runs = c.groups == 1 && c.dw == 1;  // the taps of one line of the kernel lie together
  const int64_t pieces = runs ? 1 : c.kw, bytes = runs ? c.kw * per : per;
  int64_t oy = p0 / c.ow, ox = p0 % c.ow;
  for (int64_t i = 0; i < m; ++i) {
    int8_t* to = q + i * width;
    for (int64_t ky = 0; ky < c.kh; ++ky)
      for (int64_t kx = 0; kx < pieces; ++kx, to += bytes)
        copy(to, image + (oy * c.sh + ky * c.dh) * f.row + (ox * c.sw + kx * c.dw) * c.c + group * per, bytes);
    std::memset(to, 0, static_cast<size_t>(width - used));
    if (++ox == c.ow) ox = 0, ++oy;
  }
  r.sums(q, seg.length, m * seg.padded, sum);
  std::fill(scales, scales + m * seg.padded, scale);
  return {q, scales, sum, m};
}

// scalar: v += residual; relu; y and q. `v` is [m, width], of outputs n0 .. n0 + width at position p.
void finish(const IntConv& c, const IntEpilogue& e, const ConvRow& r, float* v, int64_t p, int64_t m, int64_t n0,
            int64_t width) {
  if (width == c.n) width *= m, m = 1;  // positions lie one after the other
  for (int64_t i = 0; i < m; ++i, v += width) {
    const int64_t at = (p + i) * c.n + n0;
    if (e.residual)
      for (int64_t j = 0; j < width; ++j) v[j] += e.residual[at + j];
    if (e.relu)
      for (int64_t j = 0; j < width; ++j) v[j] = v[j] > 0 ? v[j] : 0;
    if (e.y && e.y + at != v) std::memcpy(e.y + at, v, static_cast<size_t>(width) * sizeof(float));
    if (e.q) r.quantize(v, width, e.next.scale, e.next.low, e.next.high, e.q + at);
  }
}

void depthwise_part(const IntConv& c, const Frame& f, const ConvRow& r, const IntEpilogue& e, int64_t b, int64_t oy) {
  thread_local std::vector<float> line;
  thread_local std::vector<int64_t> at;
  float* v = room(line, c.n);
  int64_t* place = room(at, c.kh * c.kw);
  for (int64_t t = 0; t < c.kh * c.kw; ++t) place[t] = (oy * c.sh + t / c.kw * c.dh) * f.row + t % c.kw * c.dw * c.c;
  for (int64_t ox = 0; ox < c.ow; ++ox) {
    r.depthwise(f.q + b * f.h * f.row + ox * c.sw * c.c, place, c.kh * c.kw, c.c, c.taps, c.scale, f.scale[b], v);
    if (c.bias)
      for (int64_t j = 0; j < c.n; ++j) v[j] += c.bias[j];
    finish(c, e, r, v, (b * c.oh + oy) * c.ow + ox, 1, 0, c.n);
  }
}

}  // namespace

void int_conv(const IntConv& c, const IntImage& in, const IntEpilogue& e, int n_threads, const std::string& isa) {
  const ConvRow& r = *pick(kConvInt8, isa).fn;
  static thread_local std::vector<int8_t> bytes;
  static thread_local std::vector<float> scales;
  const Frame f(c, bytes, scales);
  fill_frame(c, in, r, f, n_threads);
  const int64_t pixels = c.oh * c.ow, width = c.n / c.groups;
  const int64_t macs = c.batch * pixels * c.n * (c.c / c.groups) * c.kh * c.kw;
  const int threads = macs < kInlineMacs ? 1 : n_threads;
  if (c.taps) {
    parallel_for(c.batch * c.oh, threads, [&](int64_t i) { depthwise_part(c, f, r, e, i / c.oh, i % c.oh); });
    return;
  }
  const int64_t row = c.weights[0].seg.row_size();
  int64_t tile = std::max(kFewestPixels, std::min(kMostPixels, kPatchBytes / row / 6 * 6));
  if (threads > 1) tile = std::min(tile, std::max(kFewestPixels, ceil_div(c.batch * pixels * c.groups, 2 * threads)));
  const int64_t tiles = ceil_div(pixels, tile);
  parallel_for(c.batch * tiles * c.groups, threads, [&](int64_t i) {
    thread_local TokenBuffer tokens;
    thread_local std::vector<float> out;
    const int64_t g = i % c.groups, b = i / c.groups / tiles, p0 = i / c.groups % tiles * tile;
    const int64_t m = std::min(tile, pixels - p0), p = b * pixels + p0;
    const Packed& w = c.weights[g];
    const Tokens t = gather(c, f, r, w.seg, f.q + b * f.h * f.row, f.scale[b], g, p0, m, tokens);
    float* v = e.y && c.groups == 1 ? e.y + p * c.n : room(out, m * width);
    linear_int8({{w, c.bias ? c.bias + g * width : nullptr, v}}, t, 1, isa);
    finish(c, e, r, v, p, m, g * width, width);
  });
}

const Table<const ConvRow*> kConvInt8 = {"conv_int8", kConvRows, sizeof kConvRows / sizeof kConvRows[0]};

}  // namespace lowbit
