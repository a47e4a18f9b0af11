// What the thread layer (cpu.cpp) and the vector code (cpu_isa.h, compiled once per instruction set) share.
#pragma once

#include <stdint.h>

namespace coreskip {

constexpr int kMaxRows = 8;    // rows of x one call takes: a verification batch
constexpr int kMaxBlock = 16;  // neurons whose activations are computed together
constexpr int kLine = 64;      // bytes of a cache line
constexpr int kPad = 128;      // bytes; weight rows are padded to multiples: two vectors of the widest kind

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDtypes = 3 };
enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

struct MlpJob {
    const void* weight;       // [neurons][parts][stride]; parts = (gate,) up, down
    int64_t stride;           // elements of one padded row
    bool gated;
    int act;
    int block;                // neurons per block, 2..kMaxBlock
    int ahead;                // neurons between a prefetch and its use
    const float* gate_bias;   // [neurons] or null
    const float* up_bias;     // [neurons] or null
    const int64_t* list;      // the neurons to compute, or null: all of them, in order
    const uint8_t* selected;  // [neurons][rows]: which rows want a neuron; null: all rows want all
    const float* x;           // [rows][stride], zero beyond the hidden size
    int rows;
};

struct LinearJob {
    const void* weight;  // [out_features][stride]
    int64_t stride;
    const float* bias;   // [out_features] or null
    const float* x;      // [rows][stride]
    int rows;
    int64_t out_features;
    float* y;            // [rows][out_features]
};

// One instruction set's functions. `begin` and `end` are one thread's share of the neurons (or outputs).
struct Isa {
    const char* name;
    void (*mlp[kDtypes])(const MlpJob& job, int64_t begin, int64_t end, float* acc);
    void (*linear[kDtypes])(const LinearJob& job, int64_t begin, int64_t end);
    void (*to_float)(const void* from, int dtype, float* to, int64_t n);
    void (*from_float)(const float* from, void* to, int dtype, int64_t n);
    void (*arrange)(float* x, int64_t n);  // into the order in which bf16 weights are read, and back
    void (*restore)(float* x, int64_t n);
    void (*add)(float* to, const float* from, int64_t n);
    uint64_t (*read)(const void* memory, int64_t bytes);
};

const Isa& generic_isa();
#if defined(__x86_64__)
const Isa& avx2_isa();
const Isa& avx512_isa();
#endif

}  // namespace coreskip
