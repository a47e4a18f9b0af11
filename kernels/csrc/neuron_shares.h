// How neurons in 4-bit groups are shared out among threads.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "arguments.h"
#include "division.h"

namespace coreskip {

// Of scanned neurons in whole groups of the down projection; positions of a list otherwise, `count` of them.
inline Range neuron_share(const NeuronGroups& n, int64_t count, int64_t part, int parts) {
    if (!n.scan) return share(count, part, parts);
    const Range groups = share((n.neurons + kGroup - 1) / kGroup, part, parts);
    return {groups.begin * kGroup, std::min(groups.end * kGroup, n.neurons)};
}

// Bytes of the tiles of 16 neurons that are scanned.
inline int64_t scanned_bytes(const NeuronGroups& n) {
    return (n.gated && !n.reach ? 2 : 1) * tile_bytes(n.format, n.width / kGroup);
}

// Floats that a thread needs for the scales of groups that are under way, see Scan.
inline int64_t scales_room(const NeuronGroups& n) {
    return n.scan && n.format == kInt4Upper ? 2 * kGroup * 2 * (n.width / kGroup) : 0;
}

}  // namespace coreskip
