// Compares the kernels with plain loops, element by element, and prints what was compared. It needs neither Python nor
// PyTorch, so that it also runs where there is no PyTorch: `make test-arm` compiles it for ARM, and an emulator runs it.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

#include "loops.h"
#define FLASHNORM_ISA flashnorm_compared
#include "decoder.h"

extern "C" {
int64_t flashnorm_run(const FlashnormModel*, const FlashnormStep*, FlashnormPart);
const char* flashnorm_problem(const FlashnormModel*, const FlashnormStep*, FlashnormPart);
int32_t flashnorm_isa_count();
const char* flashnorm_isa_name(int32_t);
void flashnorm_isa_choose(int32_t);
}

namespace {

using namespace flashnorm_compared;
using plain::Row;

std::mt19937 chance(1);
int64_t compared = 0;
const char* const kDtypes[] = {"float32", "bfloat16", "float16"};

[[noreturn]] void fail(const std::string& what, double found, double expected) {
  std::fprintf(stderr, "%s: expected %.9g, found %.9g\n", what.c_str(), expected, found);
  std::exit(1);
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

void expect_same(const std::string& what, double found, double expected) {
  ++compared;
  if (!same(found, expected)) fail(what, found, expected);
}

void expect_near(const std::string& what, double found, double expected, double most) {
  ++compared;
  if (!(std::fabs(found - expected) <= most)) fail(what, found, expected);
}

// --- vectors of sixteen floats

float normal(double deviation = 1) { return float(std::normal_distribution<double>(0, deviation)(chance)); }

Vec random_vec(float (&values)[kBlock], double deviation) {
  for (float& v : values) v = normal(deviation);
  return load(values);
}

template <class W>
void dtype_of_16_bits(int32_t dtype) {
  uint16_t bits[kBlock], stored[kBlock];
  float values[kBlock];
  for (int pattern = 0; pattern < 1 << 16; pattern += kBlock) {  // all that there are
    for (int i = 0; i < kBlock; ++i) bits[i] = uint16_t(pattern + i);
    store(values, W::load(bits));
    for (int i = 0; i < kBlock; ++i) {
      const double expected = plain::of_bits(bits[i], plain::exponent_bits(dtype));
      expect_same(std::string(kDtypes[dtype]) + " loaded", values[i], expected);
      expect_same(std::string(kDtypes[dtype]) + " read", W::to_float(bits[i]), expected);
    }
  }
  const auto round_trip = [&](Vec v) {
    store(values, v);
    W::store(stored, v);
    for (int i = 0; i < kBlock; ++i) {
      const double expected = plain::rounded(values[i], dtype);
      expect_same(std::string(kDtypes[dtype]) + " stored", plain::of_bits(stored[i], plain::exponent_bits(dtype)), expected);
      expect_same(std::string(kDtypes[dtype]) + " written", W::to_float(W::from_float(values[i])), expected);
    }
  };
  for (int i = 0; i < 5000; ++i) {  // any float at all
    uint32_t any[kBlock];
    for (uint32_t& one : any) one = uint32_t(chance());
    Vec v;
    memcpy(&v, any, sizeof v);
    // Subnormal floats are left out for bfloat16: a processor may flush them to zero as it converts (AVX-512 does).
    for (int k = 0; k < kBlock; ++k)
      if (dtype == kBfloat16 && (any[k] & 0x7f800000) == 0) v.part[k / kLanes][k % kLanes] = 0;
    round_trip(v);
  }
  for (int pattern = 0; pattern < 0x7f80; pattern += kBlock / 4) {  // halfway between neighbours, and beside it
    float near[kBlock] = {};
    for (int i = 0; i < kBlock; ++i) {
      const double low = plain::of_bits(uint16_t(pattern + i / 4), plain::exponent_bits(dtype));
      const double high = plain::of_bits(uint16_t(pattern + i / 4 + 1), plain::exponent_bits(dtype));
      if (!std::isfinite(low) || !std::isfinite(high) || (dtype == kBfloat16 && low < 1.2e-38)) continue;
      const float half = float((low + high) / 2), around[] = {half, -half, std::nextafter(half, 0.0f), std::nextafter(half, INFINITY)};
      near[i] = around[i % 4];
    }
    round_trip(load(near));
  }
}

void vectors() {
  float a[kBlock], b[kBlock], found[kBlock];
  for (int i = 0; i < 1000; ++i) {
    const Vec va = random_vec(a, 30), vb = random_vec(b, 30);
    double total = 0, most = -INFINITY, size = 0;
    store(found, exp(va));
    for (int k = 0; k < kBlock; ++k) {
      const double expected = std::exp(std::min(88.0, std::max(-87.0, double(a[k]))));
      expect_near("exp", found[k], expected, expected * 2.4e-7);
      total += a[k];
      size += std::fabs(a[k]);
      most = std::max(most, double(a[k]));
    }
    expect_near("sum", sum_of(va), total, size * 1e-6);
    expect_same("largest", largest_of(va), most);
    store(found, tanh(va));
    for (int k = 0; k < kBlock; ++k) expect_near("tanh", found[k], std::tanh(double(a[k])), 3e-7);
    Vec sum = va;
    multiply_add(sum, va, vb);
    store(found, sum);
    for (int k = 0; k < kBlock; ++k)
      expect_near("a + a b", found[k], a[k] + double(a[k]) * b[k], 1.2e-7 * (std::fabs(a[k]) + 2 * std::fabs(double(a[k]) * b[k])));
  }
  Vec square[kBlock], turned[kBlock];
  float numbers[kBlock][kBlock];
  for (int i = 0; i < kBlock; ++i) turned[i] = square[i] = random_vec(numbers[i], 1);
  transpose(turned);
  store(found, sums_of(square));
  for (int i = 0; i < kBlock; ++i) {
    float row[kBlock];
    store(row, turned[i]);
    double total = 0;
    for (int k = 0; k < kBlock; ++k) {
      expect_same("transposed", row[k], numbers[k][i]);
      total += numbers[i][k];
    }
    expect_near("sums", found[i], total, 1e-5);
  }
}

// --- random layers, whose memory lives here

struct Memory {
  std::vector<std::vector<char>> blocks;
  std::vector<std::vector<float>> floats;
  int32_t dtype;

  // Exactly as many bytes as numbers, so that a sanitizer sees a read past the end.
  void* numbers(int64_t count, double deviation) {
    auto& block = blocks.emplace_back(count * (dtype == kFloat32 ? 4 : 2));
    for (int64_t i = 0; i < count; ++i) {
      const float value = deviation ? normal(deviation) : 0;
      const uint16_t bits = dtype == kFloat32 ? 0 : plain::to_bits(value, dtype);
      dtype == kFloat32 ? memcpy(block.data() + 4 * i, &value, 4) : memcpy(block.data() + 2 * i, &bits, 2);
    }
    return block.data();
  }

  const float* vector(int count, double mean, double deviation) {
    auto& values = floats.emplace_back(padded(count));  // a whole block, zeros at the end
    for (int i = 0; i < count; ++i) values[i] = float(mean + normal(deviation));
    return values.data();
  }

  FlashnormLinear linear(int in, int out, bool bias = false, int copies = 1) {
    const int64_t count = int64_t(in) * out * copies;
    return {numbers(count, 1 / std::sqrt(double(in))), bias ? vector(out, 0, 0.3) : nullptr, in, out * copies,
            count * (dtype == kFloat32 ? 4 : 2)};
  }
};

struct Case {
  const char* name;
  std::function<void(Memory&, FlashnormModel&, std::vector<FlashnormLayer>&)> change;
  int inner = 80, experts = 0;
};

const Case kCases[] = {
    {"plain", [](auto&, auto&, auto&) {}},
    {"gains, biases", [](Memory& to, FlashnormModel& m, auto& layers) {
       for (auto& l : layers) {
         l.attention_gain = to.vector(m.hidden, 1, 0.3);
         l.mlp_gain = to.vector(m.hidden, 1, 0.3);
         for (auto* one : {&l.q, &l.k, &l.v, &l.output, &l.gate, &l.up, &l.down}) one->bias = to.vector(one->out, 0, 0.3);
       }
       m.final_gain = to.vector(m.hidden, 1, 0.3);
       m.activation = kGelu;
     }},
    {"norms of heads, part of each rotated", [](Memory& to, FlashnormModel& m, auto& layers) {
       for (auto& l : layers) {
         l.q_gain = to.vector(m.head_dim, 1, 0.3);
         l.k_gain = to.vector(m.head_dim, 1, 0.3);
       }
       m.rotary = 16;
     }},
    {"norms over all heads and after, none before", [](Memory& to, FlashnormModel& m, auto& layers) {
       for (auto& l : layers) {
         l.q_gain = to.vector(m.heads * m.head_dim, 1, 0.3);
         l.k_gain = to.vector(m.kv_heads * m.head_dim, 1, 0.3);
         l.attention_after = to.vector(m.hidden, 1, 0.3);
         l.mlp_after = to.vector(m.hidden, 1, 0.3);
       }
       m.norm_all_heads = 1;
       m.norm_before = 0;
       m.activation = kRelu;
     }},
    {"windows, caps, norms before and after", [](Memory& to, FlashnormModel& m, auto& layers) {
       layers[0].window = 3;
       layers[1].table = 1;
       layers[1].rotate = 0;
       for (auto& l : layers) l.attention_after = to.vector(m.hidden, 1, 0.3), l.mlp_after = to.vector(m.hidden, 1, 0.3);
       m.score_cap = 5;
       m.residual_scale = 0.7f;
       m.activation = kGeluTanh;
     }},
    {"experts", [](Memory&, FlashnormModel&, auto& layers) { layers[1].renormalise = 1; }, 0, 5},
    {"experts beside an MLP", [](Memory& to, FlashnormModel& m, auto& layers) {
       for (auto& l : layers) l.shared_gate = to.linear(m.hidden, 1);
     }, 72, 4},
};

// Sequences in a decoder of two layers: a text, then single tokens; each logit against plain loops.
// `error_of`: dtype -> what a logit may be off, relative to the largest one.
void decoder(const Case& chosen, int32_t dtype, int sequences, const double (&error_of)[3]) {
  Memory memory{.blocks = {}, .floats = {}, .dtype = dtype};
  constexpr int kHidden = 48, kHeads = 4, kKv = 2, kDim = 32, kVocabulary = 37, kCapacity = 160, kPositions = 150;
  const int texts[] = {135, 1, 1, 4, 1};  // more than a span of attention
  std::vector<FlashnormLayer> layers(2);
  for (auto& l : layers) {
    l = {};
    l.q = memory.linear(kHidden, kHeads * kDim);
    l.k = memory.linear(kHidden, kKv * kDim);
    l.v = memory.linear(kHidden, kKv * kDim);
    l.output = memory.linear(kHeads * kDim, kHidden);
    if (chosen.inner) {
      l.gate = memory.linear(kHidden, chosen.inner);
      l.up = memory.linear(kHidden, chosen.inner);
      l.down = memory.linear(chosen.inner, kHidden);
    }
    if (chosen.experts) {
      constexpr int kInner = 24;
      l.router = memory.linear(kHidden, chosen.experts);
      l.experts_in = memory.linear(kHidden, 2 * kInner, false, chosen.experts);
      l.experts_out = memory.linear(kInner, kHidden, false, chosen.experts);
      l.experts_per_token = dtype == kFloat32 ? 2 : chosen.experts;  // few bits may choose another one at a near tie
    }
    l.rotate = 1;
    const int64_t cache = int64_t(sequences) * kKv * kCapacity * kDim;
    l.keys = memory.numbers(cache, 0);
    l.values = memory.numbers(cache, 0);
    l.cache_bytes = cache * (dtype == kFloat32 ? 4 : 2);
  }
  FlashnormModel m{};
  m.head = memory.linear(kHidden, kVocabulary);
  m.dtype = dtype;
  m.layer_count = 2, m.hidden = kHidden, m.heads = kHeads, m.kv_heads = kKv, m.head_dim = m.rotary = kDim;
  m.capacity = kCapacity, m.norm_before = m.final_norm = 1, m.cache_sequences = sequences;
  m.eps = m.qk_eps = 1e-5f, m.attention_scale = float(1 / std::sqrt(double(kDim))), m.residual_scale = 1;
  chosen.change(memory, m, layers);
  m.layers = layers.data();

  std::vector<float> cosines, sines;
  for (int table = 0; table < 2; ++table)
    for (int p = 0; p < kPositions; ++p)
      for (int i = 0; i < m.rotary / 2; ++i) {
        const double angle = p * std::pow(100.0, -2.0 * i / m.rotary) * (1 + table);
        cosines.push_back(float(std::cos(angle)));
        sines.push_back(float(std::sin(angle)));
      }
  std::vector<plain::Seen> seen(sequences, plain::Seen(2));
  std::vector<int32_t> past(sequences, 0);
  for (int tokens : texts) {
    const int rows = sequences * tokens, ld = padded(kVocabulary);
    std::vector<float> x(int64_t(rows) * kHidden), logits(int64_t(rows) * ld);
    for (float& one : x) one = normal();
    const std::vector<float> given = x;
    FlashnormStep step{};
    step.x = x.data(), step.cos = cosines.data(), step.sin = sines.data(), step.past = past.data();
    step.sequences = sequences, step.tokens = tokens, step.positions = kPositions, step.tables = 2;
    step.logits = logits.data(), step.logit_rows = rows, step.threads = sequences;
    if (const char* problem = flashnorm_problem(&m, &step, kAll)) {
      std::fprintf(stderr, "%s: %s\n", chosen.name, problem);
      std::exit(1);
    }
    std::vector<char> scratch(flashnorm_run(&m, &step, kAll) + 64);
    step.memory = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    flashnorm_run(&m, &step, kAll);
    for (int row = 0; row < rows; ++row) {
      const int sequence = row / tokens;
      const Row in(given.begin() + int64_t(row) * kHidden, given.begin() + int64_t(row + 1) * kHidden);
      const Row expected = plain::next(in, m, step, seen[sequence]);
      double size = 0;
      for (double one : expected) size = std::max(size, std::fabs(one));
      const double most = size * error_of[dtype];
      for (int o = 0; o < kVocabulary; ++o)
        expect_near(std::string(chosen.name) + ", " + kDtypes[dtype] + ", a logit of token " + std::to_string(row % tokens),
                    logits[int64_t(row) * ld + o], expected[o], most);
    }
    for (int32_t& one : past) one += tokens;
  }
}

// A norm and a linear layer, in the dtype of the weights, of sizes that fit no vector.
void norm_linear(int32_t dtype, int in, int out, int tokens, bool bias, bool norm, int threads) {
  Memory memory{.blocks = {}, .floats = {}, .dtype = dtype};
  FlashnormModel m{};
  m.head = memory.linear(in, out, bias);
  m.final_gain = norm ? memory.vector(in, 1, 0.3) : nullptr;
  m.dtype = dtype, m.hidden = in, m.final_norm = norm, m.eps = 1e-6f;
  const void* input = memory.numbers(int64_t(tokens) * in, 1);
  void* output = memory.numbers(int64_t(tokens) * out, 0);
  std::vector<float> x(int64_t(tokens) * in);
  FlashnormStep step{};
  step.x = x.data(), step.sequences = 1, step.tokens = tokens, step.threads = threads;
  step.input = input, step.output = output;
  std::vector<char> scratch(flashnorm_run(&m, &step, kNormLinear) + 64);
  step.memory = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  flashnorm_run(&m, &step, kNormLinear);
  const double ulp = dtype == kFloat32 ? 0 : dtype == kBfloat16 ? 0x1p-8 : 0x1p-11;
  // The instructions for bfloat16 take rounded activations, so that each product is off by half a unit in the last place.
  const double products = dtype == kBfloat16 && tokens > kFewTokens ? 0x1p-8 : 1e-6;
  for (int t = 0; t < tokens; ++t) {
    Row row(in);
    for (int i = 0; i < in; ++i) row[i] = plain::read(input, int64_t(t) * in + i, dtype);
    row = plain::normed(row, m.final_gain, norm, m.eps);
    const Row expected = plain::times(m.head, row, dtype);
    for (int o = 0; o < out; ++o) {
      double size = m.head.bias ? std::fabs(m.head.bias[o]) : 0;
      for (int i = 0; i < in; ++i) size += std::fabs(plain::read(m.head.weights, int64_t(o) * in + i, dtype) * row[i]);
      expect_near("norm and linear, " + std::string(kDtypes[dtype]), plain::read(output, int64_t(t) * out + o, dtype),
                  expected[o], std::fabs(expected[o]) * ulp + size * products);
    }
  }
}

}  // namespace

int main() {
  vectors();
  dtype_of_16_bits<Bf16>(kBfloat16);
  dtype_of_16_bits<Fp16>(kFloat16);
  std::printf("vectors of %d lanes: %lld elements are those of plain loops\n", kLanes, (long long)compared);
  for (int isa = 0; isa < flashnorm_isa_count(); ++isa) {
    flashnorm_isa_choose(isa);
    compared = 0;
    // Sums of float32. With 16 bits, a cached key or value may be rounded to its other neighbour; and the instructions for
    // bfloat16 take activations with 8 bits.
    const double error_of[] = {5e-6, std::string(flashnorm_isa_name(isa)) == "avx512_bf16" ? 3e-2 : 2e-3, 5e-4};
    for (int32_t dtype : {kFloat32, kBfloat16, kFloat16}) {
      for (int tokens : {1, 2, 3, 4, 5, 13, 31})
        for (int in : {1, 17, 64, 100})
          norm_linear(dtype, in, in == 64 ? 48 : 33, tokens, tokens % 2, in != 17, 1 + tokens % 2);
      for (const Case& one : kCases)
        decoder(one, dtype, dtype == kFloat32 ? 2 : 1, error_of);
    }
    std::printf("kernels %s: %lld elements are those of plain loops\n", flashnorm_isa_name(isa), (long long)compared);
  }
}
