// Products with a whole matrix, row by row, or with some of its columns. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

template <class W, int N>
static inline void add_columns(const ColumnsJob& job, int64_t at, int64_t end, int row, float* acc) {
    constexpr int lead = 16;  // columns between a prefetch and its use
    const W *w[N], *next[N];
    float h[N];
    for (int n = 0; n < N; n++) {
        const int64_t ahead = at + lead + n;
        w[n] = static_cast<const W*>(job.weight) + job.list[at + n] * job.stride;
        next[n] = static_cast<const W*>(job.weight) + job.list[ahead < end ? ahead : end - 1] * job.stride;
        h[n] = job.x[row * job.inputs + job.list[at + n]];
    }
    accumulate<W, N, 1>(w, next, h, job.width, acc + row * job.width);
}

template <class W>
static void columns(const ColumnsJob& job, int64_t begin, int64_t end, float* acc) {
    int64_t at = begin;
    for (; job.rows == 1 && at + 4 <= end; at += 4) add_columns<W, 4>(job, at, end, 0, acc);
    for (; at < end; at++)
        for (int r = 0; r < job.rows; r++)
            if (job.selected[job.list[at] * job.rows + r]) add_columns<W, 1>(job, at, end, r, acc);
}

template <class W, int N, int R>
static inline void outputs(const LinearJob& job, int64_t at, int64_t end, int row) {
    const int64_t stride = job.rows.stride;
    const W *w[N], *next[N];
    for (int n = 0; n < N; n++) {
        int64_t ahead = at + 2 * N + n;
        w[n] = static_cast<const W*>(job.weight) + (at + n) * stride;
        next[n] = static_cast<const W*>(job.weight) + (ahead < end ? ahead : end - 1) * stride;
        if (!job.ahead) continue;
        const void* other = row == 0 ? later(*job.ahead, stride * sizeof(W)) : nullptr;
        next[n] = other ? static_cast<const W*>(other) : w[n];
    }
    typename Format<W>::Sum out[N][R];
    // The hardware follows one stream through memory better than several: row after row, rows of 576 in fp32 come in at
    // 39 GB/s a core, four side by side at 29, in bf16 at 37 for 29. From 3 rows of x on the products take longer than
    // that, and in long rows of floats every addition waits for the last one (8192 in fp32: 29 for 34).
    typedef typename Format<W>::X X;
    constexpr int alone = R <= 2 ? 1 : N;
    const X* x = input(job.rows, X()) + row * stride;
    if (sizeof(X) == 1 || stride <= 4096) dots<W, N, R, alone>(w, next, x, stride, out);
    else dots<W, N, R, N>(w, next, x, stride, out);
    for (int n = 0; n < N; n++)
        for (int r = row; r < row + R; r++)
            job.y[r * job.out_features + at + n] =
                value(out[n][r - row], job.rows, r, job.scale, at + n) + (job.bias ? job.bias[at + n] : 0.f);
}

// N outputs of all rows, at most four at a time: so many sums fit into registers. Rows are divided evenly (7 rows as
// 4 + 2 + 1 took longer than 8).
template <class W, int N>
static inline void outputs_of_rows(const LinearJob& job, int64_t at, int64_t end) {
    switch (job.rows.count) {
        case 1: return outputs<W, N, 1>(job, at, end, 0);
        case 2: return outputs<W, N, 2>(job, at, end, 0);
        case 3: return outputs<W, N, 3>(job, at, end, 0);
        case 4: return outputs<W, N, 4>(job, at, end, 0);
        case 5: outputs<W, N, 3>(job, at, end, 0); return outputs<W, N, 2>(job, at, end, 3);
        case 6: outputs<W, N, 3>(job, at, end, 0); return outputs<W, N, 3>(job, at, end, 3);
        case 7: outputs<W, N, 4>(job, at, end, 0); return outputs<W, N, 3>(job, at, end, 4);
        default: outputs<W, N, 4>(job, at, end, 0); return outputs<W, N, 4>(job, at, end, 4);
    }
}

template <class W>
static void linear(const LinearJob& job, int64_t begin, int64_t end) {
    int64_t at = begin;
    for (; at + 4 <= end; at += 4) outputs_of_rows<W, 4>(job, at, end);
    for (; at < end; at++) outputs_of_rows<W, 1>(job, at, end);
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
