#include "slots.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "dispatch.h"
#include "formats.h"
#include "readers.h"

namespace coreskip {
namespace {

constexpr int64_t kBlock = 4096;      // O_DIRECT reads whole blocks
constexpr int64_t kSmall = 64 << 10;  // units below this are read in runs, and copied from there
// A read costs some 30 us more than its bytes, as many as the disk brings 32 KB in: what lies between two units and is
// less is read with them.
constexpr int64_t kGap = 32 << 10;
constexpr int64_t kMost = 512 << 10;  // bytes of one read
constexpr int64_t kAwake = 20'000;    // nanoseconds
constexpr double kForget = 0.98;      // of the slots needed lately, from layer to layer

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
bool small(const SlotLayer& l) { return *std::max_element(l.bytes, l.bytes + l.parts) < kSmall; }
int64_t room(const SlotLayer& l, int part) {
    return small(l) ? up(l.bytes[part], kLine) : up(l.bytes[part], kBlock) + kBlock;
}

}  // namespace

int64_t Slots::bytes_of(const SlotLayer& layer) {
    int64_t bytes = 0;
    for (int p = 0; p < layer.parts; p++) bytes += room(layer, p);
    return bytes;
}

Slots::Slots(int fd, const SlotLayer* layers, int64_t layer_count, char* memory, int64_t count, double half_life,
             int readers)
    : fd_(fd), memory_(memory), count_(count), half_life_(half_life), wanted_readers_(readers),
      layers_(new Layer[layer_count]), layer_count_(layer_count) {
    for (int64_t i = 0; i < layer_count; i++) {
        Layer& l = layers_[i];
        l.shape = layers[i];
        slot_bytes_ = std::max(slot_bytes_, bytes_of(l.shape));
        l.slot.assign(l.shape.units, -1);
        l.score.assign(l.shape.units, 0.f);
        l.marked.assign(l.shape.units, 0);
        l.place.assign(l.shape.units * l.shape.parts, nullptr);
    }
    forget();
}

Slots::~Slots() { stop(); }

// ---- what a step says ----

void Slots::begin() {
    if (failed_) {
        stop();
        forget();
    }
    step_++;
    for (int64_t i = 0; i < layer_count_; i++) layers_[i].active = false;
    if (readers_.empty()) start();
}

void Slots::want(int64_t layer, const int64_t* units, int64_t count) {
    Layer& l = layers_[layer];
    cancel(layer);
    l.active = true;
    const auto now = static_cast<float>(half_life_ > 0 ? step_ / half_life_ : step_);
    for (int64_t i = 0; i < count; i++) {
        float& score = l.score[units[i]];
        const float most = std::max(score, now), least = std::min(score, now);
        score = half_life_ > 0 && score > 0 ? most + log2f(1 + exp2f(least - most)) : now;
    }
    find_missing(l, units, count);
    figures.wanted += count, figures.missed += missing_.size();
    if (make_room(layer, missing_.size(), true) < static_cast<int64_t>(missing_.size())) {
        failed_ = true;  // fewer slots than were asked for
        missing_.clear();
    }
    taken_ += missing_.size();
    need_ = std::max(need_ * kForget, static_cast<double>(taken_));
    taken_ = 0;
    submit(layer, missing_.size(), urgent_);
    l.wanted = step_;
    arrived_.changed();
}

void Slots::expect(int64_t layer, const int64_t* units, int64_t count) {
    Layer& l = layers_[layer];
    l.active = true;
    find_missing(l, units, count);
    const int64_t found = make_room(layer, missing_.size(), false);
    figures.expected += found;
    taken_ += found;
    submit(layer, found, early_);
}

int64_t Slots::wait(int64_t layer) {
    Layer& l = layers_[layer];
    const int64_t begin = now();
    arrived_.until([&] { return (l.wanted.load() == step_ && !l.open.load()) || failed_.load(); }, kAwake,
                   [] { return false; });
    return now() - begin;
}

void Slots::done(int64_t layer) { layers_[layer].active = false; }

// ---- who has which slot ----

void Slots::forget() {
    free_.clear();
    for (int64_t i = 0; i < count_; i++) free_.push_back(static_cast<int32_t>(count_ - 1 - i));
    for (int64_t i = 0; i < layer_count_; i++) {
        Layer& l = layers_[i];
        std::fill(l.slot.begin(), l.slot.end(), -1);
        l.held.clear();
        l.open = 0;
    }
    failed_ = false;
}

// Slots that each layer may keep when it has been used: all but those that the next layers will need at once.
int64_t Slots::share() const {
    return std::max<int64_t>(0, (count_ - static_cast<int64_t>(need_)) / layer_count_);
}

// Early reads of a layer that nobody has begun: what it wants is known better now. Those of units that come in several
// reads are done first instead: others of theirs may be under way.
void Slots::cancel(int64_t layer) {
    Layer& l = layers_[layer];
    const bool whole = l.shape.parts == 1 && small(l.shape);
    bool any = false;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto read = early_.begin(); read != early_.end();) {
            if (read->layer != layer) {
                ++read;
                continue;
            }
            any = true;
            if (whole) {
                l.open--;
                for (const int64_t unit : read->units) free_.push_back(l.slot[unit]), l.slot[unit] = -1;
            } else {
                urgent_.push_back(std::move(*read));
            }
            read = early_.erase(read);
        }
    }
    if (any && whole)
        l.held.erase(std::remove_if(l.held.begin(), l.held.end(), [&](int64_t u) { return l.slot[u] < 0; }), l.held.end());
}

void Slots::find_missing(Layer& l, const int64_t* units, int64_t count) {
    missing_.clear();
    for (int64_t i = 0; i < count; i++) {
        l.marked[units[i]] = step_;
        if (l.slot[units[i]] < 0) missing_.push_back(units[i]);
    }
}

// Frees slots for as many units as it can; the others of `missing_` are left out. all: for every one of them.
int64_t Slots::make_room(int64_t layer, int64_t wanted, bool all) {
    const auto missing = [&] { return wanted - static_cast<int64_t>(free_.size()); };
    const auto other = [&](int64_t back) -> Layer& { return layers_[(layer - back + 2 * layer_count_) % layer_count_]; };
    for (int64_t back = 1; back < layer_count_ && missing() > 0; back++) release(other(back), missing(), true);
    if (missing() > 0) release(layers_[layer], missing(), false);
    for (int64_t back = 1; all && back < layer_count_ && missing() > 0; back++) release(other(back), missing(), false);
    return std::min<int64_t>(wanted, free_.size());
}

// Takes up to `most` slots away from a layer's units with the least scores.
void Slots::release(Layer& l, int64_t most, bool beyond_share) {
    if (beyond_share) most = std::min<int64_t>(most, static_cast<int64_t>(l.held.size()) - share());
    if (most <= 0) return;
    const auto end = std::partition(l.held.begin(), l.held.end(),
                                    [&](int64_t unit) { return !l.active || l.marked[unit] != step_; });
    most = std::min<int64_t>(most, end - l.held.begin());
    std::nth_element(l.held.begin(), l.held.begin() + most, end,
                     [&](int64_t a, int64_t b) { return l.score[a] < l.score[b]; });
    for (int64_t i = 0; i < most; i++) {
        free_.push_back(l.slot[l.held[i]]);
        l.slot[l.held[i]] = -1;
    }
    l.held.erase(l.held.begin(), l.held.begin() + most);
}

// ---- reads ----

// Has the first `count` of `missing_`, ascending, read to slots of their own.
void Slots::submit(int64_t layer, int64_t count, std::deque<Read>& queue) {
    Layer& l = layers_[layer];
    for (int64_t i = 0; i < count; i++) {
        const int64_t unit = missing_[i];
        l.slot[unit] = free_.back();
        free_.pop_back();
        l.held.push_back(unit);
    }
    std::vector<Read> reads;
    int64_t at = 0;  // in a slot
    for (int p = 0; p < l.shape.parts; p++) {
        const int64_t bytes = l.shape.bytes[p];
        for (int64_t i = 0; i < count; i++) {
            const int64_t unit = missing_[i], from = l.shape.at[p] + unit * l.shape.step[p] + l.shape.from[p];
            char* to = memory_ + l.slot[unit] * slot_bytes_ + at + (small(l.shape) ? 0 : from % kBlock);
            l.place[unit * l.shape.parts + p] = to - l.shape.from[p];
            for (int64_t done = 0; !small(l.shape) && done < bytes;) {
                const int64_t some = std::min(bytes - done, kMost - (from + done) % kBlock);  // then blocks begin
                reads.push_back({layer, from + done, some, to + done, {}, {unit}});
                done += some;
            }
        }
        if (small(l.shape)) submit_small(layer, p, count, reads);
        at += room(l.shape, p);
    }
    if (reads.empty()) return;
    l.open += static_cast<int64_t>(reads.size());
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (Read& read : reads) queue.push_back(std::move(read));
    }
    work_.notify_all();
}

// Small units: runs of them, with what lies between where that is little.
void Slots::submit_small(int64_t layer, int part, int64_t count, std::vector<Read>& reads) {
    const Layer& l = layers_[layer];
    const int64_t bytes = l.shape.bytes[part];
    for (int64_t i = 0; i < count; i++) {
        const int64_t unit = missing_[i], from = l.shape.at[part] + unit * l.shape.step[part] + l.shape.from[part];
        Read* last = i ? &reads.back() : nullptr;
        if (!last || from - (last->at + last->bytes) > kGap || from + bytes - last->at > kMost) {
            reads.push_back({layer, from, 0, nullptr, {}, {}});
            last = &reads.back();
        }
        last->bytes = from + bytes - last->at;
        last->copies.push_back({from - last->at, bytes, l.place[unit * l.shape.parts + part] + l.shape.from[part]});
        last->units.push_back(unit);
    }
}

void Slots::start() {
    stopping_ = false;
    if (!start_readers(readers_, wanted_readers_, [this] { read_on(); })) failed_ = true;
}

void Slots::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        urgent_.clear();
        early_.clear();
    }
    work_.notify_all();
    for (std::thread& reader : readers_) reader.join();
    readers_.clear();
}

void Slots::read_on() {
    std::unique_ptr<char, decltype(&free)> own(nullptr, free);
    for (;;) {
        Read read;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            work_.wait(lock, [&] { return stopping_ || !urgent_.empty() || !early_.empty(); });
            if (stopping_) return;
            std::deque<Read>& queue = urgent_.empty() ? early_ : urgent_;
            read = std::move(queue.front());
            queue.pop_front();
            figures.reads++, figures.read_bytes += read.bytes;
        }
        if (!read.to && !own) own.reset(static_cast<char*>(aligned_alloc(kBlock, kMost + 2 * kBlock)));
        if (failed_ || (!read.to && !own) || !carry_out(read, own.get())) failed_ = true;
        layers_[read.layer].open--;
        arrived_.changed();
    }
}

bool Slots::carry_out(const Read& read, char* own) {
    const int64_t first = read.at / kBlock * kBlock, end = read.at + read.bytes, last = up(end, kBlock);
    char* to = read.to ? read.to - (read.at - first) : own;
    for (int64_t at = first; at < end;) {
        const ssize_t got = pread(fd_, to + (at - first), last - at, at);
        if (got < 0 && errno == EINTR) continue;
        // the disk fails, or the file has become shorter: a read that goes on has to begin at a block again
        if (got <= 0 || (at + got < end && got < kBlock)) return false;
        at += at + got < end ? got / kBlock * kBlock : got;
    }
    for (const Copy& copy : read.copies) memcpy(copy.to, own + (read.at - first) + copy.from, copy.bytes);
    return true;
}

}  // namespace coreskip

using namespace coreskip;

// Bytes of a slot that has room for a unit of any of these layers.
CORESKIP_API int64_t coreskip_slot_bytes(const SlotLayer* layers, int64_t count) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++) bytes = std::max(bytes, Slots::bytes_of(layers[i]));
    return bytes;
}

// See Slots; null where there is no memory.
CORESKIP_API Slots* coreskip_slots(int fd, const SlotLayer* layers, int64_t layer_count, void* memory, int64_t count,
                                   double half_life, int readers) {
    return new (std::nothrow) Slots(fd, layers, layer_count, static_cast<char*>(memory), count, half_life, readers);
}

CORESKIP_API void coreskip_slots_end(Slots* slots) { delete slots; }

CORESKIP_API void coreskip_slots_figures(const Slots* slots, SlotFigures* figures) { *figures = slots->figures; }
