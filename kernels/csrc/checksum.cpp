// A checksum that is taken as fast as memory is read: packed models of gigabytes are checked at every start.

#include <string.h>

#include <atomic>

#include "dispatch.h"
#include "team.h"

using namespace coreskip;

namespace {

constexpr int64_t kPiece = 1 << 18;  // words that a thread takes at a time

// Every word counts by what is one to one in it, times an odd number of its place: no change of one word is missed.
uint64_t sum_of(const char* memory, int64_t first, int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; i++) {
        uint64_t word;
        memcpy(&word, memory + 8 * i, sizeof word);
        sum += (word ^ word >> 32) * (2 * static_cast<uint64_t>(first + i) + 1);
    }
    return sum;
}

}  // namespace

// Of `bytes` bytes, as little-endian words, the last one filled up with zeros; kernels/store.py has the formula. first:
// the place of the first word, where these are a part of what the sum is of.
CORESKIP_API uint64_t coreskip_checksum(const void* memory, int64_t bytes, int64_t first, int threads) {
    const char* from = static_cast<const char*>(memory);
    const int64_t words = bytes / 8;
    std::atomic<uint64_t> sum{0};
    Lease()->each((words + kPiece - 1) / kPiece, threads, [&](int64_t i) {
        sum += sum_of(from, first, i * kPiece, (i + 1) * kPiece < words ? (i + 1) * kPiece : words);
    });
    uint64_t rest = 0;
    memcpy(&rest, from + 8 * words, bytes % 8);
    return sum + (rest ^ rest >> 32) * (2 * static_cast<uint64_t>(first + words) + 1);
}
