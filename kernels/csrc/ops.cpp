// The ops over bundled neurons, rows and columns: checks, workspace, threads. The arithmetic is in vector/.

#include <math.h>
#include <string.h>

#include <algorithm>

#include "choice.h"
#include "dispatch.h"
#include "division.h"
#include "team.h"
#include "workspace.h"

namespace coreskip {
namespace {

// Sums the threads' partial results in the order of the threads, converts them and adds the bias.
void reduce(const Isa& isa, float* acc, int parts, int w_dtype, int rows, int64_t width, int64_t stride,
            const float* bias, void* out, int dtype) {
    for (int r = 0; r < rows; r++) {
        float* sum = acc + r * stride;
        for (int p = 1; p < parts; p++) isa.add(sum, sum + p * rows * stride, stride);
        isa.restore(sum, stride, w_dtype);
        if (bias) isa.add(sum, bias, width);
        isa.from_float(sum, static_cast<char*>(out) + r * width * size_of(dtype), dtype, width);
    }
}

// One call's job in the workspace.
struct Call {
    const Isa& isa;
    const MlpArguments& a;
    MlpJob job{};
    float* acc = nullptr;
    int64_t* chosen = nullptr;    // [rows][width] of a rule's choice
    int64_t* list = nullptr;
    uint8_t* selected = nullptr;  // [neurons][rows]
    uint32_t* scratch = nullptr;
    int64_t count = 0;            // neurons to compute

    int64_t width() const { return a.keep >= 0 ? std::min(a.keep, a.neurons) : a.neurons; }
    bool scans() const { return a.w_dtype == kSliced || a.rule != kListed; }

    int prepare(Workspace& memory) {
        const int projections = a.gated ? 2 : 1;
        const int64_t size = a.rows * a.stride, all = a.neurons * a.rows, listed = std::max(a.neurons, a.count) + 1;
        const bool ruled = a.rule != kListed;
        if (!memory.reserve(rows_room(a.rows, a.stride) + Workspace::room<float>(size * a.threads) +
                            Workspace::room<int64_t>(listed) + Workspace::room<uint8_t>(all) +
                            Workspace::room<int32_t>(scans() ? all * projections : 0) +
                            2 * Workspace::room<float>(ruled ? all : 0) +
                            Workspace::room<uint32_t>(ruled ? a.neurons : 0) +
                            Workspace::room<int64_t>(ruled ? all : 0)))
            return kNoMemory;
        const int64_t bytes = a.stride * (projections + 1) * size_of(a.w_dtype);
        job = {a.weight, a.low, a.scale, a.gated != 0, a.act, std::min<int>(bundles(64, bytes), kMaxBlock),
               std::min<int>(bundles(32, bytes), 4096), a.gate_bias, a.up_bias, nullptr, nullptr,
               load_rows(isa, a.x, a.x_dtype, a.w_dtype, a.rows, a.hidden, a.stride, memory), a.rule, a.norm,
               nullptr, nullptr, nullptr, a.neurons, a.mean, 0, a.refine, nullptr, nullptr};
        acc = memory.take<float>(size * a.threads);
        list = memory.take<int64_t>(listed);
        selected = memory.take<uint8_t>(all);
        if (a.w_dtype == kSliced) job.high = memory.take<int32_t>(all * projections);
        if (ruled) {
            if (a.rule == kGate) job.known_gate = memory.take<float>(all);
            job.score = memory.take<float>(all);
            job.exact = job.score;  // the choice is made before
            scratch = memory.take<uint32_t>(a.neurons);
            chosen = memory.take<int64_t>(all);
        }
        count = a.neurons;
        return kOk;
    }

    // Puts the listed neurons into the job. Returns a Status.
    int use_lists(const int64_t* lists, int64_t width, int how_many) {
        if (how_many > 1) count = merge(lists, width, a.rows, a.neurons, selected, list);
        else count = compact(lists, width, a.neurons, list);
        job.list = list;
        job.selected = how_many > 1 ? selected : nullptr;
        return count < 0 ? kBadIndex : kOk;
    }

    void scan() {
        each_beside_torch(a.threads, a.threads, [&](int64_t part) {
            const Range here = share(count, part, a.threads);
            isa.scan[a.w_dtype](job, here.begin, here.end);
        });
    }

    void choose_neurons(int64_t* to) {
        for (int r = 0; r < a.rows; r++)
            choose(job.score + r * a.neurons, a.neurons, a.keep, a.threshold, scratch, to + r * width(), width());
    }

    void compute(void* out) {
        each_beside_torch(a.threads, a.threads, [&](int64_t part) {
            float* mine = acc + part * a.rows * a.stride;
            memset(mine, 0, a.rows * a.stride * sizeof(float));
            const Range here = share(count, part, a.threads);
            isa.mlp[a.w_dtype](job, here.begin, here.end, mine);
        });
        reduce(isa, acc, a.threads, a.w_dtype, a.rows, a.hidden, a.stride, a.down_bias, out, a.x_dtype);
    }
};

}  // namespace
}  // namespace coreskip

using namespace coreskip;

// out: [rows][hidden] of x_dtype.
CORESKIP_API int coreskip_mlp(const MlpArguments* arguments, void* out) {
    Call call{*active.load(), *arguments};
    int status = call.prepare(workspace);
    if (status == kOk && arguments->lists)
        status = call.use_lists(arguments->indices, arguments->count, arguments->lists);
    if (status != kOk) return status;
    if (call.scans()) call.scan();
    if (arguments->rule != kListed) {
        call.choose_neurons(call.chosen);
        call.use_lists(call.chosen, call.width(), arguments->rows);
    }
    call.compute(out);
    return kOk;
}

// out: [rows][keep, or neurons], each row ascending and filled up with -1.
CORESKIP_API int coreskip_choose(const MlpArguments* arguments, int64_t* out) {
    Call call{*active.load(), *arguments};
    const int status = call.prepare(workspace);
    if (status != kOk) return status;
    call.scan();
    call.choose_neurons(out);
    return kOk;
}

// x: [rows][in_features] of x_dtype; weight: [out_features][stride] of w_dtype; out: [rows][out_features].
CORESKIP_API int coreskip_linear(const void* x, int x_dtype, int rows, int64_t in_features, const void* weight,
                                 int w_dtype, int64_t out_features, int64_t stride, const float* scale,
                                 const float* bias, void* out, int threads) {
    const Isa& isa = *active.load();
    const bool direct = x_dtype == kFloat32;
    Workspace& memory = workspace;
    if (!memory.reserve(rows_room(rows, stride) + Workspace::room<float>(direct ? 0 : rows * out_features)))
        return kNoMemory;
    const Rows rows_in = load_rows(isa, x, x_dtype, w_dtype, rows, in_features, stride, memory);
    float* y = direct ? static_cast<float*>(out) : memory.take<float>(rows * out_features);
    const LinearJob job = {weight, scale, bias, rows_in, out_features, y, nullptr};
    each_beside_torch(threads, threads, [&](int64_t part) {
        const Range here = share(out_features, part, threads);
        isa.linear[w_dtype](job, here.begin, here.end);
        for (int r = 0; r < rows && !direct; r++) {
            const int64_t at = r * out_features + here.begin;
            isa.from_float(y + at, static_cast<uint16_t*>(out) + at, x_dtype, here.end - here.begin);
        }
    });
    return kOk;
}

// y = sum of x[j] * weight[j] over the inputs j with |x[j]| * norm[j] (norm null: 1) of at least `threshold` or, where
// keep >= 0, the `keep` largest. x: [rows][inputs] of x_dtype; weight: [inputs][stride]; out: [rows][outputs].
CORESKIP_API int coreskip_columns(const void* x, int x_dtype, int rows, int64_t inputs, const void* weight, int w_dtype,
                                  int64_t outputs, int64_t stride, const float* norm, int64_t keep, float threshold,
                                  const float* bias, void* out, int threads) {
    const Isa& isa = *active.load();
    const int64_t all = rows * inputs, size = rows * stride;
    Workspace& memory = workspace;
    if (!memory.reserve(2 * Workspace::room<float>(all) + Workspace::room<uint32_t>(inputs) +
                        Workspace::room<int64_t>(all) + Workspace::room<int64_t>(inputs + 1) +
                        Workspace::room<uint8_t>(all) + Workspace::room<float>(size * threads)))
        return kNoMemory;
    float* values = memory.take<float>(all);
    float* score = memory.take<float>(all);
    uint32_t* scratch = memory.take<uint32_t>(inputs);
    int64_t* chosen = memory.take<int64_t>(all);
    int64_t* list = memory.take<int64_t>(inputs + 1);
    uint8_t* selected = memory.take<uint8_t>(all);
    float* acc = memory.take<float>(size * threads);

    isa.to_float(x, x_dtype, values, all);
    const int64_t width = keep >= 0 ? std::min(keep, inputs) : inputs;
    for (int64_t i = 0; i < all; i++) score[i] = fabsf(values[i]) * (norm ? norm[i % inputs] : 1.f);
    for (int r = 0; r < rows; r++)
        choose(score + r * inputs, inputs, keep, threshold, scratch, chosen + r * width, width);
    const int64_t count = merge(chosen, width, rows, inputs, selected, list);
    const ColumnsJob job = {weight, stride, stride, inputs, values, rows, list, selected};
    each_beside_torch(threads, threads, [&](int64_t part) {
        memset(acc + part * size, 0, size * sizeof(float));
        const Range here = share(count, part, threads);
        isa.columns[w_dtype](job, here.begin, here.end, acc + part * size);
    });
    reduce(isa, acc, threads, w_dtype, rows, outputs, stride, bias, out, x_dtype);
    return kOk;
}
