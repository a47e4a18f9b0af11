// One thread of a step: what it works on, with which memory, and how far the step is.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <initializer_list>

#include "arguments.h"
#include "dispatch.h"
#include "division.h"
#include "step_workspace.h"
#include "team.h"

namespace coreskip {

// The rows that a matrix is shared out by, and their bytes.
inline int64_t unit(const StepLinear& l) {
    return l.columns ? kPad / size_of(l.dtype) : grouped(l.dtype) ? kTile : 4;
}
inline int64_t units(const StepLinear& l) { return (l.out + unit(l) - 1) / unit(l); }
inline int64_t unit_bytes(const StepLinear& l) {
    if (l.counts) return l.tile;
    if (grouped(l.dtype)) return tile_bytes(l.dtype, l.stride / kGroup);
    return 4 * l.stride * size_of(l.dtype);
}

// How many units of so many bytes are taken together: some 48 KB. With pieces of 8 KB a step takes 5 % longer.
inline int64_t piece_of(int64_t bytes) { return std::max<int64_t>(1, (48 << 10) / bytes); }

// What several matrices are shared out by, as one.
struct Units {
    int64_t end[4] = {};  // units up to each one's last
    int64_t all = 0;

    int64_t count() const { return all; }
    int64_t begin(int i) const { return i ? end[i - 1] : 0; }
    // Matrix i's units among `range` of all.
    Range among(Range range, int i) const {
        return {std::max(range.begin, begin(i)) - begin(i), std::min(range.end, end[i]) - begin(i)};
    }
};

// Matrices that read the same input. Those that are read whole are shared out together, and so are those by columns;
// those that a stream brings come piece by piece.
struct Matrices {
    const StepLinear* matrix[4] = {};
    float* y[4] = {};
    Units whole, columns;
    int count;          // of matrices
    int64_t bytes = 1;  // of the largest unit
    int64_t next;       // the stage after them

    Matrices(std::initializer_list<const StepLinear*> matrices, std::initializer_list<float*> outputs, int64_t next)
        : count(static_cast<int>(matrices.size())), next(next) {
        std::copy(matrices.begin(), matrices.end(), matrix);
        std::copy(outputs.begin(), outputs.end(), y);
        for (int i = 0; i < count; i++) {
            const bool there = matrix[i] && matrix[i]->weight && !matrix[i]->pieces, sparse = there && matrix[i]->columns;
            const int64_t n = there ? units(*matrix[i]) : 0;
            whole.all = whole.end[i] = whole.begin(i) + (sparse ? 0 : n);
            columns.all = columns.end[i] = columns.begin(i) + (sparse ? n : 0);
            if (there && !sparse) bytes = std::max(bytes, unit_bytes(*matrix[i]));
        }
    }
};

// One KV head of one sequence, over one chunk of its positions: the part-th that it sees, which begins at `begin`.
struct AttentionTask {
    int64_t row, group, part, begin;
};

// The threads that share out a step may be fewer than were asked for, and others from step to step. What is added up
// between threads is therefore divided by `c.threads`, whoever computes it: a sum is the same to the bit.
struct StepThread {
    const StepModel& m;
    const StepCall& c;
    const Sizes& s;
    const Shared& w;
    const Own& own;
    Barrier& barrier;
    const Isa& isa;
    const StepIsa& step;
    Member* member = nullptr;      // of the team that runs this step
    int part = 0, parts = 1;
    int tokens = 0;                // rows of x
    const int64_t* past = nullptr;  // of each sequence
    int64_t lap = 0;               // of the model's stream
    const int64_t* ids = nullptr;
    const int64_t* places = nullptr;
    int64_t skipped = 0;           // neurons that all threads know to be left out
    double unread = 0;             // neurons' worth of columns that this thread alone has seen left out

    StepThread(const StepModel& model, const StepCall& call, const Sizes& sizes, const Shared& shared, const Own& own,
               Barrier& barrier)
        : m(model), c(call), s(sizes), w(shared), own(own), barrier(barrier),
          isa(*(model.kv_dtype == kBFloat16 ? active_bf16 : active).load()), step(*active_step.load()), past(call.past),
          ids(call.tokens), places(call.positions) {}

    // This thread's share of something that all share out.
    Range mine(int64_t count) const { return share(count, part, parts); }

    // The partial sums that this thread computes, of `c.threads`, and all neurons that go into them, of `count`.
    Range sums() const { return mine(c.threads); }
    Range in_sums(int64_t count) const {
        return {share(count, sums().begin, c.threads).begin, share(count, sums().end - 1, c.threads).end};
    }

    // ---- matrices that read the same input ----

    static constexpr int kStages = 8;  // of a layer: q, k, v, entries, o, gate, up, down; or o, router, experts
    int64_t stage(const StepLayer& l, int n) const { return kStages * (&l - m.layers) + n; }

    Matrices inputs(const StepLayer& l) const {
        if (l.latent.kv_low.weight) {
            const bool low = l.latent.q_low.weight;
            return {{low ? &l.latent.q_low : &l.q, &l.latent.kv_low}, {low ? w.v : w.q, w.k}, stage(l, 3)};
        }
        if (!l.run_attention && !l.fused) return {{&l.k, &l.v}, {w.k, w.v}, stage(l, 3)};
        if (l.special)
            return {{&l.q, &l.k, &l.v, &l.attention_gate}, {w.q, w.k, w.v, w.attention_gate}, stage(l, 3)};
        return {{&l.q, &l.k, &l.v}, {w.q, w.k, w.v}, stage(l, 3)};
    }
    Matrices output(const StepLayer& l) const { return {{&l.o}, {w.out}, stage(l, 5)}; }
    Matrices reducing(const StepLayer& l) const { return {{&l.mlp.reduce}, {w.reduced}, stage(l, 6)}; }
    Matrices expanding(const StepLayer& l) const { return {{&l.mlp.expand}, {w.score}, stage(l, 7)}; }
    Matrices widening(const StepLayer& l) const { return {{&l.gate, &l.up}, {w.gate, w.up}, stage(l, 7)}; }
    Matrices routing(const StepLayer& l) const {
        return {{&l.experts.router.logits, &l.experts.shared_gate}, {w.routes, w.shared_weight}, stage(l, 6)};
    }
    Matrices narrowing(const StepLayer& l) const { return {{&l.down}, {w.out}, stage(l, 8)}; }
    Matrices head() const { return {{&m.head}, {direct() ? static_cast<float*>(c.logits) : w.logits}, 0}; }
    bool direct() const { return m.logit_dtype == kFloat32; }

    // ---- the KV cache in chunks ----

    const StepCache& cache_of(const StepLayer& l, int64_t row) const { return c.caches[row][l.cache]; }

    static int64_t offset_of(const StepLayer& l, const StepCache& cache, int64_t group) {
        return group * cache.head_stride - cache.first * l.head_dim;
    }

    int64_t first_seen(const StepLayer& l, int64_t row, int64_t position) const {
        return std::max(c.start[row], l.window ? position + 1 - l.window : 0);
    }

    int64_t first_chunk(const StepLayer& l, int64_t row) const {
        return std::clamp<int64_t>(first_seen(l, row, past[row]), 0, past[row]) / kChunk;
    }

    int64_t chunks_of(const StepLayer& l, int64_t row) const {
        return (past[row] + c.length - 1) / kChunk + 1 - first_chunk(l, row);
    }

    int64_t tasks_of(const StepLayer& l) const {
        int64_t chunks = 0;
        for (int64_t row = 0; row < c.rows; row++) chunks += chunks_of(l, row);
        return l.kv_heads * chunks;
    }

    AttentionTask task_at(const StepLayer& l, int64_t i) const {
        int64_t row = 0, chunks = chunks_of(l, 0);
        for (; i >= l.kv_heads * chunks; chunks = chunks_of(l, row)) {
            i -= l.kv_heads * chunks;
            row++;
        }
        return {row, i / chunks, i % chunks, (first_chunk(l, row) + i % chunks) * kChunk};
    }
};

}  // namespace coreskip
