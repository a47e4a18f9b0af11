// Memory to be read later. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// What is to be fetched while so many bytes are read, or null.
static inline const void* later(Ahead& ahead, int64_t bytes) {
    if (ahead.at >= ahead.end) ahead = {ahead.then, ahead.then_end, 0, 0};
    if (ahead.at >= ahead.end) return nullptr;
    ahead.at += bytes;
    return reinterpret_cast<const void*>(ahead.at - bytes);
}

static inline void fetch(Ahead& ahead, int64_t bytes) {
    const char* from = static_cast<const char*>(later(ahead, bytes));
    for (int64_t i = 0; from && i < bytes; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

static inline void fetch_all(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
