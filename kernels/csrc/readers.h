// Threads that read from a disk beside a step.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <thread>
#include <vector>

namespace coreskip {

// Starts threads that run read(), up to `count` in all. Returns whether there is any: fewer do the same in more time.
template <class Read>
bool start_readers(std::vector<std::thread>& readers, int count, Read read) {
    // signals are the program's own threads' to handle
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        while (static_cast<int>(readers.size()) < count) readers.emplace_back(read);
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return !readers.empty();
}

}  // namespace coreskip
