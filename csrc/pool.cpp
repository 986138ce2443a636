#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace lowbit {
namespace {

long process_id() {
#if defined(_WIN32)
  return 0;  // no fork there
#else
  return static_cast<long>(getpid());
#endif
}

class Pool {
 public:
  const long owner = process_id();

  bool try_run(int64_t items, int n_threads, const std::function<void(int64_t)>& run) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(n_threads - 1);
      run_ = &run;
      items_ = items;
      next_.store(0);
      error_ = nullptr;
      wanted_ = std::min<int>(n_threads - 1, static_cast<int>(workers_));
      ++job_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // workers that have not woken yet need not
    done_.wait(lock, [this] { return running_ == 0; });
    run_ = nullptr;
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  // Threads are detached and the pool is never destroyed: a sleeping worker must not hold up the end of the process.
  void grow(int count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this] { loop(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
    }
  }

  void loop() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen && wanted_ > 0; });
      seen = job_;
      --wanted_;
      ++running_;
      lock.unlock();
      work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void work() {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < items_;) (*run_)(i);
    } catch (...) {
      next_.store(items_);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* run_ = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  uint64_t job_ = 0;
  int workers_ = 0, wanted_ = 0, running_ = 0;
};

// After fork() the workers exist only in the parent: the child starts a pool of its own.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* p = current.load();
  if (p == nullptr || p->owner != process_id()) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;  // another thread was first; ours has no workers yet
  }
  return *p;
}

constexpr int kMaxThreads = 256;

}  // namespace

void parallel_for(int64_t items, int n_threads, const std::function<void(int64_t)>& run) {
  n_threads = static_cast<int>(std::min<int64_t>({items, n_threads, kMaxThreads}));
  if (n_threads > 1 && pool().try_run(items, n_threads, run)) return;
  for (int64_t i = 0; i < items; ++i) run(i);
}

}  // namespace lowbit
