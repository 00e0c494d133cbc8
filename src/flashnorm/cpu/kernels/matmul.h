// Linear layers: the model's own weights, [output][input], times the activations of a few tokens (decode, bound by
// memory) or of many (prefill, bound by arithmetic).
//
// Few: one row of the weights after another, each a dot product with every token. Memory is read in one stream, which
// the processor prefetches best. Many: sixteen or thirty-two rows are first packed into the processor's cache, input
// after input; then the sums of a tile, `kTokens` tokens by these outputs, stay in registers.
#pragma once

#include <algorithm>

#include "simd.h"

namespace FLASHNORM_ISA {

#if defined(__AVX512F__)
constexpr int kTokens = 12, kWide = 2;  // 24 sums, 32 registers
#elif defined(__aarch64__)
constexpr int kTokens = 5, kWide = 1;  // 20 sums, 32 registers
#else
constexpr int kTokens = 4, kWide = 1;  // 8 sums, 16 registers
#endif
constexpr int kFewTokens = 4;
constexpr int kRowStep = 2 * kBlock;  // inputs of a row that are processed at once
constexpr int kAhead = 512;           // prefetch distance in bytes

inline void fetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// Length of a row in memory for `count` numbers; the rest of the row is zero. It is an odd number of steps, because
// rows at distances of a power of two would all compete for the same few places in the cache.
inline int row_size(int count) { return ((count + kRowStep - 1) / kRowStep | 1) * kRowStep; }

// Stores activations in the type that the kernels of linear layers read.
inline void put(float* to, const float* from, int count) { memcpy(to, from, count * sizeof(float)); }
inline void put(uint16_t* to, const float* from, int count) {
  int i = 0;
  for (; i + kBlock <= count; i += kBlock) Bf16::store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = Bf16::from_float(from[i]);
}
inline void put(float* to, Vec v) { store(to, v); }
inline void put(uint16_t* to, Vec v) { Bf16::store(to, v); }

// The part of `count` items that thread `me` of `all` threads works on.
struct Share {
  int begin, end;
  Share(int count, int me, int all) : begin(int64_t(count) * me / all), end(int64_t(count) * (me + 1) / all) {}
};

// --- tiles: packed weights times activations, all sums in registers

// Weights in plain layout, [input][16].
template <class W>
struct Plain {
  using Element = typename W::Element;
  using Activation = float;
  static constexpr int kStep = 1;  // inputs that are stored together

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const float* x, int64_t ldx, const Element* w, int64_t block, int k) {
    Vec v[N];
    for (int n = 0; n < N; ++n) v[n] = W::load(w + n * block + int64_t(k) * kBlock);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) multiply_add(sum[m][n], v[n], splat(x[m * ldx + k]));
  }
};

#if defined(__AVX512BF16__)
// bf16 weights with inputs in pairs, [input / 2][16][2].
struct Pairs {
  using Element = uint16_t;
  using Activation = float;
  static constexpr int kStep = 2;

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const float* x, int64_t ldx, const Element* w, int64_t block, int k) {
    Vec even[N], odd[N];
    for (int n = 0; n < N; ++n) {
      Bits both;
      memcpy(&both, w + n * block + int64_t(k) * kBlock, sizeof both);
      const Bits low = both << 16, high = both & 0xffff0000u;
      memcpy(&even[n], &low, sizeof low);
      memcpy(&odd[n], &high, sizeof high);
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        multiply_add(sum[m][n], even[n], splat(x[m * ldx + k]));
        multiply_add(sum[m][n], odd[n], splat(x[m * ldx + k + 1]));
      }
  }
};

// The same layout with bf16 activations: an instruction adds two products at once, in float32.
struct DotPairs {
  using Element = uint16_t;
  using Activation = uint16_t;
  static constexpr int kStep = 2;

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const uint16_t* x, int64_t ldx, const Element* w, int64_t block, int k) {
    __m512bh v[N];
    for (int n = 0; n < N; ++n) v[n] = (__m512bh)_mm512_loadu_si512(w + n * block + int64_t(k) * kBlock);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      memcpy(&pair, x + m * ldx + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < N; ++n)
        sum[m][n].part[0] = Part(_mm512_dpbf16_ps((__m512)sum[m][n].part[0], v[n], both));
    }
  }
};
#endif

// Memory that is needed next; it is prefetched line by line during other computations.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  void fetch_some() {
    if (at >= end) return;
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

// M tokens times N blocks of outputs, which are `block` elements apart; calls `emit(token, vectors[N])`.
template <class T, int M, int N, class Emit>
inline void tile(const typename T::Activation* x, int64_t ldx, const typename T::Element* w, int64_t block, int in,
                 Ahead& ahead, const Emit& emit) {
  Vec sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = splat(0);
  for (int k = 0; k < in; k += T::kStep) {
    ahead.fetch_some();
    T::template step<M, N>(sum, x, ldx, w, block, k);
  }
  for (int m = 0; m < M; ++m) emit(m, sum[m]);
}

// `tile` for any number of tokens up to kTokens.
template <class T, int N, class Emit, int M = kTokens>
inline void tile_of(int tokens, const typename T::Activation* x, int64_t ldx, const typename T::Element* w,
                    int64_t block, int in, Ahead& ahead, const Emit& emit) {
  if constexpr (M > 0) {
    if (tokens == M)
      tile<T, M, N>(x, ldx, w, block, in, ahead, emit);
    else
      tile_of<T, N, Emit, M - 1>(tokens, x, ldx, w, block, in, ahead, emit);
  }
}

template <class Element>
inline Ahead span(const Element* from, int64_t count) {
  return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + count)};
}

// --- how linear layers are computed: `Few` and `Many` tokens

// The weights of N blocks of 16 outputs. The last block of a linear layer may have fewer; absent rows count as zero.
template <class Element, int N>
struct Outputs {
  const Element* rows[N];
  int count[N];
  Ahead next;  // the weights that follow, to prefetch
};

// W: the dtype of the weights. T: the tile for attention, which decides the layout of keys and values.
template <class W, class T>
struct Few {
  using Weights = W;
  using Tile = T;
  using Element = typename W::Element;
  using Activation = float;
  static constexpr int kPanel = 1;      // blocks of outputs that are computed at once
  static constexpr int kPackedSize = 0;  // bytes of scratch memory for each packed weight

  template <int N, class Emit>
  static void run(const Outputs<Element, N>& w, int in, const float* x, int64_t ldx, int tokens, void*,
                  const Emit& emit) {
    of_count<N, kFewTokens>(w, in, x, ldx, tokens, emit);
  }

 private:
  template <int N, int M, class Emit>
  static void of_count(const Outputs<Element, N>& w, int in, const float* x, int64_t ldx, int tokens,
                       const Emit& emit) {
    if constexpr (M > 0) {
      if (tokens != M) return of_count<N, M - 1>(w, in, x, ldx, tokens, emit);
      Vec y[M][N];
      for (int n = 0; n < N; ++n) {
        Vec sums[M][kBlock];
        for (int r = 0; r < kBlock; ++r) dot<M>(sums, r, r < w.count[n] ? w.rows[n] + int64_t(r) * in : nullptr, in, x, ldx);
        for (int m = 0; m < M; ++m) y[m][n] = sums_of(sums[m]);
      }
      for (int m = 0; m < M; ++m) emit(m, y[m]);
    }
  }

  // sums[m][r]: the dot product of row r and token m, as sixteen partial sums.
  template <int M>
  static inline void dot(Vec (&sums)[M][kBlock], int r, const Element* w, int in, const float* x, int64_t ldx) {
    Vec low[M], high[M];
    for (int m = 0; m < M; ++m) low[m] = high[m] = splat(0);
    const auto step = [&](const Element* from, int k) {
      const Vec a = W::load(from), b = W::load(from + kBlock);
      for (int m = 0; m < M; ++m) {
        multiply_add(low[m], a, load(x + m * ldx + k));
        multiply_add(high[m], b, load(x + m * ldx + k + kBlock));
      }
    };
    if (w) {
      int k = 0;
      for (; k + kRowStep <= in; k += kRowStep) {
        for (int at = 0; at < int(kRowStep * sizeof(Element)); at += 64) fetch(reinterpret_cast<const char*>(w + k) + kAhead + at);
        step(w + k, k);
      }
      if (k < in) {
        Element rest[kRowStep] = {};
        memcpy(rest, w + k, (in - k) * sizeof(Element));
        step(rest, k);
      }
    }
    for (int m = 0; m < M; ++m) sums[m][r] = low[m] + high[m];
  }
};

// W: the dtype of the weights. T: the tile for linear layers. A: the tile for attention.
template <class W, class T, class A>
struct Many {
  using Weights = W;
  using Tile = A;
  using Element = typename W::Element;
  using Activation = typename T::Activation;
  static constexpr int kPanel = kWide;
  static constexpr int kPackedSize = 4 / T::kStep;

  template <int N, class Emit>
  static void run(const Outputs<Element, N>& w, int in, const Activation* x, int64_t ldx, int tokens, void* scratch,
                  const Emit& emit) {
    auto* packed = static_cast<typename T::Element*>(scratch);
    const int64_t block = int64_t(row_size(in)) * kBlock;
    for (int n = 0; n < N; ++n) pack(w.rows[n], w.count[n], in, packed + n * block);
    Ahead ahead = w.next;
    const int tiles = (tokens + kTokens - 1) / kTokens;
    for (int i = 0; i < tiles; ++i) {
      const Share share(tokens, i, tiles);
      tile_of<T, N>(share.end - share.begin, x + share.begin * ldx, ldx, packed, block, in, ahead,
                    [&](int m, const Vec(&y)[N]) { emit(share.begin + m, y); });
    }
  }

 private:
  // Packs rows side by side: first prefetches them one after another, then transposes blocks of 16 by 16 in the cache.
  static void pack(const Element* rows, int count, int in, typename T::Element* packed) {
    for (Ahead here = span(rows, int64_t(count) * in); here.at < here.end;) here.fetch_some();
    constexpr int kColumns = kBlock * T::kStep;
    for (int k = 0; k < in; k += kColumns) {
      Vec v[kBlock];
      for (int r = 0; r < kBlock; ++r) {
        if (r >= count) {
          v[r] = splat(0);
        } else if (k + kColumns <= in) {
          v[r] = packable(rows + int64_t(r) * in + k);
        } else {
          Element rest[kColumns] = {};
          memcpy(rest, rows + int64_t(r) * in + k, (in - k) * sizeof(Element));
          v[r] = packable(rest);
        }
      }
      transpose(v);
      for (int r = 0; r < kBlock; ++r) store(reinterpret_cast<float*>(packed) + (k / T::kStep + r) * kBlock, v[r]);
    }
  }

  // Sixteen floats, or sixteen pairs of bf16, each of which is moved as if it were a float.
  static Vec packable(const Element* from) {
    if constexpr (T::kStep == 2)
      return load(reinterpret_cast<const float*>(from));
    else
      return W::load(from);
  }
};

// Thread `me`'s outputs of a linear layer, for all tokens; calls `emit(token, first output, vectors)`.
template <class K, class Emit>
void linear(const typename K::Activation* x, int64_t ldx, const void* weights, int in, int out, int tokens,
            void* scratch, int me, int all, const Emit& emit) {
  constexpr int N = K::kPanel;
  const auto* w = static_cast<const typename K::Element*>(weights);
  const Share mine((out + N * kBlock - 1) / (N * kBlock), me, all);
  for (int panel = mine.begin; panel < mine.end; ++panel) {
    const int o = panel * N * kBlock;
    const auto with = [&](int m, const auto& y) { emit(m, o, y); };
    if (o + (N - 1) * kBlock < out) {
      Outputs<typename K::Element, N> outputs;
      for (int n = 0; n < N; ++n) {
        outputs.rows[n] = w + int64_t(o + n * kBlock) * in;
        outputs.count[n] = std::min(kBlock, out - o - n * kBlock);
      }
      if (panel + 1 < mine.end)
        outputs.next = span(outputs.rows[0] + int64_t(N * kBlock) * in, int64_t(std::min(N * kBlock, out - o - N * kBlock)) * in);
      K::template run<N>(outputs, in, x, ldx, tokens, scratch, with);
    } else {  // the last block, alone
      K::template run<1>({{w + int64_t(o) * in}, {std::min(kBlock, out - o)}, {}}, in, x, ldx, tokens, scratch, with);
    }
  }
}

// Two linear layers of the same size (gate and up); calls `emit(token, first output, {of the first, of the second})`.
template <class K, class Emit>
void pair_of_linears(const typename K::Activation* x, int64_t ldx, const void* first, const void* second, int in,
                     int out, int tokens, void* scratch, int me, int all, const Emit& emit) {
  const auto *a = static_cast<const typename K::Element*>(first), *b = static_cast<const typename K::Element*>(second);
  const Share mine((out + kBlock - 1) / kBlock, me, all);
  for (int panel = mine.begin; panel < mine.end; ++panel) {
    const int o = panel * kBlock, count = std::min(kBlock, out - o);
    const int64_t at = int64_t(o) * in;
    K::template run<2>({{a + at, b + at}, {count, count}, {}}, in, x, ldx, tokens, scratch,
                       [&](int m, const Vec(&y)[2]) { emit(m, o, y); });
  }
}

}  // namespace FLASHNORM_ISA
