// What Python hands over: the structs that kernels/cpu.py and kernels/step.py fill in through ctypes, with the same
// fields in the same order. `coreskip_sizes` tells how large they are; cpu.py compares when it loads the library.
#pragma once

#include <stdint.h>

namespace coreskip {

// What the ops over bundled neurons have in common.
struct MlpArguments {
    const void* x;             // [rows][hidden] of x_dtype
    const void* weight;        // see MlpJob
    const void* low;
    const float* scale;
    const float* norm;
    const float* gate_bias;    // float, or null
    const float* up_bias;
    const float* down_bias;
    const float* mean;         // float [neurons], or null
    const int64_t* indices;    // lists of `count`: none (lists = 0), one (1), or one per row; -1 entries are skipped
    int64_t hidden, neurons, stride, count;
    int64_t keep;              // kSketch, kGate: how many to keep, or -1: those with a score of `threshold`
    float threshold, refine;   // refine: see MlpJob
    int x_dtype, w_dtype, rows, gated, act, lists, rule, threads;
};

struct StepNorm {
    const float* weight;  // [size]
    const float* bias;    // [size] or null
    int64_t size;
    float eps;
    int kind;
};

// A run of a matrix' units (division.h) that steps read from a file, see Stream. `place`, of the first whole block, is
// where it goes in the ring; `after`: the piece before it, in this lap or the last, that has had that memory; -1: none.
struct StreamPiece {
    int64_t at, bytes;         // in the file
    int64_t place, after;
    int64_t begin, end;        // units
};

class Stream;

// What a layer chooses among, neurons or experts, each in up to three parts: of part p of unit u the file holds
// bytes[p] bytes at at[p] + u * step[p] + from[p]. See Slots.
struct SlotLayer {
    int64_t units, parts;
    int64_t at[3], step[3], from[3], bytes[3];
};

struct SlotFigures {
    int64_t wanted, missed, expected;  // units: that steps wanted, had to wait for, and had read ahead
    int64_t reads, read_bytes;
    int64_t waited;                    // nanoseconds
};

class Slots;

struct StepLinear {
    const void* weight;  // [out][stride] of `dtype`, or tiles, or columns; null: there is no such projection
    const float* scale;  // kInt8: [out]
    const float* bias;   // [out] or null
    const float* norm;   // columns: [in], what an input's size is multiplied by, or null
    const uint8_t* counts;  // kInt4: [stride / kGroup], how many inputs each group has left, see take_some; null: all
    int64_t in, out, stride;
    int64_t tile;        // counts: bytes of a tile
    double neurons;      // columns: what each input left out adds to the neurons skipped
    float least;         // columns: smaller inputs are left out
    int64_t piece, pieces;  // of the model's stream, which brings the weight; none: it is in memory
    int dtype, columns;  // columns: `weight` is [in][stride]
    int whole;           // tiles: they meet x as it is, not rounded to 8 bits
};

// An MLP in 4-bit groups of which neurons are left out, with the numbers of the three matrices in kInt4 tiles.
//   Listed neurons: `rows` hold, for gate and for up, width / 2 bytes of nibbles, the groups' scales and their leasts in
//     fp16, and then the neuron's column of the down projection in width / 2 bytes.
//   Neurons that each token chooses: `scan` is what it reads of all of them, `rest` what it then reads of candidates, and
//     `rows` the columns of the down projection of those that it keeps. Scanned are gate and up in kInt4, and all are
//     candidates; or their upper bits, and the last ones are the rest; or, where there is a `reach`, the gates, and the
//     rest is the up row, nibbles, scales and leasts.
// Groups of the down projection are of 32 neurons: `ends` hold each one's scales, and its leasts. Of rows and columns the
// low nibbles of 32 bytes come before the high ones, in columns in an order of their own (add_down).
struct NeuronGroups {
    const uint8_t* scan;     // [tiles of 16 neurons][(gate,) up][groups][bytes], or null: neurons are listed
    const uint8_t* rows;     // [neurons][row_bytes]
    const uint8_t* rest;     // kInt4Upper: [neurons][(gate,) up][width / 8]; reach: [neurons][rest_bytes]; or null
    const uint16_t* ends;    // [neurons / 32][2][width]
    const float* norm;       // scan: [neurons], what an activation left out costs
    const float* reach;      // [neurons], what act(gate) can come to, or null: it is not looked at alone
    const float* gate_bias;  // [neurons] or null
    const float* up_bias;
    const float* mean;       // what each neuron counts as where it is left out, or null
    const int32_t* place;    // [neurons], which of the rows a listed neuron's is, or null: they are in order
    int64_t neurons, width, row_bytes, rest_bytes;  // width: hidden, padded to 64
    float threshold, refine; // the least estimate of a candidate; of exact scores, the least that is kept
    int format, gated;
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
    const void* gates;          // kGate: [neurons][stride], gates apart from the bundles; null: they are in these
    int64_t slots;              // which layer of the model's slots brings what is chosen, from 1; 0: it is in memory
    NeuronGroups groups;        // instead of all above but lists and down_bias; its rows null: there are none
};

// How a token's experts are chosen and weighed by a router's logits.
struct StepRouter {
    StepLinear logits;           // [count][hidden]
    const float* correction;     // [count], added to scores where experts are chosen, or null
    const uint8_t* kept;         // [count], 0: the expert is as if it were not there; null: all are
    int64_t count, chosen;       // experts in all, and of a token
    int64_t groups, groups_kept; // of neighbouring experts; a token's are in the best of these groups
    float added, floor;          // normalized: weights are divided by their sum + added, and by no less than floor
    float scale;                 // multiplies all weights
    float least;                 // of the token's greatest weight: experts with a smaller share are left out
    float jitter;                // kMixer: see there
    int scoring, by_pairs, normalized;  // by_pairs: groups are as good as their two best in sum, else as their best
};

// A mixture of experts. The layer's gate, up and down are the expert that all tokens share, where there is one.
// Gated experts compute down(act(gate) * (up + offset)), gate at most `limit` and up within +-limit; where act is kSilu,
// it is gate * sigmoid(slope * gate).
struct StepExperts {
    StepRouter router;
    StepLinear* matrices;        // [count][3]: gate, up, down of each; null: there is no mixture
    StepLinear shared_gate;      // [1][hidden]: its sigmoid weighs the shared expert; weight null: that counts whole
    float limit, slope, offset;
    float shared_scale;          // what the shared expert's output is multiplied by, where no gate weighs it
    int by_inputs;               // an expert's weight multiplies what it reads, not what it gives (Llama 4)
    int64_t slots;               // as in StepMlp; matrices of experts that are wanted then get their places
};

// Where the heads of one kind lie among a projection's outputs, of which a token has `width`: head h begins at
// offset + h / run * step + h % run * head_dim. A projection of q, k and v in one has them in turn, head by head (GPT-NeoX),
// group by group (Falcon), or otherwise.
struct StepHeads {
    int64_t offset, run, step, width;
};

// Latent attention, see step_latent.h. The layer's `q` are the queries of all heads, nope + rope of each, of what q_low gives
// or else of x; its `k`, floats, expands a latent to keys and values, nope + value of each head.
struct StepLatentPart {
    StepLinear q_low, kv_low;        // kv_low gives a latent, and what is turned; its weight null: no latent attention
    StepNorm q_low_norm, kv_low_norm;
    int64_t rank, nope, rope, value;
    int apart;                       // neighbours are turned, and come to lie half of what is turned apart
};

// What a recurrence reads of a token, in the order of StepRecurrence's places.
enum Recurrent : int { kRead, kKey, kValue, kOpen, kRate, kDecay, kRecurrentParts };

// A recurrence in place of an attention, see step_recurrence.h: read_heads heads of queries and keys, of key_dim numbers,
// and `heads` heads of values, of value_dim, of which each of the former serves as many, in turn.
struct StepRecurrence {
    StepLinear more[2];               // inputs beside the layer's q, k, v and attention_gate
    StepHeads places[kRecurrentParts];
    int from[kRecurrentParts];        // of which input each is: q, k, v, attention_gate, more[0], more[1]
    const float* taps;                // [channels][tap_count]; null: there is no recurrence
    const float* tap_bias;            // [channels], or null
    const float* fading;              // [heads]: what a step makes of a state is e^(-fading * softplus(decay + fading_bias))
    const float* fading_bias;
    StepNorm norm;                    // of each head's output
    int64_t tap_count, read_heads, heads, key_dim, value_dim;
    float most_rate, unit_eps;        // the rate is most_rate * sigmoid; see to_length()
    int tap_act, open_act;            // of what taps give, and of what opens each head's output
};

struct StepLayer {
    StepNorm attention_in, q_norm, k_norm, attention_out, mlp_in, mlp_out;
    StepNorm attention_after, mlp_after;  // of the residual stream, once a half has been added to it (BART)
    StepLinear q, k, v, o, gate, up, down;
    StepMlp mlp;
    StepExperts experts;
    StepHeads q_heads, k_heads, v_heads;
    StepLatentPart latent;                                // its keys and values: one head of latents, one of what is turned
    int64_t heads, kv_heads, head_dim, rope_dim, window;  // window 0: all of the past
    int64_t cache;                                        // which of a sequence's caches it writes to
    const float* cos;                                     // [positions][rope_dim], null: no rotation
    const float* sin;
    const float* slopes;                                  // [heads]: ALiBi's, which a score loses for each position back; or null
    const float* sinks;                                   // [heads]: a further score, which no value belongs to; or null
    float attention_scale, softcap, residual_scale;       // softcap 0: none
    int act, run_attention, run_mlp, parallel;            // parallel: attention and MLP read the same residual
    int fused;      // `q` holds k and v, too
    int paired;     // rotation turns neighbours, not halves
    int turned;     // heads of q and k are normed after the rotation
    int special;    // whether anything of what follows is there: few models look at it

    StepNorm v_norm, attended_norm, inner_norm;  // of each head of v; of what `o` reads, and of what `down` reads (BitNet)
    StepLinear attention_gate;  // what heads are multiplied by before `o`, from what q reads; none: in `q`, or nowhere
    StepHeads gate_heads;
    float v_scale;              // what is cached of v is multiplied by this
    int gating;                 // what is made of the gates of heads: see Gating
    int gate_width;             // numbers of a gate: one for each of a head's, or one for all
    // A third half (Gemma 4): x += side_norm(side_out(act(side_gate(x)) * p)), where p is the layer's part of what a token
    // has for all layers, from side_at on; side_gate none: there is no such.
    StepLinear side_gate, side_out;
    StepNorm side_norm;
    int64_t side_at;
    int side_act;
    float scale;                // what the residual stream is multiplied by in the end (Gemma 4)
    const float* curve;         // [4]: the numbers of a kCurve
    const uint8_t* wanted;      // [wanted_rows][neurons]: what `down` reads counts where it is not 0; null: all does
    int64_t wanted_rows;        // of the sequences, or 1 for all of them
    StepRecurrence recurrence;  // its inputs are q, k, v and attention_gate, and its cache: see step_recurrence.h
};

struct StepModel {
    const StepLayer* layers;
    const void* embedding;  // [vocabulary][hidden] of `embedding_dtype`, or tiles of that format
    const void* places;     // [positions][hidden] of `places_dtype`, added to embeddings by position; null: nothing is
    StepNorm embedding_norm;  // of the sum
    StepNorm token_norm;      // of the tokens' embeddings, before positions are added to them
    StepNorm norm;
    StepLinear head;
    StepLinear before_head;  // [hidden][hidden]: the head reads before_norm(act(before_head(norm(x)))) (ModernBERT)
    StepNorm before_norm;
    // What a token has for all layers' third halves: side_sum * (side_norm(side_scale * side(x)) + side_table_scale * row),
    // with x its embedding, its row of side_table, and side_width numbers of each layer normed by themselves.
    StepLinear side;
    StepNorm side_norm;
    const void* side_table;   // [vocabulary][side.out] of side_dtype
    Stream* stream;         // brings what is not in memory, or null
    Slots* slots;           // bring neurons and experts that are chosen, or null
    int64_t side_width, layer_count, hidden, embedding_stride;  // of tiles: inputs of one row with its padding
    float embedding_scale, logit_scale, logit_softcap, side_scale, side_table_scale, side_sum;
    int embedding_dtype, places_dtype, kv_dtype, logit_dtype, before_act, side_dtype;
    int reads_ahead;        // whether slots are told what the next layer will probably want
};

struct StepCache {        // one layer's keys and values of one sequence: [kv_heads][capacity][head_dim]
    void* keys;
    void* values;
    int64_t head_stride;  // in elements
    int64_t first;        // the position that lies at index 0 (window layers forget the oldest)
};

struct StepCall {
    const int64_t* tokens;     // [rows][length]
    const int64_t* positions;  // [rows][length], for the rotation
    const int64_t* start;      // [rows]: the first cache position that counts (left padding before it)
    const int64_t* past;       // [rows]: positions that are in its cache already
    const StepCache* const* caches;  // [rows][layers that have an attention]
    void* logits;              // [rows][length, or the last `wanted`][vocabulary]
    float* hidden;             // [rows][length][hidden], the residual stream, which goes through the layers in place of
                               // tokens' embeddings and comes back in place of logits; null: tokens become logits
    double* skipped;           // neurons left out, those of experts included, summed over tokens and layers
    int64_t rows, length, wanted;
    int threads;
};

struct PrefillCall {           // tokens of one sequence, on their way through the layers
    float* x;                  // the residual stream, [length][hidden]
    const int64_t* positions;  // [length], for the rotation
    const StepCache* cache;    // [layers]: the sequence's
    float* activations;        // [length][neurons]: what the down projection meets, of one layer alone; null: not wanted
    int64_t length, past;
    int64_t start;             // the first cache position that counts (left padding before it)
    int threads;
};

}  // namespace coreskip
