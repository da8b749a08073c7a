// The exported functions, but for okv_attend_run (attend.cpp), and the choice of the instruction set.
#include "api.h"

#include <atomic>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "dispatch.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace occam {
namespace {

#if defined(OKV_HAS_AVX512) || defined(OKV_HAS_AVX2)
// Of F16C only the CPU's own word: older Clang does not know the name. __builtin_cpu_supports also asks whether the
// operating system saves the registers.
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & bit_F16C);
}
#endif

#if defined(OKV_HAS_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(OKV_HAS_NEON)
bool has_neon() {
#if defined(__linux__)
  const unsigned long dot_product = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & dot_product) != 0;
#else
  return true;  // every arm64 Mac has the dot product
#endif
}
#endif

struct InstructionSet {
  const Kernels *kernels;
  bool runs_here;
};

// All that were built, best first; read once, when the library is loaded.
const InstructionSet sets[] = {
#if defined(OKV_HAS_AVX512)
    {&avx512_kernels, has_avx512()},
#endif
#if defined(OKV_HAS_AVX2)
    {&avx2_kernels, has_avx2()},
#endif
#if defined(OKV_HAS_NEON)
    {&neon_kernels, has_neon()},
#endif
    {&portable_kernels, true},
};

const Kernels *best() {
  const InstructionSet *set = sets;
  while (!set->runs_here) ++set;
  return set->kernels;
}

std::atomic<const Kernels *> chosen{best()};

struct Names {
  char text[64] = "";
  explicit Names(bool all) {
    for (const InstructionSet &set : sets) {
      if (!all && !set.runs_here) continue;
      if (text[0] != '\0') strcat(text, ",");
      strcat(text, set.kernels->name);
    }
  }
};
const Names built(true), usable(false);

thread_local char error_text[512] = "";

struct Encoding {
  const okv_encode *call;
  std::atomic<int> failed{0};
};

void encode_item(void *context, int64_t group) {
  Encoding &encoding = *static_cast<Encoding *>(context);
  const int failed = kernels().encode_group(*encoding.call, group);
  if (failed) encoding.failed.store(failed, std::memory_order_relaxed);
}

void decode_item(void *context, int64_t item) {
  const okv_decode &call = *static_cast<const okv_decode *>(context);
  kernels().decode_head(call, item / call.layout.kv_heads, item % call.layout.kv_heads);
}

}  // namespace

const Kernels &kernels() { return *chosen.load(std::memory_order_relaxed); }

void set_error(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
}

}  // namespace occam

int32_t okv_abi(void) { return OKV_ABI; }

const char *okv_isa(void) { return occam::kernels().name; }

const char *okv_isas(void) { return occam::usable.text; }

const char *okv_built(void) { return occam::built.text; }

const char *okv_error(void) { return occam::error_text; }

int32_t okv_select(const char *isa) {
  for (const occam::InstructionSet &set : occam::sets) {
    if (!set.runs_here || strcmp(isa, set.kernels->name) != 0) continue;
    occam::chosen.store(set.kernels, std::memory_order_relaxed);
    return 0;
  }
  occam::set_error("there is no instruction set '%s' here; there are %s", isa, occam::usable.text);
  return -1;
}

int32_t okv_encode_run(const okv_encode *args) {
  occam::Encoding encoding{args};
  occam::parallel(args->groups, args->threads, occam::encode_item, &encoding);
  const int failed = encoding.failed.load(std::memory_order_relaxed);
  if (failed) occam::set_error("%s", failed == 1 ? "a value does not fit its stored number" : "there is no memory");
  return failed;
}

int32_t okv_decode_run(const okv_decode *args) {
  occam::parallel(args->groups * args->layout.kv_heads, args->threads, occam::decode_item,
                  const_cast<okv_decode *>(args));
  return 0;
}
