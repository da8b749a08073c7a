// Every item once, whoever asks: many threads, few items, nested and concurrent callers, a child after fork().
#include "checks.h"

#include <atomic>
#include <chrono>
#include <float.h>
#include <memory>
#include <set>
#include <mutex>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "pool.h"

namespace {

using occam::parallel;

struct Counts {
  explicit Counts(int64_t items) : of(items) {}
  bool each_once() const {
    for (const std::atomic<int> &count : of)
      if (count != 1) return false;
    return true;
  }
  std::vector<std::atomic<int>> of;
  std::mutex mutex;
  std::set<std::thread::id> threads;
};

void count(void *context, int64_t item) {
  Counts &counts = *static_cast<Counts *>(context);
  ++counts.of[item];
  std::lock_guard<std::mutex> lock(counts.mutex);
  counts.threads.insert(std::this_thread::get_id());
}

void count_slowly(void *context, int64_t item) {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  count(context, item);
}

void every_item_once() {
  for (int64_t items : {0, 1, 2, 3, 100, 5000}) {
    for (int threads : {-1, 0, 1, 2, 3, 16}) {
      Counts counts(items);
      parallel(items, threads, count, &counts);
      EXPECT(counts.each_once());
      EXPECT(static_cast<int>(counts.threads.size()) <= (threads < 1 ? 1 : threads));
    }
  }
}

void threads_help() {
  Counts counts(40);
  parallel(40, 4, count_slowly, &counts);
  EXPECT(counts.each_once());
  EXPECT(counts.threads.size() >= 2 && counts.threads.size() <= 4);
  Counts alone(10);
  parallel(10, 1, count_slowly, &alone);
  EXPECT(alone.threads.size() == 1 && alone.threads.count(std::this_thread::get_id()) == 1);
}

struct Nest {
  std::vector<std::unique_ptr<Counts>> inner;
};

void nest(void *context, int64_t item) {
  Counts &inner = *static_cast<Nest *>(context)->inner[item];
  parallel(50, 4, count, &inner);
}

void nested_callers_work_alone() {
  Nest outer;
  for (int i = 0; i < 20; ++i) outer.inner.push_back(std::make_unique<Counts>(50));
  parallel(20, 4, nest, &outer);
  for (const auto &inner : outer.inner) EXPECT(inner->each_once() && inner->threads.size() == 1);
}

void concurrent_callers_do_not_wait() {
  std::vector<std::thread> callers;
  std::atomic<int> right{0};
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&right] {
      for (int turn = 0; turn < 300; ++turn) {
        Counts counts(20);
        parallel(20, 3, count, &counts);
        right += counts.each_once();
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
  EXPECT(right == 6 * 300);
}

// Allocates nothing: the sanitizer's malloc, unlike the C library's, hangs in a child if another thread was inside it.
void add(void *context, int64_t) { ++*static_cast<std::atomic<int64_t> *>(context); }

// The child has none of the pool's threads, and another thread may have been inside the pool at the fork.
void a_child_has_its_own_pool() {
  std::atomic<bool> stop{false};
  std::thread busy([&stop] {
    std::atomic<int64_t> done{0};
    while (!stop) parallel(8, 3, add, &done);
  });
  for (int turn = 0; turn < 50; ++turn) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      Counts counts(turn % 10 == 0 ? 20 : 4);
      parallel(counts.of.size(), 3, turn % 10 == 0 ? count_slowly : count, &counts);
      const bool helped = turn % 10 != 0 || counts.threads.size() > 1;
      _exit(counts.each_once() && helped ? 0 : 1);
    }
    int status = -1;
    EXPECT(child > 0 && waitpid(child, &status, 0) == child && status == 0);
  }
  stop = true;
  busy.join();
}

#if defined(__x86_64__)
void halve_smallest(void *context, int64_t item) {
  volatile float smallest = FLT_MIN;
  static_cast<std::vector<float> *>(context)->at(item) = smallest * 0.5f;
}

void a_flushing_caller_changes_no_number() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
  const unsigned flushing = _mm_getcsr();
  for (int threads : {1, 3}) {
    std::vector<float> halves(100);
    parallel(100, threads, halve_smallest, &halves);
    _mm_setcsr(before);
    for (float half : halves) EXPECT(half > 0);
    _mm_setcsr(flushing);
  }
  EXPECT(_mm_getcsr() == flushing);
  _mm_setcsr(before);
}
#else
void a_flushing_caller_changes_no_number() {}
#endif

}  // namespace

void check_pool() {
  every_item_once();
  threads_help();
  nested_callers_work_alone();
  concurrent_callers_do_not_wait();
  a_child_has_its_own_pool();
  a_flushing_caller_changes_no_number();
}
