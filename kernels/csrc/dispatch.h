// The instruction set in use, and what all entry points share.
#pragma once

#include <atomic>

#include "jobs.h"

#define CORESKIP_API extern "C" __attribute__((visibility("default")))

namespace coreskip {

extern std::atomic<const Isa*> active;
// For steps of bf16 models. They may round x to bf16, as torch does: a verification of 8 tokens of the embedded model
// took 14.4 ms for 19.1. A single op must not, for its x may be of another dtype.
extern std::atomic<const Isa*> active_bf16;
extern std::atomic<const StepIsa*> active_step;

enum Status : int { kOk = 0, kBadIndex = 1, kNoMemory = 2, kUnknown = 3, kUnreadable = 4 };

}  // namespace coreskip
