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

// Where a column's numbers lie in a tile: in each row's word `word`, from bit `shift` on, and where there is a plane of
// further bits, in its word from bit `plane` on.
struct ColumnPlace {
    int64_t group;
    int word, shift, plane;
};

template <int more>
static inline ColumnPlace place_of(Nibbles<more>, int64_t column) {
    const int i = static_cast<int>(column % kGroup), k = i % 16 / 4, at = 8 * (i % 4), half = 4 * (i / 16);
    return {column / kGroup, k * kLine, at + half, at + Nibbles<more>::at(k) + half};
}
static inline ColumnPlace place_of(Bytes, int64_t column) {
    const int i = static_cast<int>(column % kGroup);
    return {column / kGroup, i / 4 * kLine, 8 * (i % 4), 0};
}

// The numbers of kLanes rows.
static inline VU numbers_at(Nibbles<0>, const uint8_t* w, const ColumnPlace& place, int p) {
    return load_words(w + place.word, 0, p) >> place.shift & 15;
}
static inline VU numbers_at(Nibbles<1>, const uint8_t* w, const ColumnPlace& place, int p) {
    const VU above = load_words(w, Nibbles<1>::vectors, p) >> place.plane & 1;
    return numbers_at(Nibbles<0>{}, w, place, p) | above << 4;
}
static inline VU numbers_at(Bytes, const uint8_t* w, const ColumnPlace& place, int p) {
    return load_words(w + place.word, 0, p) >> place.shift & 255;
}

// Leaves in `to` what the numbers of some columns of a tile stand for, of kLanes rows. Returns the largest size.
template <class G>
static inline V take_numbers(const uint8_t* w, const ColumnPlace* places, int count, int p, V* to) {
    typedef typename G::Ends E;
    V most = {}, scale = {}, least = {};
    int64_t known = -1;
    for (int j = 0; j < count; j++) {
        const uint8_t* group = w + places[j].group * G::bytes;
        if (places[j].group != known) {
            const typename G::Head head(group);
            scale = E::scale(head, group + G::Numbers::bytes, p, 0), least = E::least(head, group + G::Numbers::bytes, p);
            known = places[j].group;
        }
        const V q = __builtin_convertvector((VI)numbers_at(typename G::Numbers{}, group, places[j], p), V);
        const V value = E::centred ? (q - static_cast<float>(G::Numbers::half)) * scale : q * scale + least;
        most = greater(most, (V)((VU)value & 0x7fffffff));
        to[j] = value;
    }
    for (int j = count; j < kGroup; j++) to[j] = V{};
    return most;
}

// A group of kLanes rows as bytes about 128. As `group_bytes` of groups.py rounds them, but for products with the inverse
// of a scale in place of divisions, which took longer than all the rest. Such a product plus 1.5 * 2^23 has the rounded
// number in its lowest bits.
static inline void put_bytes(const V* numbers, V most, int p, uint8_t* to) {
    F16 halves[kLanes];
    store(halves, most / 127.f);
    memcpy(to + Bytes::bytes + p * kLanes * 2, halves, sizeof halves);
    const V scale = load(halves), steps = scale == 0.f ? splat(1.f) : 1.f / scale;
    for (int k = 0; k < Bytes::vectors; k++) {
        VU word = {};
        for (int i = 0; i < 4; i++) {
            const V near = lesser(greater(once(numbers[4 * k + i] * steps), splat(-127.f)), splat(127.f));
            word |= ((VU)(near + 0x1.8p23f) & 255) << (8 * i);
        }
        word ^= 0x80808080u;
        memcpy(to + k * kLine + p * kVector, &word, sizeof word);
    }
}

// Group by group of all these tiles, whose places are found once; what the next group reads is fetched meanwhile.
template <class G>
static void take_columns_as(const TakeJob& job, int64_t begin, int64_t end) {
    const int64_t groups = (job.count + kGroup - 1) / kGroup, tile = job.groups * G::bytes;
    ColumnPlace places[kGroup];
    V numbers[kGroup];
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * kGroup, after = first + kGroup;
        const int count = static_cast<int>(after < job.count ? kGroup : job.count - first);
        for (int j = 0; j < count; j++) places[j] = place_of(typename G::Numbers{}, job.list[first + j]);
        const int64_t next = after < job.count ? job.list[after] / kGroup * G::bytes : 0;
        const int64_t last = after < job.count ? job.list[(after + kGroup < job.count ? after + kGroup : job.count) - 1] / kGroup : -1;
        for (int64_t t = begin; t < end; t++) {
            const uint8_t* w = static_cast<const uint8_t*>(job.weight) + t * tile;
            uint8_t* to = static_cast<uint8_t*>(job.to) + (t * groups + g) * Int8::bytes;
            for (int64_t at = next; at < (last + 1) * G::bytes; at += kLine) __builtin_prefetch(w + at, 0, 3);
            for (int p = 0; p < kParts; p++) {
                const V most = take_numbers<G>(w, places, count, p, numbers);
                put_bytes(numbers, most, p, to);
            }
        }
    }
}

// ---- columns: the very numbers, in the groups that they were in ----

// A group of kInt4 that has some of its columns left: as many lines as hold them, eight of a row a line, and its ends. The
// j-th lies in the nibble of input_of(j) of a whole group, so that products are those with a whole group of which the others
// met zeros, to the bit. What has no column left is not there.
static void take_some(const TakeJob& job, int64_t begin, int64_t end) {
    const int64_t tile = job.groups * Int4::bytes;
    const int64_t* columns = job.list;
    ColumnPlace places[kGroup];
    int64_t at = 0;  // of the group in a tile of `to`
    for (int64_t g = 0; g < job.groups; g++) {
        const int count = job.counts[g], lines = lines_of(count);
        if (!count) continue;
        for (int j = 0; j < count; j++) places[j] = place_of(Int4::Numbers{}, columns[j]);
        columns += count;
        for (int64_t t = begin; t < end; t++) {
            const uint8_t* from = static_cast<const uint8_t*>(job.weight) + t * tile + g * Int4::bytes;
            uint8_t* to = static_cast<uint8_t*>(job.to) + t * job.tile + at;
            for (int p = 0; p < kParts; p++)
                for (int line = 0; line < lines; line++) {
                    VU word = {};
                    for (int i = 0; i < 8 && line * 8 + i < count; i++)
                        word |= numbers_at(Nibbles<0>{}, from, places[line * 8 + i], p) << (8 * (i % 4) + i / 4 * 4);
                    memcpy(to + line * kLine + p * kVector, &word, sizeof word);
                }
            memcpy(to + lines * kLine, from + Int4::Numbers::bytes, Int4::Ends::bytes);
        }
        at += lines * kLine + Int4::Ends::bytes;
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
