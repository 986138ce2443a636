// The operations: cut the work in tiles, pick the row, hand tiles to the threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t kTileN = 24;        // rows of w per tile
constexpr int64_t kTileM = 256;       // tokens per tile: bounds the work of one tile
constexpr int64_t kChunkM = 1024;     // tokens quantized at a time: bounds the buffer
constexpr int64_t kInlineMacs = 1 << 16;  // below this, waking a thread costs more than it saves

int threads_for(int64_t macs, int n_threads) { return macs < kInlineMacs ? 1 : n_threads; }

// Tiles of [m0,m1) x [0,n), in parallel. With enough rows for every thread, all tokens of a tile come together.
template <class Tile>
void for_tiles(int64_t m0, int64_t m1, int64_t n, int n_threads, const Tile& tile) {
  const int64_t tiles_n = (n + kTileN - 1) / kTileN, tiles_m = (m1 - m0 + kTileM - 1) / kTileM;
  parallel_for(tiles_n * tiles_m, n_threads, [&](int64_t i) {
    const int64_t n0 = i / tiles_m * kTileN, t0 = m0 + i % tiles_m * kTileM;
    tile(t0, std::min(t0 + kTileM, m1), n0, std::min(n0 + kTileN, n));
  });
}

}  // namespace

void decode_rows(const Weights& w, const int64_t* rows, int64_t count, float* out, int n_threads,
                 const std::string& force) {
  const DecodeFn fn = pick(kDecode, force).fn;
  const int64_t batch = std::max<int64_t>(1, kInlineMacs / 4 / w.k);  // short rows share a turn
  parallel_for((count + batch - 1) / batch, n_threads, [&](int64_t i) {
    for (int64_t j = i * batch; j < std::min(count, (i + 1) * batch); ++j)
      fn(w, rows ? rows[j] : j, 0, w.k, out + j * w.k);
  });
}

void linear_float(const Weights& w, const float* x, int64_t m, float* y, int n_threads, const std::string& force) {
  static thread_local std::vector<float> arranged;
  const LinearFloat& row = *pick(kLinearFloat, force).fn;
  const int64_t chunk = std::min(m, kChunkM), columns = row.columns ? row.columns(w) : 0;
  if (static_cast<int64_t>(arranged.size()) < chunk * columns) arranged.resize(static_cast<size_t>(chunk * columns));
  float* const xa = arranged.data();
  for (int64_t c = 0; c < m; c += chunk) {
    const int64_t tokens = std::min(m - c, chunk);
    const float* xc = x + c * w.k;
    float* yc = y + c * w.n;
    if (columns)
      parallel_for(tokens, threads_for(tokens * w.k * 4, n_threads),
                   [&](int64_t i) { row.arrange(w, xc + i * w.k, xa + i * columns); });
    for_tiles(0, tokens, w.n, threads_for(tokens * w.n * w.k, n_threads),
              [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                row.tile(w, columns ? xa : xc, m0, m1, n0, n1, yc);
              });
  }
}

}  // namespace lowbit
