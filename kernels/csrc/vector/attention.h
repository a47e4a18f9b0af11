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
constexpr int kShare = kLanes == 16 ? 4 : 2;  // queries whose sums fit into registers
constexpr int kAbreast = 2;   // vectors of queries that have a lane each
constexpr int kWidest = 256;  // of a head whose keys are widened for these

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
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

// to[r] = fade[r] * to[r] + weight[r][0] * v[0] + ... for Q queries and `count` rows of values side by side, N vectors of
// them at a time: what goes through memory for every row waits for the row before. A query's weights are `Row` apart, those
// of the next query `Query` further on.
template <int Q, int N, int Query, int Row, class T>
__attribute__((always_inline)) static inline int64_t add_vectors(float* to, const T* v, const float* weight, int count,
                                                                 const float* fade, int64_t n, int64_t i) {
    for (; i + N * kLanes <= n; i += N * kLanes) {
        V sum[Q * N];
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < N; p++) sum[r * N + p] = load(to + r * n + i + p * kLanes) * fade[r];
        for (int row = 0; row < count; row++)
            for (int p = 0; p < N; p++) {
                const V value = load(v + row * n + i + p * kLanes);
                for (int r = 0; r < Q; r++) sum[r * N + p] += weight[r * Query + row * Row] * value;
            }
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < N; p++) store(to + r * n + i + p * kLanes, sum[r * N + p]);
    }
    return i;
}

template <int Q, int Query, int Row, class T>
static inline void add_rows(float* to, const T* v, const float* weight, int count, const float* fade, int64_t n) {
    int64_t i = add_vectors<Q, 4, Query, Row>(to, v, weight, count, fade, n, 0);
    i = add_vectors<Q, 1, Query, Row>(to, v, weight, count, fade, n, i);
    for (; i < n; i++)
        for (int r = 0; r < Q; r++) {
            to[r * n + i] *= fade[r];
            for (int row = 0; row < count; row++)
                to[r * n + i] += weight[r * Query + row * Row] * widened(v + row * n + i);
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

// What earlier sums come to once their greatest score is another one.
static inline V fading(V before, V most) { return before == most ? splat(1.f) : exp(before - most); }

// Q queries from the n-th on, which all see `count` positions from `from` on.
template <int Q, class T>
static inline void attend_stretch(const AttendJob& job, int n, int64_t from, int count) {
    const int64_t d = job.head_dim;
    const T* keys = static_cast<const T*>(job.keys) + from * d;
    const float* q = job.q + n * d;
    float score[Q * kStretch], fade[Q], lane[kLanes];
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
        store(lane, fading(splat(before), splat(most)));
        fade[r] = lane[0];
        job.sum[n + r] = job.sum[n + r] * fade[r] + total(sum);
        job.most[n + r] = most;
    }
    add_rows<Q, kStretch, 1>(job.value + n * d, static_cast<const T*>(job.values) + from * d, score, count, fade, d);
}

// Whether two queries see the same of the stretch that begins at `at`.
static inline bool same_stretch(const AttendJob& job, int a, int b, int64_t at) {
    const int64_t end = at + kStretch;
    const bool alike_from = job.from[a] == job.from[b] || (job.from[a] <= at && job.from[b] <= at);
    const bool alike_to = job.to[a] == job.to[b] || (job.to[a] >= end && job.to[b] >= end);
    return alike_from && alike_to;
}

// Queries `first` to `last`, one after the other or a few that see the same together, for the stretch that begins at `at`.
template <class T>
static inline void attend_few(const AttendJob& job, int first, int last, int64_t at) {
    for (int n = first, next; n < last; n = next) {
        const int64_t from = at > job.from[n] ? at : job.from[n];
        int64_t to = at + kStretch < job.end ? at + kStretch : job.end;
        if (to > job.to[n]) to = job.to[n];
        next = n + 1;
        if (from >= to) continue;
        while (next < last && next < n + kShare && same_stretch(job, n, next, at)) next++;
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

// ---- many queries: each has a lane of its own ----

// What `total` does to a vector's lanes, for many of these side by side: to[r] = the sum over lanes of part(lane, sums of
// all r), in the order in which `total` adds.
template <int N, int width, class Part>
__attribute__((always_inline)) static inline void total_by_lanes(int lane, Part part, V* to) {
    if constexpr (width == kLanes) {
        part(lane, to);
    } else {
        V other[N];
        total_by_lanes<N, 2 * width>(lane, part, to);
        total_by_lanes<N, 2 * width>(lane + width, part, other);
#pragma GCC unroll 16
        for (int r = 0; r < N; r++) to[r] += other[r];
    }
}

// Scores of Q vectors of queries at N positions, [N][Q vectors]: as dot_rows has them, to the bit.
template <int Q, int N>
__attribute__((always_inline)) static inline void dot_lanes(const float* q, int64_t apart, const float* k, int64_t d,
                                                            float* out) {
    V sum[Q * N];
    total_by_lanes<Q * N, 1>(0, [&](int lane, V* to) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < Q * N; r++) to[r] = V{};
        for (int64_t i = lane; i < d; i += kLanes) {
            V a[Q];
#pragma GCC unroll 16
            for (int r = 0; r < Q; r++) a[r] = load(q + i * apart + r * kLanes);
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) {
                const float b = k[j * d + i];
#pragma GCC unroll 16
                for (int r = 0; r < Q; r++) to[j * Q + r] += a[r] * b;
            }
        }
    }, sum);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++)
#pragma GCC unroll 16
        for (int r = 0; r < Q; r++) store(out + (j * Q + r) * kLanes, sum[j * Q + r]);
}

// What Q vectors of queries, from the n-th query on, add to their sums from one stretch: `count` positions from `at` on, of
// which each query sees those before its own end. whole: all see all of it; last: one past the last query.
template <int Q, bool whole, class T>
static inline void attend_lanes(const AttendJob& job, int n, int last, int64_t at, int count) {
    constexpr int width = Q * kLanes, N = 8 / Q;
    const int64_t d = job.head_dim, apart = turned_apart(job.queries);
    float score[kStretch * width], fade[width];
    const T* keys = static_cast<const T*>(job.keys) + at * d;
    float wide[same<T, float> ? 1 : kStretch * kWidest];
    const float* k = wide;
    if constexpr (same<T, float>) k = keys;
    else for (int64_t i = 0; i < count * d; i += kLanes) store(wide + i, load(keys + i));
    const float* q = job.turned + n;
    int done = 0;
    for (; done + N <= count; done += N) dot_lanes<Q, N>(q, apart, k + done * d, d, score + done * width);
    for (; done < count; done++) dot_lanes<Q, 1>(q, apart, k + done * d, d, score + done * width);
    for (; done < kStretch; done++)
        for (int p = 0; p < Q; p++) store(score + done * width + p * kLanes, splat(-HUGE_VALF));
    int seen[width];
    for (int r = 0; r < width; r++) {
        const int64_t own = whole ? count : job.from[n + r] > at ? 0 : job.to[n + r] - at;
        seen[r] = static_cast<int>(own < 0 ? 0 : own < count ? own : count);
    }
    for (int p = 0; p < Q; p++) {
        float *mine = score + p * kLanes, *tops = job.most + n + p * kLanes, *sums = job.sum + n + p * kLanes;
        VI sees;
        memcpy(&sees, seen + p * kLanes, sizeof sees);
        for (int i = 0; !whole && i < count; i++)
            store(mine + i * width, sees > i ? load(mine + i * width) : splat(-HUGE_VALF));
        const V before = load(tops);
        V highest[4] = {before, before, before, before};  // one would wait for itself
        for (int i = 0; i < kStretch; i += 4)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) highest[c] = greater(load(mine + (i + c) * width), highest[c]);
        const V most = greater(greater(highest[0], highest[1]), greater(highest[2], highest[3]));
        for (int i = 0; i < kStretch; i++) store(mine + i * width, exp(load(mine + i * width) - most));
        V sum;
        total_by_lanes<1, 1>(0, [&](int of, V* to) __attribute__((always_inline)) {
            *to = V{};
            for (int i = of; i < kStretch; i += kLanes) *to += load(mine + i * width);
        }, &sum);
        const V faded = fading(before, most);
        store(fade + p * kLanes, faded);
        store(tops, whole || sees > 0 ? most : before);
        store(sums, whole || sees > 0 ? load(sums) * faded + sum : load(sums));
    }
    const T* values = static_cast<const T*>(job.values) + at * d;
    const int queries = last - n < width ? last - n : width;
    for (int r = 0, next; r < queries; r = next) {
        next = r + 1;
        if (!seen[r]) continue;
        while (next < queries && next < r + kShare && seen[next] == seen[r]) next++;
        float* to = job.value + (n + r) * d;
        if (next == r + 4) add_rows<4, 1, width>(to, values, score + r, seen[r], fade + r, d);
        else if (next == r + 3) add_rows<3, 1, width>(to, values, score + r, seen[r], fade + r, d);
        else if (next == r + 2) add_rows<2, 1, width>(to, values, score + r, seen[r], fade + r, d);
        else add_rows<1, 1, width>(to, values, score + r, seen[r], fade + r, d);
    }
}

// One stretch for all queries, which lie turned; those that see it from its middle on go one by one.
template <class T>
static void attend_abreast(const AttendJob& job, int64_t at) {
    const int64_t end = at + kStretch < job.end ? at + kStretch : job.end;
    const int count = static_cast<int>(end - at);
    const int room = static_cast<int>(turned_apart(job.queries));
    for (int n = 0, last; n < job.queries; n = last) {
        last = n + kAbreast * kLanes < room ? n + kAbreast * kLanes : room;
        bool whole = true, begins = true;
        for (int r = n; r < last; r++) {
            whole &= (job.from[r] <= at) & (job.to[r] >= end);
            begins &= (job.from[r] <= at) | (job.from[r] >= end) | (job.to[r] <= at);
        }
        const int some = last < job.queries ? last : job.queries;
        if (!begins) attend_few<T>(job, n, some, at);
        else if (last - n < 2 * kLanes && whole) attend_lanes<1, true, T>(job, n, some, at, count);
        else if (last - n < 2 * kLanes) attend_lanes<1, false, T>(job, n, some, at, count);
        else if (whole) attend_lanes<2, true, T>(job, n, some, at, count);
        else attend_lanes<2, false, T>(job, n, some, at, count);
    }
}

// A task is one chunk of positions, aligned to kChunk: what a query sums, and in which order, depends on nothing but
// its own position, so that a token verified among others, or read in a prompt, gets the same bits as a token on its own.
template <class T>
static void attend_as(const AttendJob& job) {
    const int64_t d = job.head_dim;
    for (int n = 0; n < job.queries; n++) {
        job.most[n] = -HUGE_VALF;
        job.sum[n] = 0;
        memset(job.value + n * d, 0, d * sizeof(float));
    }
    const bool abreast = job.turned && d % kLanes == 0 && d <= kWidest && !job.more && !job.slopes && job.softcap <= 0;
    for (int64_t at = job.begin; at < job.end; at += kStretch) {
        if (abreast) attend_abreast<T>(job, at);
        else attend_few<T>(job, 0, job.queries, at);
    }
}

static void attend(const AttendJob& job) {
    if (job.dtype == kFloat32) attend_as<float>(job);
    else if (job.dtype == kBFloat16) attend_as<BF16>(job);
    else attend_as<F16>(job);
}

// to += weight[0] * v[0] + ... for `count` parts' values, N vectors of them at a time.
template <int N>
__attribute__((always_inline)) static inline int64_t add_parts(float* to, const float* const* v, const float* weight,
                                                               int count, int64_t n, int64_t i) {
    for (; i + N * kLanes <= n; i += N * kLanes) {
        V sum[N];
        for (int p = 0; p < N; p++) sum[p] = load(to + i + p * kLanes);
        for (int c = 0; c < count; c++)
            for (int p = 0; p < N; p++) sum[p] += weight[c] * load(v[c] + i + p * kLanes);
        for (int p = 0; p < N; p++) store(to + i + p * kLanes, sum[p]);
    }
    return i;
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
    for (int64_t p = 0; p < parts;) {
        const float* from[kLanes];
        float weight[kLanes] = {}, sums[kLanes];
        int count = 0;
        for (; p < parts && count < kLanes; p++) {
            if (sum[p * stride] == 0) continue;
            from[count] = value + p * stride * head_dim;
            weight[count] = most[p * stride] - top;
            sums[count++] = sum[p * stride];
        }
        store(weight, exp(load(weight)));
        for (int c = 0; c < count; c++) whole += weight[c] * sums[c];
        int64_t i = add_parts<4>(out, from, weight, count, head_dim, 0);
        i = add_parts<1>(out, from, weight, count, head_dim, i);
        for (; i < head_dim; i++)
            for (int c = 0; c < count; c++) out[i] += weight[c] * from[c][i];
    }
    for (int64_t i = 0; i < head_dim; i++) out[i] /= whole;
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
