// The kernels for one instruction set; compiled once for each, with FLASHNORM_ISA as the name.
#include <omp.h>

#include "decoder.h"

namespace FLASHNORM_ISA {

// From this many tokens on, bf16 activations and the dot-product instruction: arithmetic is what counts then.
constexpr int kManyTokens = 4;

template <class L, class C>
int64_t run(const FlashnormModel& model, float* x, int tokens, int past, const float* cos, const float* sin,
            float* logits, int logit_rows, void* memory, int threads) {
  Decoder<L, C> decoder(model, x, tokens, past, cos, sin, logits, logit_rows, threads);
  const int64_t size = decoder.lay_out(static_cast<char*>(memory));
  if (!memory) return size;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    decoder.set_threads(omp_get_num_threads());
    decoder.run(omp_get_thread_num());
  }
  return size;
}

int64_t decode(const FlashnormModel& model, float* x, int tokens, int past, const float* cos, const float* sin,
               float* logits, int logit_rows, void* memory, int threads) {
  switch (model.dtype) {
    case kBfloat16:
#if defined(__AVX512BF16__)
      if (tokens >= kManyTokens)
        return run<DotPairs, Bf16>(model, x, tokens, past, cos, sin, logits, logit_rows, memory, threads);
#endif
      return run<Pairs, Bf16>(model, x, tokens, past, cos, sin, logits, logit_rows, memory, threads);
    case kFloat16:
      return run<Plain<Fp16>, Fp16>(model, x, tokens, past, cos, sin, logits, logit_rows, memory, threads);
    default:
      return run<Plain<Fp32>, Fp32>(model, x, tokens, past, cos, sin, logits, logit_rows, memory, threads);
  }
}

}  // namespace FLASHNORM_ISA
