// A decode step in one call: one team of threads goes through all layers, meeting at barriers. What the layers are is
// data (cpu_step.h); the arithmetic is the kernels' own (cpu_isa.h, cpu_step_isa.h).
//
// Every thread has its own copy of the residual stream and computes what is small (norms, the quantisation of x)
// itself: on 576 x 1536 that costs 1 us where one more meeting of the threads costs as much. What is large is shared
// out: rows of weights, positions of the KV cache, neurons.

#include <omp.h>
#include <sched.h>

#include <new>
#include <numeric>

#include "cpu_work.h"

namespace coreskip {
namespace {

thread_local Workspace workspace;

// Where the threads meet.
class Meeting {
  public:
    void expect(int parts) { parts_ = parts; }

    // meanwhile(): does something short and useful, or returns false.
    template <class Meanwhile>
    void meet(Meanwhile meanwhile) {
        if (parts_ == 1) return;
        const int here = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == parts_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(here + 1, std::memory_order_release);
            return;
        }
        // Spinning is fastest while every thread has a core. Where one has lost its core, the rest must let go of theirs.
        for (int spins = 0; round_.load(std::memory_order_acquire) == here; spins++) {
            if (meanwhile()) continue;
            if (spins < 2000) pause();
            else sched_yield();
        }
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    int parts_ = 1;
    alignas(kLine) std::atomic<int> arrived_{0};
    alignas(kLine) std::atomic<int> round_{0};
};

// One thread's stretch of the work that all share out: it takes pieces from the front, the others, when they are done
// with their own, from the back, which its owner fetches last. The cores of a shared machine are not equally fast.
class alignas(kLine) Stretch {
  public:
    void set(Range range) { range_.store(pack(range.begin, range.end), std::memory_order_relaxed); }

    bool take_front(int64_t size, Range& piece) {
        return take([&](Range all) { return Range{all.begin, std::min(all.begin + size, all.end)}; }, piece);
    }
    bool take_back(int64_t size, Range& piece) {
        return take([&](Range all) { return Range{std::max(all.begin, all.end - size), all.end}; }, piece);
    }

  private:
    static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | end; }

    template <class Choose>
    bool take(Choose choose, Range& piece) {
        uint64_t seen = range_.load(std::memory_order_relaxed);
        for (;;) {
            const Range all = {static_cast<int64_t>(seen >> 32), static_cast<int64_t>(seen & 0xffffffff)};
            if (all.begin >= all.end) return false;
            piece = choose(all);
            const bool front = piece.begin == all.begin;
            const uint64_t rest = front ? pack(piece.end, all.end) : pack(all.begin, piece.begin);
            if (range_.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return true;
        }
    }

    std::atomic<uint64_t> range_{0};  // begin and end, 32 bits each
};

// The largest sizes of all layers.
struct Sizes {
    int64_t tokens, hidden, width = 0, attention = 0, queries = 0, kv = 0, neurons = 0, parts = 0, listed = 0;
    int64_t rank = 0, inputs = 0, sums = 0;  // of learned scores; of column-sparse linears, and their outputs

    Sizes(const StepModel& model, const StepCall& call, int64_t ahead) : tokens(call.rows * call.length), hidden(model.hidden) {
        for (int64_t i = 0; i < model.layer_count; i++) {
            const StepLayer& l = model.layers[i];
            attention = std::max(attention, l.heads * l.head_dim);
            kv = std::max(kv, l.kv_heads * l.head_dim);
            queries = std::max(queries, l.heads);
            neurons = std::max({neurons, l.gate.out, l.up.out, l.mlp.neurons});
            listed = std::max(listed, l.mlp.neurons);
            rank = std::max(rank, l.mlp.reduce.out);
            for (const StepLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.mlp.reduce, &l.mlp.expand}) {
                width = std::max(width, w->columns ? 0 : w->stride);
                inputs = std::max(inputs, w->columns ? w->in : 0);
                sums = std::max(sums, w->columns ? w->out + kPad : 0);
            }
            width = std::max(width, l.mlp.stride);
        }
        width = std::max({width, model.head.stride, hidden});
        parts = (call.past + call.length + ahead - 1) / kChunk + 1;
        int64_t room = 8;  // grows by doubling, so that the workspace is not made anew every kChunk tokens
        while (room < parts) room *= 2;
        parts = room;
    }
};

constexpr int64_t kSlice = 4096;  // logits looked at together

// The greatest of the numbers shown, and the first place of it. A NaN is greater than all, as in torch.
struct Greatest {
    float value = 0;
    int64_t at = -1;  // none was shown

    void show(float other, int64_t place) {
        if (at < 0 || other > value || (other != other && value == value)) *this = {other, place};
    }
};

// A row of logits. slice: [kSlice], scratch.
struct Logits {
    const void* row;
    int dtype;
    float* slice;
    const Isa& isa = *active.load();
    const StepIsa& step = *active_step.load();

    Greatest greatest(Range range) const {
        Greatest found{};
        in_slices(range, [&](int64_t begin, int64_t n) {
            const int64_t first = step.argmax(slice, n);
            found.show(slice[first], begin + first);
        });
        return found;
    }

    // What softmax divides e^(x - most) by.
    float exp_sum(Range range, float most) const {
        float sum = 0;
        in_slices(range, [&](int64_t, int64_t n) { sum += step.exp_sum(slice, n, most); });
        return sum;
    }

  private:
    template <class Look>
    void in_slices(Range range, Look look) const {
        for (int64_t i = range.begin; i < range.end; i += kSlice) {
            const int64_t n = std::min(kSlice, range.end - i);
            isa.to_float(static_cast<const char*>(row) + i * size_of(dtype), dtype, slice, n);
            look(i, n);
        }
    }
};

// What all threads see.
struct Shared {
    float *q, *k, *v, *out, *gate, *up, *logits;
    float *most, *sum, *value;  // attention: [parts][tokens][heads], value times [head_dim]
    float* acc;                 // bundled MLPs: [2][threads][tokens][stride], used in turn
    float *score, *known_gate, *reduced;
    int64_t* dropped;           // [2][threads]: neurons that `refine` left out, used as `acc` is
    Stretch* stretches;         // [threads]
    Greatest* best;             // [threads]
    int32_t* high;
    double* left_out;           // [threads]: see Walker
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
    float *slice, *exact, *sums;
};

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
    w.reduced = take(float(), s.rank * t);
    w.dropped = take(int64_t(), 2 * threads);
    w.high = take(int32_t(), s.listed * t * 2);
    w.stretches = reinterpret_cast<Stretch*>(take(char(), threads * sizeof(Stretch)));
    w.best = take(Greatest(), threads);
    w.left_out = take(double(), threads);
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
    w.list = take(int64_t(), std::max(s.listed, s.inputs) + 1);
    w.selected = take(uint8_t(), std::max(s.listed, s.inputs) * t);
    w.keys = take(uint32_t(), s.listed);
    w.slice = take(float(), kSlice);
    w.exact = take(float(), s.listed * t);
    w.sums = take(float(), s.sums * t);
    return w;
}

// One thread's way through the step.
class Walker {
  public:
    Walker(const StepModel& model, const StepCall& call, Meeting& meeting, const Sizes& sizes, const Shared& shared,
           const Own& own, int part, int parts)
        : m(model), c(call), meeting(meeting), s(sizes), w(shared), own(own), part(part), parts(parts),
          past(call.past), ids(call.tokens), places(call.positions), isa(*(model.kv_dtype == kBFloat16 ? active_bf16 : active).load()),
          step(*active_step.load()) {}

    // Steps of one token, each the likeliest after the last, until `count` are made, one of `ends` is, or one's
    // probability is below `least`. chances: theirs, or null. Every thread finds the same token and keeps it to itself.
    void generate(int64_t count, const int64_t* ends, int64_t end_count, float least, int64_t* made, float* chances,
                  int64_t* made_count) {
        int64_t token = *c.tokens, place = *c.positions, n = 0;
        ids = &token;
        places = &place;
        for (bool ended = false; n < count && !ended; n++, past++, place++) {
            run();
            token = likeliest();
            const float chance = chances ? probability() : 1.f;
            if (part == 0) made[n] = token;
            if (part == 0 && chances) chances[n] = chance;
            ended = !(chance >= least) || std::find(ends, ends + end_count, token) != ends + end_count;
        }
        if (part == 0) *made_count = n;
    }

    void run() {
        tokens = static_cast<int>(s.tokens);
        finished = 0;
        embed();
        for (int64_t i = 0; i < m.layer_count; i++) {
            const StepLayer& layer = m.layers[i];
            if (layer.run_attention) attention(layer, c.caches[i]);
            else if (layer.k.weight) write_entries(layer, c.caches[i]);
            if (layer.run_mlp) mlp(layer);
        }
        logits();
    }

    // Neurons that were left out so far; over all threads together, what all of them know is the first one's.
    double left_out() const { return unread + (part == 0 ? skipped : 0); }

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
    int64_t skipped = 0, finished = 0;  // neurons; stages up to the last one whose scattered memory has been read
    double unread = 0;    // neurons' worth of columns that this thread has seen left out
    float greatest = 0;   // the logit that `likeliest` found
    bool second = false;  // which half of `acc` the next bundled MLP uses

    // The input that `project` reads, and for what format it has been prepared.
    const float* input = nullptr;
    int64_t input_width = 0, ready_stride = 0;
    int ready = -1;
    bool ready_whole = false;
    const StepLinear* chosen_for = nullptr;  // whose inputs `list` and `selected` hold
    int64_t chosen_count = 0;

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
        chosen_for = nullptr;
    }

    // Puts the input into the form that a weight's format wants: padded, and arranged or quantised.
    void prepare(int dtype, int64_t stride, bool whole = false) {
        if (ready == dtype && ready_stride == stride && ready_whole == whole) return;
        ready = dtype;
        ready_stride = stride;
        ready_whole = whole;
        for (int t = 0; t < tokens; t++) {
            float* row = own.rows + t * stride;
            memcpy(row, input + t * input_width, input_width * sizeof(float));
            memset(row + input_width, 0, (stride - input_width) * sizeof(float));
            if (whole) continue;
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
    static int64_t unit(const StepLinear& l) {
        return l.columns ? kPad / size_of(l.dtype) : grouped(l.dtype) ? kTile : 4;
    }
    static bool grouped(int dtype) { return dtype == kInt4 || dtype == kInt8Groups; }

    // One matrix's units `begin` to `end`.
    void project(const StepLinear& l, float* y, int64_t begin, int64_t end) {
        prepare(l.dtype, l.stride, l.whole);
        if (grouped(l.dtype)) {
            const TileJob job = {l.weight, l.dtype == kInt8Groups, l.bias, l.stride / kGroup, l.out, tokens,
                                 l.whole ? own.rows : nullptr, own.q, own.group_scale, own.group_sum, y, to_fetch()};
            step.tiles(job, begin, end);
        } else {
            const LinearJob job = {l.weight, l.scale, l.bias, rows_of(l.stride), l.out, y, to_fetch()};
            isa.linear[l.dtype](job, begin * 4, std::min(end * 4, l.out));
        }
    }

    // The inputs of a column-sparse linear that count for any token. Every thread makes the same choice.
    int64_t choose_inputs(const StepLinear& l) {
        if (chosen_for == &l) return chosen_count;
        chosen_for = &l;
        chosen_count = 0;
        for (int64_t i = 0; i < l.in; i++) {
            const float norm = l.norm ? l.norm[i] : 1.f;
            uint8_t any = 0;
            for (int t = 0; t < tokens; t++) {
                const uint8_t wanted = !(fabsf(input[t * l.in + i]) * norm < l.least);
                own.selected[i * tokens + t] = wanted;
                any |= wanted;
            }
            own.list[chosen_count] = i;
            chosen_count += any;
        }
        return chosen_count;
    }

    // The same for columns: a strip of all that count. Shared out by outputs, not by columns, nothing remains to be added
    // up between threads, and the sums are the same to the bit whatever their number, and that of tokens.
    void project_columns(const StepLinear& l, float* y, int64_t begin, int64_t end) {
        const int64_t count = choose_inputs(l), first = begin * unit(l), width = (end - begin) * unit(l);
        const int64_t n = std::min(width, l.out - first);
        memset(own.sums, 0, tokens * width * sizeof(float));
        const ColumnsJob job = {static_cast<const char*>(l.weight) + first * size_of(l.dtype), l.stride, width, l.in, input,
                                tokens, own.list, own.selected};
        isa.columns[l.dtype](job, 0, count, own.sums);
        for (int t = 0; t < tokens; t++) {
            float* sum = own.sums + t * width;
            isa.restore(sum, width, l.dtype);
            if (l.bias) isa.add(sum, l.bias + first, n);
            memcpy(y + t * l.out + first, sum, n * sizeof(float));
        }
        if (begin == 0) unread += l.neurons * std::count(own.selected, own.selected + l.in * tokens, 0);
    }

    // Calls work(begin, end) for pieces of `all` until none is left, first those of this thread's own share: that is what
    // it fetches ahead. An output does not depend on who computes it. bytes: of memory that each reads.
    template <class Work>
    void share_work(int64_t all, int64_t piece, int64_t bytes, Work work) {
        const Range mine = share(all, part, parts);
        const int64_t end = passed + (mine.end - mine.begin) * bytes;
        w.stretches[part].set(mine);
        Range r{};
        while (w.stretches[part].take_front(piece, r)) {
            work(r.begin, r.end);
            passed += (r.end - r.begin) * bytes;
        }
        passed = end;
        for (int k = 1; k < parts; k++)
            while (w.stretches[(part + k) % parts].take_back(piece, r)) work(r.begin, r.end);
    }

    // What several matrices are shared out by, as one.
    struct Units {
        int64_t end[3] = {};  // units up to each one's last

        int64_t count() const { return end[2]; }
        int64_t begin(int i) const { return i ? end[i - 1] : 0; }
        // Matrix i's units among `range` of all.
        Range among(Range range, int i) const {
            return {std::max(range.begin, begin(i)) - begin(i), std::min(range.end, end[i]) - begin(i)};
        }
    };

    // Matrices that read the same input. Those that are read whole are shared out together, and so are those by columns.
    struct Matrices {
        const StepLinear* matrix[3] = {};
        float* y[3] = {};
        Units whole, columns;
        int64_t bytes = 1;  // of the largest unit
        int64_t next;       // the stage after them

        Matrices(std::initializer_list<const StepLinear*> matrices, std::initializer_list<float*> outputs, int64_t next)
            : next(next) {
            std::copy(matrices.begin(), matrices.end(), matrix);
            std::copy(outputs.begin(), outputs.end(), y);
            for (int i = 0; i < 3; i++) {
                const bool there = matrix[i] && matrix[i]->weight, sparse = there && matrix[i]->columns;
                const int64_t count = there ? units(*matrix[i]) : 0;
                whole.end[i] = whole.begin(i) + (sparse ? 0 : count);
                columns.end[i] = columns.begin(i) + (sparse ? count : 0);
                if (there && !sparse) bytes = std::max(bytes, unit_bytes(*matrix[i]));
            }
        }
    };

    Matrices inputs(const StepLayer& l) const {
        if (!l.run_attention) return {{&l.k, &l.v}, {w.k, w.v}, stage(l, 3)};
        return {{&l.q, &l.k, &l.v}, {w.q, w.k, w.v}, stage(l, 3)};
    }
    Matrices output(const StepLayer& l) const { return {{&l.o}, {w.out}, stage(l, 5)}; }
    Matrices reducing(const StepLayer& l) const { return {{&l.mlp.reduce}, {w.reduced}, stage(l, 6)}; }
    Matrices expanding(const StepLayer& l) const { return {{&l.mlp.expand}, {w.score}, stage(l, 7)}; }
    Matrices widening(const StepLayer& l) const { return {{&l.gate, &l.up}, {w.gate, w.up}, stage(l, 7)}; }
    Matrices narrowing(const StepLayer& l) const { return {{&l.down}, {w.out}, stage(l, 8)}; }
    Matrices head() const { return {{&m.head}, {direct() ? static_cast<float*>(c.logits) : w.logits}, 0}; }
    bool direct() const { return m.logit_dtype == kFloat32; }

    void project_all(const Matrices& all) {
        share_work(all.whole.count(), std::max<int64_t>(1, kPiece / all.bytes), all.bytes, [&](int64_t begin, int64_t end) {
            for (int i = 0; i < 3; i++) {
                const Range range = all.whole.among({begin, end}, i);
                if (range.begin < range.end) project(*all.matrix[i], all.y[i], range.begin, range.end);
            }
        });
        for (int i = 0; i < 3; i++) {
            const Range strip = all.columns.among(share(all.columns.count(), part, parts), i);
            if (strip.begin < strip.end) project_columns(*all.matrix[i], all.y[i], strip.begin, strip.end);
        }
        if (all.columns.count()) finished = all.next;
    }

    static constexpr int64_t kPiece = 48 << 10;  // bytes of weights. With pieces of 8 KB a step takes 5 % longer.

    static int64_t unit_bytes(const StepLinear& l) {
        if (grouped(l.dtype)) return l.stride / kGroup * (l.dtype == kInt4 ? kTileBytes : kTile8Bytes);
        return 4 * l.stride * size_of(l.dtype);
    }

    // ---- memory to be read later ----
    //
    // A thread knows what it will read: its own share of every matrix and of the cache, layer by layer. It fetches that
    // kLead bytes ahead, while it reads what comes before and while it waits. The hardware begins anew with each matrix,
    // of a few 100 KB, and stands still between two: with this a step over the embedded model takes 0.75 times as long
    // in 4 bits, 0.8 in bf16. Leads of 64 to 256 KB are within 2 % of each other, 384 is 9 % slower (1 MB of L2).
    // Also measured: fetching between pieces of activation and quantisation gains nothing, the lead is there already.

    static constexpr int64_t kLead = 128 << 10;

    struct Memory {
        uintptr_t at;
        int64_t bytes;
    };

    static constexpr int kStages = 8;          // q, k, v, entries, o, gate, up, down
    int64_t stage(const StepLayer& l, int n) const { return kStages * (&l - m.layers) + n; }

    Ahead ahead{}, nothing{};
    int64_t ahead_layer = 0, ahead_entry = 0;  // of the next part; twice the task, the keys' and the values'
    int ahead_stage = 0;
    int64_t planned = 0, passed = 0;  // bytes of the way up to the end of `ahead`, and of what has been read

    int64_t lead() const {
        const int64_t rest = ahead.at < ahead.end ? ahead.end - ahead.at : 0;
        return planned - rest - static_cast<int64_t>(ahead.then_end - ahead.then) - passed;
    }

    // This thread's share of matrix i.
    Memory memory_of(const Matrices& all, int i) const {
        const Range range = all.whole.among(share(all.whole.count(), part, parts), i);
        if (range.begin >= range.end) return {0, 0};
        const int64_t bytes = unit_bytes(*all.matrix[i]);
        const auto base = reinterpret_cast<uintptr_t>(all.matrix[i]->weight);
        return {base + range.begin * bytes, (range.end - range.begin) * bytes};
    }

    // The keys, or the values, that the i-th attention task of this thread's share reads.
    Memory entries_of(const StepLayer& l, const StepCache& cache, int64_t i, bool values) const {
        const int64_t chunks = chunks_of(l), task = share(tasks_of(l), part, parts).begin + i;
        const int64_t row = task / chunks / l.kv_heads, chunk = (first_chunk(l) + task % chunks) * kChunk;
        const int64_t begin = std::max(chunk, first_seen(l, row, past)), end = std::min(chunk + kChunk, past);
        if (begin >= end) return {0, 0};
        const int64_t at = offset_of(l, cache, row, task / chunks % l.kv_heads) + begin * l.head_dim;
        const int64_t size = size_of(m.kv_dtype);
        const auto base = reinterpret_cast<uintptr_t>(values ? cache.values : cache.keys);
        return {base + at * size, (end - begin) * l.head_dim * size};
    }

    int64_t own_tasks(const StepLayer& l) const {
        const Range mine = share(tasks_of(l), part, parts);
        return mine.end - mine.begin;
    }

    // The first bundles of this thread's share, or of the plane that it scans. The rest an MLP over bundles fetches for
    // itself; it may be chosen first.
    Memory bundles_of(const StepMlp& b) const {
        if (b.rule == kLearned || (b.rule != kListed && b.dtype != kSliced)) return {0, 0};
        Range range = share(b.list ? b.listed : b.neurons, part, parts);
        if (range.begin >= range.end) return {0, 0};
        if (b.list) range = {b.list[range.begin], b.list[range.end - 1] + 1};  // with what lies between
        const int64_t projections = b.gated ? 2 : 1;
        const int64_t row = b.dtype == kSliced ? projections * b.stride / 2 : (projections + 1) * b.stride * size_of(b.dtype);
        const auto base = reinterpret_cast<uintptr_t>(b.weight);
        return {base + range.begin * row, std::min((range.end - range.begin) * row, kLead)};
    }

    // What this thread reads first after a layer.
    uintptr_t first_after(const StepLayer& l) const {
        const StepLayer* next = &l + 1;
        return memory_of(next == m.layers + m.layer_count ? head() : inputs(*next), 0).at;
    }

    // Whether what a stage reads is chosen when it comes.
    bool scattered(const StepLayer& l, int n) const {
        if (n < 4) return n != 3 && inputs(l).columns.count();
        if (n == 4) return l.run_attention && l.o.columns;
        if (!l.run_mlp || l.mlp.weight) return l.run_mlp && n == 7;
        return n == 7 ? l.down.columns : widening(l).columns.count();
    }

    // The next part of the way, maybe empty. False where nothing is known: at the end, and behind an MLP over bundles, or
    // columns, until they are done: it would not stay in the cache.
    bool next_memory(Memory& next) {
        if (ahead_layer > m.layer_count) return false;
        if (ahead_layer == m.layer_count) {
            next = memory_of(head(), 0);
            ahead_layer++;
            return true;
        }
        const StepLayer& l = m.layers[ahead_layer];
        const bool dense = l.run_mlp && !l.mlp.weight;
        if (scattered(l, ahead_stage) && stage(l, ahead_stage) >= finished) return false;
        next = {0, 0};
        if (ahead_stage < 3) {
            next = memory_of(inputs(l), ahead_stage);
        } else if (ahead_stage == 3 && l.run_attention && ahead_entry < 2 * own_tasks(l)) {
            next = entries_of(l, c.caches[ahead_layer], ahead_entry / 2, ahead_entry % 2);
            ahead_entry++;
            return true;
        } else if (ahead_stage == 4 && l.run_attention) {
            next = memory_of(output(l), 0);
        } else if ((ahead_stage == 5 || ahead_stage == 6) && l.run_mlp && l.mlp.rule == kLearned) {
            next = memory_of(ahead_stage == 5 ? reducing(l) : expanding(l), 0);
        } else if (ahead_stage == 5 && l.run_mlp && !dense) {
            next = bundles_of(l.mlp);
        } else if ((ahead_stage == 5 || ahead_stage == 6) && dense) {
            next = memory_of(widening(l), ahead_stage - 5);
        } else if (ahead_stage == 7) {
            if (dense) next = memory_of(narrowing(l), 0);
            ahead_layer++;
            ahead_stage = ahead_entry = 0;
            return true;
        }
        ahead_stage++;
        return true;
    }

    // Puts the next parts of the way into `ahead`; what has been read meanwhile need not be fetched any more.
    void refill() {
        for (;;) {
            if (ahead.at < ahead.end && lead() < 0) ahead.at += std::min<int64_t>(-lead(), ahead.end - ahead.at);
            if (ahead.at >= ahead.end) ahead = {ahead.then, ahead.then_end, 0, 0};
            if (ahead.then < ahead.then_end) return;
            Memory next;
            if (!next_memory(next)) return;
            planned += next.bytes;
            ahead.then = next.at, ahead.then_end = next.at + next.bytes;
        }
    }

    // What a kernel is to fetch: nothing where enough has been, as when it does more than its share.
    Ahead* to_fetch() {
        if (lead() >= kLead) return &nothing;
        refill();
        return &ahead;
    }

    // Some lines, unless enough have been fetched.
    bool fetch_some() {
        Ahead* some = to_fetch();
        if (some->at >= some->end) return false;
        step.fetch(*some, 8 * kLine);
        return true;
    }

    void rewind() {
        ahead = {};
        ahead_layer = ahead_entry = ahead_stage = planned = passed = 0;
    }

    void meet() {
        meeting.meet([&] { return fetch_some(); });
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
        project_all(inputs(l));
        meet();
        const int64_t first = first_chunk(l), chunks = chunks_of(l), tasks = tasks_of(l);
        share_work(tasks, 1, 0, [&](int64_t task, int64_t) {
            attend(l, cache, task / chunks / l.kv_heads, task / chunks % l.kv_heads, first, task % chunks);
        });
        for (int64_t i = 0; i < own_tasks(l); i++) passed += 2 * entries_of(l, cache, i, false).bytes;
        meet();
        for (int64_t q = 0; q < tokens * l.heads; q++)
            step.merge(chunks, tokens * l.heads, w.most + q, w.sum + q, w.value + q * l.head_dim, l.head_dim,
                       own.attended + q * l.head_dim);
        read_from(own.attended, l.heads * l.head_dim);
        project_all(output(l));
        meet();
        if (l.parallel && l.run_mlp) memcpy(own.pending, w.out, tokens * m.hidden * sizeof(float));
        else add_to_residual(l, l.attention_out, w.out);
    }

    // What a skipped attention leaves behind: the entries of the new tokens.
    void write_entries(const StepLayer& l, const StepCache& cache) {
        read_from(normed(l.attention_in, own.x), m.hidden);
        project_all(inputs(l));
        meet();
        const int64_t tasks = c.rows * l.kv_heads;
        share_work(tasks, 1, 0, [&](int64_t task, int64_t) {
            put_entries(l, cache, task / l.kv_heads, task % l.kv_heads, past, past + c.length);
        });
        meet();
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

    int64_t chunks_of(const StepLayer& l) const { return (past + c.length - 1) / kChunk + 1 - first_chunk(l); }
    int64_t tasks_of(const StepLayer& l) const { return c.rows * l.kv_heads * chunks_of(l); }

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
                         w.value + at * l.head_dim, to_fetch()});
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
        project_all(widening(l));
        meet();
        const int64_t n = l.up.out;
        for (int t = 0; t < tokens; t++) {
            float* a = own.h + t * n;
            memcpy(a, (l.gate.weight ? w.gate : w.up) + t * n, n * sizeof(float));
            step.act(a, l.gate.weight ? w.up + t * n : nullptr, n, l.act);
        }
        read_from(own.h, n);
        project_all(narrowing(l));
        meet();
        finish_mlp(l, w.out);
    }

    void finish_mlp(const StepLayer& l, const float* y) {
        add_to_residual(l, l.mlp_out, y);
        if (l.parallel && l.run_attention) add_to_residual(l, l.attention_out, own.pending);
    }

    // Scores the neurons by a low-rank map of x.
    void predict(const StepLayer& l, const float* x) {
        read_from(x, m.hidden);
        project_all(reducing(l));
        meet();
        read_from(w.reduced, l.mlp.reduce.out);
        project_all(expanding(l));
        meet();
    }

    void bundled(const StepLayer& l, const float* x) {
        const StepMlp& b = l.mlp;
        if (b.rule == kLearned) predict(l, x);
        read_from(x, m.hidden);
        prepare(b.dtype, b.stride);
        const int projections = b.gated ? 2 : 1;
        const int64_t bytes = b.stride * (projections + 1) * size_of(b.dtype);
        MlpJob job{};
        job.weight = b.weight, job.low = b.low, job.scale = b.scale, job.gated = b.gated != 0, job.act = l.act;
        job.block = static_cast<int>(std::min<int64_t>(bundles(64, bytes), kMaxBlock));
        job.ahead = static_cast<int>(std::min<int64_t>(bundles(32, bytes), 4096));
        job.gate_bias = b.gate_bias, job.up_bias = b.up_bias, job.rows = rows_of(b.stride);
        job.rule = b.rule == kLearned ? kListed : b.rule;
        job.norm = b.norm, job.mean = b.mean, job.neurons = b.neurons;
        job.high = b.dtype == kSliced ? w.high : nullptr;
        job.known_gate = b.rule == kGate ? w.known_gate : nullptr;
        job.score = w.score, job.refine = b.refine, job.exact = own.exact;
        passed += bundles_of(b).bytes;
        int64_t count = b.neurons;
        const auto choose_some = [&] {
            count = choose_neurons(b);
            job.list = own.list;
            job.selected = tokens > 1 ? own.selected : nullptr;
        };
        if (b.rule == kLearned) choose_some();
        if (b.list) {
            count = b.listed;
            job.list = b.list;
            job.selected = c.length == 1 ? b.selected : selected_by_token(b);
        }
        if (b.dtype == kSliced || b.rule == kGate) {
            const Range here = share(count, part, parts);
            isa.scan[b.dtype](job, here.begin, here.end);
        }
        if (b.rule == kSketch || b.rule == kGate) {
            meet();
            choose_some();
        }
        // Two halves in turn: a slow thread may still add up this layer's sums when a fast one begins the next.
        float* all = w.acc + (second ? parts * tokens * s.width : 0);
        int64_t* dropped = w.dropped + (second ? parts : 0);
        second = !second;
        float* mine = all + part * tokens * s.width;
        memset(mine, 0, tokens * b.stride * sizeof(float));
        job.after = first_after(l);
        const Range here = share(count, part, parts);
        dropped[part] = isa.mlp[b.dtype](job, here.begin, here.end, mine);
        finished = stage(l, kStages);  // what follows may be fetched
        meet();
        skipped = std::accumulate(dropped, dropped + parts, skipped);
        for (int t = 0; t < tokens; t++) {
            float* sum = own.rows + t * m.hidden;
            memcpy(sum, all + t * b.stride, b.stride * sizeof(float));
            for (int p = 1; p < parts; p++) isa.add(sum, all + p * tokens * s.width + t * b.stride, b.stride);
            isa.restore(sum, b.stride, b.dtype);
            if (b.down_bias) isa.add(sum, b.down_bias, m.hidden);
        }
        finish_mlp(l, own.rows);
    }

    // Of rows that have several tokens each, for the neurons of this thread's share.
    uint8_t* selected_by_token(const StepMlp& b) {
        const Range here = share(b.listed, part, parts);
        for (int64_t i = here.begin; i < here.end; i++)
            for (int t = 0; t < tokens; t++)
                own.selected[b.list[i] * tokens + t] = b.selected[b.list[i] * c.rows + t / c.length];
        return own.selected;
    }

    // Every thread makes the same choice: a meeting would cost as much.
    int64_t choose_neurons(const StepMlp& b) {
        const int64_t width = b.keep >= 0 ? std::min(b.keep, b.neurons) : b.neurons;
        for (int t = 0; t < tokens; t++)
            choose(score_of(b, t), b.neurons, b.keep, b.threshold, own.keys, own.chosen + t * width, width);
        int64_t count = tokens > 1 ? merge(own.chosen, width, tokens, b.neurons, own.selected, own.list)
                                   : compact(own.chosen, width, b.neurons, own.list);
        if (tokens == 1) {
            skipped += b.neurons - count;
        } else {
            for (int64_t i = 0; i < tokens * b.neurons; i++) skipped += own.selected[i] == 0;
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

    Logits all_logits() const { return {c.logits, m.logit_dtype, own.slice}; }

    // The first of the greatest logits, of the model's dtype.
    int64_t likeliest() {
        meet();
        w.best[part] = all_logits().greatest(share(m.head.out, part, parts));
        meet();
        Greatest best{};
        for (int p = 0; p < parts; p++)
            if (w.best[p].at >= 0) best.show(w.best[p].value, w.best[p].at);
        greatest = best.value;
        return best.at;
    }

    // What softmax gives the token that `likeliest` has just found.
    float probability() {
        float sum = all_logits().exp_sum(share(m.head.out, part, parts), greatest);
        meet();  // `best` has been read by all
        w.best[part].value = sum;
        meet();
        sum = 0;
        for (int p = 0; p < parts; p++) sum += w.best[p].value;
        return 1 / sum;
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
        const Matrices last = head();
        float* y = last.y[0];
        project_all(last);
        rewind();
        if (!direct() || m.logit_scale != 1.f || m.logit_softcap > 0) {
            meet();
            const Range here = share(tokens * m.head.out, part, parts);
            const int64_t n = here.end - here.begin;
            if (m.logit_scale != 1.f || m.logit_softcap > 0) step.softcap(y + here.begin, m.logit_scale, m.logit_softcap, n);
            if (!direct()) isa.from_float(y + here.begin, static_cast<uint16_t*>(c.logits) + here.begin, m.logit_dtype, n);
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
    for (int i = 0; i < call.threads; i++) new (shared.stretches + i) Stretch();
    std::fill_n(shared.left_out, call.threads, 0.0);  // the team may turn out smaller
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
        shared.left_out[part] = walker.left_out();
    }
    if (call.skipped) *call.skipped = std::accumulate(shared.left_out, shared.left_out + call.threads, 0.0);
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
        walker.generate(count, ends, end_count, 0, made, nullptr, made_count);
    });
}

// Drafts greedily as coreskip_generate decodes, until a token's probability is below `least`; chances: [count].
CORESKIP_API int coreskip_draft(const StepModel* model, const StepCall* call, int64_t count, float least, int64_t* made,
                                float* chances, int64_t* made_count) {
    return with_team(*model, *call, count, [=](Walker& walker) {
        walker.generate(count, nullptr, 0, least, made, chances, made_count);
    });
}

// Of each row of logits [rows][n] of `dtype` the likeliest token, as coreskip_generate finds it, and its probability;
// chances may be null.
CORESKIP_API void coreskip_likeliest(const void* logits, int dtype, int64_t rows, int64_t n, int64_t* tokens,
                                     float* chances, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        float slice[kSlice];
        const Logits row = {static_cast<const char*>(logits) + r * n * size_of(dtype), dtype, slice};
        const Greatest best = row.greatest({0, n});
        tokens[r] = best.at;
        if (chances) chances[r] = 1 / row.exp_sum({0, n}, best.value);
    }
}

// The op coreskip::linear for tiles, of bytes or of nibbles, with x as it is (`whole`) or rounded to 8 bits.
// x: [rows][in_features] of x_dtype; out: [rows][out_features] of x_dtype.
CORESKIP_API int coreskip_tiles(const void* x, int x_dtype, int rows, int64_t in_features, const void* weight, int bytes,
                                int whole, int64_t out_features, int64_t stride, const float* bias, void* out, int threads) {
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
        if (!whole) step.quantize_groups(row, stride, q + r * stride, scale + r * groups, sum + r * groups);
    }
#pragma omp parallel num_threads(threads)
    {
        Ahead none{};
        const TileJob job = {weight, bytes != 0, bias, groups, out_features, rows, whole ? values : nullptr, q, scale, sum, y, &none};
        const Range here = share(tiles, omp_get_thread_num(), omp_get_num_threads());
        step.tiles(job, here.begin, here.end);
    }
    isa.from_float(y, out, x_dtype, rows * out_features);
    return kOk;
}

// Rows `first` to `first + rows` of tiles, as they are computed with. out: [rows][in_features] of dtype.
CORESKIP_API int coreskip_untile(const void* weight, int bytes, int64_t groups, int64_t in_features, int64_t first,
                                 int64_t rows, int dtype, void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const UntileJob job = {weight, bytes != 0, groups, in_features, first, dtype, out};
    const int64_t begin = first / kTile, tiles = (first + rows + kTile - 1) / kTile - begin;
#pragma omp parallel num_threads(threads)
    {
        const Range here = share(tiles, omp_get_thread_num(), omp_get_num_threads());
        step.untile(job, std::max(first, (begin + here.begin) * kTile),
                    std::min(first + rows, (begin + here.end) * kTile));
    }
    return kOk;
}

// Tiles that stand for the very numbers of weight: [rows][in_features] floats, row_stride apart. Returns whether there
// are such.
CORESKIP_API int coreskip_tile_up(const float* weight, int64_t row_stride, int64_t rows, int64_t in_features, int bytes,
                                  void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const TileUpJob job = {weight, row_stride, rows, in_features, (in_features + kGroup - 1) / kGroup, bytes != 0, out};
    const int64_t tiles = (rows + kTile - 1) / kTile;
    std::atomic<bool> all{true};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t t = 0; t < tiles; t++)
        if (all.load(std::memory_order_relaxed) && !step.tile_up(job, t, t + 1)) all = false;
    return all;
}
