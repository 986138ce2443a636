// Items are claimed from one 64-bit ticket: the job's number above, the next item below. A worker that comes late fails
// to claim and leaves; so the caller never waits for threads that did not start, only for items.
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
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kItemBits = 32;
constexpr int64_t kClosed = (int64_t{1} << kItemBits) - 1;  // an item's number past every job's last
constexpr int kSpinsPerYield = 8192;  // about 100 microseconds: longer than a product takes; then others may have the core

long process_id() {
#if defined(_WIN32)
  return 0;  // no fork there
#else
  return static_cast<long>(getpid());
#endif
}

// One turn of a waiting loop.
void relax(int& turns) {
  if (++turns % kSpinsPerYield == 0) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  const long owner = process_id();
  std::atomic<int> hot{0};

  bool try_run(int64_t items, int n_threads, const std::function<void(int64_t)>& run) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(n_threads - 1);
    // Closed first: who reads what is written below can no longer claim with the ticket of the job before.
    const uint64_t before = ticket_.load(std::memory_order_relaxed);
    ticket_.exchange(before | static_cast<uint64_t>(kClosed));
    run_.store(&run, std::memory_order_release);
    items_.store(items, std::memory_order_release);
    helpers_.store(n_threads - 1, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    const uint32_t job = static_cast<uint32_t>(before >> kItemBits) + 1;
    ticket_.store(static_cast<uint64_t>(job) << kItemBits);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker between its last look and its sleep
      wake_.notify_all();
    }
    work(job);
    for (int turns = 0; done_.load(std::memory_order_acquire) < items;) relax(turns);
    if (!error_) return true;
    std::exception_ptr error = error_;
    error_ = nullptr;
    std::rethrow_exception(error);
  }

 private:
  // Threads are detached and the pool is never destroyed: a sleeping worker must not hold up the end of the process.
  void grow(int count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this, id = workers_] { loop(id); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
    }
  }

  void loop(int id) {
    uint32_t seen = 0;
    for (int turns = 0, idle = 0;;) {
      const uint32_t job = job_of(ticket_.load(std::memory_order_acquire));
      if (job != seen) {
        seen = job;
        idle = 0;
        if (id < helpers_.load(std::memory_order_acquire)) work(job);
      } else if (hot.load(std::memory_order_relaxed) > 0 || idle++ < kSpinsPerYield) {  // waking costs 50 microseconds
        relax(turns);
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return job_of(ticket_.load()) != seen; });
        --sleeping_;
      }
    }
  }

  static uint32_t job_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> kItemBits); }

  // Claim and run items of `job` until none is left. What was read before a claim that succeeds belongs to its job.
  void work(uint32_t job) {
    int64_t ran = 0;
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const std::function<void(int64_t)>* run = run_.load(std::memory_order_acquire);
      const int64_t items = items_.load(std::memory_order_acquire), at = static_cast<int64_t>(ticket & kClosed);
      const int64_t threads = helpers_.load(std::memory_order_acquire) + 1;
      if (job_of(ticket) != job || at >= items) break;
      const int64_t share = std::max<int64_t>(1, (items - at) / (4 * threads));
      if (!ticket_.compare_exchange_weak(ticket, ticket + static_cast<uint64_t>(share), std::memory_order_acq_rel,
                                         std::memory_order_acquire))
        continue;
      for (int64_t i = at; i < at + share; ++i) run_one(*run, i);
      ran += share;
      ticket = ticket_.load(std::memory_order_acquire);
    }
    if (ran > 0) done_.fetch_add(ran, std::memory_order_acq_rel);
  }

  void run_one(const std::function<void(int64_t)>& run, int64_t i) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      run(i);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<const std::function<void(int64_t)>*> run_{nullptr};
  std::atomic<int64_t> items_{0}, done_{0};
  std::atomic<int> helpers_{0}, sleeping_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  int workers_ = 0;
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

}  // namespace

void parallel_for(int64_t items, int n_threads, const std::function<void(int64_t)>& run) {
  n_threads = static_cast<int>(std::min<int64_t>({items, n_threads, kMaxThreads}));
  if (n_threads > 1 && items < kClosed && pool().try_run(items, n_threads, run)) return;
  for (int64_t i = 0; i < items; ++i) run(i);
}

Hot::Hot() : pool_(&pool()) { ++static_cast<Pool*>(pool_)->hot; }
Hot::~Hot() { --static_cast<Pool*>(pool_)->hot; }

}  // namespace lowbit
