// The memory of a step: what all its threads see, and what each has to itself.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "arguments.h"
#include "division.h"
#include "formats.h"
#include "logits.h"
#include "neuron_shares.h"
#include "step_routing.h"
#include "workspace.h"

namespace coreskip {

// The largest sizes of all layers.
struct Sizes {
    int64_t tokens, hidden, width = 0, projected = 0, attention = 0, queries = 0, kv = 0, neurons = 0, parts = 0, listed = 0;
    int64_t gates = 0;                       // of an attention
    int64_t sides = 0, side = 0;             // of third halves: of all layers, and of one
    int64_t absorbed = 0;                    // of latent attention: all heads' queries
    int64_t more = 0, tapped = 0, recalled = 0, recent = 0;  // of recurrences
    int64_t scales = 0, grouped = 0;         // of neurons in groups: room for scales, and their width
    int64_t rank = 0, inputs = 0, sums = 0;  // of learned scores; of column-sparse linears, and their outputs
    int64_t experts = 0, pairs = 0, active = 0;  // in all; times a token each, the shared one too; their neurons, summed

    Sizes(const StepModel& model, const StepCall& call, int64_t ahead)
        : tokens(call.rows * call.length), hidden(model.hidden) {
        for (int64_t i = 0; i < model.layer_count; i++) {
            const StepLayer& l = model.layers[i];
            attention = std::max(attention, l.heads * l.head_dim);
            projected = std::max({projected, l.q.out, l.heads * l.head_dim});
            kv = std::max(kv, l.kv_heads * l.head_dim);
            queries = std::max(queries, l.heads);
            gates = std::max(gates, l.attention_gate.out);
            neurons = std::max({neurons, l.gate.out, l.up.out, l.mlp.neurons, l.mlp.groups.neurons});
            listed = std::max({listed, l.mlp.neurons, l.mlp.groups.neurons});
            scales = std::max(scales, scales_room(l.mlp.groups));
            grouped = std::max(grouped, l.mlp.groups.width);
            rank = std::max(rank, l.mlp.reduce.out);
            if (l.latent.kv_low.weight) add_latent(l);
            if (l.recurrence.taps) add_recurrence(l);
            for (const StepLinear* w : {&l.q, &l.k, &l.v, &l.attention_gate, &l.o, &l.gate, &l.up, &l.down, &l.mlp.reduce,
                                        &l.mlp.expand}) {
                width = std::max(width, w->columns ? 0 : w->stride);
                inputs = std::max(inputs, w->columns ? w->in : 0);
                sums = std::max(sums, w->columns ? w->out + kPad : 0);
            }
            width = std::max({width, l.mlp.stride, l.mlp.groups.width});
            if (l.experts.matrices) add_experts(l);
        }
        if (model.side.weight) {
            sides = model.side.out, side = model.side_width;
            neurons = std::max(neurons, side);
            width = std::max({width, model.side.stride, model.layers[0].side_gate.stride, model.layers[0].side_out.stride});
        }
        width = std::max({width, model.head.stride, model.before_head.stride, hidden});
        const int64_t past = *std::max_element(call.past, call.past + call.rows);
        parts = (past + call.length + ahead - 1) / kChunk + 1;
        int64_t room = 8;  // grows by doubling, so that the workspace is not made anew every kChunk tokens
        while (room < parts) room *= 2;
        parts = room;
    }

    void add_latent(const StepLayer& l) {
        const StepLatentPart& p = l.latent;
        projected = std::max(projected, l.heads * p.value);
        kv = std::max({kv, p.kv_low.out, p.q_low.out, l.heads * p.rope});
        width = std::max({width, p.kv_low.stride, p.q_low.stride, p.q_low.out});
        absorbed = std::max(absorbed, l.heads * p.rank);
        inputs = std::max(inputs, p.nope), sums = std::max(sums, l.k.stride);
    }

    void add_recurrence(const StepLayer& l) {
        const StepRecurrence& r = l.recurrence;
        kv = std::max({kv, l.k.out, l.v.out});
        width = std::max({width, r.more[0].stride, r.more[1].stride});
        more = std::max(more, r.more[0].out + r.more[1].out);
        tapped = std::max(tapped, 2 * r.read_heads * r.key_dim + r.heads * r.value_dim);
        recalled = std::max(recalled, r.heads * r.value_dim);
        recent = std::max({recent, r.key_dim * r.tap_count, r.value_dim * r.tap_count});
    }

    void add_experts(const StepLayer& l) {
        const StepExperts& e = l.experts;
        int64_t widest = 0;
        for (int64_t i = 0; i < 3 * e.router.count; i++) {
            width = std::max(width, e.matrices[i].stride);
            if (i % 3 == 1) widest = std::max(widest, e.matrices[i].out);
        }
        width = std::max({width, e.router.logits.stride, e.shared_gate.stride});
        experts = std::max(experts, e.router.count);
        pairs = std::max(pairs, tokens * (e.router.chosen + 1));
        active = std::max(active, tokens * (e.router.chosen * widest + l.up.out));
    }
};

// What all threads see.
struct Shared {
    float *q, *k, *v, *out, *gate, *up, *logits;
    float *most, *sum, *value;  // attention: [parts][tokens][heads], value times [head_dim]
    float* attention_gate;      // [tokens][its outputs]
    float *sides, *side, *side_out;  // of third halves: [tokens][of all layers], [tokens][of one], [tokens][hidden]
    float* absorbed;            // of latent attention, [tokens][heads][rank]
    float *more, *tapped, *recalled;  // of recurrences: see StepRecurrence, and step_recurrence.h
    float* acc;                 // bundled MLPs: [2][threads][tokens][stride], used in turn
    float *score, *known_gate, *reduced;
    int64_t* dropped;           // [2][threads]: neurons that `refine` left out, used as `acc` is
    Stretch* stretches;         // [threads]
    Greatest* best;             // [threads][rows]
    float* exp_sums;            // [threads]
    int32_t* high;
    float* early_score;         // of the next layer's neurons: as `score`, `high` and what is chosen by them
    int32_t* early_high;
    int64_t *early_chosen, *early_list;
    Chosen* early_experts;      // [pairs of a token]
    float* early_routes;        // [tokens][experts]
    uint8_t* early_wanted;      // [neurons or experts]
    double* left_out;           // [threads]: see Walker
    float *routes, *shared_weight;                     // [tokens][experts], [tokens]
    float *experts_gate, *experts_up, *experts_out;    // of each active expert, [rows that want it][its outputs]
};

// What one thread has to itself.
struct Own {
    float* side;  // of a token, and its row of a table
    float *x, *h, *pending, *rows, *attended, *queries, *scratch, *recent;
    int8_t *q, *turned;
    float *scale, *group_scale, *group_sum;
    int32_t *sum, *group_half;
    int64_t *from, *to, *chosen, *list;
    uint8_t* selected;
    uint32_t* keys;
    float *slice, *exact, *sums, *group_scales;
    float *logits, *gathered;   // of experts: a token's; rows of x that want one
    Scored* scored;
    Chosen* experts_chosen;     // [tokens][pairs of a token]
    ExpertPart* active;
    int* wanting;               // rows of x, by active expert
    float* weights;             // theirs
};

template <class Take>
Shared share_out(const Sizes& s, const StepModel& m, const StepCall& c, int threads, Take take) {
    Shared w{};
    const int64_t t = s.tokens;
    w.q = take(float(), t * s.projected);
    w.k = take(float(), t * s.kv);
    w.v = take(float(), t * s.kv);
    w.out = take(float(), t * s.hidden);
    w.gate = take(float(), t * s.neurons);
    w.up = take(float(), t * s.neurons);
    w.logits = take(float(), c.rows * c.wanted * m.head.out);
    w.most = take(float(), s.parts * t * s.queries);
    w.sum = take(float(), s.parts * t * s.queries);
    w.value = take(float(), s.parts * t * s.attention);
    w.attention_gate = take(float(), t * s.gates);
    w.sides = take(float(), t * s.sides);
    w.side = take(float(), t * s.side);
    w.side_out = take(float(), s.side ? t * s.hidden : 0);
    w.absorbed = take(float(), t * s.absorbed);
    w.more = take(float(), t * s.more);
    w.tapped = take(float(), t * s.tapped);
    w.recalled = take(float(), t * s.recalled);
    w.acc = take(float(), s.listed ? 2 * threads * t * s.width : 0);
    w.score = take(float(), s.listed * t);
    w.known_gate = take(float(), s.listed * t);
    w.reduced = take(float(), s.rank * t);
    w.dropped = take(int64_t(), 2 * threads);
    w.high = take(int32_t(), s.listed * t * 2);
    const int64_t early = m.slots && m.reads_ahead ? 1 : 0;
    w.early_score = take(float(), early * s.listed * t);
    w.early_high = take(int32_t(), early * s.listed * t * 2);
    w.early_chosen = take(int64_t(), early * s.listed);
    w.early_list = take(int64_t(), early * std::max(s.listed, s.experts) + 1);
    w.early_experts = take(Chosen(), early * s.pairs);
    w.early_routes = take(float(), early * s.experts * t);
    w.early_wanted = take(uint8_t(), early * std::max(s.listed, s.experts));
    w.stretches = reinterpret_cast<Stretch*>(take(char(), threads * sizeof(Stretch)));
    w.best = take(Greatest(), threads * c.rows);
    w.exp_sums = take(float(), threads);
    w.left_out = take(double(), threads);
    w.routes = take(float(), t * s.experts);
    w.shared_weight = take(float(), t);
    w.experts_gate = take(float(), s.active);
    w.experts_up = take(float(), s.active);
    w.experts_out = take(float(), s.pairs * s.hidden);
    return w;
}

template <class Take>
Own own_share(const Sizes& s, Take take) {
    Own w{};
    const int64_t t = s.tokens, wide = std::max(s.width, s.neurons + kPad);
    w.side = take(float(), 2 * s.side);
    w.x = take(float(), t * s.hidden);
    w.h = take(float(), t * wide);
    w.pending = take(float(), t * s.hidden);
    w.rows = take(float(), t * wide);
    w.attended = take(float(), t * s.attention);
    w.queries = take(float(), s.attention + s.kv);
    w.scratch = take(float(), s.attention);
    w.recent = take(float(), s.recent);
    const int64_t places = places_of(t, wide / kGroup + 1);
    w.q = take(int8_t(), places * kGroup);
    w.scale = take(float(), t);
    w.group_scale = take(float(), places);
    w.group_sum = take(float(), places);
    w.group_half = take(int32_t(), 2 * places);
    w.sum = take(int32_t(), t);
    w.from = take(int64_t(), s.queries);
    w.to = take(int64_t(), s.queries);
    w.chosen = take(int64_t(), s.listed * t);
    w.list = take(int64_t(), std::max({s.listed, s.inputs, s.experts}) + 1);
    w.selected = take(uint8_t(), std::max(s.listed, s.inputs) * t);
    w.keys = take(uint32_t(), s.listed);
    w.slice = take(float(), kSlice);
    w.exact = take(float(), s.listed * t);
    w.sums = take(float(), s.sums * t);
    w.group_scales = take(float(), s.scales);
    w.turned = take(int8_t(), s.grouped * t);
    w.logits = take(float(), s.experts);
    w.gathered = take(float(), s.experts ? t * s.hidden : 0);
    w.scored = take(Scored(), s.experts);
    w.experts_chosen = take(Chosen(), s.pairs);
    w.active = take(ExpertPart(), s.experts ? s.experts + 1 : 0);
    w.wanting = take(int(), s.pairs);
    w.weights = take(float(), s.pairs);
    return w;
}

}  // namespace coreskip
