#include "stream.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <new>

#include "dispatch.h"
#include "readers.h"

namespace coreskip {
namespace {

constexpr int64_t kBlock = 4096;     // O_DIRECT reads whole blocks, to places as far from a block's begin as in the file
constexpr int64_t kAwake = 20'000;   // nanoseconds: a piece takes the disk a hundred times that

}  // namespace

Stream::Stream(int fd, char* ring, const StreamPiece* pieces, int64_t count, int readers)
    : fd_(fd), ring_(ring), pieces_(pieces), count_(count), wanted_readers_(readers), states_(new State[count]) {}

Stream::~Stream() { stop(); }

int64_t Stream::begin() {
    lap_++;
    if (readers_.empty()) start();
    return lap_;
}

void Stream::start() {
    next_ = used_ = lap_ * count_;
    stopping_ = false;
    failed_ = false;
    for (int64_t i = 0; i < count_; i++) {
        states_[i].loaded = -1;
        states_[i].used = -1;
    }
    if (!start_readers(readers_, wanted_readers_, [this] { read_ahead(); })) failed_ = true;
}

void Stream::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    room_.notify_all();
    for (std::thread& reader : readers_) reader.join();
    readers_.clear();
}

void Stream::read_ahead() {
    for (;;) {
        int64_t sequence;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            sequence = next_++;
            const int64_t lap = sequence / count_, i = sequence % count_, after = pieces_[i].after;
            // the piece that has had this place last, in this lap or in the one before
            const int64_t last = after < 0 ? -1 : (after < i ? lap : lap - 1) * count_ + after;
            room_.wait(lock, [&] { return stopping_ || used_ > last; });
            if (stopping_) return;
        }
        State& state = states_[sequence % count_];
        const StreamPiece& piece = pieces_[sequence % count_];
        if (failed_ || !read(piece)) {
            failed_ = true;
            arrived_.changed();
            return;
        }
        state.open = piece.end - piece.begin;
        state.taken = static_cast<uint64_t>(sequence / count_) << 32;
        state.loaded = sequence / count_;
        arrived_.changed();
    }
}

bool Stream::read(const StreamPiece& piece) {
    const int64_t first = piece.at / kBlock * kBlock, end = piece.at + piece.bytes;
    const int64_t last = (end + kBlock - 1) / kBlock * kBlock;
    char* to = ring_ + piece.place;
    for (int64_t at = first; at < end;) {
        const ssize_t got = pread(fd_, to + (at - first), last - at, at);
        if (got < 0 && errno == EINTR) continue;
        // the disk fails, or the file has become shorter: a read that goes on has to begin at a block again
        if (got <= 0 || (at + got < end && got < kBlock)) return false;
        at += at + got < end ? got / kBlock * kBlock : got;
    }
    return true;
}

const char* Stream::wait(int64_t i, int64_t lap) {
    const State& state = states_[i];
    arrived_.until([&] { return state.loaded.load() >= lap || failed_.load(); }, kAwake, [] { return false; });
    return ring_ + pieces_[i].place + pieces_[i].at % kBlock;
}

bool Stream::take(int64_t i, int64_t lap, int64_t most, Range& units) {
    State& state = states_[i];
    const int64_t all = pieces_[i].end - pieces_[i].begin;
    uint64_t seen = state.taken.load();
    for (;;) {
        const auto of_lap = static_cast<int64_t>(seen >> 32), begin = static_cast<int64_t>(seen & 0xffffffff);
        // a late thread may find the piece used up, and read again for the next lap
        if (failed_ || of_lap != lap || begin >= all) return false;
        const int64_t end = std::min(begin + most, all);
        if (state.taken.compare_exchange_weak(seen, static_cast<uint64_t>(lap) << 32 | end)) {
            units = {pieces_[i].begin + begin, pieces_[i].begin + end};
            return true;
        }
    }
}

void Stream::finish(int64_t i, int64_t units) {
    State& state = states_[i];
    if (state.open.fetch_sub(units) != units) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        state.used = state.loaded;
        while (states_[used_ % count_].used == used_ / count_) used_++;
    }
    room_.notify_all();
}

}  // namespace coreskip

using namespace coreskip;

// A stream over `count` pieces of a file, by so many threads; null where there is no memory.
CORESKIP_API Stream* coreskip_stream(int fd, void* ring, const StreamPiece* pieces, int64_t count, int readers) {
    return new (std::nothrow) Stream(fd, static_cast<char*>(ring), pieces, count, readers);
}

CORESKIP_API void coreskip_stream_stop(Stream* stream) { stream->stop(); }

CORESKIP_API void coreskip_stream_end(Stream* stream) { delete stream; }
