// What Python and the kernels agree on. The structures are mirrored in `native.py`.
#pragma once

#include <cstdint>

extern "C" {

enum FlashnormDtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum FlashnormActivation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// A linear: packed weights, outputs padded to a multiple of 16.
struct FlashnormLinear {
  const void* weights;
  const float* bias;  // or null
  int32_t in, out;
};

struct FlashnormLayer {
  FlashnormLinear qkv, output, gate_up, down;
  const float *attention_gain, *mlp_gain;  // of norms that are not folded, or null
  const float *q_gain, *k_gain;            // of the norms of each head, or null
  void *keys, *values;                     // [kv head][...], see attention.h
  int32_t window;                          // positions that a token sees, itself included; 0: all
  int32_t rotate;                          // whether q and k are rotated
};

struct FlashnormModel {
  const FlashnormLayer* layers;
  FlashnormLinear head;
  const float* final_gain;  // or null
  int32_t dtype, layer_count, hidden, inner, heads, kv_heads, head_dim, rotary, activation, capacity;
  float eps, qk_eps, attention_scale, residual_scale;
};
}
