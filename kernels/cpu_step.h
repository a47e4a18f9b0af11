// A whole decode step as data: what the thread layer (cpu_step.cpp), the vector code (cpu_step_isa.h, compiled once
// per instruction set) and kernels/step.py share. The structs between the marks have the same fields in step.py.
#pragma once

#include <stdint.h>

#include "cpu.h"

namespace coreskip {

// A sixth weight format: nibbles in groups of kGroup inputs, w = scale * q + least, q in 0..15. Tiles of kTile rows
// lie group by group: 4 vectors of 64 bytes (four inputs a row in the low nibbles, the four 16 further on in the high
// ones), then kTile scales and kTile leasts in fp16. One stream through memory, 5 bits a weight.
constexpr int kInt4 = 5;
// And a seventh: bytes in such groups, w = scale * (byte - 128). Tiles hold 8 vectors, four inputs a row each, then kTile
// scales in fp16. x is rounded group by group for both: a few of its channels are ten times as large as the rest, and
// one scale for all of them cost the embedded model 2.4 % perplexity.
constexpr int kInt8Groups = 6;
constexpr int kGroup = 32;
constexpr int kTile = 16;
constexpr int kTileBytes = kTile * kGroup / 2 + kTile * 4;   // of kInt4
constexpr int kTile8Bytes = kTile * kGroup + kTile * 2;       // of kInt8Groups

constexpr int kChunk = 128;     // positions of the KV cache that one attention task reads; see attend()
constexpr int kMaxHeadDim = 512;

constexpr int kLearned = 3;     // a further Rule: the threshold is one of scores before the sigmoid

enum NormKind : int { kNoNorm = 0, kRms = 1, kLayer = 2 };

// ---- shared with step.py from here ----

struct StepNorm {
    const float* weight;  // [size]
    const float* bias;    // [size] or null
    int64_t size;
    float eps;
    int kind;
};

struct StepLinear {
    const void* weight;  // [out][stride] of `dtype`, or tiles, or columns; null: there is no such projection
    const float* scale;  // kInt8: [out]
    const float* bias;   // [out] or null
    const float* norm;   // columns: [in], what an input's size is multiplied by, or null
    int64_t in, out, stride;
    double neurons;      // columns: what each input left out adds to the neurons skipped
    float least;         // columns: smaller inputs are left out
    int dtype, columns;  // columns: `weight` is [in][stride]
    int whole;           // tiles: they meet x as it is, not rounded to 8 bits
};

struct StepMlp {         // neurons bundled as in MlpJob, instead of gate, up and down; weight null: those
    const void* weight;
    const void* low;
    const float* scale;
    const float* norm;
    const float* gate_bias;
    const float* up_bias;
    const float* down_bias;
    const float* mean;
    int64_t* list;           // rows that want different neurons: [listed], those that any row wants, ascending
    uint8_t* selected;       // [neurons][rows], as in MlpJob
    int64_t neurons, stride, keep, listed;
    float threshold, refine;
    int dtype, gated, rule;
    StepLinear reduce, expand;  // kLearned: neurons are scored by expand(reduce(x))
};

struct StepLayer {
    StepNorm attention_in, q_norm, k_norm, attention_out, mlp_in, mlp_out;
    StepLinear q, k, v, o, gate, up, down;
    StepMlp mlp;
    int64_t heads, kv_heads, head_dim, rope_dim, window;  // window 0: all of the past
    const float* cos;                                     // [positions][rope_dim], null: no rotation
    const float* sin;
    float attention_scale, softcap, residual_scale;       // softcap 0: none
    int act, run_attention, run_mlp, parallel;            // parallel: attention and MLP read the same residual
};

struct StepModel {
    const StepLayer* layers;
    const void* embedding;  // [vocabulary][hidden] of `embedding_dtype`
    StepNorm norm;
    StepLinear head;
    int64_t layer_count, hidden;
    float embedding_scale, logit_scale, logit_softcap;
    int embedding_dtype, kv_dtype, logit_dtype;
};

struct StepCache {          // one layer's keys and values: [rows][kv_heads][capacity][head_dim]
    void* keys;
    void* values;
    int64_t row_stride, head_stride;  // in elements
    int64_t first;          // the position that lies at index 0 (window layers forget the oldest)
};

struct StepCall {
    const int64_t* tokens;     // [rows][length]
    const int64_t* positions;  // [rows][length], for the rotation
    const int64_t* start;      // [rows]: the first cache position that counts (left padding before it)
    const StepCache* caches;   // [layers]
    void* logits;              // [rows][length, or the last `wanted`][vocabulary]
    double* skipped;           // neurons left out, summed over tokens and layers
    int64_t rows, length, past, wanted;
    int threads;
};

// ---- to here ----

struct TileJob {
    const void* weight;
    bool bytes;            // kInt8Groups, not kInt4
    const float* bias;
    int64_t groups, out;
    int rows;
    const float* x;        // [rows][groups * kGroup] as it is, or null: as it is rounded, in the next three
    const int8_t* q;       // [rows][groups * kGroup]
    const float* scale;    // [rows][groups]
    const float* sum;      // [rows][groups], scale times the sum of q
    float* y;              // [rows][out]
    Ahead* ahead;
};

// Rows `first` and following of tiles, as floats.
struct UntileJob {
    const void* weight;
    bool bytes;            // kInt8Groups, not kInt4
    int64_t groups, in;
    int64_t first;
    int dtype;             // of `to`: kFloat32, kBFloat16 or kFloat16
    void* to;              // [rows][in]
};

// Rows of floats to the tiles that stand for the very same numbers.
struct TileUpJob {
    const float* from;     // [rows][in], row_stride apart
    int64_t row_stride, rows, in, groups;
    bool bytes;            // kInt8Groups, not kInt4
    void* to;
};

// Queries against some positions of one KV head: leaves, per query, the largest score, the sum of exponentials and
// the weighted sum of values, for `merge`.
struct AttendJob {
    const float* q;        // [queries][head_dim], scaled
    const void* keys;      // at position 0
    const void* values;
    int dtype, queries;
    int64_t head_dim, begin, end;
    const int64_t* from;   // [queries]: the first position each may see
    const int64_t* to;     // [queries]: one past the last
    float softcap;
    float* most;           // [queries]
    float* sum;            // [queries]
    float* value;          // [queries][head_dim]
    Ahead* ahead;
};

struct StepIsa {
    void (*tiles)(const TileJob& job, int64_t begin, int64_t end);
    void (*quantize_groups)(const float* x, int64_t n, int8_t* q, float* scale, float* sum);
    void (*norm)(const StepNorm& norm, const float* x, float* y);
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t size);
    void (*attend)(const AttendJob& job);
    void (*merge)(int64_t parts, int64_t stride, const float* most, const float* sum, const float* value,
                  int64_t head_dim, float* out);
    void (*act)(float* gate, const float* up, int64_t n, int act);  // gate <- act(gate) * up; up null: act(gate)
    void (*add_scaled)(float* to, const float* from, float scale, int64_t n);
    void (*softcap)(float* x, float scale, float cap, int64_t n);
    void (*fetch)(Ahead& ahead, int64_t bytes);
    int64_t (*argmax)(const float* x, int64_t n);  // the first NaN, or the first of the greatest
    float (*exp_sum)(const float* x, int64_t n, float most);
    void (*untile)(const UntileJob& job, int64_t begin, int64_t end);  // rows
    bool (*tile_up)(const TileUpJob& job, int64_t begin, int64_t end);  // tiles; false: some numbers have no such form
};

const StepIsa& generic_step();
#if defined(__x86_64__)
const StepIsa& avx2_step();
const StepIsa& avx512_step();
#endif

}  // namespace coreskip
