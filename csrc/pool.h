// A small persistent thread pool: parallel_for(items, n_threads, run) calls run(i) once for each i.
#pragma once
#include <cstdint>
#include <functional>

namespace lowbit {

// The caller takes part. Runs inline for one thread or one item, and when another thread is using the pool.
// An exception from run() is thrown again here, after all items that had started are done.
void parallel_for(int64_t items, int n_threads, const std::function<void(int64_t)>& run);

// While one of these lives, workers that run out of work watch for more instead of sleeping: a parallel_for then costs
// less than a microsecond to start. For stretches of many short products, such as one token of a language model.
class Hot {
 public:
  Hot();
  ~Hot();
  Hot(const Hot&) = delete;
  Hot& operator=(const Hot&) = delete;

 private:
  void* pool_;
};

}  // namespace lowbit
