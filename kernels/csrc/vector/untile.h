// From tiles of 4 or 8 bits back to rows of floats, for passes over many tokens, whose products are torch's; and from
// floats to the tiles that hold just them. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// The bytes of one group of a tile, [kTile][kGroup / 4] words of four inputs, and what they stand for:
// w = scale * q + least.
static inline void take_apart(Nibbles, const uint8_t* w, uint32_t* q, float* scale, float* least) {
    uint32_t words[kTile * kGroup / 8];
    memcpy(words, w, sizeof words);
    for (int r = 0; r < kTile; r++)
        for (int k = 0; k < 4; k++) {
            q[r * 8 + k] = words[k * kTile + r] & 0x0f0f0f0f;
            q[r * 8 + 4 + k] = words[k * kTile + r] >> 4 & 0x0f0f0f0f;
        }
    const F16* ends = reinterpret_cast<const F16*>(w + 4 * kLine);
    for (int r = 0; r < kTile; r += kLanes) {
        store(scale + r, load(ends + r));
        store(least + r, load(ends + kTile + r));
    }
}

static inline void take_apart(Bytes, const uint8_t* w, uint32_t* q, float* scale, float* least) {
    uint32_t words[kTile * kGroup / 4];
    memcpy(words, w, sizeof words);
    for (int r = 0; r < kTile; r++)
        for (int k = 0; k < 8; k++) q[r * 8 + k] = words[k * kTile + r];
    const F16* ends = reinterpret_cast<const F16*>(w + 8 * kLine);
    for (int r = 0; r < kTile; r += kLanes) {
        store(scale + r, load(ends + r));
        store(least + r, load(ends + r) * -128.f);
    }
}

static inline V widen(const uint8_t* q) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
#elif CORESKIP_LEVEL == 2
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
#else
    typedef uint8_t Few __attribute__((vector_size(kLanes)));
    Few few;
    memcpy(&few, q, sizeof few);
    return __builtin_convertvector(few, V);
#endif
}

template <class W, class T>
static void untile_as(const UntileJob& job, int64_t begin, int64_t end) {
    uint32_t q[kTile * kGroup / 4];
    float scale[kTile], least[kTile];
    for (int64_t row = begin; row < end;) {
        const int64_t t = row / kTile, last = end < (t + 1) * kTile ? end : (t + 1) * kTile;
        const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * job.groups * W::bytes;
        for (int64_t g = 0; g < job.groups; g++, w += W::bytes) {
            take_apart(W{}, w, q, scale, least);
            const int64_t left = job.in - g * kGroup, width = left < kGroup ? left : kGroup;
            for (int64_t r = row; r < last; r++) {
                const int64_t here = r - t * kTile;
                const uint8_t* from = reinterpret_cast<const uint8_t*>(q + here * 8);
                T whole[kGroup];  // of the last group of a row perhaps not all is wanted
                T* to = static_cast<T*>(job.to) + (r - job.first) * job.in + g * kGroup;
                T* out = width == kGroup ? to : whole;
                // the product is exact: no machine's sum differs, contracted or not
                for (int i = 0; i < kGroup; i += kLanes) store(out + i, widen(from + i) * scale[here] + least[here]);
                if (out == whole) memcpy(to, whole, width * sizeof(T));
            }
        }
        row = last;
    }
}

template <class W>
static void untile_of(const UntileJob& job, int64_t begin, int64_t end) {
    if (job.dtype == kBFloat16) untile_as<W, BF16>(job, begin, end);
    else if (job.dtype == kFloat16) untile_as<W, F16>(job, begin, end);
    else untile_as<W, float>(job, begin, end);
}

static void untile(const UntileJob& job, int64_t begin, int64_t end) {
    if (job.bytes) untile_of<Bytes>(job, begin, end);
    else untile_of<Nibbles>(job, begin, end);
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
static bool group_of(Nibbles, const float* w, float* q, F16* scale, F16* least) {
    const float low = -greatest_of(w, -1.f), high = greatest_of(w, 1.f);
    for (int steps = 15; steps > 0; steps--) {
        const float step = as_half((high - low) / steps, scale);
        if (fits(w, step, as_half(low, least), 15.f, q)) return true;
        if (fits(w, as_half(-step, scale), as_half(high, least), 15.f, q)) return true;
    }
    return false;
}

static bool group_of(Bytes, const float* w, float* q, F16* scale, F16*) {
    const float low = greatest_of(w, -1.f), high = greatest_of(w, 1.f);
    const float step = as_half((low > high ? low : high) / 127.f, scale);
    return fits(w, step, -128.f * step, 255.f, q);
}

static inline void put(Nibbles, uint8_t* tile, int row, const float* q, F16 scale, F16 least) {
    for (int i = 0; i < kGroup / 2; i++)
        tile[i / 4 * kLine + row * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(q[i]) | static_cast<int>(q[i + kGroup / 2]) << 4);
    F16* ends = reinterpret_cast<F16*>(tile + 4 * kLine);
    ends[row] = scale, ends[kTile + row] = least;
}

static inline void put(Bytes, uint8_t* tile, int row, const float* q, F16 scale, F16) {
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
    return job.bytes ? tile_up_as<Bytes>(job, begin, end) : tile_up_as<Nibbles>(job, begin, end);
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
