// The kernels for one instruction set; compiled once for each, with FLASHNORM_ISA as the name.
#include <omp.h>

#include "decoder.h"

namespace FLASHNORM_ISA {

template <class K>
int64_t run(const FlashnormModel& model, const FlashnormCall& call, FlashnormPart part) {
  Decoder<K> decoder(model, call);
  const int64_t size = decoder.lay_out(static_cast<char*>(call.memory), part);
  if (!call.memory) return size;
#pragma omp parallel num_threads(call.threads)
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
int64_t run_plain(const FlashnormModel& model, const FlashnormCall& call, FlashnormPart part, bool few) {
  if (few) return run<Few<W, Plain<W>>>(model, call, part);
  return run<Many<W, Plain<Fp32>, Plain<W>>>(model, call, part);
}

// Bytes of memory that the call needs; with that memory, the call is done.
int64_t run(const FlashnormModel& model, const FlashnormCall& call, FlashnormPart part) {
  const bool few = call.texts * call.tokens <= kFewTokens;
  switch (model.dtype) {
    case kBfloat16:
#if defined(__AVX512BF16__)
      if (few) return run<Few<Bf16, Pairs>>(model, call, part);
      return run<Many<Bf16, DotPairs, DotPairs>>(model, call, part);
#else
      return run_plain<Bf16>(model, call, part, few);
#endif
    case kFloat16:
      return run_plain<Fp16>(model, call, part, few);
    default:
      return run_plain<Fp32>(model, call, part, few);
  }
}

}  // namespace FLASHNORM_ISA
