// What a step chooses of a file, neurons or experts: kept in slots of memory, and read where it is not there.
#pragma once

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "arguments.h"
#include "waiting.h"

namespace coreskip {

// The units that a layer chooses among. One thread of a step says what it wants (`want`), what the next layer will
// probably want (`expect`), and when a layer's units have been used (`done`); all of them wait (`wait`). One step at a
// time; the caller sees to that.
//
// Who goes when a slot is needed: first what other layers hold beyond their share and have just used, then the layer's
// own. Of these the units with the least score, in which every use counts 1, and half as much `half_life` steps later;
// 0: the least recently used.
class Slots {
  public:
    // fd: of a file opened with O_DIRECT or without. memory: `count` slots, on a block's begin; it outlives this.
    // count: at least as many as the units of a layer that a step may want.
    Slots(int fd, const SlotLayer* layers, int64_t layer_count, char* memory, int64_t count, double half_life, int readers);
    ~Slots();  // no step is under way
    Slots(const Slots&) = delete;
    Slots& operator=(const Slots&) = delete;

    static int64_t bytes_of(const SlotLayer& layer);  // of one slot

    void begin();
    void want(int64_t layer, const int64_t* units, int64_t count);
    void expect(int64_t layer, const int64_t* units, int64_t count);
    // Until what the layer wants is there. Returns how many nanoseconds that took.
    int64_t wait(int64_t layer);
    void done(int64_t layer);
    // Whether something could not be read: what steps have computed since is void.
    bool failed() const { return failed_.load(); }

    // [units][parts]: where the units that are wanted lie, each part as if all of it were there, its first bytes too.
    char* const* places(int64_t layer) const { return layers_[layer].place.data(); }

    SlotFigures figures{};  // of one thread; `read_bytes` and `reads` are told by the readers

  private:
    struct Layer {
        SlotLayer shape;
        std::vector<int32_t> slot;    // of each unit, or -1
        std::vector<float> score;
        std::vector<uint32_t> marked;  // the last step that has asked for a unit: it stays
        std::vector<char*> place;
        std::vector<int64_t> held;    // units that have a slot
        bool active = false;          // between being asked for and used
        std::atomic<int64_t> open{0};  // reads that are not done
        std::atomic<uint32_t> wanted{0};  // the last step that has said what it wants
    };
    struct Copy {
        int64_t from, bytes;  // in what was read
        char* to;
    };
    struct Read {
        int64_t layer, at, bytes;
        char* to;                   // as far from a block's begin as `at`; null: to memory of the reader, and then
        std::vector<Copy> copies;
        std::vector<int64_t> units;
    };

    const int fd_;
    char* const memory_;
    const int64_t count_;
    const double half_life_;
    const int wanted_readers_;
    int64_t slot_bytes_ = 0;
    std::unique_ptr<Layer[]> layers_;
    const int64_t layer_count_;
    std::vector<int32_t> free_;
    std::vector<int64_t> missing_;
    uint32_t step_ = 0;
    double need_ = 0;     // slots that were taken for a layer and the one after it, at most lately
    int64_t taken_ = 0;   // for these so far
    std::atomic<bool> failed_{false};
    std::vector<std::thread> readers_;
    Waiting arrived_;

    std::mutex mutex_;  // of what follows
    std::condition_variable work_;
    std::deque<Read> urgent_, early_;
    bool stopping_ = false;

    void start();
    void stop();
    void forget();
    void cancel(int64_t layer);
    void find_missing(Layer& layer, const int64_t* units, int64_t count);
    int64_t make_room(int64_t layer, int64_t wanted, bool all);
    void release(Layer& layer, int64_t most, bool beyond_share);
    void assign(Layer& layer, int64_t count);
    void submit(int64_t layer, int64_t count, std::deque<Read>& queue);
    void submit_small(int64_t layer, int part, int64_t count, std::vector<Read>& reads);
    void read_on();
    bool carry_out(const Read& read, char* own);
    int64_t share() const;
};

}  // namespace coreskip
