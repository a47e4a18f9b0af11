#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <mutex>
#include <system_error>

namespace coreskip {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kWindow = 4 * kMillisecond;  // of work, after which the size of a team is looked at again
constexpr float kTooMuch = 0.25f;              // of that time lost
constexpr float kNew = 0.0625f;                // weight of a window's length of time in the average
constexpr float kMostNew = 0.5f;               // and of one long piece of work
constexpr int64_t kHold = 20 * kMillisecond, kLongestHold = 1280 * kMillisecond;
constexpr int64_t kPatience = 200'000;         // for helpers to turn up; waking one takes tens of microseconds

std::atomic<int> limit{0};  // 0: none

// The teams that nobody uses. A child of a fork begins with none: the helpers stayed with its parent. Never freed, for
// threads that outlive the library's end may still come by.
struct Idle {
    std::mutex mutex;
    std::vector<Team*> teams;
    bool over = false;
};

Idle* idle = new Idle;

// Whether this process is a child of a fork, in which GCC's OpenMP waits for threads that stayed with its parent.
std::atomic<bool> forked{false};

struct Library {
    Library() {
        pthread_atfork(nullptr, nullptr, [] {
            idle = new Idle;
            forked = true;
        });
    }
    // At the end of the process, and where the library is closed: helpers end, too. A team that is in use stays.
    ~Library() {
        std::vector<Team*> teams;
        {
            const std::lock_guard<std::mutex> lock(idle->mutex);
            idle->over = true;
            teams.swap(idle->teams);
        }
        for (Team* team : teams) delete team;
    }
} library;

}  // namespace

void set_limit(int threads) { limit = threads; }

int cores() {
    int found = limit.load() > 0 ? limit.load() : 1 << 30;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) found = std::min(found, CPU_COUNT(&set));
#endif
    return std::max(1, found);
}

// ---- how many threads pay ----

int Crowding::size(int most, int64_t time) {
    if (time - looked_ > 100 * kMillisecond) looked_ = time, cores_ = cores();
    most = std::min(most, cores_);
    if (limit_ < most && time >= again_) {
        limit_ *= 2;
        trying_ = true;
        share_ = kTooMuch * 0.6f;  // a few bad windows are enough
    }
    return std::min(most, limit_);
}

void Crowding::note(int size, int64_t begin, int64_t end, int64_t lost, int late) {
    if (size == 1) return;
    total_ += end - begin;
    lost_ += lost / (size - 1);  // one that comes late is waited for by all others
    late_ = std::max(late_, late);
    if (total_ < kWindow) return;
    const float weight = std::min(kMostNew, kNew * static_cast<float>(total_) / static_cast<float>(kWindow));
    share_ += (static_cast<float>(lost_) / static_cast<float>(total_) - share_) * weight;
    if (share_ > kTooMuch) {
        limit_ = std::max(1, size - std::max(1, late_));
        hold_ = trying_ ? std::min(2 * hold_, kLongestHold) : std::max(hold_ / 2, kHold);
        again_ = end + hold_;
        trying_ = false;
    } else if (share_ < kTooMuch / 2) {
        trying_ = false;
    }
    total_ = lost_ = late_ = 0;
}

// ---- helpers ----

Team::~Team() {
    for (auto& helper : helpers_) {
        helper->state.store(kStop);
        helper->waiting.changed();
        helper->thread.join();
    }
}

// Makes sure of so many helpers, or as many as the system gives. Returns how many there are, at most `helpers`.
int Team::hire(int helpers) {
    while (static_cast<int>(helpers_.size()) < helpers) {
        auto helper = std::make_unique<Helper>();
        // signals are the program's own threads' to handle
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            helper->thread = std::thread([this, h = helper.get()] { live(*h); });
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (!helper->thread.joinable()) break;
        helpers_.push_back(std::move(helper));
    }
    return std::min(helpers, static_cast<int>(helpers_.size()));
}

void Team::live(Helper& helper) {
    const auto nothing = [] { return false; };
    int64_t awake = kAwakeBetweenCalls;
    for (;;) {
        const int64_t took = helper.waiting.until(
            [&] { return helper.state.load() == kCalled || helper.state.load() == kStop; }, awake, nothing);
        // calls come as they came last time
        awake = took < kAwakeBetweenCalls ? kAwakeBetweenCalls : kAwakeInVain;
        int expected = kCalled;
        if (!helper.state.compare_exchange_strong(expected, kWorking)) {
            if (expected == kStop) return;
            continue;  // dismissed meanwhile
        }
        if (gathers_) to_go_.until([&] { return go_.load() != before_; }, kAwake, nothing);
        job_.run(job_.context, helper.part);
        helper.state.store(kReady);
        done_.changed();
    }
}

// Calls the first `helpers` to a job.
void Team::call(int helpers, const Job& job, bool gathers) {
    job_ = job;
    gathers_ = gathers;
    before_ = go_.load();
    for (int i = 0; i < helpers; i++) {
        helpers_[i]->state.store(kCalled);
        helpers_[i]->waiting.changed();
    }
}

// Lets a called helper go that has not turned up. False: it has.
bool Team::dismiss(Helper& helper) {
    int expected = kCalled;
    return helper.state.compare_exchange_strong(expected, kReady);
}

// Waits for the helpers that work. Returns for how many nanoseconds it slept.
int64_t Team::finish() {
    const auto all_ready = [&] {
        for (auto& helper : helpers_)
            if (helper->state.load() == kWorking) return false;
        return true;
    };
    return done_.until(all_ready, kAwake, [] { return false; });
}

void Team::run_each(int most, Job job) {
    const int64_t begin = now();
    const int size = most > 1 ? 1 + hire(crowding_.size(most, begin) - 1) : 1;
    if (size == 1) return job.run(job.context, 0);
    call(size - 1, job, false);
    job.run(job.context, 0);
    int came = 1;
    for (int i = 0; i < size - 1; i++) came += !dismiss(*helpers_[i]);
    const int64_t lost = finish();
    crowding_.note(came, begin, now(), lost, lost > 0);
}

void Team::run_with_helpers(Member* members, int most, Job job) {
    const int size = 1 + hire(most - 1);
    members[0].begin(0, 1);
    if (size == 1) return job.run(job.context, 0);
    call(size - 1, job, true);
    const auto all_came = [&] {
        for (int i = 0; i < size - 1; i++)
            if (helpers_[i]->state.load() == kCalled) return false;
        return true;
    };
    Waiting::awake_until(all_came, kPatience, [] { return false; });
    int parts = 1;
    for (int i = 0; i < size - 1; i++)
        if (!dismiss(*helpers_[i])) helpers_[i]->part = parts++;
    for (int i = 0; i < parts; i++) members[i].begin(i, parts);
    go_.fetch_add(1);
    to_go_.changed();
    job.run(job.context, 0);
    members[0].lost += finish();
}

namespace {

// torch's OpenMP library, which torch loads into the global scope; null where it has another one.
struct TorchThreads {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Number = int (*)();
    const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    const Number number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    const Number count = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));

    explicit operator bool() const { return parallel && number && count && !forked; }
};

const TorchThreads& torch_threads() {
    static const TorchThreads found;
    return found;
}

}  // namespace

bool torch_parallel(void (*run)(void*), void* context, int threads) {
    const TorchThreads& torch = torch_threads();
    if (!torch) return false;
    torch.parallel(run, context, static_cast<unsigned>(threads), 0);
    return true;
}

// On torch's own threads, where there are: they are awake between its operations, and helpers beside them would have to
// share their cores. With helpers of our own a step of the embedded model on two cores came to 0.6 of this speed.
void Team::run_together(Member* members, int most, Job job) {
    struct Context {
        Member* members;
        Job job;
    } context{members, job};
    const int64_t begin = now();
    const int size = most > 1 ? crowding_.size(most, begin) : 1;
    const auto as_member = [](void* given) {
        const Context& here = *static_cast<Context*>(given);
        const int part = torch_threads().number();
        here.members[part].begin(part, torch_threads().count());
        here.job.run(here.job.context, part);
    };
    if (size == 1 || !torch_parallel(as_member, &context, size)) run_with_helpers(members, size, job);
    const int parts = members[0].parts;
    int64_t lost = 0;
    int late = 0;
    for (int i = 0; i < parts; i++) lost += members[i].lost, late += members[i].late;
    crowding_.note(parts, begin, now(), lost, late);
}

// ---- who has which team ----

Lease::Lease() {
    Idle& all = *idle;
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (all.teams.empty()) {
        team_ = new Team;
    } else {
        team_ = all.teams.back();
        all.teams.pop_back();
    }
}

Lease::~Lease() {
    Idle& all = *idle;
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (!all.over) all.teams.push_back(team_);
}

}  // namespace coreskip
