// What is looked for in logits: the likeliest token, and its probability.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "dispatch.h"
#include "division.h"
#include "workspace.h"

namespace coreskip {

constexpr int64_t kSlice = 4096;  // logits looked at together

// The greatest of the numbers shown, and the first place of it, in whatever order they are shown. A NaN is greater than all,
// as in torch.
struct Greatest {
    float value = 0;
    int64_t at = -1;  // none was shown

    void show(float other, int64_t place) {
        const bool greater = other > value || (other != other && value == value);
        const bool alike = other == value || (other != other && value != value);
        if (at < 0 || greater || (alike && place < at)) *this = {other, place};
    }
};

// A row of logits. slice: [kSlice], scratch.
struct Logits {
    const void* row;
    int dtype;
    float* slice;
    const Isa& isa = *active.load();
    const StepIsa& step = *active_step.load();

    Greatest greatest(Range range) const {
        Greatest found{};
        in_slices(range, [&](int64_t begin, int64_t n) {
            const int64_t first = step.argmax(slice, n);
            found.show(slice[first], begin + first);
        });
        return found;
    }

    // What softmax divides e^(x - most) by.
    float exp_sum(Range range, float most) const {
        float sum = 0;
        in_slices(range, [&](int64_t, int64_t n) { sum += step.exp_sum(slice, n, most); });
        return sum;
    }

  private:
    template <class Look>
    void in_slices(Range range, Look look) const {
        for (int64_t i = range.begin; i < range.end; i += kSlice) {
            const int64_t n = std::min(kSlice, range.end - i);
            isa.to_float(static_cast<const char*>(row) + i * size_of(dtype), dtype, slice, n);
            look(i, n);
        }
    }
};

}  // namespace coreskip
