// The state of a cache in a decode step, on the device. With it, a step that was captured as a CUDA graph can be
// replayed for the next token.
#pragma once

#include "common.cuh"

constexpr int kMasked = -2147483647 - 1;  // position of an exact token that is not attended

// One per window, shared by all layers with this window. `advance_step` writes it before the layers read it. A block
// that a step completes is packed when the next step begins, so the step itself reads it exactly.
struct StepState {
    int length;       // number of slots, including the new one
    int held;         // number of exact tokens behind the blocks, with the new one
    int packed;       // number of slots in blocks
    int blocks;       // number of blocks
    int place;        // place of the new token among the exact tokens
    int closes;       // whether the first 32 exact tokens become block `blocks - 1` before the new one is stored
    int pages;        // number of pages with blocks
    int first_token;  // first visible token of the blocks, counted from block 0 with 32 to a block
    int jumps;        // whether positions in any block were not consecutive; never cleared
    int not_finite;   // whether any number was not finite in the storage dtype; never cleared
    int others[2];    // set by torch operations in the graph
};
