// Neurons that each token chooses, in 4-bit groups: all are scanned, and of those that may matter the rest is read.
// Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// ---- scales by neuron ----

// Turns a square of kLanes vectors around its diagonal.
static inline void transpose(V* m) {
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2) {
        VI low, high;  // lanes of a pair of rows that make the first and the second of them
        for (int i = 0; i < kLanes; i++) {
            low[i] = i & step ? kLanes + i - step : i;
            high[i] = i & step ? kLanes + i : i + step;
        }
        for (int i = 0; i < kLanes; i++) {
            if (i & step) continue;
            const V a = m[i], b = m[i + step];
            m[i] = __builtin_shuffle(a, b, low), m[i + step] = __builtin_shuffle(a, b, high);
        }
    }
}

// The scales of a tile's rows, one row after the other: to[row * stride + group].
static inline void scales_by_row(const uint8_t* tile, int64_t groups, float* to, int64_t stride) {
    for (int64_t g = 0; g < groups; g += kLanes)
        for (int part = 0; part < kParts; part++) {
            V m[kLanes];
            for (int i = 0; i < kLanes; i++) {
                const int64_t group = g + i < groups ? g + i : groups - 1;
                m[i] = half_of(tile + group * Int4Upper::bytes + Thirds::bytes, part * kLanes);
            }
            transpose(m);
            for (int row = 0; row < kLanes; row++) {
                float* at = to + (part * kLanes + row) * stride + g;
                if (g + kLanes <= groups) store(at, m[row]);
                else memcpy(at, &m[row], (groups - g) * sizeof(float));
            }
        }
}

// ---- the last bits ----

// y[p][r] += what the last bits of P rows add to the products with R rows of x, for which they counted as a half.
template <int P, int R>
static inline void add_last_bits(const NeuronsJob& job, const uint8_t* bits, const float* scales, int row, V y[P][R]) {
    const int64_t groups = job.n.width / kGroup, bytes = job.n.width / 8;
    for (int64_t g = 0; g < groups; g += kLanes) {
        const int64_t left = groups - g, runs = left < kLanes ? left / 2 : kLanes / 2;
        for (int n = 0; n < P; n++) {
            const V scale = load_first(scales + n * groups + g, left);
            for (int r = 0; r < R; r++) {
                const int64_t at = (row + r) * groups + g;
                y[n][r] -= 0.5f * scale * load_first(job.x.sum + at, left);
                const Factors factors(scale * load_first(job.x.scale + at, left));
                const int8_t* x = job.x.q + at * kGroup;
#pragma GCC unroll 8
                for (int i = 0; i < kLanes / 2; i++) {
                    if (i >= runs) break;
                    for (int p = 0; p < kRunParts; p++) {
                        const VB some = where_set(bits + n * bytes + (g / 2 + i) * (kRun / 8), p,
                                                  load_bytes(x + i * kRun + p * kVector));
                        const VI sums = multiply_add(VI{}, VB{} + 1, some);
                        y[n][r] += __builtin_convertvector(sums, V) * factors.of(i, p);
                    }
                }
            }
        }
    }
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
    static constexpr int64_t kScanLead = 64 << 10;

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
                    if (job_.n.gated) {
                        V y[2][R] = {};
                        add_last_bits<2, R>(job_, bits, scale, row, y);
                        totals<2 * R>(y[0], sum);
                    } else {
                        V y[1][R] = {};
                        add_last_bits<1, R>(job_, bits, scale, row, y);
                        totals<R>(y[0], sum);
                    }
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
