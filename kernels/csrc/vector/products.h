// The two inner loops: products of weight rows with rows of x, and sums of weighted rows. Included by isa.h, under
// its rules.

namespace coreskip {
namespace CORESKIP_ISA {

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

}  // namespace CORESKIP_ISA
}  // namespace coreskip
