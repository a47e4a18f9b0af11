// A prompt's way through one layer: many tokens of one sequence, all of whose matrices are tiles.
//
// A step's threads each compute what is small for all tokens (step.cpp); here there are too many tokens for that. Where there
// are enough for every thread, each takes blocks of them through the layer by itself, and all meet only where keys and values
// have been written: what is computed of a block stays in its core's caches. Of fewer tokens everything is shared out: by
// tokens, by tiles, by KV heads. Every number is computed as a step computes it, so that a token's bits are the same whether
// it came in a prompt or was decoded, and whoever computed it.

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>

#include "dispatch.h"
#include "division.h"
#include "embedding.h"
#include "team.h"
#include "workspace.h"

namespace coreskip {
namespace {

// Tokens that go through a layer together. Each tile is taken apart anew for every few of them, from the first cache
// level, where 128 rows of x in 8 bits stay in the second.
constexpr int64_t kTogether = 128;
constexpr int64_t kTokensAPiece = 4;  // of what is shared out by tokens
constexpr int64_t kQueriesAPiece = 96;
// Of a block at most; of those that go through all layers before the next ones, where there are blocks; and of each thread at
// least, then.
constexpr int64_t kBlock = 48, kWindow = 1024, kFewest = 16;

// What the queries of a call need; and, of each thread that takes part, a block and one piece of attention.
thread_local Workspace query_memory, block_memory, piece_memory;

// x as tiles want it: padded, and rounded to 8 bits in groups unless they meet it whole.
struct Prepared {
    const float* from = nullptr;
    int64_t stride = 0;
    bool whole = false, halves = false;

    bool serves(const float* x, const StepLinear& l) const {
        return from == x && stride == l.stride && whole == (l.whole != 0) && (halves || l.dtype != kInt6Super);
    }
};

// Some tokens' way through a layer, by all threads together or by the calling one alone.
class LayerPass {
  public:
    // most: tokens at once. q: room for their queries, from `begin` to `finish`.
    LayerPass(const StepModel& model, const StepLayer& layer, const PrefillCall& call, Team* team, int64_t most, float* q)
        : m(model), l(layer), c(call), isa(*active.load()), step(*active_step.load()), team_(team), most_(most), q_(q) {}

    bool reserve(Workspace& memory) {
        size_t bytes = 0;
        lay_out([&](auto type, int64_t n) {
            bytes += Workspace::room<decltype(type)>(n);
            return static_cast<decltype(type)*>(nullptr);
        });
        if (!memory.reserve(bytes)) return false;
        lay_out([&](auto type, int64_t n) { return memory.take<decltype(type)>(n); });
        return true;
    }

    // Up to the keys and values of some tokens. All those before them are in the cache before `finish` sees them.
    void begin(int64_t first, int64_t tokens) {
        look_at(first, tokens);
        const float* x = place_of_norm(l.attention_in);
        const auto norm = [&](int64_t t) { norm_token(l.attention_in, t); };
        // what is computed of a token stands before the product that reads it: it is rounded while it is in the first cache
        // level
        if (l.fused) project(x, m.hidden, {&l.q}, {fused_}, norm);
        else project(x, m.hidden, {&l.q, &l.k, &l.v}, {q_, k_, v_}, norm);
        each_token([&](int64_t t) {
            if (l.fused) take_apart(t);
            place(t);
        });
    }

    void finish(int64_t first, int64_t tokens) {
        look_at(first, tokens);
        attend();
        project(attended_, l.heads * l.head_dim, {&l.o}, {out_}, [](int64_t) {});
        mlp();
    }

    bool failed() const { return failed_.load(); }

  private:
    const StepModel& m;
    const StepLayer& l;
    const PrefillCall& c;
    const Isa& isa;
    const StepIsa& step;
    const StepCache& cache_ = c.cache[l.cache];
    Team* const team_;  // null: the calling thread is alone
    const int64_t most_;
    float* const q_;
    int64_t first_ = 0, tokens_ = 0;  // of the call's tokens, those that are under way
    float* x_ = nullptr;              // their residual stream, [tokens][hidden]
    Prepared prepared_;
    std::atomic<bool> failed_{false};

    float *normed_, *fused_, *k_, *v_, *attended_, *out_, *narrowed_, *gate_, *up_, *rows_, *group_scale_, *group_sum_;
    int8_t* rounded_;
    int32_t* group_half_;

    template <class Take>
    void lay_out(Take take) {
        const int64_t t = most_, neurons = l.up.out;
        int64_t stride = 0;
        for (const StepLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) stride = std::max(stride, w->stride);
        normed_ = take(float(), t * m.hidden);
        fused_ = take(float(), l.fused ? t * l.q.out : 0);
        k_ = take(float(), t * l.kv_heads * l.head_dim);
        v_ = take(float(), t * l.kv_heads * l.head_dim);
        attended_ = take(float(), t * l.heads * l.head_dim);
        out_ = take(float(), t * m.hidden);
        narrowed_ = take(float(), t * m.hidden);
        gate_ = take(float(), l.gate.weight ? t * neurons : 0);
        up_ = take(float(), t * neurons);
        rows_ = take(float(), t * stride);
        const int64_t places = places_of(t, stride / kGroup);
        rounded_ = take(int8_t(), places * kGroup);
        group_scale_ = take(float(), places);
        group_sum_ = take(float(), places);
        group_half_ = take(int32_t(), 2 * places);
    }

    void look_at(int64_t first, int64_t tokens) {
        first_ = first, tokens_ = tokens;
        x_ = c.x + first * m.hidden;
        prepared_ = {};
    }

    // Calls work(i) for each piece.
    template <class Work>
    void each_piece(int64_t pieces, Work work) {
        if (team_) return team_->each(pieces, c.threads, work);
        for (int64_t i = 0; i < pieces; i++) work(i);
    }

    // Calls work(t) for each token that is under way.
    template <class Work>
    void each_token(Work work) {
        each_piece((tokens_ + kTokensAPiece - 1) / kTokensAPiece, [&](int64_t i) {
            const int64_t end = std::min(tokens_, (i + 1) * kTokensAPiece);
            for (int64_t t = i * kTokensAPiece; t < end; t++) work(t);
        });
    }

    void mlp() {
        const int64_t n = l.up.out;
        const float* x = place_of_norm(l.mlp_in);
        const auto finish_attention = [&](int64_t t) {
            if (!l.parallel) {  // else the MLP reads x as it is
                add_to_residual(t, l.attention_out, out_);
                norm_residual(t, l.attention_after);
            }
            norm_token(l.mlp_in, t);
        };
        if (l.gate.weight) project(x, m.hidden, {&l.gate, &l.up}, {gate_, up_}, finish_attention);
        else project(x, m.hidden, {&l.up}, {up_}, finish_attention);
        float* a = l.gate.weight ? gate_ : up_;
        project(a, n, {&l.down}, {narrowed_}, [&](int64_t t) {
            step.act(a + t * n, l.gate.weight ? up_ + t * n : nullptr, n, l.act, l.curve);
            if (c.activations) memcpy(c.activations + (first_ + t) * n, a + t * n, n * sizeof(float));
        });
        each_token([&](int64_t t) {
            add_to_residual(t, l.mlp_out, narrowed_);
            if (l.parallel) add_to_residual(t, l.attention_out, out_);
            norm_residual(t, l.mlp_after);
            step.scale(x_ + t * m.hidden, l.scale, m.hidden);
        });
    }

    const float* place_of_norm(const StepNorm& norm) const { return norm.kind == kNoNorm ? x_ : normed_; }

    void norm_token(const StepNorm& norm, int64_t t) {
        if (norm.kind != kNoNorm) step.norm(norm, x_ + t * m.hidden, normed_ + t * m.hidden);
    }

    void norm_residual(int64_t t, const StepNorm& after) {
        if (after.kind != kNoNorm) step.norm(after, x_ + t * m.hidden, x_ + t * m.hidden);
    }

    void add_to_residual(int64_t t, const StepNorm& after, const float* y) {
        const float* from = y + t * m.hidden;
        if (after.kind != kNoNorm) {
            float* to = normed_ + t * m.hidden;  // its last reader is done with it
            step.norm(after, from, to);
            from = to;
        }
        step.add_scaled(x_ + t * m.hidden, from, l.residual_scale, m.hidden);
    }

    // ---- products ----

    // y of each matrix, of x [tokens][width]; before(t): what makes a token's row of x.
    template <class Before>
    void project(const float* x, int64_t width, std::initializer_list<const StepLinear*> matrices,
                 std::initializer_list<float*> outputs, Before before) {
        prepare(x, width, **matrices.begin(), before);
        for (size_t i = 0; i < matrices.size();) {
            const StepLinear* const* matrix = matrices.begin() + i;
            if (!prepared_.serves(x, **matrix)) prepare(x, width, **matrix, [](int64_t) {});
            int count = 1;  // of those that read what was prepared, which are shared out together
            while (i + count < matrices.size() && prepared_.serves(x, *matrix[count])) count++;
            multiply(matrix, outputs.begin() + i, count);
            i += count;
        }
    }

    void multiply(const StepLinear* const* matrix, float* const* y, int count) {
        int64_t end[3] = {};
        for (int i = 0; i < count; i++) end[i] = (i ? end[i - 1] : 0) + (matrix[i]->out + kTile - 1) / kTile;
        const int64_t tiles = end[count - 1], pieces = team_ ? std::min<int64_t>(tiles, 8 * c.threads) : 1;
        each_piece(pieces, [&](int64_t piece) {
            const Range here = share(tiles, piece, pieces);
            for (int i = 0; i < count; i++) {
                const StepLinear& w = *matrix[i];
                const int64_t first = i ? end[i - 1] : 0;
                Ahead none{};
                const TileJob job = {w.weight, w.dtype, w.bias, w.stride / kGroup, w.out, static_cast<int>(tokens_),
                                     w.whole ? rows_ : nullptr, rounded_, group_scale_, group_sum_, group_half_, y[i], &none};
                step.tiles(job, std::max(here.begin, first) - first, std::min(here.end, end[i]) - first);
            }
        });
    }

    template <class Before>
    void prepare(const float* x, int64_t width, const StepLinear& w, Before before) {
        prepared_ = {x, w.stride, w.whole != 0, w.dtype == kInt6Super};
        const int64_t stride = w.stride, groups = stride / kGroup;
        each_token([&](int64_t t) {
            before(t);
            const float* from = x + t * width;
            if (w.whole || width != stride) {
                float* row = rows_ + t * stride;
                memcpy(row, from, width * sizeof(float));
                memset(row + width, 0, (stride - width) * sizeof(float));
                from = row;
            }
            if (w.whole) return;
            const int64_t at = first_place(t, tokens_, groups);
            step.quantize_groups(from, stride, places_apart(tokens_), rounded_ + at * kGroup, group_scale_ + at,
                                 group_sum_ + at, prepared_.halves ? group_half_ + 2 * at : nullptr);
        });
    }

    // ---- attention ----

    // A token's queries, keys and values, each by themselves.
    void take_apart(int64_t t) {
        const auto take = [&](const StepHeads& heads, int64_t count, float* to) {
            for (int64_t i = 0; i < count; i++) {
                const int64_t at = heads.offset + i / heads.run * heads.step + i % heads.run * l.head_dim;
                memcpy(to + (t * count + i) * l.head_dim, fused_ + t * heads.width + at, l.head_dim * sizeof(float));
            }
        };
        take(l.q_heads, l.heads, q_);
        take(l.k_heads, l.kv_heads, k_);
        take(l.v_heads, l.kv_heads, v_);
    }

    // A token's queries, normed, rotated and scaled where they lie, and its keys and values into the cache.
    void place(int64_t t) {
        float* queries = q_ + t * l.heads * l.head_dim;
        turn(l.q_norm, queries, t, l.heads);
        for (int64_t i = 0; i < l.heads * l.head_dim; i++) queries[i] *= l.attention_scale;
        float* keys = k_ + t * l.kv_heads * l.head_dim;
        turn(l.k_norm, keys, t, l.kv_heads);
        const float* values = v_ + t * l.kv_heads * l.head_dim;
        for (int64_t group = 0; group < l.kv_heads; group++) {
            const int64_t to = offset_of(group) + (c.past + first_ + t) * l.head_dim;
            put(keys + group * l.head_dim, cache_.keys, to);
            put(values + group * l.head_dim, cache_.values, to);
        }
    }

    void turn(const StepNorm& norm, float* heads, int64_t t, int64_t count) {
        const int64_t normed = norm.size == l.head_dim ? count : 1;  // or all heads together (OLMo 2)
        const auto norm_all = [&](bool turned) {
            for (int64_t i = 0; norm.kind != kNoNorm && turned == (l.turned != 0) && i < normed; i++)
                step.norm(norm, heads + i * l.head_dim, heads + i * l.head_dim);
        };
        norm_all(false);
        const int64_t at = l.cos ? c.positions[first_ + t] * l.rope_dim : 0;
        for (int64_t i = 0; l.cos && i < count; i++)
            step.rotate(heads + i * l.head_dim, l.cos + at, l.sin + at, l.rope_dim, l.paired != 0);
        norm_all(true);
    }

    int64_t offset_of(int64_t group) const { return group * cache_.head_stride - cache_.first * l.head_dim; }

    void put(const float* from, void* cache, int64_t to) const {
        isa.from_float(from, static_cast<char*>(cache) + to * size_of(m.kv_dtype), m.kv_dtype, l.head_dim);
    }

    // By KV heads and some tokens, the last ones first: these look back furthest.
    void attend() {
        const int64_t at_once = std::max<int64_t>(1, kQueriesAPiece / (l.heads / l.kv_heads));
        const int blocks = static_cast<int>((tokens_ + at_once - 1) / at_once);
        each_piece(blocks * l.kv_heads, [&](int64_t i) {
            const Range some = share(tokens_, blocks - 1 - static_cast<int>(i / l.kv_heads), blocks);
            attend(i % l.kv_heads, some.begin, some.end);
        });
    }

    int64_t first_seen(int64_t position) const {
        return std::max(c.start, l.window ? position + 1 - l.window : int64_t(0));
    }

    // One KV head for tokens `begin` to `end`: in chunks at fixed positions, as a step adds them up.
    void attend(int64_t group, int64_t begin, int64_t end) {
        const int64_t each = l.heads / l.kv_heads, queries = (end - begin) * each, d = l.head_dim;
        const int64_t position = c.past + first_;  // of the first token that is under way
        const int64_t from = first_seen(position + begin) / kChunk, to = (position + end - 1) / kChunk + 1;
        const int64_t chunks = to - from;
        Workspace& memory = piece_memory;
        const int64_t apart = turned_apart(queries);
        const size_t bytes = Workspace::room<float>(queries * d) + Workspace::room<float>(apart * d) + 2 * Workspace::room<int64_t>(apart) +
                             2 * Workspace::room<float>(chunks * apart) + Workspace::room<float>(chunks * apart * d);
        if (!memory.reserve(bytes)) return failed_.store(true);
        float* q = memory.take<float>(queries * d);
        float* turned = memory.take<float>(apart * d);
        int64_t* seen_from = memory.take<int64_t>(apart);
        int64_t* seen_to = memory.take<int64_t>(apart);
        float* most = memory.take<float>(chunks * apart);
        float* sum = memory.take<float>(chunks * apart);
        float* value = memory.take<float>(chunks * apart * d);
        for (int64_t t = begin; t < end; t++) {
            const int64_t at = (t - begin) * each;
            memcpy(q + at * d, q_ + (t * l.heads + group * each) * d, each * d * sizeof(float));
            std::fill(seen_from + at, seen_from + at + each, first_seen(position + t));
            std::fill(seen_to + at, seen_to + at + each, position + t + 1);
        }
        std::fill(seen_from + queries, seen_from + apart, seen_from[queries - 1]);
        std::fill(seen_to + queries, seen_to + apart, seen_to[queries - 1]);
        for (int64_t i = 0; i < d; i++)
            for (int64_t n = 0; n < apart; n++) turned[i * apart + n] = n < queries ? q[n * d + i] : 0.f;
        const int64_t offset = offset_of(group) * size_of(m.kv_dtype);
        for (int64_t i = 0; i < chunks; i++) {
            Ahead none{};
            const int64_t chunk = (from + i) * kChunk, at = i * apart;
            step.attend({q, static_cast<const char*>(cache_.keys) + offset,
                         static_cast<const char*>(cache_.values) + offset, m.kv_dtype, static_cast<int>(queries), d,
                         chunk, std::min(chunk + kChunk, position + end), seen_from, seen_to, l.softcap,
                         l.slopes ? l.slopes + group * each : nullptr, static_cast<int>(each), most + at, sum + at,
                         value + at * d, &none, turned});
        }
        for (int64_t i = 0; i < queries; i++) {
            float* out = attended_ + ((begin + i / each) * l.heads + group * each + i % each) * d;
            const float* sink = l.sinks ? l.sinks + group * each + i % each : nullptr;
            step.merge(chunks, apart, most + i, sum + i, value + i * d, d, out, sink);
        }
    }
};

// A call's tokens through layers `begin` to `end`.
class Prompt {
  public:
    Prompt(const StepModel& model, const PrefillCall& call, int64_t begin, int64_t end)
        : m(model), c(call), begin_(m.layers + begin), end_(m.layers + end),
          by_blocks_(c.threads > 1 && c.length >= kFewest * c.threads),
          window_(std::min(c.length, by_blocks_ ? kWindow : kTogether)) {}

    // Returns a Status.
    int run() {
        for (const StepLayer* l = begin_; l < end_; l++) width_ = std::max(width_, l->heads * l->head_dim);
        if (!query_memory.reserve(Workspace::room<float>(window_ * width_))) return kNoMemory;
        queries_ = query_memory.take<float>(window_ * width_);
        for (first_ = 0; first_ < c.length && !failed_; first_ += window_) {
            go_on(nullptr, begin_);
            for (const StepLayer* l = begin_; l < end_; l++) go_on(l, l + 1 < end_ ? l + 1 : nullptr);
        }
        return failed_ ? kNoMemory : kOk;
    }

  private:
    const StepModel& m;
    const PrefillCall& c;
    const StepLayer *const begin_, *const end_;
    const bool by_blocks_;
    const int64_t window_;  // tokens that go through all layers before the next ones
    Lease team_;
    int64_t first_ = 0, width_ = 0;
    float* queries_ = nullptr;  // [window][width], of layers that are less wide at the front of each block's rows
    std::atomic<bool> failed_{false};

    // Finishes a layer and begins the next one, for all tokens of the window; either may be null.
    void go_on(const StepLayer* last, const StepLayer* next) {
        const int64_t tokens = std::min(window_, c.length - first_), threads = c.threads;
        const auto go = [&](Team* team, Range some) {
            const int64_t begin = first_ + some.begin, count = some.end - some.begin;
            float* q = queries_ + some.begin * width_;
            if (last) pass(*last, team, count, q, [&](LayerPass& layer) { layer.finish(begin, count); });
            if (next) pass(*next, team, count, q, [&](LayerPass& layer) { layer.begin(begin, count); });
        };
        if (!by_blocks_) return go(threads > 1 ? team_.get() : nullptr, {0, tokens});
        const int blocks = static_cast<int>(threads * ((tokens + threads * kBlock - 1) / (threads * kBlock)));
        // the last ones first: these look back furthest
        team_->each(blocks, c.threads, [&](int64_t i) { go(nullptr, share(tokens, blocks - 1 - static_cast<int>(i), blocks)); });
    }

    template <class Work>
    void pass(const StepLayer& layer, Team* team, int64_t most, float* q, Work work) {
        LayerPass pass(m, layer, c, team, most, q);
        if (!pass.reserve(block_memory)) return failed_.store(true);
        work(pass);
        if (pass.failed()) failed_.store(true);
    }
};

// The last norm and the LM head, for some tokens at a time.
class HeadPass {
  public:
    HeadPass(const StepModel& model, int threads)
        : m(model), isa(*(model.kv_dtype == kBFloat16 ? active_bf16 : active).load()), step(*active_step.load()),
          threads_(threads) {}

    // x: [tokens][hidden], at most kMaxRows of them; to: their logits, [tokens][vocabulary]. False: no memory.
    bool run(const float* x, int tokens, void* to) {
        const StepLinear& head = m.head;
        const int64_t groups = head.stride / kGroup;
        if (!workspace.reserve(Workspace::room<float>(tokens * m.hidden) + rows_room(tokens, head.stride) +
                               4 * Workspace::room<float>(tokens * groups) + Workspace::room<float>(tokens * head.out)))
            return false;
        float* normed = workspace.take<float>(tokens * m.hidden);
        for (int t = 0; t < tokens; t++) {
            if (m.norm.kind == kNoNorm) memcpy(normed + t * m.hidden, x + t * m.hidden, m.hidden * sizeof(float));
            else step.norm(m.norm, x + t * m.hidden, normed + t * m.hidden);
        }
        const bool tiles = grouped(head.dtype);
        // tiles want rows as they are, which is how float32 has them
        const Rows rows = load_rows(isa, normed, kFloat32, tiles ? kFloat32 : head.dtype, tokens, m.hidden, head.stride,
                                    workspace);
        int8_t* q = const_cast<int8_t*>(rows.q);
        float* scale = workspace.take<float>(tokens * groups);
        float* sum = workspace.take<float>(tokens * groups);
        int32_t* half = workspace.take<int32_t>(2 * tokens * groups);
        for (int t = 0; tiles && !head.whole && t < tokens; t++) {
            const int64_t at = first_place(t, tokens, groups);
            step.quantize_groups(rows.x + t * head.stride, head.stride, places_apart(tokens), q + at * kGroup, scale + at,
                                 sum + at, half + 2 * at);
        }
        float* y = m.logit_dtype == kFloat32 ? static_cast<float*>(to) : workspace.take<float>(tokens * head.out);
        const int64_t units = (head.out + kTile - 1) / kTile, pieces = std::min<int64_t>(units, 8 * threads_);
        Lease()->each(pieces, threads_, [&](int64_t piece) {
            Ahead none{};
            const Range here = share(units, piece, pieces);
            if (tiles) {
                step.tiles({head.weight, head.dtype, head.bias, groups, head.out, tokens, head.whole ? rows.x : nullptr, q,
                            scale, sum, half, y, &none},
                           here.begin, here.end);
            } else {
                isa.linear[head.dtype]({head.weight, head.scale, head.bias, rows, head.out, y, nullptr},
                                       here.begin * kTile, std::min(here.end * kTile, head.out));
            }
        });
        const int64_t n = tokens * head.out;
        if (m.logit_scale != 1.f || m.logit_softcap > 0) step.softcap(y, m.logit_scale, m.logit_softcap, n);
        if (y != to) isa.from_float(y, to, m.logit_dtype, n);
        return true;
    }

  private:
    const StepModel& m;
    const Isa& isa;
    const StepIsa& step;
    const int threads_;
};

}  // namespace
}  // namespace coreskip

using namespace coreskip;

// The embeddings of tokens at these places, as the first layer reads them; x: [tokens][hidden]. Returns a Status. Not by torch, whose threads would spin for
// milliseconds after it, on the cores that the layers' threads need.
CORESKIP_API int coreskip_embed(const StepModel* model, const int64_t* ids, const int64_t* places, int64_t tokens, float* x,
                                int threads) {
    const StepModel& m = *model;
    const int64_t wanted = m.places ? tokens * m.hidden : 0;
    if (!workspace.reserve(Workspace::room<float>(wanted))) return kNoMemory;
    float* room = workspace.take<float>(wanted);
    Lease()->each(tokens, threads, [&](int64_t t) {
        look_up(m, *active.load(), *active_step.load(), ids[t], places[t], m.places ? room + t * m.hidden : nullptr,
                x + t * m.hidden);
    });
    return kOk;
}

// Takes the tokens of a call through layers `begin` to `end`. Returns a Status.
CORESKIP_API int coreskip_prefill(const StepModel* model, int64_t begin, int64_t end, const PrefillCall* call) {
    return Prompt(*model, *call, begin, end).run();
}

// Logits, [tokens][vocabulary] of the model's dtype, of tokens that went through all layers; x: [tokens][hidden]. Returns a
// Status.
CORESKIP_API int coreskip_head(const StepModel* model, const float* x, int64_t tokens, void* logits, int threads) {
    HeadPass pass(*model, threads);
    for (int64_t t = 0; t < tokens; t += kMaxRows) {
        void* to = static_cast<char*>(logits) + t * model->head.out * size_of(model->logit_dtype);
        if (!pass.run(x + t * model->hidden, static_cast<int>(std::min<int64_t>(kMaxRows, tokens - t)), to))
            return kNoMemory;
    }
    return kOk;
}
