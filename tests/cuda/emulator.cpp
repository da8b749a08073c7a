// Runs the kernel block by block. See emulator.h.
#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <vector>

#include OKV_KERNEL

namespace emulator {

constexpr int THREADS = 128, STACK_BYTES = 256 * 1024;

struct Warp {
  Words words[2][32];
  float products[2][128];
  int arrived = 0, turn = 0;
  int taken[2] = {-1, -1};  // the turn whose products are there
};

struct Arrivals {
  int phase = 0, expected = 0;
  std::vector<Copy> copies;
};

struct Fiber {
  jmp_buf at;
  bool done = false;
  int turn = 0;  // of its warp's meetings
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

static int current, turn, position[3], waiting, crossings, alive;
static Fiber fibers[THREADS];
static Warp warps[THREADS / 32];
static std::map<u64 *, Arrivals> arrivals;
static jmp_buf scheduler;
static const char *failure;
static const occam::Given *given;
static occam::Memory *shared;

int thread() { return current; }
int block(int axis) { return position[axis]; }
void fail(const char *why) { failure = why; }

static void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void barrier() {
  const int own = crossings;
  if (++waiting == THREADS) waiting = 0, crossings++;
  else
    while (crossings == own) yield();
}

const Words *meet(const Words &own) {
  Warp &warp = warps[current / 32];
  const int turn = fibers[current].turn++;
  warp.words[turn & 1][current % 32] = own;
  if (++warp.arrived == 32) warp.arrived = 0, warp.turn++;
  else
    while (warp.turn == turn) yield();
  return warp.words[turn & 1];
}

float *tile_memory() { return warps[current / 32].products[(fibers[current].turn - 1) & 1]; }

bool is_first() {
  Warp &warp = warps[current / 32];
  const int turn = fibers[current].turn - 1;
  if (warp.taken[turn & 1] == turn) return false;
  warp.taken[turn & 1] = turn;
  return true;
}

void tile_products(const Words *lanes, float *products) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 6; i++)
      for (int half = 0; half < 2; half++) {
        const float x = half_to_float((u16)(lanes[lane].x[i] >> (16 * half)));
        const int r = lane / 4, k = 2 * (lane % 4) + half;
        if (i < 4) a[r + 8 * (i & 1)][k + 8 * (i >> 1)] = x;
        else b[k + 8 * (i - 4)][r] = x;
      }
  for (int row = 0; row < 16; row++) {
    float sums[8] = {};
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    memcpy(products + 8 * row, sums, sizeof sums);
  }
}

static void perform(const std::vector<Copy> &copies) {
  for (const Copy &copy : copies) memcpy(copy.to, copy.from, copy.bytes);
}

void enqueue(const Copy &copy) { fibers[current].open.push_back(copy); }

void commit() {
  fibers[current].groups.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
}

void wait(int pending) {
  auto &groups = fibers[current].groups;
  for (; (int)groups.size() > pending; groups.pop_front()) perform(groups.front());
}

void barrier_init(u64 *at) { arrivals[at] = {}; }
void barrier_expect(u64 *at, int bytes) { arrivals.at(at).expected += bytes; }
void barrier_copy(u64 *at, const Copy &copy) { arrivals.at(at).copies.push_back(copy); }

void barrier_wait(u64 *at, int parity) {
  Arrivals &own = arrivals.at(at);
  if ((own.phase & 1) != parity) return;
  int bytes = 0;
  for (const Copy &copy : own.copies) bytes += copy.bytes;
  if (bytes == 0 || bytes != own.expected) fail("a barrier waits for bytes that never come");
  perform(own.copies);
  own.copies.clear();
  own.expected = 0, own.phase++;
}

static void run_fiber() {
  occam::run(*given, *shared);
  fibers[current].done = true;
  alive--;
  _longjmp(scheduler, 1);
}

// Threads take turns from the first to the last or, `backwards`, the other way: a barrier that is missing shows in one.
static void run_block(char *stacks, bool backwards) {
  memset((void *)shared, 0xff, sizeof *shared);
  waiting = crossings = 0;
  alive = THREADS;
  arrivals.clear();
  for (Warp &warp : warps) warp = Warp();
  for (turn = 0; turn < THREADS; turn++) {
    const int i = backwards ? THREADS - 1 - turn : turn;
    fibers[i] = Fiber();
    ucontext_t start, back;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
    start.uc_stack.ss_size = STACK_BYTES;
    start.uc_link = nullptr;
    makecontext(&start, run_fiber, 0);
    current = i;
    if (!_setjmp(scheduler)) swapcontext(&back, &start);  // it comes back through `scheduler`
  }
  while (alive && !failure)
    for (turn = 0; turn < THREADS; turn++) {
      current = backwards ? THREADS - 1 - turn : turn;
      if (!fibers[current].done && !_setjmp(scheduler)) _longjmp(fibers[current].at, 1);
    }
  for (const Fiber &fiber : fibers)
    for (const auto &group : fiber.groups)
      if (!group.empty()) failure = "a copy was never waited for";
  for (const auto &own : arrivals)
    if (!own.second.copies.empty()) failure = "a bulk copy was never waited for";
}

}  // namespace emulator

// Runs all blocks of a grid, in an order that `order` shuffles, their threads backwards if it is odd; returns what went
// wrong, or null.
extern "C" const char *occamkv_run(const occam::Given *given, int x, int y, int z, int order) {
  using namespace emulator;
  static char *const stacks = (char *)malloc((size_t)THREADS * STACK_BYTES);
  emulator::given = given;
  shared = (occam::Memory *)aligned_alloc(128, (sizeof(occam::Memory) + 127) / 128 * 128);
  failure = nullptr;
  const int blocks = x * y * z;
  int step = 1 + order % blocks;
  for (auto divides = [&](int n) { return n > 1 && step % n == 0 && blocks % n == 0; };; step++) {
    bool prime = true;
    for (int n = 2; n <= blocks; n++) prime = prime && !divides(n);
    if (prime) break;
  }
  for (int i = 0; i < blocks && !failure; i++) {
    const int number = (int)((long long)i * step % blocks);
    position[0] = number % x, position[1] = number / x % y, position[2] = number / x / y;
    run_block(stacks, order & 1);
  }
  free(shared);
  return failure;
}

extern "C" int occamkv_given_bytes() { return (int)sizeof(occam::Given); }
extern "C" int occamkv_record_bytes() { return occam::RECORD_BYTES; }
extern "C" int occamkv_memory_bytes() { return (int)sizeof(occam::Memory); }
