// Memory that a thread of a step will read later, fetched ahead of time.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "neuron_shares.h"
#include "step_experts_way.h"
#include "step_thread.h"

namespace coreskip {

// A thread knows what it will read: its own share of every matrix and of the cache, layer by layer. It fetches that
// kLead bytes ahead_, while it reads what comes before and while it waits. The hardware begins anew with each matrix,
// of a few 100 KB, and stands still between two: with this a step over the embedded model takes 0.75 times as long
// in 4 bits, 0.8 in bf16. Leads of 64 to 256 KB are within 2 % of each other, 384 is 9 % slower (1 MB of L2).
// Also measured: fetching between pieces of activation and quantisation gains nothing, the lead is there already.
class Prefetch {
  public:
    explicit Prefetch(const StepThread& thread) : thread(thread) {}

    typedef ExpertsWay::Memory Memory;

    ExpertsWay experts;    // of the layer that is under way
    int64_t passed = 0;    // bytes of the way that have been read
    int64_t finished = 0;  // stages up to the last one whose scattered memory has been read

    // What a kernel is to fetch: nothing where enough has been, as when it does more than its share.
    Ahead* to_fetch() {
        if (lead() >= kLead) return &nothing_;
        refill();
        return &ahead_;
    }

    // Some lines, unless enough have been fetched.
    bool fetch_some() {
        Ahead* some = to_fetch();
        if (some->at >= some->end) return false;
        thread.step.fetch(*some, 8 * kLine);
        return true;
    }

    // The active experts of a layer are known: they are what is read next.
    void enter(const StepLayer& l, ExpertPart* active, int count) {
        experts.begin(active, count, thread);
        ahead_ = {};
        layer_ = &l - m.layers, stage_ = 6, entry_ = 0;
        planned_ = passed;
        finished = thread.stage(l, StepThread::kStages);
    }

    void rewind() {
        ahead_ = {};
        layer_ = entry_ = stage_ = planned_ = passed = 0;
    }

    // The keys, or the values, that the i-th attention task of all threads reads.
    Memory entries_of(const StepLayer& l, int64_t i, bool values) const {
        const AttentionTask task = thread.task_at(l, i);
        const int64_t past = thread.past[task.row];
        const int64_t begin = std::max(task.begin, thread.first_seen(l, task.row, past));
        const int64_t end = std::min(task.begin + kChunk, past);
        if (begin >= end) return {0, 0};
        const StepCache& cache = thread.cache_of(l, task.row);
        if (values && l.latent.kv_low.weight) return {0, 0};  // few, and read between latents
        const int64_t at = thread.offset_of(l, cache, task.group) + begin * l.head_dim;
        const int64_t size = size_of(m.kv_dtype);
        const auto base = reinterpret_cast<uintptr_t>(values ? cache.values : cache.keys);
        return {base + at * size, (end - begin) * l.head_dim * size};
    }

    // What some attention tasks read. To be counted task by task: many sequences read more of one layer's entries than
    // are fetched ahead.
    int64_t entry_bytes(const StepLayer& l, Range tasks) const {
        int64_t bytes = 0;
        for (int64_t i = tasks.begin; i < tasks.end; i++)
            bytes += entries_of(l, i, false).bytes + entries_of(l, i, true).bytes;
        return bytes;
    }

    // The first bundles of this thread's share, or of the plane that it scans. The rest an MLP over bundles fetches for
    // itself; it may be chosen first.
    Memory bundles_of(const StepMlp& b) const {
        if (b.groups.rows) return groups_of(b);
        if (b.rule == kLearned || (b.rule != kListed && b.dtype != kSliced)) return {0, 0};
        Range range = thread.in_sums(b.list ? b.listed : b.neurons);
        if (range.begin >= range.end) return {0, 0};
        if (b.list) range = {b.list[range.begin], b.list[range.end - 1] + 1};  // with what lies between
        const int64_t projections = b.gated ? 2 : 1, numbers = (projections + 1) * b.stride;
        const int64_t row = b.dtype == kSliced ? projections * b.stride / 2 : numbers * size_of(b.dtype);
        const auto base = reinterpret_cast<uintptr_t>(b.weight);
        return {base + range.begin * row, std::min((range.end - range.begin) * row, kLead)};
    }

    // The same of neurons in 4-bit groups.
    Memory groups_of(const StepMlp& b) const {
        const NeuronGroups& n = b.groups;
        const int64_t count = b.list ? b.listed : n.neurons;
        const Range sums = thread.sums();
        Range range = {neuron_share(n, count, sums.begin, c.threads).begin,
                       neuron_share(n, count, sums.end - 1, c.threads).end};
        if (range.begin >= range.end) return {0, 0};
        if (b.list) range = {b.list[range.begin], b.list[range.end - 1] + 1};
        if (n.place) range = {n.place[range.begin], n.place[range.end - 1] + 1};
        const int64_t row = n.scan ? scanned_bytes(n) / kTile : n.row_bytes;
        const auto base = reinterpret_cast<uintptr_t>(n.scan ? n.scan : n.rows);
        return {base + range.begin * row, std::min((range.end - range.begin) * row, n.scan ? kScanLead : kLead)};
    }

    // What this thread reads first after a layer.
    uintptr_t first_after(const StepLayer& l) const {
        const StepLayer* next = &l + 1;
        return memory_of(next == m.layers + m.layer_count ? thread.head() : thread.inputs(*next), 0).at;
    }

  private:
    static constexpr int64_t kLead = 128 << 10;

    const StepThread& thread;
    const StepModel& m = thread.m;
    const StepCall& c = thread.c;
    Ahead ahead_{}, nothing_{};
    int64_t layer_ = 0, entry_ = 0;  // of the next part; twice the task, the keys' and the values'
    int stage_ = 0;
    int64_t planned_ = 0;            // bytes of the way up to the end of `ahead_`

    int64_t lead() const {
        const int64_t rest = ahead_.at < ahead_.end ? ahead_.end - ahead_.at : 0;
        return planned_ - rest - static_cast<int64_t>(ahead_.then_end - ahead_.then) - passed;
    }

    // This thread's share of matrix i.
    Memory memory_of(const Matrices& all, int i) const {
        if (i >= all.count) return {0, 0};
        const Range range = all.whole.among(thread.mine(all.whole.count()), i);
        if (range.begin >= range.end) return {0, 0};
        const int64_t bytes = unit_bytes(*all.matrix[i]);
        const auto base = reinterpret_cast<uintptr_t>(all.matrix[i]->weight);
        return {base + range.begin * bytes, (range.end - range.begin) * bytes};
    }

    // Whether what a stage reads is chosen when it comes.
    bool scattered(const StepLayer& l, int n) const {
        if (n < 4) return n != 3 && thread.inputs(l).columns.count();
        if (n == 4) return l.run_attention && l.o.columns;
        if (l.run_mlp && l.experts.matrices) return n >= 6;
        if (!l.run_mlp || l.mlp.weight || l.mlp.groups.rows) return l.run_mlp && n == 7;
        return n == 7 ? l.down.columns : thread.widening(l).columns.count();
    }

    // The next part of the way, maybe empty. False where nothing is known: at the end, and behind an MLP over bundles,
    // or columns, until they are done: it would not stay in the cache.
    bool next_memory(Memory& next) {
        if (layer_ > m.layer_count) return false;
        if (layer_ == m.layer_count) {
            next = memory_of(thread.head(), 0);
            layer_++;
            return true;
        }
        const StepLayer& l = m.layers[layer_];
        const bool dense = l.run_mlp && !l.mlp.weight && !l.mlp.groups.rows;
        if (scattered(l, stage_) && thread.stage(l, stage_) >= finished) return false;
        next = {0, 0};
        if (stage_ >= 5 && l.run_mlp && l.experts.matrices) return next_of_experts(l, next);
        if (stage_ < 3) {
            next = memory_of(thread.inputs(l), stage_);
            if (stage_ == 2 && l.run_attention && l.special) entry_ = -1;
        } else if (entry_ < 0) {
            next = memory_of(thread.inputs(l), 3);
            entry_ = 0;
            return true;
        } else if (stage_ == 3 && l.run_attention && next_entries(l, next)) {
            return true;
        } else if (stage_ == 4 && l.run_attention) {
            next = memory_of(thread.output(l), 0);
        } else if ((stage_ == 5 || stage_ == 6) && l.run_mlp && l.mlp.rule == kLearned) {
            next = memory_of(stage_ == 5 ? thread.reducing(l) : thread.expanding(l), 0);
        } else if (stage_ == 5 && l.run_mlp && !dense) {
            next = bundles_of(l.mlp);
        } else if ((stage_ == 5 || stage_ == 6) && dense) {
            next = memory_of(thread.widening(l), stage_ - 5);
        } else if (stage_ == 7) {
            if (dense) next = memory_of(thread.narrowing(l), 0);
            layer_++;
            stage_ = entry_ = 0;
            return true;
        }
        stage_++;
        return true;
    }

    // The keys and then the values of each task of this thread's share.
    bool next_entries(const StepLayer& l, Memory& next) {
        const Range mine = thread.mine(thread.tasks_of(l));
        if (entry_ >= 2 * (mine.end - mine.begin)) return false;
        next = entries_of(l, mine.begin + entry_ / 2, entry_ % 2);
        entry_++;
        return true;
    }

    // The router, and once experts are chosen, these.
    bool next_of_experts(const StepLayer& l, Memory& next) {
        if (stage_ == 5) {
            next = memory_of(thread.routing(l), 0);
            stage_++;
        } else if (!experts.next(next)) {
            layer_++;
            stage_ = entry_ = 0;
        }
        return true;
    }

    // Puts the next parts of the way into `ahead_`; what has been read meanwhile need not be fetched any more.
    void refill() {
        for (;;) {
            if (ahead_.at < ahead_.end && lead() < 0) ahead_.at += std::min<int64_t>(-lead(), ahead_.end - ahead_.at);
            if (ahead_.at >= ahead_.end) ahead_ = {ahead_.then, ahead_.then_end, 0, 0};
            if (ahead_.then < ahead_.then_end) return;
            Memory next;
            if (!next_memory(next)) return;
            planned_ += next.bytes;
            ahead_.then = next.at, ahead_.then_end = next.at + next.bytes;
        }
    }
};

}  // namespace coreskip
