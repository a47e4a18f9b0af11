// Products with the matrices of a step, shared out among its threads.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "step_prefetch.h"
#include "step_thread.h"
#include "stream.h"

namespace coreskip {

class Projections {
  public:
    Projections(StepThread& thread, Prefetch& ahead) : thread(thread), ahead(ahead) {}

    void read_from(const float* x, int64_t width) { read_from(x, width, thread.tokens); }

    // x: [rows][width]
    void read_from(const float* x, int64_t width, int rows) {
        input_ = x;
        input_width_ = width;
        input_rows_ = rows;
        ready_ = -1;
        chosen_for_ = nullptr;
    }

    // Puts the input_ into the form that a weight's format wants: padded, and arranged or quantised. by_rows: groups lie row
    // by row, not as tiles want them; only for an input that nothing but neurons in groups reads.
    void prepare(int dtype, int64_t stride, bool whole = false, bool by_rows = false) {
        // All tiles meet the same x; those with two scales a group want sums of its halves, too.
        if (grouped(dtype) && dtype != kInt6Super) dtype = kInt4;
        const bool ready = ready_ == dtype || (dtype == kInt4 && ready_ == kInt6Super);
        if (ready && ready_stride_ == stride && ready_whole_ == whole) return;
        ready_ = dtype;
        ready_stride_ = stride;
        ready_whole_ = whole;
        for (int t = 0; t < input_rows_; t++) {
            const float* from = input_ + t * input_width_;
            float* row = own.rows + t * stride;
            if (whole || !grouped(dtype) || stride != input_width_) {
                memcpy(row, from, input_width_ * sizeof(float));
                memset(row + input_width_, 0, (stride - input_width_) * sizeof(float));
                from = row;
            }
            if (whole) continue;
            if (grouped(dtype)) {
                const int64_t groups = stride / kGroup, at = by_rows ? t * groups : first_place(t, input_rows_, groups);
                thread.step.quantize_groups(from, stride, by_rows ? 1 : places_apart(input_rows_), own.q + at * kGroup,
                                            own.group_scale + at, own.group_sum + at,
                                            dtype == kInt6Super ? own.group_half + 2 * at : nullptr);
            } else if (dtype >= kInt8) {
                thread.isa.quantize(row, stride, own.q + t * stride, own.scale + t, own.sum + t);
            } else {
                thread.isa.arrange(row, stride, dtype);
            }
        }
    }

    Rows rows_of(int64_t stride) const { return {input_rows_, stride, own.rows, own.q, own.scale, own.sum}; }

    // Calls work(begin, end) for pieces of what all threads have as their shares until none is left, first those of this
    // thread's own, `mine`: that is what it fetches ahead. An output does not depend on who computes it. bytes(range): of
    // memory that it reads.
    template <class Bytes, class Work>
    void share_work(Range mine, int64_t piece, Bytes bytes, Work work) {
        const int64_t end = ahead.passed + bytes(mine);
        w.stretches[thread.part].set(mine);
        Range r{};
        while (w.stretches[thread.part].take_front(piece, r)) {
            work(r.begin, r.end);
            ahead.passed += bytes(r);
        }
        ahead.passed = end;
        for (int k = 1; k < thread.parts; k++)
            while (w.stretches[(thread.part + k) % thread.parts].take_back(piece, r)) work(r.begin, r.end);
    }

    // The same of so many units, each of so many bytes.
    template <class Work>
    void share_work(int64_t all, int64_t piece, int64_t bytes, Work work) {
        share_work(thread.mine(all), piece, [&](Range range) { return (range.end - range.begin) * bytes; }, work);
    }

    void project_all(const Matrices& all) {
        project_all(all, [](int64_t, int64_t) {});
    }

    // look(begin, end): what is done to outputs of these units, of those shared out together, where they were computed.
    template <class Look>
    void project_all(const Matrices& all, Look look) {
        share_work(all.whole.count(), piece_of(all.bytes), all.bytes, [&](int64_t begin, int64_t end) {
            for (int i = 0; i < all.count; i++) {
                const Range range = all.whole.among({begin, end}, i);
                if (range.begin < range.end) project(*all.matrix[i], all.y[i], range.begin, range.end);
            }
            look(begin, end);
        });
        for (int i = 0; i < all.count; i++) {
            const Range strip = all.columns.among(thread.mine(all.columns.count()), i);
            if (strip.begin < strip.end) project_columns(*all.matrix[i], all.y[i], strip.begin, strip.end);
        }
        if (all.columns.count()) ahead.finished = all.next;
        for (int i = 0; i < all.count; i++)
            if (all.matrix[i] && all.matrix[i]->pieces) project_streamed(*all.matrix[i], all.y[i]);
    }

    // One matrix's units `begin` to `end`.
    void project(const StepLinear& l, float* y, int64_t begin, int64_t end) {
        prepare(l.dtype, l.stride, l.whole);
        if (grouped(l.dtype)) {
            const float* whole = l.whole ? own.rows : nullptr;
            const TileJob job = {l.weight, l.dtype, l.bias, l.stride / kGroup, l.out, input_rows_,
                                 whole, own.q, own.group_scale, own.group_sum, own.group_half, y, ahead.to_fetch(),
                                 l.counts, l.tile};
            thread.step.tiles(job, begin, end);
        } else {
            const LinearJob job = {l.weight, l.scale, l.bias, rows_of(l.stride), l.out, y, ahead.to_fetch()};
            thread.isa.linear[l.dtype](job, begin * 4, std::min(end * 4, l.out));
        }
    }

    // What an MLP comes to, and a parallel attention's output, which has waited for it.
    void finish_layer(const StepLayer& l, const float* y) {
        add_to_residual(l, l.mlp_out, y);
        if (l.parallel && l.run_attention) add_to_residual(l, l.attention_out, own.pending);
        norm_residual(l.mlp_after);
    }

    void scale_residual(const StepLayer& l) {
        thread.step.scale(own.x, l.scale, thread.tokens * m.hidden);
    }

    void add_to_residual(const StepLayer& layer, const StepNorm& after, const float* y) {
        for (int t = 0; t < thread.tokens; t++) {
            const float* from = y + t * m.hidden;
            if (after.kind != kNoNorm) {
                thread.step.norm(after, from, own.h);
                from = own.h;
            }
            thread.step.add_scaled(own.x + t * m.hidden, from, layer.residual_scale, m.hidden);
        }
    }

    void norm_residual(const StepNorm& after) {
        if (after.kind == kNoNorm) return;
        for (int t = 0; t < thread.tokens; t++) thread.step.norm(after, own.x + t * m.hidden, own.x + t * m.hidden);
    }

    // Waits until all threads have come this far.
    void meet() {
        thread.barrier.meet(*thread.member, [&] { return ahead.fetch_some(); });
    }

    const float* normed(const StepNorm& norm, const float* x) {
        if (norm.kind == kNoNorm) return x;
        for (int t = 0; t < thread.tokens; t++) thread.step.norm(norm, x + t * m.hidden, own.h + t * m.hidden);
        return own.h;
    }

  private:
    StepThread& thread;
    Prefetch& ahead;
    const StepModel& m = thread.m;
    const Shared& w = thread.w;
    const Own& own = thread.own;

    // The input that `project` reads, and for what format it has been prepared.
    const float* input_ = nullptr;
    int64_t input_width_ = 0, ready_stride_ = 0;
    int input_rows_ = 0, ready_ = -1;
    bool ready_whole_ = false;
    const StepLinear* chosen_for_ = nullptr;  // whose inputs `list` and `selected` hold
    int64_t chosen_count_ = 0;

    // A matrix that comes piece by piece: who is free takes some of the piece that is there.
    void project_streamed(const StepLinear& l, float* y) {
        const int64_t most = piece_of(unit_bytes(l));
        StepLinear piece = l;
        for (int64_t i = l.piece; i < l.piece + l.pieces; i++) {
            const char* memory = m.stream->wait(i, thread.lap);
            for (Range units; m.stream->take(i, thread.lap, most, units); m.stream->finish(i, units.end - units.begin)) {
                piece.weight = memory - m.stream->first(i) * unit_bytes(l);  // as if the whole matrix were there
                project(piece, y, units.begin, units.end);
            }
        }
    }

    // The inputs of a column-sparse linear that count for any token. Every thread makes the same choice.
    int64_t choose_inputs(const StepLinear& l) {
        if (chosen_for_ == &l) return chosen_count_;
        chosen_for_ = &l;
        chosen_count_ = 0;
        for (int64_t i = 0; i < l.in; i++) {
            const float norm = l.norm ? l.norm[i] : 1.f;
            uint8_t any = 0;
            for (int t = 0; t < thread.tokens; t++) {
                const uint8_t wanted = !(fabsf(input_[t * l.in + i]) * norm < l.least);
                own.selected[i * thread.tokens + t] = wanted;
                any |= wanted;
            }
            own.list[chosen_count_] = i;
            chosen_count_ += any;
        }
        return chosen_count_;
    }

    // The same for columns: a strip of all that count. Shared out by outputs, not by columns, nothing remains to be
    // added up between threads, and the sums are the same to the bit whatever their number, and that of tokens.
    void project_columns(const StepLinear& l, float* y, int64_t begin, int64_t end) {
        const int64_t count = choose_inputs(l), first = begin * unit(l), width = (end - begin) * unit(l);
        const int64_t n = std::min(width, l.out - first);
        memset(own.sums, 0, thread.tokens * width * sizeof(float));
        const ColumnsJob job = {static_cast<const char*>(l.weight) + first * size_of(l.dtype), l.stride, width, l.in,
                                input_, thread.tokens, own.list, own.selected};
        thread.isa.columns[l.dtype](job, 0, count, own.sums);
        for (int t = 0; t < thread.tokens; t++) {
            float* sum = own.sums + t * width;
            thread.isa.restore(sum, width, l.dtype);
            if (l.bias) thread.isa.add(sum, l.bias + first, n);
            memcpy(y + t * l.out + first, sum, n * sizeof(float));
        }
        if (begin == 0) thread.unread += l.neurons * std::count(own.selected, own.selected + l.in * thread.tokens, 0);
    }
};

}  // namespace coreskip
