// A decoder of pre-normalised layers, in one parallel region for all of them.
//
// Norms are deferred: a linear reads the residual stream x as it is, W x is scaled by 1 / r(x) afterwards. Where q and
// k are normalised themselves, their scale cancels; where they are rotated, it goes along with the rotation.
#pragma once

#include "api.h"
#include "attention.h"

namespace FLASHNORM_ISA {

inline Vec apply(int32_t activation, Vec x) {
  const Vec one = splat(1);
  switch (activation) {
    case kSilu:
      return x / (one + exp(x * splat(-1)));
    case kGeluTanh: {  // tanh(u) = 1 - 2 / (1 + e^2u)
      Vec u = x * (splat(0.7978845608f) + splat(0.7978845608f * 0.044715f) * x * x);
      Vec t = one + splat(-2) / (one + exp(u + u));
      return splat(0.5f) * x * (one + t);
    }
    case kGelu:
      FOR_PARTS for (int i = 0; i < kLanes; ++i) {
        const float v = x.part[p][i];
        x.part[p][i] = 0.5f * v * (1 + std::erf(v * 0.70710678f));
      }
      return x;
    default:
      FOR_PARTS x.part[p] = x.part[p] > 0.0f ? x.part[p] : Part{};
      return x;
  }
}

inline int padded(int count) { return (count + kBlock - 1) / kBlock * kBlock; }

// Activations as a linear wants them.
inline void put(float* to, const float* from, int count) { memcpy(to, from, count * sizeof(float)); }
inline void put(uint16_t* to, const float* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = Bf16::from_float(from[i]);
}
inline void put(float* to, Vec v) { store(to, v); }
inline void put(uint16_t* to, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v.part[0]);
  memcpy(to, &half, sizeof half);
#else
  float f[kBlock];
  store(f, v);
  put(to, f, kBlock);
#endif
}

// Of a multiple of sixteen numbers.
inline double sum_of_squares(const float* x, int count) {
  double total = 0;
  for (int i = 0; i < count; i += 256) {
    Vec part = splat(0);
    for (int j = i; j < std::min(count, i + 256); j += kBlock) {
      const Vec v = load(x + j);
      multiply_add(part, v, v);
    }
    total += sum_of(part);
  }
  return total;
}

// Memory for all that is computed on the way, cut from one piece.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

// L: how weights are multiplied; C: what the cache stores.
template <class L, class C>
struct Decoder {
  using Activation = typename L::Activation;
  using Stored = typename C::Element;

  const FlashnormModel& model;
  const int tokens, past;  // that are new, that are in the cache
  int all;                 // threads
  const float *cos, *sin;       // [tokens][rotary / 2]
  float* x;                     // [tokens][hidden], the residual stream; changed
  float* logits;                // [logit_rows][padded vocabulary], of the last tokens
  const int logit_rows;

  int q_size, kv_size, ldqkv, splits, tiles;
  Activation *in, *inner;  // what the next linear reads
  float *scale, *qkv, *partial_out;
  Partial* partial;

  Decoder(const FlashnormModel& m, float* x_, int tokens_, int past_, const float* cos_, const float* sin_,
          float* logits_, int rows, int threads)
      : model(m), tokens(tokens_), past(past_), all(threads), cos(cos_), sin(sin_), x(x_), logits(logits_),
        logit_rows(rows) {
    q_size = m.heads * m.head_dim;
    kv_size = m.kv_heads * m.head_dim;
    ldqkv = padded(q_size + 2 * kv_size);
    tiles = (tokens * group() + kTokens - 1) / kTokens;
    const int spans = (past + tokens + kSpan - 1) / kSpan;
    splits = std::max(1, std::min(spans / 2, 2 * all / (tiles * m.kv_heads)));
  }

  // As many as there are in the end, which may be fewer than were asked for.
  void set_threads(int count) { all = count; }

  int group() const { return model.heads / model.kv_heads; }

  int64_t lay_out(char* memory) {
    Arena arena{memory};
    in = arena.take<Activation>(int64_t(tokens) * std::max(model.hidden, q_size));
    inner = arena.take<Activation>(int64_t(tokens) * padded(model.inner));
    scale = arena.take<float>(tokens);
    qkv = arena.take<float>(int64_t(tokens) * ldqkv);
    partial_out = arena.take<float>(int64_t(model.kv_heads) * tiles * splits * kTokens * model.head_dim);
    partial = arena.take<Partial>(int64_t(model.kv_heads) * tiles * splits * kTokens);
    return arena.at - memory;
  }

  void run(int me) {
    for (int i = 0; i < model.layer_count; ++i) {
      const FlashnormLayer& layer = model.layers[i];
      prepare(layer.attention_gain, 0, me);
      project(layer, me);
      rotate(layer, me);
      attention(layer, me);
      merge(me);
      add(layer.output, in, q_size, me);
      prepare(layer.mlp_gain, 0, me);
      gate_up(layer, me);
      add(layer.down, inner, padded(model.inner), me);
    }
    if (logit_rows > 0) {
      prepare(model.final_gain, tokens - logit_rows, me);
      const int ld = padded(model.head.out);
      const float* s = scale + tokens - logit_rows;
      float* to = logits;
      linear<L, kWide>(in + int64_t(tokens - logit_rows) * model.hidden, model.hidden, model.head.weights,
                       model.hidden, ld / kBlock, logit_rows, me, all, [=](int t, int o, const auto& v) {
                         for (int n = 0; n < int(sizeof(v) / sizeof(Vec)); ++n)
                           store(to + int64_t(t) * ld + o + n * kBlock, v[n] * splat(s[t]));
                       });
    }
  }

 private:
  static void barrier() {
#pragma omp barrier
  }

  // The residual stream as the next linear reads it, and the scale that its norm is.
  void prepare(const float* gain, int from, int me) {
    const int n = model.hidden;
    const Share mine(tokens - from, me, all);
    for (int t = from + mine.begin; t < from + mine.end; ++t) {
      const float* row = x + int64_t(t) * n;
      scale[t] = float(1 / std::sqrt(sum_of_squares(row, n) / n + model.eps));
      Activation* to = in + int64_t(t) * n;
      if (gain) {
        alignas(64) float scaled[256];
        for (int i = 0; i < n; i += 256) {
          const int count = std::min(256, n - i);
          for (int j = 0; j < count; ++j) scaled[j] = row[i + j] * gain[i + j];
          put(to + i, scaled, count);
        }
      } else {
        put(to, row, n);
      }
    }
    barrier();
  }

  bool scales_cancel(const FlashnormLayer& layer) const { return !layer.qkv.bias && (layer.q_gain || layer.rotate); }

  void project(const FlashnormLayer& layer, int me) {
    // q and k stay without their scale if what follows can take it; v never does.
    const int scaled_from = scales_cancel(layer) ? q_size + kv_size : 0;
    const float* bias = layer.qkv.bias;
    linear<L, kWide>(in, model.hidden, layer.qkv.weights, model.hidden, ldqkv / kBlock, tokens, me, all,
                     [=, this](int t, int o, const auto& v) {
                       for (int n = 0; n < int(sizeof(v) / sizeof(Vec)); ++n) {
                         const int at = o + n * kBlock;
                         Vec y = at < scaled_from ? v[n] : v[n] * splat(scale[t]);
                         if (bias) y = y + load(bias + at);
                         store(qkv + int64_t(t) * ldqkv + at, y);
                       }
                     });
    barrier();
  }

  // The norms and the rotation of a head; `s` is the scale that is still to be applied.
  void rotate_head(float* head, const float* gain, bool rotates, int t, float s) const {
    const int d = model.head_dim, half = model.rotary / 2;
    if (gain) {  // eps would have been added to (s q)^2: it is eps / s^2 here
      s = float(1 / std::sqrt(sum_of_squares(head, d) / d + model.qk_eps / (double(s) * s)));
      for (int i = 0; i < d; ++i) head[i] *= gain[i];
    }
    const float *c = cos + int64_t(t) * half, *n = sin + int64_t(t) * half;
    int from = 0;
    if (rotates) {
      from = 2 * half;
      for (int i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half], cs = c[i] * s, sn = n[i] * s;
        head[i] = a * cs - b * sn;
        head[i + half] = b * cs + a * sn;
      }
    }
    for (int i = from; i < d; ++i) head[i] *= s;
  }

  void rotate(const FlashnormLayer& layer, int me) {
    const Cache<C> cache{model.head_dim, model.capacity};
    const int d = model.head_dim, each = model.heads + model.kv_heads;
    const bool cancel = scales_cancel(layer);
    const Share mine(tokens * each, me, all);
    for (int task = mine.begin; task < mine.end; ++task) {
      const int t = task / each, h = task % each;
      float* row = qkv + int64_t(t) * ldqkv;
      const float s = cancel ? scale[t] : 1;
      if (h < model.heads) {
        float* q = row + h * d;
        rotate_head(q, layer.q_gain, layer.rotate, t, s);
        for (int i = 0; i < d; ++i) q[i] *= model.attention_scale;
        continue;
      }
      const int kv = h - model.heads, position = past + t;
      float* k = row + q_size + kv * d;
      const float* v = row + q_size + kv_size + kv * d;
      rotate_head(k, layer.k_gain, layer.rotate, t, s);
      Stored* keys = static_cast<Stored*>(layer.keys) + kv * cache.size();
      Stored* values = static_cast<Stored*>(layer.values) + kv * cache.size();
      for (int i = 0; i < d; ++i) cache.key(keys, position, i) = C::from_float(k[i]);
      for (int i = 0; i < d; ++i) cache.value(values, position, i) = C::from_float(v[i]);
    }
    barrier();
  }

  void attention(const FlashnormLayer& layer, int me) {
    const Cache<C> cache{model.head_dim, model.capacity};
    const int g = group(), d = model.head_dim, rows_of_head = tokens * g;
    const int tasks = model.kv_heads * tiles * splits;
    for (int task = me; task < tasks; task += all) {  // neighbours are of different length: take turns
      const int split = task % splits, tile = task / splits % tiles, kv = task / splits / tiles;
      const int from_row = tile * kTokens, rows = std::min(kTokens, rows_of_head - from_row);
      alignas(64) float q[kTokens * 256];
      int first[kTokens], last[kTokens];
      for (int r = 0; r < rows; ++r) {
        const int t = (from_row + r) / g, h = kv * g + (from_row + r) % g;
        memcpy(q + r * d, qkv + int64_t(t) * ldqkv + h * d, d * sizeof(float));
        last[r] = past + t;
        first[r] = layer.window > 0 ? std::max(0, past + t - layer.window + 1) : 0;
      }
      const int low = first[0] / kSpan, high = last[rows - 1] / kSpan + 1;
      const int begin = (low + (high - low) * split / splits) * kSpan;
      const int end = std::min((low + (high - low) * (split + 1) / splits) * kSpan, last[rows - 1] + 1);
      attend<C>(cache, static_cast<const Stored*>(layer.keys) + kv * cache.size(),
                static_cast<const Stored*>(layer.values) + kv * cache.size(), q, d, rows, first, last, begin, end,
                partial_out + int64_t(task) * kTokens * d, partial + int64_t(task) * kTokens);
    }
    barrier();
  }

  // What the splits of a row found, together, as the output projection reads it.
  void merge(int me) {
    const int g = group(), d = model.head_dim;
    const Share mine(tokens * model.heads, me, all);
    alignas(64) float sum[256];
    for (int i = mine.begin; i < mine.end; ++i) {
      const int t = i / model.heads, h = i % model.heads, kv = h / g, row = t * g + h % g;
      const int64_t task = (int64_t(kv) * tiles + row / kTokens) * splits;
      float largest = -INFINITY, total = 0;
      for (int s = 0; s < splits; ++s) largest = std::max(largest, partial[(task + s) * kTokens + row % kTokens].largest);
      memset(sum, 0, sizeof sum);
      for (int s = 0; s < splits; ++s) {
        const int64_t at = (task + s) * kTokens + row % kTokens;
        if (partial[at].largest == -INFINITY) continue;
        const float weight = std::exp(partial[at].largest - largest);
        total += weight * partial[at].total;
        for (int c = 0; c < d; ++c) sum[c] += weight * partial_out[at * d + c];
      }
      for (int c = 0; c < d; ++c) sum[c] /= total;
      put(in + int64_t(t) * q_size + h * d, sum, d);
    }
    barrier();
  }

  void add(const FlashnormLinear& to, const Activation* from, int ld, int me) {
    const float* bias = to.bias;
    const float by = model.residual_scale;
    float* x = this->x;
    const int n = model.hidden;
    linear<L, kWide>(from, ld, to.weights, to.in, n / kBlock, tokens, me, all, [=](int t, int o, const auto& v) {
      for (int i = 0; i < int(sizeof(v) / sizeof(Vec)); ++i) {
        float* at = x + int64_t(t) * n + o + i * kBlock;
        Vec y = bias ? v[i] + load(bias + o + i * kBlock) : v[i];
        store(at, load(at) + y * splat(by));
      }
    });
    barrier();
  }

  // Blocks of gate and up projection take turns.
  void gate_up(const FlashnormLayer& layer, int me) {
    const int ld = padded(model.inner);
    const float* bias = layer.gate_up.bias;
    linear<L, 2>(in, model.hidden, layer.gate_up.weights, model.hidden, 2 * ld / kBlock, tokens, me, all,
                 [=, this](int t, int o, const auto& v) {
                   Vec gate = v[0] * splat(scale[t]), up = v[sizeof(v) / sizeof(Vec) - 1] * splat(scale[t]);
                   if (bias) {
                     gate = gate + load(bias + o);
                     up = up + load(bias + o + kBlock);
                   }
                   put(inner + int64_t(t) * ld + o / 2, apply(model.activation, gate) * up);
                 });
    barrier();
  }
};

}  // namespace FLASHNORM_ISA
