// A token's experts, and what each of them counts, by the logits of a router.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "formats.h"

namespace coreskip {

struct Scored {
    float score;
    int64_t expert;
};

struct Chosen {
    int64_t expert;
    float weight;
};

// An expert that some rows of x want.
struct ExpertPart {
    const StepLinear* matrices;   // gate, up, down
    int first, count;             // rows of x that want it, in `wanting`
    int64_t neurons_at, out_at;   // where its activations and its outputs begin
    int64_t units[2], bytes[2];   // of all before it and itself: gate and up by pairs; down
};

constexpr int64_t kMaxGroups = 256;  // of experts

class Router {
  public:
    // logits: [count], changed here; scored: room for as many.
    Router(const StepRouter& router, float* logits, Scored* scored) : r(router), logits(logits), scored(scored) {}

    // Writes the experts to `to`, in their order, room for `chosen` of them, and returns how many there are.
    int64_t choose(Chosen* to) {
        for (int64_t i = 0; i < r.count; i++)
            if (!is_kept(i)) logits[i] = kNever;
        int64_t n = r.scoring == kMixer ? mix(to) : take_best(to);
        n = std::remove_if(to, to + n, [&, greatest = greatest_of(to, n)](const Chosen& c) {
                return c.weight < r.least * greatest;
            }) - to;
        weigh(to, n);
        std::sort(to, to + n, [](const Chosen& a, const Chosen& b) { return a.expert < b.expert; });
        return n;
    }

  private:
    static constexpr float kNever = -std::numeric_limits<float>::infinity();

    const StepRouter& r;
    float* logits;
    Scored* scored;

    bool is_kept(int64_t i) const { return !r.kept || r.kept[i]; }

    // In which order torch sorts: NaN is the greatest.
    static bool before(const Scored& a, const Scored& b) {
        return (isnan(a.score) && !isnan(b.score)) || a.score > b.score;
    }

    // The k best come first, by the very algorithms of torch.topk: of equal ones it takes the same.
    static void best_first(Scored* all, int64_t n, int64_t k) {
        if (k * 64 <= n) std::partial_sort(all, all + k, all + n, before);
        else std::nth_element(all, all + k - 1, all + n, before);
    }

    static float greatest_of(const Chosen* some, int64_t n) {
        float greatest = 0;
        for (int64_t i = 0; i < n; i++) greatest = std::max(greatest, some[i].weight);
        return greatest;
    }

    float greatest_logit() const {
        float most = kNever;
        for (int64_t i = 0; i < r.count; i++)
            if (!(logits[i] <= most)) most = logits[i];
        return most;
    }

    // Turns logits into scores.
    void score() {
        if (r.scoring == kSigmoid) {
            for (int64_t i = 0; i < r.count; i++) logits[i] = 1 / (1 + expf(-logits[i]));
        } else if (r.scoring == kSoftmax) {
            const float most = greatest_logit();
            float sum = 0;
            for (int64_t i = 0; i < r.count; i++) sum += logits[i] = expf(logits[i] - most);
            for (int64_t i = 0; i < r.count; i++) logits[i] /= sum;
        }
    }

    int64_t take_best(Chosen* to) {
        score();
        for (int64_t i = 0; i < r.count; i++)
            scored[i] = {is_kept(i) ? logits[i] + (r.correction ? r.correction[i] : 0.f) : kNever, i};
        if (r.groups_kept < r.groups) leave_out_groups();
        best_first(scored, r.count, r.chosen);
        int64_t n = 0;
        for (int64_t i = 0; i < r.chosen; i++)
            if (scored[i].score != kNever) to[n++] = {scored[i].expert, logits[scored[i].expert]};
        if (r.scoring == kSoftmaxOfChosen) exponentials(to, n);
        for (int64_t i = 0; r.scoring == kSigmoidOfChosen && i < n; i++) to[i].weight = 1 / (1 + expf(-to[i].weight));
        return n;
    }

    // In place of logits, what softmax divides by its sum.
    static void exponentials(Chosen* to, int64_t n) {
        float most = kNever;
        for (int64_t i = 0; i < n; i++)
            if (!(to[i].weight <= most)) most = to[i].weight;
        for (int64_t i = 0; i < n; i++) to[i].weight = expf(to[i].weight - most);
    }

    void leave_out_groups() {
        Scored groups[kMaxGroups];
        const int64_t size = r.count / r.groups;
        for (int64_t g = 0; g < r.groups; g++) {
            // The two greatest. Experts that are not kept count 0, unless there is no other.
            float first = kNever, second = kNever;
            bool any = false;
            for (int64_t i = g * size; i < (g + 1) * size; i++) {
                const float s = is_kept(i) ? scored[i].score : 0.f;
                any |= is_kept(i);
                if (!(s <= first)) second = first, first = s;
                else if (!(s <= second)) second = s;
            }
            groups[g] = {!any ? kNever : r.by_pairs && size > 1 ? first + second : first, g};
        }
        best_first(groups, r.groups, r.groups_kept);
        for (int64_t k = r.groups_kept; k < r.groups; k++)
            for (int64_t i = groups[k].expert * size; i < (groups[k].expert + 1) * size; i++) scored[i].score = kNever;
    }

    // The greatest logit, and the greatest of the others, each weighed among those near it.
    int64_t mix(Chosen* to) {
        int64_t n = 0, first = -1;
        for (; n < std::min<int64_t>(r.chosen, 2); n++) {
            int64_t best = -1;
            for (int64_t i = 0; i < r.count; i++)
                if (i != first && (best < 0 || logits[i] > logits[best])) best = i;
            if (best < 0 || logits[best] == kNever) break;
            float sum = 0;
            for (int64_t i = 0; i < r.count; i++) {
                if (i == first) continue;
                const float size = std::max(fabsf(logits[i]), logits[best]);
                if (!((logits[best] - logits[i]) / size > 2 * r.jitter)) sum += expf(logits[i] - logits[best]);
            }
            to[n] = {best, 1 / sum};
            first = best;
        }
        return n;
    }

    void weigh(Chosen* to, int64_t n) {
        float sum = 0;
        for (int64_t i = 0; i < n; i++) sum += to[i].weight;
        const bool divided = r.normalized || r.scoring == kSoftmaxOfChosen;
        for (int64_t i = 0; i < n; i++) {
            if (divided) to[i].weight /= std::max(sum + r.added, r.floor);
            to[i].weight *= r.scale;
        }
    }
};

}  // namespace coreskip
