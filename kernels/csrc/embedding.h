// A token's embedding, looked up in a table of floats or of tiles.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "jobs.h"
#include "workspace.h"

namespace coreskip {

inline void look_up(const StepModel& m, const Isa& isa, const StepIsa& step, int64_t token, float* to) {
    if (grouped(m.embedding_dtype)) {
        const int64_t groups = m.embedding_stride / kGroup;
        step.untile({m.embedding, m.embedding_dtype, groups, m.hidden, token, kFloat32, to}, token, token + 1);
    } else {
        const int64_t row = m.hidden * size_of(m.embedding_dtype);
        isa.to_float(static_cast<const char*>(m.embedding) + token * row, m.embedding_dtype, to, m.hidden);
    }
    for (int64_t i = 0; i < m.hidden && m.embedding_scale != 1.f; i++) to[i] *= m.embedding_scale;
}

}  // namespace coreskip
