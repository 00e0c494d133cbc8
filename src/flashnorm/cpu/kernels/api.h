// The interface between Python and the kernels. `native.py` mirrors these structures.
#pragma once

#include <cstdint>

extern "C" {

// Raise this here and in `native.py` for a change of the interface that does not change the size of a structure.
enum : int64_t { kFlashnormAbi = 2 };

enum FlashnormDtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum FlashnormActivation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

enum FlashnormPart : int32_t { kAll = 0, kAttentionInputs = 1, kAfterAttention = 2, kNormLinear = 3 };

// A linear layer: weights [out][in], the model's own memory.
struct FlashnormLinear {
  const void* weights;
  const float* bias;  // or null
  int32_t in, out;
  int64_t bytes;  // size of the weights' memory
};

// A layer has a gated MLP (gate, up, down), or experts, or both, whose outputs are added. A part that it does not have
// has no weights.
struct FlashnormLayer {
  FlashnormLinear q, k, v, output, gate, up, down;
  FlashnormLinear router;       // [experts][hidden], no bias; its outputs are the scores of the experts
  FlashnormLinear experts_in;   // [experts][gate, then up][hidden], no bias
  FlashnormLinear experts_out;  // [experts][hidden][intermediate of an expert], no bias
  FlashnormLinear shared_gate;  // [1][hidden], no bias: the MLP beside the experts is multiplied by sigmoid of its output
  const float *attention_gain, *mlp_gain;    // gains of the norms before attention and MLP; null if folded
  const float *attention_after, *mlp_after;  // gains of the norms after attention and MLP; null if there are none
  const float *q_gain, *k_gain;              // gains of the norms of queries and keys; null if there are none
  void *keys, *values;                     // [sequence][kv head][...], see attention.h
  int32_t window;                          // how many positions a token sees, itself included; 0: all
  int32_t rotate;                          // whether RoPE rotates q and k
  int32_t table;                           // which of the step's RoPE tables
  int32_t experts_per_token;
  int32_t renormalise;                     // whether the weights of a token's experts are divided by their sum
  int64_t cache_bytes;                     // size of the memory of `keys`, and the same for `values`
};

struct FlashnormModel {
  const FlashnormLayer* layers;
  FlashnormLinear head;
  const float* final_gain;  // or null
  int32_t dtype, layer_count, hidden, heads, kv_heads, head_dim, rotary, activation;
  int32_t capacity;         // positions in the caches, a multiple of 16
  int32_t norm_before;      // whether the inputs of attention and MLP are normalised
  int32_t norm_all_heads;   // whether queries are normalised over all heads together, and keys; else each head alone
  int32_t final_norm;       // whether the head's input is normalised
  int32_t cache_sequences;  // how many sequences the caches hold
  float eps, qk_eps, attention_scale, residual_scale;
  float score_cap;          // attention scores s become cap tanh(s / cap); 0: no cap
};

// What to compute, and the memory for inputs and outputs.
struct FlashnormStep {
  float* x;                   // [sequences * tokens][hidden], the residual stream; overwritten
  const float *cos, *sin;     // [table][position][rotary / 2]
  const int32_t* past;        // [sequences]: how many positions of each are in the cache already
  int32_t sequences, tokens;  // number of sequences, and of new tokens of each
  int32_t positions, tables;  // how many positions each table holds, and how many tables there are
  int32_t first_sequence;     // index of the first of these sequences in the caches
  float* projected;           // [tokens][q, k and v]: output, for attention; or [tokens][q]: input, from attention
  float* logits;              // [logit_rows][padded vocabulary], for the last rows of x
  int32_t logit_rows;
  const void* input;  // kNormLinear only: [tokens][hidden], in the weights' dtype; x is scratch memory then
  void* output;       // kNormLinear only: [tokens][out], in the weights' dtype
  int32_t threads;
  void* memory;  // see flashnorm_run
};
}
