// Conversions between float formats, the rounding of x to 8 bits, and the order in which weights are expanded.
// Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

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

}  // namespace CORESKIP_ISA
}  // namespace coreskip
