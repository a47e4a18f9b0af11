// The mixture of experts of a step.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "slots.h"
#include "step_experts_way.h"
#include "step_projections.h"
#include "step_routing.h"

namespace coreskip {

// The threads meet three times: once the router's logits are there, from which every thread makes the same choice; once
// the activations of all active experts are; and once their outputs are, which every thread sums up for itself. An expert
// that several rows want is read once, and meets their rows of x alone. A row's sum is in the order of its own experts,
// the same to the bit whatever other rows there are, and whoever computes what.
class StepExpertsLayer {
  public:
    StepExpertsLayer(StepThread& thread, Prefetch& ahead, Projections& projections)
        : thread(thread), ahead(ahead), projections(projections) {}

    void run(const StepLayer& l) {
        x_ = projections.normed(l.mlp_in, own.x);
        projections.read_from(x_, m.hidden);
        projections.project_all(thread.routing(l));
        projections.meet();
        choose(l);
        widen(l);
        projections.meet();
        narrow();
        projections.meet();
        if (l.experts.slots && thread.part == 0) m.slots->done(l.experts.slots - 1);
        projections.finish_layer(l, sum(l));
    }

  private:
    StepThread& thread;
    Prefetch& ahead;
    Projections& projections;
    const StepModel& m = thread.m;
    const Shared& w = thread.w;
    const Own& own = thread.own;
    const float* x_ = nullptr;            // [tokens][hidden]
    const ExpertPart* read_ = nullptr;    // whose input `projections` has
    bool all_read_ = false;               // or that of all rows
    int count_ = 0;                       // active experts, the shared one among them
    bool shared_ = false;                 // that one is first
    bool by_inputs_ = false;              // weights multiply what experts read
    int place_ = 0;                       // rows that want experts so far, expert by expert
    int64_t neurons_ = 0;                 // their neurons

    // The experts of all tokens, and for each one the tokens that want it.
    void choose(const StepLayer& l) {
        const StepRouter& r = l.experts.router;
        Chosen* end[kMaxRows];
        for (int t = 0; t < thread.tokens; t++) {
            memcpy(own.logits, w.routes + t * r.count, r.count * sizeof(float));
            Chosen* first = own.experts_chosen + t * (r.chosen + 1);
            end[t] = first + Router(r, own.logits, own.scored).choose(first);
            thread.skipped += (r.chosen - (end[t] - first)) * l.experts.matrices[1].out;
            *end[t] = {r.count, 0.f};  // the last one's successor
        }
        count_ = 0;
        by_inputs_ = l.experts.by_inputs;
        shared_ = l.up.weight != nullptr;
        place_ = neurons_ = 0;
        if (shared_) {
            for (int t = 0; t < thread.tokens; t++) want(t, l.experts.shared_scale);
            close(&l.gate, 0);  // up and down follow
        }
        Chosen* next[kMaxRows];
        for (int t = 0; t < thread.tokens; t++) next[t] = own.experts_chosen + t * (r.chosen + 1);
        for (;;) {
            int64_t expert = r.count;
            for (int t = 0; t < thread.tokens; t++) expert = std::min(expert, next[t]->expert);
            if (expert == r.count) break;
            const int first = place_;
            for (int t = 0; t < thread.tokens; t++)
                if (next[t]->expert == expert) want(t, next[t]->weight), next[t]++;
            own.list[count_ - shared_] = expert;
            close(l.experts.matrices + 3 * expert, first);
        }
        if (l.experts.slots) bring(l);
        ahead.enter(l, own.active, count_);
    }

    // Has the active experts read that are not in memory, and meanwhile those that the next layer will probably choose.
    void bring(const StepLayer& l) {
        Slots& slots = *m.slots;
        const int64_t layer = l.experts.slots - 1;
        if (thread.part == 0) {
            slots.want(layer, own.list, count_ - shared_);
            for (int i = shared_; i < count_; i++) {
                const int64_t expert = own.list[i - shared_];
                char* const* parts = slots.places(layer) + expert * parts_of(l);
                StepLinear* matrices = l.experts.matrices + 3 * expert;
                for (int k = matrices[0].weight ? 0 : 1; k < 3; k++) matrices[k].weight = *parts++;
            }
        }
        const StepLayer* next = &l + 1;
        if (m.reads_ahead && next < m.layers + m.layer_count && next->run_mlp && next->experts.slots) {
            guess(*next);
            x_ = projections.normed(l.mlp_in, own.x);
            projections.read_from(x_, m.hidden);
        }
        const int64_t waited = slots.wait(layer);
        if (thread.part == 0) slots.figures.waited += waited;
    }

    static int parts_of(const StepLayer& l) { return l.experts.matrices[0].weight ? 3 : 2; }

    // What a layer's router will probably choose: what it would choose if this one changed nothing any more.
    void guess(const StepLayer& next) {
        const StepRouter& r = next.experts.router;
        projections.read_from(projections.normed(next.mlp_in, own.x), m.hidden);
        projections.project_all({{&r.logits}, {w.early_routes}, 0});
        projections.meet();
        if (thread.part) return;
        memset(w.early_wanted, 0, r.count);
        for (int t = 0; t < thread.tokens; t++) {
            memcpy(own.logits, w.early_routes + t * r.count, r.count * sizeof(float));
            const Chosen* end = w.early_experts + Router(r, own.logits, own.scored).choose(w.early_experts);
            for (const Chosen* found = w.early_experts; found < end; found++) w.early_wanted[found->expert] = 1;
        }
        int64_t count = 0;
        for (int64_t i = 0; i < r.count; i++) {
            w.early_list[count] = i;
            count += w.early_wanted[i];
        }
        m.slots->expect(next.experts.slots - 1, w.early_list, count);
    }

    void want(int row, float weight) {
        own.wanting[place_] = row;
        own.weights[place_++] = weight;
    }

    void close(const StepLinear* matrices, int first) {
        ExpertPart& part = own.active[count_++];
        part.matrices = matrices;
        part.first = first, part.count = place_ - first;
        part.neurons_at = neurons_, part.out_at = first * m.hidden;
        neurons_ += part.count * matrices[1].out;
    }

    // Activations of all active experts, where their gates were.
    void widen(const StepLayer& l) {
        read_ = nullptr;
        all_read_ = true;  // by the router
        share_pass(ExpertsWay::kWiden, [&](const ExpertPart& part, int64_t begin, int64_t end) {
            read_rows(part);
            const StepLinear &gate = part.matrices[0], &up = part.matrices[1];
            float* a = w.experts_gate + part.neurons_at;
            float* b = w.experts_up + part.neurons_at;
            if (gate.weight) projections.project(gate, a, begin, end);
            projections.project(up, gate.weight ? b : a, begin, end);
            const int64_t first = begin * unit(up), n = std::min(end * unit(up), up.out) - first;
            for (int r = 0; r < part.count; r++)
                activate(l, a + r * up.out + first, gate.weight ? b + r * up.out + first : nullptr, n);
        });
    }

    void narrow() {
        read_ = nullptr;
        share_pass(ExpertsWay::kNarrow, [&](const ExpertPart& part, int64_t begin, int64_t end) {
            const StepLinear& down = part.matrices[2];
            if (read_ != &part) projections.read_from(w.experts_gate + part.neurons_at, down.in, part.count);
            read_ = &part;
            projections.project(down, w.experts_out + part.out_at, begin, end);
        });
    }

    // [tokens][hidden]
    const float* sum(const StepLayer& l) {
        memset(own.rows, 0, thread.tokens * m.hidden * sizeof(float));
        for (int i = shared_; i < count_; i++) add(own.active[i], false);
        if (shared_) add(own.active[0], l.experts.shared_gate.weight);
        return own.rows;
    }

    void add(const ExpertPart& part, bool by_gate) {
        for (int i = 0; i < part.count; i++) {
            const int row = own.wanting[part.first + i];
            const float given = weighs_inputs(part) ? 1.f : own.weights[part.first + i];
            const float weight = by_gate ? 1 / (1 + expf(-w.shared_weight[row])) : given;
            thread.step.add_scaled(own.rows + row * m.hidden, w.experts_out + part.out_at + i * m.hidden, weight, m.hidden);
        }
    }

    bool weighs_inputs(const ExpertPart& part) const { return by_inputs_ && !(shared_ && &part == own.active); }

    template <class Work>
    void share_pass(int pass, Work work) {
        const ExpertsWay& way = ahead.experts;
        projections.share_work(
            way.mine(pass), way.piece(pass), [&](Range r) { return way.bytes(pass, r); },
            [&](int64_t begin, int64_t end) { way.each_part(pass, {begin, end}, work); });
    }

    // Prepares the rows of x that want an expert, unless they are.
    void read_rows(const ExpertPart& part) {
        const bool scaled = weighs_inputs(part), all = part.count == thread.tokens && !scaled;
        if (all ? all_read_ : read_ == &part) return;
        if (all) {
            projections.read_from(x_, m.hidden);
        } else {
            for (int r = 0; r < part.count; r++) {
                const float* from = x_ + own.wanting[part.first + r] * m.hidden;
                const float weight = scaled ? own.weights[part.first + r] : 1.f;
                for (int64_t i = 0; i < m.hidden; i++) own.gathered[r * m.hidden + i] = from[i] * weight;
            }
            projections.read_from(own.gathered, m.hidden, part.count);
        }
        all_read_ = all;
        read_ = all ? nullptr : &part;
    }

    void activate(const StepLayer& l, float* gate, float* up, int64_t n) const {
        const StepExperts& e = l.experts;
        if (up && e.limit > 0) {
            for (int64_t i = 0; i < n; i++) {  // NaN stays
                gate[i] = gate[i] > e.limit ? e.limit : gate[i];
                up[i] = up[i] > e.limit ? e.limit : up[i] < -e.limit ? -e.limit : up[i];
            }
        }
        if (up && (e.slope != 1 || e.offset != 0)) {
            // slope * gate * sigmoid(slope * gate) is what silu makes of slope * gate
            for (int64_t i = 0; i < n; i++) gate[i] *= e.slope, up[i] = (up[i] + e.offset) / e.slope;
        }
        thread.step.act(gate, up, n, l.act, l.curve);
    }
};

}  // namespace coreskip
