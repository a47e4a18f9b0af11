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
enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };
enum Rule : int { kListed = 0, kSketch = 1, kGate = 2 };

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

}  // namespace coreskip
