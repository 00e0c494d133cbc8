// What Python and the kernels agree on. The structures are mirrored in `native.py`.
#pragma once

#include <cstdint>

extern "C" {

enum FlashnormDtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum FlashnormActivation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

enum FlashnormPart : int32_t { kAll = 0, kAttentionInputs = 1, kAfterAttention = 2, kNormLinear = 3 };

// A linear: weights [out][in], as they lie in a model.
struct FlashnormLinear {
  const void* weights;
  const float* bias;  // or null
  int32_t in, out;
  int64_t bytes;  // of the weights' memory
};

struct FlashnormLayer {
  FlashnormLinear q, k, v, output, gate, up, down;
  const float *attention_gain, *mlp_gain;  // of norms that are not folded, or null
  const float *q_gain, *k_gain;            // of the norms of each head, or null
  void *keys, *values;                     // [text][kv head][...], see attention.h
  int32_t window;                          // positions that a token sees, itself included; 0: all
  int32_t rotate;                          // whether q and k are rotated
  int64_t cache_bytes;                     // of the memory of `keys`, and of that of `values`
};

struct FlashnormModel {
  const FlashnormLayer* layers;
  FlashnormLinear head;
  const float* final_gain;  // or null
  int32_t dtype, layer_count, hidden, inner, heads, kv_heads, head_dim, rotary, activation;
  int32_t capacity;    // of the caches, a multiple of 16
  int32_t final_norm;  // whether the head's input is normalised
  int32_t cache_texts;  // for how many texts there is a cache
  float eps, qk_eps, attention_scale, residual_scale;
};

// What is to be computed, and with what.
struct FlashnormCall {
  float* x;               // [texts * tokens][hidden], the residual stream; overwritten
  const float *cos, *sin;  // [position][rotary / 2]
  const int32_t* past;    // [texts]: positions of each that are in the cache already
  int32_t texts, tokens;  // how many, each with as many new tokens
  int32_t positions;      // how many there are cosines and sines for
  int32_t first_text;     // the place of these texts in the caches
  float* projected;       // [tokens][q, k and v] that attention is to get; or [tokens][q] that it gave
  float* logits;          // [logit_rows][padded vocabulary], of the last rows of x
  int32_t logit_rows;
  const void* input;  // of the head on its own: [tokens][hidden], of the weights' dtype; x is memory for it then
  void* output;       // [tokens][out], of the weights' dtype
  int32_t threads;
  void* memory;  // see flashnorm_run
};
}
