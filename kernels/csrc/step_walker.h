// One thread's way through a step, layer by layer.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "embedding.h"
#include "logits.h"
#include "step_attention.h"
#include "step_experts.h"
#include "step_latent.h"
#include "step_mlp_layer.h"
#include "step_recurrence.h"
#include "step_side.h"

namespace coreskip {

class Walker {
  public:
    Walker(const StepModel& model, const StepCall& call, const Sizes& sizes, const Shared& shared, const Own& own,
           Barrier& barrier)
        : own_(own), thread(model, call, sizes, shared, own_, barrier) {}
    Walker(const Walker&) = delete;
    Walker& operator=(const Walker&) = delete;

    // The next step: as which member of the team, and with how many positions in each sequence's cache. What has been fetched for
    // the last step's share is of no use for another.
    void begin(Member& member, const int64_t* past, int64_t lap, const int64_t* ids, const int64_t* places) {
        if (member.part != thread.part || member.parts != thread.parts) ahead_.rewind();
        thread.member = &member;
        thread.part = member.part, thread.parts = member.parts;
        thread.past = past, thread.lap = lap, thread.ids = ids, thread.places = places;
        thread.tokens = static_cast<int>(thread.s.tokens);
        ahead_.finished = 0;
        mlp_.begin();
    }

    // greedy: `find_likeliest` comes next.
    void run(bool greedy = false) {
        embed();
        for (int64_t i = 0; i < m.layer_count; i++) {
            const StepLayer& layer = m.layers[i];
            if (layer.latent.kv_low.weight) latent(layer);
            else if (layer.recurrence.taps) recurrence_.run(layer);
            else if (layer.run_attention) attention_.run(layer);
            else if (layer.k.weight || layer.fused) attention_.write_entries(layer);
            if (layer.run_mlp && layer.experts.matrices) experts_.run(layer);
            else if (layer.run_mlp) mlp_.run(layer);
            else projections_.norm_residual(layer.mlp_after);
            if (layer.side_gate.weight) side_.run(layer);
            projections_.scale_residual(layer);
        }
        if (c.hidden) give_back();
        else logits(greedy);
    }

    // Looks for the first of each row's greatest logits, of the model's dtype, after `run`.
    void find_likeliest() {
        projections_.meet();
        if (looked_) return;
        look(thread.mine(m.head.out));
        projections_.meet();
    }

    // What it has found: all threads the same.
    int64_t likeliest(int64_t row) const { return greatest_of(row).at; }

    // What softmax gives the token that has just been found for the first row.
    float probability() {
        const float greatest = greatest_of(0).value;
        const Range mine = thread.sums();
        for (int64_t i = mine.begin; i < mine.end; i++)
            w.exp_sums[i] = logits_of(0).exp_sum(share(m.head.out, i, c.threads), greatest);
        projections_.meet();
        float sum = 0;
        for (int i = 0; i < c.threads; i++) sum += w.exp_sums[i];
        return 1 / sum;
    }

    // Neurons that were left out so far: what all threads know, and what this one alone has seen.
    int64_t known_skipped() const { return thread.skipped; }
    double own_skipped() const { return thread.unread; }

  private:
    const Own own_;
    bool looked_ = false;  // for the greatest of the logits, while they were computed
    StepThread thread;
    Prefetch ahead_{thread};
    Projections projections_{thread, ahead_};
    StepAttention attention_{thread, ahead_, projections_};
    StepLatent latent_{thread, ahead_, projections_};
    StepRecurrentLayer recurrence_{thread, ahead_, projections_};
    StepMlpLayer mlp_{thread, ahead_, projections_};
    StepExpertsLayer experts_{thread, ahead_, projections_};
    StepSide side_{thread, ahead_, projections_};
    const StepModel& m = thread.m;
    const StepCall& c = thread.c;
    const Shared& w = thread.w;
    const Own& own = thread.own;

    void latent(const StepLayer& layer) {
        if (layer.run_attention) latent_.run(layer);
        else latent_.write_entries(layer);
    }

    void embed() {
        if (c.hidden) {
            memcpy(own.x, c.hidden, thread.tokens * m.hidden * sizeof(float));
            return projections_.meet();  // nobody writes to it before all have read it
        }
        for (int t = 0; t < thread.tokens; t++)
            look_up(m, thread.isa, thread.step, thread.ids[t], thread.places[t], own.h, own.x + t * m.hidden);
        if (m.side.weight) side_.begin();
    }

    Logits logits_of(int64_t row) const {
        return {static_cast<const char*>(c.logits) + row * m.head.out * size_of(m.logit_dtype), m.logit_dtype, own.slice};
    }

    // For the greatest logits of these outputs.
    void look(Range outputs) {
        for (int64_t row = 0; row < c.rows; row++) {
            const Greatest found = logits_of(row).greatest(outputs);
            if (found.at >= 0) w.best[thread.part * c.rows + row].show(found.value, found.at);
        }
    }

    Greatest greatest_of(int64_t row) const {
        Greatest best{};
        for (int p = 0; p < thread.parts; p++) {
            const Greatest& found = w.best[p * c.rows + row];
            if (found.at >= 0) best.show(found.value, found.at);
        }
        return best;
    }

    // All threads have the same residual stream: each hands out its share.
    void give_back() {
        const Range here = thread.mine(thread.tokens * m.hidden);
        memcpy(c.hidden + here.begin, own.x + here.begin, (here.end - here.begin) * sizeof(float));
        ahead_.rewind();
    }

    // What the LM head reads where there is a map before it: all threads compute what is small.
    const float* before_head(const float* x) {
        const int64_t n = m.before_head.out, before = ahead_.passed;  // the way does not have this matrix
        projections_.meet();  // the last layer's outputs lie in w.out
        projections_.read_from(x, m.hidden);
        projections_.project_all({{&m.before_head}, {w.out}, 0});
        ahead_.passed = before;
        projections_.meet();
        for (int t = 0; t < thread.tokens; t++) {
            float* row = own.h + t * n;
            memcpy(row, w.out + t * n, n * sizeof(float));
            thread.step.act(row, nullptr, n, m.before_act, nullptr);
            if (m.before_norm.kind != kNoNorm) thread.step.norm(m.before_norm, row, row);
        }
        return own.h;
    }

    void logits(bool greedy) {
        // the tokens whose logits are wanted move to the front
        for (int64_t r = 0; r < c.rows; r++)
            for (int64_t j = 0; j < c.wanted; j++)
                memmove(own.x + (r * c.wanted + j) * m.hidden,
                        own.x + (r * c.length + c.length - c.wanted + j) * m.hidden, m.hidden * sizeof(float));
        thread.tokens = static_cast<int>(c.rows * c.wanted);
        const float* x = projections_.normed(m.norm, own.x);
        if (m.before_head.weight) x = before_head(x);
        projections_.read_from(x, m.hidden);
        const Matrices last = thread.head();
        float* y = last.y[0];
        const bool changed = !thread.direct() || m.logit_scale != 1.f || m.logit_softcap > 0;
        std::fill_n(w.best + thread.part * c.rows, c.rows, Greatest{});
        looked_ = greedy && !changed && !m.head.pieces && !m.head.columns;
        projections_.project_all(last, [&](int64_t begin, int64_t end) {
            if (looked_) look({begin * unit(m.head), std::min(end * unit(m.head), m.head.out)});
        });
        ahead_.rewind();
        if (changed) {
            projections_.meet();
            const Range here = thread.mine(thread.tokens * m.head.out);
            const int64_t n = here.end - here.begin;
            float* mine = y + here.begin;
            if (m.logit_scale != 1.f || m.logit_softcap > 0)
                thread.step.softcap(mine, m.logit_scale, m.logit_softcap, n);
            if (thread.direct()) return;
            thread.isa.from_float(mine, static_cast<uint16_t*>(c.logits) + here.begin, m.logit_dtype, n);
        }
    }
};

}  // namespace coreskip
