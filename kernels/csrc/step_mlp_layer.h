// The MLP of a step: dense, or over bundles of neurons.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <numeric>

#include "choice.h"
#include "neuron_shares.h"
#include "slots.h"
#include "step_projections.h"

namespace coreskip {

class StepMlpLayer {
  public:
    StepMlpLayer(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    // Of a step that begins.
    void begin() { second_ = false; }

    void run(const StepLayer& l) {
        const float* x = projections.normed(l.mlp_in, own.x);
        if (l.mlp.groups.rows) return grouped(l, x);
        if (l.mlp.weight) return bundled(l, x);
        projections.read_from(x, m.hidden);
        projections.project_all(thread.widening(l));
        projections.meet();
        const int64_t n = l.up.out, width = l.down.counts ? l.down.stride : n;
        for (int t = 0; t < thread.tokens; t++) {
            float* a = own.h + t * width;
            memcpy(a, (l.gate.weight ? w.gate : w.up) + t * n, n * sizeof(float));
            thread.step.act(a, l.gate.weight ? w.up + t * n : nullptr, n, l.act, l.curve);
            if (l.special && l.inner_norm.kind) thread.step.norm(l.inner_norm, a, a);
            if (l.wanted) leave_out(l.wanted + (l.wanted_rows > 1 ? t / c.length : 0) * n, n, a);
            if (l.down.counts) put_in_groups(l.down, a);
        }
        projections.read_from(own.h, width);
        projections.project_all(thread.narrowing(l));
        projections.meet();
        projections.finish_layer(l, w.out);
    }

  private:
    StepThread& thread;
    Prefetch& ahead;
    Projections& projections;
    const StepModel& m = thread.m;
    const StepCall& c = thread.c;
    const Shared& w = thread.w;
    const Own& own = thread.own;
    bool second_ = false;  // which half of `acc` the next MLP over bundles uses

    static void leave_out(const uint8_t* wanted, int64_t n, float* a) {
        for (int64_t i = 0; i < n; i++) a[i] = wanted[i] ? a[i] : 0.f;
    }

    // What a row has of each group, side by side, goes to where the group's numbers are, see take_some, zeros to the rest.
    // From the end on: no value's place is beyond where it comes to lie.
    static void put_in_groups(const StepLinear& down, float* a) {
        int64_t end = down.in;
        for (int64_t g = down.stride / kGroup - 1; g >= 0; g--) {
            float some[kGroup];
            const int count = down.counts[g];
            end -= count;
            memcpy(some, a + end, count * sizeof(float));
            float* to = a + g * kGroup;
            memset(to, 0, kGroup * sizeof(float));
            for (int j = 0; j < count; j++) to[j % 4 + j / 8 * 4 + j / 4 % 2 * (kGroup / 2)] = some[j];
        }
    }

    // Scores the neurons by a low-rank map of x.
    void predict(const StepLayer& l, const float* x) {
        projections.read_from(x, m.hidden);
        projections.project_all(thread.reducing(l));
        projections.meet();
        projections.read_from(w.reduced, l.mlp.reduce.out);
        projections.project_all(thread.expanding(l));
        projections.meet();
    }

    void bundled(const StepLayer& l, const float* x) {
        const StepMlp& b = l.mlp;
        if (b.rule == kLearned) predict(l, x);
        projections.read_from(x, m.hidden);
        projections.prepare(b.dtype, b.stride);
        const int64_t bytes = b.stride * (b.gated ? 3 : 2) * size_of(b.dtype);
        MlpJob job{};
        job.weight = b.weight, job.low = b.low, job.scale = b.scale, job.gated = b.gated != 0, job.act = l.act;
        job.curve = l.curve;
        job.block = static_cast<int>(std::min<int64_t>(bundles(64, bytes), kMaxBlock));
        job.ahead = static_cast<int>(std::min<int64_t>(bundles(32, bytes), 4096));
        job.gate_bias = b.gate_bias, job.up_bias = b.up_bias, job.rows = projections.rows_of(b.stride);
        job.rule = b.rule == kLearned ? kListed : b.rule;
        job.norm = b.norm, job.mean = b.mean, job.neurons = b.neurons;
        job.high = b.dtype == kSliced ? w.high : nullptr;
        job.known_gate = b.rule == kGate ? w.known_gate : nullptr;
        job.score = w.score, job.refine = b.refine, job.exact = own.exact;
        job.gates_alone = b.gates != nullptr;
        ahead.passed += ahead.bundles_of(b).bytes;
        int64_t count = b.neurons;
        const auto choose_some = [&] {
            count = choose_neurons(b);
            job.list = own.list;
            job.selected = thread.tokens > 1 ? own.selected : nullptr;
        };
        if (b.rule == kLearned) choose_some();
        if (b.list) {
            count = b.listed;
            job.list = b.list;
            job.selected = !b.selected || c.length == 1 ? b.selected : selected_by_token(b, thread.in_sums(b.listed));
        }
        if (b.dtype == kSliced || b.rule == kGate) {
            const Range here = thread.in_sums(count);
            scan(b, job, here);
        }
        if (b.rule == kSketch || b.rule == kGate) {
            projections.meet();
            choose_some();
        }
        if (b.slots) {
            bring(l, count);
            job.place = m.slots->places(b.slots - 1);
        }
        const auto range = [&](int64_t i) { return share(count, i, c.threads); };
        const float* all = sums_of(l, b.stride, range, [&](Range here, int64_t i, uintptr_t after, float* sum) {
            job.after = after;
            return thread.isa.mlp[b.dtype](job, here.begin, here.end, sum);
        });
        if (b.slots && thread.part == 0) m.slots->done(b.slots - 1);  // all threads have met
        add_sums(l, all, b.stride, b.dtype);
    }

    void scan(const StepMlp& b, MlpJob job, Range here) const {
        if (b.gates) job.weight = b.gates;
        thread.isa.scan[b.dtype](job, here.begin, here.end);
    }

    // Has the chosen bundles read that are not in memory, and meanwhile those that the next layer will probably choose.
    void bring(const StepLayer& l, int64_t count) {
        Slots& slots = *m.slots;
        if (thread.part == 0) slots.want(l.mlp.slots - 1, own.list, count);
        const StepLayer* next = &l + 1;
        if (m.reads_ahead && next < m.layers + m.layer_count && can_guess(l.mlp, *next)) {
            guess(*next);
            projections.read_from(projections.normed(l.mlp_in, own.x), m.hidden);
            projections.prepare(l.mlp.dtype, l.mlp.stride);
        }
        const int64_t waited = slots.wait(l.mlp.slots - 1);
        if (thread.part == 0) slots.figures.waited += waited;
    }

    static bool can_guess(const StepMlp& b, const StepLayer& next) {
        return next.run_mlp && next.mlp.slots && next.mlp.rule == b.rule && b.rule != kLearned;
    }

    // What a layer will probably choose: what it would choose if this one changed nothing any more.
    void guess(const StepLayer& next) {
        const StepMlp& b = next.mlp;
        projections.read_from(projections.normed(next.mlp_in, own.x), m.hidden);
        projections.prepare(b.dtype, b.stride);
        const int64_t bytes = b.stride * (b.gated ? 2 : 1) * size_of(b.dtype);
        MlpJob job{};
        job.weight = b.weight, job.scale = b.scale, job.gated = b.gated != 0, job.act = next.act;
        job.block = static_cast<int>(std::min<int64_t>(bundles(64, bytes), kMaxBlock));
        job.ahead = static_cast<int>(std::min<int64_t>(bundles(32, bytes), 4096));
        job.gate_bias = b.gate_bias, job.up_bias = b.up_bias, job.rows = projections.rows_of(b.stride);
        job.rule = b.rule, job.norm = b.norm, job.mean = b.mean, job.neurons = b.neurons;
        job.high = b.dtype == kSliced ? w.early_high : nullptr;
        job.known_gate = b.rule == kGate ? reinterpret_cast<float*>(w.early_high) : nullptr;
        job.score = w.early_score, job.gates_alone = b.gates != nullptr;
        scan(b, job, thread.in_sums(b.neurons));
        projections.meet();
        if (thread.part) return;
        const int64_t width = b.keep >= 0 ? std::min(b.keep, b.neurons) : b.neurons;
        memset(w.early_wanted, 0, b.neurons);
        for (int t = 0; t < thread.tokens; t++) {
            choose(w.early_score + t * b.neurons, b.neurons, b.keep, b.threshold, own.keys, w.early_chosen, width);
            for (int64_t i = 0; i < width && w.early_chosen[i] >= 0; i++) w.early_wanted[w.early_chosen[i]] = 1;
        }
        int64_t count = 0;
        for (int64_t i = 0; i < b.neurons; i++) {
            w.early_list[count] = i;
            count += w.early_wanted[i];
        }
        m.slots->expect(b.slots - 1, w.early_list, count);
    }

    // Neurons in 4-bit groups, listed or chosen by each token.
    void grouped(const StepLayer& l, const float* x) {
        const StepMlp& b = l.mlp;
        const NeuronGroups& n = b.groups;
        projections.read_from(x, m.hidden);
        projections.prepare(kInt4, n.width, false, true);
        const int64_t count = b.list ? b.listed : n.neurons;
        const auto range = [&](int64_t i) { return neuron_share(n, count, i, c.threads); };
        const Range mine = thread.sums();
        uint8_t* selected = nullptr;
        if (b.list && b.selected)
            selected = c.length == 1 ? b.selected
                                     : selected_by_token(b, {range(mine.begin).begin, range(mine.end - 1).end});
        const NeuronsJob job = {n, {thread.tokens, own.q, own.group_scale, own.group_sum}, l.act, b.list, selected,
                                count, own.group_scales, own.turned, 0, l.curve};
        ahead.passed += ahead.bundles_of(b).bytes;
        const float* all = sums_of(l, n.width, range, [&](Range here, int64_t, uintptr_t after, float* sum) {
            NeuronsJob part = job;
            part.after = after;
            return thread.step.neurons(part, here.begin, here.end, sum);
        });
        add_sums(l, all, n.width, kFloat32);
    }

    // The partial sums of all threads, once they have met. range(i): what goes into the i-th; work(range, i, what is read
    // after it or 0, sum): adds it up, and returns how many neurons it has left out.
    template <class RangeOf, class Work>
    const float* sums_of(const StepLayer& l, int64_t stride, RangeOf range, Work work) {
        // Two halves in turn: a slow thread may still add up this layer's sums when a fast one begins the next.
        const int64_t size = thread.tokens * thread.s.width;  // of one sum
        float* all = w.acc + (second_ ? c.threads * size : 0);
        int64_t* dropped = w.dropped + (second_ ? c.threads : 0);
        second_ = !second_;
        const Range mine = thread.sums();
        for (int64_t i = mine.begin; i < mine.end; i++) {
            memset(all + i * size, 0, thread.tokens * stride * sizeof(float));
            dropped[i] = work(range(i), i, i + 1 < mine.end ? 0 : ahead.first_after(l), all + i * size);
        }
        ahead.finished = thread.stage(l, StepThread::kStages);  // what follows may be fetched
        projections.meet();
        thread.skipped = std::accumulate(dropped, dropped + c.threads, thread.skipped);
        return all;
    }

    // Adds all threads' sums, in the order of `dtype`, to the residual stream.
    void add_sums(const StepLayer& l, const float* all, int64_t stride, int dtype) {
        const int64_t size = thread.tokens * thread.s.width;
        for (int t = 0; t < thread.tokens; t++) {
            float* sum = own.rows + t * m.hidden;
            memcpy(sum, all + t * stride, stride * sizeof(float));
            for (int i = 1; i < c.threads; i++) thread.isa.add(sum, all + i * size + t * stride, stride);
            thread.isa.restore(sum, stride, dtype);
            if (l.mlp.down_bias) thread.isa.add(sum, l.mlp.down_bias, m.hidden);
        }
        projections.finish_layer(l, own.rows);
    }

    // Of rows that have several tokens each, for the neurons of this thread's share.
    uint8_t* selected_by_token(const StepMlp& b, Range here) {
        for (int64_t i = here.begin; i < here.end; i++)
            for (int t = 0; t < thread.tokens; t++)
                own.selected[b.list[i] * thread.tokens + t] = b.selected[b.list[i] * c.rows + t / c.length];
        return own.selected;
    }

    // Every thread makes the same choice: a meeting would cost as much.
    int64_t choose_neurons(const StepMlp& b) {
        const int64_t width = b.keep >= 0 ? std::min(b.keep, b.neurons) : b.neurons;
        for (int t = 0; t < thread.tokens; t++)
            choose(score_of(b, t), b.neurons, b.keep, b.threshold, own.keys, own.chosen + t * width, width);
        int64_t count = thread.tokens > 1 ? merge(own.chosen, width, thread.tokens, b.neurons, own.selected, own.list)
                                   : compact(own.chosen, width, b.neurons, own.list);
        if (thread.tokens == 1) {
            thread.skipped += b.neurons - count;
        } else {
            for (int64_t i = 0; i < thread.tokens * b.neurons; i++) thread.skipped += own.selected[i] == 0;
        }
        return count;
    }

    // Scores of which the best are kept must not be below 0. In place of learned ones what rises with them.
    const float* score_of(const StepMlp& b, int token) {
        const float* score = w.score + token * b.neurons;
        if (b.rule != kLearned || b.keep < 0) return score;
        for (int64_t i = 0; i < b.neurons; i++) own.h[i] = score[i] < 0 ? 1 / (1 - score[i]) : 1 + score[i];
        return own.h;
    }
};

}  // namespace coreskip
