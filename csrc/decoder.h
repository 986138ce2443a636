// A Llama-like decoder (Llama, Mistral, Qwen2 and models built like them) as one loop over packed weights:
//
//   x = embedding[token]
//   for each layer:  x += o( attention( rotate(q(n)), rotate(k(n)), v(n) ) ),   n = rms_norm(x)
//                    x += down( silu(gate(m)) * up(m) ),                       m = rms_norm(x)
//   logits = head(rms_norm(x))
//
// Any number of rows go through together, of one sequence (a prompt) or of several. All pointers are borrowed: whoever
// builds a Decoder keeps its arrays alive.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "packed.h"
#include "sparse.h"

namespace lowbit {

// y = x @ w_hat.T + bias, w_hat packed (float or int8 products) or plain float32, plus exceptions.
struct Linear {
  enum class Kind { kFloat, kInt8, kDense };
  Kind kind = Kind::kDense;
  Weights w;                     // n and k are set for every kind
  std::optional<Packed> packed;  // kInt8
  const float* dense = nullptr;  // [n, k]
  const float* bias = nullptr;   // [n], or null
  std::optional<Places> places;  // the exceptions, and the same in steps
  std::optional<Steps> steps;
};

struct DecoderLayer {
  Linear q, k, v, o, gate, up, down;
  const float *norm_attention = nullptr, *norm_mlp = nullptr;  // [hidden]
  int64_t window = 0;                                          // tokens seen, the own one included; 0 = all
};

struct DecoderShape {
  int64_t vocabulary, hidden, heads, kv_heads, head_dim, intermediate;
  float eps, attention_scale, rotary_scale;  // rotary_scale multiplies sine and cosine
};

// Keys and values of several sequences. Rows of `capacity` tokens are set aside at once; pages nobody wrote cost nothing.
class KeyValueCache {
 public:
  KeyValueCache(const DecoderShape&, int64_t layers, int64_t sequences, int64_t capacity, bool int8);
  ~KeyValueCache();
  KeyValueCache(const KeyValueCache&) = delete;
  KeyValueCache& operator=(const KeyValueCache&) = delete;

  const int64_t layers, sequences, capacity;
  const bool int8;
  std::vector<int64_t> length;  // tokens held, per sequence
  int64_t bytes() const;        // of what the tokens held need

 private:
  friend class Decoder;
  struct HeadPointers;
  int64_t heads_, dim_, blocks_;
  void* data_ = nullptr;
  float* scales_ = nullptr;
};

class Decoder {
 public:
  DecoderShape shape{};
  std::vector<DecoderLayer> layers;
  Linear embedding, head;                // the embedding as Kind::kFloat or kDense; tied ones share pointers
  const float* norm = nullptr;           // [hidden]
  const float* inverse_frequency = nullptr;  // [head_dim / 2], radians per position

  // Reads `rows` tokens: row i belongs to sequence[i] and comes next there. logits [count, vocabulary] of the rows
  // listed in `wanted`. The caller checks tokens, sequences, room and indices.
  void forward(KeyValueCache&, const int64_t* tokens, const int64_t* sequence, int64_t rows, const int64_t* wanted,
               int64_t count, float* logits, int n_threads, const std::string& isa) const;
};

}  // namespace lowbit
