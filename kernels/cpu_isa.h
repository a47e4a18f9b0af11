// The vector code, written once and compiled once per instruction set: the including file chooses the target,
// then defines CORESKIP_ISA (a namespace), CORESKIP_NAME and CORESKIP_LEVEL (0, 2 for AVX2, 512 for AVX-512: the
// compiler's own macros do not follow a target pragma reliably). Vectors are the compiler's own (vector_size), so
// that any CPU has this code; intrinsics appear only where GCC 12 makes poor code from them.
//
// This file and its includers must not use the C++ standard library: an inline function compiled here for
// AVX-512 could be the copy that the linker keeps for every caller, on every machine.

#include <math.h>
#include <string.h>

#include "cpu.h"

namespace coreskip {
namespace CORESKIP_ISA {

#if CORESKIP_LEVEL == 512
constexpr int kVector = 64;
#elif CORESKIP_LEVEL == 2
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kLanes = kVector / 4;

typedef float V __attribute__((vector_size(kVector)));
typedef int32_t VI __attribute__((vector_size(kVector)));
typedef uint32_t VU __attribute__((vector_size(kVector)));
typedef uint16_t VH __attribute__((vector_size(kVector / 2)));

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

static inline V splat(float value) { return V{} + value; }
static inline VU bits_of(V v) { return (VU)v; }

// ---- loads and stores: every format computes in fp32 ----

static inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline VH load_halves(const void* p) {
    VH h;
    memcpy(&h, p, sizeof h);
    return h;
}

// GCC 12 widens halves through two shuffles where one instruction does it: twice the time of a dense bf16 layer.
static inline VU load_wide(const void* p) {
#if CORESKIP_LEVEL == 512
    return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif CORESKIP_LEVEL == 2
    return (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(load_halves(p), VU);
#endif
}

static inline V load(const BF16* p) { return (V)(load_wide(p) << 16); }

static inline V load(const F16* p) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_cvtph_ps((__m256i)load_halves(p));
#elif CORESKIP_LEVEL == 2
    return (V)_mm256_cvtph_ps((__m128i)load_halves(p));
#else
    // Moving exponent and mantissa into place leaves the exponent 112 too small; the product puts that right,
    // for subnormal halves too. Infinities and NaNs get the exponent 255 back by hand.
    VU h = load_wide(p);
    VU magnitude = (h & 0x7fff) << 13;
    VU finite = bits_of((V)magnitude * splat(0x1p112f));
    VU special = magnitude | 0x7f800000;
    VU value = (VI)(h & 0x7c00) == 0x7c00 ? special : finite;
    return (V)(value | (h & 0x8000) << 16);
#endif
}

// Two vectors from 2 * kLanes consecutive weights. For bf16 they are the even and the odd ones, as the two halves of
// 32-bit words (`arrange` puts x in that order): one operation each, where widening in order takes two.
template <class W>
static inline void load_pair(const W* p, V& a, V& b) {
    a = load(p);
    b = load(p + kLanes);
}

static inline void load_pair(const BF16* p, V& a, V& b) {
    VU words;
    memcpy(&words, p, sizeof words);
    a = (V)(words << 16);
    b = (V)(words & 0xffff0000);
}

static inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

static inline void store(BF16* p, V v) {
    VU u = bits_of(v);
    VU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    VU quiet = (u >> 16) | 0x40;  // rounding a NaN could carry it into an infinity
    VH h = __builtin_convertvector(v == v ? rounded : quiet, VH);
    memcpy(p, &h, sizeof h);
}

static inline void store(F16* p, V v) {
#if CORESKIP_LEVEL == 512
    VH h = (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif CORESKIP_LEVEL == 2
    VH h = (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    VU u = bits_of(v);
    VU magnitude = u & 0x7fffffff;
    VU normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // 0.5 has the spacing of subnormal halves, so that adding it rounds to one.
    VU subnormal = bits_of((V)magnitude + 0.5f) - 0x3f000000;
    VU value = magnitude < 0x38800000 ? subnormal : normal;
    value = magnitude >= 0x47800000 ? VU{} + 0x7c00 : value;
    value = magnitude > 0x7f800000 ? VU{} + 0x7e00 : value;
    VH h = __builtin_convertvector(value | (u >> 16 & 0x8000), VH);
#endif
    memcpy(p, &h, sizeof h);
}

static inline float total(V v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

// ---- activations ----

// Within 2 ulp of e^x; infinity above the range, NaN for NaN. libm's scalar expf took 8 % of a dense layer's time.
static inline V exp(V x) {
    x = x < -104.f ? splat(-104.f) : x;
    x = x > 89.f ? splat(89.f) : x;
    const float magic = 0x1.8p23f;  // adding and subtracting it rounds to an integer
    V n = (x * 0x1.715476p0f + magic) - magic;
    V r = x - n * 0x1.62e400p-1f;  // ln 2 in two parts, the first short enough to multiply exactly
    r = r - n * 0x1.7f7d1cp-20f;
    V p = splat(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    // 2^n in two factors: n may be 128 or below -126, where one factor would not be a normal number.
    VI whole = __builtin_convertvector(n, VI), half = whole >> 1;
    return p * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}

static inline V sigmoid_times(V x, V y) { return x / (1.f + exp(-y)); }

static inline V erf_gelu(V x) {
    float lane[kLanes];
    store(lane, x * 0x1.6a09e6p-1f);
    for (int i = 0; i < kLanes; i++) lane[i] = erff(lane[i]);
    return 0.5f * x * (1.f + load(lane));
}

static inline V activate(V x, int act) {
    switch (act) {
        case kSilu: return sigmoid_times(x, x);
        case kGelu: return erf_gelu(x);
        // 1 + tanh(y) is 2 sigmoid(2y)
        case kGeluTanh: return sigmoid_times(x, 2 * 0x1.988454p-1f * (x + 0.044715f * x * x * x));
        default: {
            V positive = x < 0.f ? V{} : x;  // this order keeps NaN
            return act == kRelu2 ? positive * positive : positive;
        }
    }
}

// ---- the two inner loops ----

static inline void prefetch(const void* p) {
    for (int i = 0; i < kPad; i += kLine) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// out[n][r] = w[n] . x[r] for N weight rows and R rows of x. While it reads w it prefetches `next`, the rows that
// a later block will read, into the second level: on scattered rows the hardware prefetcher is always a row late.
// Measured on 576 x 1536 in bf16: none 19, into the first level 21, into the second 29 GB/s.
template <class W, int N, int R>
static inline void dots(const W* const* w, const W* const* next, const float* x, int64_t stride, float out[N][R]) {
    constexpr int run = kPad / sizeof(W);
    V sum[N][R] = {};
    for (int64_t j = 0; j < stride; j += run) {
        for (int n = 0; n < N; n++) prefetch(next[n] + j);
        for (int64_t i = j; i < j + run; i += 2 * kLanes) {
            V a[R], b[R];
            for (int r = 0; r < R; r++) {
                a[r] = load(x + r * stride + i);
                b[r] = load(x + r * stride + i + kLanes);
            }
            for (int n = 0; n < N; n++) {
                V c, d;
                load_pair(w[n] + i, c, d);
                for (int r = 0; r < R; r++) sum[n][r] += c * a[r];
                for (int r = 0; r < R; r++) sum[n][r] += d * b[r];
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) out[n][r] = total(sum[n][r]);
}

// acc[r] += h[r][n] * w[n], the down projection of N neurons; h has one row of kMaxBlock per row of x.
template <class W, int N, int R>
static inline void accumulate(const W* const* w, const W* const* next, const float* h, int64_t stride, float* acc) {
    constexpr int run = kPad / sizeof(W);
    for (int64_t j = 0; j < stride; j += run) {
        for (int n = 0; n < N; n++) prefetch(next[n] + j);
        for (int64_t i = j; i < j + run; i += 2 * kLanes) {
            V a[N], b[N];
            for (int n = 0; n < N; n++) load_pair(w[n] + i, a[n], b[n]);
            for (int r = 0; r < R; r++) {
                float* to = acc + r * stride + i;
                V c = load(to), d = load(to + kLanes);
                for (int n = 0; n < N; n++) {
                    c += a[n] * h[r * kMaxBlock + n];
                    d += b[n] * h[r * kMaxBlock + n];
                }
                store(to, c);
                store(to + kLanes, d);
            }
        }
    }
}

// ---- the MLP ----

// One block of neurons: where each bundle lies now and in the next block, and the activations in between.
template <class W>
struct Block {
    const MlpJob& job;
    int size;
    int64_t neuron[kMaxBlock];
    const W* bundle[kMaxBlock];
    const W* next[kMaxBlock];
    float gate[kMaxRows * kMaxBlock], up[kMaxRows * kMaxBlock];

    explicit Block(const MlpJob& j) : job(j) {}

    int64_t at(int64_t i) const { return job.list ? job.list[i] : i; }
    const W* address(int64_t i) const {
        return static_cast<const W*>(job.weight) + at(i) * (job.gated ? 3 : 2) * job.stride;
    }
    int64_t up_offset() const { return job.gated ? job.stride : 0; }
    int64_t down_offset() const { return up_offset() + job.stride; }

    void place(int64_t begin, int64_t end) {
        size = end - begin < job.block ? end - begin : job.block;
        for (int n = 0; n < size; n++) {
            int64_t ahead = begin + job.ahead + n;
            neuron[n] = at(begin + n);
            bundle[n] = address(begin + n);
            next[n] = address(ahead < end ? ahead : end - 1);
        }
    }

    template <int N, int R>
    void project(int n, int row) {
        const float* x = job.x + row * job.stride;
        const W *w[2 * N], *ahead[2 * N];
        const int parts = job.gated ? 2 : 1;
        for (int i = 0; i < N; i++)
            for (int p = 0; p < parts; p++) {
                w[i * parts + p] = bundle[n + i] + p * job.stride;
                ahead[i * parts + p] = row == 0 ? next[n + i] + p * job.stride : w[i * parts + p];
            }
        float out[2 * N][R];
        if (job.gated) dots<W, 2 * N, R>(w, ahead, x, job.stride, out);
        else dots<W, N, R>(w, ahead, x, job.stride, out);
        for (int i = 0; i < N; i++)
            for (int r = 0; r < R; r++) {
                int at = (row + r) * kMaxBlock + n + i;
                gate[at] = out[i * parts][r];
                up[at] = out[i * parts + parts - 1][r];
            }
    }

    template <int R>
    void project_rows(int row) {
        int n = 0;
        for (; n + 2 <= size; n += 2) project<2, R>(n, row);
        for (; n < size; n++) project<1, R>(n, row);
    }

    void add_bias(const float* bias, float* values) {
        if (!bias) return;
        for (int r = 0; r < job.rows; r++)
            for (int n = 0; n < size; n++) values[r * kMaxBlock + n] += bias[neuron[n]];
    }

    void apply_act() {
        for (int r = 0; r < job.rows; r++)
            for (int n = 0; n < size; n += kLanes) {
                float *g = gate + r * kMaxBlock + n, *u = up + r * kMaxBlock + n;
                store(u, job.gated ? activate(load(g), job.act) * load(u) : activate(load(u), job.act));
            }
    }

    template <int N, int R>
    void expand(int n, int row, float* acc) {
        const W *w[N], *ahead[N];
        for (int i = 0; i < N; i++) {
            w[i] = bundle[n + i] + down_offset();
            ahead[i] = row == 0 ? next[n + i] + down_offset() : w[i];
        }
        accumulate<W, N, R>(w, ahead, up + row * kMaxBlock + n, job.stride, acc + row * job.stride);
    }

    template <int R>
    void expand_rows(int row, float* acc) {
        int n = 0;
        for (; n + 4 <= size; n += 4) expand<4, R>(n, row, acc);
        for (; n < size; n++) expand<1, R>(n, row, acc);
    }

    // Rows with lists of their own: a row that does not want a neuron must not see it, not even as 0 * infinity.
    void expand_selected(float* acc) {
        for (int n = 0; n < size; n++)
            for (int r = 0; r < job.rows; r++)
                if (job.selected[neuron[n] * job.rows + r]) expand<1, 1>(n, r, acc);
    }
};

template <class W>
static void mlp(const MlpJob& job, int64_t begin, int64_t end, float* acc) {
    Block<W> block(job);
    memset(block.gate, 0, sizeof block.gate);  // lanes beyond the block are computed, then ignored
    memset(block.up, 0, sizeof block.up);
    for (int64_t i = begin; i < end; i += block.size) {
        block.place(i, end);
        int row = 0;
        for (; row + 4 <= job.rows; row += 4) block.template project_rows<4>(row);
        for (; row + 2 <= job.rows; row += 2) block.template project_rows<2>(row);
        for (; row < job.rows; row++) block.template project_rows<1>(row);
        block.add_bias(job.gate_bias, block.gate);
        block.add_bias(job.up_bias, block.up);
        block.apply_act();
        if (job.selected) {
            block.expand_selected(acc);
            continue;
        }
        row = 0;
        for (; row + 4 <= job.rows; row += 4) block.template expand_rows<4>(row, acc);
        for (; row + 2 <= job.rows; row += 2) block.template expand_rows<2>(row, acc);
        for (; row < job.rows; row++) block.template expand_rows<1>(row, acc);
    }
}

// ---- linear ----

template <class W, int N, int R>
static inline void outputs(const LinearJob& job, int64_t at, int64_t end, int row) {
    const W *w[N], *next[N];
    for (int n = 0; n < N; n++) {
        int64_t ahead = at + 2 * N + n;
        w[n] = static_cast<const W*>(job.weight) + (at + n) * job.stride;
        next[n] = static_cast<const W*>(job.weight) + (ahead < end ? ahead : end - 1) * job.stride;
    }
    float out[N][R];
    dots<W, N, R>(w, next, job.x + row * job.stride, job.stride, out);
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++)
            job.y[(row + r) * job.out_features + at + n] = out[n][r] + (job.bias ? job.bias[at + n] : 0.f);
}

template <class W, int N>
static inline void outputs_of_rows(const LinearJob& job, int64_t at, int64_t end) {
    int row = 0;
    for (; row + 4 <= job.rows; row += 4) outputs<W, N, 4>(job, at, end, row);
    for (; row + 2 <= job.rows; row += 2) outputs<W, N, 2>(job, at, end, row);
    for (; row < job.rows; row++) outputs<W, N, 1>(job, at, end, row);
}

template <class W>
static void linear(const LinearJob& job, int64_t begin, int64_t end) {
    int64_t at = begin;
    for (; at + 4 <= end; at += 4) outputs_of_rows<W, 4>(job, at, end);
    for (; at < end; at++) outputs_of_rows<W, 1>(job, at, end);
}

// ---- conversions ----

template <class From, class To>
static void convert(const From* from, To* to, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i == n) return;
    From last_from[kLanes] = {};
    To last_to[kLanes];
    memcpy(last_from, from + i, (n - i) * sizeof(From));
    store(last_to, load(last_from));
    memcpy(to + i, last_to, (n - i) * sizeof(To));
}

static void to_float(const void* from, int dtype, float* to, int64_t n) {
    if (dtype == kBFloat16) convert(static_cast<const BF16*>(from), to, n);
    else if (dtype == kFloat16) convert(static_cast<const F16*>(from), to, n);
    else memcpy(to, from, n * sizeof(float));
}

static void from_float(const float* from, void* to, int dtype, int64_t n) {
    if (dtype == kBFloat16) convert(from, static_cast<BF16*>(to), n);
    else if (dtype == kFloat16) convert(from, static_cast<F16*>(to), n);
    else memcpy(to, from, n * sizeof(float));
}

// Puts the even numbers of each group of 2 * kLanes before the odd ones, in place; `restore` undoes it.
static void arrange(float* x, int64_t n) {
    float odd[kLanes];
    for (float* group = x; group < x + n; group += 2 * kLanes) {
        for (int i = 0; i < kLanes; i++) odd[i] = group[2 * i + 1];
        for (int i = 0; i < kLanes; i++) group[i] = group[2 * i];
        memcpy(group + kLanes, odd, sizeof odd);
    }
}

static void restore(float* x, int64_t n) {
    float mixed[2 * kLanes];
    for (float* group = x; group < x + n; group += 2 * kLanes) {
        for (int i = 0; i < kLanes; i++) {
            mixed[2 * i] = group[i];
            mixed[2 * i + 1] = group[kLanes + i];
        }
        memcpy(group, mixed, sizeof mixed);
    }
}

static void add(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// Reads memory and does nothing with it: what a kernel could reach at best.
static uint64_t read(const void* memory, int64_t bytes) {
    typedef uint64_t VL __attribute__((vector_size(kVector)));
    constexpr int streams = 4;
    VL sum[streams] = {};
    const char* p = static_cast<const char*>(memory);
    for (int64_t i = 0; i + streams * kVector <= bytes; i += streams * kVector)
        for (int s = 0; s < streams; s++) {
            VL v;
            memcpy(&v, p + i + s * kVector, sizeof v);
            sum[s] += v;
        }
    VL all = sum[0] + sum[1] + sum[2] + sum[3];
    uint64_t result = 0;
    for (int i = 0; i < kVector / 8; i++) result += all[i];
    return result;
}

static const Isa table = {
    CORESKIP_NAME,
    {mlp<float>, mlp<BF16>, mlp<F16>},
    {linear<float>, linear<BF16>, linear<F16>},
    to_float,
    from_float,
    arrange,
    restore,
    add,
    read,
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
