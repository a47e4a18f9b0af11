// Tiles of groups of 4 to 8 bits: products with them, and the ways there and back.

#include <string.h>

#include <algorithm>

#include "dispatch.h"
#include "division.h"
#include "team.h"
#include "workspace.h"

using namespace coreskip;

// The op coreskip::linear for tiles of a TileFormat, with x as it is (`whole`) or rounded to 8 bits.
// x: [rows][in_features] of x_dtype; out: [rows][out_features] of x_dtype. counts, tile: as in StepLinear; x lies in groups.
CORESKIP_API int coreskip_tiles(const void* x, int x_dtype, int rows, int64_t in_features, const void* weight,
                                int format, int whole, int64_t out_features, int64_t stride, const float* bias,
                                void* out, int threads, const uint8_t* counts, int64_t tile) {
    const Isa& isa = *active.load();
    const StepIsa& step = *active_step.load();
    const int64_t groups = stride / kGroup, tiles = (out_features + kTile - 1) / kTile;
    const int64_t places = places_of(rows, groups);
    if (!workspace.reserve(Workspace::room<float>(rows * stride) + Workspace::room<int8_t>(places * kGroup) +
                           4 * Workspace::room<float>(places) + Workspace::room<float>(rows * out_features)))
        return kNoMemory;
    float* values = workspace.take<float>(rows * stride);
    int8_t* q = workspace.take<int8_t>(places * kGroup);
    float* scale = workspace.take<float>(places);
    float* sum = workspace.take<float>(places);
    int32_t* half = workspace.take<int32_t>(2 * places);
    float* y = workspace.take<float>(rows * out_features);
    for (int r = 0; r < rows; r++) {
        float* row = values + r * stride;
        isa.to_float(static_cast<const char*>(x) + r * in_features * size_of(x_dtype), x_dtype, row, in_features);
        memset(row + in_features, 0, (stride - in_features) * sizeof(float));
        if (whole) continue;
        const int64_t at = first_place(r, rows, groups);
        step.quantize_groups(row, stride, places_apart(rows), q + at * kGroup, scale + at, sum + at,
                             format == kInt6Super ? half + 2 * at : nullptr);
    }
    each_beside_torch(threads, threads, [&](int64_t part) {
        Ahead none{};
        const float* x_whole = whole ? values : nullptr;
        const TileJob job = {weight, format, bias, groups, out_features, rows, x_whole, q, scale, sum, half, y, &none,
                             counts, tile};
        const Range here = share(tiles, part, threads);
        step.tiles(job, here.begin, here.end);
    });
    isa.from_float(y, out, x_dtype, rows * out_features);
    return kOk;
}

// Rows `first` to `first + rows` of tiles, as they are computed with. out: [rows][in_features] of dtype.
CORESKIP_API int coreskip_untile(const void* weight, int format, int64_t groups, int64_t in_features, int64_t first,
                                 int64_t rows, int dtype, void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const UntileJob job = {weight, format, groups, in_features, first, dtype, out};
    const int64_t begin = first / kTile, tiles = (first + rows + kTile - 1) / kTile - begin;
    Lease()->each(threads, threads, [&](int64_t part) {
        const Range here = share(tiles, part, threads);
        step.untile(job, std::max(first, (begin + here.begin) * kTile),
                    std::min(first + rows, (begin + here.end) * kTile));
    });
    return kOk;
}

// Some rows of tiles, by their numbers. out: [count][in_features] of dtype.
CORESKIP_API int coreskip_untile_some(const void* weight, int format, int64_t groups, int64_t in_features,
                                      const int64_t* rows, int64_t count, int dtype, void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const int64_t bytes = in_features * size_of(dtype);
    Lease()->each(count, threads, [&](int64_t i) {
        step.untile({weight, format, groups, in_features, rows[i], dtype, static_cast<char*>(out) + i * bytes}, rows[i],
                    rows[i] + 1);
    });
    return kOk;
}

// Tiles that stand for the very numbers of weight: [rows][in_features] floats, row_stride apart. Returns whether there
// are such. Of formats kInt4 and kInt8Groups alone.
CORESKIP_API int coreskip_tile_up(const float* weight, int64_t row_stride, int64_t rows, int64_t in_features, int format,
                                  void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const TileUpJob job = {weight, row_stride, rows, in_features, (in_features + kGroup - 1) / kGroup, format, out};
    const int64_t tiles = (rows + kTile - 1) / kTile;
    std::atomic<bool> all{true};
    Lease()->each((tiles + 3) / 4, threads, [&](int64_t i) {
        for (int64_t t = 4 * i; t < std::min(tiles, 4 * i + 4); t++)
            if (all.load(std::memory_order_relaxed) && !step.tile_up(job, t, t + 1)) all = false;
    });
    return all;
}

// Rows of tiles as tiles of their own, number for number. Of formats kInt4, kInt5 and kInt8Groups alone, as the next one.
CORESKIP_API void coreskip_take_rows(const void* weight, int format, int64_t groups, const int64_t* rows, int64_t count,
                                     void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const TakeJob job = {weight, format, groups, rows, count, out};
    const int64_t tiles = (count + kTile - 1) / kTile;
    each_beside_torch((tiles + 3) / 4, threads, [&](int64_t i) { step.take_rows(job, 4 * i, std::min(tiles, 4 * i + 4)); });
}

// Columns of so many tiles as tiles of their own in kInt8Groups, rounded where these do not hold the very numbers.
CORESKIP_API void coreskip_take_columns(const void* weight, int format, int64_t groups, int64_t tiles,
                                        const int64_t* columns, int64_t count, void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const TakeJob job = {weight, format, groups, columns, count, out};
    each_beside_torch((tiles + 3) / 4, threads, [&](int64_t i) { step.take_columns(job, 4 * i, std::min(tiles, 4 * i + 4)); });
}

// Columns of so many tiles in kInt4, the very numbers, in the groups that they were in: see take_some. counts: [groups], of
// the columns; tile: bytes of a tile of `out`.
CORESKIP_API void coreskip_take_some(const void* weight, int64_t groups, int64_t tiles, const int64_t* columns,
                                     const uint8_t* counts, int64_t tile, void* out, int threads) {
    const StepIsa& step = *active_step.load();
    const TakeJob job = {weight, kInt4, groups, columns, 0, out, counts, tile};
    each_beside_torch((tiles + 3) / 4, threads, [&](int64_t i) { step.take_some(job, 4 * i, std::min(tiles, 4 * i + 4)); });
}
