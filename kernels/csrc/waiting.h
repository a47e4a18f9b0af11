// How threads wait for one another: awake for a moment, which is fastest while every thread has a core, then asleep,
// so that a thread that has lost its core can have this one. A thread that spins on keeps it from just the thread that
// it waits for: with four processes of two threads on two cores each ran at a fifth of its fair share.
#pragma once

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace coreskip {

// Nanoseconds of a clock that only goes forward.
inline int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// Where threads wait until something holds, which others bring about. The condition and what changes it use
// sequentially consistent atomics: a thread that falls asleep counts itself before it looks at the condition for the
// last time, and whoever changes it looks for sleepers after that.
class Waiting {
  public:
    // Returns 0 where `holds` came true within `awake` nanoseconds, else how many it took. meanwhile(): does something
    // short and useful, or returns false.
    template <class Holds, class Meanwhile>
    int64_t until(Holds holds, int64_t awake, Meanwhile meanwhile) {
        const int64_t begin = awake_until(holds, awake, meanwhile);
        if (!begin) return 0;
        sleep(holds);
        return now() - begin;
    }

    // The same without sleep: returns 0, or when it began where `holds` did not come true.
    template <class Holds, class Meanwhile>
    static int64_t awake_until(Holds holds, int64_t awake, Meanwhile meanwhile) {
        int64_t begin = 0;
        for (int turns = 0; !holds(); turns++) {
            if (meanwhile()) continue;
            pause();
            if (turns % kTurns) continue;  // looking at the clock takes as long as a turn
            const int64_t time = now();
            if (!begin) begin = time;
            if (time - begin >= awake) return begin;
        }
        return 0;
    }

    // Wakes those who wait, after a change. Returns whether anybody slept.
    bool changed() {
        if (!sleepers_.load()) return false;
        const std::lock_guard<std::mutex> lock(mutex_);
        condition_.notify_all();
        return true;
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

  private:
    static constexpr int kTurns = 16;

    template <class Holds>
    void sleep(Holds holds) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        condition_.wait(lock, holds);
        sleepers_.fetch_sub(1);
    }


    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable condition_;
};

}  // namespace coreskip
