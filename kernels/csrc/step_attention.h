// The attention of a step, over the KV cache.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "step_projections.h"

namespace coreskip {

class StepAttention {
  public:
    StepAttention(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    void run(const StepLayer& l) {
        projections.read_from(projections.normed(l.attention_in, own.x), m.hidden);
        projections.project_all(thread.inputs(l));
        projections.meet();
        projections.share_work(thread.mine(thread.tasks_of(l)), 1, [&](Range tasks) { return ahead.entry_bytes(l, tasks); },
                               [&](int64_t task, int64_t) { attend(l, thread.task_at(l, task)); });
        projections.meet();
        const int64_t queries = thread.tokens * l.heads, of_row = c.length * l.heads;
        for (int64_t row = 0; row < c.rows; row++) {
            const int64_t chunks = thread.chunks_of(l, row);
            for (int64_t q = row * of_row; q < (row + 1) * of_row; q++)
                thread.step.merge(chunks, queries, w.most + q, w.sum + q, w.value + q * l.head_dim, l.head_dim,
                                  own.attended + q * l.head_dim, sink_of(l, q % l.heads));
        }
        if (l.special) finish_attended(l);
        projections.read_from(own.attended, l.heads * l.head_dim);
        projections.project_all(thread.output(l));
        projections.meet();
        if (l.parallel && l.run_mlp) memcpy(own.pending, w.out, thread.tokens * m.hidden * sizeof(float));
        else projections.add_to_residual(l, l.attention_out, w.out);
        projections.norm_residual(l.attention_after);
    }

    // What a skipped attention leaves behind: the entries of the new tokens.
    void write_entries(const StepLayer& l) {
        projections.read_from(projections.normed(l.attention_in, own.x), m.hidden);
        projections.project_all(thread.inputs(l));
        projections.meet();
        const int64_t tasks = c.rows * l.kv_heads;
        projections.share_work(tasks, 1, 0, [&](int64_t task, int64_t) {
            const int64_t row = task / l.kv_heads, past = thread.past[row];
            put_entries(l, row, task % l.kv_heads, past, past + c.length);
        });
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

    // Keys and values of the new tokens at positions `begin` to `end`, for one KV head of one sequence.
    void put_entries(const StepLayer& l, int64_t row, int64_t group, int64_t begin, int64_t end) {
        const StepCache& cache = thread.cache_of(l, row);
        for (int64_t position = begin; position < end; position++) {
            const int64_t token = row * c.length + position - thread.past[row];
            const int64_t to = thread.offset_of(l, cache, group) + position * l.head_dim;
            put(prepared(l, l.k_norm, l.fused ? w.q : w.k, l.k_heads, group, token), cache.keys, to, l.head_dim);
            put(valued(l, head_of(l, l.fused ? w.q : w.v, l.v_heads, group, token)), cache.values, to, l.head_dim);
        }
    }

    // A head of v as it is cached.
    const float* valued(const StepLayer& l, const float* v) {
        if (!l.special) return v;
        float* to = own.scratch;
        if (l.v_norm.kind == kNoNorm) memcpy(to, v, l.head_dim * sizeof(float));
        else thread.step.norm(l.v_norm, v, to);
        for (int64_t e = 0; e < l.head_dim; e++) to[e] *= l.v_scale;
        return to;
    }

    // What is done to what heads have attended to before `o` reads it.
    void finish_attended(const StepLayer& l) {
        if (l.gating) open_gates(l);
        const int64_t n = l.heads * l.head_dim;
        for (int t = 0; t < thread.tokens && l.attended_norm.kind; t++)
            thread.step.norm(l.attended_norm, own.attended + t * n, own.attended + t * n);
    }

    // Multiplies what heads have attended to by their gates.
    void open_gates(const StepLayer& l) {
        const float* gates = l.attention_gate.weight ? w.attention_gate : w.q;
        for (int64_t i = 0; i < thread.tokens * l.heads; i++) {
            float *gate = own.scratch, *y = own.attended + i * l.head_dim;
            memcpy(gate, head_of(l, gates, l.gate_heads, i % l.heads, i / l.heads), l.gate_width * sizeof(float));
            if (l.gating == kSigmoidGate) {  // is (1 + tanh(x / 2)) / 2
                thread.step.softcap(gate, 1.f, 2.f, l.gate_width);
                for (int e = 0; e < l.gate_width; e++) gate[e] = 0.5f + 0.25f * gate[e];
            } else {
                for (int e = 0; e < l.gate_width; e++) gate[e] = gate[e] > 20 ? gate[e] : log1pf(expf(gate[e]));
            }
            for (int64_t e = 0; e < l.head_dim; e++) y[e] *= gate[l.gate_width == 1 ? 0 : e];
        }
    }

    // For new tokens in the chunk keys and values are written first.
    void attend(const StepLayer& l, const AttentionTask& task) {
        const StepCache& cache = thread.cache_of(l, task.row);
        const int64_t past = thread.past[task.row], begin = task.begin;
        const int64_t end = std::min(begin + kChunk, past + c.length), part = task.part * thread.tokens * l.heads;
        const int64_t offset = thread.offset_of(l, cache, task.group), each = l.heads / l.kv_heads;
        put_entries(l, task.row, task.group, std::max(begin, past), end);
        const int64_t bytes = size_of(m.kv_dtype);
        for (int64_t j = std::max<int64_t>(0, begin - past); j < c.length; j++) {
            const int64_t token = task.row * c.length + j, query = token * l.heads + task.group * each;
            const int64_t at = part + query;
            for (int64_t i = 0; i < each; i++) {
                float* to = own.queries + i * l.head_dim;
                memcpy(to, prepared(l, l.q_norm, w.q, l.q_heads, task.group * each + i, token), l.head_dim * sizeof(float));
                for (int64_t e = 0; e < l.head_dim; e++) to[e] *= l.attention_scale;
                own.from[i] = thread.first_seen(l, task.row, past + j);
                own.to[i] = past + j + 1;
            }
            thread.step.attend({own.queries, static_cast<const char*>(cache.keys) + offset * bytes,
                                static_cast<const char*>(cache.values) + offset * bytes, m.kv_dtype,
                                static_cast<int>(each), l.head_dim, begin, end, own.from, own.to, l.softcap,
                                l.slopes ? l.slopes + task.group * each : nullptr, static_cast<int>(each),
                                w.most + at, w.sum + at, w.value + at * l.head_dim, ahead.to_fetch()});
        }
        // chunks that lie wholly after a token: nothing to see
        for (int64_t j = 0; j < std::min(c.length, begin - past); j++)
            for (int64_t i = 0; i < each; i++)
                w.sum[part + (task.row * c.length + j) * l.heads + task.group * each + i] = 0;
    }

    static const float* head_of(const StepLayer& l, const float* outputs, const StepHeads& heads, int64_t head,
                                int64_t token) {
        const int64_t at = heads.offset + head / heads.run * heads.step + head % heads.run * l.head_dim;
        return outputs + token * heads.width + at;
    }

    static const float* sink_of(const StepLayer& l, int64_t head) { return l.sinks ? l.sinks + head : nullptr; }

    // A head of q or k, normed and rotated, in the scratch.
    const float* prepared(const StepLayer& l, const StepNorm& norm, const float* outputs, const StepHeads& heads,
                          int64_t head, int64_t token) {
        float* to = own.scratch;
        const float* from = head_of(l, outputs, heads, head, token);
        const bool together = norm.kind != kNoNorm && norm.size != l.head_dim;  // over all heads (OLMo 2)
        if (together) {
            const float* first = head_of(l, outputs, heads, 0, token);
            thread.step.norm(norm, first, own.attended);
            from = own.attended + (from - first);
        }
        if (norm.kind == kNoNorm || together || l.turned) memcpy(to, from, l.head_dim * sizeof(float));
        else thread.step.norm(norm, from, to);
        if (l.cos) {
            const int64_t position = thread.places[token] * l.rope_dim;
            thread.step.rotate(to, l.cos + position, l.sin + position, l.rope_dim, l.paired != 0);
        }
        if (l.turned && norm.kind != kNoNorm) thread.step.norm(norm, to, to);
        return to;
    }

    void put(const float* from, void* cache, int64_t to, int64_t n) const {
        thread.isa.from_float(from, static_cast<char*>(cache) + to * size_of(m.kv_dtype), m.kv_dtype, n);
    }
};

}  // namespace coreskip
