// An MLP over bundles of neurons, and the scans that score them. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

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
            bundle[n] = bundle_of(base, neuron[n], bundle_size);
            next[n] = bundle_of(base, at(ahead < end ? ahead : end - 1), bundle_size);
            if (ahead >= end && after) next[n] = reinterpret_cast<const W*>(after + (ahead - end) * step);
        }
    }
    const W* bundle_of(const void* base, int64_t i, int64_t bundle_size) const {
        if (job.place) return reinterpret_cast<const W*>(job.place[i]);
        return static_cast<const W*>(base) + i * bundle_size;
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
                store(u, job.gated ? activate(load(g), job.act, job.curve) * load(u) : activate(load(u), job.act, job.curve));
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
            if (i >= first && i < kept) next[n] = bundle_of(base, at(i), bundle_size) + down_offset();
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
                store(up + r * kMaxBlock + n, activate(load(gate + r * kMaxBlock + n), job.act, job.curve));
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
    const int64_t bundle_size =
        job.gates_alone ? block.row_size : block.down_offset() + (block.sliced ? 0 : block.stride);
    for (int64_t i = begin; i < end; i += block.size) {
        block.place(job.weight, bundle_size, i, end, job.after, bundle_size * sizeof(W));
        block.look_at_all();
        if (job.rule == kListed) continue;
        if (job.rule == kGate) block.score_gates();
        else block.apply_act();
        block.write_scores();
    }
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
