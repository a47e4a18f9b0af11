#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>
#define CORESKIP_ISA avx512
#define CORESKIP_NAME "avx512"
#define CORESKIP_LEVEL 512
#include "vector/isa.h"
#include "vector/step_isa.h"

const coreskip::Isa& coreskip::avx512_isa() { return avx512::table; }
const coreskip::StepIsa& coreskip::avx512_step() { return avx512::step_table; }

// And once more for machines that multiply bf16 by itself, which native steps of bf16 models do.
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#undef CORESKIP_ISA
#undef CORESKIP_NAME
#define CORESKIP_ISA avx512bf16
#define CORESKIP_NAME "avx512bf16"
#define CORESKIP_BF16
#include "vector/isa.h"
#pragma GCC pop_options

const coreskip::Isa& coreskip::avx512bf16_isa() { return avx512bf16::table; }
#endif
