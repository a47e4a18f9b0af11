// A decode step in one call: a team of threads goes through all layers, meeting at barriers. What the layers are is
// data (arguments.h); the arithmetic is the kernels' own (vector/).
//
// Every thread has its own copy of the residual stream and computes what is small (norms, the quantisation of x)
// itself: on 576 x 1536 that costs 1 us where one more meeting of the threads costs as much. What is large is shared
// out: rows of weights, positions of the KV cache, neurons.

#include <algorithm>
#include <new>
#include <vector>

#include "dispatch.h"
#include "logits.h"
#include "slots.h"
#include "step_walker.h"
#include "stream.h"
#include "team.h"

namespace coreskip {
namespace {

// Steps of one model, one after the other, in the calling thread's workspace.
class Steps {
  public:
    // ahead: positions that will be written to the cache after those of the first step.
    Steps(const StepModel& model, const StepCall& call, int64_t ahead)
        : model_(model), call_(call), sizes_(model, call, ahead) {}

    bool reserve() {
        size_t bytes = 0;
        const auto count = [&](auto type, int64_t n) {
            bytes += Workspace::room<decltype(type)>(n);
            return static_cast<decltype(type)*>(nullptr);
        };
        share_out(sizes_, model_, call_, call_.threads, count);
        for (int i = 0; i < call_.threads; i++) own_share(sizes_, count);
        bytes += Workspace::room<char>(call_.threads * sizeof(Walker)) + Workspace::room<Member>(call_.threads);
        if (!workspace.reserve(bytes)) return false;
        const auto take = [&](auto type, int64_t n) { return workspace.take<decltype(type)>(n); };
        shared_ = share_out(sizes_, model_, call_, call_.threads, take);
        walkers_ = reinterpret_cast<Walker*>(workspace.take<char>(call_.threads * sizeof(Walker)));
        members_ = workspace.take<Member>(call_.threads);
        for (int i = 0; i < call_.threads; i++) {
            new (shared_.stretches + i) Stretch();
            new (members_ + i) Member();
            new (walkers_ + i) Walker(model_, call_, sizes_, shared_, own_share(sizes_, take), team_->barrier);
        }
        return true;
    }

    // Calls walk(walker) for every thread, each ready for a step of these tokens. False where weights could not be read.
    template <class Walk>
    bool run(const int64_t* past, const int64_t* ids, const int64_t* places, Walk walk) {
        const int64_t lap = model_.stream ? model_.stream->begin() : 0;
        if (model_.slots) model_.slots->begin();
        team_->together(members_, call_.threads, [&](Member& member) {
            Walker& walker = walkers_[member.part];
            walker.begin(member, past, lap, ids, places);
            walk(walker, member.part);
        });
        return (!model_.stream || !model_.stream->failed()) && (!model_.slots || !model_.slots->failed());
    }

    // The first thread takes part in every step: what all threads know, it knows of all steps.
    void count_skipped() const {
        if (!call_.skipped) return;
        double all = static_cast<double>(walkers_[0].known_skipped());
        for (int i = 0; i < call_.threads; i++) all += walkers_[i].own_skipped();
        *call_.skipped = all;
    }

  private:
    const StepModel& model_;
    const StepCall& call_;
    const Sizes sizes_;
    Lease team_;
    Shared shared_{};
    Walker* walkers_ = nullptr;
    Member* members_ = nullptr;
};

// What ends a generation: for each row some tokens, those from first[row] to first[row + 1].
struct Ends {
    const int64_t* tokens;
    const int64_t* first;

    bool among(int64_t row, int64_t token) const {
        return std::find(tokens + first[row], tokens + first[row + 1], token) != tokens + first[row + 1];
    }
};

// Steps of one token a row, each the likeliest after the last, until `count` are made of each row, one of a row's ends
// is, its probability is below `least`, or `hurry`, if there is one, has become 1. made: [count][rows]; chances: theirs, of one
// row, or null. Returns a Status.
int generate(const StepModel& model, const StepCall& call, int64_t count, const Ends& ends, float least,
             const int32_t* hurry, int64_t* made, float* chances, int64_t* made_count) {
    Steps steps(model, call, count);
    if (!steps.reserve()) return kNoMemory;
    std::vector<int64_t> tokens(call.tokens, call.tokens + call.rows), places(call.positions, call.positions + call.rows),
        past(call.past, call.past + call.rows);
    int64_t n = 0;
    for (bool ended = false; n < count && !ended; n++) {
        float chance = 1;
        const bool read = steps.run(past.data(), tokens.data(), places.data(), [&](Walker& walker, int part) {
            walker.run(true);
            walker.find_likeliest();
            const float probability = chances ? walker.probability() : 1.f;
            if (part) return;
            chance = probability;
            for (int64_t row = 0; row < call.rows; row++) made[n * call.rows + row] = walker.likeliest(row);
        });
        if (!read) return kUnreadable;
        if (chances) chances[n] = chance;
        ended = !(chance >= least) || (hurry && __atomic_load_n(hurry, __ATOMIC_RELAXED));
        for (int64_t row = 0; row < call.rows; row++) {
            tokens[row] = made[n * call.rows + row], places[row]++, past[row]++;
            ended |= ends.among(row, tokens[row]);
        }
    }
    *made_count = n;
    steps.count_skipped();
    return kOk;
}

}  // namespace
}  // namespace coreskip

using namespace coreskip;

// Runs one decode step. Returns a Status.
CORESKIP_API int coreskip_step(const StepModel* model, const StepCall* call) {
    Steps steps(*model, *call, 0);
    if (!steps.reserve()) return kNoMemory;
    const bool read = steps.run(call->past, call->tokens, call->positions, [](Walker& walker, int) { walker.run(); });
    steps.count_skipped();
    return read ? kOk : kUnreadable;
}

// Decodes greedily from one token of each row: `count` tokens, or fewer where one of a row's ends comes, which are those
// of `ends` from first_end[row] to first_end[row + 1], or another thread sets `hurry` to 1; it may be null. The caches have
// room for `count`; call->logits, of one token a row, is scratch. made: [count][rows]. Returns a Status.
CORESKIP_API int coreskip_generate(const StepModel* model, const StepCall* call, int64_t count, const int64_t* ends,
                                   const int64_t* first_end, const int32_t* hurry, int64_t* made, int64_t* made_count) {
    return generate(*model, *call, count, {ends, first_end}, 0, hurry, made, nullptr, made_count);
}

// Drafts greedily as coreskip_generate decodes one row, until a token's probability is below `least`; chances: [count].
CORESKIP_API int coreskip_draft(const StepModel* model, const StepCall* call, int64_t count, float least, int64_t* made,
                                float* chances, int64_t* made_count) {
    const int64_t none[2] = {};
    return generate(*model, *call, count, {nullptr, none}, least, nullptr, made, chances, made_count);
}

// Of each row of logits [rows][n] of `dtype` the likeliest token, as coreskip_generate finds it, and its probability;
// chances may be null.
CORESKIP_API void coreskip_likeliest(const void* logits, int dtype, int64_t rows, int64_t n, int64_t* tokens,
                                     float* chances, int threads) {
    Lease()->each(rows, threads, [&](int64_t r) {
        float slice[kSlice];
        const Logits row = {static_cast<const char*>(logits) + r * n * size_of(dtype), dtype, slice};
        const Greatest best = row.greatest({0, n});
        tokens[r] = best.at;
        if (chances) chances[r] = 1 / row.exp_sum({0, n}, best.value);
    });
}
