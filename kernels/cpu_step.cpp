// A decode step in one call: one team of threads goes through all layers, meeting at barriers. What the layers are is
// data (cpu_step.h); the arithmetic is the kernels' own (cpu_isa.h, cpu_step_isa.h).
//
// Every thread has its own copy of the residual stream and computes what is small (norms, the quantisation of x)
// itself: on 576 x 1536 that costs 1 us where one more meeting of the threads costs as much. What is large is shared
// out: rows of weights, positions of the KV cache, neurons.

#include <omp.h>
#include <sched.h>

#include "cpu_work.h"

namespace coreskip {
namespace {

thread_local Workspace workspace;

// Where the threads meet. The last to arrive also rewinds the counter from which they take work.
class Meeting {
  public:
    void expect(int parts) { parts_ = parts; }

    void meet() {
        if (parts_ == 1) {
            next_ = 0;
            return;
        }
        const int here = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == parts_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(here + 1, std::memory_order_release);
            return;
        }
        // Spinning is fastest while every thread has a core. Where one has lost its core, the rest must let go of theirs.
        for (int spins = 0; round_.load(std::memory_order_acquire) == here; spins++)
            if (spins < 2000) pause();
            else sched_yield();
    }

    // The begin of a piece of work that no other thread has taken.
    int64_t take(int64_t size) { return next_.fetch_add(size, std::memory_order_relaxed); }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    int parts_ = 1;
    alignas(kLine) std::atomic<int> arrived_{0};
    alignas(kLine) std::atomic<int> round_{0};
    alignas(kLine) std::atomic<int64_t> next_{0};
};

// The largest sizes of all layers.
struct Sizes {
    int64_t tokens, hidden, width = 0, attention = 0, queries = 0, kv = 0, neurons = 0, parts = 0, listed = 0;

    Sizes(const StepModel& model, const StepCall& call, int64_t ahead) : tokens(call.rows * call.length), hidden(model.hidden) {
        for (int64_t i = 0; i < model.layer_count; i++) {
            const StepLayer& l = model.layers[i];
            attention = std::max(attention, l.heads * l.head_dim);
            kv = std::max(kv, l.kv_heads * l.head_dim);
            queries = std::max(queries, l.heads);
            neurons = std::max({neurons, l.gate.out, l.up.out, l.mlp.neurons});
            listed = std::max(listed, l.mlp.neurons);
            for (const StepLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) width = std::max(width, w->stride);
            width = std::max(width, l.mlp.stride);
        }
        width = std::max({width, model.head.stride, hidden});
        parts = (call.past + call.length + ahead - 1) / kChunk + 1;
        int64_t room = 8;  // grows by doubling, so that the workspace is not made anew every kChunk tokens
        while (room < parts) room *= 2;
        parts = room;
    }
};

// What all threads see.
struct Shared {
    float *q, *k, *v, *out, *gate, *up, *logits;
    float *most, *sum, *value;  // attention: [parts][tokens][heads], value times [head_dim]
    float* acc;                 // bundled MLPs: [2][threads][tokens][stride], used in turn
    float *score, *known_gate;
    float* best;                // [threads]
    int64_t* best_at;
    int32_t* high;
};

// What one thread has to itself.
struct Own {
    float *x, *h, *pending, *rows, *attended, *queries, *scratch;
    int8_t* q;
    float *scale, *group_scale, *group_sum;
    int32_t* sum;
    int64_t *from, *to, *chosen, *list;
    uint8_t* selected;
    uint32_t* keys;
    float* slice;
};

constexpr int64_t kSlice = 4096;  // logits looked at together

template <class Take>
Shared share_out(const Sizes& s, const StepModel& m, const StepCall& c, int threads, Take take) {
    Shared w{};
    const int64_t t = s.tokens;
    w.q = take(float(), t * s.attention);
    w.k = take(float(), t * s.kv);
    w.v = take(float(), t * s.kv);
    w.out = take(float(), t * s.hidden);
    w.gate = take(float(), t * s.neurons);
    w.up = take(float(), t * s.neurons);
    w.logits = take(float(), c.rows * c.wanted * m.head.out);
    w.most = take(float(), s.parts * t * s.queries);
    w.sum = take(float(), s.parts * t * s.queries);
    w.value = take(float(), s.parts * t * s.attention);
    w.acc = take(float(), s.listed ? 2 * threads * t * s.width : 0);
    w.score = take(float(), s.listed * t);
    w.known_gate = take(float(), s.listed * t);
    w.high = take(int32_t(), s.listed * t * 2);
    w.best = take(float(), threads);
    w.best_at = take(int64_t(), threads);
    return w;
}

template <class Take>
Own own_share(const Sizes& s, Take take) {
    Own w{};
    const int64_t t = s.tokens, wide = std::max(s.width, s.neurons + kPad);
    w.x = take(float(), t * s.hidden);
    w.h = take(float(), t * wide);
    w.pending = take(float(), t * s.hidden);
    w.rows = take(float(), t * wide);
    w.attended = take(float(), t * s.attention);
    w.queries = take(float(), s.attention + s.kv);
    w.scratch = take(float(), s.attention);
    w.q = take(int8_t(), t * wide);
    w.scale = take(float(), t);
    w.group_scale = take(float(), t * (wide / kGroup + 1));
    w.group_sum = take(float(), t * (wide / kGroup + 1));
    w.sum = take(int32_t(), t);
    w.from = take(int64_t(), s.queries);
    w.to = take(int64_t(), s.queries);
    w.chosen = take(int64_t(), s.listed * t);
    w.list = take(int64_t(), s.listed + 1);
    w.selected = take(uint8_t(), s.listed * t);
    w.keys = take(uint32_t(), 2 * s.listed + 1);
    w.slice = take(float(), kSlice);
    return w;
}

// One thread's way through the step.
class Walker {
  public:
    Walker(const StepModel& model, const StepCall& call, Meeting& meeting, const Sizes& sizes, const Shared& shared,
           const Own& own, int part, int parts)
        : m(model), c(call), meeting(meeting), s(sizes), w(shared), own(own), part(part), parts(parts),
          past(call.past), ids(call.tokens), places(call.positions), isa(*active.load()), step(*active_step.load()) {}

    // Steps of one token, each the likeliest after the last, until `count` are made or one of `ends` is. Every thread
    // finds the same token and keeps it to itself.
    void generate(int64_t count, const int64_t* ends, int64_t end_count, int64_t* made, int64_t* made_count) {
        int64_t token = *c.tokens, place = *c.positions, n = 0;
        ids = &token;
        places = &place;
        for (bool ended = false; n < count && !ended; n++, past++, place++) {
            run();
            token = likeliest();
            if (part == 0) made[n] = token;
            ended = std::find(ends, ends + end_count, token) != ends + end_count;
        }
        if (part == 0) *made_count = n;
    }

    void run() {
        tokens = static_cast<int>(s.tokens);
        embed();
        for (int64_t i = 0; i < m.layer_count; i++) {
            const StepLayer& layer = m.layers[i];
            if (layer.run_attention) attention(layer, c.caches[i]);
            else if (layer.k.weight) write_entries(layer, c.caches[i]);
            if (layer.run_mlp) mlp(layer);
        }
        logits();
        if (part == 0 && c.skipped) *c.skipped = skipped;
    }

  private:
    const StepModel& m;
    const StepCall& c;
    Meeting& meeting;
    const Sizes& s;
    const Shared& w;
    const Own& own;
    const int part, parts;
    int tokens = 0;
    int64_t past;
    const int64_t* ids;
    const int64_t* places;
    const Isa& isa;
    const StepIsa& step;
    int64_t skipped = 0;
    bool second = false;  // which half of `acc` the next bundled MLP uses

    // The input that `project` reads, and for what format it has been prepared.
    const float* input = nullptr;
    int64_t input_width = 0, ready_stride = 0;
    int ready = -1;

    void embed() {
        const int64_t row = m.hidden * size_of(m.embedding_dtype);
        for (int t = 0; t < tokens; t++) {
            const char* from = static_cast<const char*>(m.embedding) + ids[t] * row;
            float* to = own.x + t * m.hidden;
            isa.to_float(from, m.embedding_dtype, to, m.hidden);
            for (int64_t i = 0; i < m.hidden && m.embedding_scale != 1.f; i++) to[i] *= m.embedding_scale;
        }
    }

    const float* normed(const StepNorm& norm, const float* x) {
        if (norm.kind == kNoNorm) return x;
        for (int t = 0; t < tokens; t++) step.norm(norm, x + t * m.hidden, own.h + t * m.hidden);
        return own.h;
    }

    // ---- projections ----

    void read_from(const float* x, int64_t width) {
        input = x;
        input_width = width;
        ready = -1;
    }

    // Puts the input into the form that a weight's format wants: padded, and arranged or quantised.
    void prepare(int dtype, int64_t stride) {
        if (ready == dtype && ready_stride == stride) return;
        ready = dtype;
        ready_stride = stride;
        for (int t = 0; t < tokens; t++) {
            float* row = own.rows + t * stride;
            memcpy(row, input + t * input_width, input_width * sizeof(float));
            memset(row + input_width, 0, (stride - input_width) * sizeof(float));
            if (grouped(dtype)) {
                const int64_t groups = stride / kGroup;
                step.quantize_groups(row, stride, own.q + t * stride, own.group_scale + t * groups,
                                     own.group_sum + t * groups);
            } else if (dtype >= kInt8) {
                isa.quantize(row, stride, own.q + t * stride, own.scale + t, own.sum + t);
            } else {
                isa.arrange(row, stride, dtype);
            }
        }
    }

    Rows rows_of(int64_t stride) const { return {tokens, stride, own.rows, own.q, own.scale, own.sum}; }

    static int64_t units(const StepLinear& l) { return (l.out + unit(l) - 1) / unit(l); }
    static int64_t unit(const StepLinear& l) { return grouped(l.dtype) ? kTile : 4; }
    static bool grouped(int dtype) { return dtype == kInt4 || dtype == kInt8Groups; }

    // One matrix's units `begin` to `end`.
    void project(const StepLinear& l, float* y, int64_t begin, int64_t end) {
        prepare(l.dtype, l.stride);
        if (grouped(l.dtype)) {
            const TileJob job = {l.weight, l.dtype == kInt8Groups, l.bias, l.stride / kGroup, l.out, tokens, own.q, own.group_scale,
                                    own.group_sum, y};
            step.tiles(job, begin, end);
        } else {
            const LinearJob job = {l.weight, l.scale, l.bias, rows_of(l.stride), l.out, y};
            isa.linear[l.dtype](job, begin * 4, std::min(end * 4, l.out));
        }
    }

    // Matrices that read the same input, as one stretch of work. The cores of a shared machine are not equally fast:
    // each thread takes the next piece when it is done with one. An output does not depend on who computes it.
    void project_all(std::initializer_list<const StepLinear*> matrices, std::initializer_list<float*> outputs) {
        int64_t all = 0, bytes = 0;
        for (const StepLinear* l : matrices) {
            if (!l->weight) continue;
            all += units(*l);
            bytes = std::max(bytes, unit_bytes(*l));
        }
        const int64_t piece = std::max<int64_t>(1, std::min(kPiece / bytes, (all + parts - 1) / parts));
        for (int64_t at = meeting.take(piece); at < all; at = meeting.take(piece)) {
            const int64_t stop = std::min(at + piece, all);
            int64_t first = 0;
            auto y = outputs.begin();
            for (const StepLinear* l : matrices) {
                float* to = *y++;
                if (!l->weight) continue;
                const int64_t last = first + units(*l);
                if (at < last && stop > first)
                    project(*l, to, std::max(at, first) - first, std::min(stop, last) - first);
                first = last;
            }
        }
    }

    static constexpr int64_t kPiece = 48 << 10;  // bytes of weights

    static int64_t unit_bytes(const StepLinear& l) {
        if (grouped(l.dtype)) return l.stride / kGroup * (l.dtype == kInt4 ? kTileBytes : kTile8Bytes);
        return 4 * l.stride * size_of(l.dtype);
    }

    void add_to_residual(const StepLayer& layer, const StepNorm& after, const float* y) {
        for (int t = 0; t < tokens; t++) {
            const float* from = y + t * m.hidden;
            if (after.kind != kNoNorm) {
                step.norm(after, from, own.h);
                from = own.h;
            }
            step.add_scaled(own.x + t * m.hidden, from, layer.residual_scale, m.hidden);
        }
    }

    // ---- attention ----

    void attention(const StepLayer& l, const StepCache& cache) {
        read_from(normed(l.attention_in, own.x), m.hidden);
        project_all({&l.q, &l.k, &l.v}, {w.q, w.k, w.v});
        meeting.meet();
        const int64_t first = first_chunk(l), chunks = (past + c.length - 1) / kChunk + 1 - first;
        const int64_t tasks = c.rows * l.kv_heads * chunks;
        for (int64_t task = meeting.take(1); task < tasks; task = meeting.take(1))
            attend(l, cache, task / chunks / l.kv_heads, task / chunks % l.kv_heads, first, task % chunks);
        meeting.meet();
        for (int64_t q = 0; q < tokens * l.heads; q++)
            step.merge(chunks, tokens * l.heads, w.most + q, w.sum + q, w.value + q * l.head_dim, l.head_dim,
                       own.attended + q * l.head_dim);
        read_from(own.attended, l.heads * l.head_dim);
        project_all({&l.o}, {w.out});
        meeting.meet();
        if (l.parallel && l.run_mlp) memcpy(own.pending, w.out, tokens * m.hidden * sizeof(float));
        else add_to_residual(l, l.attention_out, w.out);
    }

    // What a skipped attention leaves behind: the entries of the new tokens.
    void write_entries(const StepLayer& l, const StepCache& cache) {
        read_from(normed(l.attention_in, own.x), m.hidden);
        project_all({&l.k, &l.v}, {w.k, w.v});
        meeting.meet();
        const int64_t tasks = c.rows * l.kv_heads;
        for (int64_t task = meeting.take(1); task < tasks; task = meeting.take(1))
            put_entries(l, cache, task / l.kv_heads, task % l.kv_heads, past, past + c.length);
        meeting.meet();
    }

    // Keys and values of the new tokens at positions `begin` to `end`, for one KV head of one sequence.
    void put_entries(const StepLayer& l, const StepCache& cache, int64_t row, int64_t group, int64_t begin, int64_t end) {
        for (int64_t position = begin; position < end; position++) {
            const int64_t token = row * c.length + position - past, from = token * l.kv_heads + group;
            const int64_t to = offset_of(l, cache, row, group) + position * l.head_dim;
            put(prepared(l, l.k_norm, w.k, from, token, l.kv_heads), cache.keys, to, l.head_dim);
            put(w.v + from * l.head_dim, cache.values, to, l.head_dim);
        }
    }

    static int64_t offset_of(const StepLayer& l, const StepCache& cache, int64_t row, int64_t group) {
        return row * cache.row_stride + group * cache.head_stride - cache.first * l.head_dim;
    }

    int64_t first_seen(const StepLayer& l, int64_t row, int64_t position) const {
        return std::max(c.start[row], l.window ? position + 1 - l.window : 0);
    }

    int64_t first_chunk(const StepLayer& l) const {
        int64_t first = past;
        for (int64_t row = 0; row < c.rows; row++) first = std::min(first, first_seen(l, row, past));
        return std::max<int64_t>(first, 0) / kChunk;
    }

    // One KV head of one sequence over one chunk of positions: for new tokens in the chunk keys and values are
    // written first.
    void attend(const StepLayer& l, const StepCache& cache, int64_t row, int64_t group, int64_t first, int64_t chunk) {
        const int64_t begin = (first + chunk) * kChunk, end = std::min(begin + kChunk, past + c.length);
        const int64_t offset = offset_of(l, cache, row, group), each = l.heads / l.kv_heads;
        put_entries(l, cache, row, group, std::max(begin, past), end);
        const int64_t bytes = size_of(m.kv_dtype);
        for (int64_t j = std::max<int64_t>(0, begin - past); j < c.length; j++) {
            const int64_t token = row * c.length + j, query = token * l.heads + group * each;
            const int64_t at = chunk * tokens * l.heads + query;
            for (int64_t i = 0; i < each; i++) {
                float* to = own.queries + i * l.head_dim;
                memcpy(to, prepared(l, l.q_norm, w.q, query + i, token, l.heads), l.head_dim * sizeof(float));
                for (int64_t e = 0; e < l.head_dim; e++) to[e] *= l.attention_scale;
                own.from[i] = first_seen(l, row, past + j);
                own.to[i] = past + j + 1;
            }
            step.attend({own.queries, static_cast<const char*>(cache.keys) + offset * bytes,
                         static_cast<const char*>(cache.values) + offset * bytes, m.kv_dtype, static_cast<int>(each),
                         l.head_dim, begin, end, own.from, own.to, l.softcap, w.most + at, w.sum + at,
                         w.value + at * l.head_dim});
        }
        // chunks that lie wholly after a token: nothing to see
        for (int64_t j = 0; j < std::min(c.length, begin - past); j++)
            for (int64_t i = 0; i < each; i++)
                w.sum[chunk * tokens * l.heads + (row * c.length + j) * l.heads + group * each + i] = 0;
    }

    // A head of q or k, normed and rotated, in the scratch.
    const float* prepared(const StepLayer& l, const StepNorm& norm, const float* heads, int64_t at, int64_t token,
                          int64_t count) {
        float* to = own.scratch;
        const float* from = heads + at * l.head_dim;
        if (norm.kind == kNoNorm) {
            memcpy(to, from, l.head_dim * sizeof(float));
        } else if (norm.size == l.head_dim) {
            step.norm(norm, from, to);
        } else {  // over all heads together (OLMo 2)
            float* all = own.attended;
            step.norm(norm, heads + token * count * l.head_dim, all);
            memcpy(to, all + (at - token * count) * l.head_dim, l.head_dim * sizeof(float));
        }
        if (l.cos) {
            const int64_t position = places[token] * l.rope_dim;
            step.rotate(to, l.cos + position, l.sin + position, l.rope_dim);
        }
        return to;
    }

    void put(const float* from, void* cache, int64_t to, int64_t n) const {
        isa.from_float(from, static_cast<char*>(cache) + to * size_of(m.kv_dtype), m.kv_dtype, n);
    }

    // ---- MLP ----

    void mlp(const StepLayer& l) {
        const float* x = normed(l.mlp_in, own.x);
        if (l.mlp.weight) {
            bundled(l, x);
            return;
        }
        read_from(x, m.hidden);
        project_all({&l.gate, &l.up}, {w.gate, w.up});
        meeting.meet();
        const int64_t n = l.up.out;
        for (int t = 0; t < tokens; t++) {
            float* a = own.h + t * n;
            memcpy(a, (l.gate.weight ? w.gate : w.up) + t * n, n * sizeof(float));
            step.act(a, l.gate.weight ? w.up + t * n : nullptr, n, l.act);
        }
        read_from(own.h, n);
        project_all({&l.down}, {w.out});
        meeting.meet();
        finish_mlp(l, w.out);
    }

    void finish_mlp(const StepLayer& l, const float* y) {
        add_to_residual(l, l.mlp_out, y);
        if (l.parallel && l.run_attention) add_to_residual(l, l.attention_out, own.pending);
    }

    void bundled(const StepLayer& l, const float* x) {
        const StepMlp& b = l.mlp;
        read_from(x, m.hidden);
        prepare(b.dtype, b.stride);
        const int projections = b.gated ? 2 : 1;
        const int64_t bytes = b.stride * (projections + 1) * size_of(b.dtype);
        MlpJob job{};
        job.weight = b.weight, job.low = b.low, job.scale = b.scale, job.gated = b.gated != 0, job.act = l.act;
        job.block = static_cast<int>(std::min<int64_t>(bundles(32, bytes), kMaxBlock));
        job.ahead = static_cast<int>(std::min<int64_t>(bundles(32, bytes), 4096));
        job.gate_bias = b.gate_bias, job.up_bias = b.up_bias, job.rows = rows_of(b.stride), job.rule = b.rule;
        job.norm = b.norm, job.mean = b.mean, job.neurons = b.neurons;
        job.high = b.dtype == kSliced ? w.high : nullptr;
        job.known_gate = b.rule == kGate ? w.known_gate : nullptr;
        job.score = w.score;
        int64_t count = b.neurons;
        if (b.dtype == kSliced || b.rule != kListed) {
            const Range here = share(b.neurons, part, parts);
            isa.scan[b.dtype](job, here.begin, here.end);
            meeting.meet();
        }
        if (b.rule != kListed) {
            count = choose_neurons(b);
            job.list = own.list;
            job.selected = tokens > 1 ? own.selected : nullptr;
        }
        // Two halves in turn: a slow thread may still add up this layer's sums when a fast one begins the next.
        float* all = w.acc + (second ? parts * tokens * s.width : 0);
        second = !second;
        float* mine = all + part * tokens * s.width;
        memset(mine, 0, tokens * b.stride * sizeof(float));
        const Range here = share(count, part, parts);
        isa.mlp[b.dtype](job, here.begin, here.end, mine);
        meeting.meet();
        for (int t = 0; t < tokens; t++) {
            float* sum = own.rows + t * m.hidden;
            memcpy(sum, all + t * b.stride, b.stride * sizeof(float));
            for (int p = 1; p < parts; p++) isa.add(sum, all + p * tokens * s.width + t * b.stride, b.stride);
            isa.restore(sum, b.stride, b.dtype);
            if (b.down_bias) isa.add(sum, b.down_bias, m.hidden);
        }
        finish_mlp(l, own.rows);
    }

    // Every thread makes the same choice: a meeting would cost as much.
    int64_t choose_neurons(const StepMlp& b) {
        const int64_t width = b.keep >= 0 ? std::min(b.keep, b.neurons) : b.neurons;
        for (int t = 0; t < tokens; t++)
            choose(w.score + t * b.neurons, b.neurons, b.keep, b.threshold, own.keys, own.chosen + t * width, width);
        int64_t count = tokens > 1 ? merge(own.chosen, width, tokens, b.neurons, own.selected, own.list)
                                   : compact(own.chosen, width, b.neurons, own.list);
        if (tokens == 1) {
            skipped += b.neurons - count;
        } else {
            for (int64_t i = 0; i < tokens * b.neurons; i++) skipped += own.selected[i] == 0;
        }
        return count;
    }

    // The first of the greatest logits, of the model's dtype. A NaN is greater than all, as in torch.
    int64_t likeliest() {
        meeting.meet();
        const Range here = share(m.head.out, part, parts);
        float best = -HUGE_VALF;
        int64_t at = m.head.out;
        for (int64_t i = here.begin; i < here.end; i += kSlice) {
            const int64_t n = std::min(kSlice, here.end - i);
            isa.to_float(static_cast<const char*>(c.logits) + i * size_of(m.logit_dtype), m.logit_dtype, own.slice, n);
            const int64_t first = step.argmax(own.slice, n);
            if (at == m.head.out || own.slice[first] > best || (own.slice[first] != own.slice[first] && best == best)) {
                best = own.slice[first];
                at = i + first;
            }
        }
        w.best[part] = best;
        w.best_at[part] = at;
        meeting.meet();
        for (int p = 0; p < parts; p++) {
            if (w.best_at[p] == m.head.out) continue;
            if (p == 0 || w.best[p] > best || (w.best[p] != w.best[p] && best == best)) {
                best = w.best[p];
                at = w.best_at[p];
            }
        }
        return at;
    }

    // ---- logits ----

    void logits() {
        // the tokens whose logits are wanted move to the front
        for (int64_t r = 0; r < c.rows; r++)
            for (int64_t j = 0; j < c.wanted; j++)
                memmove(own.x + (r * c.wanted + j) * m.hidden, own.x + (r * c.length + c.length - c.wanted + j) * m.hidden,
                        m.hidden * sizeof(float));
        tokens = static_cast<int>(c.rows * c.wanted);
        read_from(normed(m.norm, own.x), m.hidden);
        const bool direct = m.logit_dtype == kFloat32;
        float* y = direct ? static_cast<float*>(c.logits) : w.logits;
        project_all({&m.head}, {y});
        if (!direct || m.logit_scale != 1.f || m.logit_softcap > 0) {
            meeting.meet();
            const Range here = share(tokens * m.head.out, part, parts);
            const int64_t n = here.end - here.begin;
            if (m.logit_scale != 1.f || m.logit_softcap > 0) step.softcap(y + here.begin, m.logit_scale, m.logit_softcap, n);
            if (!direct) isa.from_float(y + here.begin, static_cast<uint16_t*>(c.logits) + here.begin, m.logit_dtype, n);
        }
    }
};

}  // namespace
}  // namespace coreskip

using namespace coreskip;

#define CORESKIP_API extern "C" __attribute__((visibility("default")))

namespace coreskip {
namespace {

// Gives every thread of a team its share of the workspace and calls walk(walker). Returns a Status.
template <class Walk>
int with_team(const StepModel& model, const StepCall& call, int64_t ahead, Walk walk) {
    const Sizes sizes(model, call, ahead);
    size_t bytes = 0;
    auto count = [&](auto type, int64_t n) {
        bytes += Workspace::room<decltype(type)>(n);
        return static_cast<decltype(type)*>(nullptr);
    };
    share_out(sizes, model, call, call.threads, count);
    const size_t shared_bytes = bytes;
    own_share(sizes, count);
    const size_t own_bytes = bytes - shared_bytes;
    if (!workspace.reserve(shared_bytes + call.threads * own_bytes)) return kNoMemory;
    auto take = [&](auto type, int64_t n) { return workspace.take<decltype(type)>(n); };
    const Shared shared = share_out(sizes, model, call, call.threads, take);
    char* private_memory = workspace.take<char>(call.threads * own_bytes);
    Meeting meeting;
#pragma omp parallel num_threads(call.threads)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        char* at = private_memory + part * own_bytes;
        const Own own = own_share(sizes, [&](auto type, int64_t n) {
            auto* p = reinterpret_cast<decltype(type)*>(at);
            at += Workspace::room<decltype(type)>(n);
            return p;
        });
#pragma omp single
        meeting.expect(parts);
        Walker walker(model, call, meeting, sizes, shared, own, part, parts);
        walk(walker);
    }
    return kOk;
}

}  // namespace
}  // namespace coreskip

// Runs one decode step. Returns a Status.
CORESKIP_API int coreskip_step(const StepModel* model, const StepCall* call) {
    return with_team(*model, *call, 0, [](Walker& walker) { walker.run(); });
}

// Decodes greedily from one token of one sequence: `count` tokens, or fewer where one of `ends` comes. The caches have
// room for `count`; call->logits, of one token, is scratch. Returns a Status.
CORESKIP_API int coreskip_generate(const StepModel* model, const StepCall* call, int64_t count, const int64_t* ends,
                                   int64_t end_count, int64_t* made, int64_t* made_count) {
    return with_team(*model, *call, count, [=](Walker& walker) {
        walker.generate(count, ends, end_count, made, made_count);
    });
}

// The op coreskip::linear for tiles, of bytes or of nibbles. x: [rows][in_features] of x_dtype; out: [rows][out_features] of x_dtype.
CORESKIP_API int coreskip_tiles(const void* x, int x_dtype, int rows, int64_t in_features, const void* weight, int bytes,
                                int64_t out_features, int64_t stride, const float* bias, void* out, int threads) {
    const Isa& isa = *active.load();
    const StepIsa& step = *active_step.load();
    const int64_t groups = stride / kGroup, tiles = (out_features + kTile - 1) / kTile;
    if (!workspace.reserve(Workspace::room<float>(rows * stride) + Workspace::room<int8_t>(rows * stride) +
                           2 * Workspace::room<float>(rows * groups) + Workspace::room<float>(rows * out_features)))
        return kNoMemory;
    float* values = workspace.take<float>(rows * stride);
    int8_t* q = workspace.take<int8_t>(rows * stride);
    float* scale = workspace.take<float>(rows * groups);
    float* sum = workspace.take<float>(rows * groups);
    float* y = workspace.take<float>(rows * out_features);
    for (int r = 0; r < rows; r++) {
        float* row = values + r * stride;
        isa.to_float(static_cast<const char*>(x) + r * in_features * size_of(x_dtype), x_dtype, row, in_features);
        memset(row + in_features, 0, (stride - in_features) * sizeof(float));
        step.quantize_groups(row, stride, q + r * stride, scale + r * groups, sum + r * groups);
    }
    const TileJob job = {weight, bytes != 0, bias, groups, out_features, rows, q, scale, sum, y};
#pragma omp parallel num_threads(threads)
    {
        const Range here = share(tiles, omp_get_thread_num(), omp_get_num_threads());
        step.tiles(job, here.begin, here.end);
    }
    isa.from_float(y, out, x_dtype, rows * out_features);
    return kOk;
}
