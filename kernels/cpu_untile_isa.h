// From tiles of 4 or 8 bits back to rows of floats, for passes over many tokens, whose products are torch's.
// Included by cpu_step_isa.h, under its rules: once per instruction set, no C++ standard library.

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

}  // namespace CORESKIP_ISA
}  // namespace coreskip
