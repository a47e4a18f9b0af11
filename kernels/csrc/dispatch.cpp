// The C interface that kernels/cpu.py calls through ctypes, but for the ops (ops.cpp, tiles.cpp) and the step
// (step.cpp).

#include "dispatch.h"

#include <string.h>

#include "division.h"
#include "team.h"

namespace coreskip {

std::atomic<const Isa*> active{nullptr};
std::atomic<const Isa*> active_bf16{nullptr};
std::atomic<const StepIsa*> active_step{nullptr};

}  // namespace coreskip

using namespace coreskip;

// Chooses an instruction set by name. Returns 0, or 3 where this machine lacks it.
CORESKIP_API int coreskip_use(const char* name) {
    const Isa* isa = nullptr;
    const StepIsa* step = nullptr;
    if (!strcmp(name, "generic")) isa = &generic_isa(), step = &generic_step();
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2") && avx2) isa = &avx2_isa(), step = &avx2_step();
    if (!strcmp(name, "avx512") && avx512) isa = &avx512_isa(), step = &avx512_step();
#endif
    if (!isa) return kUnknown;
    active = active_bf16 = isa;
#if defined(__x86_64__)
    if (isa == &avx512_isa() && __builtin_cpu_supports("avx512bf16")) active_bf16 = &avx512bf16_isa();
#endif
    active_step = step;
    return kOk;
}

// The name of the instruction set in use.
CORESKIP_API const char* coreskip_active() { return active.load()->name; }

// The sizes of the structs in arguments.h, in their order there, up to `room` of them. Returns how many there are.
CORESKIP_API int coreskip_sizes(int64_t* sizes, int room) {
    const int64_t all[] = {sizeof(MlpArguments), sizeof(StepNorm),  sizeof(StepLinear), sizeof(NeuronGroups), sizeof(StepMlp),
                           sizeof(StepRouter),   sizeof(StepExperts), sizeof(StepLayer), sizeof(StepModel), sizeof(StepCache),
                           sizeof(StepCall),     sizeof(PrefillCall), sizeof(StreamPiece), sizeof(SlotLayer),
                           sizeof(SlotFigures)};
    const int count = sizeof(all) / sizeof(*all);
    for (int i = 0; i < count && i < room; i++) sizes[i] = all[i];
    return count;
}

// How many threads a call uses at most, however many it asks for; 0: no limit but the cores of the calling thread.
CORESKIP_API void coreskip_limit(int threads) { set_limit(threads); }

// Whether `count` 32-bit words still hold what was expected of them. They lie all over memory and are cold after a
// decode step: those that come next are fetched meanwhile. Later ones may be gone where an earlier one has changed.
CORESKIP_API int coreskip_unchanged(const int64_t* addresses, const int32_t* expected, int64_t count) {
    constexpr int64_t kFetched = 24;
    for (int64_t i = 0; i < count; i++) {
        if (i + kFetched < count) __builtin_prefetch(reinterpret_cast<const void*>(addresses[i + kFetched]));
        int32_t word;
        memcpy(&word, reinterpret_cast<const void*>(addresses[i]), sizeof(word));
        if (word != expected[i]) return 0;
    }
    return 1;
}

// Reads `bytes` of memory once, for a measure of its bandwidth. The result depends on all of it.
CORESKIP_API uint64_t coreskip_read(const void* memory, int64_t bytes, int threads) {
    const Isa& isa = *active.load();
    const int64_t pieces = 8 * threads;
    std::atomic<uint64_t> sum{0};
    Lease()->each(pieces, threads, [&](int64_t i) {
        const Range lines = share(bytes / kLine, i, pieces);
        sum += isa.read(static_cast<const char*>(memory) + lines.begin * kLine, (lines.end - lines.begin) * kLine);
    });
    return sum;
}
