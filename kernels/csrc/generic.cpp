// Whatever the compiler's own target has: SSE2 on x86-64, NEON on arm64.
#define CORESKIP_ISA generic
#define CORESKIP_NAME "generic"
#define CORESKIP_LEVEL 0
#include "vector/isa.h"
#include "vector/step_isa.h"

const coreskip::Isa& coreskip::generic_isa() { return generic::table; }
const coreskip::StepIsa& coreskip::generic_step() { return generic::step_table; }
