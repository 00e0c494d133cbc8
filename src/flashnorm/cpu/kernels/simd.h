// A vector of sixteen floats, made of the vectors of the instruction set; and how weights of each dtype are stored.
//
// The compiler's vector types let one piece of code serve AVX-512, AVX2, NEON and machines without any of them.
// This file is compiled once for each instruction set, each time in its own namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace FLASHNORM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kBlock = 16;               // number of outputs whose weights are stored together
constexpr int kParts = kBlock / kLanes;  // vectors that hold them

typedef float Part __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct Vec {
  Part part[kParts];
};

#define FOR_PARTS for (int p = 0; p < kParts; ++p)

inline Vec splat(float value) {
  Vec r;
  FOR_PARTS r.part[p] = Part{} + value;
  return r;
}

inline Vec load(const float* from) {
  Vec r;
  FOR_PARTS memcpy(&r.part[p], from + p * kLanes, sizeof(Part));
  return r;
}

inline void store(float* to, Vec v) { FOR_PARTS memcpy(to + p * kLanes, &v.part[p], sizeof(Part)); }

inline Vec operator+(Vec a, Vec b) {
  FOR_PARTS a.part[p] += b.part[p];
  return a;
}

inline Vec operator*(Vec a, Vec b) {
  FOR_PARTS a.part[p] *= b.part[p];
  return a;
}

inline Vec operator/(Vec a, Vec b) {
  FOR_PARTS a.part[p] /= b.part[p];
  return a;
}

inline void multiply_add(Vec& sum, Vec a, Vec b) { FOR_PARTS sum.part[p] += a.part[p] * b.part[p]; }

inline Vec max(Vec a, Vec b) {
  FOR_PARTS a.part[p] = a.part[p] < b.part[p] ? b.part[p] : a.part[p];
  return a;
}

inline float largest_of(Vec v) {
  float most = v.part[0][0];
  FOR_PARTS for (int i = 0; i < kLanes; ++i) most = most < v.part[p][i] ? v.part[p][i] : most;
  return most;
}

inline float sum_of(Vec v) {
  float total = 0;
  FOR_PARTS for (int i = 0; i < kLanes; ++i) total += v.part[p][i];
  return total;
}

// The lower or upper halves of two vectors, with their lanes interleaved.
template <bool kUpper>
inline Part zip(Part a, Part b) {
  constexpr int kFrom = kUpper ? kLanes / 2 : 0;
#if defined(__clang__)
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (kFrom + i / 2 + i % 2 * kLanes)...);
  }(std::make_integer_sequence<int, kLanes>());
#else
  Bits lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = kFrom + i / 2 + i % 2 * kLanes;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// The sums of the lanes of each of sixteen vectors. Each step adds pairs, which halves the number of vectors.
inline Vec sums_of(const Vec (&v)[kBlock]) {
  Vec r;
  FOR_PARTS {
    Part some[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      some[i] = v[p * kLanes + i].part[0];
      for (int q = 1; q < kParts; ++q) some[i] += v[p * kLanes + i].part[q];
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) some[i] = zip<false>(some[i], some[i + half]) + zip<true>(some[i], some[i + half]);
    r.part[p] = some[0];
  }
  return r;
}

// Transposes sixteen by sixteen floats, in squares of kLanes by kLanes, each by perfect shuffles.
inline void transpose(Vec (&v)[kBlock]) {
  Vec r[kBlock];
  FOR_PARTS for (int q = 0; q < kParts; ++q) {
    Part square[kLanes], next[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = v[p * kLanes + i].part[q];
    for (int step = 1; step < kLanes; step *= 2) {
      for (int i = 0; i < kLanes / 2; ++i) {
        next[2 * i] = zip<false>(square[i], square[i + kLanes / 2]);
        next[2 * i + 1] = zip<true>(square[i], square[i + kLanes / 2]);
      }
      memcpy(square, next, sizeof square);
    }
    for (int i = 0; i < kLanes; ++i) r[q * kLanes + i].part[p] = square[i];
  }
  memcpy(v, r, sizeof r);
}

// e^x with an error of at most two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Vec exp(Vec x) {
  FOR_PARTS {
    Part v = x.part[p];
    v = v < -87.0f ? Part{} - 87.0f : v;
    v = v > 88.0f ? Part{} + 88.0f : v;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Part n = v * 1.44269504f + shift;
    Bits whole;
    memcpy(&whole, &n, sizeof n);
    n -= shift;
    Part r = v - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Part e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    Bits power = (whole + 127u) << 23;
    Part scale;
    memcpy(&scale, &power, sizeof scale);
    x.part[p] = e * scale;
  }
  return x;
}

inline Vec tanh(Vec x) {  // 1 - 2 / (1 + e^2x)
  return splat(1) + splat(-2) / (splat(1) + exp(x + x));
}

// --- how weights and caches are stored

struct Bf16 {
  using Element = uint16_t;
  static void store(Element* to, Vec v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v.part[0]);
    memcpy(to, &half, sizeof half);
#else
    for (int i = 0; i < kBlock; ++i) to[i] = from_float(v.part[i / kLanes][i % kLanes]);
#endif
  }
  static float to_float(Element e) {
    uint32_t bits = uint32_t(e) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static Element from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // stays NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static Vec load(const Element* from) {
    Vec r;
    FOR_PARTS {
      Halves h;
      memcpy(&h, from + p * kLanes, sizeof h);
      Bits wide = __builtin_convertvector(h, Bits) << 16;
      memcpy(&r.part[p], &wide, sizeof wide);
    }
    return r;
  }
};

struct Fp16 {
  using Element = uint16_t;
  static void store(Element* to, Vec v) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph((__m512)v.part[0], _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, sizeof half);
#elif defined(__F16C__)
    FOR_PARTS {
      const __m128i half = _mm256_cvtps_ph((__m256)v.part[p], _MM_FROUND_TO_NEAREST_INT);
      memcpy(to + p * kLanes, &half, sizeof half);
    }
#elif defined(__aarch64__)
    FOR_PARTS vst1_u16(to + p * kLanes, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v.part[p])));
#else
    for (int i = 0; i < kBlock; ++i) to[i] = from_float(v.part[i / kLanes][i % kLanes]);
#endif
  }
  // By the bits, as not every compiler has a type for these numbers (GCC 11 has none, nor has GCC 12 for ARM).
  static float to_float(Element e) {
    const uint32_t size = e & 0x7fff;
    if (size < 0x0400) return std::copysign(float(size) * 0x1p-24f, e & 0x8000 ? -1.0f : 1.0f);  // subnormal
    const uint32_t bits = uint32_t(e & 0x8000) << 16 | ((size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23));
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static Element from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00 | (size >> 13 & 0x3ff));  // stays NaN
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);                        // rounds to infinity
    if (size < 0x38800000) {  // subnormal: 0.5 has as many bits behind the point
      const float half = std::fabs(f) + 0.5f;
      memcpy(&bits, &half, 4);
      return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
  }
  static Vec load(const Element* from) {
    Vec r;
#if defined(__AVX512F__)
    r.part[0] = Part(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    FOR_PARTS r.part[p] = Part(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * 8))));
#elif defined(__aarch64__)
    FOR_PARTS r.part[p] = Part(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + p * 4))));
#else
    FOR_PARTS for (int i = 0; i < kLanes; ++i) r.part[p][i] = to_float(from[p * kLanes + i]);
#endif
    return r;
  }
};

struct Fp32 {
  using Element = float;
  static float to_float(Element e) { return e; }
  static Element from_float(float f) { return f; }
  static Vec load(const Element* from) { return FLASHNORM_ISA::load(from); }
  static void store(Element* to, Vec v) { FLASHNORM_ISA::store(to, v); }
};

}  // namespace FLASHNORM_ISA
