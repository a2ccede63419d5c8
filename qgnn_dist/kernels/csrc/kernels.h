// SPDX-License-Identifier: Apache-2.0
// The kernels as plain functions over rows begin..end: pointers and sizes, no allocation, no exceptions, no Python.
// N rows, C columns, b bits, B = ceil(C*b/8) packed bytes a row in planar order: byte i of a row holds columns
// i, i+B, i+2B, ..., lowest bits first, pad bits zero (quant/packed.py has a worked example).
#pragma once
#include <cstdint>

namespace qgnn {

using i64 = std::int64_t;

// Internal linkage: an inline function would be shared between the builds, and the linker could keep the AVX2 one.
static inline i64 row_bytes(i64 columns, int bits) { return (columns * bits + 7) / 8; }

// Columns that the products take at a time; weights are laid out in blocks of them, zero past the last column.
constexpr i64 kBlock = 16;
static inline i64 num_blocks(i64 columns) { return (columns + kBlock - 1) / kBlock; }

// Weights (F, H) of codes, in blocks of kBlock columns that are zero past H, from multiples of 32 bytes on.
struct CodeWeights {
  const std::int16_t* pairs;  // (num_blocks(H), F, kBlock)
  const std::int8_t* quads;   // (num_blocks(H), num_quads(F), kBlock, 4): four features of a column side by side
  const std::int32_t* sums;   // (num_blocks(H) * kBlock): of each column
  std::int32_t largest;       // magnitude
};
static inline i64 num_quads(i64 features) { return (features + 3) / 4; }

// For products by look-up (lookup_avx2.h): of each column and pair of features, the 16 sums that two codes 0..3 give,
// plus `shift`; null where they don't fit. `flush` of them fit 8 bits.
struct LookupTables {
  const std::uint8_t* tables;  // (H, (F + 1) / 2, 16), from a multiple of 16 bytes on
  std::int32_t shift;
  i64 flush;
};

// relu(X·W1 + b1)·W2 + b2 on the grids of a packed model. Features are dense, or CSR where `indptr` is not null.
struct Perceptron {
  const i64* indptr;
  const std::int32_t* indices;
  const std::int16_t* codes;
  const float* scale;         // of each row
  const std::int8_t* weight1;  // for CSR
  CodeWeights blocks1, blocks2;
  LookupTables lookup1, lookup2;
  const float *bias1, *bias2;
  float* out;
  double* moments;  // of the hidden values, or null
  i64 F, H, C;
  float step1, hidden_step, scale2;
  int hidden_bits;
};
constexpr i64 kPerceptronRows = 32, kLookupRows = 128;
static inline i64 perceptron_scratch(i64 F, i64 H, i64 C) {
  const i64 lookup = ((F + 1) / 2 + (H + 1) / 2) * kLookupRows, rows = kPerceptronRows * (6 * H + 4 * C + 64);
  return lookup > rows ? lookup : rows;
}

struct Key { std::uint64_t seed; std::uint32_t epoch, stage, layer, round; };

// Rows of more neighbours than this are added up by all threads, before the pass over the rows comes to them.
constexpr i64 kLongRow = 1 << 17;
struct LongRows {
  const i64* rows;  // ascending
  const std::int32_t* sums;  // (count, C)
  i64 count;

  // A row's sums; null where it is not among them.
  const std::int32_t* find(i64 row, i64 C) const {
    for (i64 i = 0; i < count; ++i)
      if (rows[i] == row) return sums + i * C;
    return nullptr;
  }
};

// State in fixed point, rows of `stride` columns; see layer_body.h.
struct FixedLayer {
  const std::int8_t* residual;
  std::int8_t* first_residual;  // where fixed_start writes it
  std::uint16_t* r;
  void* believed;                // std::uint8_t where `narrow`, else std::uint16_t
  const std::int32_t* far_rows;  // ascending, `num_far` rows whose R is in `far`
  float* far;
  i64 num_far, stride;
  float unit, residual_step;  // what 1 means in r and believed, and in the residual term
  float middle;               // what stands for 0 in Ŷ before this round, and for each neighbour in R
  int shift, next_shift;      // 2^shift units are `step`
  bool narrow;
};

// A round and the layer that it belongs to. `believed` null: states are coded afresh; `before` null: no state came
// before; `step`, `next_step` 0: nothing came, nothing is to be sent. State is in `fixed` where that is not null.
struct Layer {
  const i64* indptr;
  const std::int32_t* indices;
  const std::uint8_t* payload;  // M rows
  const float *d, *residual, *h, *before;
  float *out, *r, *believed;
  std::uint8_t* next;
  double *moments, *dots;  // of what is coded, of the constraint; or null
  const FixedLayer* fixed;
  LongRows long_rows;
  i64 M, C;
  int bits;
  float step, next_step, a, b, c, coefficient;
  bool keep, gradient;
};
constexpr i64 kLayerColumns = 4096;  // at most: a row's sums lie on the stack
constexpr i64 kSlack = 32;           // and are stored in whole registers
constexpr i64 kTileFeatures = 64, kTileColumns = 64;  // of add_transposed

// The same with float messages: `y` are the folded rows of all, `next` the own ones of the next round, or null.
struct FloatLayer {
  const i64* indptr;
  const std::int32_t* indices;
  const float *y, *d, *h0, *h, *before;
  float *out, *p, *next;
  double* dots;
  i64 C;
  float a, b, c, coefficient;
  bool first, second;
};

// Rows of coded gradients: `payload` are M rows that are read, `next` the own ones that are written (or null), each of
// packed codes and a scale byte; `rows` and `key` are the places and the key of what is drawn for `next`.
struct GradientRows {
  const std::uint8_t* payload;
  std::uint8_t* next;
  const i64* rows;
  Key key;
  i64 M;
  int bits;
};

// Rows of codes (F) that dropout has thinned times weights (F, H). Either `lookup` has tables, and `column_sums` is the
// sum of each column, or `blocks` has the weights.
struct ThinnedProduct {
  const std::int16_t* codes;
  const i64* rows;
  const std::int8_t* weights;
  const std::int32_t* column_sums;
  CodeWeights blocks;
  LookupTables lookup;
  float* out;
  Key key;
  std::uint64_t threshold;
  i64 F, H;
  bool dropped;
};
static inline i64 thinned_scratch(i64 F) { return kLookupRows * (2 * F + (F + 1) / 2); }

// What the backward wants to know of a hidden value: its code, and whether the gradient passes. A row's codes are packed,
// and after them its flags of 1 bit; of each, every kRun columns are a planar row of their own.
constexpr i64 kRun = 256;
static inline i64 kept_bytes(i64 H, int bits) { return row_bytes(H, bits) + row_bytes(H, 1); }

// The hidden layer: relu(sums·(row_scale·weight_step) + bias), the grid of `step` (0: none), dropout. `out` may be
// `sums`; grad, errors, moments, kept may be null; errors need grad, kept a grid.
struct Activation {
  const float *sums, *row_scale, *bias;
  const i64* rows;
  float *out, *grad;
  double *errors, *moments;
  std::uint8_t* kept;
  Key key;
  std::uint64_t threshold;
  i64 H;
  int bits;
  float weight_step, step;
  bool dropped;
};

// One entry a kernel; `kernels_body.h` is the only implementation, compiled once for each instruction set.
struct Kernels {
  const char* isa;
  void (*pack)(const std::uint8_t* codes, i64 C, int bits, std::uint8_t* out, i64 begin, i64 end);
  void (*unpack)(const std::uint8_t* payload, i64 C, int bits, std::uint8_t* out, i64 begin, i64 end);
  void (*gather_rows)(const std::uint8_t* payload, i64 M, const std::int32_t* rows, i64 B, std::uint8_t* out, i64 begin,
                      i64 end);
  void (*aggregate_codes)(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                          int bits, const LongRows& long_rows, std::int32_t* out, i64 begin, i64 end);
  // Of the neighbours `begin`..`end` among all edges; C at most kLayerColumns, `out` has kSlack more.
  void (*sum_edges)(const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C, int bits, i64 begin,
                    i64 end, std::int32_t* out);
  void (*aggregate_scaled)(const i64* indptr, const std::int32_t* indices, const std::uint8_t* payload, i64 M, i64 C,
                           int bits, float* out, i64 begin, i64 end);
  void (*aggregate_float)(const i64* indptr, const std::int32_t* indices, const float* x, i64 C, float* out, i64 begin,
                          i64 end);
  void (*code_news)(const float* h, const float* d, float* believed, float step, int bits, i64 C,
                    std::uint8_t* payload, double* moments, i64 begin, i64 end);
  void (*add_news)(const std::int32_t* sums, const std::int32_t* degree, float step, int bits, bool keep, i64 C,
                   float* r, i64 begin, i64 end);
  void (*layer)(const Layer& layer, i64 begin, i64 end);
  void (*fixed_start)(const Layer& layer, int residual_bits, i64 begin, i64 end);
  void (*layer_float)(const FloatLayer& layer, i64 begin, i64 end);
  void (*layer_scaled)(const FloatLayer& layer, const GradientRows& messages, i64 begin, i64 end);
  void (*code_gradients)(const GradientRows& messages, const float* h, const float* d, i64 C, i64 begin, i64 end);
  void (*scale_rows)(const float* h, const float* d, i64 C, float* out, i64 begin, i64 end);
  void (*propagated)(const float* r, const float* h, const float* d, i64 C, float* out, i64 begin, i64 end);
  void (*half_step)(const float* h, const float* p, const float* h0, float a, float b, float c, i64 C, float* out,
                    i64 begin, i64 end);
  void (*apply_multiplier)(const float* h, const float* half, const float* p, const float* p_next, float coefficient,
                           i64 C, float* out, double* dots, i64 begin, i64 end);
  void (*midrise)(const float* x, float step, int bits, i64 C, float* out, i64 begin, i64 end);
  void (*affine_codes)(const float* x, const float* d, float* believed, float low, float step, float scale, float bias,
                       int bits, i64 C, std::uint8_t* codes, i64 begin, i64 end);
  void (*affine_values)(const std::uint8_t* codes, float low, float step, i64 C, float* out, i64 begin, i64 end);
  void (*add_affine)(const std::int32_t* sums, const std::int32_t* degree, float low, float step, bool keep, i64 C,
                     float* r, i64 begin, i64 end);
  void (*row_moments)(const float* x, i64 C, double* moments, i64 begin, i64 end);
  void (*softmax)(const float* scores, i64 C, std::int32_t* classes, float* confidence, float* probabilities,
                  i64 begin, i64 end);
  void (*normalise_dense)(const float* x, i64 F, int norm, float* out, i64 begin, i64 end);
  void (*normalise_csr)(const i64* indptr, const float* values, int norm, float* out, i64 begin, i64 end);
  void (*feature_codes_dense)(const float* x, i64 F, int norm, int bits, bool is_signed, std::int16_t* codes,
                              float* scale, i64 begin, i64 end);
  void (*feature_codes_csr)(const i64* indptr, const float* values, int norm, int bits, bool is_signed,
                            std::int16_t* codes, float* scale, i64 begin, i64 end);
  void (*matmul_codes_dense)(const std::int16_t* codes, const CodeWeights& weights, i64 F, i64 H, std::int32_t* out,
                             i64 begin, i64 end);
  void (*matmul_codes_csr)(const i64* indptr, const std::int32_t* indices, const std::int16_t* codes,
                           const std::int8_t* weights, i64 H, std::int32_t* out, i64 begin, i64 end);
  // `blocks`: weights as (num_blocks(H), F, kBlock), zero past H, from a multiple of 32 bytes on.
  void (*matmul_float_dense)(const float* x, const float* blocks, i64 F, i64 H, float* out, i64 begin, i64 end);
  void (*matmul_float_csr)(const i64* indptr, const std::int32_t* indices, const float* values, const float* weights,
                           i64 H, float* out, i64 begin, i64 end);
  void (*hidden_codes)(const std::int32_t* acc, const float* row_scale, float weight_step, const float* bias,
                       float hidden_step, int bits, i64 H, std::int16_t* codes, double* moments, i64 begin, i64 end);
  // `scratch`: perceptron_scratch bytes from a multiple of 32 on.
  void (*perceptron)(const Perceptron& net, std::uint8_t* scratch, i64 begin, i64 end);
  void (*scores_from_codes)(const std::int32_t* acc, float scale, const float* bias, i64 C, float* out, i64 begin,
                            i64 end);
  void (*philox)(const std::uint32_t counter[4], const std::uint32_t key[2], std::uint32_t out[4]);
  void (*keyed_bits)(Key key, const i64* rows, i64 columns, std::uint32_t* out, i64 begin, i64 end);
  void (*dropout_dense)(Key key, const i64* rows, i64 columns, std::uint64_t threshold, float kept, float* out,
                        i64 begin, i64 end);
  void (*keep_csr)(Key key, const i64* rows, const i64* indptr, const std::int32_t* indices, std::uint64_t threshold,
                   std::uint8_t* keep, i64 begin, i64 end);
  void (*thin_codes)(Key key, const i64* rows, i64 columns, std::uint64_t threshold, const std::int16_t* x, float* out,
                     i64 begin, i64 end);
  void (*thin_values)(Key key, const i64* rows, i64 columns, std::uint64_t threshold, const float* x, float* out,
                      i64 begin, i64 end);
  void (*matmul_thin)(const float* x, const float* blocks, i64 F, i64 H, float* out, i64 begin, i64 end);
  void (*add_transposed)(const float* x, const float* scale, const float* g, i64 N, i64 F, i64 H, float* out, i64 begin,
                         i64 end);
  void (*add_transposed_csr)(const i64* indptr, const std::int32_t* indices, const float* values, const float* scale,
                             const float* g, i64 N, i64 H, float* out, i64 begin, i64 end);
  void (*activate)(const Activation& activation, i64 begin, i64 end);
  void (*recall)(const std::uint8_t* kept, int bits, i64 H, float* out, float* grad, i64 begin, i64 end);
  // `scratch`: thinned_scratch bytes from a multiple of 32 on.
  void (*matmul_thinned)(const ThinnedProduct& product, std::uint8_t* scratch, i64 begin, i64 end);
};


extern const Kernels kernels_scalar;
#ifdef QGNN_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif

// The table in use. `select_isa` returns false where the name is unknown or this processor cannot run it.
const Kernels& active();
bool select_isa(const char* name);

}  // namespace qgnn
