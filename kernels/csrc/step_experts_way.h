// What a step reads of a mixture's active experts, in two passes: gate and up of all, then down of all.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "step_thread.h"

namespace coreskip {

// Each pass is one sequence of units, whatever expert they belong to, so that threads meet twice a layer and not once an
// expert. It is shared out by bytes: the shared expert's rows may be longer than the others'.
class ExpertsWay {
  public:
    enum Pass { kWiden = 0, kNarrow = 1 };

    struct Memory {
        uintptr_t at;
        int64_t bytes;
    };

    // parts: active experts, whose `matrices` are set; `units` and `bytes` are filled in here.
    void begin(ExpertPart* parts, int count, const StepThread& thread) {
        parts_ = parts, count_ = count;
        for (int pass = kWiden; pass <= kNarrow; pass++) {
            int64_t units_before = 0, bytes_before = 0, largest = 1;
            for (int i = 0; i < count; i++) {
                const int64_t n = units(parts[i].matrices[pass + 1]), bytes = bytes_of_unit(parts[i], pass);
                parts[i].units[pass] = units_before += n;
                parts[i].bytes[pass] = bytes_before += n * bytes;
                largest = std::max(largest, bytes);
            }
            piece_[pass] = piece_of(largest);
            mine_[pass] = {unit_at(pass, bytes_before * thread.part / thread.parts),
                           unit_at(pass, bytes_before * (thread.part + 1) / thread.parts)};
        }
        pass_ = kWiden, at_ = mine_[kWiden].begin, second_ = false;
    }

    Range mine(int pass) const { return mine_[pass]; }
    int64_t piece(int pass) const { return piece_[pass]; }

    int64_t bytes(int pass, Range range) const { return bytes_before(pass, range.end) - bytes_before(pass, range.begin); }

    // Calls work(part, begin, end) for each expert's own units among `range`.
    template <class Work>
    void each_part(int pass, Range range, Work work) const {
        for (int i = part_of(pass, range.begin); i < count_ && first_unit(i, pass) < range.end; i++) {
            const int64_t first = first_unit(i, pass);
            work(parts_[i], std::max(range.begin, first) - first, std::min(range.end, parts_[i].units[pass]) - first);
        }
    }

    // The next memory that this thread's share reads. False: there is no more.
    bool next(Memory& next) {
        while (at_ >= mine_[pass_].end) {
            if (pass_ == kNarrow) return false;
            pass_ = kNarrow, at_ = mine_[kNarrow].begin;
        }
        const int i = part_of(pass_, at_);
        const ExpertPart& part = parts_[i];
        // of gate and up by turns, piece by piece
        const int64_t piece = piece_[pass_], pieces = (at_ - mine_[pass_].begin) / piece + 1;
        const int64_t until = pass_ == kNarrow ? mine_[pass_].end : mine_[pass_].begin + pieces * piece;
        const int64_t end = std::min({until, mine_[pass_].end, part.units[pass_]});
        const StepLinear* gate = part.matrices;
        const bool gated = pass_ == kWiden && gate->weight;
        const StepLinear& l = pass_ == kNarrow ? part.matrices[2] : gated && !second_ ? *gate : part.matrices[1];
        const int64_t first = at_ - first_unit(i, pass_), bytes = unit_bytes(l);
        next = {reinterpret_cast<uintptr_t>(l.weight) + first * bytes, (end - at_) * bytes};
        if (gated) second_ = !second_;
        if (!second_) at_ = end;
        return true;
    }

  private:
    ExpertPart* parts_ = nullptr;
    int count_ = 0, pass_ = kNarrow;
    int64_t at_ = 0, piece_[2] = {1, 1};
    bool second_ = false;  // of gate and up
    Range mine_[2] = {};

    static int64_t bytes_of_unit(const ExpertPart& part, int pass) {
        if (pass == kNarrow) return unit_bytes(part.matrices[2]);
        return (part.matrices[0].weight ? unit_bytes(part.matrices[0]) : 0) + unit_bytes(part.matrices[1]);
    }

    int64_t first_unit(int i, int pass) const { return i ? parts_[i - 1].units[pass] : 0; }

    // The expert that a unit belongs to.
    int part_of(int pass, int64_t unit) const {
        int i = 0;
        while (i < count_ && parts_[i].units[pass] <= unit) i++;
        return i;
    }

    int64_t bytes_before(int pass, int64_t unit) const {
        const int i = part_of(pass, unit);
        const int64_t before = i ? parts_[i - 1].bytes[pass] : 0;
        return i == count_ ? before : before + (unit - first_unit(i, pass)) * bytes_of_unit(parts_[i], pass);
    }

    // The unit that begins at or before so many bytes.
    int64_t unit_at(int pass, int64_t bytes) const {
        int i = 0;
        while (i < count_ && parts_[i].bytes[pass] <= bytes) i++;
        if (i == count_) return count_ ? parts_[count_ - 1].units[pass] : 0;
        const int64_t before = i ? parts_[i - 1].bytes[pass] : 0;
        return first_unit(i, pass) + (bytes - before) / bytes_of_unit(parts_[i], pass);
    }
};

}  // namespace coreskip
