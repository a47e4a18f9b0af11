// Products with groups of 4 to 8 bits, in tiles, and the rounding of x in such groups. Included by step_isa.h, under
// its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// Adds one group's products to y. With two ends the weights are the very numbers that were packed, not factors apart from
// sums of integers: an infinity in x then does what it does in torch. It does so with centred ones times their scale,
// too, which saves one of two products: 1.1 to 1.5 times as fast. Two sums a row, for one would wait for itself.
template <class G, int R>
static inline void add_whole(const typename G::Head& head, const uint8_t* w, const float* x, int64_t stride,
                             V y[R][kParts]) {
    typedef typename G::Numbers N;
    typedef typename G::Ends E;
    for (int p = 0; p < kParts; p++) {
        const V scale = E::scale(head, w + N::bytes, p, 0), least = E::least(head, w + N::bytes, p);
        V even[R] = {}, odd[R] = {};
        for (int k = 0; k < N::vectors; k++) {
            const typename N::Words words = N::words(w, k, p);
#pragma GCC unroll 4
            for (int i = 0; i < N::count; i += 2) {  // of nibbles, odd ones are of the second half
                const V a = E::centred ? N::centred(words, i) : N::number(words, i) * scale + least;
                const V b = E::centred ? N::centred(words, i + 1) : N::number(words, i + 1) * scale + least;
                for (int r = 0; r < R; r++) {
                    even[r] += a * x[r * stride + N::input(k, i)];
                    odd[r] += b * x[r * stride + N::input(k, i + 1)];
                }
            }
        }
        for (int r = 0; r < R; r++) {
            if constexpr (E::halves > 1) y[r][p] += even[r] * scale + odd[r] * E::scale(head, w + N::bytes, p, 1);
            else if constexpr (E::centred) y[r][p] += (even[r] + odd[r]) * scale;
            else y[r][p] += even[r] + odd[r];
        }
    }
}

// Adds the products of the group at the place `at` of the first of R rows, of x rounded to 8 bits, to y. by_rows: x lies
// row by row, not as tiles have it otherwise.
template <class G, int R, bool by_rows>
__attribute__((always_inline)) static inline void add_rounded(const TileJob& job, const typename G::Head& head,
                                                              const uint8_t* w, int64_t at, V y[R][kParts]) {
    typedef typename G::Numbers N;
    typedef typename G::Ends E;
    constexpr float half = N::half;
    const int64_t row_step = by_rows ? job.groups : 1;
    VI sum[E::halves][R][kParts] = {};
    const int8_t* x[R];
    for (int r = 0; r < R; r++) {
        x[r] = job.q + (at + r * row_step) * kGroup;
        for (int h = 0; E::halves > 1 && h < E::halves; h++)  // sums of q - half
            for (int p = 0; p < kParts; p++) sum[h][r][p] -= N::half * job.half[2 * (at + r * row_step) + h];
    }
    N::template sums<E::halves, R>(w, x, sum);
    const float *scales = job.scale + at, *sums = job.sum + at;
    for (int p = 0; p < kParts; p++) {
        const V scale = E::scale(head, w + N::bytes, p, 0), least = E::least(head, w + N::bytes, p);
        for (int r = 0; r < R; r++) {
            const float x_scale = scales[r * row_step], x_sum = sums[r * row_step];
            const V first = __builtin_convertvector(sum[0][r][p], V);
            if constexpr (E::halves > 1) {
                const V second = __builtin_convertvector(sum[1][r][p], V);
                y[r][p] += (scale * first + E::scale(head, w + N::bytes, p, 1) * second) * x_scale;
            } else if constexpr (E::centred) {
                y[r][p] += scale * (x_scale * first - half * x_sum);
            } else {
                y[r][p] += scale * x_scale * first + least * x_sum;
            }
        }
    }
}

// kTile outputs for R rows.
template <class G, bool whole, int R, bool by_rows>
__attribute__((always_inline)) static inline void tile(const TileJob& job, const uint8_t* w, int row, Ahead* ahead,
                                                       V y[R][kParts]) {
    typedef typename G::Head Head;
    const int64_t apart = by_rows ? 1 : places_apart(job.rows);
    int64_t at = by_rows ? row * job.groups : first_place(row, job.rows, job.groups);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int p = 0; p < kParts; p++) y[r][p] = V{};
    for (int64_t block = 0; block < job.groups; block += Head::groups) {
        if (Head::bytes && ahead) fetch(*ahead, Head::bytes);
        const Head head(w);
        w += Head::bytes;
        for (int64_t g = block; g < block + Head::groups; g++, w += G::bytes, at += apart) {
            if (ahead) fetch(*ahead, G::bytes);
            if constexpr (whole) add_whole<G, R>(head, w, job.x + (row * job.groups + g) * kGroup, job.groups * kGroup, y);
            else add_rounded<G, R, by_rows>(job, head, w, at, y);
        }
    }
}

template <class G, bool whole, int R>
static inline void write_tile(const TileJob& job, int64_t t, int row, Ahead& ahead) {
    V y[R][kParts];
    const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * (job.groups / G::Head::groups * G::block);
    tile<G, whole, R, false>(job, w, row, row ? nullptr : &ahead, y);  // the first rows' tile has fetched what there is
    const int64_t first = t * kTile, count = job.out - first < kTile ? job.out - first : kTile;
    float bias[kTile] = {}, out[kTile];
    if (job.bias) memcpy(bias, job.bias + first, count * sizeof(float));
    float* to = job.y + row * job.out + first;
    // unrolled: sums that are found by their number would live in memory, and be stored anew with every group
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        for (int p = 0; p < kParts; p++) store(out + p * kLanes, y[r][p] + load(bias + p * kLanes));
        if (count == kTile) memcpy(to + r * job.out, out, sizeof out);
        else memcpy(to + r * job.out, out, count * sizeof(float));
    }
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
        for (int64_t t = begin; t < end; t++)
            for (int row = 0; row < job.rows; row += kMaxRows)
                write[(job.rows - row < kMaxRows ? job.rows - row : kMaxRows) - 1](job, t, row, ahead);
        *job.ahead = ahead;
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int row = 0;
        if constexpr (kLanes == kTile) {
            for (; row + 8 <= job.rows; row += 8) write_tile<G, whole, 8>(job, t, row, ahead);
            switch (job.rows - row) {  // all that are left at once: weights are taken apart for each few
                case 7: write_tile<G, whole, 7>(job, t, row, ahead); continue;
                case 6: write_tile<G, whole, 6>(job, t, row, ahead); continue;
                case 5: write_tile<G, whole, 5>(job, t, row, ahead); continue;
                case 3: write_tile<G, whole, 3>(job, t, row, ahead); continue;
            }
        }
        for (; row + 4 <= job.rows; row += 4) write_tile<G, whole, 4>(job, t, row, ahead);
        for (; row + 2 <= job.rows; row += 2) write_tile<G, whole, 2>(job, t, row, ahead);
        for (; row < job.rows; row++) write_tile<G, whole, 1>(job, t, row, ahead);
    }
    *job.ahead = ahead;
}

static void tiles(const TileJob& job, int64_t begin, int64_t end) {
    with_format(job.format, [&](auto group) {
        typedef decltype(group) G;
        if (job.x) tiles_of<G, true>(job, begin, end);
        else tiles_of<G, false>(job, begin, end);
    });
}

// Each group of x on its own, as `quantize` does it, to the bit: x is about scale * q. n is a multiple of kGroup. Written
// out in vectors, as GCC leaves the search for the largest one by one: 8 % of a step over the embedded model in 4 bits.
static void quantize_groups(const float* x, int64_t n, int64_t apart, int8_t* q, float* scale, float* sum, int32_t* half) {
    constexpr int parts = kGroup / kLanes;
    for (int64_t g = 0; g < n / kGroup * apart; g += apart, x += kGroup, q += kGroup * apart) {
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
        VI total_q[2] = {};
        for (int p = 0; p < parts; p++) {
            const V scaled = some ? load(x + p * kLanes) / step : V{};
            const VI rounded = __builtin_convertvector((scaled + 0x1.8p23f) - 0x1.8p23f, VI);
            const VQ bytes = __builtin_convertvector(rounded, VQ);
            memcpy(q + p * kLanes, &bytes, sizeof bytes);
            total_q[p / (parts / 2)] += rounded;
        }
        scale[g] = finite ? (some ? step : 0.f) : NAN;
        if (half) half[2 * g] = total(total_q[0]), half[2 * g + 1] = total(total_q[1]);
        sum[g] = scale[g] * static_cast<float>(total(total_q[0] + total_q[1]));
    }
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
