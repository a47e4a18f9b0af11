// One token's step of a recurrence. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// `m` vectors of columns of the state: each column is a sum of its own, whatever lies beside it.
template <int m> static inline void recall_columns(const RecallJob& job, int64_t at) {
    float* const state = job.state + at;
    V read[m] = {}, change[m], out[m] = {};
    for (int64_t i = 0; i < job.keys; i++)
        for (int j = 0; j < m; j++) {
            float* place = state + i * job.values + j * kLanes;
            const V kept = load(place) * job.decay;
            store(place, kept);
            read[j] += kept * job.k[i];
        }
    for (int j = 0; j < m; j++) change[j] = (load(job.v + at + j * kLanes) - read[j]) * job.rate;
    for (int64_t i = 0; i < job.keys; i++)
        for (int j = 0; j < m; j++) {
            float* place = state + i * job.values + j * kLanes;
            const V kept = load(place) + change[j] * job.k[i];
            store(place, kept);
            out[j] += kept * job.q[i];
        }
    for (int j = 0; j < m; j++) store(job.out + at + j * kLanes, out[j]);
}

static void recall(const RecallJob& job) {
    int64_t at = 0;
    for (; at + 4 * kLanes <= job.values; at += 4 * kLanes) recall_columns<4>(job, at);
    for (; at + kLanes <= job.values; at += kLanes) recall_columns<1>(job, at);
    for (; at < job.values; at++) {
        float read = 0, out = 0;
        for (int64_t i = 0; i < job.keys; i++) read += (job.state[i * job.values + at] *= job.decay) * job.k[i];
        const float change = (job.v[at] - read) * job.rate;
        for (int64_t i = 0; i < job.keys; i++) out += (job.state[i * job.values + at] += change * job.k[i]) * job.q[i];
        job.out[at] = out;
    }
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
