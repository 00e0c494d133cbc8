// The formulas of the kernels as plain loops over doubles, one element after another: what the kernels are compared with.
//
// Vectors and matrices are std::vector<double>, row by row. Sources of the formulas: RMSNorm, RoPE, grouped-query
// attention, gated MLPs and experts as in `decoding/deferred.py`, but with the division of a norm where the model has it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "api.h"

namespace plain {

using Row = std::vector<double>;

// --- the dtypes, by their definition: sign, exponent and mantissa

inline double of_bits(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  else
    value = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -value : value;
}

inline int exponent_bits(int32_t dtype) { return dtype == kBfloat16 ? 8 : 5; }

// The numbers of all patterns of 16 bits.
inline Row all_of(int exponent_bits) {
  Row numbers(1 << 16);
  for (int bits = 0; bits < 1 << 16; ++bits) numbers[bits] = of_bits(uint16_t(bits), exponent_bits);
  return numbers;
}

inline double read(const void* memory, int64_t i, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(memory)[i];
  static const Row numbers[] = {all_of(exponent_bits(kBfloat16)), all_of(exponent_bits(kFloat16))};
  return numbers[dtype == kFloat16][static_cast<const uint16_t*>(memory)[i]];
}

// The nearest number of a dtype of 16 bits, the even one of two: found by bisection among all of them.
inline uint16_t to_bits(double value, int32_t dtype) {
  if (std::isnan(value)) return uint16_t(((1 << exponent_bits(dtype)) - 1) << (15 - exponent_bits(dtype)) | 1);
  const double size = std::fabs(value);
  const int infinite = ((1 << exponent_bits(dtype)) - 1) << (15 - exponent_bits(dtype));
  int low = 0, high = infinite;  // of_bits(low) <= size
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (of_bits(uint16_t(middle), exponent_bits(dtype)) <= size ? low : high) = middle;
  }
  const double below = of_bits(uint16_t(low), exponent_bits(dtype));
  // What infinity stands for in rounding: the number that would follow the largest one.
  const double above = high == infinite ? 2 * below - of_bits(uint16_t(low - 1), exponent_bits(dtype))
                                        : of_bits(uint16_t(high), exponent_bits(dtype));
  const bool up = size - below > above - size || (size - below == above - size && low % 2);
  return uint16_t((std::signbit(value) ? 0x8000 : 0) | (up ? high : low));
}

inline double rounded(double value, int32_t dtype) {
  return dtype == kFloat32 ? double(float(value)) : of_bits(to_bits(value, dtype), exponent_bits(dtype));
}

// --- a decoder

inline double scale_of(const double* x, int count, double eps) {
  double squares = 0;
  for (int i = 0; i < count; ++i) squares += x[i] * x[i];
  return 1 / std::sqrt(squares / count + eps);
}

// RMSNorm, or only the gain if there is no norm.
inline Row normed(const Row& x, const float* gain, bool norm, double eps) {
  const double s = norm ? scale_of(x.data(), int(x.size()), eps) : 1;
  Row y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * s * (gain ? gain[i] : 1);
  return y;
}

inline Row times(const void* weights, int64_t first_row, int in, int out, const Row& x, int32_t dtype,
                 const float* bias = nullptr) {
  Row y(out);
  for (int o = 0; o < out; ++o) {
    double sum = bias ? bias[o] : 0;
    for (int i = 0; i < in; ++i) sum += read(weights, (first_row + o) * in + i, dtype) * x[i];
    y[o] = sum;
  }
  return y;
}

inline Row times(const FlashnormLinear& by, const Row& x, int32_t dtype) {
  return times(by.weights, 0, by.in, by.out, x, dtype, by.bias);
}

inline double activated(int32_t kind, double v) {
  switch (kind) {
    case kSilu: return v / (1 + std::exp(-v));
    case kGelu: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    default: return std::max(v, 0.0);
  }
}

// Norm of queries or keys, by head or over all heads, and RoPE of each head.
inline void turn(Row& row, const float* gain, const FlashnormModel& m, const FlashnormLayer& l, const FlashnormStep& step,
                 int position) {
  const int d = m.head_dim, heads = int(row.size()) / d, half = m.rotary / 2;
  const double all = gain && m.norm_all_heads ? scale_of(row.data(), int(row.size()), m.qk_eps) : 1;
  for (int h = 0; h < heads; ++h) {
    double* head = row.data() + h * d;
    const double s = gain && !m.norm_all_heads ? scale_of(head, d, m.qk_eps) : all;
    for (int i = 0; i < d; ++i) head[i] *= s * (gain ? gain[m.norm_all_heads ? h * d + i : i] : 1);
    if (!l.rotate) continue;
    const int64_t at = (int64_t(l.table) * step.positions + position) * half;
    for (int i = 0; i < half; ++i) {
      const double a = head[i], b = head[i + half], c = step.cos[at + i], n = step.sin[at + i];
      head[i] = a * c - b * n;
      head[i + half] = b * c + a * n;
    }
  }
}

// What attention has seen of a sequence: [layer][position].
struct Seen {
  std::vector<std::vector<Row>> keys, values;
  explicit Seen(int layers) : keys(layers), values(layers) {}
};

inline Row attention(const Row& q, const std::vector<Row>& keys, const std::vector<Row>& values, const FlashnormModel& m,
                     const FlashnormLayer& l, int position) {
  const int d = m.head_dim, group = m.heads / m.kv_heads;
  const int first = l.window > 0 ? std::max(0, position - l.window + 1) : 0;
  Row out(q.size());
  for (int h = 0; h < m.heads; ++h) {
    const int kv = h / group * d;
    Row score;
    for (int p = first; p <= position; ++p) {
      double s = 0;
      for (int i = 0; i < d; ++i) s += q[h * d + i] * keys[p][kv + i];
      s *= m.attention_scale;
      score.push_back(m.score_cap > 0 ? m.score_cap * std::tanh(s / m.score_cap) : s);
    }
    const double largest = *std::max_element(score.begin(), score.end());
    double total = 0;
    for (double& s : score) total += s = std::exp(s - largest);
    for (int p = first; p <= position; ++p)
      for (int i = 0; i < d; ++i) out[h * d + i] += score[p - first] / total * values[p][kv + i];
  }
  return out;
}

inline Row gated(const Row& x, const void* gate, int64_t gate_row, const float* gate_bias, const void* up, int64_t up_row,
                 const float* up_bias, int inner, const FlashnormModel& m) {
  Row g = times(gate, gate_row, m.hidden, inner, x, m.dtype, gate_bias);
  const Row u = times(up, up_row, m.hidden, inner, x, m.dtype, up_bias);
  for (int i = 0; i < inner; ++i) g[i] = activated(m.activation, g[i]) * u[i];
  return g;
}

inline Row mlp(const Row& x, const FlashnormLayer& l, const FlashnormModel& m) {
  Row y(m.hidden);
  if (l.gate.weights) {
    y = times(l.down, gated(x, l.gate.weights, 0, l.gate.bias, l.up.weights, 0, l.up.bias, l.gate.out, m), m.dtype);
    if (l.shared_gate.weights)
      for (double& v : y) v /= 1 + std::exp(-times(l.shared_gate, x, m.dtype)[0]);
  }
  if (!l.router.weights) return y;
  Row score = times(l.router, x, m.dtype);
  const double largest = *std::max_element(score.begin(), score.end());
  double total = 0, of_chosen = 0;
  for (double& s : score) total += s = std::exp(s - largest);
  std::vector<int> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
  order.resize(l.experts_per_token);
  for (int e : order) of_chosen += score[e];
  const int inner = l.experts_out.in;
  for (int e : order) {
    const Row between = gated(x, l.experts_in.weights, 2 * int64_t(e) * inner, nullptr, l.experts_in.weights,
                              (2 * int64_t(e) + 1) * inner, nullptr, inner, m);
    const Row out = times(l.experts_out.weights, int64_t(e) * m.hidden, inner, m.hidden, between, m.dtype);
    for (int i = 0; i < m.hidden; ++i) y[i] += score[e] / (l.renormalise ? of_chosen : total) * out[i];
  }
  return y;
}

inline void add(Row& x, Row y, const float* after, const FlashnormModel& m) {
  if (after) y = normed(y, after, true, m.eps);
  for (int i = 0; i < m.hidden; ++i) x[i] += m.residual_scale * y[i];
}

// The next token of a sequence: its logits. Keys and values are stored in the dtype of the weights, as in the caches.
inline Row next(Row x, const FlashnormModel& m, const FlashnormStep& step, Seen& seen) {
  for (int i = 0; i < m.layer_count; ++i) {
    const FlashnormLayer& l = m.layers[i];
    const int position = int(seen.keys[i].size());
    const Row in = normed(x, l.attention_gain, m.norm_before, m.eps);
    Row q = times(l.q, in, m.dtype), k = times(l.k, in, m.dtype), v = times(l.v, in, m.dtype);
    turn(q, l.q_gain, m, l, step, position);
    turn(k, l.k_gain, m, l, step, position);
    for (double& one : k) one = rounded(one, m.dtype);
    for (double& one : v) one = rounded(one, m.dtype);
    seen.keys[i].push_back(k);
    seen.values[i].push_back(v);
    add(x, times(l.output, attention(q, seen.keys[i], seen.values[i], m, l, position), m.dtype), l.attention_after, m);
    add(x, mlp(normed(x, l.mlp_gain, m.norm_before, m.eps), l, m), l.mlp_after, m);
  }
  return times(m.head, normed(x, m.final_gain, m.final_norm, m.eps), m.dtype);
}

}  // namespace plain
