// A decoder of pre-normalised layers, in one parallel region for all of them, or a part of one layer.
//
// Norms are deferred: a linear reads the residual stream x as it is, W x is scaled by 1 / r(x) afterwards. Where q and
// k are normalised themselves, their scale cancels; where they are rotated, it goes along with the rotation.
#pragma once

#include <atomic>
#include <thread>

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

inline double sum_of_squares(const float* x, int count) {
  constexpr int kSums = 4, kPart = 16 * kSums * kBlock;
  double total = 0;
  const int whole = count / (kSums * kBlock) * (kSums * kBlock);
  for (int i = 0; i < whole; i += kPart) {
    Vec sums[kSums];
    for (Vec& sum : sums) sum = splat(0);
    for (int j = i; j < std::min(whole, i + kPart); j += kSums * kBlock)
      for (int k = 0; k < kSums; ++k) {
        const Vec v = load(x + j + k * kBlock);
        multiply_add(sums[k], v, v);
      }
    total += sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (int i = whole; i < count; ++i) total += x[i] * x[i];
  return total;
}

// Threads wait here for each other. They are there within microseconds, unless someone else has their processor: so
// waiting starts busily, and then lets others run. (OpenMP's own barrier spins for milliseconds.)
class Barrier {
 public:
  void wait(int all) {
    const int turn = turns.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == all - 1) {
      arrived.store(0, std::memory_order_relaxed);
      turns.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; turns.load(std::memory_order_acquire) == turn; ++i) {
      if (i > kSpins)
        std::this_thread::yield();
      else
        relax();
    }
  }

 private:
  static constexpr int kSpins = 1000;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> turns{0};

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

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

// K: how linears are computed; its weights are stored as the cache is.
template <class K>
struct Decoder {
  using Activation = typename K::Activation;
  using C = typename K::Weights;
  using Stored = typename C::Element;

  const FlashnormModel& model;
  const FlashnormCall& call;
  const int rows;  // of x: texts one after the other
  int all;         // threads
  float *const x, *const logits;

  int q_size, kv_size, ld_hidden, ld_q, ld_inner, ld_qkv, splits, tiles;
  int64_t scratch_size;
  Activation *in, *inner;  // what the next linear reads
  float *scale, *qkv, *partial_out;
  Partial* partial;
  char* scratch;

  Decoder(const FlashnormModel& m, const FlashnormCall& c)
      : model(m), call(c), rows(c.texts * c.tokens), all(c.threads), x(c.x), logits(c.logits) {
    q_size = m.heads * m.head_dim;
    kv_size = m.kv_heads * m.head_dim;
    ld_hidden = row_size(m.hidden);
    ld_q = row_size(q_size);
    ld_inner = row_size(m.inner);
    ld_qkv = q_size + 2 * kv_size;
    scratch_size = int64_t(std::max({ld_hidden, ld_q, ld_inner})) * 2 * kBlock * K::kPackedSize;
    tiles = splits = 0;
    if (m.layer_count > 0) {
      int longest = 0;
      for (int i = 0; i < c.texts; ++i) longest = std::max(longest, c.past[i]);
      tiles = (c.tokens * group() + kTokens - 1) / kTokens;
      const int spans = (longest + c.tokens + kSpan - 1) / kSpan;
      splits = std::max(1, std::min(spans / 2, 2 * all / (tiles * m.kv_heads * c.texts)));
    }
  }

  // As many as there are in the end, which may be fewer than were asked for.
  void set_threads(int count) { all = count; }

  int group() const { return model.heads / model.kv_heads; }

  int64_t lay_out(char* memory, FlashnormPart part) {
    Arena arena{memory};
    in = arena.take<Activation>(int64_t(rows) * std::max(ld_hidden, ld_q));
    inner = arena.take<Activation>(int64_t(rows) * ld_inner);
    scale = arena.take<float>(rows);
    qkv = arena.take<float>(int64_t(rows) * ld_qkv);
    const int64_t tasks = part == kAll ? int64_t(call.texts) * model.kv_heads * tiles * splits : 0;
    partial_out = arena.take<float>(tasks * kTokens * model.head_dim);
    partial = arena.take<Partial>(tasks * kTokens);
    scratch = arena.take<char>(all * scratch_size);
    return arena.at - memory;
  }

  // Everything.
  void run(int me) {
    for (int i = 0; i < model.layer_count; ++i) {
      const FlashnormLayer& layer = model.layers[i];
      prepare(layer.attention_gain, 0, true, me);
      project(layer, me);
      rotate(layer, me);
      attention(layer, me);
      merge(me);
      feed_forward(layer, me);
    }
    if (call.logit_rows > 0) {
      const int from = rows - call.logit_rows;
      prepare(model.final_gain, from, model.final_norm, me);
      project(model.head, in + int64_t(from) * ld_hidden, scale + from, logits, padded(model.head.out), call.logit_rows,
              me);
    }
  }

  // The head on its own, from and to numbers of the weights' type.
  void norm_linear(int me) {
    const int n = model.hidden, out = model.head.out;
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      const Stored* from = static_cast<const Stored*>(call.input) + int64_t(t) * n;
      float* row = x + int64_t(t) * n;
      int i = 0;
      for (; i + kBlock <= n; i += kBlock) store(row + i, C::load(from + i));
      for (; i < n; ++i) row[i] = C::to_float(from[i]);
      read_row(model.final_gain, t, model.final_norm);
    }
    barrier();
    Stored* y = static_cast<Stored*>(call.output);
    const float *bias = model.head.bias, *s = scale;
    linear<K>(in, ld_hidden, model.head.weights, n, out, rows, my_scratch(me), me, all, [=](int t, int o, const auto& v) {
      for (int b = 0; b < int(sizeof(v) / sizeof(Vec)); ++b, o += kBlock) {
        Vec at = v[b] * splat(s[t]);
        if (bias) at = at + load(bias + o);
        Stored* to = y + int64_t(t) * out + o;
        if (o + kBlock <= out) {
          C::store(to, at);
        } else {
          Stored last[kBlock];
          C::store(last, at);
          memcpy(to, last, (out - o) * sizeof(Stored));
        }
      }
    });
  }

  // The first layer's queries, keys and values, for someone else's cache and attention.
  void attention_inputs(int me) {
    qkv = call.projected;
    prepare(model.layers->attention_gain, 0, true, me);
    project(*model.layers, me);
    rotate(*model.layers, me);
  }

  // What comes after the attention of the first layer.
  void after_attention(int me) {
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      put(in + int64_t(t) * ld_q, call.projected + int64_t(t) * q_size, q_size);
      pad(in + int64_t(t) * ld_q, q_size);
    }
    barrier();
    feed_forward(*model.layers, me);
  }

 private:
  Barrier meeting;

  void barrier() { meeting.wait(all); }

  void* my_scratch(int me) const { return scratch + me * scratch_size; }

  static void pad(Activation* row, int count) { std::fill(row + count, row + row_size(count), Activation(0)); }

  void feed_forward(const FlashnormLayer& layer, int me) {
    add(layer.output, in, ld_q, me);
    prepare(layer.mlp_gain, 0, true, me);
    gate_up(layer, me);
    add(layer.down, inner, ld_inner, me);
  }

  // The residual stream as the next linear reads it, and the scale that its norm is.
  void prepare(const float* gain, int from, bool norm, int me) {
    const Share mine(rows - from, me, all);
    for (int t = from + mine.begin; t < from + mine.end; ++t) read_row(gain, t, norm);
    barrier();
  }

  void read_row(const float* gain, int t, bool norm) {
    const int n = model.hidden;
    const float* row = x + int64_t(t) * n;
    scale[t] = norm ? float(1 / std::sqrt(sum_of_squares(row, n) / n + model.eps)) : 1.0f;
    Activation* to = in + int64_t(t) * ld_hidden;
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
    pad(to, n);
  }

  // y = s (W x) + c. Without `s`, the scale is left to what follows.
  void project(const FlashnormLinear& by, const Activation* from, const float* s, float* y, int ld, int count, int me) {
    const float* bias = by.bias;
    linear<K>(from, ld_hidden, by.weights, model.hidden, by.out, count, my_scratch(me), me, all,
              [=](int t, int o, const auto& v) {
                for (int n = 0; n < int(sizeof(v) / sizeof(Vec)); ++n) {
                  Vec at = s ? v[n] * splat(s[t]) : v[n];
                  if (bias) at = at + load(bias + o + n * kBlock);
                  store(y + int64_t(t) * ld + o + n * kBlock, at);
                }
              });
  }

  bool scales_cancel(const FlashnormLayer& layer) const {
    return !layer.q.bias && !layer.k.bias && (layer.q_gain || layer.rotate);
  }

  // q and k stay without their scale if what follows can take it; v never does.
  void project(const FlashnormLayer& layer, int me) {
    const float* s = scales_cancel(layer) ? nullptr : scale;
    project(layer.q, in, s, qkv, ld_qkv, rows, me);
    project(layer.k, in, s, qkv + q_size, ld_qkv, rows, me);
    project(layer.v, in, scale, qkv + q_size + kv_size, ld_qkv, rows, me);
    barrier();
  }

  // The norms and the rotation of a head; `s` is the scale that is still to be applied.
  void rotate_head(float* head, const float* gain, bool rotates, int position, float s) const {
    const int d = model.head_dim, half = model.rotary / 2;
    if (gain) {  // eps would have been added to (s q)^2: it is eps / s^2 here
      s = float(1 / std::sqrt(sum_of_squares(head, d) / d + model.qk_eps / (double(s) * s)));
      for (int i = 0; i < d; ++i) head[i] *= gain[i];
    }
    const float *c = call.cos + int64_t(position) * half, *n = call.sin + int64_t(position) * half;
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
    const Cache<typename K::Tile> cache{model.head_dim, model.capacity};
    const int d = model.head_dim, each = model.heads + model.kv_heads;
    const bool cancel = scales_cancel(layer);
    const Share mine(rows * each, me, all);
    for (int task = mine.begin; task < mine.end; ++task) {
      const int t = task / each, h = task % each, text = t / call.tokens;
      const int position = call.past[text] + t % call.tokens;
      float* row = qkv + int64_t(t) * ld_qkv;
      float* head = row + h * d;
      const bool query = h < model.heads;
      rotate_head(head, query ? layer.q_gain : layer.k_gain, layer.rotate, position, cancel ? scale[t] : 1);
      if (query || !layer.keys) continue;
      const int kv = h - model.heads;
      const float* v = row + q_size + kv_size + kv * d;
      const int64_t at = (int64_t(call.first_text + text) * model.kv_heads + kv) * cache.size();
      Stored* keys = static_cast<Stored*>(layer.keys) + at;
      Stored* values = static_cast<Stored*>(layer.values) + at;
      for (int i = 0; i < d; ++i) cache.key(keys, position, i) = C::from_float(head[i]);
      for (int i = 0; i < d; ++i) cache.value(values, position, i) = C::from_float(v[i]);
      if (K::Tile::kStep == 2 && position % 2 == 0 && t % call.tokens == call.tokens - 1)
        for (int i = 0; i < d; ++i) cache.value(values, position + 1, i) = 0;  // is read, times zero
    }
    barrier();
  }

  void attention(const FlashnormLayer& layer, int me) {
    const Cache<typename K::Tile> cache{model.head_dim, model.capacity};
    const int g = group(), d = model.head_dim, rows_of_head = call.tokens * g;
    const int tasks = call.texts * model.kv_heads * tiles * splits;
    for (int task = me; task < tasks; task += all) {  // neighbours are of different length: take turns
      const int split = task % splits, tile = task / splits % tiles, head = task / splits / tiles;
      const int kv = head % model.kv_heads, text = head / model.kv_heads, past = call.past[text];
      const int from_row = tile * kTokens, count = std::min(kTokens, rows_of_head - from_row);
      alignas(64) typename K::Tile::Activation q[kTokens * kMostHeadDim];
      int first[kTokens], last[kTokens];
      for (int r = 0; r < count; ++r) {
        const int t = (from_row + r) / g, h = kv * g + (from_row + r) % g;
        const float* from = qkv + (int64_t(text) * call.tokens + t) * ld_qkv + h * d;
        for (int i = 0; i < d; i += kBlock) put(q + r * d + i, load(from + i) * splat(model.attention_scale));
        last[r] = past + t;
        first[r] = layer.window > 0 ? std::max(0, past + t - layer.window + 1) : 0;
      }
      const int low = first[0] / kSpan, high = last[count - 1] / kSpan + 1;
      const int begin = (low + (high - low) * split / splits) * kSpan;
      const int end = std::min((low + (high - low) * (split + 1) / splits) * kSpan, last[count - 1] + 1);
      const int64_t at = (int64_t(call.first_text) * model.kv_heads + head) * cache.size();
      attend<typename K::Tile>(cache, static_cast<const Stored*>(layer.keys) + at, static_cast<const Stored*>(layer.values) + at, q, d,
                count, first, last, begin, end,
                partial_out + int64_t(task) * kTokens * d, partial + int64_t(task) * kTokens);
    }
    barrier();
  }

  // What the splits of a row found, together, as the output projection reads it.
  void merge(int me) {
    const int g = group(), d = model.head_dim;
    const Share mine(rows * model.heads, me, all);
    alignas(64) float sum[kMostHeadDim];
    for (int i = mine.begin; i < mine.end; ++i) {
      const int t = i / model.heads, h = i % model.heads, text = t / call.tokens;
      const int row = t % call.tokens * g + h % g;
      const int64_t task = (int64_t(text * model.kv_heads + h / g) * tiles + row / kTokens) * splits;
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
      Activation* to = in + int64_t(t) * ld_q;
      put(to + h * d, sum, d);
      if (h == 0) pad(to, q_size);
    }
    barrier();
  }

  void add(const FlashnormLinear& to, const Activation* from, int ld, int me) {
    const float* bias = to.bias;
    const float by = model.residual_scale;
    float* x = this->x;
    const int n = model.hidden;
    linear<K>(from, ld, to.weights, to.in, n, rows, my_scratch(me), me, all, [=](int t, int o, const auto& v) {
      for (int i = 0; i < int(sizeof(v) / sizeof(Vec)); ++i) {
        float* at = x + int64_t(t) * n + o + i * kBlock;
        Vec y = bias ? v[i] + load(bias + o + i * kBlock) : v[i];
        store(at, load(at) + y * splat(by));
      }
    });
    barrier();
  }

  void gate_up(const FlashnormLayer& layer, int me) {
    const float *gate_bias = layer.gate.bias, *up_bias = layer.up.bias;
    pair_of_linears<K>(in, ld_hidden, layer.gate.weights, layer.up.weights, model.hidden, model.inner, rows,
                       my_scratch(me), me, all, [=, this](int t, int o, const Vec(&v)[2]) {
                         Vec gate = v[0] * splat(scale[t]), up = v[1] * splat(scale[t]);
                         if (gate_bias) gate = gate + load(gate_bias + o);
                         if (up_bias) up = up + load(up_bias + o);
                         Activation* row = inner + int64_t(t) * ld_inner;
                         put(row + o, apply(model.activation, gate) * up);
                         if (o + kBlock >= model.inner) pad(row, padded(model.inner));
                       });
    barrier();
  }
};

}  // namespace FLASHNORM_ISA
