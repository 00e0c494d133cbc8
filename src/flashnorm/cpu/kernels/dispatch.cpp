// The C interface. Every call goes to the kernels for the best instruction set that the machine has.
// FLASHNORM_SETS is the number of instruction sets that the kernels are compiled for, beginning with the least capable.
#include <algorithm>

#include "api.h"
#include "check.h"

#define FLASHNORM_DECLARE(isa) \
  namespace isa {              \
  int64_t run(const FlashnormModel&, const FlashnormStep&, FlashnormPart); \
  }

FLASHNORM_DECLARE(flashnorm_base)
FLASHNORM_DECLARE(flashnorm_avx2)
FLASHNORM_DECLARE(flashnorm_avx512)
FLASHNORM_DECLARE(flashnorm_avx512_bf16)

namespace {

struct Kernels {
  const char* name;
  decltype(&flashnorm_base::run) run;
};

// The kernels that run on this machine, from the least to the most capable. Returns how many there are.
int supported(Kernels (&found)[4]) {
  int count = 0;
  found[count++] = {"base", flashnorm_base::run};
#if FLASHNORM_SETS > 1
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return count;
  found[count++] = {"avx2", flashnorm_avx2::run};
#endif
#if FLASHNORM_SETS > 2
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return count;
  found[count++] = {"avx512", flashnorm_avx512::run};
#endif
#if FLASHNORM_SETS > 3
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

// The number of the interface and the sizes of its structures; `native.py` compares them with its own.
const int64_t* flashnorm_layout() {
  static const int64_t layout[] = {kFlashnormAbi, sizeof(FlashnormLinear), sizeof(FlashnormLayer), sizeof(FlashnormModel),
                                   sizeof(FlashnormStep)};
  return layout;
}

// The number of instruction sets of this machine that there are kernels for.
int32_t flashnorm_isa_count() { return choice().count; }

const char* flashnorm_isa_name(int32_t i) { return choice().kernels[i].name; }

// Use the kernels for instruction set `i` from now on; for tests and benchmarks.
void flashnorm_isa_choose(int32_t i) { choice().chosen = std::min(std::max(i, 0), choice().count - 1); }

// What is wrong with a step, in words; null if nothing is.
const char* flashnorm_problem(const FlashnormModel* model, const FlashnormStep* step, FlashnormPart part) {
  return flashnorm::problem(*model, *step, part);
}

// If step->memory is null: return how many bytes of memory the step needs, or -1 if there is a problem with the step.
// Otherwise: compute a part of the model, or all of it.
int64_t flashnorm_run(const FlashnormModel* model, const FlashnormStep* step, FlashnormPart part) {
  if (!step->memory && flashnorm::problem(*model, *step, part)) return -1;
  return choice().kernels[choice().chosen].run(*model, *step, part);
}
}
