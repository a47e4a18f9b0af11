// Lists of neurons: those that a rule chooses, and those that callers name.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "dispatch.h"

namespace coreskip {

// Copies a list without its -1 entries. Returns how many remain, or -1 where an index is out of range.
inline int64_t compact(const int64_t* list, int64_t count, int64_t neurons, int64_t* to) {
    int64_t kept = 0;
    bool bad = false;
    for (int64_t i = 0; i < count; i++) {
        to[kept] = list[i];
        kept += list[i] >= 0;
        bad |= list[i] < -1 || list[i] >= neurons;
    }
    return bad ? -1 : kept;
}

// Turns one list per row into one ascending list and a table of who wants what: every bundle is read once.
inline int64_t merge(const int64_t* lists, int64_t count, int rows, int64_t neurons, uint8_t* selected, int64_t* to) {
    memset(selected, 0, neurons * rows);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t n = lists[r * count + i];
            if (n < -1 || n >= neurons) return -1;
            if (n >= 0) selected[n * rows + r] = 1;
        }
    int64_t kept = 0;
    for (int64_t n = 0; n < neurons; n++) {
        uint8_t any = 0;
        for (int r = 0; r < rows; r++) any |= selected[n * rows + r];
        to[kept] = n;
        kept += any;
    }
    return kept;
}

// One row's neurons with a score of at least `threshold` or, where keep >= 0, the `keep` best (of equal scores the
// first); all scores are 0 or more, or NaN. Ascending, then -1. keys: [neurons], scratch.
inline void choose(const float* score, int64_t neurons, int64_t keep, float threshold, uint32_t* keys, int64_t* to,
            int64_t width) {
    const int64_t kept = active.load()->choose(score, neurons, keep, threshold, keys, to, width);
    std::fill(to + kept, to + width, -1);
}

}  // namespace coreskip
