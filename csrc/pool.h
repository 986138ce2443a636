// A small persistent thread pool: parallel_for(items, n_threads, run) calls run(i) once for each i.
#pragma once
#include <cstdint>
#include <functional>

namespace lowbit {

// The caller takes part. Runs inline for one thread or one item, and when another thread is using the pool.
// An exception from run() is thrown again here, after all items that had started are done.
void parallel_for(int64_t items, int n_threads, const std::function<void(int64_t)>& run);

}  // namespace lowbit
