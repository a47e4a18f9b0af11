// A recurrence in place of an attention: the gated delta rule (Yang et al., 2412.06464).
//
// Queries, keys and values go through taps, each channel's weighted sum of its last few inputs. A head keeps a state,
// [key_dim][value_dim], whatever the text's length: it fades, is moved towards giving the value for the key, and is read by
// the query. What it gives is normed, head by head, and opened by a gate. Of a sequence's cache `keys` are the last inputs of
// all channels, [channels][tap_count], the queries' first, then the keys', then the values'; `values` are the heads' states,
// in float. Both are written in place: a step cannot be taken back.
//
// Or a short convolution (LFM2), whose key_dim is 0: taps of kValue * kRate, channel by channel, times kOpen; no state.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "step_projections.h"

namespace coreskip {

class StepRecurrentLayer {
  public:
    StepRecurrentLayer(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    void run(const StepLayer& l) {
        const StepRecurrence& r = l.recurrence;
        project(l);
        const int64_t channels = 2 * r.read_heads + r.heads;  // heads of them
        projections.share_work(c.rows * channels, 1, 0, [&](int64_t task, int64_t) { tap(l, task / channels, task % channels); });
        projections.meet();
        if (r.key_dim) {
            projections.share_work(c.rows * r.heads, 1, 0,
                                   [&](int64_t task, int64_t) { recall(l, task / r.heads, task % r.heads); });
            projections.meet();
        }
        projections.read_from(w.recalled, r.heads * r.value_dim);
        projections.project_all(thread.output(l));
        projections.meet();
        if (l.parallel && l.run_mlp) memcpy(own.pending, w.out, thread.tokens * m.hidden * sizeof(float));
        else projections.add_to_residual(l, l.attention_out, w.out);
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

    void project(const StepLayer& l) {
        const StepRecurrence& r = l.recurrence;
        projections.read_from(projections.normed(l.attention_in, own.x), m.hidden);
        projections.project_all(thread.inputs(l));
        projections.meet();
        if (!r.more[0].weight) return;
        const int64_t before = ahead.passed;  // the way does not have these matrices
        projections.project_all({{&r.more[0], &r.more[1]}, {w.more, w.more + thread.tokens * r.more[0].out}, thread.stage(l, 3)});
        ahead.passed = before;
        projections.meet();
    }

    // Head `head` of what a recurrence reads of a token.
    const float* part(const StepLayer& l, Recurrent which, int64_t head, int64_t size, int64_t token) const {
        const StepRecurrence& r = l.recurrence;
        const float* all[] = {w.q, w.k, w.v, w.attention_gate, w.more, w.more + thread.tokens * r.more[0].out};
        const StepHeads& at = r.places[which];
        return all[r.from[which]] + token * at.width + at.offset + head / at.run * at.step + head % at.run * size;
    }

    // One head of channels of one sequence through its taps, to w.tapped, [tokens][channels].
    void tap(const StepLayer& l, int64_t row, int64_t head) {
        const StepRecurrence& r = l.recurrence;
        const int64_t kind = head < 2 * r.read_heads ? head / r.read_heads : kValue, k = r.tap_count;
        const int64_t n = kind == kValue ? r.value_dim : r.key_dim;
        const int64_t all = 2 * r.read_heads * r.key_dim + r.heads * r.value_dim;
        const int64_t first = kind == kValue ? 2 * r.read_heads * r.key_dim + (head - 2 * r.read_heads) * n : head * n;
        char* kept = static_cast<char*>(thread.cache_of(l, row).keys) + first * k * size_of(m.kv_dtype);
        thread.isa.to_float(kept, m.kv_dtype, own.recent, n * k);
        for (int64_t j = 0; j < c.length; j++) {
            const int64_t token = row * c.length + j;
            const float* x = part(l, static_cast<Recurrent>(kind), head - kind * r.read_heads, n, token);
            const float* times = r.key_dim ? nullptr : part(l, kRate, head, n, token);
            float* y = (r.key_dim ? w.tapped : w.recalled) + token * all + first;
            for (int64_t i = 0; i < n; i++) {
                float *recent = own.recent + i * k, sum = r.tap_bias ? r.tap_bias[first + i] : 0.f;
                memmove(recent, recent + 1, (k - 1) * sizeof(float));
                recent[k - 1] = times ? x[i] * times[i] : x[i];
                for (int64_t e = 0; e < k; e++) sum += r.taps[(first + i) * k + e] * recent[e];
                y[i] = sum;
            }
            if (!r.key_dim) {
                const float* open = part(l, kOpen, head, n, token);
                for (int64_t i = 0; i < n; i++) y[i] *= open[i];
                continue;
            }
            thread.step.act(y, nullptr, n, r.tap_act, nullptr);
            if (kind != kValue) to_length(r, y, n, kind == kRead ? 1.f / sqrtf(static_cast<float>(n)) : 1.f);
        }
        thread.isa.from_float(own.recent, kept, m.kv_dtype, n * k);
    }

    // A head of queries or keys as one of that length.
    static void to_length(const StepRecurrence& r, float* x, int64_t n, float length) {
        float sum = 0;
        for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
        const float scale = length / sqrtf(sum + r.unit_eps);
        for (int64_t i = 0; i < n; i++) x[i] *= scale;
    }

    // One head of values of one sequence, token by token, to w.recalled, [tokens][heads][value_dim].
    void recall(const StepLayer& l, int64_t row, int64_t head) {
        const StepRecurrence& r = l.recurrence;
        const int64_t n = r.value_dim, of_reads = r.read_heads * r.key_dim, all = 2 * of_reads + r.heads * n;
        const int64_t read = head / (r.heads / r.read_heads) * r.key_dim;
        float* state = static_cast<float*>(thread.cache_of(l, row).values) + head * r.key_dim * n;
        for (int64_t j = 0; j < c.length; j++) {
            const int64_t token = row * c.length + j;
            const float* tapped = w.tapped + token * all;
            float* out = w.recalled + (token * r.heads + head) * n;
            const float rate = r.most_rate / (1.f + expf(-*part(l, kRate, head, 1, token)));
            const float x = *part(l, kDecay, head, 1, token) + r.fading_bias[head];
            const float decay = expf(-r.fading[head] * (x > 20 ? x : log1pf(expf(x))));
            thread.step.recall({state, tapped + read, tapped + of_reads + read, tapped + 2 * of_reads + head * n, decay,
                                rate, r.key_dim, n, own.recent});
            thread.step.norm(r.norm, own.recent, own.recent);
            memcpy(out, part(l, kOpen, head, n, token), n * sizeof(float));
            thread.step.act(out, own.recent, n, r.open_act, nullptr);
        }
    }
};

}  // namespace coreskip
