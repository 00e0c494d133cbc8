// The kernels for one instruction set. This file is compiled once for each, with FLASHNORM_ISA as the namespace.
#include <omp.h>

#include "decoder.h"

namespace FLASHNORM_ISA {

template <class K>
int64_t run(const FlashnormModel& model, const FlashnormStep& step, FlashnormPart part) {
  Decoder<K> decoder(model, step);
  const int64_t size = decoder.lay_out(static_cast<char*>(step.memory), part);
  if (!step.memory) return size;
#pragma omp parallel num_threads(step.threads)
  {
#pragma omp single
    decoder.set_threads(omp_get_num_threads());
    const int me = omp_get_thread_num();
    switch (part) {
      case kAttentionInputs: decoder.attention_inputs(me); break;
      case kAfterAttention: decoder.after_attention(me); break;
      case kNormLinear: decoder.norm_linear(me); break;
      default: decoder.run(me);
    }
  }
  return size;
}

template <class W>
int64_t run_plain(const FlashnormModel& model, const FlashnormStep& step, FlashnormPart part, bool few) {
  if (few) return run<Few<W, Plain<W>>>(model, step, part);
  return run<Many<W, Plain<Fp32>, Plain<W>>>(model, step, part);
}

// Returns the bytes of memory that the step needs. If step.memory is set, the step is also computed.
int64_t run(const FlashnormModel& model, const FlashnormStep& step, FlashnormPart part) {
  const bool few = step.sequences * step.tokens <= kFewTokens;
  switch (model.dtype) {
    case kBfloat16:
#if defined(__AVX512BF16__)
      if (few) return run<Few<Bf16, Pairs>>(model, step, part);
      return run<Many<Bf16, DotPairs, DotPairs>>(model, step, part);
#else
      return run_plain<Bf16>(model, step, part, few);
#endif
    case kFloat16:
      return run_plain<Fp16>(model, step, part, few);
    default:
      return run_plain<Fp32>(model, step, part, few);
  }
}

}  // namespace FLASHNORM_ISA
