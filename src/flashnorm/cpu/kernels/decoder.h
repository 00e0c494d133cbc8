// A decoder of pre-normalised layers, all computed in one parallel region, or a part of one layer.
//
// Norms are deferred: a linear layer reads the residual stream x as it is, and W x is scaled by 1 / r(x) afterwards. If
// q and k have norms of their own, this scale cancels; if RoPE rotates them, the rotation applies the scale.
//
// The rows that chose an expert are gathered, and computed like those of any gated MLP. Each thread owns some channels of
// the residual stream, and adds the experts one after another: sums do not depend on the number of threads.
#pragma once

#include <atomic>
#include <thread>
#include <type_traits>

#include "api.h"
#include "arena.h"
#include "attention.h"
#include "experts.h"

namespace FLASHNORM_ISA {

inline Vec apply(int32_t activation, Vec x) {
  const Vec one = splat(1);
  switch (activation) {
    case kSilu:
      return x / (one + exp(x * splat(-1)));
    case kGeluTanh:
      return splat(0.5f) * x * (one + tanh(x * (splat(0.7978845608f) + splat(0.7978845608f * 0.044715f) * x * x)));
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

// Threads wait here for each other. All arrive within microseconds, unless another process has the processor of one of
// them. So a thread first spins, and then yields to others. (OpenMP's own barrier spins for milliseconds.)
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

// K: how linear layers are computed (`Few` or `Many`); its weights are stored in the same dtype as the cache.
template <class K>
struct Decoder {
  using Activation = typename K::Activation;
  using C = typename K::Weights;
  using Stored = typename C::Element;
  using Exact = Few<C, typename K::Tile>;  // reads activations in float32
  static constexpr bool kExact = std::is_same_v<Activation, float>;
  static constexpr int kTogether = 256;  // rows of experts that are computed together, if there are fewer tokens

  const FlashnormModel& model;
  const FlashnormStep& step;
  const int rows;  // rows of x: the tokens of all sequences, one sequence after another
  int all;         // number of threads
  float *const x, *const logits;

  int q_size, kv_size, ld_hidden, ld_q, ld_intermediate, ld_expert, ld_scores, ld_qkv, splits, tiles;
  int most_experts, most_per_token;  // of a layer; 0: no layer has experts
  int64_t gathered_rows, scratch_size;
  Activation *in, *intermediate;  // inputs of the next linear layer
  float *scale, *qkv, *partial_out;
  float *addend;       // what is normalised before it is added to x
  float *heads_scale;  // [rows][q, k]: scales of norms over all heads
  Partial* partial;
  Routing routing;
  float* exact;         // [rows][ld_hidden]: `in` in float32, if there are experts
  float* scores;        // [rows][ld_scores]: of the experts
  float* shared_scale;  // [rows][kBlock]: the factor of the MLP beside the experts, first of each block
  char *gathered, *expert_intermediate;  // activations of experts: rows of floats, or of `Activation`
  char* scratch;

  Decoder(const FlashnormModel& m, const FlashnormStep& c)
      : model(m), step(c), rows(c.sequences * c.tokens), all(c.threads), x(c.x), logits(c.logits) {
    q_size = m.heads * m.head_dim;
    kv_size = m.kv_heads * m.head_dim;
    ld_hidden = row_size(m.hidden);
    ld_q = row_size(q_size);
    int inner = 0, of_expert = 0;
    most_experts = most_per_token = 0;
    for (int i = 0; i < m.layer_count; ++i) {
      const FlashnormLayer& layer = m.layers[i];
      if (layer.gate.weights) inner = std::max(inner, layer.gate.out);
      if (!layer.router.weights) continue;
      of_expert = std::max(of_expert, layer.experts_out.in);
      most_experts = std::max(most_experts, layer.router.out);
      most_per_token = std::max(most_per_token, layer.experts_per_token);
    }
    ld_intermediate = row_size(inner);
    ld_expert = row_size(of_expert);
    ld_scores = padded(most_experts);
    gathered_rows = std::min(int64_t(rows) * most_per_token, int64_t(rows) + kTogether);
    ld_qkv = q_size + 2 * kv_size;
    scratch_size = int64_t(std::max({ld_hidden, ld_q, ld_intermediate, ld_expert})) * 2 * kBlock * K::kPackedSize;
    tiles = splits = 0;
    if (m.layer_count > 0) {
      int longest = 0;
      for (int i = 0; i < c.sequences; ++i) longest = std::max(longest, c.past[i]);
      tiles = (c.tokens * group() + kTokens - 1) / kTokens;
      const int spans = (longest + c.tokens + kSpan - 1) / kSpan;
      splits = std::max(1, std::min(spans / 2, 2 * all / (tiles * m.kv_heads * c.sequences)));
    }
  }

  // OpenMP may start fewer threads than were asked for.
  void set_threads(int count) { all = count; }

  int group() const { return model.heads / model.kv_heads; }

  int64_t lay_out(char* memory, FlashnormPart part) {
    Arena arena{memory};
    in = arena.take<Activation>(int64_t(rows) * std::max(ld_hidden, ld_q));
    intermediate = arena.take<Activation>(int64_t(rows) * ld_intermediate);
    scale = arena.take<float>(rows);
    qkv = arena.take<float>(int64_t(rows) * ld_qkv);
    const int64_t tasks = part == kAll ? int64_t(step.sequences) * model.kv_heads * tiles * splits : 0;
    addend = arena.take<float>(normalises_after() ? int64_t(rows) * model.hidden : 0);
    heads_scale = arena.take<float>(model.norm_all_heads ? 2 * int64_t(rows) : 0);
    partial_out = arena.take<float>(tasks * kTokens * model.head_dim);
    partial = arena.take<Partial>(tasks * kTokens);
    scratch = arena.take<char>(all * scratch_size);
    if (most_experts) {
      routing.lay_out(arena, rows, most_experts, most_per_token);
      scores = arena.take<float>(int64_t(rows) * ld_scores);
      shared_scale = arena.take<float>(int64_t(rows) * kBlock);
      gathered = arena.take<char>(gathered_rows * ld_hidden * sizeof(float));
      expert_intermediate = arena.take<char>(gathered_rows * ld_expert * sizeof(float));
      if constexpr (kExact)
        exact = in;
      else
        exact = arena.take<float>(int64_t(rows) * ld_hidden);
    }
    return arena.at - memory;
  }

  // All layers, and the head.
  void run(int me) {
    const float* after = nullptr;
    for (int i = 0; i < model.layer_count; ++i) {
      const FlashnormLayer& layer = model.layers[i];
      prepare(layer.attention_gain, 0, model.norm_before, after, me);
      project(layer, me);
      rotate(layer, me);
      attention(layer, me);
      merge(me);
      feed_forward(layer, me);
      after = layer.mlp_after;
    }
    if (step.logit_rows > 0) {
      const int from = rows - step.logit_rows;
      prepare(model.final_gain, from, model.final_norm, after, me);
      project(model.head, in + int64_t(from) * ld_hidden, scale + from, logits, padded(model.head.out), step.logit_rows,
              me);
    }
  }

  // A norm and the head alone; inputs and outputs are in the weights' dtype.
  void norm_linear(int me) {
    const int n = model.hidden, out = model.head.out;
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      const Stored* from = static_cast<const Stored*>(step.input) + int64_t(t) * n;
      float* row = x + int64_t(t) * n;
      int i = 0;
      for (; i + kBlock <= n; i += kBlock) store(row + i, C::load(from + i));
      for (; i < n; ++i) row[i] = C::to_float(from[i]);
      read_row(model.final_gain, t, model.final_norm);
    }
    barrier();
    Stored* y = static_cast<Stored*>(step.output);
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

  // The first layer's queries, keys and values; the caller computes attention with its own cache.
  void attention_inputs(int me) {
    qkv = step.projected;
    prepare(model.layers->attention_gain, 0, model.norm_before, nullptr, me);
    project(*model.layers, me);
    rotate(*model.layers, me);
  }

  // The rest of the first layer after attention.
  void after_attention(int me) {
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      put(in + int64_t(t) * ld_q, step.projected + int64_t(t) * q_size, q_size);
      pad(in + int64_t(t) * ld_q, q_size);
    }
    barrier();
    feed_forward(*model.layers, me);
    if (const float* after = model.layers->mlp_after)
      for (int t = mine.begin; t < mine.end; ++t) add_normalised(after, t);
  }

 private:
  Barrier meeting;

  void barrier() { meeting.wait(all); }

  void* my_scratch(int me) const { return scratch + me * scratch_size; }

  template <class A>
  static void pad(A* row, int count) {
    std::fill(row + count, row + row_size(count), A(0));
  }

  bool normalises_after() const {
    for (int i = 0; i < model.layer_count; ++i)
      if (model.layers[i].attention_after || model.layers[i].mlp_after) return true;
    return false;
  }

  void feed_forward(const FlashnormLayer& layer, int me) {
    add(layer.output, in, ld_q, layer.attention_after, nullptr, me);
    prepare(layer.mlp_gain, 0, model.norm_before, layer.attention_after, me);
    const bool mixture = layer.router.weights;
    if (mixture) route(layer, me);
    if (layer.gate.weights) {
      gated<K>(in, layer.gate.weights, layer.up.weights, layer.gate.bias, layer.up.bias, layer.gate.out, rows, -1,
               intermediate, ld_intermediate, me, me);
      barrier();
      add(layer.down, intermediate, ld_intermediate, layer.mlp_after, layer.shared_gate.weights ? shared_scale : nullptr, me);
    }
    if (mixture) add_experts(layer, me);
  }

  // Converts the residual stream for the next linear layer, and computes the scale 1 / r(x) of its norm.
  // `after`: gains of a norm whose output must first be added to the residual stream; or null.
  void prepare(const float* gain, int from, bool norm, const float* after, int me) {
    const Share mine(rows - from, me, all);
    for (int t = from + mine.begin; t < from + mine.end; ++t) {
      if (after) add_normalised(after, t);
      read_row(gain, t, norm);
    }
    barrier();
  }

  // Adds RMSNorm(addend) to the residual stream of one row.
  void add_normalised(const float* gain, int t) {
    const int n = model.hidden;
    const float* y = addend + int64_t(t) * n;
    float* to = x + int64_t(t) * n;
    const float s = float(model.residual_scale / std::sqrt(sum_of_squares(y, n) / n + model.eps));
    for (int i = 0; i < n; ++i) to[i] += y[i] * s * gain[i];
  }

  void read_row(const float* gain, int t, bool norm) {
    const int n = model.hidden;
    const float* row = x + int64_t(t) * n;
    scale[t] = norm ? float(1 / std::sqrt(sum_of_squares(row, n) / n + model.eps)) : 1.0f;
    Activation* to = in + int64_t(t) * ld_hidden;
    float* too = !kExact && most_experts ? exact + int64_t(t) * ld_hidden : nullptr;
    if (gain) {
      alignas(64) float scaled[256];
      for (int i = 0; i < n; i += 256) {
        const int count = std::min(256, n - i);
        for (int j = 0; j < count; ++j) scaled[j] = row[i + j] * gain[i + j];
        put(to + i, scaled, count);
        if (too) put(too + i, scaled, count);
      }
    } else {
      put(to, row, n);
      if (too) put(too, row, n);
    }
    pad(to, n);
    if (too) pad(too, n);
  }

  // y = s (W x) + c. If `s` is null, a later step applies the scale.
  template <class E = K>
  void project(const FlashnormLinear& by, const typename E::Activation* from, const float* s, float* y, int ld, int count,
               int me) {
    const float* bias = by.bias;
    linear<E>(from, ld_hidden, by.weights, model.hidden, by.out, count, my_scratch(me), me, all,
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

  // q and k are left unscaled if their norms or RoPE can apply the scale; v is always scaled here.
  void project(const FlashnormLayer& layer, int me) {
    const float* s = scales_cancel(layer) ? nullptr : scale;
    project(layer.q, in, s, qkv, ld_qkv, rows, me);
    project(layer.k, in, s, qkv + q_size, ld_qkv, rows, me);
    project(layer.v, in, scale, qkv + q_size + kv_size, ld_qkv, rows, me);
    barrier();
    if (!model.norm_all_heads || !layer.q_gain) return;
    const bool cancel = scales_cancel(layer);
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      const float* row = qkv + int64_t(t) * ld_qkv;
      heads_scale[2 * t] = norm_scale(row, q_size, cancel ? scale[t] : 1);
      heads_scale[2 * t + 1] = norm_scale(row + q_size, kv_size, cancel ? scale[t] : 1);
    }
    barrier();
  }

  // The scale of RMSNorm(s q) for the unscaled q: it adds eps to mean((s q)^2), which is eps / s^2 for q.
  float norm_scale(const float* q, int count, float s) const {
    return float(1 / std::sqrt(sum_of_squares(q, count) / count + model.qk_eps / (double(s) * s)));
  }

  // RoPE of a head, by one of the tables; `s` is the scale that must still be applied, `gain` that of the head's norm.
  void rotate_head(float* head, const float* gain, const FlashnormLayer& layer, int position, float s) const {
    const int d = model.head_dim, half = model.rotary / 2;
    if (gain)
      for (int i = 0; i < d; ++i) head[i] *= gain[i];
    const int64_t at = (int64_t(layer.table) * step.positions + position) * half;
    const float *c = step.cos + at, *n = step.sin + at;
    int from = 0;
    if (layer.rotate) {
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
      const int t = task / each, h = task % each, sequence = t / step.tokens;
      const int position = step.past[sequence] + t % step.tokens;
      float* row = qkv + int64_t(t) * ld_qkv;
      float* head = row + h * d;
      const bool query = h < model.heads;
      const float* gain = query ? layer.q_gain : layer.k_gain;
      float s = cancel ? scale[t] : 1;
      if (gain && model.norm_all_heads) {
        s = heads_scale[2 * t + !query];
        gain += (query ? h : h - model.heads) * d;
      } else if (gain) {
        s = norm_scale(head, d, s);
      }
      rotate_head(head, gain, layer, position, s);
      if (query || !layer.keys) continue;
      const int kv = h - model.heads;
      const float* v = row + q_size + kv_size + kv * d;
      const int64_t at = (int64_t(step.first_sequence + sequence) * model.kv_heads + kv) * cache.size();
      Stored* keys = static_cast<Stored*>(layer.keys) + at;
      Stored* values = static_cast<Stored*>(layer.values) + at;
      for (int i = 0; i < d; ++i) cache.key(keys, position, i) = C::from_float(head[i]);
      for (int i = 0; i < d; ++i) cache.value(values, position, i) = C::from_float(v[i]);
      if (K::Tile::kStep == 2 && position % 2 == 0 && t % step.tokens == step.tokens - 1)
        for (int i = 0; i < d; ++i) cache.value(values, position + 1, i) = 0;  // read, times zero: no NaN
    }
    barrier();
  }

  void attention(const FlashnormLayer& layer, int me) {
    const Cache<typename K::Tile> cache{model.head_dim, model.capacity};
    const int g = group(), d = model.head_dim, rows_of_head = step.tokens * g;
    const int tasks = step.sequences * model.kv_heads * tiles * splits;
    for (int task = me; task < tasks; task += all) {  // tasks take unequal time, so threads take them in turn
      const int split = task % splits, tile = task / splits % tiles, head = task / splits / tiles;
      const int kv = head % model.kv_heads, sequence = head / model.kv_heads, past = step.past[sequence];
      const int from_row = tile * kTokens, count = std::min(kTokens, rows_of_head - from_row);
      alignas(64) typename K::Tile::Activation q[kTokens * kMostHeadDim];
      int first[kTokens], last[kTokens];
      for (int r = 0; r < count; ++r) {
        const int t = (from_row + r) / g, h = kv * g + (from_row + r) % g;
        const float* from = qkv + (int64_t(sequence) * step.tokens + t) * ld_qkv + h * d;
        for (int i = 0; i < d; i += kBlock) put(q + r * d + i, load(from + i) * splat(model.attention_scale));
        last[r] = past + t;
        first[r] = layer.window > 0 ? std::max(0, past + t - layer.window + 1) : 0;
      }
      const int low = first[0] / kSpan, high = last[count - 1] / kSpan + 1;
      const int begin = (low + (high - low) * split / splits) * kSpan;
      const int end = std::min((low + (high - low) * (split + 1) / splits) * kSpan, last[count - 1] + 1);
      const int64_t at = (int64_t(step.first_sequence) * model.kv_heads + head) * cache.size();
      attend<typename K::Tile>(cache, static_cast<const Stored*>(layer.keys) + at, static_cast<const Stored*>(layer.values) + at, q, d,
                count, first, last, begin, end, model.score_cap,
                partial_out + int64_t(task) * kTokens * d, partial + int64_t(task) * kTokens);
    }
    barrier();
  }

  // Combines the results of the splits of each row, as inputs of the output projection.
  void merge(int me) {
    const int g = group(), d = model.head_dim;
    const Share mine(rows * model.heads, me, all);
    alignas(64) float sum[kMostHeadDim];
    for (int i = mine.begin; i < mine.end; ++i) {
      const int t = i / model.heads, h = i % model.heads, sequence = t / step.tokens;
      const int row = t % step.tokens * g + h % g;
      const int64_t task = (int64_t(sequence * model.kv_heads + h / g) * tiles + row / kTokens) * splits;
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

  // Adds a linear layer's outputs to the residual stream; or keeps them, if a norm comes between (`after`).
  // `factors`: [rows][kBlock], the first of each block is the factor of a row's outputs; or null.
  void add(const FlashnormLinear& to, const Activation* from, int ld, const float* after, const float* factors, int me) {
    const float* bias = to.bias;
    const float by = model.residual_scale;
    float *x = this->x, *kept = after ? addend : nullptr;
    const int n = model.hidden;
    linear<K>(from, ld, to.weights, to.in, n, rows, my_scratch(me), me, all, [=](int t, int o, const auto& v) {
      for (int i = 0; i < int(sizeof(v) / sizeof(Vec)); ++i) {
        float* at = x + int64_t(t) * n + o + i * kBlock;
        Vec y = bias ? v[i] + load(bias + o + i * kBlock) : v[i];
        if (factors) y = y * splat(factors[int64_t(t) * kBlock]);
        if (kept)
          store(kept + (at - x), y);
        else
          store(at, load(at) + y * splat(by));
      }
    });
    barrier();
  }

  // activation(s gate x + c) * (s up x + d), the inputs of a down projection, for `count` rows. `routed`: index of the
  // first row in the routing, by which rows of tokens are found, or -1: row t is that of token t. `share`: which
  // thread's share of the outputs.
  template <class E>
  void gated(const typename E::Activation* from, const void* gate, const void* up, const float* gate_bias,
             const float* up_bias, int inner, int count, int routed, typename E::Activation* to, int ld, int share,
             int me) {
    pair_of_linears<E>(from, ld_hidden, gate, up, model.hidden, inner, count, my_scratch(me), share, all,
                       [=, this](int t, int o, const Vec(&v)[2]) {
                         const Vec s = splat(scale[routed < 0 ? t : routing.row(routed + t)]);
                         Vec gate = v[0] * s, up = v[1] * s;
                         if (gate_bias) gate = gate + load(gate_bias + o);
                         if (up_bias) up = up + load(up_bias + o);
                         auto* row = to + int64_t(t) * ld;
                         put(row + o, apply(model.activation, gate) * up);
                         if (o + kBlock >= inner) pad(row, padded(inner));
                       });
  }

  // Chooses the experts of all rows. The scores are computed from activations in float32 whatever the weights' dtype is,
  // because at a near tie rounding would choose another expert.
  void route(const FlashnormLayer& layer, int me) {
    if (me == 0) {
      routing.experts = layer.router.out;
      routing.per_row = layer.experts_per_token;
    }
    for (int t = 0; t < rows; t += kFewTokens) {
      const int count = std::min(kFewTokens, rows - t);
      const float* from = exact + int64_t(t) * ld_hidden;
      project<Exact>(layer.router, from, scale + t, scores + int64_t(t) * ld_scores, ld_scores, count, me);
      if (layer.shared_gate.weights)
        project<Exact>(layer.shared_gate, from, scale + t, shared_scale + int64_t(t) * kBlock, kBlock, count, me);
    }
    barrier();
    const Share mine(rows, me, all);
    for (int t = mine.begin; t < mine.end; ++t) {
      routing.choose(scores + int64_t(t) * ld_scores, t, layer.renormalise);
      float& factor = shared_scale[int64_t(t) * kBlock];
      if (layer.shared_gate.weights) factor = 1 / (1 + std::exp(-factor));
      if (layer.mlp_after && !layer.gate.weights) std::fill_n(addend + int64_t(t) * model.hidden, model.hidden, 0.0f);
    }
    barrier();
    if (me == 0) routing.group(rows);
    barrier();
  }

  // Adds the experts' outputs, in batches: as many experts as there is memory for, of which each has few rows or each
  // has many.
  void add_experts(const FlashnormLayer& layer, int me) {
    const auto few = [this](int expert) { return routing.count(expert) <= kFewTokens; };
    for (int first = 0, last; first < routing.experts; first = last) {
      last = first + 1;
      if (routing.count(first) == 0) continue;
      while (last < routing.experts && routing.starts[last + 1] - routing.starts[first] <= gathered_rows &&
             (routing.count(last) == 0 || few(last) == few(first)))
        ++last;
      if (few(first))
        add_batch<Exact>(layer, first, last, exact, me);
      else
        add_batch<K>(layer, first, last, in, me);
    }
  }

  // Adds the outputs of experts `first` to `last - 1`.
  template <class E>
  void add_batch(const FlashnormLayer& layer, int first, int last, const typename E::Activation* from, int me) {
    using A = typename E::Activation;
    A *read = reinterpret_cast<A*>(gathered), *between = reinterpret_cast<A*>(expert_intermediate);
    const int hidden = model.hidden, inner = layer.experts_out.in, begin = routing.starts[first];
    const Stored* in_weights = static_cast<const Stored*>(layer.experts_in.weights);
    const Stored* out_weights = static_cast<const Stored*>(layer.experts_out.weights);
    const int64_t size = int64_t(inner) * hidden;
    const Share mine(routing.starts[last] - begin, me, all);
    for (int i = mine.begin; i < mine.end; ++i)
      std::copy_n(from + int64_t(routing.row(begin + i)) * ld_hidden, ld_hidden, read + int64_t(i) * ld_hidden);
    barrier();
    for (int e = first; e < last; ++e) {
      if (routing.count(e) == 0) continue;
      const int64_t at = routing.starts[e] - begin;
      const Stored* gate = in_weights + 2 * e * size;
      // If outputs do not divide evenly among the threads, it is each time another thread that has more of them.
      gated<E>(read + at * ld_hidden, gate, gate + size, nullptr, nullptr, inner, routing.count(e), routing.starts[e],
               between + at * ld_expert, ld_expert, (me + e) % all, me);
    }
    barrier();
    float* to = layer.mlp_after ? addend : x;
    const float by = layer.mlp_after ? 1 : model.residual_scale;
    for (int e = first; e < last; ++e) {
      if (routing.count(e) == 0) continue;
      const int start = routing.starts[e];
      linear<E>(between + int64_t(start - begin) * ld_expert, ld_expert, out_weights + e * size, inner, hidden,
                routing.count(e), my_scratch(me), me, all, [=, this](int t, int o, const auto& v) {
                  const Vec weight = splat(by * routing.weights[routing.order[start + t]]);
                  float* at = to + int64_t(routing.row(start + t)) * hidden + o;
                  for (int i = 0; i < int(sizeof(v) / sizeof(Vec)); ++i, at += kBlock) store(at, load(at) + v[i] * weight);
                });
    }
    barrier();
  }
};

}  // namespace FLASHNORM_ISA
