// An MLP in 4-bit groups of which neurons are left out: one neuron's numbers lie side by side, see NeuronGroups in
// arguments.h. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

constexpr int kRun = 64;          // inputs, or outputs, whose nibbles lie in 32 bytes
constexpr int kRunParts = kRun / kVector;
constexpr int kOf32 = kGroup;     // neurons that share the ends of a group of the down projection

// ---- nibbles of one row ----

// Part p of a run: kVector numbers of 4 bits. The low nibbles of its bytes are the first 32 numbers.
static inline VB nibbles(const uint8_t* w, int p) {
#if CORESKIP_LEVEL == 512
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    return (VB)_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)) & 15;
#else
    constexpr int half = 32 / kVector;
    const VB both = load_bytes(w + p % half * kVector);
    return p < half ? both & 15 : (VB)((VH2)both >> 4) & 15;
#endif
}

// Bytes of part p of a run where the number's bit is set, else 0; bits: 8 bytes.
static inline VB where_set(const uint8_t* bits, int p, VB x) {
#if CORESKIP_LEVEL == 512
    uint64_t mask;
    memcpy(&mask, bits, sizeof mask);
    return (VB)_mm512_maskz_mov_epi8(mask, (__m512i)x);
#elif CORESKIP_LEVEL == 2
    uint32_t mask;
    memcpy(&mask, bits + 4 * p, sizeof mask);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(mask),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i each = _mm256_set1_epi64x(0x8040201008040201);
    return x & (VB)_mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
#else
    VB kept;
    for (int i = 0; i < kVector; i++) kept[i] = bits[(p * kVector + i) / 8] >> (i % 8) & 1 ? x[i] : 0;
    return kept;
#endif
}

// Which of kLanes numbers are there: the first n, or all.
struct First {
#if CORESKIP_LEVEL == 512
    __mmask16 mask;
    explicit First(int64_t n) : mask(static_cast<__mmask16>(n < kLanes ? (1u << n) - 1 : 0xffff)) {}
    V of(const float* p) const { return (V)_mm512_maskz_loadu_ps(mask, p); }
    V of(const F16* p) const { return (V)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
#else
    int64_t n;
    explicit First(int64_t count) : n(count) {}
    V of(const float* p) const {
        if (n >= kLanes) return load(p);
        float some[kLanes] = {};
        memcpy(some, p, n * sizeof(float));
        return load(some);
    }
    V of(const F16* p) const {
        if (n >= kLanes) return load(p);
        F16 some[kLanes] = {};
        memcpy(some, p, n * sizeof(F16));
        return load(some);
    }
#endif
};

// Factors of kLanes groups, for the parts of the runs that hold them.
struct Factors {
#if CORESKIP_LEVEL == 512
    V all;
    explicit Factors(V v) : all(v) {}
    V of(int run, int) const {
        const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        return (V)_mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(2 * run)), (__m512)all);
    }
#else
    float all[kLanes];
    explicit Factors(V v) { store(all, v); }
    V of(int run, int p) const { return splat(all[2 * run + p * kVector / 32]); }
#endif
};

// ---- sums over the groups of a row ----

// A row's groups lie in blocks of 16, and what is left in runs of two. In a block lanes are groups, four inputs a lane and
// step, as rows are in tiles: each step adds to one sum a group, and the scales come in once. With runs all along, which
// need their scales at every step, listed rows of 2048 took 1.8 times as long.
constexpr int kBlock = 16;               // groups
constexpr int kBlockInputs = kBlock * kGroup;

static inline int64_t blocks_of(int64_t groups) { return groups / kBlock; }

// x in the order of blocks, [rows][width]: to[block][step][group][four].
static inline void turn_inputs(const GroupedRows& x, int64_t width, int8_t* to) {
    const int64_t blocks = blocks_of(width / kGroup);
    for (int r = 0; r < x.rows; r++)
        for (int64_t b = 0; b < blocks; b++)
            for (int g = 0; g < kBlock; g++)
                for (int step = 0; step < kGroup / 4; step++)
                    memcpy(to + r * width + b * kBlockInputs + (step * kBlock + g) * 4,
                           x.q + r * width + b * kBlockInputs + g * kGroup + step * 4, 4);
}

// x as rows of weights meet it: in blocks, and what is left in runs.
struct Inputs {
    const int8_t *turned, *tail;
    const float *scale, *sum;
    int64_t width, groups, blocks;
    int left;  // groups behind the last block

    Inputs(const NeuronsJob& job, int row)
        : turned(job.turned + row * job.n.width), scale(job.x.scale + row * (job.n.width / kGroup)),
          sum(job.x.sum + row * (job.n.width / kGroup)), width(job.n.width), groups(width / kGroup),
          blocks(blocks_of(groups)), left(static_cast<int>(groups - blocks * kBlock)) {
        tail = job.x.q + row * width + blocks * kBlockInputs;
    }
};

// y[n][r] += over all groups, what P rows' numbers come to with R rows of x, times the scales of both, and their leasts
// times the sums of x. Rows together share the loads of x. ends(n, g, first, scale, least): from group g on. block(n, b,
// part, x, sum, more): adds a block's products to either of two sums, for one would wait for itself. run(n, i, part, x):
// those of a run.
template <int P, int R, class EndsOf, class BlockOf, class RunOf>
__attribute__((always_inline)) static inline void add_rows(const Inputs& in, const EndsOf& ends, const BlockOf& block,
                                                           const RunOf& run, V y[P][R]) {
    const First all(kLanes);
    for (int64_t b = 0; b < in.blocks; b++)
        for (int p = 0; p < kParts; p++) {
            const int64_t g = b * kBlock + p * kLanes;
            V step[R], total[R];
            for (int r = 0; r < R; r++) step[r] = load(in.scale + r * in.groups + g), total[r] = load(in.sum + r * in.groups + g);
#pragma GCC unroll 4
            for (int n = 0; n < P; n++) {
                VI sum[R] = {}, more[R] = {};
                block(n, b, p, in.turned + b * kBlockInputs + p * kVector, sum, more);
                V scale, least;
                ends(n, g, all, scale, least);
                for (int r = 0; r < R; r++) {
                    y[n][r] += least * total[r];
                    y[n][r] += __builtin_convertvector(sum[r] + more[r], V) * (scale * step[r]);
                }
            }
        }
    for (int at = 0; at < in.left; at += kLanes) {
        const int64_t g = in.blocks * kBlock + at;
        const int left = in.left - at;
        const First first(left);
        V step[R], total[R];
        for (int r = 0; r < R; r++) {
            step[r] = first.of(in.scale + r * in.groups + g), total[r] = first.of(in.sum + r * in.groups + g);
        }
#pragma GCC unroll 4
        for (int n = 0; n < P; n++) {
            V scale, least;
            ends(n, g, first, scale, least);
            for (int r = 0; r < R; r++) {
                y[n][r] += least * total[r];
                const Factors factors(scale * step[r]);
                for (int i = 0; i < kLanes / 2 && 2 * i < left; i++)
                    for (int p = 0; p < kRunParts; p++) {
                        const VB x = load_bytes(in.tail + r * in.width + at * kGroup + i * kRun + p * kVector);
                        y[n][r] += __builtin_convertvector(run(n, g / 2 + i, p, x), V) * factors.of(i, p);
                    }
            }
        }
    }
}

// ---- gate and up rows of listed neurons ----

// y[n][r] += what P rows of nibbles, followed by their groups' scales and leasts, come to with R rows of x. next: what lies
// where it will be read some rows later: it is fetched line by line as this is read. So many requests in one go that the
// core must wait for room for them cost more than they save.
template <int P, int R>
__attribute__((always_inline)) static inline void add_nibbles(const Inputs& in, const uint8_t* const* w,
                                                              const uint8_t* const* next, V y[P][R]) {
    const int64_t scales_at = in.width / 2, leasts_at = scales_at + 2 * in.groups;
    const int64_t in_blocks = in.blocks * (kBlockInputs / 2);
    const auto ends = [&](int n, int64_t g, const First& first, V& scale, V& least) __attribute__((always_inline)) {
        scale = first.of(reinterpret_cast<const F16*>(w[n] + scales_at) + g);
        least = first.of(reinterpret_cast<const F16*>(w[n] + leasts_at) + g);
    };
    const auto block = [&](int n, int64_t b, int p, const int8_t* x, VI* sum, VI* more) __attribute__((always_inline)) {
        const uint8_t* from = w[n] + b * (kBlockInputs / 2) + p * kVector;
        const uint8_t* later = next[n] + b * (kBlockInputs / 2);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const VB both = load_bytes(from + v * kLine);
            if (p == 0) __builtin_prefetch(later + v * kLine, 0, 2);
            const VB low = both & 15, high = (VB)((VH2)both >> 4) & 15;
            for (int r = 0; r < R; r++) {
                sum[r] = multiply_add(sum[r], low, load_bytes(x + r * in.width + v * kLine));
                more[r] = multiply_add(more[r], high, load_bytes(x + r * in.width + (v + 4) * kLine));
            }
        }
    };
    const auto run = [&](int n, int64_t i, int p, VB x) __attribute__((always_inline)) {
        return multiply_add(VI{}, nibbles(w[n] + i * (kRun / 2), p), x);
    };
    add_rows<P, R>(in, ends, block, run, y);
    for (int n = 0; n < P; n++) fetch_all(next[n] + in_blocks, leasts_at + 2 * in.groups - in_blocks);
}

// ---- down rows ----

template <bool high, class T>
static inline VB interleave(VB a, VB b) {
#if CORESKIP_LEVEL == 512
    const __m512i x = (__m512i)a, y = (__m512i)b;
    if (sizeof(T) == 1) return (VB)(high ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y));
    return (VB)(high ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
#elif CORESKIP_LEVEL == 2
    const __m256i x = (__m256i)a, y = (__m256i)b;
    if (sizeof(T) == 1) return (VB)(high ? _mm256_unpackhi_epi8(x, y) : _mm256_unpacklo_epi8(x, y));
    return (VB)(high ? _mm256_unpackhi_epi16(x, y) : _mm256_unpacklo_epi16(x, y));
#else
    constexpr int count = 16 / sizeof(T), first = high ? count / 2 : 0;
    T x[count], y[count], both[count];
    memcpy(x, &a, 16), memcpy(y, &b, 16);
    for (int i = 0; i < count / 2; i++) both[2 * i] = x[first + i], both[2 * i + 1] = y[first + i];
    VB result;
    memcpy(&result, both, 16);
    return result;
#endif
}

// Neurons of one group of the down projection: their rows, and their activations for each row of x, rounded to 8 bits
// together as a dense step rounds them.
struct DownGroup {
    const uint8_t* row[kOf32];
    const uint8_t* next[kOf32];  // a row of the group that comes after it, which is fetched meanwhile, or this one
    const uint16_t* next_ends;
    int count = 0;
    float h[kMaxRows][kOf32];
    int8_t q[kMaxRows][kOf32];
    float scale[kMaxRows], sum[kMaxRows];

    void round(int rows) {
        quantize_groups(h[0], rows * kOf32, 1, q[0], scale, sum, nullptr);
        while (count % 4) row[count] = row[count - 1], next[count] = next[count - 1], count++;  // its activations are 0
    }
};

// A run's nibbles lie so that four neurons' bytes, interleaved twice in each 128 bits, give outputs in order.
template <int R>
static inline void add_down(const NeuronsJob& job, const DownGroup& group, const F16* ends, int row, float* acc) {
    const int64_t width = job.n.width;
    for (int64_t run = 0; run < width / kRun; run++)
        for (int p = 0; p < kRunParts; p++) {
            VI sum[R][4] = {};
            if (row == 0 && p == 0) {
                fetch_all(group.next_ends + run * kRun, 2 * kRun);
                fetch_all(group.next_ends + width + run * kRun, 2 * kRun);
            }
            for (int n = 0; n < group.count; n += 4) {
                for (int i = 0; row == 0 && p == 0 && run % 2 == 0 && i < 4; i++)
                    __builtin_prefetch(group.next[n + i] + run * (kRun / 2), 0, 2);
                VB w[4], pair[4];
                for (int i = 0; i < 4; i++) w[i] = nibbles(group.row[n + i] + run * (kRun / 2), p);
                for (int i = 0; i < 4; i += 2) {
                    pair[i] = interleave<false, uint8_t>(w[i], w[i + 1]);
                    pair[i + 1] = interleave<true, uint8_t>(w[i], w[i + 1]);
                }
                const VB four[4] = {interleave<false, uint16_t>(pair[0], pair[2]), interleave<true, uint16_t>(pair[0], pair[2]),
                                    interleave<false, uint16_t>(pair[1], pair[3]), interleave<true, uint16_t>(pair[1], pair[3])};
                for (int r = 0; r < R; r++) {
                    const VB h = (VB)as_lanes(group.q[row + r] + n);
                    for (int k = 0; k < 4; k++) sum[r][k] = multiply_add(sum[r][k], four[k], h);
                }
            }
            for (int k = 0; k < 4; k++) {
                const int64_t at = run * kRun + 16 * k + p * kLanes;
                const V scale = load(ends + at), least = load(ends + width + at);
                for (int r = 0; r < R; r++) {
                    float* to = acc + (row + r) * width + at;
                    const V products = __builtin_convertvector(sum[r][k], V) * group.scale[row + r];
                    store(to, load(to) + scale * products + least * group.sum[row + r]);
                }
            }
        }
}

// Calls f<R>(row) for all rows, in groups of 4, 2 and 1.
template <class F>
static inline void for_rows(int rows, F f) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) f(row, Count<4>{});
    for (; row + 2 <= rows; row += 2) f(row, Count<2>{});
    for (; row < rows; row++) f(row, Count<1>{});
}

static void add_down_group(const NeuronsJob& job, DownGroup& group, int64_t number, float* acc) {
    if (group.count == 0) return;
    group.round(job.x.rows);
    const F16* ends = reinterpret_cast<const F16*>(job.n.ends) + number * 2 * job.n.width;
    for_rows(job.x.rows, [&](int row, auto count) { add_down<decltype(count)::value>(job, group, ends, row, acc); });
}

// ---- activations ----

// Adds sign * bias, where there is one, to values [rows][32] of up to 32 neurons. of(i): the i-th neuron.
template <class Of>
static inline void add_each(const NeuronsJob& job, const float* bias, float sign, int count, Of of, float (*to)[kOf32]) {
    for (int r = 0; bias && r < job.x.rows; r++)
        for (int i = 0; i < count; i++) to[r][i] += sign * bias[of(i)];
}

// Leaves act(gate) in `gate`.
template <class Of>
static inline void apply_act_alone(const NeuronsJob& job, int count, Of of, float (*gate)[kOf32]) {
    add_each(job, job.n.gate_bias, 1.f, count, of, gate);
    for (int r = 0; r < job.x.rows; r++)
        for (int i = 0; i < count; i += kLanes) store(gate[r] + i, activate(load(gate[r] + i), job.act, job.curve));
}

// Leaves act * up, less its mean, in `up`.
template <class Of>
static inline void multiply_by_act(const NeuronsJob& job, int count, Of of, const float (*act)[kOf32], float (*up)[kOf32]) {
    add_each(job, job.n.up_bias, 1.f, count, of, up);
    for (int r = 0; r < job.x.rows; r++)
        for (int i = 0; i < count; i += kLanes) store(up[r] + i, load(act[r] + i) * load(up[r] + i));
    add_each(job, job.n.mean, -1.f, count, of, up);
}

// Leaves act(gate) * up, or act(up), in `up`, less its mean where that is wanted.
template <class Of>
static inline void apply_act(const NeuronsJob& job, int count, Of of, float (*gate)[kOf32], float (*up)[kOf32],
                             bool less_mean) {
    add_each(job, job.n.gate_bias, 1.f, count, of, gate);
    add_each(job, job.n.up_bias, 1.f, count, of, up);
    for (int r = 0; r < job.x.rows; r++)
        for (int i = 0; i < count; i += kLanes) {
            const V u = load(up[r] + i);
            store(up[r] + i, job.n.gated ? activate(load(gate[r] + i), job.act, job.curve) * u : activate(u, job.act, job.curve));
        }
    if (less_mean) add_each(job, job.n.mean, -1.f, count, of, up);
}

// ---- listed neurons ----

// Positions `begin` to `end` of the list. A group of the down projection belongs to who has its first neuron.
class Listed {
  public:
    Listed(const NeuronsJob& job, int64_t begin, int64_t end) : job_(job), begin_(begin), end_(end) {
        while (inside(begin_)) begin_++;
        while (inside(end_)) end_++;
        part_ = job.n.width / 2 + job.n.width / kGroup * 4;
        before_ = (job.n.gated ? 2 : 1) * part_;
    }

    void run(float* acc) {
        turn_inputs(job_.x, job_.n.width, job_.turned);
        for (int64_t i = begin_; i < end_ && i < begin_ + kAhead; i++) fetch_all(row_of(i), job_.n.row_bytes);
        for (int64_t i = begin_; i < end_;) i = add_group(i, acc);
    }

  private:
    // Neurons between fetching and reading: so many that down rows are never of the same group. With the next group's, of 3
    // neurons where one in ten is listed, each neuron took as long as memory takes to answer.
    static constexpr int64_t kAhead = kOf32;

    const NeuronsJob& job_;
    int64_t begin_, end_, part_, before_;  // bytes of gate, or of up, and of all before down

    int64_t at(int64_t i) const { return job_.list ? job_.list[i] : i; }
    int64_t group_of(int64_t i) const { return at(i) / kOf32; }
    const uint8_t* row_of(int64_t i) const {
        return job_.n.rows + (job_.n.place ? job_.n.place[at(i)] : at(i)) * job_.n.row_bytes;
    }
    bool inside(int64_t i) const { return i > 0 && i < job_.count && group_of(i) == group_of(i - 1); }

    // Returns where the next group begins.
    int64_t add_group(int64_t first, float* acc) {
        DownGroup group;
        float gate[kMaxRows][kOf32];
        int64_t end = first + 1;
        while (end < end_ && group_of(end) == group_of(first)) end++;
        group.count = static_cast<int>(end - first);
        for_rows(job_.x.rows, [&](int row, auto count) {
            constexpr int R = decltype(count)::value;
            const Inputs in(job_, row);
            int64_t i = first;
            for (; i + 2 <= end; i += 2) project<2, R>(in, row, i, static_cast<int>(i - first), gate, group.h);
            if (i < end) project<1, R>(in, row, i, static_cast<int>(i - first), gate, group.h);
        });
        apply_act(job_, group.count, [&](int j) { return at(first + j); }, gate, group.h, true);
        for (int r = 0; r < job_.x.rows; r++) {
            memset(group.h[r] + group.count, 0, (kOf32 - group.count) * sizeof(float));
            for (int j = 0; job_.selected && j < group.count; j++)
                if (!job_.selected[at(first + j) * job_.x.rows + r]) group.h[r][j] = 0.f;
        }
        const auto later = [&](int64_t i) { return i + kAhead < end_ ? i + kAhead : i; };
        group.next_ends = job_.n.ends + group_of(later(first)) * 2 * job_.n.width;
        for (int n = 0; n < group.count; n++) {
            group.row[n] = row_of(first + n) + before_;
            group.next[n] = row_of(later(first + n)) + before_;
        }
        add_down_group(job_, group, group_of(first), acc);
        return end;
    }

    // The projections of N neurons from position i on.
    template <int N, int R>
    void project(const Inputs& in, int row, int64_t i, int to, float (*gate)[kOf32], float (*up)[kOf32]) {
        if (job_.n.gated) project_parts<N, 2, R>(in, row, i, to, gate, up);
        else project_parts<N, 1, R>(in, row, i, to, gate, up);
    }

    template <int N, int P, int R>
    __attribute__((noinline)) void project_parts(const Inputs& in, int row, int64_t i, int to, float (*gate)[kOf32],
                                                 float (*up)[kOf32]) {
        V y[N * P][R] = {};
        float sum[N * P][R];
        const uint8_t *w[N * P], *next[N * P];
        for (int n = 0; n < N; n++) {
            const uint8_t* from = row_of(i + n);
            const uint8_t* later = row == 0 && i + n + kAhead < end_ ? row_of(i + n + kAhead) : from;
            for (int p = 0; p < P; p++) w[n * P + p] = from + p * part_, next[n * P + p] = later + p * part_;
        }
        add_nibbles<N * P, R>(in, w, next, y);
        totals<N * P * R>(y[0], sum[0]);
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) {
                gate[row + r][to + n] = sum[n * P][r];
                up[row + r][to + n] = sum[n * P + P - 1][r];
            }
    }
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
