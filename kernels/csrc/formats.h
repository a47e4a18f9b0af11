// The numbers and names that all native code shares: weight formats, activations, rules, sizes of blocks.
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
// kCurve is a family of four numbers a, b, c, d: a x^2 + b x above 0, and c (e^x - 1) + d x below (xIELU, ELU, leaky ReLU).
enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4, kCurve = 5 };
enum Rule : int { kListed = 0, kSketch = 1, kGate = 2 };

// Further weight formats are tiles of kTile rows by groups of kGroup inputs, group by group: one stream through memory. A
// group's numbers q come first, in vectors of kLine bytes, four inputs a row in each 32-bit word:
//   4 bits: 4 vectors, the four inputs from 4k on in the low nibbles, the four 16 further on in the high ones;
//   3 bits: 3 vectors, of units of four inputs, see Thirds in vector/groups.h;
//   5 and 6 bits: as many, then 1 or 2 vectors of the bits above, see Nibbles in vector/groups.h;
//   8 bits: 8 vectors.
// Then come its ends, per row:
//   centred:  scale in fp16,                w = scale * (q - half), half being 8, 16 or 128;
//   two ends: scale and least in fp16,      w = scale * q + least;
//   super:    scale and least as bytes,     w = (d * scale) * q - (dmin * least), with d and dmin in fp16 before the
//             first of 8 groups; of 6 bits: two signed scales, one for each 16 inputs, w = (d * scale) * (q - 32).
// They hold the numbers of llama.cpp's types to the bit, in as many bytes or up to 3 % more. x is rounded group by group:
// a few of its channels are ten times as large as the rest, and one scale for all of them cost the embedded model 2.4 %
// perplexity.
enum TileFormat : int {
    kInt4 = 5,         // two ends: Q4_1
    kInt8Groups = 6,   // centred: Q8_0
    kInt4Centred = 7,  // Q4_0
    kInt5 = 8,         // two ends: Q5_1
    kInt5Centred = 9,  // Q5_0
    kInt4Super = 10,   // Q4_K
    kInt5Super = 11,   // Q5_K
    kInt6Super = 12,   // Q6_K
    kInt4Upper = 13,   // the upper three bits of kInt4, the last one counted as its middle: w = scale * (2q + 0.5) + least
};
constexpr int kGroup = 32;
constexpr int kTile = 16;
constexpr int kSuper = 8;  // groups of a super-block

// How many groups of a tile lie together with what they share, and in how many bytes; none for other formats. Static, for
// the rule in vector/isa.h.
struct TileBlock {
    int groups, bytes;
};
static constexpr TileBlock tile_block(int format) {
    switch (format) {
        case kInt4: return {1, 320};
        case kInt8Groups: return {1, 544};
        case kInt4Centred: return {1, 288};
        case kInt5: return {1, 384};
        case kInt5Centred: return {1, 352};
        case kInt4Super: return {kSuper, 2368};
        case kInt5Super: return {kSuper, 2880};
        case kInt6Super: return {kSuper, 3360};
        case kInt4Upper: return {1, 256};
        default: return {0, 0};
    }
}
static constexpr bool grouped(int format) { return tile_block(format).groups > 0; }
// Bytes of a tile of so many groups.
static constexpr int64_t tile_bytes(int format, int64_t groups) {
    return groups / tile_block(format).groups * tile_block(format).bytes;
}

// Bytes that a scan of neurons fetches ahead, of what lies in a row.
constexpr int64_t kScanLead = 64 << 10;

constexpr int kChunk = 128;     // positions of the KV cache that one attention task reads; see attend()
constexpr int kMaxHeadDim = 512;

constexpr int kLearned = 3;     // a further Rule: the threshold is one of scores before the sigmoid

// How experts are scored: by the softmax of all logits, by their sigmoids, by the logits themselves, of which the chosen
// ones' softmax or sigmoids weigh them, or as the sparse mixer of PhiMoE does it: the two greatest, each weighed by a softmax over
// those logits alone that are within 2 * jitter of it, relative to their size.
enum Scoring : int { kSoftmax = 0, kSigmoid = 1, kSoftmaxOfChosen = 2, kMixer = 3, kSigmoidOfChosen = 4 };

enum Gating : int { kNoGate = 0, kSigmoidGate = 1, kSoftplusGate = 2 };
enum NormKind : int { kNoNorm = 0, kRms = 1, kLayer = 2 };

}  // namespace coreskip
