// The vector code, written once and compiled once per instruction set: the including file chooses the target,
// then defines CORESKIP_ISA (a namespace), CORESKIP_NAME and CORESKIP_LEVEL (0, 2 for AVX2, 512 for AVX-512: the
// compiler's own macros do not follow a target pragma reliably). Vectors are the compiler's own (vector_size), so
// that any CPU has this code; intrinsics appear only where GCC 12 makes poor code from them.
//
// This file, what it includes, and its includers must not use the C++ standard library: an inline function compiled here for
// AVX-512 could be the copy that the linker keeps for every caller, on every machine.

#include <math.h>
#include <string.h>

#include "../jobs.h"

#include "lanes.h"
#include "activations.h"
#include "products.h"
#include "neurons.h"
#include "ahead.h"
#include "linear.h"
#include "convert.h"
#include "choice.h"

namespace coreskip {
namespace CORESKIP_ISA {

// Reads memory and does nothing with it: what a kernel could reach at best.
static uint64_t read(const void* memory, int64_t bytes) {
    typedef uint64_t VL __attribute__((vector_size(kVector)));
    constexpr int streams = 4;
    VL sum[streams] = {};
    const char* p = static_cast<const char*>(memory);
    for (int64_t i = 0; i + streams * kVector <= bytes; i += streams * kVector)
        for (int s = 0; s < streams; s++) {
            VL v;
            memcpy(&v, p + i + s * kVector, sizeof v);
            sum[s] += v;
        }
    VL all = sum[0] + sum[1] + sum[2] + sum[3];
    uint64_t result = 0;
    for (int i = 0; i < kVector / 8; i++) result += all[i];
    return result;
}

static const Isa table = {
    CORESKIP_NAME,
    {mlp<float>, mlp<BF16>, mlp<F16>, mlp<U8>, mlp<Sliced>},
    {scan<float>, scan<BF16>, scan<F16>, scan<U8>, scan<Sliced>},
    {linear<float>, linear<BF16>, linear<F16>, linear<U8>, nullptr},
    {columns<float>, columns<BF16>, columns<F16>},
    to_float,
    from_float,
    quantize,
    arrange,
    restore,
    add,
    choose,
    read,
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
