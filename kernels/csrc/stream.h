// Weights that stay in their file and are read while a step computes, a little ahead of it.
#pragma once

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "arguments.h"
#include "division.h"
#include "waiting.h"

namespace coreskip {

// The pieces that a step reads, in its order, over and over: a lap for every step. Readers put each into its place of a
// ring, which earlier pieces have had, as soon as these have been used; the first pieces of the next lap too, while
// nobody computes. One step at a time; the caller sees to that.
class Stream {
  public:
    // fd: of a file opened with O_DIRECT or without. ring: places are within it; it and the pieces outlive the stream.
    Stream(int fd, char* ring, const StreamPiece* pieces, int64_t count, int readers);
    ~Stream();  // no step is under way
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    // A step begins. Returns its lap.
    int64_t begin();
    // No more is read: another stream may use the ring. What was read ahead is forgotten.
    void stop();
    // Whether a piece could not be read: what steps have computed since is void.
    bool failed() const { return failed_.load(); }

    // The first unit of piece i.
    int64_t first(int64_t i) const { return pieces_[i].begin; }
    // Piece i of this lap, once it is there.
    const char* wait(int64_t i, int64_t lap);
    // Takes up to `most` units of a piece that is there. False where none is left.
    bool take(int64_t i, int64_t lap, int64_t most, Range& units);
    // So many of the units taken have been used.
    void finish(int64_t i, int64_t units);

  private:
    // Sequence numbers count pieces through all laps: piece i of a lap is lap * count + i.
    struct State {
        std::atomic<int64_t> loaded{-1};  // the last lap that it was read for
        std::atomic<uint64_t> taken{0};   // that lap, and how many units of it: 32 bits each
        std::atomic<int64_t> open{0};     // units that nobody has finished
        int64_t used = -1;                // the last lap that it was used in; under mutex_
    };

    void start();
    void read_ahead();
    bool read(const StreamPiece& piece);

    const int fd_;
    char* const ring_;
    const StreamPiece* const pieces_;
    const int64_t count_;
    const int wanted_readers_;
    std::unique_ptr<State[]> states_;
    std::vector<std::thread> readers_;
    std::atomic<bool> failed_{false};
    int64_t lap_ = -1;
    Waiting arrived_;

    std::mutex mutex_;  // of what follows, and of State::used
    std::condition_variable room_;
    int64_t next_ = 0;  // the sequence number that a reader takes next
    int64_t used_ = 0;  // up to which all have been used
    bool stopping_ = false;
};

}  // namespace coreskip
