// From tiles of 4 to 8 bits back to rows of floats, for passes over many tokens, whose products are torch's; and from
// floats to the tiles that hold just them. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// The numbers of a group, [kTile][kGroup / 4] words of four inputs.
template <int more>
static inline void take_apart(Nibbles<more>, const uint8_t* w, uint32_t* q) {
    uint32_t words[Nibbles<more>::bytes / 4];
    memcpy(words, w, sizeof words);
    for (int r = 0; r < kTile; r++)
        for (int k = 0; k < 4; k++) Nibbles<more>::apart(words, k, r, q[r * 8 + k], q[r * 8 + 4 + k]);
}

static inline void take_apart(Bytes, const uint8_t* w, uint32_t* q) {
    uint32_t words[kTile * kGroup / 4];
    memcpy(words, w, sizeof words);
    for (int r = 0; r < kTile; r++)
        for (int k = 0; k < 8; k++) q[r * 8 + k] = words[k * kTile + r];
}

// One group of a tile, and what it stands for.
template <class G>
struct Apart {
    typedef typename G::Numbers N;
    typedef typename G::Ends E;
    uint32_t q[kTile * kGroup / 4];
    float scale[E::halves][kTile], least[kTile];

    void take(const typename G::Head& head, const uint8_t* w) {
        take_apart(N{}, w, q);
        for (int p = 0; p < kParts; p++) {
            for (int h = 0; h < E::halves; h++) store(scale[h] + p * kLanes, E::scale(head, w + N::bytes, p, h));
            store(least + p * kLanes, E::least(head, w + N::bytes, p));
        }
    }

    // kLanes numbers of a row from input i on. The product is exact: no machine's sum differs, contracted or not. Of
    // centred ones not even the sign of a zero does.
    V numbers(int64_t row, int i) const {
        const V wide = widen(reinterpret_cast<const uint8_t*>(q + row * 8) + i);
        const float step = scale[E::halves > 1 ? i / (kGroup / 2) : 0][row];
        if constexpr (E::centred) return (wide - static_cast<float>(N::half)) * step;
        else return wide * step + least[row];
    }
};

template <class G, class T>
static void untile_as(const UntileJob& job, int64_t begin, int64_t end) {
    typedef typename G::Head Head;
    Apart<G> apart;
    for (int64_t row = begin; row < end;) {
        const int64_t t = row / kTile, last = end < (t + 1) * kTile ? end : (t + 1) * kTile;
        const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * (job.groups / Head::groups * G::block);
        for (int64_t block = 0; block < job.groups; block += Head::groups) {
            const Head head(w);
            w += Head::bytes;
            for (int64_t g = block; g < block + Head::groups; g++, w += G::bytes) {
                apart.take(head, w);
                const int64_t left = job.in - g * kGroup, width = left < kGroup ? left : kGroup;
                for (int64_t r = row; r < last; r++) {
                    T whole[kGroup];  // of the last group of a row perhaps not all is wanted
                    T* to = static_cast<T*>(job.to) + (r - job.first) * job.in + g * kGroup;
                    T* out = width == kGroup ? to : whole;
                    for (int i = 0; i < kGroup; i += kLanes) store(out + i, apart.numbers(r - t * kTile, i));
                    if (out == whole) memcpy(to, whole, width * sizeof(T));
                }
            }
        }
        row = last;
    }
}

static void untile(const UntileJob& job, int64_t begin, int64_t end) {
    with_format(job.format, [&](auto group) {
        typedef decltype(group) G;
        if (job.dtype == kBFloat16) untile_as<G, BF16>(job, begin, end);
        else if (job.dtype == kFloat16) untile_as<G, F16>(job, begin, end);
        else untile_as<G, float>(job, begin, end);
    });
}

// ---- floats that are such numbers ----

static inline float as_half(float value, F16* half) {
    float lane[kLanes] = {value};
    F16 halves[kLanes];
    store(halves, load(lane));
    *half = halves[0];
    store(lane, load(halves));
    return lane[0];
}

// q from 0 to `most` with w = scale * q + least for a whole group; false where there is none.
static inline bool fits(const float* w, float scale, float least, float most, float* q) {
    const float steps = scale == 0.f ? 0.f : 1.f / scale;
    VI wrong = {};
    for (int i = 0; i < kGroup; i += kLanes) {
        const V v = load(w + i);
        V near = ((v - least) * steps + 0x1.8p23f) - 0x1.8p23f;
        near = near < 0.f ? V{} : near;
        near = near > most ? splat(most) : near;
        wrong |= near * scale + least != v;
        store(q + i, near);
    }
    return total(wrong) == 0;
}

static inline float greatest_of(const float* w, float sign) {
    V most = load(w) * sign;
    for (int i = kLanes; i < kGroup; i += kLanes) {
        const V v = load(w + i) * sign;
        most = v > most ? v : most;
    }
    return greatest(most);
}

// One end of the group is `least`, and the other 15 steps from it or, where that fails, fewer: who made these numbers
// may have counted from either end, and need not have used all of them.
static bool group_of(Int4, const float* w, float* q, F16* scale, F16* least) {
    const float low = -greatest_of(w, -1.f), high = greatest_of(w, 1.f);
    for (int steps = 15; steps > 0; steps--) {
        const float step = as_half((high - low) / steps, scale);
        if (fits(w, step, as_half(low, least), 15.f, q)) return true;
        if (fits(w, as_half(-step, scale), as_half(high, least), 15.f, q)) return true;
    }
    return false;
}

static bool group_of(Int8, const float* w, float* q, F16* scale, F16*) {
    const float low = greatest_of(w, -1.f), high = greatest_of(w, 1.f);
    const float step = as_half((low > high ? low : high) / 127.f, scale);
    return fits(w, step, -128.f * step, 255.f, q);
}

static inline void put(Int4, uint8_t* tile, int row, const float* q, F16 scale, F16 least) {
    for (int i = 0; i < kGroup / 2; i++)
        tile[i / 4 * kLine + row * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(q[i]) | static_cast<int>(q[i + kGroup / 2]) << 4);
    F16* ends = reinterpret_cast<F16*>(tile + 4 * kLine);
    ends[row] = scale, ends[kTile + row] = least;
}

static inline void put(Int8, uint8_t* tile, int row, const float* q, F16 scale, F16) {
    for (int i = 0; i < kGroup; i++) tile[i / 4 * kLine + row * 4 + i % 4] = static_cast<uint8_t>(q[i]);
    reinterpret_cast<F16*>(tile + 8 * kLine)[row] = scale;
}

template <class W>
static bool tile_up_as(const TileUpJob& job, int64_t begin, int64_t end) {
    float w[kGroup], q[kGroup];
    F16 scale, least = {};
    for (int64_t t = begin; t < end; t++) {
        uint8_t* tile = static_cast<uint8_t*>(job.to) + t * job.groups * W::bytes;
        memset(tile, 0, job.groups * W::bytes);
        for (int64_t row = t * kTile; row < job.rows && row < (t + 1) * kTile; row++)
            for (int64_t g = 0; g < job.groups; g++) {
                const float* from = job.from + row * job.row_stride + g * kGroup;
                const int64_t left = job.in - g * kGroup;
                // what a row lacks in its last group must not widen the group's range
                for (int i = 0; i < kGroup; i++) w[i] = from[i < left ? i : left - 1];
                if (!group_of(W{}, w, q, &scale, &least)) return false;
                put(W{}, tile + g * W::bytes, static_cast<int>(row - t * kTile), q, scale, least);
            }
    }
    return true;
}

static bool tile_up(const TileUpJob& job, int64_t begin, int64_t end) {
    return job.format == kInt8Groups ? tile_up_as<Int8>(job, begin, end) : tile_up_as<Int4>(job, begin, end);
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
