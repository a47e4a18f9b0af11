// The C ABI that kernels/cpu.py calls through ctypes: checks, workspace, threads. The arithmetic is in cpu_isa.h.
//
// Threads are OpenMP's. libgomp comes from torch, which is loaded first and has put it in the global scope, so
// both share one pool; a second pool would spin against torch's between two layers.

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <cmath>

#include "cpu.h"

namespace coreskip {
namespace {

enum Status : int { kOk = 0, kBadIndex = 1, kNoMemory = 2, kUnknown = 3 };

std::atomic<const Isa*> active{nullptr};

// Memory that a calling thread keeps between its calls, so that no call allocates once the sizes have been seen.
class Workspace {
  public:
    ~Workspace() { free(base_); }

    bool reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        free(base_);
        size_ = (bytes + 4095) / 4096 * 4096;
        base_ = static_cast<char*>(aligned_alloc(kLine, size_));
        if (!base_) size_ = 0;
        return base_ != nullptr;
    }

    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(base_ + used_);
        used_ += room<T>(count);
        return p;
    }

    template <class T>
    static size_t room(size_t count) {
        return (count * sizeof(T) + kLine - 1) / kLine * kLine;
    }

  private:
    char* base_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Workspace workspace;

int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Range {
    int64_t begin, end;
};

Range share(int64_t count, int part, int parts) { return {count * part / parts, count * (part + 1) / parts}; }

void load_rows(const Isa& isa, const void* x, int dtype, int w_dtype, int rows, int64_t width, int64_t stride,
               float* to) {
    for (int r = 0; r < rows; r++, to += stride) {
        isa.to_float(static_cast<const char*>(x) + r * width * size_of(dtype), dtype, to, width);
        memset(to + width, 0, (stride - width) * sizeof(float));
        if (w_dtype == kBFloat16) isa.arrange(to, stride);
    }
}

// Sums the threads' partial results in the order of the threads, converts them and adds the bias.
void reduce(const Isa& isa, float* acc, int parts, int w_dtype, int rows, int64_t width, int64_t stride,
            const float* bias, void* out, int dtype) {
    for (int r = 0; r < rows; r++) {
        float* sum = acc + r * stride;
        for (int p = 1; p < parts; p++) isa.add(sum, sum + p * rows * stride, stride);
        if (w_dtype == kBFloat16) isa.restore(sum, stride);
        if (bias) isa.add(sum, bias, width);
        isa.from_float(sum, static_cast<char*>(out) + r * width * size_of(dtype), dtype, width);
    }
}

// Copies a list without its -1 entries. Returns how many remain, or -1 where an index is out of range.
int64_t compact(const int64_t* list, int64_t count, int64_t neurons, int64_t* to) {
    int64_t kept = 0;
    bool bad = false;
    for (int64_t i = 0; i < count; i++) {
        to[kept] = list[i];
        kept += list[i] >= 0;
        bad |= list[i] < -1 || list[i] >= neurons;
    }
    return bad ? -1 : kept;
}

// Turns one list per row into one ascending list and a table of who wants what: every bundle is read once.
int64_t merge(const int64_t* lists, int64_t count, int rows, int64_t neurons, uint8_t* selected, int64_t* to) {
    memset(selected, 0, neurons * rows);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t n = lists[r * count + i];
            if (n < -1 || n >= neurons) return -1;
            if (n >= 0) selected[n * rows + r] = 1;
        }
    int64_t kept = 0;
    for (int64_t n = 0; n < neurons; n++) {
        uint8_t any = 0;
        for (int r = 0; r < rows; r++) any |= selected[n * rows + r];
        to[kept] = n;
        kept += any;
    }
    return kept;
}

// How many bundles fill so many KiB. Measured over 4..64 and 8..64 KiB, on 576 x 1536 and 2048 x 8192 in fp32 and
// bf16: blocks of 16 KiB, prefetched 32 KiB ahead, are at or near the best everywhere.
int64_t bundles(int64_t kib, int64_t bundle_bytes) {
    const int64_t count = (kib << 10) / bundle_bytes / 2 * 2;
    return count < 2 ? 2 : count;
}

}  // namespace
}  // namespace coreskip

using namespace coreskip;

#define CORESKIP_API extern "C" __attribute__((visibility("default")))

// Chooses an instruction set by name. Returns 0, or 3 where this machine lacks it.
CORESKIP_API int coreskip_use(const char* name) {
    const Isa* isa = nullptr;
    if (!strcmp(name, "generic")) isa = &generic_isa();
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2") && avx2) isa = &avx2_isa();
    if (!strcmp(name, "avx512") && avx512) isa = &avx512_isa();
#endif
    if (!isa) return kUnknown;
    active = isa;
    return kOk;
}

// The name of the instruction set in use.
CORESKIP_API const char* coreskip_active() { return active.load()->name; }

// x: [rows][hidden] of x_dtype; weight: [neurons][parts][stride] of w_dtype; biases: float or null.
// lists: 0 = all neurons, 1 = one list of `count`, else one list of `count` per row; -1 entries are skipped.
CORESKIP_API int coreskip_mlp(const void* x, int x_dtype, int rows, int64_t hidden, const void* weight, int w_dtype,
                 int64_t neurons, int64_t stride, int gated, int act, const float* gate_bias, const float* up_bias,
                 const float* down_bias, const int64_t* indices, int64_t count, int lists, void* out, int threads) {
    const Isa& isa = *active.load();
    const bool merged = lists > 1;
    const int64_t listed = lists == 0 ? 0 : merged ? neurons : count;
    Workspace& memory = workspace;
    if (!memory.reserve(Workspace::room<float>(rows * stride) * (threads + 1) + Workspace::room<int64_t>(listed + 1) +
                        Workspace::room<uint8_t>(merged ? neurons * rows : 0)))
        return kNoMemory;
    float* rows_in = memory.take<float>(rows * stride);
    float* acc = memory.take<float>(rows * stride * threads);
    int64_t* list = memory.take<int64_t>(listed + 1);  // compact and merge write one past what they keep
    uint8_t* selected = memory.take<uint8_t>(merged ? neurons * rows : 0);

    int64_t kept = neurons;
    if (merged) kept = merge(indices, count, rows, neurons, selected, list);
    else if (lists == 1) kept = compact(indices, count, neurons, list);
    if (kept < 0) return kBadIndex;
    load_rows(isa, x, x_dtype, w_dtype, rows, hidden, stride, rows_in);
    const int64_t bytes = stride * (gated ? 3 : 2) * size_of(w_dtype);
    const int block = bundles(16, bytes) < kMaxBlock ? bundles(16, bytes) : kMaxBlock;
    const int ahead = bundles(32, bytes) < 4096 ? bundles(32, bytes) : 4096;
    const MlpJob job = {weight, stride, gated != 0, act, block, ahead, gate_bias, up_bias,
                        lists ? list : nullptr, merged ? selected : nullptr, rows_in, rows};
    int team = 1;
#pragma omp parallel num_threads(threads)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        float* mine = acc + part * rows * stride;
        memset(mine, 0, rows * stride * sizeof(float));
        const Range neurons_here = share(kept, part, parts);
        isa.mlp[w_dtype](job, neurons_here.begin, neurons_here.end, mine);
#pragma omp atomic write
        team = parts;
    }
    reduce(isa, acc, team, w_dtype, rows, hidden, stride, down_bias, out, x_dtype);
    return kOk;
}

// x: [rows][in_features] of x_dtype; weight: [out_features][stride] of w_dtype; out: [rows][out_features].
CORESKIP_API int coreskip_linear(const void* x, int x_dtype, int rows, int64_t in_features, const void* weight, int w_dtype,
                    int64_t out_features, int64_t stride, const float* bias, void* out, int threads) {
    const Isa& isa = *active.load();
    const bool direct = x_dtype == kFloat32;
    Workspace& memory = workspace;
    if (!memory.reserve(Workspace::room<float>(rows * stride) +
                        Workspace::room<float>(direct ? 0 : rows * out_features)))
        return kNoMemory;
    float* rows_in = memory.take<float>(rows * stride);
    float* y = direct ? static_cast<float*>(out) : memory.take<float>(rows * out_features);
    load_rows(isa, x, x_dtype, w_dtype, rows, in_features, stride, rows_in);
    const LinearJob job = {weight, stride, bias, rows_in, rows, out_features, y};
#pragma omp parallel num_threads(threads)
    {
        const Range here = share(out_features, omp_get_thread_num(), omp_get_num_threads());
        isa.linear[w_dtype](job, here.begin, here.end);
        for (int r = 0; r < rows && !direct; r++) {
            const int64_t at = r * out_features + here.begin;
            isa.from_float(y + at, static_cast<uint16_t*>(out) + at, x_dtype, here.end - here.begin);
        }
    }
    return kOk;
}

// Reads `bytes` of memory once, for a measure of its bandwidth. The result depends on all of it.
CORESKIP_API uint64_t coreskip_read(const void* memory, int64_t bytes, int threads) {
    const Isa& isa = *active.load();
    uint64_t sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        const Range lines = share(bytes / kLine, omp_get_thread_num(), omp_get_num_threads());
        sum += isa.read(static_cast<const char*>(memory) + lines.begin * kLine, (lines.end - lines.begin) * kLine);
    }
    return sum;
}
