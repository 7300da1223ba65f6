// Where a cache stands in a decode step, on the device: so that a step that was captured once (a CUDA graph) can be
// replayed for the next token.
#pragma once

#include "common.cuh"

constexpr int kMasked = -2147483647 - 1;  // position of an exact token that is not attended

// One for all layers whose queries see as many tokens. `advance_step` writes it before the layers of a step read it.
struct StepState {
    int length;       // slots held, the new one among them
    int held;         // exact tokens behind the blocks, after the step
    int packed;       // slots in blocks, after the step
    int blocks;       // blocks, after the step
    int place;        // of the new token among the exact ones
    int closes;       // the first 32 of these become block `blocks - 1` in this step
    int pages;        // that hold blocks, after the step
    int first_token;  // tokens of blocks before it, counted from block 0 with 32 to a block, are not seen
    int jumps;        // some block's positions do not run on: set, and never cleared
    int not_finite;   // some number does not fit the storage dtype: likewise
    int others[2];    // what the host notes
};
