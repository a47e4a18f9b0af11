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

// y[n][r] += what P rows' last bits add to the products with R rows of x, for which they counted as a half.
template <int P, int R>
__attribute__((always_inline)) static inline void add_last_bits(const Inputs& in, const uint8_t* const* bits,
                                                                const float* const* scales, V y[P][R]) {
    const auto ends = [&](int n, int64_t g, const First& first, V& scale, V& least) __attribute__((always_inline)) {
        scale = first.of(scales[n] + g);
        least = scale * -0.5f;
    };
    const auto block = [&](int n, int64_t b, int p, const int8_t* x, VI* sum, VI* more) __attribute__((always_inline)) {
        const uint8_t* from = bits[n] + b * (kBlockInputs / 8);
#pragma GCC unroll 8
        for (int step = 0; step < kGroup / 4; step++)
            for (int r = 0; r < R; r++) {
                const VB some = where_set(from + step * (kLine / 8), p, load_bytes(x + r * in.width + step * kLine));
                if (step % 2) more[r] = multiply_add(more[r], VB{} + 1, some);
                else sum[r] = multiply_add(sum[r], VB{} + 1, some);
            }
    };
    const auto run = [&](int n, int64_t i, int p, VB x) __attribute__((always_inline)) {
        return multiply_add(VI{}, VB{} + 1, where_set(bits[n] + i * (kRun / 8), p, x));
    };
    add_rows<P, R>(in, ends, block, run, y);
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
    Scan(const NeuronsJob& job, int64_t end)
        : job_(job), end_(end), groups_(job.n.width / kGroup), upper_(job.n.format == kInt4Upper), gates_(job.n.reach),
          tile_(groups_ * (upper_ ? Int4Upper::bytes : Int4::bytes)), scales_(job.n.gated ? 2 * groups_ : groups_) {
        first_ = job.n.gated ? 0 : 1;
        last_ = gates_ ? 1 : 2;
    }

    // Returns how many neurons were left out.
    int64_t run(int64_t begin, float* acc) {
        if (job_.n.rest) turn_inputs(job_.x, job_.n.width, job_.turned);
        Scanned ring[3];
        int64_t left_out = 0;
        const int64_t blocks = (end_ - begin + kOf32 - 1) / kOf32;
        const auto base = reinterpret_cast<uintptr_t>(job_.n.scan);
        const int64_t row = (last_ - first_) * tile_ / kTile;  // bytes of one neuron
        ahead_ = {base + begin * row + kScanLead, base + (end_ + kTile - 1) / kTile * kTile * row, job_.after,
                  job_.after + (job_.after ? kScanLead : 0)};
        for (int64_t b = 0; b < blocks + 2; b++) {
            Scanned &first = ring[b % 3], &second = ring[(b + 2) % 3], &third = ring[(b + 1) % 3];
            first.any = 0;
            if (b < blocks) look(first, begin + b * kOf32, scales(b));
            if (b >= 1 && b - 1 < blocks) left_out += choose(second, scales(b - 1), first);
            else second.any = 0;
            if (b >= 2) add(third, second, acc);
        }
        return left_out;
    }

  private:
    const NeuronsJob& job_;
    const int64_t end_, groups_;
    const bool upper_, gates_;
    const int64_t tile_, scales_;  // bytes of a tile of one projection; scales of a neuron
    int first_, last_;             // of the projections that are scanned: gate is 0, up is 1
    Ahead ahead_{};

    float* scales(int64_t block) const { return job_.scales + block % 2 * kOf32 * scales_; }

    template <class G>
    void multiply(const uint8_t* w, float (*to)[kOf32], int first) {
        TileJob job{};
        job.groups = groups_, job.q = job_.x.q, job.scale = job_.x.scale, job.sum = job_.x.sum;
        for_rows(job_.x.rows, [&](int row, auto count) {
            constexpr int R = decltype(count)::value;
            V out[R][kParts];
            tile<G, false, R, true>(job, w, row, row ? nullptr : &ahead_, out);
            for (int r = 0; r < R; r++) memcpy(to[row + r] + first, out[r], sizeof out[r]);
        });
    }

    // Scans a group, and marks its candidates.
    void look(Scanned& s, int64_t first, float* scales) {
        s.first = first;
        s.count = static_cast<int>(end_ - first < kOf32 ? end_ - first : kOf32);
        for (int t = 0; t < s.count; t += kTile) {
            const uint8_t* w = job_.n.scan + (first + t) / kTile * (last_ - first_) * tile_;
            for (int p = first_; p < last_; p++, w += tile_) {
                float (*to)[kOf32] = p ? s.up : s.gate;
                if (upper_) multiply<Int4Upper>(w, to, t);
                else multiply<Int4>(w, to, t);
                if (upper_) scales_by_row(w, groups_, scales + t * scales_ + (p - first_) * groups_, scales_);
            }
        }
        const auto neuron = [&](int i) { return first + i; };
        for (int r = 0; r < job_.x.rows; r++) s.wanted[r] = ~0u >> (kOf32 - s.count);
        if (gates_) {
            apply_act_alone(job_, s.count, neuron, s.gate);
            return mark(s, s.gate, job_.n.reach, job_.n.threshold);
        }
        if (!upper_) return apply_act(job_, s.count, neuron, s.gate, s.up, true);
        float gate[kMaxRows][kOf32], up[kMaxRows][kOf32];
        memcpy(gate, s.gate, job_.x.rows * sizeof gate[0]), memcpy(up, s.up, job_.x.rows * sizeof up[0]);
        apply_act(job_, s.count, neuron, gate, up, false);
        mark(s, up, job_.n.norm, job_.n.threshold);
    }

    // Leaves those whose |a| times `norm` is at least `least`, or NaN.
    void mark(Scanned& s, float (*a)[kOf32], const float* norm, float least) {
        s.any = 0;
        for (int r = 0; r < job_.x.rows; r++) {
            uint32_t wanted = 0;
            for (int i = 0; i < s.count; i++)
                wanted |= static_cast<uint32_t>(!(fabsf(a[r][i]) * norm[s.first + i] < least)) << i;
            s.wanted[r] &= wanted;
            s.any |= s.wanted[r];
        }
    }

    // Reads the rest of the candidates, while it fetches that of `next`, and leaves those whose exact scores suffice. Returns
    // how many neurons are left out.
    int64_t choose(Scanned& s, const float* scales, const Scanned& next) {
        if (job_.n.rest) {
            uint32_t later = next.any;
            const auto take_later = [&]() -> const uint8_t* {
                if (!later) return nullptr;
                const int i = __builtin_ctz(later);
                later &= later - 1;
                return job_.n.rest + (next.first + i) * job_.n.rest_bytes;
            };
            for_rows(job_.x.rows, [&](int row, auto count) {
                constexpr int R = decltype(count)::value;
                const Inputs in(job_, row);
                for (uint32_t rest = s.any; rest;) {
                    int two[2];
                    two[0] = two[1] = __builtin_ctz(rest);  // the last one, where it is alone, counts twice
                    rest &= rest - 1;
                    if (rest) two[1] = __builtin_ctz(rest);
                    rest &= rest - 1;
                    const uint8_t* fetched[2] = {take_later(), take_later()};
                    if (gates_) complete_ups<R>(s, in, row, two, fetched);
                    else complete_bits<R>(s, in, scales, row, two, fetched);
                }
            });
            while (later) fetch_all(take_later(), job_.n.rest_bytes);
            const auto neuron = [&](int i) { return s.first + i; };
            if (gates_) multiply_by_act(job_, s.count, neuron, s.gate, s.up);
            else apply_act(job_, s.count, neuron, s.gate, s.up, true);
        }
        mark(s, s.up, job_.n.norm, job_.n.refine);
        int64_t left_out = 0;
        for (int r = 0; r < job_.x.rows; r++) left_out += s.count - __builtin_popcount(s.wanted[r]);
        return left_out;
    }

    const uint8_t* rest_of(const Scanned& s, int i) const { return job_.n.rest + (s.first + i) * job_.n.rest_bytes; }

    // Two neurons' up rows.
    template <int R>
    __attribute__((noinline)) void complete_ups(Scanned& s, const Inputs& in, int row, const int* two, const uint8_t* const* fetched) {
        V y[2][R] = {};
        float sum[2][R];
        const uint8_t* const w[2] = {rest_of(s, two[0]), rest_of(s, two[1])};
        const uint8_t* const next[2] = {fetched[0] ? fetched[0] : w[0], fetched[1] ? fetched[1] : w[1]};
        add_nibbles<2, R>(in, w, next, y);
        totals<2 * R>(y[0], sum[0]);
        for (int n = 0; n < 2; n++)
            for (int r = 0; r < R; r++) s.up[row + r][two[n]] = sum[n][r];
    }

    // Two neurons' last bits.
    template <int R>
    void complete_bits(Scanned& s, const Inputs& in, const float* scales, int row, const int* two,
                       const uint8_t* const* fetched) {
        if (job_.n.gated) complete_parts<2, R>(s, in, scales, row, two, fetched);
        else complete_parts<1, R>(s, in, scales, row, two, fetched);
    }

    template <int P, int R>
    __attribute__((noinline)) void complete_parts(Scanned& s, const Inputs& in, const float* scales, int row, const int* two,
                                                  const uint8_t* const* fetched) {
        V y[2 * P][R] = {};
        float sum[2 * P][R];
        const uint8_t* bits[2 * P];
        const float* scale[2 * P];
        for (int n = 0; n < 2; n++) {
            if (fetched[n]) fetch_all(fetched[n], job_.n.rest_bytes);
            for (int p = 0; p < P; p++) {
                bits[n * P + p] = rest_of(s, two[n]) + p * (in.width / 8);
                scale[n * P + p] = scales + two[n] * scales_ + p * groups_;
            }
        }
        add_last_bits<2 * P, R>(in, bits, scale, y);
        totals<2 * P * R>(y[0], sum[0]);
        for (int n = 0; n < (two[0] == two[1] ? 1 : 2); n++)
            for (int r = 0; r < R; r++) {
                if (P == 2) s.gate[row + r][two[n]] += sum[n * P][r];
                s.up[row + r][two[n]] += sum[n * P + P - 1][r];
            }
    }

    // Adds what is kept to acc, while it fetches the down rows of `next`.
    void add(const Scanned& s, const Scanned& next, float* acc) {
        DownGroup group;
        for (int r = 0; r < job_.x.rows; r++) memset(group.h[r], 0, sizeof group.h[r]);
        const auto row_of = [&](int64_t i) { return job_.n.rows + i * job_.n.row_bytes; };
        uint32_t later = next.any;
        for (uint32_t rest = s.any; rest; rest &= rest - 1) {
            const int i = __builtin_ctz(rest), n = group.count++;
            group.row[n] = row_of(s.first + i);
            group.next[n] = later ? row_of(next.first + __builtin_ctz(later)) : group.row[n];
            later &= later - 1;
            for (int r = 0; r < job_.x.rows; r++) group.h[r][n] = s.wanted[r] >> i & 1 ? s.up[r][i] : 0.f;
        }
        for (; later; later &= later - 1) fetch_all(row_of(next.first + __builtin_ctz(later)), job_.n.row_bytes);
        group.next_ends = job_.n.ends + (next.any ? next.first : s.first) / kOf32 * 2 * job_.n.width;
        add_down_group(job_, group, s.first / kOf32, acc);
    }
};

static int64_t neurons(const NeuronsJob& job, int64_t begin, int64_t end, float* acc) {
    if (job.n.scan) return Scan(job, end).run(begin, acc);
    Listed(job, begin, end).run(acc);
    return 0;
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
