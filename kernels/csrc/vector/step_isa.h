// The vector code of a decode step beyond products with whole rows: 4-bit groups, norms, rotation, attention.
// Included after isa.h, under its rules: once per instruction set, no C++ standard library.

#include "../jobs.h"

#include "groups.h"
#include "tiles.h"
#include "norms.h"
#include "attention.h"
#include "untile.h"
#include "take.h"
#include "neuron_groups.h"
#include "scanned_neurons.h"
#include "recurrence.h"

namespace coreskip {
namespace CORESKIP_ISA {

static const StepIsa step_table = {
    tiles, quantize_groups, norm, rotate, attend, merge, scale, act, add_scaled, softcap, fetch, argmax, exp_sum, untile, tile_up,
    take_rows, take_columns, take_some, neurons, recall,
};

}  // namespace CORESKIP_ISA
}  // namespace coreskip
