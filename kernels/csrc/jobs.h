// What the thread layer asks of the vector code (vector/isa.h, vector/step_isa.h, compiled once per instruction set).
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "formats.h"

namespace coreskip {

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
    char* const* place;        // where each neuron's bundle lies, or null: one after the other
    bool gates_alone;          // kGate: what is scanned are gates, one after the other
    const float* curve;        // the numbers of a kCurve
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
    // See choose() in choice.h; keys: [neurons], scratch. Returns how many there are.
    int64_t (*choose)(const float* score, int64_t neurons, int64_t keep, float threshold, uint32_t* keys, int64_t* to,
                      int64_t width);
    uint64_t (*read)(const void* memory, int64_t bytes);
};

// Rows of x that were rounded for tiles lie kMaxRows at a time, or as many as there are: of each group the numbers of all
// these rows, side by side, and so their scales and sums. A kernel reads them at fixed distances from one address: with
// this and sums that stay in registers a prompt of 128 tokens took 0.81 of the time, a step of 16 rows 0.89. The place of a
// row's first group; of the next ones so many further on; and places that all rows take up. Static, for the rule in vector/isa.h.
static inline int64_t places_apart(int64_t rows) { return rows < kMaxRows ? rows : kMaxRows; }
static inline int64_t first_place(int64_t row, int64_t rows, int64_t groups) {
    const int64_t together = places_apart(rows);
    return row / together * together * groups + row % together;
}
static inline int64_t places_of(int64_t rows, int64_t groups) {
    const int64_t together = places_apart(rows);
    return (rows + together - 1) / together * together * groups;
}

struct TileJob {
    const void* weight;
    int format;            // a TileFormat
    const float* bias;
    int64_t groups, out;
    int rows;
    const float* x;        // [rows][groups * kGroup] as it is, or null: as it is rounded, in the next four
    const int8_t* q;       // at each place kGroup, see first_place
    const float* scale;    // by place
    const float* sum;      // by place, scale times the sum of q
    const int32_t* half;   // kInt6Super: at each place 2, the sums of each half of q
    float* y;              // [rows][out]
    Ahead* ahead;
    const uint8_t* counts; // kInt4, rounded x: as in StepLinear, or null
    int64_t tile;
};

// Rows `first` and following of tiles, as floats.
struct UntileJob {
    const void* weight;
    int format;            // a TileFormat
    int64_t groups, in;
    int64_t first;
    int dtype;             // of `to`: kFloat32, kBFloat16 or kFloat16
    void* to;              // [rows][in]
};

// Rows of floats to the tiles that stand for the very same numbers.
struct TileUpJob {
    const float* from;     // [rows][in], row_stride apart
    int64_t row_stride, rows, in, groups;
    int format;            // a TileFormat
    void* to;
};

// Some rows, or columns, of tiles in kInt4, kInt5 or kInt8Groups.
struct TakeJob {
    const void* weight;
    int format;
    int64_t groups;        // of a row
    const int64_t* list;   // the rows, or the columns, ascending
    int64_t count;
    void* to;              // tiles of the rows, in the same format; or of the columns, in kInt8Groups
    const uint8_t* counts; // take_some: of the columns, how many are in each group; and the bytes of a tile of `to`
    int64_t tile;
};

// x rounded group by group.
struct GroupedRows {
    int rows;
    const int8_t* q;       // [rows][width]
    const float* scale;    // [rows][width / kGroup]
    const float* sum;
};

struct NeuronsJob {
    const NeuronGroups& n;
    GroupedRows x;
    int act;
    const int64_t* list;      // ascending, or null: all neurons
    const uint8_t* selected;  // [neurons][rows], or null: all rows want what is listed
    int64_t count;            // of the list
    float* scales;            // room for scales_room() floats
    int8_t* turned;           // room for x in another order, [rows][width]
    uintptr_t after;          // what is read after the last neuron; 0: not known
    const float* curve;       // the numbers of a kCurve
};

// From one dimension of turned queries to the next: whole vectors. Where queries lie turned, `from`, `to`, `most` and `sum`
// have as much room, and beyond the queries `from`, `to` are a query's, too.
static inline int64_t turned_apart(int64_t queries) { return (queries + kTile - 1) / kTile * kTile; }

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
    const float* slopes;   // [slope_count], the queries' in turn: what a score loses for each position back; or null
    int slope_count;
    float* most;           // [queries]
    float* sum;            // [queries]
    float* value;          // [queries][head_dim]
    Ahead* ahead;
    const float* turned;   // of many queries: q by its dimensions, turned_apart(queries) apart; or null
    const float* more;     // [queries][more_dim], scaled: scores have a second part, by further keys; or null
    const void* more_keys;
    int64_t more_dim;
};

// One token of a linear recurrence that corrects what it holds (gated delta rule, 2412.06464), of one head: the state is
// multiplied by `decay`, what it gives for k is moved towards v by `rate`, and out is what it then gives for q.
struct RecallJob {
    float* state;                 // [keys][values]
    const float *q, *k;           // [keys]
    const float* v;               // [values]
    float decay, rate;
    int64_t keys, values;
    float* out;                   // [values]
};

struct StepIsa {
    void (*tiles)(const TileJob& job, int64_t begin, int64_t end);
    // half: see TileJob; null: not wanted.
    // A row's groups, to places that are `apart`.
    void (*quantize_groups)(const float* x, int64_t n, int64_t apart, int8_t* q, float* scale, float* sum, int32_t* half);
    void (*norm)(const StepNorm& norm, const float* x, float* y);
    // paired: neighbours are turned, each by the angle that halves have at the same place; else x[i] with x[i + size / 2]
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t size, bool paired);
    void (*attend)(const AttendJob& job);
    void (*merge)(int64_t parts, int64_t stride, const float* most, const float* sum, const float* value,
                  int64_t head_dim, float* out, const float* sink);  // sink: a score without a value, or null
    void (*scale)(float* x, float factor, int64_t n);
    // gate <- act(gate) * up; up null: act(gate)
    void (*act)(float* gate, const float* up, int64_t n, int act, const float* curve);
    void (*add_scaled)(float* to, const float* from, float scale, int64_t n);
    void (*softcap)(float* x, float scale, float cap, int64_t n);
    void (*fetch)(Ahead& ahead, int64_t bytes);
    int64_t (*argmax)(const float* x, int64_t n);  // the first NaN, or the first of the greatest
    float (*exp_sum)(const float* x, int64_t n, float most);
    void (*untile)(const UntileJob& job, int64_t begin, int64_t end);  // rows
    bool (*tile_up)(const TileUpJob& job, int64_t begin, int64_t end);  // tiles; false: some numbers have no such form
    void (*take_rows)(const TakeJob& job, int64_t begin, int64_t end);     // tiles of `to`
    void (*take_columns)(const TakeJob& job, int64_t begin, int64_t end);  // tiles
    void (*take_some)(const TakeJob& job, int64_t begin, int64_t end);     // tiles
    // Adds to acc, [rows][width], what neurons `begin` to `end` come to, or those at these positions of the list. Returns
    // how many of those that are scanned were left out, summed over rows.
    int64_t (*neurons)(const NeuronsJob& job, int64_t begin, int64_t end, float* acc);
    void (*recall)(const RecallJob& job);
};

const Isa& generic_isa();
const StepIsa& generic_step();
#if defined(__x86_64__)
const Isa& avx2_isa();
const Isa& avx512_isa();
const Isa& avx512bf16_isa();
const StepIsa& avx2_step();
const StepIsa& avx512_step();
#endif

}  // namespace coreskip
