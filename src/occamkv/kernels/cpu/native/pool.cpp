#include "pool.h"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace occam {
namespace {

// Other libraries leave threads in flush-to-zero mode, which would change stored bytes; a new thread inherits its
// creator's mode.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

// One call of parallel(). It lies on the caller's stack: no worker may hold it when the caller leaves.
struct Task {
  Task(int64_t items, void (*work)(void *, int64_t), void *context) : items(items), work(work), context(context) {}

  void run() {
    DefaultFloats floats;
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, item);
  }

  const int64_t items;
  void (*const work)(void *, int64_t);
  void *const context;
  std::atomic<int64_t> next{0};
};

class Pool {
 public:
  bool claim() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }

  // Only for the caller whose claim() was granted.
  void run(Task &task, int helpers) {
    hire(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      open_places_ = helpers;
    }
    if (helpers >= workers_) {
      wake_.notify_all();
    } else {
      for (int i = 0; i < helpers; ++i) wake_.notify_one();
    }
    task.run();
    std::unique_lock<std::mutex> lock(mutex_);
    open_places_ = 0;  // a worker that wakes up from now on finds nothing, and nobody waits for it
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  // Threads are detached and never end: a join at exit could wait for a thread that the exit has already stopped.
  void hire(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception &) {
      // No more threads to be had: those that there are do the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_places_ > 0; });
      --open_places_;
      ++working_;
      Task &task = *task_;
      lock.unlock();
      task.run();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;  // guards the three that follow
  Task *task_ = nullptr;
  int open_places_ = 0, working_ = 0;
  std::condition_variable wake_, done_;
  int workers_ = 0;  // belongs to the caller that has the claim
};

// Never freed: workers may still look at it while the process ends.
std::atomic<Pool *> current{nullptr};

// A fork copies the pool as it is, in use or locked by threads that the child does not have. The child forgets it.
#if !defined(_WIN32)
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
#endif

Pool *pool() {
  Pool *found = current.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  Pool *made = new (std::nothrow) Pool;
  if (made == nullptr || current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
  delete made;  // another thread was faster
  return found;
}

}  // namespace

void parallel(int64_t items, int threads, void (*work)(void *context, int64_t item), void *context) {
  Task task(items, work, context);
  const int helpers = static_cast<int>(threads < items ? threads : items) - 1;
  Pool *shared = helpers > 0 ? pool() : nullptr;
  if (shared == nullptr || !shared->claim()) {
    task.run();
    return;
  }
  shared->run(task, helpers);
  shared->release();
}

}  // namespace occam
