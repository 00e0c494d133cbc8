// The C interface; every call goes to the kernels for the best instruction set of the machine it runs on.
#include <algorithm>

#include "api.h"
#include "check.h"

#define FLASHNORM_DECLARE(isa) \
  namespace isa {              \
  int64_t run(const FlashnormModel&, const FlashnormCall&, FlashnormPart); \
  }

FLASHNORM_DECLARE(flashnorm_base)
#if defined(__x86_64__)
FLASHNORM_DECLARE(flashnorm_avx2)
FLASHNORM_DECLARE(flashnorm_avx512)
FLASHNORM_DECLARE(flashnorm_avx512_bf16)
#endif

namespace {

struct Kernels {
  const char* name;
  decltype(&flashnorm_base::run) run;
};

// From the least to the most capable; those that run here come first.
int supported(Kernels (&found)[4]) {
  int count = 0;
  found[count++] = {"base", flashnorm_base::run};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return count;
  found[count++] = {"avx2", flashnorm_avx2::run};
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return count;
  found[count++] = {"avx512", flashnorm_avx512::run};
  if (__builtin_cpu_supports("avx512bf16")) found[count++] = {"avx512_bf16", flashnorm_avx512_bf16::run};
#endif
  return count;
}

struct Choice {
  Kernels kernels[4];
  int count, chosen;
  Choice() : count(supported(kernels)), chosen(count - 1) {}
};

Choice& choice() {
  static Choice made;
  return made;
}

}  // namespace

extern "C" {

// How many instruction sets this machine has kernels for.
int32_t flashnorm_isa_count() { return choice().count; }

const char* flashnorm_isa_name(int32_t i) { return choice().kernels[i].name; }

// Use these kernels from now on, for comparisons.
void flashnorm_isa_choose(int32_t i) { choice().chosen = std::min(std::max(i, 0), choice().count - 1); }

// What is wrong with a call, in words; null if nothing is.
const char* flashnorm_problem(const FlashnormModel* model, const FlashnormCall* call, FlashnormPart part) {
  return flashnorm::problem(*model, *call, part);
}

// Without memory: how many bytes of it the call needs, or -1 if there is a problem. With it: compute a part of the model,
// or all of it.
int64_t flashnorm_run(const FlashnormModel* model, const FlashnormCall* call, FlashnormPart part) {
  if (!call->memory && flashnorm::problem(*model, *call, part)) return -1;
  return choice().kernels[choice().chosen].run(*model, *call, part);
}
}
