// Memory for the length of a call, and x in it.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "jobs.h"

namespace coreskip {

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

inline int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : dtype >= kInt8 ? 1 : 2; }

// The calling thread's, of one call at a time.
inline thread_local Workspace workspace;

inline size_t rows_room(int rows, int64_t stride) {
    return Workspace::room<float>(rows * stride) + Workspace::room<int8_t>(rows * stride) +
           Workspace::room<float>(rows) + Workspace::room<int32_t>(rows);
}

// x in fp32, padded with zeros; quantised where the weights are.
inline Rows load_rows(const Isa& isa, const void* x, int dtype, int w_dtype, int rows, int64_t width, int64_t stride,
               Workspace& memory) {
    float* to = memory.take<float>(rows * stride);
    int8_t* q = memory.take<int8_t>(rows * stride);
    float* scale = memory.take<float>(rows);
    int32_t* sum = memory.take<int32_t>(rows);
    for (int r = 0; r < rows; r++) {
        float* row = to + r * stride;
        isa.to_float(static_cast<const char*>(x) + r * width * size_of(dtype), dtype, row, width);
        memset(row + width, 0, (stride - width) * sizeof(float));
        if (w_dtype >= kInt8) isa.quantize(row, stride, q + r * stride, scale + r, sum + r);
        else isa.arrange(row, stride, w_dtype);
    }
    return {rows, stride, to, q, scale, sum};
}

}  // namespace coreskip
