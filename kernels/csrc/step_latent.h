// Latent attention (DeepSeek-V2, 2405.04434): keys and values of all heads are linear in one short row a position, the
// latent, which is what the cache keeps, with a part of the key that is turned.
//
// What would expand it for every position is applied to queries and sums instead: a score is q . (W c) = (W' q) . c.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "step_projections.h"

namespace coreskip {

class StepLatent {
  public:
    StepLatent(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    void run(const StepLayer& l) {
        project(l);
        absorb(l);
        projections.meet();
        projections.share_work(thread.mine(thread.tasks_of(l)), 1, [&](Range tasks) { return ahead.entry_bytes(l, tasks); },
                               [&](int64_t task, int64_t) { attend(l, thread.task_at(l, task)); });
        projections.meet();
        expand(l);
        projections.meet();
        projections.read_from(w.q, l.heads * l.latent.value);
        projections.project_all(thread.output(l));
        projections.meet();
        if (l.parallel && l.run_mlp) memcpy(own.pending, w.out, thread.tokens * m.hidden * sizeof(float));
        else projections.add_to_residual(l, l.attention_out, w.out);
        projections.norm_residual(l.attention_after);
    }

    // What a skipped attention leaves behind: the entries of the new tokens.
    void write_entries(const StepLayer& l) {
        project(l);
        for (int64_t row = 0; thread.part == 0 && row < c.rows; row++)
            put_entries(l, row, thread.past[row], thread.past[row] + c.length);
        projections.meet();
        projections.norm_residual(l.attention_after);
    }

  private:
    StepThread& thread;
    Prefetch& ahead;
    Projections& projections;
    const StepModel& m = thread.m;
    const StepCall& c = thread.c;
    const Shared& w = thread.w;
    const Own& own = thread.own;

    // Queries to w.q, and latents, with what is turned, to w.k.
    void project(const StepLayer& l) {
        const StepLatentPart& p = l.latent;
        projections.read_from(projections.normed(l.attention_in, own.x), m.hidden);
        projections.project_all(thread.inputs(l));
        projections.meet();
        if (!p.q_low.weight) return;
        for (int t = 0; t < thread.tokens; t++)
            thread.step.norm(p.q_low_norm, w.v + t * p.q_low.out, own.h + t * p.q_low.out);
        const int64_t before = ahead.passed;  // the way does not have this matrix
        projections.read_from(own.h, p.q_low.out);
        projections.project_all({{&l.q}, {w.q}, thread.stage(l, 3)});
        ahead.passed = before;
        projections.meet();
    }

    int64_t per_head(const StepLayer& l) const { return l.latent.nope + l.latent.value; }

    // The rows of a head in the matrix that expands latents, [nope + value][rank].
    const char* rows_of(const StepLayer& l, int64_t head) const {
        return static_cast<const char*>(l.k.weight) + head * per_head(l) * l.k.stride * size_of(l.k.dtype);
    }

    // A head's queries through the transposed rows of its keys, to w.absorbed, [tokens][heads][rank].
    void absorb(const StepLayer& l) {
        const StepLatentPart& p = l.latent;
        const Range heads = thread.mine(l.heads);
        for (int64_t i = 0; i < p.nope; i++) own.list[i] = i, own.selected[i] = 1;
        for (int64_t head = heads.begin; head < heads.end; head++)
            for (int t = 0; t < thread.tokens; t++) {
                memset(own.sums, 0, l.k.stride * sizeof(float));
                const float* q = w.q + t * l.q.out + head * (p.nope + p.rope);
                thread.isa.columns[l.k.dtype]({rows_of(l, head), l.k.stride, l.k.stride, p.nope, q, 1, own.list, own.selected}, 0,
                                              p.nope, own.sums);
                thread.isa.restore(own.sums, l.k.stride, l.k.dtype);
                float* to = w.absorbed + (t * l.heads + head) * p.rank;
                for (int64_t e = 0; e < p.rank; e++) to[e] = own.sums[e] * l.attention_scale;
            }
    }

    // Each head's sum of latents through the rows of its values, to w.q, [tokens][heads][value].
    void expand(const StepLayer& l) {
        const StepLatentPart& p = l.latent;
        const Range heads = thread.mine(l.heads);
        for (int64_t head = heads.begin; head < heads.end; head++) {
            for (int t = 0; t < thread.tokens; t++) {
                const int64_t row = t / c.length, q = t * l.heads + head, queries = thread.tokens * l.heads;
                thread.step.merge(thread.chunks_of(l, row), queries, w.most + q, w.sum + q, w.value + q * p.rank, p.rank,
                                  own.attended + t * p.rank, l.sinks ? l.sinks + head : nullptr);
            }
            projections.read_from(own.attended, p.rank);
            projections.prepare(l.k.dtype, l.k.stride);
            const char* rows = rows_of(l, head) + p.nope * l.k.stride * size_of(l.k.dtype);
            Ahead none{};
            thread.isa.linear[l.k.dtype]({rows, nullptr, nullptr, projections.rows_of(l.k.stride), l.heads * p.value,
                                          w.q + head * p.value, &none}, 0, p.value);
        }
    }

    // Latents and turned keys of the new tokens at positions `begin` to `end` of one sequence.
    void put_entries(const StepLayer& l, int64_t row, int64_t begin, int64_t end) {
        const StepLatentPart& p = l.latent;
        const StepCache& cache = thread.cache_of(l, row);
        for (int64_t position = begin; position < end; position++) {
            const int64_t token = row * c.length + position - thread.past[row], at = position - cache.first;
            const float* from = w.k + token * p.kv_low.out;
            thread.step.norm(p.kv_low_norm, from, own.scratch);
            put(own.scratch, cache.keys, at * p.rank, p.rank);
            turn(l, from + p.rank, token, own.scratch);
            put(own.scratch, cache.values, at * p.rope, p.rope);
        }
    }

    void attend(const StepLayer& l, const AttentionTask& task) {
        const StepLatentPart& p = l.latent;
        const StepCache& cache = thread.cache_of(l, task.row);
        const int64_t past = thread.past[task.row], begin = task.begin, bytes = size_of(m.kv_dtype);
        const int64_t end = std::min(begin + kChunk, past + c.length), part = task.part * thread.tokens * l.heads;
        put_entries(l, task.row, std::max(begin, past), end);
        const char* keys = static_cast<const char*>(cache.keys) - cache.first * p.rank * bytes;
        const char* turned = static_cast<const char*>(cache.values) - cache.first * p.rope * bytes;
        float* q = own.queries;
        for (int64_t j = std::max<int64_t>(0, begin - past); j < c.length; j++) {
            const int64_t token = task.row * c.length + j, at = part + token * l.heads;
            for (int64_t head = 0; head < l.heads; head++) {
                turn(l, w.q + token * l.q.out + head * (p.nope + p.rope) + p.nope, token, q + head * p.rope);
                own.from[head] = thread.first_seen(l, task.row, past + j);
                own.to[head] = past + j + 1;
            }
            for (int64_t i = 0; i < l.heads * p.rope; i++) q[i] *= l.attention_scale;
            AttendJob job = {w.absorbed + token * l.heads * p.rank, keys, keys, m.kv_dtype, static_cast<int>(l.heads),
                             p.rank, begin, end, own.from, own.to, l.softcap, nullptr, 0,
                             w.most + at, w.sum + at, w.value + at * p.rank, ahead.to_fetch()};
            job.more = q, job.more_keys = turned, job.more_dim = p.rope;
            thread.step.attend(job);
        }
        // chunks that lie wholly after a token: nothing to see
        for (int64_t j = 0; j < std::min(c.length, begin - past); j++)
            for (int64_t head = 0; head < l.heads; head++)
                w.sum[part + (task.row * c.length + j) * l.heads + head] = 0;
    }

    void turn(const StepLayer& l, const float* from, int64_t token, float* to) const {
        const int64_t n = l.latent.rope, at = thread.places[token] * l.rope_dim;
        if (l.latent.apart) {  // neighbours, which come apart: the first of each pair, then the second
            for (int64_t i = 0; i < n / 2; i++) to[i] = from[2 * i], to[i + n / 2] = from[2 * i + 1];
        } else {
            memcpy(to, from, n * sizeof(float));
        }
        if (l.cos) thread.step.rotate(to, l.cos + at, l.sin + at, l.rope_dim, l.paired != 0);
    }

    void put(const float* from, void* cache, int64_t to, int64_t n) const {
        thread.isa.from_float(from, static_cast<char*>(cache) + to * size_of(m.kv_dtype), m.kv_dtype, n);
    }
};

}  // namespace coreskip
