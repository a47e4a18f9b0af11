// What the thread layer (cpu.cpp) and the vector code (cpu_isa.h, compiled once per instruction set) share.
#pragma once

#include <stdint.h>

namespace coreskip {

constexpr int kMaxRows = 8;    // rows of x one call takes: a verification batch
constexpr int kMaxBlock = 16;  // neurons whose activations are computed together
constexpr int kLine = 64;      // bytes of a cache line
// Rows are padded to this many bytes, two vectors of the widest kind, or nibbles, as many again. Rows of kInt8, which
// are read one vector at a time, are padded to kLine.
constexpr int kPad = 128;

// The first three are also those of x. kInt8 is one byte a weight, w = scale[row] * (byte - 128). kSliced is the same
// numbers in two planes of nibbles, byte = 16 * high + low; down rows stay whole bytes.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kSliced = 4, kDtypes = 5 };
enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };
enum Rule : int { kListed = 0, kSketch = 1, kGate = 2 };

// x as the kernels read it. Quantised weights meet quantised rows: x is about scale * q.
struct Rows {
    int count;
    int64_t stride;        // elements of one padded row, of x as of the weights
    const float* x;        // [count][stride], zero beyond the width
    const int8_t* q;       // [count][stride]
    const float* scale;    // [count]
    const int32_t* sum;    // [count]: of q, for the 128 that every byte is too large
};

struct MlpJob {
    const void* weight;        // [neurons][(gate,) up, down][stride]; kSliced: [neurons][(gate,) up][stride / 2]
    const void* low;           // kSliced: [neurons][(gate,) up][stride / 2] and [stride] of down, side by side
    const float* scale;        // quantised: [neurons][(gate,) up, down]
    bool gated;
    int act;
    int block;                 // neurons per block, 2..kMaxBlock
    int ahead;                 // neurons between a prefetch and its use
    const float* gate_bias;    // [neurons] or null
    const float* up_bias;      // [neurons] or null
    int64_t* list;             // the neurons to compute, or null: all of them, in order
    uint8_t* selected;         // [neurons][rows]: which rows want a neuron; null: all rows want all
    Rows rows;
    int rule;
    const float* norm;         // kSketch: [neurons], the length of each down row
    int32_t* high;             // kSliced: [neurons][projections][rows], products with the high plane
    float* known_gate;         // kGate: [neurons][rows]
    float* score;              // kSketch, kGate: [rows][neurons]
    int64_t neurons;
    const float* mean;         // [neurons] or null: what each neuron counts as where it is left out
    uintptr_t after;           // an address: what is read after the last neuron; 0: not known
    float refine;              // kSketch: listed neurons with |h - mean| * norm below this are dropped; 0: none
    float* exact;              // refine: [listed][rows], room for the activations of those that stay
};

// What a thread will read next: memory from `at` to `end`, then from `then` to `then_end`. A kernel fetches it into the
// second cache level, as many bytes as it reads meanwhile. Addresses as numbers: they may run past an array's end.
struct Ahead {
    uintptr_t at, end, then, then_end;
};

struct LinearJob {
    const void* weight;  // [out_features][stride]
    const float* scale;  // quantised: [out_features]
    const float* bias;   // [out_features] or null
    Rows rows;
    int64_t out_features;
    float* y;            // [rows][out_features]
    Ahead* ahead;        // null: the rows after those it reads
};

struct ColumnsJob {
    const void* weight;       // [inputs][stride], of which `width` outputs are summed
    int64_t stride, width, inputs;
    const float* x;           // [rows][inputs]
    int rows;
    const int64_t* list;      // the inputs that any row wants
    const uint8_t* selected;  // [inputs][rows]
};

// One instruction set's functions. `begin` and `end` are one thread's share of the neurons (or outputs).
struct Isa {
    const char* name;
    // Returns how many neurons `refine` dropped, summed over rows; they are gone from `list` and `selected`.
    int64_t (*mlp[kDtypes])(const MlpJob& job, int64_t begin, int64_t end, float* acc);
    // Fills `high`, `known_gate` and `score`, whatever the format and the rule need, for listed neurons.
    void (*scan[kDtypes])(const MlpJob& job, int64_t begin, int64_t end);
    void (*linear[kDtypes])(const LinearJob& job, int64_t begin, int64_t end);
    void (*columns[kInt8])(const ColumnsJob& job, int64_t begin, int64_t end, float* acc);
    void (*to_float)(const void* from, int dtype, float* to, int64_t n);
    void (*from_float)(const float* from, void* to, int dtype, int64_t n);
    void (*quantize)(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum);
    // Into the order in which weights of `dtype` are expanded to fp32, and back.
    void (*arrange)(float* x, int64_t n, int dtype);
    void (*restore)(float* x, int64_t n, int dtype);
    void (*add)(float* to, const float* from, int64_t n);
    // See choose() in cpu_work.h; keys: [neurons], scratch. Returns how many there are.
    int64_t (*choose)(const float* score, int64_t neurons, int64_t keep, float threshold, uint32_t* keys, int64_t* to,
                      int64_t width);
    uint64_t (*read)(const void* memory, int64_t bytes);
};

const Isa& generic_isa();
#if defined(__x86_64__)
const Isa& avx2_isa();
const Isa& avx512_isa();
const Isa& avx512bf16_isa();
#endif

}  // namespace coreskip
