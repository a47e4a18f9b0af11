// Drives the thread team alone, for the thread sanitizer (`make sanitize`): several callers at once, both ways of
// sharing work out, and, where the sanitizer allows it, a fork. It pretends to have six cores.

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../kernels/csrc/team.h"

extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* set) noexcept {
    CPU_ZERO_S(size, set);
    for (int i = 0; i < 6; i++) CPU_SET_S(i, size, set);
    return 0;
}

using namespace coreskip;

static std::atomic<int> shared_out{0};  // runs that more than one thread took part in

static void fail(const char* what) {
    fprintf(stderr, "wrong: %s\n", what);
    abort();
}

static double something(int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < 2000; i++) sum += std::sqrt(static_cast<double>(i + n));
    return sum;
}

static void use(int rounds, int threads) {
    for (int round = 0; round < rounds; round++) {
        Lease team;
        std::vector<double> out(100);
        team->each(100, threads, [&](int64_t i) { out[i] = something(i); });
        for (int64_t i = 0; i < 100; i++)
            if (out[i] != something(i)) fail("each");
        std::vector<Member> members(threads);
        std::vector<double> sums(16);
        team->together(members.data(), threads, [&](Member& me) {
            for (int step = 0; step < 30; step++) {
                for (int i = me.part; i < 16; i += me.parts) sums[i] = something(step + i);
                team->barrier.meet(me, [] { return false; });
                for (int i = 0; i < 16; i++)
                    if (sums[i] != something(step + i)) fail("together");
                team->barrier.meet(me, [] { return false; });
            }
            if (me.part == 1) shared_out++;
        });
        if (round % 10 == 0) usleep(500);  // long enough for helpers to fall asleep
    }
}

int main() {
    use(100, 4);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; i++) callers.emplace_back(use, 50, 2 + i);
    for (auto& caller : callers) caller.join();
    if (!shared_out) fail("no helper ever came");
#if !defined(__SANITIZE_THREAD__)
    const pid_t child = fork();
    if (child == 0) {
        use(20, 3);
        exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status) fail("a forked child");
#endif
    use(20, 3);
    printf("%d runs were shared out\n", shared_out.load());
}
