// The groups that tiles are made of (formats.h): how their numbers are stored, how their ends are, and the formats, each
// of which is one of either. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

constexpr int kParts = kTile / kLanes;  // vectors of one number a row

static inline VI as_lanes(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, sizeof word);
    return VI{} + word;
}

static inline VU load_words(const uint8_t* w, int k, int p) {
    VU words;
    memcpy(&words, w + k * kLine + p * kVector, sizeof words);
    return words;
}

// ---- numbers in words ----

#if CORESKIP_LEVEL == 512
// From 0 to 15, less `zero`: looked up by the lowest four bits of an index.
template <int zero>
static inline __m512 small_numbers() {
    return _mm512_setr_ps(-zero, 1 - zero, 2 - zero, 3 - zero, 4 - zero, 5 - zero, 6 - zero, 7 - zero, 8 - zero,
                          9 - zero, 10 - zero, 11 - zero, 12 - zero, 13 - zero, 14 - zero, 15 - zero);
}
#endif

// The i-th nibble of every word, less `zero`.
template <int zero>
static inline V nibble_of(VU words, int i) {
#if CORESKIP_LEVEL == 512
    // one operation where masking and converting takes two
    return (V)_mm512_permutexvar_ps((__m512i)(words >> (4 * i)), small_numbers<zero>());
#else
    static_assert(zero == 0, "");
    return __builtin_convertvector((VI)(words >> (4 * i) & 15), V);
#endif
}

// The i-th byte of every word, which is below 32, less `zero`.
template <int zero>
static inline V small_byte_of(VU words, int i) {
#if CORESKIP_LEVEL == 512
    const __m512 low = small_numbers<zero>();
    const __m512 high = _mm512_add_ps(low, _mm512_set1_ps(16));
    return (V)_mm512_permutex2var_ps(low, (__m512i)(words >> (8 * i)), high);
#else
    static_assert(zero == 0, "");
    return __builtin_convertvector((VI)(words >> (8 * i) & 255), V);
#endif
}

// The bits from `at` on of every word, less half of what they can hold: as a signed number, once the first is turned.
template <int bits>
static inline V signed_of(VU words, int at) {
    constexpr uint32_t signs = bits == 4 ? 0x88888888u : (1u << (bits - 1)) * 0x01010101u;
    return __builtin_convertvector((VI)((words ^ signs) << (32 - bits - at)) >> (32 - bits), V);
}

// kLanes bytes, widened.
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

static inline V widen(const int8_t* q) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
#elif CORESKIP_LEVEL == 2
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
#else
    VQ few;
    memcpy(&few, q, sizeof few);
    return __builtin_convertvector(few, V);
#endif
}

// ---- sums of products of bytes ----

// Without VNNI, products of neighbours are 16 bits wide, and so are their sums as long as these fit: widening once for
// several of them is a third of the operations. Who adds sees to it that they do.
#if CORESKIP_LEVEL == 512
typedef VI Partial;
static inline void add(Partial& sum, VB u, VB s) { sum = multiply_add(sum, u, s); }
// s is four bytes for all lanes. One operation that reads them, where GCC 12 makes two.
static inline void add(Partial& sum, VB u, const int8_t* s) {
    typedef int32_t Word __attribute__((may_alias, aligned(1)));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const Word*>(s)));
}
static inline VI wide(Partial sum) { return sum; }
#else
typedef int16_t Partial __attribute__((vector_size(kVector)));
static inline void add(Partial& sum, VB u, VB s) {
#if CORESKIP_LEVEL == 2
    sum += (Partial)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
#else
    sum += (Partial)(u & (VB)(VU{} + 0x00ff00ff)) * ((Partial)s << 8 >> 8);
    sum += (Partial)((VH2)u >> 8) * ((Partial)s >> 8);
#endif
}
static inline void add(Partial& sum, VB u, const int8_t* s) { add(sum, u, (VB)as_lanes(s)); }
static inline VI wide(Partial sum) {
#if CORESKIP_LEVEL == 2
    return (VI)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#else
    return ((VI)sum << 16 >> 16) + ((VI)sum >> 16);
#endif
}
#endif
constexpr bool kWideSums = CORESKIP_LEVEL == 512;

// ---- how numbers are stored ----

// Four bits and, in vectors of their own, `more` above them. Byte j of word k / per there holds the upper bits of byte j
// of the `per` words that share it: of the low nibble of word k from bit at = more * (k % per) on, of the high one from
// bit at + 4 on.
template <int more>
struct Nibbles {
    static constexpr int bits = 4 + more, vectors = 4, bytes = bits * kLine, half = 1 << (bits - 1);
    static constexpr int per = more ? 4 / more : 4;
    static constexpr uint8_t upper = ((1 << more) - 1) << 4;

    struct Words {
        VU low, high;
    };

    static constexpr int at(int k) { return more * (k % per); }

    static void apart(const uint8_t* w, int k, int p, VB& low, VB& high) {
        VB both = load_bytes(w + k * kLine + p * kVector);
#if CORESKIP_LEVEL == 512
        asm("" : "+v"(both));  // else it is loaded twice, beside the many numbers of x
#endif
        low = both & 15, high = (VB)((VH2)both >> 4) & 15;
        if constexpr (more > 0) {
            const VH2 plane = (VH2)load_bytes(w + (vectors + k / per) * kLine + p * kVector);
            low |= (VB)(plane << (4 - at(k))) & upper;
            high |= (VB)(plane >> at(k)) & upper;
        }
    }

    // The same of the words of one row.
    static void apart(const uint32_t* words, int k, int row, uint32_t& low, uint32_t& high) {
        const uint32_t both = words[k * kTile + row];
        low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
        if constexpr (more > 0) {
            const uint32_t plane = words[(vectors + k / per) * kTile + row];
            low |= plane << (4 - at(k)) & upper * 0x01010101u;
            high |= plane >> at(k) & upper * 0x01010101u;
        }
    }

    static Words words(const uint8_t* w, int k, int p) {
        if constexpr (more == 0) return {load_words(w, k, p), VU{}};
        VB low, high;
        apart(w, k, p, low, high);
        return {(VU)low, (VU)high};
    }
    static constexpr int count = 8;  // inputs that Words hold
    static V number(const Words& words, int i) {
        if constexpr (more == 0) return nibble_of<0>(words.low, i);
        if constexpr (more == 1) return small_byte_of<0>(i % 2 ? words.high : words.low, i / 2);
        return weight_of<0>(i % 2 ? words.high : words.low, i / 2);
    }
    // number less half
    static V centred(const Words& words, int i) {
        if constexpr (more == 0 && kWideSums) return nibble_of<half>(words.low, i);
        if constexpr (more == 0) return signed_of<bits>(words.low, 4 * i);
        if constexpr (more == 1 && kWideSums) return small_byte_of<half>(i % 2 ? words.high : words.low, i / 2);
        return signed_of<bits>(i % 2 ? words.high : words.low, i / 2 * 8);
    }
    static int input(int k, int i) { return 4 * k + i / 2 + i % 2 * (kGroup / 2); }

    // Adds to sum[0] and sum[halves - 1] what the two halves of a group come to; lines: words that there are.
    template <int halves, int R, int lines = vectors>
    static void sums(const uint8_t* w, const int8_t* const* x, VI sum[halves][R][kParts]) {
        constexpr int together = kWideSums || more == 0 ? 4 : 2;  // words whose products fit 16 bits
        static_assert(kWideSums || together * 2 / halves * 2 * ((1 << bits) - 1) * 127 < 1 << 15, "");
        for (int k = 0; k < lines; k += together) {
            Partial some[halves][R][kParts] = {};
            for (int j = k; j < k + together && j < lines; j++)
                for (int p = 0; p < kParts; p++) {
                    VB low, high;
                    apart(w, j, p, low, high);
                    for (int r = 0; r < R; r++) {
                        add(some[0][r][p], low, x[r] + 4 * j);
                        add(some[halves - 1][r][p], high, x[r] + 4 * j + kGroup / 2);
                    }
                }
            for (int h = 0; h < halves; h++)
                for (int r = 0; r < R; r++)
                    for (int p = 0; p < kParts; p++) sum[h][r][p] += wide(some[h][r][p]);
        }
    }
};

// Three bits, in units of the four inputs from 4k on: a byte of the first three vectors holds units 2v and 2v + 1 in its
// lower six bits; the upper two hold the rest, the lower two bits of units 6 and 7 and then a bit of each.
struct Thirds {
    static constexpr int bits = 3, vectors = 3, bytes = vectors * kLine, half = 4;

    template <int halves, int R>
    static void sums(const uint8_t* w, const int8_t* const* x, VI sum[halves][R][kParts]) {
        static_assert(halves == 1, "");
        for (int p = 0; p < kParts; p++) {
            VB some[3], unit[8];
            for (int v = 0; v < 3; v++) {
                some[v] = load_bytes(w + v * kLine + p * kVector);
                unit[2 * v] = some[v] & 7, unit[2 * v + 1] = (VB)((VH2)some[v] >> 3) & 7;
            }
            for (int v = 0; v < 2; v++)
                unit[6 + v] = ((VB)((VH2)some[v] >> 6) & 3) | ((VB)((VH2)some[2] >> (4 + v)) & 4);
            // Two sums, for one would wait for itself. Products of at most 7 * 127, two a lane: eight units fit 16 bits.
            Partial even[R] = {}, odd[R] = {};
            for (int k = 0; k < 8; k += 2)
                for (int r = 0; r < R; r++) {
                    add(even[r], unit[k], x[r] + 4 * k);
                    add(odd[r], unit[k + 1], x[r] + 4 * k + 4);
                }
            for (int r = 0; r < R; r++) sum[0][r][p] += wide(even[r] + odd[r]);
        }
    }
};

struct Bytes {
    static constexpr int bits = 8, vectors = 8, bytes = vectors * kLine, half = 128;

    typedef VU Words;
    static constexpr int count = 4;

    static Words words(const uint8_t* w, int k, int p) { return load_words(w, k, p); }
    static V number(VU words, int i) { return weight_of<0>(words, i); }
    static V centred(VU words, int i) { return signed_of<bits>(words, 8 * i); }
    static int input(int k, int i) { return 4 * k + i; }

    template <int halves, int R>
    static void sums(const uint8_t* w, const int8_t* const* x, VI sum[halves][R][kParts]) {
        static_assert(halves == 1, "");
        Partial low[R][kParts] = {}, high[R][kParts] = {};  // without VNNI bytes are multiplied as two nibbles
        for (int k = 0; k < vectors; k++)
            for (int p = 0; p < kParts; p++) {
                const VB u = load_bytes(w + k * kLine + p * kVector);
                for (int r = 0; r < R; r++) {
                    if constexpr (kWideSums) {
                        add(low[r][p], u, x[r] + 4 * k);
                    } else {
                        const VB xs = (VB)as_lanes(x[r] + 4 * k);
                        add(low[r][p], u & 15, xs);
                        add(high[r][p], (VB)((VH2)u >> 4) & 15, xs);
                    }
                }
            }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < kParts; p++) sum[0][r][p] += wide(low[r][p]) + wide(high[r][p]) * 16;
    }
};

// ---- how ends are stored ----

static inline V half_of(const uint8_t* at, int i) { return load(reinterpret_cast<const F16*>(at) + i); }

// What groups share, before the first of them: nothing.
struct NoHead {
    static constexpr int bytes = 0, groups = 1;
    NoHead(const uint8_t*) {}
};

// w = scale * (q - half)
struct Centred {
    typedef NoHead Head;
    static constexpr int bytes = 2 * kTile, halves = 1;
    static constexpr bool centred = true;

    static V scale(const Head&, const uint8_t* at, int p, int) { return half_of(at, p * kLanes); }
    static V least(const Head&, const uint8_t*, int) { return V{}; }
};

// w = scale * q + least
struct TwoEnds {
    typedef NoHead Head;
    static constexpr int bytes = 4 * kTile, halves = 1;
    static constexpr bool centred = false;

    static V scale(const Head&, const uint8_t* at, int p, int) { return half_of(at, p * kLanes); }
    static V least(const Head&, const uint8_t* at, int p) { return half_of(at, kTile + p * kLanes); }
};

// w = scale * (2 * q + 0.5) + least
struct UpperEnds {
    typedef NoHead Head;
    static constexpr int bytes = 4 * kTile, halves = 1;
    static constexpr bool centred = false;

    static V scale(const Head&, const uint8_t* at, int p, int) { return half_of(at, p * kLanes) * 2.f; }
    static V least(const Head&, const uint8_t* at, int p) {
        return half_of(at, kTile + p * kLanes) + half_of(at, p * kLanes) * 0.5f;
    }
};

// A product that GCC is not to take apart: where it is added to each of many others, it would multiply those instead of
// fusing them with the sum. A third product a weight, 49 us for 39 on 1536 x 512 in AVX-512.
static inline V once(V product) {
#if CORESKIP_LEVEL == 512
    asm("" : "+v"(product));
#elif CORESKIP_LEVEL == 2
    asm("" : "+x"(product));
#endif
    return product;
}

// w = (d * scale) * q - (dmin * least)
struct SuperTwoEnds {
    struct Head {
        static constexpr int bytes = 4 * kTile, groups = kSuper;
        V d[kParts], dmin[kParts];
        Head(const uint8_t* w) {
            for (int p = 0; p < kParts; p++) d[p] = half_of(w, p * kLanes), dmin[p] = -half_of(w, kTile + p * kLanes);
        }
    };
    static constexpr int bytes = 2 * kTile, halves = 1;
    static constexpr bool centred = false;

    static V scale(const Head& head, const uint8_t* at, int p, int) { return head.d[p] * widen(at + p * kLanes); }
    static V least(const Head& head, const uint8_t* at, int p) {
        return once(head.dmin[p] * widen(at + kTile + p * kLanes));
    }
};

// w = (d * scale) * (q - half), with a scale for each half of a group
struct SuperCentred {
    struct Head {
        static constexpr int bytes = 2 * kTile, groups = kSuper;
        V d[kParts];
        Head(const uint8_t* w) {
            for (int p = 0; p < kParts; p++) d[p] = half_of(w, p * kLanes);
        }
    };
    static constexpr int bytes = 2 * kTile, halves = 2;
    static constexpr bool centred = true;

    static V scale(const Head& head, const uint8_t* at, int p, int half) {
        return head.d[p] * widen(reinterpret_cast<const int8_t*>(at) + half * kTile + p * kLanes);
    }
    static V least(const Head&, const uint8_t*, int) { return V{}; }
};

// ---- formats ----

template <int code, class N, class E>
struct Group {
    typedef N Numbers;
    typedef E Ends;
    typedef typename E::Head Head;
    static constexpr int bytes = N::bytes + E::bytes, block = Head::bytes + Head::groups * bytes;
    static_assert(tile_block(code).groups == Head::groups && tile_block(code).bytes == block, "");
};
typedef Group<kInt4, Nibbles<0>, TwoEnds> Int4;
typedef Group<kInt8Groups, Bytes, Centred> Int8;
typedef Group<kInt4Upper, Thirds, UpperEnds> Int4Upper;

// work(group) with the group of a format.
template <class Work>
static inline void with_format(int format, Work work) {
    switch (format) {
        case kInt4: return work(Int4{});
        case kInt8Groups: return work(Int8{});
        case kInt4Centred: return work(Group<kInt4Centred, Nibbles<0>, Centred>{});
        case kInt5: return work(Group<kInt5, Nibbles<1>, TwoEnds>{});
        case kInt5Centred: return work(Group<kInt5Centred, Nibbles<1>, Centred>{});
        case kInt4Super: return work(Group<kInt4Super, Nibbles<0>, SuperTwoEnds>{});
        case kInt5Super: return work(Group<kInt5Super, Nibbles<1>, SuperTwoEnds>{});
        case kInt6Super: return work(Group<kInt6Super, Nibbles<2>, SuperCentred>{});
    }
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
