// What the native entry points share: workspace, the division of work, and the choice of neurons. Compiled for the
// machine's base instruction set.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "cpu.h"
#include "cpu_step.h"

namespace coreskip {

extern std::atomic<const Isa*> active;
// For steps of bf16 models. They may round x to bf16, as torch does: a verification of 8 tokens of the embedded model
// took 14.4 ms for 19.1. A single op must not, for its x may be of another dtype.
extern std::atomic<const Isa*> active_bf16;
extern std::atomic<const StepIsa*> active_step;

enum Status : int { kOk = 0, kBadIndex = 1, kNoMemory = 2, kUnknown = 3 };

// Memory that a calling thread keeps between its calls, so that no call allocates once the sizes have been seen.
class Workspace {
  public:
    ~Workspace() { free(base_); }

    bool reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        free(base_);
        size_ = (bytes + 4095) / 4096 * 4096;
        base_ = static_cast<char*>(aligned_alloc(kLine, size_));
        if (!base_) size_ = 0;
        return base_ != nullptr;
    }

    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(base_ + used_);
        used_ += room<T>(count);
        return p;
    }

    template <class T>
    static size_t room(size_t count) {
        return (count * sizeof(T) + kLine - 1) / kLine * kLine;
    }

  private:
    char* base_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

inline int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : dtype >= kInt8 ? 1 : 2; }

struct Range {
    int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts) { return {count * part / parts, count * (part + 1) / parts}; }

inline size_t rows_room(int rows, int64_t stride) {
    return Workspace::room<float>(rows * stride) + Workspace::room<int8_t>(rows * stride) +
           Workspace::room<float>(rows) + Workspace::room<int32_t>(rows);
}

// x in fp32, padded with zeros; quantised where the weights are.
inline Rows load_rows(const Isa& isa, const void* x, int dtype, int w_dtype, int rows, int64_t width, int64_t stride,
               Workspace& memory) {
    float* to = memory.take<float>(rows * stride);
    int8_t* q = memory.take<int8_t>(rows * stride);
    float* scale = memory.take<float>(rows);
    int32_t* sum = memory.take<int32_t>(rows);
    for (int r = 0; r < rows; r++) {
        float* row = to + r * stride;
        isa.to_float(static_cast<const char*>(x) + r * width * size_of(dtype), dtype, row, width);
        memset(row + width, 0, (stride - width) * sizeof(float));
        if (w_dtype >= kInt8) isa.quantize(row, stride, q + r * stride, scale + r, sum + r);
        else isa.arrange(row, stride, w_dtype);
    }
    return {rows, stride, to, q, scale, sum};
}

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

// How many bundles fill so many KiB. Measured over 32..128 KiB on 576 x 1536: blocks of 64 KiB take 5 to 7 % less than
// of 32 in fp32, where these are 4 neurons, and as long in bf16 and int8; fetched 32 KiB ahead, or up to 96, in fp32 and
// bf16, at a tenth of the neurons in int8 not further.
inline int64_t bundles(int64_t kib, int64_t bundle_bytes) {
    const int64_t count = (kib << 10) / bundle_bytes / 2 * 2;
    return count < 2 ? 2 : count;
}

}  // namespace coreskip
