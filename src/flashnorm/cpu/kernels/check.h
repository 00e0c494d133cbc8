// Checks what Python passes: the sizes must fit each other, and the memory must be as large as the sizes say.
// With a wrong size, the kernels would read or write past the end of the memory; this check makes it an error.
#pragma once

#include "api.h"

namespace flashnorm {

constexpr int kBlockOfOutputs = 16, kLargestHead = 256;

inline int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline bool fits(const FlashnormLinear& linear, int64_t in, int64_t out, int32_t dtype) {
  return linear.weights && linear.in == in && linear.out == out && in > 0 && out > 0 &&
         linear.bytes >= in * out * element_size(dtype);
}

inline const char* problem_of_heads(const FlashnormModel& m, bool caches) {
  if (m.heads <= 0 || m.kv_heads <= 0 || m.heads % m.kv_heads || m.head_dim <= 0)
    return "the numbers of heads do not fit each other";
  if (m.rotary < 0 || m.rotary % 2 || m.rotary > m.head_dim) return "more channels are rotated than a head has";
  // Attention works on whole blocks, and keeps a head on the stack.
  if (caches && (m.head_dim % kBlockOfOutputs || m.head_dim > kLargestHead))
    return "expected a head size in steps of 16, up to 256";
  return nullptr;
}

inline const char* problem_of_caches(const FlashnormModel& m, const FlashnormStep& c) {
  if (m.capacity <= 0 || m.capacity % kBlockOfOutputs) return "the caches' capacity is no multiple of 16";
  if (c.first_sequence < 0 || c.first_sequence + c.sequences > m.cache_sequences)
    return "the caches are for fewer sequences";
  for (int i = 0; i < c.sequences; ++i)
    if (c.past[i] < 0 || c.past[i] + c.tokens > m.capacity) return "the caches are for fewer positions";
  const int64_t needed = int64_t(m.cache_sequences) * m.kv_heads * m.capacity * m.head_dim * element_size(m.dtype);
  for (int i = 0; i < m.layer_count; ++i) {
    const FlashnormLayer& layer = m.layers[i];
    if (!layer.keys || !layer.values || layer.cache_bytes < needed) return "a cache is smaller than its sizes say";
  }
  return nullptr;
}

inline const char* problem_of_mlp(const FlashnormModel& m, const FlashnormLayer& l) {
  const int64_t inner = l.gate.out, experts = l.router.out, of_expert = l.experts_out.in;
  const bool dense = l.gate.weights || l.up.weights || l.down.weights || !l.router.weights;
  if (dense && !(fits(l.gate, m.hidden, inner, m.dtype) && fits(l.up, m.hidden, inner, m.dtype) &&
                 fits(l.down, inner, m.hidden, m.dtype)))
    return "a weight has another size";
  if (!l.router.weights) return l.shared_gate.weights ? "a gate for an MLP beside experts has no experts" : nullptr;
  if (!fits(l.router, m.hidden, experts, m.dtype) || !fits(l.experts_in, m.hidden, 2 * experts * of_expert, m.dtype) ||
      !fits(l.experts_out, of_expert, experts * m.hidden, m.dtype))
    return "an expert's weight has another size";
  if (l.experts_per_token < 1 || l.experts_per_token > experts) return "a token has more experts than there are";
  if (l.shared_gate.weights && (!dense || !fits(l.shared_gate, m.hidden, 1, m.dtype)))
    return "the gate of the MLP beside the experts has another size";
  if (l.router.bias || l.experts_in.bias || l.experts_out.bias || l.shared_gate.bias) return "experts have a bias";
  return nullptr;
}

// What is wrong with a step, in words; null if nothing is.
inline const char* problem(const FlashnormModel& m, const FlashnormStep& c, FlashnormPart part) {
  if (m.dtype < kFloat32 || m.dtype > kFloat16) return "the dtype is unknown";
  if (m.activation < kSilu || m.activation > kRelu) return "the activation is unknown";
  if (c.sequences < 1 || c.tokens < 1 || c.threads < 1 || !c.x || m.hidden < 1) return "there is nothing to compute";
  const int64_t q = int64_t(m.heads) * m.head_dim, kv = int64_t(m.kv_heads) * m.head_dim;
  if (part == kNormLinear)
    return !fits(m.head, m.hidden, m.head.out, m.dtype) || !c.input || !c.output ? "the linear has other sizes" : nullptr;
  if (!m.layers || m.layer_count < 1 || !c.past) return "there are no layers";
  if (m.hidden % kBlockOfOutputs) return "the hidden size is no multiple of 16";
  if (const char* found = problem_of_heads(m, part == kAll)) return found;
  for (int i = 0; i < m.layer_count; ++i) {
    const FlashnormLayer& l = m.layers[i];
    const bool before = fits(l.q, m.hidden, q, m.dtype) && fits(l.k, m.hidden, kv, m.dtype) && fits(l.v, m.hidden, kv, m.dtype);
    const bool after = fits(l.output, q, m.hidden, m.dtype);
    if ((part != kAfterAttention && !before) || (part != kAttentionInputs && !after)) return "a weight has another size";
    if (part != kAttentionInputs)
      if (const char* found = problem_of_mlp(m, l)) return found;
    if (part != kAfterAttention && (l.table < 0 || l.table >= c.tables)) return "a layer has no RoPE tables";
  }
  if (part != kAll) return c.projected && (part == kAfterAttention || (c.cos && c.sin && c.positions >= c.tokens)) ? nullptr : "a result has no place";
  if (const char* found = problem_of_caches(m, c)) return found;
  for (int i = 0; i < c.sequences; ++i)
    if (!c.cos || !c.sin || c.past[i] + c.tokens > c.positions) return "there are too few cosines and sines";
  if (c.logit_rows < 0 || c.logit_rows > int64_t(c.sequences) * c.tokens) return "there are more logits than tokens";
  if (c.logit_rows > 0 && (!c.logits || !fits(m.head, m.hidden, m.head.out, m.dtype))) return "the output head has another size";
  return nullptr;
}

}  // namespace flashnorm
