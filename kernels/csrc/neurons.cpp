// The op over neurons in 4-bit groups: checks, workspace, threads. The arithmetic is in vector/.

#include <string.h>

#include <algorithm>

#include "dispatch.h"
#include "division.h"
#include "neuron_shares.h"
#include "team.h"
#include "workspace.h"

using namespace coreskip;

// x: [rows][hidden] of x_dtype; list: [count] neurons, ascending, or null; selected: as in NeuronsJob; out: as x. left_out:
// neurons that were scanned and left out, summed over rows. Returns a Status.
CORESKIP_API int coreskip_neurons(const void* x, int x_dtype, int rows, int64_t hidden, const NeuronGroups* groups,
                                  int act, const float* down_bias, const int64_t* list, int64_t count,
                                  const uint8_t* selected, void* out, int64_t* left_out, int threads) {
    const Isa& isa = *active.load();
    const StepIsa& step = *active_step.load();
    const NeuronGroups& n = *groups;
    const int64_t width = n.width, of_x = width / kGroup, size = rows * width, scratch = scales_room(n);
    if (!workspace.reserve(2 * Workspace::room<float>(rows * of_x) + Workspace::room<float>(size) +
                           Workspace::room<int8_t>(size) + Workspace::room<float>(size * threads) +
                           Workspace::room<float>(scratch * threads) + Workspace::room<int8_t>(size * threads) +
                           Workspace::room<int64_t>(threads)))
        return kNoMemory;
    float* values = workspace.take<float>(size);
    int8_t* q = workspace.take<int8_t>(size);
    float* scale = workspace.take<float>(rows * of_x);
    float* sum = workspace.take<float>(rows * of_x);
    float* acc = workspace.take<float>(size * threads);
    float* scales = workspace.take<float>(scratch * threads);
    int8_t* turned = workspace.take<int8_t>(size * threads);
    int64_t* left = workspace.take<int64_t>(threads);
    for (int r = 0; r < rows; r++) {
        float* row = values + r * width;
        isa.to_float(static_cast<const char*>(x) + r * hidden * size_of(x_dtype), x_dtype, row, hidden);
        memset(row + hidden, 0, (width - hidden) * sizeof(float));
        step.quantize_groups(row, width, 1, q + r * width, scale + r * of_x, sum + r * of_x, nullptr);
    }
    each_beside_torch(threads, threads, [&](int64_t part) {
        float* mine = acc + part * size;
        memset(mine, 0, size * sizeof(float));
        const NeuronsJob job = {n, {rows, q, scale, sum}, act, list, selected, count,
                                scales + part * scratch, turned + part * size, 0, nullptr};
        const Range here = neuron_share(n, count, part, threads);
        left[part] = step.neurons(job, here.begin, here.end, mine);
    });
    *left_out = 0;
    for (int part = 0; part < threads; part++) *left_out += left[part];
    for (int r = 0; r < rows; r++) {
        float* row = acc + r * width;
        for (int part = 1; part < threads; part++) isa.add(row, row + part * size, width);
        if (down_bias) isa.add(row, down_bias, hidden);
        isa.from_float(row, static_cast<char*>(out) + r * hidden * size_of(x_dtype), x_dtype, hidden);
    }
    return kOk;
}
