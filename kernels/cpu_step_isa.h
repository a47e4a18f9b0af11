// The vector code of a decode step beyond products with whole rows: 4-bit groups, norms, rotation, attention.
// Included after cpu_isa.h, under its rules: once per instruction set, no C++ standard library.

#include "cpu_step.h"

namespace coreskip {
namespace CORESKIP_ISA {

// ---- memory to be read later ----

static inline void fetch(Ahead& ahead, int64_t bytes) {
    const char* from = static_cast<const char*>(later(ahead, bytes));
    for (int64_t i = 0; from && i < bytes; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// ---- groups of 4 or 8 bits ----

static inline VI as_lanes(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, sizeof word);
    return VI{} + word;
}

// The i-th nibble of every word.
static inline V nibble_of(VU words, int i) {
#if CORESKIP_LEVEL == 512
    // looks at four bits of each index: one operation where masking and converting takes two
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (V)_mm512_permutexvar_ps((__m512i)(words >> (4 * i)), numbers);
#else
    return __builtin_convertvector((VI)(words >> (4 * i) & 15), V);
#endif
}

// One group of kInt4: exact sums of q, and what they stand for.
struct Nibbles {
    static constexpr int bytes = kTileBytes, vectors = 4;

    static V number(VU words, int i) { return nibble_of(words, i); }
    static int input(int k, int i) { return 4 * k + i / 2 + i % 2 * (kGroup / 2); }
    static void ends(const uint8_t* w, int p, V& scale, V& least) {
        const F16* at = reinterpret_cast<const F16*>(w + vectors * kLine) + p * kLanes;
        scale = load(at), least = load(at + kTile);
    }

    template <int R>
    static void sums(const uint8_t* w, const int8_t* const* x, VI sum[R][kTile / kLanes]) {
        for (int k = 0; k < 4; k++)
            for (int p = 0; p < kTile / kLanes; p++) {
                const VB both = load_bytes(w + k * kLine + p * kVector);
                const VB low = both & 15, high = (VB)((VH2)both >> 4) & 15;
                for (int r = 0; r < R; r++) {
                    sum[r][p] = multiply_add(sum[r][p], low, (VB)as_lanes(x[r] + 4 * k));
                    sum[r][p] = multiply_add(sum[r][p], high, (VB)as_lanes(x[r] + 4 * k + kGroup / 2));
                }
            }
    }
    static V value(const uint8_t* w, int p, VI sum, float x_scale, float x_sum) {
        const F16* ends = reinterpret_cast<const F16*>(w + 4 * kLine) + p * kLanes;
        return load(ends) * x_scale * __builtin_convertvector(sum, V) + load(ends + kTile) * x_sum;
    }
};

// And of kInt8Groups. Without VNNI the bytes are multiplied as two nibbles.
struct Bytes {
    static constexpr int bytes = kTile8Bytes, vectors = 8;

    static V number(VU words, int i) { return weight_of(words, i); }
    static int input(int k, int i) { return 4 * k + i; }
    static void ends(const uint8_t* w, int p, V& scale, V& least) {
        scale = load(reinterpret_cast<const F16*>(w + vectors * kLine) + p * kLanes), least = V{};
    }

    template <int R>
    static void sums(const uint8_t* w, const int8_t* const* x, VI sum[R][kTile / kLanes]) {
        for (int k = 0; k < 8; k++)
            for (int p = 0; p < kTile / kLanes; p++) {
                const VB u = load_bytes(w + k * kLine + p * kVector);
                for (int r = 0; r < R; r++) {
                    const VB xs = (VB)as_lanes(x[r] + 4 * k);
                    if (CORESKIP_LEVEL == 512) {
                        sum[r][p] = multiply_add(sum[r][p], u, xs);
                    } else {
                        sum[r][p] = multiply_add(sum[r][p], u & 15, xs);
                        sum[r][p] += multiply_add(VI{}, (VB)((VH2)u >> 4) & 15, xs) * 16;
                    }
                }
            }
    }
    static V value(const uint8_t* w, int p, VI sum, float x_scale, float x_sum) {
        const F16* scales = reinterpret_cast<const F16*>(w + 8 * kLine) + p * kLanes;
        return load(scales) * (x_scale * __builtin_convertvector(sum, V) - 128.f * x_sum);
    }
};

// Adds one group's products to y. The weights are the very numbers that were packed, not factors apart from sums of
// integers: an infinity in x then does what it does in torch. Two sums a row, for one would wait for itself.
template <class G, int R>
static inline void add_whole(const uint8_t* w, const float* x, int64_t stride, V y[R][kTile / kLanes]) {
    for (int p = 0; p < kTile / kLanes; p++) {
        V scale, least, even[R] = {}, odd[R] = {};
        G::ends(w, p, scale, least);
        for (int k = 0; k < G::vectors; k++) {
            VU words;
            memcpy(&words, w + k * kLine + p * kVector, sizeof words);
#pragma GCC unroll 4
            for (int i = 0; i < kGroup / G::vectors; i += 2) {
                const V a = G::number(words, i) * scale + least, b = G::number(words, i + 1) * scale + least;
                for (int r = 0; r < R; r++) {
                    even[r] += a * x[r * stride + G::input(k, i)];
                    odd[r] += b * x[r * stride + G::input(k, i + 1)];
                }
            }
        }
        for (int r = 0; r < R; r++) y[r][p] += even[r] + odd[r];
    }
}

// Adds one group's products with x rounded to 8 bits to y.
template <class G, int R>
static inline void add_rounded(const TileJob& job, const uint8_t* w, int row, int64_t g, V y[R][kTile / kLanes]) {
    VI sum[R][kTile / kLanes] = {};
    const int8_t* x[R];
    for (int r = 0; r < R; r++) x[r] = job.q + ((row + r) * job.groups + g) * kGroup;
    G::template sums<R>(w, x, sum);
    for (int p = 0; p < kTile / kLanes; p++)
        for (int r = 0; r < R; r++) {
            const int64_t at = (row + r) * job.groups + g;
            y[r][p] += G::value(w, p, sum[r][p], job.scale[at], job.sum[at]);
        }
}

// kTile outputs for R rows.
template <class G, bool whole, int R>
static inline void tile(const TileJob& job, const uint8_t* w, int row, Ahead& ahead, float out[R][kTile]) {
    constexpr int parts = kTile / kLanes;
    V y[R][parts] = {};
    for (int64_t g = 0; g < job.groups; g++, w += G::bytes) {
        fetch(ahead, G::bytes);
        if (whole) add_whole<G, R>(w, job.x + (row * job.groups + g) * kGroup, job.groups * kGroup, y);
        else add_rounded<G, R>(job, w, row, g, y);
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < parts; p++) store(out[r] + p * kLanes, y[r][p]);
}

template <class G, bool whole, int R>
static inline void write_tile(const TileJob& job, int64_t t, int row, Ahead& ahead) {
    float out[R][kTile];
    Ahead none{};  // the first rows' tile has fetched what there is
    const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * job.groups * G::bytes;
    tile<G, whole, R>(job, w, row, row ? none : ahead, out);
    const int64_t first = t * kTile, count = job.out - first < kTile ? job.out - first : kTile;
    for (int r = 0; r < R; r++)
        for (int64_t i = 0; i < count; i++)
            job.y[(row + r) * job.out + first + i] = out[r][i] + (job.bias ? job.bias[first + i] : 0.f);
}

template <class G, bool whole>
static void tiles_of(const TileJob& job, int64_t begin, int64_t end) {
    Ahead ahead = *job.ahead;
    if constexpr (whole && kLanes == kTile) {
        // taking weights apart costs as much as to multiply two rows with them: once for all rows
        constexpr decltype(&write_tile<G, whole, 1>) write[] = {
            write_tile<G, whole, 1>, write_tile<G, whole, 2>, write_tile<G, whole, 3>, write_tile<G, whole, 4>,
            write_tile<G, whole, 5>, write_tile<G, whole, 6>, write_tile<G, whole, 7>, write_tile<G, whole, 8>,
        };
        for (int64_t t = begin; t < end; t++) write[job.rows - 1](job, t, 0, ahead);
        *job.ahead = ahead;
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int row = 0;
        for (; row + 4 <= job.rows; row += 4) write_tile<G, whole, 4>(job, t, row, ahead);
        for (; row + 2 <= job.rows; row += 2) write_tile<G, whole, 2>(job, t, row, ahead);
        for (; row < job.rows; row++) write_tile<G, whole, 1>(job, t, row, ahead);
    }
    *job.ahead = ahead;
}

template <class G>
static void tiles_by(const TileJob& job, int64_t begin, int64_t end) {
    if (job.x) tiles_of<G, true>(job, begin, end);
    else tiles_of<G, false>(job, begin, end);
}

static void tiles(const TileJob& job, int64_t begin, int64_t end) {
    if (job.bytes) tiles_by<Bytes>(job, begin, end);
    else tiles_by<Nibbles>(job, begin, end);
}

// Each group of x on its own, as `quantize` does it, to the bit: x is about scale * q. n is a multiple of kGroup. Written
// out in vectors, as GCC leaves the search for the largest one by one: 8 % of a step over the embedded model in 4 bits.
static void quantize_groups(const float* x, int64_t n, int8_t* q, float* scale, float* sum) {
    constexpr int parts = kGroup / kLanes;
    for (int64_t g = 0; g < n / kGroup; g++, x += kGroup, q += kGroup) {
        V most = {};
        VI odd = {};
        for (int p = 0; p < parts; p++) {
            const V v = load(x + p * kLanes), size = v < 0.f ? -v : v;
            most = size > most ? size : most;
            odd |= v - v != 0.f;
        }
        const float largest = greatest(most);
        const bool finite = total(odd) == 0, some = finite && largest >= 1e-30f;
        const float step = some ? largest / 127.f : 1.f;
        VI total_q = {};
        for (int p = 0; p < parts; p++) {
            const V scaled = some ? load(x + p * kLanes) / step : V{};
            const VI rounded = __builtin_convertvector((scaled + 0x1.8p23f) - 0x1.8p23f, VI);
            const VQ bytes = __builtin_convertvector(rounded, VQ);
            memcpy(q + p * kLanes, &bytes, sizeof bytes);
            total_q += rounded;
        }
        scale[g] = finite ? (some ? step : 0.f) : NAN;
        sum[g] = scale[g] * static_cast<float>(total(total_q));
    }
}

// ---- norms, rotation, activations ----

static inline float sum_of_products(const float* a, const float* b, int64_t n) {
    V sum = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
    float result = total(sum);
    for (; i < n; i++) result += a[i] * b[i];
    return result;
}

static void norm(const StepNorm& job, const float* x, float* y) {
    const int64_t n = job.size;
    float mean = 0;
    if (job.kind == kLayer) {
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= static_cast<float>(n);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
        x = y;
    }
    const float scale = 1.f / sqrtf(sum_of_products(x, x, n) / static_cast<float>(n) + job.eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * job.weight[i] + (job.bias ? job.bias[i] : 0.f);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

static void act(float* gate, const float* up, int64_t n, int kind) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V value = activate(load(gate + i), kind);
        store(gate + i, up ? value * load(up + i) : value);
    }
    if (i == n) return;
    float a[kLanes] = {}, b[kLanes] = {};
    memcpy(a, gate + i, (n - i) * sizeof(float));
    if (up) memcpy(b, up + i, (n - i) * sizeof(float));
    const V value = activate(load(a), kind);
    store(a, up ? value * load(b) : value);
    memcpy(gate + i, a, (n - i) * sizeof(float));
}

static void add_scaled(float* to, const float* from, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += scale * from[i];
}

static inline V tanh_of(V x) { return 1.f - 2.f / (1.f + exp(x + x)); }

static void softcap(float* x, float scale, float cap, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t count = n - i < kLanes ? n - i : kLanes;
        float lane[kLanes] = {};
        memcpy(lane, x + i, count * sizeof(float));
        V v = load(lane) * scale;
        if (cap > 0) v = tanh_of(v / cap) * cap;
        store(lane, v);
        memcpy(x + i, lane, count * sizeof(float));
    }
}

static int64_t argmax(const float* x, int64_t n) {
    V most = splat(-HUGE_VALF);
    VI odd = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V v = load(x + i);
        most = v > most ? v : most;
        odd |= v != v;
    }
    float top = greatest(most);
    bool strange = total(odd & 1) != 0;
    for (; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        strange |= x[i] != x[i];
    }
    for (i = 0; i < n; i++)
        if (strange ? x[i] != x[i] : x[i] == top) return i;
    return 0;
}

// The sum of e^(x - most): what softmax divides by.
static float exp_sum(const float* x, int64_t n, float most) {
    V sum = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += exp(load(x + i) - most);
    float last[kLanes];
    for (int k = 0; k < kLanes; k++) last[k] = i + k < n ? x[i + k] : -HUGE_VALF;
    return total(sum + exp(load(last) - most));
}

// ---- attention ----

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
    for (int j = 0; j < N; j++) {
        out[j] = total(sum[j]);
        for (int64_t rest = i; rest < n; rest++) out[j] += q[rest] * widened(k + j * n + rest);
    }
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

#include "cpu_untile_isa.h"

namespace coreskip {
namespace CORESKIP_ISA {

static const StepIsa step_table = {
    tiles, quantize_groups, norm, rotate, attend, merge, act, add_scaled, softcap, fetch, argmax, exp_sum, untile, tile_up,
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
