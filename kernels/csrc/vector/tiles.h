// Products with groups of 4 or 8 bits, in tiles, and the rounding of x in such groups. Included by step_isa.h, under
// its rules.

namespace coreskip {
namespace CORESKIP_ISA {

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

}  // namespace CORESKIP_ISA
}  // namespace coreskip
