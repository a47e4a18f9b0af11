// The choice of neurons by their scores. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// What scores are ordered by: their bits, which for numbers from 0 rise with them. A NaN comes last, beside infinity:
// it has to reach the output, as it would in a dense layer.
static void order(const float* score, int64_t n, uint32_t* keys) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, score + i, sizeof bits);
        keys[i] = score[i] == score[i] ? bits : 0x7f800000;
    }
}

static int64_t count_from(uint32_t least, const uint32_t* keys, int64_t n) {
    VI count = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        VI some;
        memcpy(&some, keys + i, sizeof some);
        count -= some >= VI{} + static_cast<int32_t>(least);
    }
    int64_t result = total(count);
    for (; i < n; i++) result += keys[i] >= least;
    return result;
}

// What the `rank` greatest (from 1) of n keys below 2^31 have in common: they are at least this. Found bit by bit, for
// counting is what vectors do best: 0.9 us for 1536 keys, where a histogram and a sort of one of its bins took 1.4.
static uint32_t least_of(int64_t rank, const uint32_t* keys, int64_t n) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        const int64_t count = count_from(found | bit, keys, n);
        if (count >= rank) found |= bit;
        if (count == rank) break;
    }
    return found;
}

#if CORESKIP_LEVEL == 512
// Appends first + i for every lane i that is wanted. Nothing is written beyond the last.
static inline int64_t append(int64_t* to, __mmask16 wanted, int64_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i packed = _mm512_maskz_compress_epi32(wanted, lanes), base = _mm512_set1_epi64(first);
    const int count = __builtin_popcount(wanted);
    const uint32_t filled = (1u << count) - 1;
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(packed));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(packed, 1));
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(filled), _mm512_add_epi64(low, base));
    _mm512_mask_storeu_epi64(to + 8, static_cast<__mmask8>(filled >> 8), _mm512_add_epi64(high, base));
    return count;
}
#endif

// The places of the keys above `last`, and of the first `equal` that are equal to it. They fit into [width].
static int64_t places(const uint32_t* keys, int64_t n, uint32_t last, int64_t equal, int64_t* to, int64_t width) {
    int64_t kept = 0, i = 0;
#if CORESKIP_LEVEL == 512  // one by one: 1.5 to 1.9 us for 1536 keys
    const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(last));
    for (; i + kLanes <= n; i += kLanes) {
        const __m512i some = _mm512_loadu_si512(keys + i);
        uint32_t ties = _mm512_cmpeq_epi32_mask(some, least);
        while (__builtin_popcount(ties) > equal) ties &= ~(0x80000000u >> __builtin_clz(ties));
        equal -= __builtin_popcount(ties);
        kept += append(to + kept, static_cast<__mmask16>(_mm512_cmpgt_epi32_mask(some, least) | ties), i);
    }
#endif
    for (; i < n && kept < width; i++) {
        const bool tie = keys[i] == last && equal > 0;
        to[kept] = i;
        kept += keys[i] > last || tie;
        equal -= tie;
    }
    return kept;
}

static int64_t choose(const float* score, int64_t neurons, int64_t keep, float threshold, uint32_t* keys, int64_t* to,
                      int64_t width) {
    if (keep == 0) return 0;
    if (keep < 0) {  // scores and threshold of either sign: what learned predictors say before the sigmoid
        for (int64_t i = 0; i < neurons; i++) keys[i] = !(score[i] < threshold);  // true of a NaN, too
        return places(keys, neurons, 0, 0, to, width);
    }
    order(score, neurons, keys);
    uint32_t last = 0;
    if (keep < neurons) last = least_of(keep, keys, neurons);
    return places(keys, neurons, last, keep - count_from(last + 1, keys, neurons), to, width);
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
