// The threads that share out a call's work: a team belongs to one calling thread at a time, which works along.
//
// Two ways to share work out:
// - `each`: pieces that do not wait for one another. Whoever is free takes the next; a helper that comes late finds
//   nothing left and is not waited for.
// - `together`: all members go through the same work and meet at barriers. Who is a member is settled at the start, of
//   those that turn up at once.
// Neither makes a result depend on who turned up: a piece is the same whoever computes it.
#pragma once

#include <stdint.h>

#include <atomic>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "waiting.h"

namespace coreskip {

// For how many nanoseconds a thread that waits for another one's work stays awake. Threads of a step come to a barrier
// within a few microseconds of each other while each has a core; one that has lost its core is away for a time slice,
// of milliseconds. A thread that sleeps meanwhile may lose its own for as long, just when the other comes back: beside
// processes that use a tenth of two cores, a step with 30 us here came to 0.65 of the speed that it had with 1 ms, and
// with 3 ms four processes at once to 0.67 of what they made with 1 ms.
constexpr int64_t kAwake = 1'000'000;
// And a helper, between two calls of native code: first where its last wait was that short, second where it was not.
constexpr int64_t kAwakeBetweenCalls = 200'000, kAwakeInVain = 30'000;

// A member of a team that works together.
struct Member {
    int part = 0, parts = 1;
    int64_t lost = 0;    // nanoseconds it waited for others, where it had to sleep
    bool late = false;   // others slept until it came

    void begin(int part_, int parts_) { *this = {part_, parts_, 0, false}; }
};

// Where the members meet.
class Barrier {
  public:
    template <class Meanwhile>
    void meet(Member& who, Meanwhile meanwhile) {
        if (who.parts == 1) return;
        const uint32_t here = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == who.parts - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(here + 1);
            if (waiting_.changed()) who.late = true;
            return;
        }
        // Spinning is fastest while every thread has a core. Where one has lost its core, the rest let go of theirs.
        for (int spins = 0; spins < kSpins && round_.load() == here;) {
            if (meanwhile()) continue;
            Waiting::pause(), spins++;
        }
        who.lost += waiting_.until([&] { return round_.load() != here; }, kAwake, meanwhile);
    }

  private:
    static constexpr int kSpins = 2000;

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    Waiting waiting_;
};

// How many threads pay. Where threads lose their cores to other processes, the members of a team wait for one another
// for whole time slices; a single thread waits for nobody. Told by the share of time that members slept for others; a
// larger team is tried again and again, ever less often where that was in vain.
class Crowding {
  public:
    // The size of the next team, at most `most`.
    int size(int most, int64_t time);
    // After a team of `size` has worked from `begin` to `end`: its members slept `lost` nanoseconds for others, in all, and
    // `late` of them were slept for.
    void note(int size, int64_t begin, int64_t end, int64_t lost, int late);

  private:
    int limit_ = 1 << 30;
    bool trying_ = false;        // a larger team than before
    float share_ = 0;            // of the time lost, an average over the last windows
    int64_t total_ = 0, lost_ = 0;
    int late_ = 0;
    int64_t hold_ = 0, again_ = 0;  // how long and until when the limit holds
    int64_t looked_ = 0;         // when `cores_` was found
    int cores_ = 1 << 30;
};

class Team {
  public:
    Team() = default;
    ~Team();  // no work is going on
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Calls work(i) for each i below `pieces`, by at most `most` threads.
    template <class Work>
    void each(int64_t pieces, int most, Work work) {
        std::atomic<int64_t> next{0};
        auto take = [&](int) {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i);
        };
        run_each(pieces < most ? static_cast<int>(pieces) : most, {invoke<decltype(take)>, &take});
    }

    // Calls work(member) by at most `most` threads, of which the calling one is member 0; members has room for them.
    template <class Work>
    void together(Member* members, int most, Work work) {
        auto as_member = [&](int part) { work(members[part]); };
        run_together(members, most, {invoke<decltype(as_member)>, &as_member});
    }

    Barrier barrier;

  private:
    struct Job {
        void (*run)(void* context, int part);
        void* context;
    };
    enum State : int { kReady, kCalled, kWorking, kStop };
    struct Helper {
        alignas(64) std::atomic<int> state{kReady};
        int part = 0;
        Waiting waiting;
        std::thread thread;
    };

    template <class F>
    static void invoke(void* context, int part) {
        (*static_cast<F*>(context))(part);
    }

    void run_each(int most, Job job);
    void run_together(Member* members, int most, Job job);
    void run_with_helpers(Member* members, int most, Job job);
    int hire(int helpers);
    void live(Helper& helper);
    void call(int helpers, const Job& job, bool gathers);
    bool dismiss(Helper& helper);
    int64_t finish();

    std::vector<std::unique_ptr<Helper>> helpers_;
    Job job_{};
    bool gathers_ = false;  // whether helpers that turn up wait until `go_` has moved on from `before_`
    uint32_t before_ = 0;
    alignas(64) std::atomic<uint32_t> go_{0};
    Waiting to_go_, done_;
    Crowding crowding_;
};

// Runs a function on so many threads of the process's OpenMP pool. False: there is none, and nothing has been run.
bool torch_parallel(void (*run)(void*), void* context, int threads);

// A team for the length of a call: an idle one, or a new one. Several calling threads have a team each.
class Lease {
  public:
    Lease();
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Team* operator->() const { return team_; }
    Team* get() const { return team_; }

  private:
    Team* team_;
};

// `Team::each` for ops that stand between torch's own: by the threads of torch's OpenMP pool where there is one. After
// each of its ops they spin for milliseconds, on the cores that helpers of ours would need: an MLP between parallel ops
// of torch took 1.37 times as long with helpers.
template <class Work>
void each_beside_torch(int64_t pieces, int most, Work work) {
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i);
    };
    const auto invoke = [](void* context) { (*static_cast<decltype(take)*>(context))(); };
    if (most > 1 && torch_parallel(invoke, &take, most)) return;
    Lease()->each(pieces, most, work);
}

// The cores that this thread may run on, and no more than `set_limit` was told.
int cores();
void set_limit(int threads);

}  // namespace coreskip
