// The C interface; every call goes to the kernels for the best instruction set of the machine it runs on.
#include <algorithm>

#include "api.h"

#define FLASHNORM_DECLARE(isa)                                                                                     \
  namespace isa {                                                                                                  \
  int64_t decode(const FlashnormModel&, float*, int, int, const float*, const float*, float*, int, void*, int);    \
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
  decltype(&flashnorm_base::decode) decode;
};

// From the least to the most capable; those that run here come first.
int supported(Kernels (&found)[4]) {
  int count = 0;
  found[count++] = {"base", flashnorm_base::decode};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return count;
  found[count++] = {"avx2", flashnorm_avx2::decode};
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return count;
  found[count++] = {"avx512", flashnorm_avx512::decode};
  if (__builtin_cpu_supports("avx512bf16")) found[count++] = {"avx512_bf16", flashnorm_avx512_bf16::decode};
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

// Bytes of memory that flashnorm_decode needs for so many tokens.
int64_t flashnorm_decode_memory(const FlashnormModel* model, int32_t tokens, int32_t past, int32_t threads) {
  return choice().kernels[choice().chosen].decode(*model, nullptr, tokens, past, nullptr, nullptr, nullptr, 0, nullptr,
                                                  threads);
}

// Run `tokens` tokens through all layers after `past` others, whose keys and values the caches hold.
// x: [tokens][hidden] embeddings, overwritten. cos, sin: [tokens][rotary / 2]. logits: [logit_rows][padded vocabulary].
void flashnorm_decode(const FlashnormModel* model, float* x, int32_t tokens, int32_t past, const float* cos,
                      const float* sin, float* logits, int32_t logit_rows, void* memory, int32_t threads) {
  choice().kernels[choice().chosen].decode(*model, x, tokens, past, cos, sin, logits, logit_rows, memory, threads);
}
}
