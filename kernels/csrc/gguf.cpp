// The blocks of a GGUF file's matrix to tiles that stand for the very same numbers (formats.h). Bytes are moved, nothing
// is computed: written once, for any machine.

#include <string.h>

#include <algorithm>

#include "dispatch.h"
#include "division.h"
#include "team.h"

using namespace coreskip;

namespace {

// Four inputs' numbers in a word, or some of their bits.
typedef uint32_t Word;
constexpr int kWords = kGroup / 4;  // of a group

Word word_at(const uint8_t* p) {
    Word word;
    memcpy(&word, p, sizeof word);
    return word;
}

// One row's place in one group of a tile.
class Place {
  public:
    Place(uint8_t* group, int row) : words_(group + 4 * row), group_(group), row_(row) {}

    void word(int vector, Word value) { memcpy(words_ + vector * kLine, &value, sizeof value); }
    // A row's two bytes, or its one, so many bytes after the group's begin.
    void half(int64_t at, const uint8_t* from) { memcpy(group_ + at + 2 * row_, from, 2); }
    void byte(int64_t at, uint8_t value) { group_[at + row_] = value; }

    // Numbers of 4 to 6 bits: see Nibbles in vector/groups.h.
    template <int more>
    void numbers(const Word* q) {
        Word planes[2] = {};
        for (int k = 0; k < kWords / 2; k++) {
            const Word low = q[k], high = q[k + kWords / 2];
            word(k, (low & 0x0f0f0f0f) | (high & 0x0f0f0f0f) << 4);
            if (more == 0) continue;
            constexpr int per = more ? 4 / more : 1;
            constexpr Word mask = ((1 << more) - 1) * 0x01010101u;
            const int at = more * (k % per);
            planes[k / per] |= (low >> 4 & mask) << at | (high >> 4 & mask) << (at + 4);
        }
        for (int i = 0; i < more; i++) word(4 + i, planes[i]);
    }

  private:
    uint8_t *words_, *group_;
    int row_;
};

// How the file's bytes of a row are read, per block: `bytes` of them, for as many groups as a tile's block has.
template <int more, bool centred>
struct Plain {  // Q4_0, Q4_1, Q5_0, Q5_1
    static constexpr int ends = centred ? 2 : 4, bytes = ends + (more ? 4 : 0) + kGroup / 2;

    static void take(const uint8_t* from, uint8_t* block, int row) {
        Word q[kWords];
        const Word upper = more ? word_at(from + ends) : 0;
        for (int k = 0; k < kWords / 2; k++) {
            const Word both = word_at(from + bytes - kGroup / 2 + 4 * k);
            q[k] = (both & 0x0f0f0f0f) | spread(upper >> 4 * k);
            q[k + kWords / 2] = (both >> 4 & 0x0f0f0f0f) | spread(upper >> (4 * k + kGroup / 2));
        }
        Place place(block, row);
        place.numbers<more>(q);
        constexpr int at = (4 + more) * kLine;
        place.half(at, from);
        if (!centred) place.half(at + 2 * kTile, from + 2);
    }

    // The lowest four bits, each as the fifth of a byte.
    static Word spread(Word bits) {
        return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
    }
};

struct Whole {  // Q8_0
    static constexpr int bytes = 2 + kGroup;

    static void take(const uint8_t* from, uint8_t* block, int row) {
        Place place(block, row);
        for (int k = 0; k < kWords; k++) place.word(k, word_at(from + 2 + 4 * k) ^ 0x80808080);
        place.half(kWords * kLine, from);
    }
};

template <int more>
struct Super {  // Q4_K, Q5_K
    static constexpr int head = 4, ends = 12, upper = head + ends, low = upper + (more ? kGroup : 0);
    static constexpr int bytes = low + kSuper * kGroup / 2;

    static void take(const uint8_t* from, uint8_t* block, int row) {
        Place first(block, row);
        first.half(0, from);
        first.half(2 * kTile, from + 2);
        for (int g = 0; g < kSuper; g++) {
            Word q[kWords];
            for (int k = 0; k < kWords; k++) {
                q[k] = word_at(from + low + g / 2 * kGroup + 4 * k) >> g % 2 * 4 & 0x0f0f0f0f;
                if (more) q[k] |= (word_at(from + upper + 4 * k) >> g & 0x01010101) << 4;
            }
            constexpr int at = (4 + more) * kLine;
            Place place(block + 4 * kTile + g * (at + 2 * kTile), row);
            place.numbers<more>(q);
            place.byte(at, end(from + head, g, 0));
            place.byte(at + kTile, end(from + head, g, 4));
        }
    }

    // The scale (first 0) or least (4) of a group, 6 bits: those of the last four groups lie in pieces.
    static uint8_t end(const uint8_t* s, int g, int first) {
        if (g < 4) return s[g + first] & 63;
        return (s[g + 4] >> first & 15) | s[g - 4 + first] >> 6 << 4;
    }
};

struct Six {  // Q6_K
    static constexpr int upper = kSuper * kGroup / 2, ends = upper + kSuper * kGroup / 4, head = ends + 2 * kSuper;
    static constexpr int bytes = head + 2;

    static void take(const uint8_t* from, uint8_t* block, int row) {
        Place(block, row).half(0, from + head);
        for (int g = 0; g < kSuper; g++) {
            Word q[kWords];
            const uint8_t* low = from + g / 4 * 2 * kGroup + g % 2 * kGroup;
            const uint8_t* high = from + upper + g / 4 * kGroup;
            for (int k = 0; k < kWords; k++)
                q[k] = (word_at(low + 4 * k) >> g / 2 % 2 * 4 & 0x0f0f0f0f) |
                       (word_at(high + 4 * k) >> g % 4 * 2 & 0x03030303) << 4;
            constexpr int at = 6 * kLine;
            Place place(block + 2 * kTile + g * (at + 2 * kTile), row);
            place.numbers<2>(q);
            place.byte(at, from[ends + 2 * g]);
            place.byte(at + kTile, from[ends + 2 * g + 1]);
        }
    }
};

struct RepackJob {
    const uint8_t* from;   // [rows][row_bytes]
    const int64_t* order;  // [rows]: which of them is to come where; null: as they are
    int64_t row_bytes, rows, blocks;
    TileBlock block;
    uint8_t* to;
};

template <class Block>
void repack(const RepackJob& job, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        uint8_t* tile = job.to + t * job.blocks * job.block.bytes;
        if (job.rows < (t + 1) * kTile) memset(tile, 0, job.blocks * job.block.bytes);
        for (int64_t row = t * kTile; row < std::min(job.rows, (t + 1) * kTile); row++) {
            const uint8_t* from = job.from + (job.order ? job.order[row] : row) * job.row_bytes;
            for (int64_t b = 0; b < job.blocks; b++)
                Block::take(from + b * Block::bytes, tile + b * job.block.bytes, static_cast<int>(row - t * kTile));
        }
    }
}

typedef void (*Repack)(const RepackJob& job, int64_t begin, int64_t end);

template <class Block>
Repack repack_for(int64_t row_bytes, int64_t blocks) {
    return row_bytes == blocks * Block::bytes ? repack<Block> : nullptr;
}

Repack repack_of(int format, int64_t row_bytes, int64_t blocks) {
    switch (format) {
        case kInt4: return repack_for<Plain<0, false>>(row_bytes, blocks);
        case kInt8Groups: return repack_for<Whole>(row_bytes, blocks);
        case kInt4Centred: return repack_for<Plain<0, true>>(row_bytes, blocks);
        case kInt5: return repack_for<Plain<1, false>>(row_bytes, blocks);
        case kInt5Centred: return repack_for<Plain<1, true>>(row_bytes, blocks);
        case kInt4Super: return repack_for<Super<0>>(row_bytes, blocks);
        case kInt5Super: return repack_for<Super<1>>(row_bytes, blocks);
        case kInt6Super: return repack_for<Six>(row_bytes, blocks);
        default: return nullptr;
    }
}

}  // namespace

// The tiles of `format` for a GGUF file's matrix of the type that the format holds. raw: [rows][row_bytes]; blocks: of a
// row; order: [rows], see RepackJob. Returns whether rows have the bytes that so many blocks take.
CORESKIP_API int coreskip_repack(const void* raw, int64_t row_bytes, int64_t rows, int64_t blocks, int format,
                                 const int64_t* order, void* out, int threads) {
    const RepackJob job = {static_cast<const uint8_t*>(raw), order, row_bytes, rows, blocks, tile_block(format),
                           static_cast<uint8_t*>(out)};
    const Repack work = repack_of(format, row_bytes, blocks);
    if (!work) return false;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    Lease()->each((tiles + 3) / 4, threads, [&](int64_t i) { work(job, 4 * i, std::min(tiles, 4 * i + 4)); });
    return true;
}
