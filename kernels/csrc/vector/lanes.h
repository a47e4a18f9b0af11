// Vectors of floats and integers: loads and stores of every weight format, sums over lanes. Every format computes in
// fp32. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

#if CORESKIP_LEVEL == 512
constexpr int kVector = 64;
#elif CORESKIP_LEVEL == 2
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kLanes = kVector / 4;
#ifdef CORESKIP_BF16
constexpr bool kPaired = true;
#else
constexpr bool kPaired = false;
#endif

typedef float V __attribute__((vector_size(kVector)));
typedef int32_t VI __attribute__((vector_size(kVector)));
typedef uint32_t VU __attribute__((vector_size(kVector)));
typedef uint16_t VH __attribute__((vector_size(kVector / 2)));
typedef uint16_t VH2 __attribute__((vector_size(kVector)));
typedef uint8_t VB __attribute__((vector_size(kVector)));

template <int n> struct Count { static constexpr int value = n; };  // a number that a lambda can be told

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct U8 { uint8_t bits; };      // a weight and 128
struct Sliced { uint8_t bits; };  // nibbles of two weights; U8 in the down row

// What a weight format computes with: X are the rows of x, Sum their products, Down the format of the down rows.
template <class W> struct Format { typedef float X; typedef float Sum; typedef V Lanes; typedef W Down; static constexpr bool sliced = false, paired = false; };
template <> struct Format<BF16> { typedef float X; typedef float Sum; typedef V Lanes; typedef BF16 Down; static constexpr bool sliced = false, paired = kPaired; };
template <> struct Format<U8> { typedef int8_t X; typedef int32_t Sum; typedef VI Lanes; typedef U8 Down; static constexpr bool sliced = false; };
template <> struct Format<Sliced> { typedef int8_t X; typedef int32_t Sum; typedef VI Lanes; typedef U8 Down; static constexpr bool sliced = true; };

static inline const float* input(const Rows& rows, float) { return rows.x; }
static inline const int8_t* input(const Rows& rows, int8_t) { return rows.q; }

static inline V splat(float value) { return V{} + value; }
static inline VU bits_of(V v) { return (VU)v; }

// b where they are equal, or either is NaN. GCC makes two operations of the comparison.
static inline V greater(V a, V b) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

static inline V lesser(V a, V b) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

// ---- loads and stores: every format computes in fp32 ----

static inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline VH load_halves(const void* p) {
    VH h;
    memcpy(&h, p, sizeof h);
    return h;
}

// GCC 12 widens halves through two shuffles where one instruction does it: twice the time of a dense bf16 layer.
static inline VU load_wide(const void* p) {
#if CORESKIP_LEVEL == 512
    return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif CORESKIP_LEVEL == 2
    return (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(load_halves(p), VU);
#endif
}

static inline V load(const BF16* p) { return (V)(load_wide(p) << 16); }

static inline V load(const F16* p) {
#if CORESKIP_LEVEL == 512
    return (V)_mm512_cvtph_ps((__m256i)load_halves(p));
#elif CORESKIP_LEVEL == 2
    return (V)_mm256_cvtph_ps((__m128i)load_halves(p));
#else
    // Moving exponent and mantissa into place leaves the exponent 112 too small; the product puts that right,
    // for subnormal halves too. Infinities and NaNs get the exponent 255 back by hand.
    VU h = load_wide(p);
    VU magnitude = (h & 0x7fff) << 13;
    VU finite = bits_of((V)magnitude * splat(0x1p112f));
    VU special = magnitude | 0x7f800000;
    VU value = (VI)(h & 0x7c00) == 0x7c00 ? special : finite;
    return (V)(value | (h & 0x8000) << 16);
#endif
}

// Two vectors from 2 * kLanes consecutive weights. For bf16 they are the even and the odd ones, as the two halves of
// 32-bit words (`arrange` puts x in that order): one operation each, where widening in order takes two.
template <class W>
static inline void load_pair(const W* p, V& a, V& b) {
    a = load(p);
    b = load(p + kLanes);
}

static inline void load_pair(const BF16* p, V& a, V& b) {
    VU words;
    memcpy(&words, p, sizeof words);
    a = (V)(words << 16);
    b = (V)(words & 0xffff0000);
}

// byte k of every 32-bit word, minus `zero`: put below the exponent of 2^23 a byte is that much more, and the difference
// is exact. Measured on rows of 576, four at a time: 25 ns a row, with conversions of sign-extended bytes 28.
template <int zero = 128>
static inline V weight_of(VU words, int k) {
    return (V)((words >> (8 * k) & 0xff) | 0x4b000000) - (0x1p23f + zero);
}

static inline VB load_bytes(const void* p) {
    VB v;
    memcpy(&v, p, sizeof v);
    return v;
}

// sum[i] += u[4i] * s[4i] + ... + u[4i + 3] * s[4i + 3], u unsigned, s signed. Without VNNI u must be below 16 (or
// the pairs would overflow 16 bits), which is why `dots` then takes bytes apart.
static inline VI multiply_add(VI sum, VB u, VB s) {
#if CORESKIP_LEVEL == 512
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif CORESKIP_LEVEL == 2
    __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
    return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    typedef int16_t VS __attribute__((vector_size(kVector)));
    VS even = (VS)(u & (VB)(VU{} + 0x00ff00ff)) * ((VS)s << 8 >> 8);
    VS odd = (VS)((VH2)u >> 8) * ((VS)s >> 8);
    VS pairs = even + odd;
    return sum + ((VI)pairs << 16 >> 16) + ((VI)pairs >> 16);
#endif
}

static inline int32_t total(VI v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_add_epi32((__m512i)v);
#endif
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) sum += v[i];
    return sum;
}

static inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

static inline void store(BF16* p, V v) {
    VU u = bits_of(v);
    VU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    VU quiet = (u >> 16) | 0x40;  // rounding a NaN could carry it into an infinity
    VH h = __builtin_convertvector(v == v ? rounded : quiet, VH);
    memcpy(p, &h, sizeof h);
}

static inline void store(F16* p, V v) {
#if CORESKIP_LEVEL == 512
    VH h = (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif CORESKIP_LEVEL == 2
    VH h = (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    VU u = bits_of(v);
    VU magnitude = u & 0x7fffffff;
    VU normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // 0.5 has the spacing of subnormal halves, so that adding it rounds to one.
    VU subnormal = bits_of((V)magnitude + 0.5f) - 0x3f000000;
    VU value = magnitude < 0x38800000 ? subnormal : normal;
    value = magnitude >= 0x47800000 ? VU{} + 0x7c00 : value;
    value = magnitude > 0x7f800000 ? VU{} + 0x7e00 : value;
    VH h = __builtin_convertvector(value | (u >> 16 & 0x8000), VH);
#endif
    memcpy(p, &h, sizeof h);
}

static inline float total(V v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

// `total` of each, four at a time: the same additions in the same order, on full vectors. Always inlined: sums whose
// address is taken would live in memory while they are added up (8 rows in bf16: 25 ms for 15).
template <int N>
__attribute__((always_inline)) static inline void totals(const V* v, float* out) {
    int n = 0;
#if CORESKIP_LEVEL == 512
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    for (; n + 4 <= N; n += 4) {
        const __m512 a = (__m512)v[n], b = (__m512)v[n + 1], c = (__m512)v[n + 2], d = (__m512)v[n + 3];
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
        _mm_storeu_ps(out + n, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
    }
#endif
    for (; n < N; n++) out[n] = total(v[n]);
}

// Of integers one by one: in a sketched layer of 576 x 1536 four at a time take 2 to 5 % longer.
template <int N>
__attribute__((always_inline)) static inline void totals(const VI* v, int32_t* out) {
    for (int n = 0; n < N; n++) out[n] = total(v[n]);
}

typedef int8_t VQ __attribute__((vector_size(kLanes)));

static inline float greatest(V v) {
#if CORESKIP_LEVEL == 512
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
    return lane[0];
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
