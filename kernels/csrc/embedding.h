// A token's embedding, looked up in a table of floats or of tiles, with what its position adds to it.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "jobs.h"
#include "workspace.h"

namespace coreskip {

// room: for a row.
inline void look_up(const StepModel& m, const Isa& isa, const StepIsa& step, int64_t token, int64_t position, float* room,
                    float* to) {
    if (grouped(m.embedding_dtype)) {
        const int64_t groups = m.embedding_stride / kGroup;
        step.untile({m.embedding, m.embedding_dtype, groups, m.hidden, token, kFloat32, to}, token, token + 1);
    } else {
        const int64_t row = m.hidden * size_of(m.embedding_dtype);
        isa.to_float(static_cast<const char*>(m.embedding) + token * row, m.embedding_dtype, to, m.hidden);
    }
    for (int64_t i = 0; i < m.hidden && m.embedding_scale != 1.f; i++) to[i] *= m.embedding_scale;
    if (m.token_norm.kind != kNoNorm) step.norm(m.token_norm, to, to);
    if (m.places) {
        const int64_t row = m.hidden * size_of(m.places_dtype);
        isa.to_float(static_cast<const char*>(m.places) + position * row, m.places_dtype, room, m.hidden);
        isa.add(to, room, m.hidden);
    }
    if (m.embedding_norm.kind != kNoNorm) step.norm(m.embedding_norm, to, to);
}

}  // namespace coreskip
