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

// out[n] = q . k[n] for N rows of keys side by side. Several at once: the sum over one vector's lanes waits for each
// of its additions.
template <int N, class T>
static inline void dot_rows(const float* q, const T* k, int64_t n, float* out) {
    V sum[N] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V a = load(q + i);
        for (int j = 0; j < N; j++) sum[j] += a * load(k + j * n + i);
    }
    totals<N>(sum, out);
    for (int j = 0; j < N; j++)
        for (int64_t rest = i; rest < n; rest++) out[j] += q[rest] * widened(k + j * n + rest);
}

template <class T>
static inline void add_row(float* to, const T* v, float weight, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + weight * load(v + i));
    for (; i < n; i++) to[i] += weight * widened(v + i);
}

// to = fade * to + weight[0] * v[0] + ... for `count` rows of values side by side, N vectors of them at a time: what
// goes through memory for every row waits for the row before.
template <int N, class T>
static inline int64_t add_vectors(float* to, const T* v, const float* weight, int count, float fade, int64_t n,
                                  int64_t i) {
    for (; i + N * kLanes <= n; i += N * kLanes) {
        V sum[N];
        for (int p = 0; p < N; p++) sum[p] = load(to + i + p * kLanes) * fade;
        for (int row = 0; row < count; row++)
            for (int p = 0; p < N; p++) sum[p] += weight[row] * load(v + row * n + i + p * kLanes);
        for (int p = 0; p < N; p++) store(to + i + p * kLanes, sum[p]);
    }
    return i;
}

template <class T>
static inline void add_rows(float* to, const T* v, const float* weight, int count, float fade, int64_t n) {
    int64_t i = add_vectors<4>(to, v, weight, count, fade, n, 0);
    i = add_vectors<1>(to, v, weight, count, fade, n, i);
    for (; i < n; i++) {
        to[i] *= fade;
        for (int row = 0; row < count; row++) to[i] += weight[row] * widened(v + row * n + i);
    }
}

// A task is one chunk of positions, aligned to kChunk: what a query sums, and in which order, depends on nothing but
// its own position, so that a token verified among others gets the same bits as a token on its own.
template <class T>
static void attend_as(const AttendJob& job) {
    constexpr int step = 32;
    const int64_t d = job.head_dim;
    const T* keys = static_cast<const T*>(job.keys);
    const T* values = static_cast<const T*>(job.values);
    for (int n = 0; n < job.queries; n++) {
        job.most[n] = -HUGE_VALF;
        job.sum[n] = 0;
        memset(job.value + n * d, 0, d * sizeof(float));
    }
    for (int64_t at = job.begin; at < job.end; at += step)
        for (int n = 0; n < job.queries; n++) {
            int64_t from = at > job.from[n] ? at : job.from[n], to = at + step < job.end ? at + step : job.end;
            if (to > job.to[n]) to = job.to[n];
            if (from >= to) continue;
            float score[step];
            float most = job.most[n];
            const int count = static_cast<int>(to - from);
            int done = 0;
            for (; done + 4 <= count; done += 4) {
                if (n == 0) fetch(*job.ahead, 2 * 4 * d * sizeof(T));
                dot_rows<4>(job.q + n * d, keys + (from + done) * d, d, score + done);
            }
            for (; done < count; done++) dot_rows<1>(job.q + n * d, keys + (from + done) * d, d, score + done);
            if (job.softcap > 0) softcap(score, 1.f, job.softcap, count);
            // a NaN has to reach the output, as it would in torch: this comparison lets it through to the sums
            for (int i = 0; i < count; i++) most = score[i] > most ? score[i] : most;
            const float fade = job.most[n] == most ? 1.f : expf(job.most[n] - most);
            for (int i = count; i < step; i++) score[i] = -HUGE_VALF;
            for (int i = 0; i < step; i += kLanes) store(score + i, exp(load(score + i) - most));
            float sum = 0;
            for (int i = 0; i < count; i++) sum += score[i];
            add_rows(job.value + n * d, values + from * d, score, count, fade, d);
            job.sum[n] = job.sum[n] * fade + sum;
            job.most[n] = most;
        }
}

static void attend(const AttendJob& job) {
    if (job.dtype == kFloat32) attend_as<float>(job);
    else if (job.dtype == kBFloat16) attend_as<BF16>(job);
    else attend_as<F16>(job);
}

// One query's output from its parts, which lie `stride` queries apart.
static void merge(int64_t parts, int64_t stride, const float* most, const float* sum, const float* value,
                  int64_t head_dim, float* out) {
    float top = -HUGE_VALF, whole = 0;
    // a part that this query did not see has no greatest score: what lies there is another step's
    for (int64_t p = 0; p < parts; p++)
        if (sum[p * stride] != 0 && most[p * stride] > top) top = most[p * stride];
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
