// How work is divided: among threads, and into pieces.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>

#include "formats.h"

namespace coreskip {

struct Range {
    int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts) { return {count * part / parts, count * (part + 1) / parts}; }

// One thread's stretch of the work that all share out: it takes pieces from the front, the others, when they are done
// with their own, from the back, which its owner fetches last. The cores of a shared machine are not equally fast.
class alignas(kLine) Stretch {
  public:
    void set(Range range) { range_.store(pack(range.begin, range.end), std::memory_order_relaxed); }

    bool take_front(int64_t size, Range& piece) {
        return take([&](Range all) { return Range{all.begin, std::min(all.begin + size, all.end)}; }, piece);
    }
    bool take_back(int64_t size, Range& piece) {
        return take([&](Range all) { return Range{std::max(all.begin, all.end - size), all.end}; }, piece);
    }

  private:
    static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | end; }

    template <class Choose>
    bool take(Choose choose, Range& piece) {
        uint64_t seen = range_.load(std::memory_order_relaxed);
        for (;;) {
            const Range all = {static_cast<int64_t>(seen >> 32), static_cast<int64_t>(seen & 0xffffffff)};
            if (all.begin >= all.end) return false;
            piece = choose(all);
            const bool front = piece.begin == all.begin;
            const uint64_t rest = front ? pack(piece.end, all.end) : pack(all.begin, piece.begin);
            if (range_.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return true;
        }
    }

    std::atomic<uint64_t> range_{0};  // begin and end, 32 bits each
};

// How many bundles fill so many KiB. Measured over 32..128 KiB on 576 x 1536: blocks of 64 KiB take 5 to 7 % less than
// of 32 in fp32, where these are 4 neurons, and as long in bf16 and int8; fetched 32 KiB ahead, or up to 96, in fp32 and
// bf16, at a tenth of the neurons in int8 not further.
inline int64_t bundles(int64_t kib, int64_t bundle_bytes) {
    const int64_t count = (kib << 10) / bundle_bytes / 2 * 2;
    return count < 2 ? 2 : count;
}

}  // namespace coreskip
