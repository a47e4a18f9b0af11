// The third half of a layer (Gemma 4), which reads what a token has for this layer besides.
#pragma once

#include <stdint.h>
#include <string.h>

#include "step_projections.h"

namespace coreskip {

class StepSide {
  public:
    StepSide(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    // Of a step that begins, once tokens are looked up: what their embeddings have for all layers.
    void begin() {
        project(m.side, own.x, m.hidden, w.sides);
    }

    void run(const StepLayer& l) {
        const int64_t n = m.side_width;
        project(l.side_gate, own.x, m.hidden, w.side);
        for (int t = 0; t < thread.tokens; t++) {
            float* a = own.h + t * n;
            memcpy(a, w.side + t * n, n * sizeof(float));
            thread.step.act(a, part_of(l, t), n, l.side_act, nullptr);
        }
        project(l.side_out, own.h, n, w.side_out);
        for (int t = 0; t < thread.tokens; t++) {
            const float* y = w.side_out + t * m.hidden;
            if (l.side_norm.kind != kNoNorm) thread.step.norm(l.side_norm, y, own.h), y = own.h;
            thread.step.add_scaled(own.x + t * m.hidden, y, 1.f, m.hidden);
        }
    }

  private:
    StepThread& thread;
    Prefetch& ahead;
    Projections& projections;
    const StepModel& m = thread.m;
    const Shared& w = thread.w;
    const Own& own = thread.own;

    void project(const StepLinear& matrix, const float* x, int64_t width, float* y) {
        const int64_t before = ahead.passed;  // the way does not have this matrix
        projections.read_from(x, width);
        projections.project_all({{&matrix}, {y}, 0});
        ahead.passed = before;
        projections.meet();
    }

    // What a token has for a layer, in room of this thread.
    const float* part_of(const StepLayer& l, int t) {
        const int64_t n = m.side_width, row = thread.ids[t] * m.side.out + l.side_at;
        float *part = own.side, *from_table = own.side + n;
        memcpy(part, w.sides + t * m.side.out + l.side_at, n * sizeof(float));
        for (int64_t i = 0; i < n; i++) part[i] *= m.side_scale;
        if (m.side_norm.kind != kNoNorm) thread.step.norm(m.side_norm, part, part);
        thread.isa.to_float(static_cast<const char*>(m.side_table) + row * size_of(m.side_dtype), m.side_dtype, from_table, n);
        for (int64_t i = 0; i < n; i++) part[i] = m.side_sum * (part[i] + m.side_table_scale * from_table[i]);
        return part;
    }
};

}  // namespace coreskip
