// Begins a decode step whose launches are the same for every token. It gives the new token of each sequence its place,
// and finds the visible tokens. For steps that are not captured, kvq_calib/runtime/slots.py and slot_view.py do this on
// the host, with the same results.
#include "step.cuh"

struct StepParams {
    StepState *state;
    const int64_t *position;    // [B] positions of the new tokens
    int *exact;                 // [B, capacity] positions of the exact tokens behind the blocks; kMasked: hidden
    int *sink;                  // [B, sinks] positions of sinks whose slots are in blocks; kMasked: in none
    const int *sink_slot;       // [B, sinks] slots of sinks
    int2 *blocks;               // [B, block_stride] position of the first token, bits of attended tokens
    int *seen;                  // [B, sinks + capacity] positions of sinks and exact tokens; kMasked: not visible
    int batch, sinks, capacity; // capacity: recent + 32
    int block_stride;
    int window;                 // number of slots that a query sees; 0: all
    int padding;
};

// Makes a block of the first 32 exact tokens of a sequence, and moves the others up.
KVQ_DEVICE void close_block(const StepParams &p, int row, int block, int first_slot) {
    const int lane = lane_id();
    int *exact = p.exact + row * p.capacity;
    const int position = exact[lane];
    bool keep = position != kMasked;
    for (int i = 0; i < p.sinks; ++i)
        if (keep && p.sink_slot[row * p.sinks + i] == first_slot + lane) {
            p.sink[row * p.sinks + i] = position;  // attended exactly, not in packed form
            keep = false;
        }
    const unsigned bits = __ballot_sync(kAll, keep);
    const int own = int(uint32_t(position) - uint32_t(lane));
    const int origin = __shfl_sync(kAll, own, bits ? __ffs(int(bits)) - 1 : kWarp - 1);
    if (keep && own != origin) p.state->jumps = 1;
    if (lane == 0) p.blocks[int64_t(row) * p.block_stride + block] = {origin, int(bits)};
    for (int base = 0; base < p.capacity - kWarp; base += kWarp) {
        const int from = base + kWarp + lane;
        const int moved = from < p.capacity ? exact[from] : kMasked;
        __syncwarp();
        if (from < p.capacity) exact[base + lane] = moved;
        __syncwarp();
    }
}

// Grid: 1. A multiple of 32 threads; each warp takes sequences in turn.
KVQ_KERNEL void __launch_bounds__(256, 1) advance_step(const __grid_constant__ StepParams p) {
    StepState s = *p.state;
    __syncthreads();
    s.length += 1;
    s.closes = s.held == p.capacity;  // the step before has filled a block
    const int first_slot = s.packed, block = s.blocks;
    s.place = s.held - (s.closes ? kBlockTokens : 0);
    s.held = s.place + 1;
    s.packed += s.closes ? kBlockTokens : 0;
    s.blocks += s.closes;
    s.pages = (s.blocks + kPageBlocks - 1) / kPageBlocks;
    const int left = p.window ? max(s.length - p.window, 0) : 0;  // slots that have left the window
    s.first_token = left;
    for (int row = warp_id(); row < p.batch; row += int(blockDim.x) / kWarp) {
        int *exact = p.exact + row * p.capacity;
        if (s.closes) close_block(p, row, block, first_slot);
        if (lane_id() == 0) exact[s.place] = int(p.position[row]);
        __syncwarp();
        int *seen = p.seen + row * (p.sinks + p.capacity);
        for (int i = lane_id(); i < p.sinks; i += kWarp)
            seen[i] = p.sink_slot[row * p.sinks + i] >= left ? p.sink[row * p.sinks + i] : kMasked;
        for (int i = lane_id(); i < p.capacity; i += kWarp)
            seen[p.sinks + i] = i < s.held && s.packed + i >= left ? exact[i] : kMasked;
    }
    __syncthreads();
    if (threadIdx.x) return;
    p.state->length = s.length, p.state->held = s.held, p.state->packed = s.packed, p.state->blocks = s.blocks;
    p.state->place = s.place, p.state->closes = s.closes, p.state->pages = s.pages, p.state->first_token = left;
}
