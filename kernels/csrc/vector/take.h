// Some rows, or some columns, of a tiled matrix as a matrix of their own. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// ---- rows: the very numbers ----

template <class G>
static void take_rows_as(const TakeJob& job, int64_t begin, int64_t end) {
    static_assert(G::Head::bytes == 0, "rows that share nothing but their tile");
    constexpr int lines = G::Numbers::bytes / kLine, ends = G::Ends::bytes / (2 * kTile);
    const int64_t tile = job.groups * G::bytes;
    for (int64_t t = begin; t < end; t++) {
        uint8_t* to = static_cast<uint8_t*>(job.to) + t * tile;
        const int n = static_cast<int>(job.count - t * kTile < kTile ? job.count - t * kTile : kTile);
        if (n < kTile) memset(to, 0, tile);
        const uint8_t *words[kTile], *halves[kTile];
        for (int r = 0; r < n; r++) {
            const int64_t row = job.list[t * kTile + r];
            const uint8_t* from = static_cast<const uint8_t*>(job.weight) + row / kTile * tile;
            words[r] = from + row % kTile * 4;
            halves[r] = from + G::Numbers::bytes + row % kTile * 2;
        }
        for (int64_t g = 0; g < job.groups; g++, to += G::bytes)
            for (int r = 0; r < n; r++) {
                for (int v = 0; v < lines; v++) memcpy(to + v * kLine + r * 4, words[r] + g * G::bytes + v * kLine, 4);
                for (int e = 0; e < ends; e++)
                    memcpy(to + G::Numbers::bytes + (e * kTile + r) * 2, halves[r] + g * G::bytes + e * kTile * 2, 2);
            }
    }
}

// ---- columns: in groups anew ----

// The i-th numbers of a group's rows, kLanes of them.
template <int more>
static inline VU number_at(Nibbles<more>, const uint8_t* w, int i, int p) {
    const int k = i % 16 / 4, byte = 8 * (i % 4), half = 4 * (i / 16);
    VU number = load_words(w, k, p) >> (byte + half) & 15;
    if (more > 0) {
        const VU plane = load_words(w, Nibbles<more>::vectors + k / Nibbles<more>::per, p) >> byte;
        number |= (plane >> (Nibbles<more>::at(k) + half) & ((1 << more) - 1)) << 4;
    }
    return number;
}
static inline VU number_at(Bytes, const uint8_t* w, int i, int p) { return load_words(w, i / 4, p) >> (8 * (i % 4)) & 255; }

// What the numbers at `columns` of a tile stand for, of kLanes rows; the largest size.
template <class G>
static inline V take_numbers(const uint8_t* w, const int64_t* columns, int count, int p, V* to) {
    typedef typename G::Ends E;
    V most = {}, scale = {}, least = {};
    int64_t known = -1;
    for (int j = 0; j < count; j++) {
        const int64_t g = columns[j] / kGroup;
        const uint8_t* group = w + g * G::bytes;
        if (g != known) {
            const typename G::Head head(group);
            scale = E::scale(head, group + G::Numbers::bytes, p, 0), least = E::least(head, group + G::Numbers::bytes, p);
            known = g;
        }
        const V q = __builtin_convertvector((VI)number_at(typename G::Numbers{}, group, columns[j] % kGroup, p), V);
        const V value = E::centred ? (q - static_cast<float>(G::Numbers::half)) * scale : q * scale + least;
        most = greater(most, value < 0.f ? -value : value);
        to[j] = value;
    }
    for (int j = count; j < kGroup; j++) to[j] = V{};
    return most;
}

// As `group_bytes` of groups.py rounds them, but for products with the inverse of a scale in place of divisions, which
// took three times as long as all the rest.
template <class G>
static void take_columns_as(const TakeJob& job, int64_t begin, int64_t end) {
    const int64_t groups = (job.count + kGroup - 1) / kGroup;
    V numbers[kGroup];
    for (int64_t t = begin; t < end; t++) {
        const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * job.groups * G::bytes;
        uint8_t* to = static_cast<uint8_t*>(job.to) + t * groups * Int8::bytes;
        for (int64_t g = 0; g < groups; g++, to += Int8::bytes) {
            const int64_t left = job.count - g * kGroup;
            for (int p = 0; p < kParts; p++) {
                const V most = take_numbers<G>(w, job.list + g * kGroup, static_cast<int>(left < kGroup ? left : kGroup), p, numbers);
                F16 halves[kLanes];
                store(halves, most / 127.f);
                memcpy(to + Bytes::bytes + p * kLanes * 2, halves, sizeof halves);
                const V scale = load(halves), steps = scale == 0.f ? splat(1.f) : 1.f / scale;
                for (int k = 0; k < Bytes::vectors; k++) {
                    VU word = {};
                    for (int i = 0; i < 4; i++) {
                        V near = (once(numbers[4 * k + i] * steps) + 0x1.8p23f) - 0x1.8p23f;
                        near = near < -127.f ? splat(-127.f) : near > 127.f ? splat(127.f) : near;
                        word |= (VU)__builtin_convertvector(near + 128.f, VI) << (8 * i);
                    }
                    memcpy(to + k * kLine + p * kVector, &word, sizeof word);
                }
            }
        }
    }
}

// work(group) with the group of a format of which these can be taken.
template <class Work>
static inline void with_plain_format(int format, Work work) {
    if (format == kInt8Groups) work(Int8{});
    else if (format == kInt5) work(Group<kInt5, Nibbles<1>, TwoEnds>{});
    else work(Int4{});
}

static void take_rows(const TakeJob& job, int64_t begin, int64_t end) {
    with_plain_format(job.format, [&](auto group) { take_rows_as<decltype(group)>(job, begin, end); });
}

static void take_columns(const TakeJob& job, int64_t begin, int64_t end) {
    with_plain_format(job.format, [&](auto group) { take_columns_as<decltype(group)>(job, begin, end); });
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
