// Attention of some queries over a stretch of the KV cache. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

template <class T>
static inline float widened(const T* p) {
    float lane[kLanes];
    T few[kLanes] = {};
    few[0] = *p;
    store(lane, load(few));
    return lane[0];
}

constexpr int kStretch = 32;  // positions whose scores are at hand together
constexpr int kBrought = 16;  // positions between a key's fetch into the first cache level and its use

// out[r][j] = q[r] . k[j] for Q queries and N rows of keys side by side; rows of `out` are kStretch apart. Several at
// once: the sum over one vector's lanes waits for each of its additions.
template <int Q, int N, class T>
__attribute__((always_inline)) static inline void dot_rows(const float* q, const T* k, int64_t n, float* out) {
    V sum[Q * N] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        V b[N];
        for (int j = 0; j < N; j++) b[j] = load(k + j * n + i);
        for (int r = 0; r < Q; r++) {
            const V a = load(q + r * n + i);
            for (int j = 0; j < N; j++) sum[r * N + j] += a * b[j];
        }
    }
    float dots[Q * N];
    totals<Q * N>(sum, dots);
    for (int r = 0; r < Q; r++)
        for (int j = 0; j < N; j++) {
            for (int64_t rest = i; rest < n; rest++) dots[r * N + j] += q[r * n + rest] * widened(k + j * n + rest);
            out[r * kStretch + j] = dots[r * N + j];
        }
}

template <class T>
static inline void add_row(float* to, const T* v, float weight, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + weight * load(v + i));
    for (; i < n; i++) to[i] += weight * widened(v + i);
}

// to[r] = fade[r] * to[r] + weight[r][0] * v[0] + ... for Q queries and `count` rows of values side by side, N vectors of
// them at a time: what goes through memory for every row waits for the row before.
template <int Q, int N, class T>
__attribute__((always_inline)) static inline int64_t add_vectors(float* to, const T* v, const float* weight, int count,
                                                                 const float* fade, int64_t n, int64_t i) {
    for (; i + N * kLanes <= n; i += N * kLanes) {
        V sum[Q * N];
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < N; p++) sum[r * N + p] = load(to + r * n + i + p * kLanes) * fade[r];
        for (int row = 0; row < count; row++)
            for (int p = 0; p < N; p++) {
                const V value = load(v + row * n + i + p * kLanes);
                for (int r = 0; r < Q; r++) sum[r * N + p] += weight[r * kStretch + row] * value;
            }
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < N; p++) store(to + r * n + i + p * kLanes, sum[r * N + p]);
    }
    return i;
}

template <int Q, class T>
static inline void add_rows(float* to, const T* v, const float* weight, int count, const float* fade, int64_t n) {
    int64_t i = add_vectors<Q, 4>(to, v, weight, count, fade, n, 0);
    i = add_vectors<Q, 1>(to, v, weight, count, fade, n, i);
    for (; i < n; i++)
        for (int r = 0; r < Q; r++) {
            to[r * n + i] *= fade[r];
            for (int row = 0; row < count; row++) to[r * n + i] += weight[r * kStretch + row] * widened(v + row * n + i);
        }
}

// The second part of scores.
template <int Q, class T>
static inline void add_more(const AttendJob& job, int n, int64_t from, int count, float* score) {
    const int64_t d = job.more_dim;
    const T* keys = static_cast<const T*>(job.more_keys) + from * d;
    float more[Q * kStretch];
    for (int i = 0; i < count; i++) {
        dot_rows<Q, 1>(job.more + n * d, keys + i * d, d, more + i);
        for (int r = 0; r < Q; r++) score[r * kStretch + i] += more[r * kStretch + i];
    }
}

// Fetches into the first cache level what is read a little later: entries of several sequences, which are many, came in at
// 28 GB/s for 43. With keys 8 to 32 positions ahead a step of 16 sequences takes 0.91 of the time, with 64 as long as ever.
static inline void bring(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 3);
}

// Q queries from the n-th on, which all see `count` positions from `from` on.
template <int Q, class T>
static inline void attend_stretch(const AttendJob& job, int n, int64_t from, int count) {
    const int64_t d = job.head_dim;
    const T* keys = static_cast<const T*>(job.keys) + from * d;
    const float* q = job.q + n * d;
    float score[Q * kStretch], fade[Q];
    int done = 0;
    for (; done + 4 <= count; done += 4) {
        if (n == 0) {
            fetch(*job.ahead, 2 * 4 * d * sizeof(T));
            bring(keys + (done + kBrought) * d, 4 * d * sizeof(T));
            bring(static_cast<const T*>(job.values) + (from + done) * d, 4 * d * sizeof(T));
        }
        dot_rows<Q, 4>(q, keys + done * d, d, score + done);
    }
    for (; done < count; done++) dot_rows<Q, 1>(q, keys + done * d, d, score + done);
    if (job.more) add_more<Q, T>(job, n, from, count, score);
    for (int r = 0; r < Q; r++) {
        float* mine = score + r * kStretch;
        if (job.softcap > 0) softcap(mine, 1.f, job.softcap, count);
        if (job.slopes) {
            const float slope = job.slopes[(n + r) % job.slope_count];
            const int64_t ahead = from + 1 - job.to[n + r];  // of the first position, from the query's own
            for (int i = 0; i < count; i++) mine[i] += slope * static_cast<float>(ahead + i);
        }
        for (int i = count; i < kStretch; i++) mine[i] = -HUGE_VALF;
        const float before = job.most[n + r];
        V highest = splat(before), sum = {};
        // a NaN has to reach the output, as it would in torch: this comparison lets it through to the sums
        for (int i = 0; i < kStretch; i += kLanes) highest = load(mine + i) > highest ? load(mine + i) : highest;
        const float most = greatest(highest);
        for (int i = 0; i < kStretch; i += kLanes) {
            const V weight = exp(load(mine + i) - most);
            store(mine + i, weight);
            sum += weight;
        }
        fade[r] = before == most ? 1.f : expf(before - most);
        job.sum[n + r] = job.sum[n + r] * fade[r] + total(sum);
        job.most[n + r] = most;
    }
    add_rows<Q>(job.value + n * d, static_cast<const T*>(job.values) + from * d, score, count, fade, d);
}

// Whether two queries see the same of the stretch that begins at `at`.
static inline bool same_stretch(const AttendJob& job, int a, int b, int64_t at) {
    const int64_t end = at + kStretch;
    const bool alike_from = job.from[a] == job.from[b] || (job.from[a] <= at && job.from[b] <= at);
    const bool alike_to = job.to[a] == job.to[b] || (job.to[a] >= end && job.to[b] >= end);
    return alike_from && alike_to;
}

// A task is one chunk of positions, aligned to kChunk: what a query sums, and in which order, depends on nothing but
// its own position, so that a token verified among others gets the same bits as a token on its own. Queries that see the
// same positions share what is loaded of them: a prompt of 2,048 tokens took 1.36 s for 1.93.
template <class T>
static void attend_as(const AttendJob& job) {
    constexpr int kShare = kLanes == 16 ? 4 : 2;  // queries whose sums fit into registers
    const int64_t d = job.head_dim;
    for (int n = 0; n < job.queries; n++) {
        job.most[n] = -HUGE_VALF;
        job.sum[n] = 0;
        memset(job.value + n * d, 0, d * sizeof(float));
    }
    for (int64_t at = job.begin; at < job.end; at += kStretch)
        for (int n = 0, next; n < job.queries; n = next) {
            const int64_t from = at > job.from[n] ? at : job.from[n];
            int64_t to = at + kStretch < job.end ? at + kStretch : job.end;
            if (to > job.to[n]) to = job.to[n];
            next = n + 1;
            if (from >= to) continue;
            while (next < job.queries && next < n + kShare && same_stretch(job, n, next, at)) next++;
            const int count = static_cast<int>(to - from);
            if constexpr (kShare == 4) {
                if (next == n + 4) attend_stretch<4, T>(job, n, from, count);
                else if (next == n + 3) attend_stretch<3, T>(job, n, from, count);
                else if (next == n + 2) attend_stretch<2, T>(job, n, from, count);
                else attend_stretch<1, T>(job, n, from, count);
            } else {
                if (next == n + 2) attend_stretch<2, T>(job, n, from, count);
                else attend_stretch<1, T>(job, n, from, count);
            }
        }
}

static void attend(const AttendJob& job) {
    if (job.dtype == kFloat32) attend_as<float>(job);
    else if (job.dtype == kBFloat16) attend_as<BF16>(job);
    else attend_as<F16>(job);
}

// One query's output from its parts, which lie `stride` queries apart.
static void merge(int64_t parts, int64_t stride, const float* most, const float* sum, const float* value,
                  int64_t head_dim, float* out, const float* sink) {
    float top = sink ? *sink : -HUGE_VALF, whole = 0;
    // a part that this query did not see has no greatest score: what lies there is another step's
    for (int64_t p = 0; p < parts; p++)
        if (sum[p * stride] != 0 && most[p * stride] > top) top = most[p * stride];
    if (sink) whole = expf(*sink - top);
    memset(out, 0, head_dim * sizeof(float));
    for (int64_t p = 0; p < parts; p++) {
        if (sum[p * stride] == 0) continue;
        const float weight = expf(most[p * stride] - top);
        whole += weight * sum[p * stride];
        add_row(out, value + p * stride * head_dim, weight, head_dim);
    }
    for (int64_t i = 0; i < head_dim; i++) out[i] /= whole;
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
