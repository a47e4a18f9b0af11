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
#ifdef CORESKIP_BF16
constexpr bool kPaired = true;
#else
constexpr bool kPaired = false;
#endif

typedef float V __attribute__((vector_size(kVector)));
typedef int32_t VI __attribute__((vector_size(kVector)));
typedef uint32_t VU __attribute__((vector_size(kVector)));
typedef uint16_t VH __attribute__((vector_size(kVector / 2)));
typedef uint16_t VH2 __attribute__((vector_size(kVector)));
typedef uint8_t VB __attribute__((vector_size(kVector)));

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct U8 { uint8_t bits; };      // a weight and 128
struct Sliced { uint8_t bits; };  // nibbles of two weights; U8 in the down row

// What a weight format computes with: X are the rows of x, Sum their products, Down the format of the down rows.
template <class W> struct Format { typedef float X; typedef float Sum; typedef V Lanes; typedef W Down; static constexpr bool sliced = false, paired = false; };
template <> struct Format<BF16> { typedef float X; typedef float Sum; typedef V Lanes; typedef BF16 Down; static constexpr bool sliced = false, paired = kPaired; };
template <> struct Format<U8> { typedef int8_t X; typedef int32_t Sum; typedef VI Lanes; typedef U8 Down; static constexpr bool sliced = false; };
template <> struct Format<Sliced> { typedef int8_t X; typedef int32_t Sum; typedef VI Lanes; typedef U8 Down; static constexpr bool sliced = true; };

static inline const float* input(const Rows& rows, float) { return rows.x; }
static inline const int8_t* input(const Rows& rows, int8_t) { return rows.q; }

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

// byte k of every 32-bit word, minus 128: put below the exponent of 2^23 a byte is that much more, and the difference
// is exact. Measured on rows of 576, four at a time: 25 ns a row, with conversions of sign-extended bytes 28.
static inline V weight_of(VU words, int k) {
    return (V)((words >> (8 * k) & 0xff) | 0x4b000000) - (0x1p23f + 128);
}

static inline VB load_bytes(const void* p) {
    VB v;
    memcpy(&v, p, sizeof v);
    return v;
}

// sum[i] += u[4i] * s[4i] + ... + u[4i + 3] * s[4i + 3], u unsigned, s signed. Without VNNI u must be below 16 (or
// the pairs would overflow 16 bits), which is why `dots` then takes bytes apart.
static inline VI multiply_add(VI sum, VB u, VB s) {
#if CORESKIP_LEVEL == 512
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif CORESKIP_LEVEL == 2
    __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
    return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    typedef int16_t VS __attribute__((vector_size(kVector)));
    VS even = (VS)(u & (VB)(VU{} + 0x00ff00ff)) * ((VS)s << 8 >> 8);
    VS odd = (VS)((VH2)u >> 8) * ((VS)s >> 8);
    VS pairs = even + odd;
    return sum + ((VI)pairs << 16 >> 16) + ((VI)pairs >> 16);
#endif
}

static inline int32_t total(VI v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_add_epi32((__m512i)v);
#endif
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) sum += v[i];
    return sum;
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

// `total` of each, four at a time: the same additions in the same order, on full vectors. Always inlined: sums whose
// address is taken would live in memory while they are added up (8 rows in bf16: 25 ms for 15).
template <int N>
__attribute__((always_inline)) static inline void totals(const V* v, float* out) {
    int n = 0;
#if CORESKIP_LEVEL == 512
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    for (; n + 4 <= N; n += 4) {
        const __m512 a = (__m512)v[n], b = (__m512)v[n + 1], c = (__m512)v[n + 2], d = (__m512)v[n + 3];
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
        _mm_storeu_ps(out + n, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
    }
#endif
    for (; n < N; n++) out[n] = total(v[n]);
}

// Of integers one by one: in a sketched layer of 576 x 1536 four at a time take 2 to 5 % longer.
template <int N>
__attribute__((always_inline)) static inline void totals(const VI* v, int32_t* out) {
    for (int n = 0; n < N; n++) out[n] = total(v[n]);
}

typedef int8_t VQ __attribute__((vector_size(kLanes)));

static inline float greatest(V v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
    return lane[0];
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

// sum[n][r] = w[n] . x[r], lane by lane, for N weight rows and R rows of x. While it reads w it prefetches `next`, the rows
// that a later block will read, into the second level: on scattered rows the hardware prefetcher is always a row late.
// Measured on 576 x 1536 in bf16: none 19, into the first level 21, into the second 29 GB/s.
template <class W, int N, int R>
__attribute__((always_inline)) static inline void add_products(const W* const* w, const W* const* next, const float* x,
                                                               int64_t stride, V* sum) {
    constexpr int run = kPad / sizeof(W);
    int64_t j = 0;
    do {  // stride > 0: a loop that might not run would keep the sums in memory
        for (int n = 0; n < N; n++) prefetch(next[n] + j);
        for (int64_t i = j; i < j + run; i += 2 * kLanes) {
#ifdef CORESKIP_BF16  // x is bf16, too, in order: `arrange`
            if constexpr (Format<W>::paired) {
                VH2 words[N];
                for (int n = 0; n < N; n++) memcpy(&words[n], w[n] + i, sizeof words[n]);
                for (int r = 0; r < R; r++) {
                    VH2 xs;
                    memcpy(&xs, reinterpret_cast<const BF16*>(x + r * stride) + i, sizeof xs);
                    for (int n = 0; n < N; n++)
                        sum[n * R + r] = (V)_mm512_dpbf16_ps((__m512)sum[n * R + r], (__m512bh)xs, (__m512bh)words[n]);
                }
                continue;
            }
#endif
            V c[N], d[N];
            for (int n = 0; n < N; n++) load_pair(w[n] + i, c[n], d[n]);
            for (int r = 0; r < R; r++) {
                const V a = load(x + r * stride + i), b = load(x + r * stride + i + kLanes);
                for (int n = 0; n < N; n++) sum[n * R + r] += c[n] * a;
                for (int n = 0; n < N; n++) sum[n * R + r] += d[n] * b;
            }
        }
        j += run;
    } while (j < stride);
}

// The same for nibbles: in each run of kPad weights the low nibbles are the first half, the high ones the second.
template <class W, int N, int R>
__attribute__((always_inline)) static inline void add_products(const Sliced* const* w, const Sliced* const* next,
                                                               const int8_t* x, int64_t stride, VI* sum) {
    for (int64_t j = 0; j < stride; j += kPad) {
        for (int n = 0; n < N; n++) __builtin_prefetch(next[n] + j / 2, 0, 2);
        for (int64_t i = j; i < j + kPad / 2; i += kVector)
            for (int n = 0; n < N; n++) {
                VB both = load_bytes(w[n] + i - j / 2);
                for (int r = 0; r < R; r++) {
                    VI& to = sum[n * R + r];
                    to = multiply_add(to, both & 15, load_bytes(x + r * stride + i));
                    to = multiply_add(to, (VB)((VH2)both >> 4) & 15, load_bytes(x + r * stride + i + kPad / 2));
                }
            }
    }
}

// And for bytes.
template <class W, int N, int R>
__attribute__((always_inline)) static inline void add_products(const U8* const* w, const U8* const* next, const int8_t* x,
                                                               int64_t stride, VI* sum) {
    VI high[N * R] = {};
    for (int64_t j = 0; j < stride; j += kLine) {
        for (int n = 0; n < N; n++) __builtin_prefetch(next[n] + j, 0, 2);
        for (int64_t i = j; i < j + kLine; i += kVector)
            for (int n = 0; n < N; n++) {
                VB u = load_bytes(w[n] + i);
                for (int r = 0; r < R; r++) {
                    VB xs = load_bytes(x + r * stride + i);
                    if (CORESKIP_LEVEL == 512) {
                        sum[n * R + r] = multiply_add(sum[n * R + r], u, xs);
                    } else {
                        sum[n * R + r] = multiply_add(sum[n * R + r], u & 15, xs);
                        high[n * R + r] = multiply_add(high[n * R + r], (VB)((VH2)u >> 4) & 15, xs);
                    }
                }
            }
    }
    for (int i = 0; i < N * R; i++) sum[i] += high[i] * 16;
}

// out[n][r] = w[n] . x[r] for N weight rows, `together` of them side by side.
template <class W, int N, int R, int together>
__attribute__((always_inline)) static inline void dots(const W* const* w, const W* const* next,
                                                       const typename Format<W>::X* x, int64_t stride,
                                                       typename Format<W>::Sum out[N][R]) {
    typename Format<W>::Lanes sum[N * R] = {};
    for (int n = 0; n < N; n += together) add_products<W, together, R>(w + n, next + n, x, stride, sum + n * R);
    totals<N * R>(sum, out[0]);
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

template <class W, int N, int R>
static inline void accumulate(const U8* const* w, const U8* const* next, const float* h, int64_t stride, float* acc) {
    V factor[N][R];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) factor[n][r] = splat(h[r * kMaxBlock + n]);
    for (int64_t j = 0; j < stride; j += kLine) {
        for (int n = 0; n < N; n++) __builtin_prefetch(next[n] + j, 0, 2);
        for (int64_t i = j; i < j + kLine; i += 4 * kLanes) {
            VU words[N];
            for (int n = 0; n < N; n++) memcpy(&words[n], w[n] + i, sizeof words[n]);
            for (int k = 0; k < 4; k++) {
                V ws[N];
                for (int n = 0; n < N; n++) ws[n] = weight_of(words[n], k);
                for (int r = 0; r < R; r++) {
                    float* to = acc + r * stride + i + k * kLanes;
                    V sum = load(to);
                    for (int n = 0; n < N; n++) sum += ws[n] * factor[n][r];
                    store(to, sum);
                }
            }
        }
    }
}

// ---- the MLP ----

// What a sum of products stands for: itself, or, for integers, scales times what remains without the 128s.
static inline float value(float sum, const Rows&, int, const float*, int64_t) { return sum; }
static inline float value(int32_t sum, const Rows& rows, int row, const float* scale, int64_t at) {
    return static_cast<float>(sum - 128 * rows.sum[row]) * (rows.scale[row] * scale[at]);
}

// Calls f<R>(row) for all rows, in groups of 4, 2 and 1.
#define CORESKIP_FOR_ROWS(call)                                 \
    {                                                           \
        int row = 0;                                            \
        for (; row + 4 <= job.rows.count; row += 4) call(4);    \
        for (; row + 2 <= job.rows.count; row += 2) call(2);    \
        for (; row < job.rows.count; row++) call(1);            \
    }

// One block of neurons: where each bundle lies now and where the one to prefetch, and the activations in between.
template <class W>
struct Block {
    typedef typename Format<W>::X X;
    typedef typename Format<W>::Sum Sum;
    typedef typename Format<W>::Down Down;
    static constexpr bool sliced = Format<W>::sliced;

    const MlpJob& job;
    const int64_t stride, rows;
    const int projections;      // gate and up, or up alone
    const int64_t row_size;     // bytes or numbers of W in one projection's row
    int size = 0;
    int64_t neuron[kMaxBlock];
    const W* bundle[kMaxBlock];
    const W* next[kMaxBlock];
    float gate[kMaxRows * kMaxBlock] = {}, up[kMaxRows * kMaxBlock] = {};

    explicit Block(const MlpJob& j)
        : job(j), stride(j.rows.stride), rows(j.rows.count), projections(j.gated ? 2 : 1),
          row_size(sliced ? stride / 2 : stride) {}

    // after: what is read behind the last bundle, in the same steps; 0: not known.
    void place(const void* base, int64_t bundle_size, int64_t begin, int64_t end, uintptr_t after, int64_t step) {
        size = end - begin < job.block ? end - begin : job.block;
        for (int n = 0; n < size; n++) {
            const int64_t ahead = begin + job.ahead + n;
            neuron[n] = at(begin + n);
            bundle[n] = static_cast<const W*>(base) + neuron[n] * bundle_size;
            next[n] = static_cast<const W*>(base) + at(ahead < end ? ahead : end - 1) * bundle_size;
            if (ahead >= end && after) next[n] = reinterpret_cast<const W*>(after + (ahead - end) * step);
        }
    }
    int64_t at(int64_t i) const { return job.list ? job.list[i] : i; }
    int64_t down_offset() const { return projections * row_size; }
    float scaled(Sum sum, int row, int n, int part) const {
        return value(sum, job.rows, row, job.scale, neuron[n] * (projections + 1) + part);
    }

    // The products of N neurons' rows `first`.. with R rows of x. Inlined, int8 layers of 576 x 1536 take 5 % longer.
    template <int N, int P, int R>
    __attribute__((noinline)) void multiply(int n, int row, int first, Sum out[N * P][R]) {
        const W *w[N * P], *ahead[N * P];
        for (int i = 0; i < N * P; i++) {
            w[i] = bundle[n + i / P] + (first + i % P) * row_size;
            ahead[i] = row == 0 ? next[n + i / P] + (first + i % P) * row_size : w[i];
        }
        dots<W, N * P, R, N * P>(w, ahead, input(job.rows, X()) + row * stride, stride, out);
    }

    // The projections of N neurons, minus the gate where a scan has left it.
    template <int N, int P, int R>
    void project(int n, int row) {
        Sum out[N * P][R];
        multiply<N, P, R>(n, row, projections - P, out);
        for (int i = 0; i < N; i++)
            for (int r = row; r < row + R; r++) {
                const int64_t to = r * kMaxBlock + n + i;
                gate[to] = P == 2 ? scaled(finish(out[i * P][r - row], n + i, 0, r), r, n + i, 0)
                                  : job.known_gate ? job.known_gate[neuron[n + i] * rows + r] : 0.f;
                const int last = projections - 1;
                up[to] = scaled(finish(out[i * P + P - 1][r - row], n + i, last, r), r, n + i, last);
            }
    }

    // Adds the high plane's share, which a scan has left.
    Sum finish(Sum sum, int n, int part, int row) const {
        if (!sliced) return sum;
        return sum + 16 * job.high[(neuron[n] * projections + part) * rows + row];
    }

    template <int P, int R>
    void project_rows(int row) {
        int n = 0;
        for (; n + 2 <= size; n += 2) project<2, P, R>(n, row);
        for (; n < size; n++) project<1, P, R>(n, row);
    }

    void project_all() {
#define CORESKIP_CALL(R) job.gated && !job.known_gate ? project_rows<2, R>(row) : project_rows<1, R>(row)
        CORESKIP_FOR_ROWS(CORESKIP_CALL)
#undef CORESKIP_CALL
    }

    void add_bias(const float* bias, float* values) const {
        if (!bias) return;
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n++) values[r * kMaxBlock + n] += bias[neuron[n]];
    }

    // Leaves act(gate) * up, or act(up), in `up`.
    void apply_act() {
        if (!job.known_gate) add_bias(job.gate_bias, gate);
        add_bias(job.up_bias, up);
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n += kLanes) {
                float *g = gate + r * kMaxBlock + n, *u = up + r * kMaxBlock + n;
                store(u, job.gated ? activate(load(g), job.act) * load(u) : activate(load(u), job.act));
            }
    }

    void subtract_mean() {
        for (int r = 0; job.mean && r < rows; r++)
            for (int n = 0; n < size; n++) up[r * kMaxBlock + n] -= job.mean[neuron[n]];
    }

    void scale_down_rows() {
        for (int r = 0; job.scale && r < rows; r++)
            for (int n = 0; n < size; n++)
                up[r * kMaxBlock + n] *= job.scale[neuron[n] * (projections + 1) + projections];
    }

    template <int N, int R>
    void expand_some(int n, int row, float* acc) {
        const Down *w[N], *ahead[N];
        for (int i = 0; i < N; i++) {
            w[i] = reinterpret_cast<const Down*>(bundle[n + i] + down_offset());
            ahead[i] = row == 0 ? reinterpret_cast<const Down*>(next[n + i] + down_offset()) : w[i];
        }
        accumulate<Down, N, R>(w, ahead, up + row * kMaxBlock + n, stride, acc + row * stride);
    }

    template <int R>
    void expand_rows(int row, float* acc) {
        int n = 0;
        for (; n + 4 <= size; n += 4) expand_some<4, R>(n, row, acc);
        for (; n < size; n++) expand_some<1, R>(n, row, acc);
    }

    // Rows with lists of their own: a row that does not want a neuron must not see it, not even as 0 * infinity.
    void expand_selected(float* acc) {
        bool fetched[kMaxBlock] = {};
        for (int r = 0; r < rows; r++) {
            int wanted[kMaxBlock + 1], count = 0, i = 0;
            for (int n = 0; n < size; n++) {
                wanted[count] = n;
                count += job.selected[neuron[n] * rows + r];
            }
            for (; i + 4 <= count; i += 4) expand_wanted<4>(wanted + i, r, fetched, acc);
            for (; i + 2 <= count; i += 2) expand_wanted<2>(wanted + i, r, fetched, acc);
            for (; i < count; i++) expand_wanted<1>(wanted + i, r, fetched, acc);
        }
    }

    // N neurons for one row, whose sum is then read and written once for all of them. Whichever row comes first to a
    // neuron prefetches: every bundle is some row's.
    template <int N>
    void expand_wanted(const int* wanted, int row, bool* fetched, float* acc) {
        const Down *w[N], *ahead[N];
        float h[N];
        for (int i = 0; i < N; i++) {
            const int n = wanted[i];
            w[i] = reinterpret_cast<const Down*>(bundle[n] + down_offset());
            ahead[i] = fetched[n] ? w[i] : reinterpret_cast<const Down*>(next[n] + down_offset());
            fetched[n] = true;
            h[i] = up[row * kMaxBlock + n];
        }
        accumulate<Down, N, 1>(w, ahead, h, stride, acc + row * stride);
    }

    void expand(float* acc) {
#define CORESKIP_CALL(R) expand_rows<R>(row, acc)
        if (job.selected) expand_selected(acc);
        else CORESKIP_FOR_ROWS(CORESKIP_CALL)
#undef CORESKIP_CALL
    }

    // ---- neurons that their exact scores drop ----

    // Appends those that stay to the job's list and activations, from `kept` on. Returns how many were dropped.
    int64_t drop_small(int64_t& kept) {
        int64_t dropped = 0;
        bool stays[kMaxRows * kMaxBlock];
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n++) {
                const bool wanted = !job.selected || job.selected[neuron[n] * rows + r];
                const bool small = fabsf(up[r * kMaxBlock + n]) * job.norm[neuron[n]] < job.refine;
                stays[r * kMaxBlock + n] = wanted && !small;  // a NaN stays: it has to reach the output
                dropped += wanted && small;
            }
        scale_down_rows();
        for (int n = 0; n < size; n++) {
            bool any = false;
            for (int r = 0; r < rows; r++) {
                any |= stays[r * kMaxBlock + n];
                job.exact[kept * rows + r] = up[r * kMaxBlock + n];
                if (job.selected) job.selected[neuron[n] * rows + r] = stays[r * kMaxBlock + n];
            }
            job.list[kept] = neuron[n];
            kept += any;
        }
        return dropped;
    }

    // Makes the last blocks prefetch the first down rows that will be wanted: those of `kept` from `first` on.
    void look_ahead(const void* base, int64_t bundle_size, int64_t begin, int64_t end, int64_t first, int64_t kept) {
        for (int n = 0; n < size; n++) {
            const int64_t i = first + begin + job.ahead + n - end;
            if (i >= first && i < kept) next[n] = static_cast<const W*>(base) + at(i) * bundle_size + down_offset();
        }
    }

    // Puts back what `drop_small` has left at `begin` and after.
    void recall(int64_t begin) {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n++) up[r * kMaxBlock + n] = job.exact[(begin + n) * rows + r];
    }

    // ---- a scan: the projections that decide which neurons to keep ----

    template <int N, int P, int R>
    void look(int n, int row) {
        Sum out[N * P][R];
        multiply<N, P, R>(n, row, 0, out);
        for (int i = 0; i < N; i++)
            for (int r = row; r < row + R; r++) {
                const int64_t to = r * kMaxBlock + n + i;
                for (int p = 0; sliced && p < P; p++)
                    job.high[(neuron[n + i] * P + p) * rows + r] = out[i * P + p][r - row];
                gate[to] = estimate(out[i * P][r - row], r, n + i, 0);
                up[to] = estimate(out[i * P + P - 1][r - row], r, n + i, P - 1);
            }
    }

    // A low nibble that has not been read counts as 7.5, the middle of its range.
    float estimate(Sum sum, int row, int n, int part) const {
        if (!sliced) return scaled(sum, row, n, part);
        const int32_t others = job.rows.sum[row];
        const float product = static_cast<float>(16 * sum - 128 * others) + 7.5f * static_cast<float>(others);
        return product * (job.rows.scale[row] * job.scale[neuron[n] * (projections + 1) + part]);
    }

    template <int P, int R>
    void look_rows(int row) {
        int n = 0;
        for (; n + 2 <= size; n += 2) look<2, P, R>(n, row);
        for (; n < size; n++) look<1, P, R>(n, row);
    }

    void look_at_all() {
#define CORESKIP_CALL(R) sliced && job.gated ? look_rows<2, R>(row) : look_rows<1, R>(row)
        CORESKIP_FOR_ROWS(CORESKIP_CALL)
#undef CORESKIP_CALL
    }

    void score_gates() {
        add_bias(job.gate_bias, gate);
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n += kLanes) {
                store(up + r * kMaxBlock + n, activate(load(gate + r * kMaxBlock + n), job.act));
                for (int i = n; i < size && i < n + kLanes; i++)
                    job.known_gate[neuron[i] * rows + r] = gate[r * kMaxBlock + i];
            }
    }

    void write_scores() const {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < size; n++)
                job.score[r * job.neurons + neuron[n]] =
                    fabsf(up[r * kMaxBlock + n]) * (job.rule == kSketch ? job.norm[neuron[n]] : 1.f);
    }
};

template <class W>
static int64_t mlp(const MlpJob& job, int64_t begin, int64_t end, float* acc) {
    Block<W> block(job);
    const void* base = block.sliced ? job.low : job.weight;
    const int64_t bundle_size = block.down_offset() + block.stride;
    int64_t kept = begin, dropped = 0;
    for (int64_t i = begin; i < end; i += block.size) {
        block.place(base, bundle_size, i, end, job.after, bundle_size * sizeof(W));
        if (job.refine > 0) block.look_ahead(base, bundle_size, i, end, begin, kept);
        block.project_all();
        block.apply_act();
        block.subtract_mean();
        if (job.refine > 0) {
            dropped += block.drop_small(kept);
            continue;
        }
        block.scale_down_rows();
        block.expand(acc);
    }
    // Down rows only now: the block that would prefetch them does not know yet which will be wanted.
    const uintptr_t after = job.after ? job.after - block.down_offset() : 0;
    for (int64_t i = begin; i < kept; i += block.size) {
        block.place(base, bundle_size, i, kept, after, block.stride);
        block.recall(i);
        block.expand(acc);
    }
    return dropped;
}

template <class W>
static void scan(const MlpJob& job, int64_t begin, int64_t end) {
    Block<W> block(job);
    const int64_t bundle_size = block.down_offset() + (block.sliced ? 0 : block.stride);
    for (int64_t i = begin; i < end; i += block.size) {
        block.place(job.weight, bundle_size, i, end, job.after, bundle_size * sizeof(W));
        block.look_at_all();
        if (job.rule == kListed) continue;
        if (job.rule == kGate) block.score_gates();
        else block.apply_act();
        block.write_scores();
    }
}

// ---- the columns of a matrix that a sparse input wants ----

template <class W, int N>
static inline void add_columns(const ColumnsJob& job, int64_t at, int64_t end, int row, float* acc) {
    constexpr int lead = 16;  // columns between a prefetch and its use
    const W *w[N], *next[N];
    float h[N];
    for (int n = 0; n < N; n++) {
        const int64_t ahead = at + lead + n;
        w[n] = static_cast<const W*>(job.weight) + job.list[at + n] * job.stride;
        next[n] = static_cast<const W*>(job.weight) + job.list[ahead < end ? ahead : end - 1] * job.stride;
        h[n] = job.x[row * job.inputs + job.list[at + n]];
    }
    accumulate<W, N, 1>(w, next, h, job.width, acc + row * job.width);
}

template <class W>
static void columns(const ColumnsJob& job, int64_t begin, int64_t end, float* acc) {
    int64_t at = begin;
    for (; job.rows == 1 && at + 4 <= end; at += 4) add_columns<W, 4>(job, at, end, 0, acc);
    for (; at < end; at++)
        for (int r = 0; r < job.rows; r++)
            if (job.selected[job.list[at] * job.rows + r]) add_columns<W, 1>(job, at, end, r, acc);
}

// ---- linear ----

// What is to be fetched while so many bytes are read, or null.
static inline const void* later(Ahead& ahead, int64_t bytes) {
    if (ahead.at >= ahead.end) ahead = {ahead.then, ahead.then_end, 0, 0};
    if (ahead.at >= ahead.end) return nullptr;
    ahead.at += bytes;
    return reinterpret_cast<const void*>(ahead.at - bytes);
}

template <class W, int N, int R>
static inline void outputs(const LinearJob& job, int64_t at, int64_t end, int row) {
    const int64_t stride = job.rows.stride;
    const W *w[N], *next[N];
    for (int n = 0; n < N; n++) {
        int64_t ahead = at + 2 * N + n;
        w[n] = static_cast<const W*>(job.weight) + (at + n) * stride;
        next[n] = static_cast<const W*>(job.weight) + (ahead < end ? ahead : end - 1) * stride;
        if (!job.ahead) continue;
        const void* other = row == 0 ? later(*job.ahead, stride * sizeof(W)) : nullptr;
        next[n] = other ? static_cast<const W*>(other) : w[n];
    }
    typename Format<W>::Sum out[N][R];
    // The hardware follows one stream through memory better than several: row after row, rows of 576 in fp32 come in at
    // 39 GB/s a core, four side by side at 29, in bf16 at 37 for 29. From 3 rows of x on the products take longer than
    // that, and in long rows of floats every addition waits for the last one (8192 in fp32: 29 for 34).
    typedef typename Format<W>::X X;
    constexpr int alone = R <= 2 ? 1 : N;
    const X* x = input(job.rows, X()) + row * stride;
    if (sizeof(X) == 1 || stride <= 4096) dots<W, N, R, alone>(w, next, x, stride, out);
    else dots<W, N, R, N>(w, next, x, stride, out);
    for (int n = 0; n < N; n++)
        for (int r = row; r < row + R; r++)
            job.y[r * job.out_features + at + n] =
                value(out[n][r - row], job.rows, r, job.scale, at + n) + (job.bias ? job.bias[at + n] : 0.f);
}

// N outputs of all rows, at most four at a time: so many sums fit into registers. Rows are divided evenly (7 rows as
// 4 + 2 + 1 took longer than 8).
template <class W, int N>
static inline void outputs_of_rows(const LinearJob& job, int64_t at, int64_t end) {
    switch (job.rows.count) {
        case 1: return outputs<W, N, 1>(job, at, end, 0);
        case 2: return outputs<W, N, 2>(job, at, end, 0);
        case 3: return outputs<W, N, 3>(job, at, end, 0);
        case 4: return outputs<W, N, 4>(job, at, end, 0);
        case 5: outputs<W, N, 3>(job, at, end, 0); return outputs<W, N, 2>(job, at, end, 3);
        case 6: outputs<W, N, 3>(job, at, end, 0); return outputs<W, N, 3>(job, at, end, 3);
        case 7: outputs<W, N, 4>(job, at, end, 0); return outputs<W, N, 3>(job, at, end, 4);
        default: outputs<W, N, 4>(job, at, end, 0); return outputs<W, N, 4>(job, at, end, 4);
    }
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

// x is about scale * q, |q| <= 127. A row with an infinity or a NaN becomes NaN. A division, as in the torch
// definition: a product would be contracted with the rounding sum, and round ties differently. n is a multiple of kLine.
// Written out in vectors, as in `quantize_groups`: 1536 numbers took 1.9 us, of the 60 of an int8 layer.
static void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
    V most = {};
    VI odd = {}, total_q = {};
    for (int64_t i = 0; i < n; i += kLanes) {
        const V v = load(x + i), size = v < 0.f ? -v : v;
        most = size > most ? size : most;
        odd |= v - v != 0.f;
    }
    const float largest = greatest(most);
    const bool finite = total(odd) == 0, some = finite && largest >= 1e-30f;
    const float step = some ? largest / 127.f : 1.f;
    for (int64_t i = 0; i < n; i += kLanes) {
        const V scaled = some ? load(x + i) / step : V{};
        const VI rounded = __builtin_convertvector((scaled + 0x1.8p23f) - 0x1.8p23f, VI);
        const VQ bytes = __builtin_convertvector(rounded, VQ);
        memcpy(q + i, &bytes, sizeof bytes);
        total_q += rounded;
    }
    *scale = finite ? (some ? step : 0.f) : NAN;
    *sum = total(total_q);
}

// Weights are expanded to fp32 by the position in their 32-bit word: number i * ways + k is number i of vector k.
static int ways(int dtype) { return dtype == kBFloat16 ? 2 : dtype >= kInt8 ? 4 : 1; }

static void arrange(float* x, int64_t n, int dtype) {
    if (kPaired && dtype == kBFloat16) {
        convert(x, reinterpret_cast<BF16*>(x), n);  // in place: what is written lies before what is still to be read
        return;
    }
    const int count = ways(dtype);
    float mixed[4 * kLanes];
    for (float* group = x; count > 1 && group < x + n; group += count * kLanes) {
        for (int k = 0; k < count; k++)
            for (int i = 0; i < kLanes; i++) mixed[k * kLanes + i] = group[i * count + k];
        memcpy(group, mixed, count * kLanes * sizeof(float));
    }
}

// a[0] b[0] a[1] b[1] and so on, the second half in b.
static inline void interleave(V& a, V& b) {
    VI first, second;
    for (int i = 0; i < kLanes; i++) {
        first[i] = i / 2 + i % 2 * kLanes;
        second[i] = first[i] + kLanes / 2;
    }
    const V both = __builtin_shuffle(a, b, first);
    b = __builtin_shuffle(a, b, second);
    a = both;
}

static void restore(float* x, int64_t n, int dtype) {
    const int count = ways(dtype);
    for (float* group = x; count > 1 && group < x + n; group += count * kLanes) {
        V part[4];
        for (int k = 0; k < count; k++) part[k] = load(group + k * kLanes);
        if (count == 4) {
            interleave(part[0], part[2]);
            interleave(part[1], part[3]);
            interleave(part[2], part[3]);
        }
        interleave(part[0], part[1]);
        for (int k = 0; k < count; k++) store(group + k * kLanes, part[k]);
    }
}

static void add(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// ---- the choice of neurons ----

// What scores are ordered by: their bits, which for numbers from 0 rise with them. A NaN comes last, beside infinity:
// it has to reach the output, as it would in a dense layer.
static void order(const float* score, int64_t n, uint32_t* keys) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, score + i, sizeof bits);
        keys[i] = score[i] == score[i] ? bits : 0x7f800000;
    }
}

static int64_t count_from(uint32_t least, const uint32_t* keys, int64_t n) {
    VI count = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        VI some;
        memcpy(&some, keys + i, sizeof some);
        count -= some >= VI{} + static_cast<int32_t>(least);
    }
    int64_t result = total(count);
    for (; i < n; i++) result += keys[i] >= least;
    return result;
}

// What the `rank` greatest (from 1) of n keys below 2^31 have in common: they are at least this. Found bit by bit, for
// counting is what vectors do best: 0.9 us for 1536 keys, where a histogram and a sort of one of its bins took 1.4.
static uint32_t least_of(int64_t rank, const uint32_t* keys, int64_t n) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        const int64_t count = count_from(found | bit, keys, n);
        if (count >= rank) found |= bit;
        if (count == rank) break;
    }
    return found;
}

#if CORESKIP_LEVEL == 512
// Appends first + i for every lane i that is wanted. Nothing is written beyond the last.
static inline int64_t append(int64_t* to, __mmask16 wanted, int64_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i packed = _mm512_maskz_compress_epi32(wanted, lanes), base = _mm512_set1_epi64(first);
    const int count = __builtin_popcount(wanted);
    const uint32_t filled = (1u << count) - 1;
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(packed));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(packed, 1));
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(filled), _mm512_add_epi64(low, base));
    _mm512_mask_storeu_epi64(to + 8, static_cast<__mmask8>(filled >> 8), _mm512_add_epi64(high, base));
    return count;
}
#endif

// The places of the keys above `last`, and of the first `equal` that are equal to it. They fit into [width].
static int64_t places(const uint32_t* keys, int64_t n, uint32_t last, int64_t equal, int64_t* to, int64_t width) {
    int64_t kept = 0, i = 0;
#if CORESKIP_LEVEL == 512  // one by one: 1.5 to 1.9 us for 1536 keys
    const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(last));
    for (; i + kLanes <= n; i += kLanes) {
        const __m512i some = _mm512_loadu_si512(keys + i);
        uint32_t ties = _mm512_cmpeq_epi32_mask(some, least);
        while (__builtin_popcount(ties) > equal) ties &= ~(0x80000000u >> __builtin_clz(ties));
        equal -= __builtin_popcount(ties);
        kept += append(to + kept, static_cast<__mmask16>(_mm512_cmpgt_epi32_mask(some, least) | ties), i);
    }
#endif
    for (; i < n && kept < width; i++) {
        const bool tie = keys[i] == last && equal > 0;
        to[kept] = i;
        kept += keys[i] > last || tie;
        equal -= tie;
    }
    return kept;
}

static int64_t choose(const float* score, int64_t neurons, int64_t keep, float threshold, uint32_t* keys, int64_t* to,
                      int64_t width) {
    if (keep == 0) return 0;
    if (keep < 0) {  // scores and threshold of either sign: what learned predictors say before the sigmoid
        for (int64_t i = 0; i < neurons; i++) keys[i] = !(score[i] < threshold);  // true of a NaN, too
        return places(keys, neurons, 0, 0, to, width);
    }
    order(score, neurons, keys);
    uint32_t last = 0;
    if (keep < neurons) last = least_of(keep, keys, neurons);
    return places(keys, neurons, last, keep - count_from(last + 1, keys, neurons), to, width);
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
    {mlp<float>, mlp<BF16>, mlp<F16>, mlp<U8>, mlp<Sliced>},
    {scan<float>, scan<BF16>, scan<F16>, scan<U8>, scan<Sliced>},
    {linear<float>, linear<BF16>, linear<F16>, linear<U8>, nullptr},
    {columns<float>, columns<BF16>, columns<F16>},
    to_float,
    from_float,
    quantize,
    arrange,
    restore,
    add,
    choose,
    read,
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
