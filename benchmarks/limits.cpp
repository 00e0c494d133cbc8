// What this machine can do at most: read memory, multiply and add. Compiled and called by limits.py.
#include <omp.h>

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint64_t Words __attribute__((vector_size(64)));
constexpr int kSums = 12;  // independent ones: more than a product's latency takes

// Products and sums in registers, by all threads; how many operations they were.
template <class Step>
double repeat(int64_t rounds, int threads, int operations, const Step& step) {
#pragma omp parallel num_threads(threads)
  {
    Floats sums[kSums] = {};
    for (int64_t i = 0; i < rounds; ++i)
      for (Floats& sum : sums) {
        step(sum);
        asm volatile("" : "+v"(sum));  // none is left out
      }
  }
  return double(rounds) * threads * kSums * operations;
}

extern "C" {

// Read so many bytes once, all threads together.
uint64_t read_memory(const void* from, int64_t bytes, int threads) {
  uint64_t result = 0;
#pragma omp parallel num_threads(threads) reduction(^ : result)
  {
    const int64_t share = bytes / threads / 512 * 8;
    const Words* mine = static_cast<const Words*>(from) + omp_get_thread_num() * share;
    Words sums[8] = {};
    for (int64_t i = 0; i < share; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] ^= mine[i + j];
    for (const Words& sum : sums) result ^= sum[0] ^ sum[7];
  }
  return result;
}

double multiply_add_float32(int64_t rounds, int threads) {
  const Floats factor = Floats{} + 0.5f;
  return repeat(rounds, threads, 2 * kLanes, [=](Floats& sum) { sum = sum * factor + factor; });
}

// With the instruction for pairs of bfloat16, where there is one; else 0.
double multiply_add_bfloat16(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3f003f00);
  return repeat(rounds, threads, 4 * kLanes,
                [=](Floats& sum) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, factor, factor); });
#else
  return 0;
#endif
}
}
