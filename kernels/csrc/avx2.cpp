#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#define CORESKIP_ISA avx2
#define CORESKIP_NAME "avx2"
#define CORESKIP_LEVEL 2
#include "vector/isa.h"
#include "vector/step_isa.h"

const coreskip::Isa& coreskip::avx2_isa() { return avx2::table; }
const coreskip::StepIsa& coreskip::avx2_step() { return avx2::step_table; }
#endif
