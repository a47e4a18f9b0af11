// Neurons that each token chooses, in 4-bit groups: all are scanned, and of those that may matter the rest is read.
// Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// ---- scales by neuron ----

// Lanes of two vectors, `step` rows apart, that make the first (or the second) of both where a square of kLanes vectors is
// turned around its diagonal. A table: computed at run time, indices cost more than the turning.
struct Turns {
    int32_t lane[4][2][kLanes];

    constexpr Turns() : lane() {
        for (int k = 0; k < 4; k++)
            for (int i = 0, step = 1 << k; i < kLanes; i++) {
                lane[k][0][i] = i & step ? kLanes + i - step : i;
                lane[k][1][i] = i & step ? kLanes + i : i + step;
            }
    }
};
alignas(kVector) static constexpr Turns turns;

static inline VI lanes_of(const int32_t* p) {
    VI v;
    memcpy(&v, p, sizeof v);
    return v;
}

__attribute__((always_inline)) static inline void transpose(V* m) {
#pragma GCC unroll 4
    for (int k = 0; 1 << k < kLanes; k++) {
        const VI low = lanes_of(turns.lane[k][0]), high = lanes_of(turns.lane[k][1]);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
            if (i >> k & 1) continue;
            const V a = m[i], b = m[i + (1 << k)];
            m[i] = __builtin_shuffle(a, b, low), m[i + (1 << k)] = __builtin_shuffle(a, b, high);
        }
    }
}

// The scales of a tile's rows, one row after the other: to[row * stride + group].
static inline void scales_by_row(const uint8_t* tile, int64_t groups, float* to, int64_t stride) {
    const auto scales_of = [&](int64_t g, int part) {
        return half_of(tile + g * Int4Upper::bytes + Thirds::bytes, part * kLanes);
    };
    for (int part = 0; part < kParts; part++, to += kLanes * stride) {
        int64_t g = 0;
        for (; g + kLanes <= groups; g += kLanes) {
            V m[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) m[i] = scales_of(g + i, part);
            transpose(m);
            for (int row = 0; row < kLanes; row++) store(to + row * stride + g, m[row]);
        }
        for (; g < groups; g++) {
            const V m = scales_of(g, part);
            for (int row = 0; row < kLanes; row++) to[row * stride + g] = m[row];
        }
    }
}

// ---- the last bits ----

// What the last bits of P rows add to the products with R rows of x, for which they counted as a half.
template <int P, int R>
__attribute__((always_inline)) static inline void last_bits_with(const NeuronsJob& job, const uint8_t* bits,
                                                                 const float* scales, int row, float* out) {
    const int64_t groups = job.n.width / kGroup, bytes = job.n.width / 8;
    const auto ends = [&](int n, int64_t g, int64_t left, V& scale, V& least) __attribute__((always_inline)) {
        scale = load_first(scales + n * groups + g, left);
        least = scale * -0.5f;
    };
    const auto block = [&](int n, int64_t b, int p, const int8_t* const* x, VI* sum, VI* more)
                           __attribute__((always_inline)) {
        const uint8_t* from = bits + n * bytes + b * (kBlockInputs / 8);
#pragma GCC unroll 8
        for (int step = 0; step < kGroup / 4; step++)
            for (int r = 0; r < R; r++) {
                VI& to = step % 2 ? more[r] : sum[r];
                to = multiply_add(to, VB{} + 1, where_set(from + step * (kLine / 8), p, load_bytes(x[r] + step * kLine)));
            }
    };
    const auto run = [&](int n, int64_t i, int p, VB x) __attribute__((always_inline)) {
        return multiply_add(VI{}, VB{} + 1, where_set(bits + n * bytes + i * (kRun / 8), p, x));
    };
    add_groups<P, R>(job, row, ends, block, run, out);
}

// ---- groups of 32 neurons, three at a time under way ----

// A group is scanned; when the next one has been, the last bits of its candidates have arrived; when that has been
// completed in turn, the down rows of those that are kept have.
struct Scanned {
    int64_t first = 0;
    int count = 0;                       // of neurons
    uint32_t wanted[kMaxRows] = {};      // by row, candidates, and then those that are kept
    uint32_t any = 0;
    float gate[kMaxRows][kOf32], up[kMaxRows][kOf32];  // products, and then activations in `up`
};

class Scan {
  public:
    Scan(const NeuronsJob& job, int64_t end) : job_(job), end_(end), projections_(job.n.gated ? 2 : 1) {
        const int64_t groups = job.n.width / kGroup;
        upper_ = job.n.format == kInt4Upper;
        tile_ = groups * (upper_ ? Int4Upper::bytes : Int4::bytes);
        scales_ = job.n.gated ? 2 * groups : groups;
        low_ = projections_ * job.n.width / 8;
    }

    // Returns how many neurons were left out.
    int64_t run(int64_t begin, float* acc) {
        if (upper_) turn_inputs(job_.x, job_.n.width, job_.turned);
        Scanned ring[3];
        int64_t left_out = 0;
        const int64_t blocks = (end_ - begin + kOf32 - 1) / kOf32;
        const auto base = reinterpret_cast<uintptr_t>(job_.n.scan);
        const int64_t row = projections_ * tile_ / kTile;  // bytes of one neuron
        ahead_ = {base + begin * row + kScanLead, base + (end_ + kTile - 1) / kTile * kTile * row, job_.after, job_.after + (job_.after ? kScanLead : 0)};
        for (int64_t b = 0; b < blocks + 2; b++) {
            if (b < blocks) look(ring[b % 3], begin + b * kOf32, b % 2);
            if (b >= 1 && b - 1 < blocks) left_out += complete(ring[(b - 1) % 3], (b - 1) % 2);
            if (b >= 2) add(ring[(b - 2) % 3], acc);
        }
        return left_out;
    }

  private:
    const NeuronsJob& job_;
    const int64_t end_, projections_;
    bool upper_;
    int64_t tile_, scales_, low_;  // bytes of a tile of one projection, scales and last bits' bytes of a neuron
    Ahead ahead_{};

    float* scales(int parity) const { return job_.scales + parity * kOf32 * scales_; }

    template <class G>
    void multiply(const uint8_t* w, float (*to)[kOf32], int first) {
        TileJob job{};
        job.groups = job_.n.width / kGroup, job.q = job_.x.q, job.scale = job_.x.scale, job.sum = job_.x.sum;
        Ahead none{};
        for_rows(job_.x.rows, [&](int row, auto count) {
            constexpr int R = decltype(count)::value;
            float out[R][kTile];
            tile<G, false, R>(job, w, row, row ? none : ahead_, out);
            for (int r = 0; r < R; r++) memcpy(to[row + r] + first, out[r], sizeof out[r]);
        });
    }

    void look(Scanned& s, int64_t first, int parity) {
        s.first = first;
        s.count = static_cast<int>(end_ - first < kOf32 ? end_ - first : kOf32);
        for (int t = 0; t < s.count; t += kTile) {
            const uint8_t* w = job_.n.scan + (first + t) / kTile * projections_ * tile_;
            for (int p = 0; p < projections_; p++, w += tile_) {
                float (*to)[kOf32] = p + 1 == projections_ ? s.up : s.gate;
                if (upper_) multiply<Int4Upper>(w, to, t);
                else multiply<Int4>(w, to, t);
                if (upper_) {
                    const int64_t groups = job_.n.width / kGroup;
                    scales_by_row(w, groups, scales(parity) + t * scales_ + p * groups, scales_);
                }
            }
        }
        if (!upper_) return choose(s, s.up, job_.n.refine, true);
        float gate[kMaxRows][kOf32], up[kMaxRows][kOf32];
        memcpy(gate, s.gate, sizeof gate), memcpy(up, s.up, sizeof up);
        apply_act(job_, s.count, [&](int i) { return first + i; }, gate, up, false);
        mark(s, up, job_.n.threshold, false);
        for (uint32_t rest = s.any; rest; rest &= rest - 1)
            fetch_rows(job_.n.low + (first + __builtin_ctz(rest)) * low_, low_);
    }

    // Which neurons have scores of at least `least`, or NaN.
    void mark(Scanned& s, float (*a)[kOf32], float least, bool again) {
        s.any = 0;
        for (int r = 0; r < job_.x.rows; r++) {
            uint32_t wanted = 0;
            for (int i = 0; i < s.count; i++)
                wanted |= static_cast<uint32_t>(!(fabsf(a[r][i]) * job_.n.norm[s.first + i] < least)) << i;
            s.wanted[r] = again ? s.wanted[r] & wanted : wanted;
            s.any |= s.wanted[r];
        }
    }

    void choose(Scanned& s, float (*up)[kOf32], float least, bool exact) {
        apply_act(job_, s.count, [&](int i) { return s.first + i; }, s.gate, up, true);
        mark(s, up, least, !exact);
        for (uint32_t rest = s.any; rest; rest &= rest - 1)
            fetch_rows(job_.n.rows + (s.first + __builtin_ctz(rest)) * job_.n.row_bytes, job_.n.row_bytes);
    }

    // Gives candidates their last bits, and drops those that are too small. Returns how many neurons are left out.
    int64_t complete(Scanned& s, int parity) {
        if (upper_) {
            for (uint32_t rest = s.any; rest; rest &= rest - 1) {
                const int i = __builtin_ctz(rest);
                const uint8_t* bits = job_.n.low + (s.first + i) * low_;
                const float* scale = scales(parity) + i * scales_;
                for_rows(job_.x.rows, [&](int row, auto count) {
                    constexpr int R = decltype(count)::value;
                    float sum[2 * R];
                    if (job_.n.gated) last_bits_with<2, R>(job_, bits, scale, row, sum);
                    else last_bits_with<1, R>(job_, bits, scale, row, sum);
                    for (int r = 0; r < R; r++) {
                        if (job_.n.gated) s.gate[row + r][i] += sum[r];
                        s.up[row + r][i] += sum[job_.n.gated ? R + r : r];
                    }
                });
            }
            choose(s, s.up, job_.n.refine, false);
        }
        int64_t left_out = 0;
        for (int r = 0; r < job_.x.rows; r++) left_out += s.count - __builtin_popcount(s.wanted[r]);
        return left_out;
    }

    void add(Scanned& s, float* acc) {
        DownGroup group;
        for (uint32_t rest = s.any; rest; rest &= rest - 1) {
            const int i = __builtin_ctz(rest), n = group.count++;
            group.row[n] = job_.n.rows + (s.first + i) * job_.n.row_bytes;
            for (int r = 0; r < job_.x.rows; r++) group.h[r][n] = s.wanted[r] >> i & 1 ? s.up[r][i] : 0.f;
        }
        add_down_group(job_, group, s.first / kOf32, acc);
    }
};

static int64_t neurons(const NeuronsJob& job, int64_t begin, int64_t end, float* acc) {
    if (job.n.scan) return Scan(job, end).run(begin, acc);
    listed_neurons(job, begin, end, job.count, acc);
    return 0;
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
