// Coding with computed levels: paths through a trellis (kvq_calib/codec/paths.py), token weighting, noise
// shaping, and error compensation.
#pragma once

#include "append_elements.cuh"
#include "channel_levels.cuh"

// ---- trellis -------------------------------------------------------------------------------------------------

constexpr int kSizeClasses = 32;
constexpr float kInfinity = __builtin_huge_valf();

// The weight of a token's errors in a head, for the choice of a path.
KVQ_DEVICE float token_weight_of(const AppendSide &s, int64_t token, int head, int head_dim) {
    float size = 0.0f;
    for (int i = 0; i < head_dim; ++i) {
        const float y = element(s, token, head, head_dim, i);
        size = __fadd_rn(size, __fmul_rn(y, y));
    }
    const float *edge = s.weight_edge + head * (kSizeClasses - 1);
    int place = 0;
    for (int i = 0; i < kSizeClasses - 1; ++i) place += edge[i] < size;
    return s.token_weight[head * kSizeClasses + place];
}

// The path of a block: the lowest bits of its codes, bit t for token t. They determine the subsets.
struct Path {
    uint32_t free;

    KVQ_DEVICE int subset(int t) const {
        return int(((free ^ free << 2) >> t & 1u) << 1 | (free << 1 >> t & 1u));
    }
};

// Inputs of the two tokens that lead into state `after`, as bits.
KVQ_DEVICE uint32_t inputs_of(int after) { return uint32_t(after >> 1 | (after & 1) << 1); }

// The path of least cost.
KVQ_DEVICE Path cheapest(const float (&cost)[4], const uint32_t (&path)[4]) {
    Path best = {path[0]};
    float least = cost[0];
#pragma unroll
    for (int state = 1; state < 4; ++state)
        if (cost[state] < least) least = cost[state], best.free = path[state];
    return best;
}

// The path of least squared error of one channel. `y` gives its 32 elements, each weighted by its `token_weight` unless
// that is null. A state is the lowest bit of the newest code, plus 2 times that of the code before. So over two tokens
// there is exactly one way from any state to any other.
template <class Element>
KVQ_DEVICE Path best_path(const ChannelLevels &c, const Element &y, const float *token_weight) {
    float cost[4] = {0.0f, kInfinity, kInfinity, kInfinity};
    uint32_t path[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int t = 0; t < kBlockTokens; t += 2) {
        float distance[2][kSubsets];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float x = y(t + i);
#pragma unroll
            for (int s = 0; s < kSubsets; ++s) {
                distance[i][s] = c.squared_distance(s, c.nearest(s, x), x);
                if (token_weight) distance[i][s] = __fmul_rn(distance[i][s], token_weight[t + i]);
            }
        }
        float next[4];
        uint32_t from[4];
#pragma unroll
        for (int after = 0; after < 4; ++after) {
            const int now = after & 1, between = after >> 1;
#pragma unroll
            for (int before = 0; before < 4; ++before) {  // if equal, the lower one
                const int last = before & 1, long_ago = before >> 1;
                const float pair = __fadd_rn(distance[0][2 * (between ^ long_ago) + last],
                                             distance[1][2 * (now ^ last) + between]);
                const float sum = __fadd_rn(pair, cost[before]);
                if (before == 0 || sum < next[after]) next[after] = sum, from[after] = path[before];
            }
        }
#pragma unroll
        for (int after = 0; after < 4; ++after) {
            cost[after] = next[after];
            path[after] = from[after] | inputs_of(after) << t;
        }
    }
    return cheapest(cost, path);
}

constexpr float kMostGain = 4.0f;

// The share of the previous token's rounding error that is added to token t, as in kvq_calib/codec/noise_shaping.py.
KVQ_DEVICE float gain_of(float feedback, const float *token_weight, int t) {
    if (t == 0) return 0.0f;
    if (!token_weight) return feedback;
    const float ratio = __fdiv_rn(token_weight[t - 1], token_weight[t]);
    return __fmul_rn(feedback, ratio <= kMostGain * kMostGain ? __fsqrt_rn(ratio) : kMostGain);
}

// The path of one channel with noise shaping: a share of each rounding error is added to the next token. Tokens go one
// at a time, with a target and an error for each survivor.
template <class Element>
KVQ_DEVICE Path shaped_path(const ChannelLevels &c, const Element &y, float feedback, const float *token_weight) {
    float cost[4] = {0.0f, kInfinity, kInfinity, kInfinity}, error[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    uint32_t path[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int t = 0; t < kBlockTokens; ++t) {
        const float x = y(t), gain = gain_of(feedback, token_weight, t);
        float made[4][2], total[4][2];  // by state, and by subset: state & 1, and that plus 2
#pragma unroll
        for (int state = 0; state < 4; ++state) {
            const float target = __fadd_rn(x, __fmul_rn(gain, error[state]));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int subset = 2 * n + (state & 1);
                made[state][n] = __fsub_rn(target, c.level(kSubsets * c.nearest(subset, target) + subset));
                float distance = __fmul_rn(made[state][n], made[state][n]);
                if (token_weight) distance = __fmul_rn(distance, token_weight[t]);
                total[state][n] = __fadd_rn(cost[state], distance);
            }
        }
        uint32_t next[4];
#pragma unroll
        for (int after = 0; after < 4; ++after) {  // from states last and last + 2; if equal, the lower one
            const int last = after >> 1, free = after & 1;
            const bool high = total[last + 2][free ^ 1] < total[last][free];
            cost[after] = high ? total[last + 2][free ^ 1] : total[last][free];
            error[after] = high ? made[last + 2][free ^ 1] : made[last][free];
            next[after] = (high ? path[last + 2] : path[last]) | uint32_t(free) << t;  // no indexing at run time
        }
#pragma unroll
        for (int after = 0; after < 4; ++after) path[after] = next[after];
    }
    return cheapest(cost, path);
}

// The path of least squared error of one channel by a warp, from the (weighted) squared distances [32, 4] of its tokens
// in shared memory: a lane follows the state lane % 4.
KVQ_DEVICE Path best_path(const float *distance) {
    const int after = lane_id() % 4, now = after & 1, between = after >> 1;
    const int first[2] = {2 * between, 2 * (between ^ 1)}, second[2] = {2 * now + between, 2 * (now ^ 1) + between};
    float cost = after ? kInfinity : 0.0f;
    uint32_t path = 0;
#pragma unroll 4
    for (int t = 0; t < kBlockTokens; t += 2) {
        const float *d = distance + kSubsets * t;
        float least = 0.0f;
        int from = 0;
#pragma unroll
        for (int before = 0; before < 4; ++before) {
            const float pair =
                __fadd_rn(d[first[before / 2] + before % 2], d[kSubsets + second[before % 2]]);
            const float sum = __fadd_rn(pair, __shfl_sync(kAll, cost, before));
            if (before == 0 || sum < least) least = sum, from = before;
        }
        path = __shfl_sync(kAll, path, from) | inputs_of(after) << t;
        cost = least;
    }
    int best = 0;
    float least = __shfl_sync(kAll, cost, 0);
    for (int state = 1; state < 4; ++state) {
        const float other = __shfl_sync(kAll, cost, state);
        if (other < least) least = other, best = state;
    }
    return Path{__shfl_sync(kAll, path, best)};
}

// ---- error compensation --------------------------------------------------------------------------------------

// Shared memory of one warp that codes a head with error compensation.
struct HeadWork {
    float *error;     // [D, 32] of the coordinates coded
    float *weight;    // [D] of the coordinate at hand
    float *distance;  // [32, 4] of its tokens
    uint8_t *code;    // [32, 36]: codes of 32 coordinates, a row each

    static constexpr int kRow = kBlockTokens + 4;  // against bank conflicts

    static KVQ_DEVICE int words(int head_dim) {
        return head_dim * (kBlockTokens + 1) + kBlockTokens * kSubsets + kWarp * kRow / 4;
    }

    KVQ_DEVICE HeadWork(void *memory, int warp, int head_dim) {
        distance = static_cast<float *>(memory) + warp * words(head_dim);
        error = distance + kBlockTokens * kSubsets;
        weight = error + head_dim * kBlockTokens;
        code = reinterpret_cast<uint8_t *>(weight + head_dim);
    }
};

// The coded element of a lane, for one coordinate.
struct Coded {
    int code;
    float level;
};

// Codes one coordinate, one token per lane; with a trellis, the path goes across the lanes.
KVQ_DEVICE Coded code_coordinate(const ChannelLevels &c, bool paths, float y, float token_weight, float *distance) {
    const int lane = lane_id();
    if (!paths || !c.bits) {
        const int code = c.nearest(y);
        return {code, c.level(code)};
    }
    uint32_t places = 0;
#pragma unroll
    for (int subset = 0; subset < kSubsets; ++subset) {
        const int nearest = c.nearest(subset, y);
        places |= uint32_t(nearest) << (8 * subset);
        distance[kSubsets * lane + subset] = __fmul_rn(c.squared_distance(subset, nearest, y), token_weight);
    }
    __syncwarp();
    const Path path = best_path(distance);
    const int subset = path.subset(lane), at = int(places >> (8 * subset) & 255u);
    return {at << 1 | int(path.free >> lane & 1u), c.level(kSubsets * at + subset)};
}

// Packs the codes of 32 tokens and up to 32 coordinates, one coordinate per lane, from `first` to `last`.
KVQ_DEVICE void pack_coordinates(const AppendSide &s, const HeadWork &work, int head, int head_dim, int first, int last,
                                 uint32_t *codes, int place) {
    const int lane = lane_id(), coordinate = first + lane;
    if (coordinate > last) return;
    const int channel = head * head_dim + coordinate;
    const uint8_t *own = work.code + lane * HeadWork::kRow;
    uint32_t low[4], high[4];
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
        low[slice] = high[slice] = 0;
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            low[slice] |= (own[8 * slice + t] & 15u) << (4 * t);
            high[slice] |= uint32_t(own[8 * slice + t]) >> 4 << (4 * t);
        }
    }
    store_unit(s, codes, channel, s.bits[channel], place, low, high);
}

// Codes a block of one head, coordinate by coordinate, one token per lane. The coded number is the element plus its
// share of the errors of the coordinates before it, summed in their order. In a refinement pass, its share of the
// errors of the coordinates after it is added first.
KVQ_DEVICE void code_head(const AppendSide &s, const HeadWork &work, int64_t first, int head, int head_dim,
                          uint32_t *codes, int place) {
    const int lane = lane_id();
    const int64_t token = first + s.stride[2] * lane;
    const float token_weight = s.token_weight ? token_weight_of(s, token, head, head_dim) : 1.0f;
    for (int pass = 0; pass <= s.refinements; ++pass) {
        const float *share = (pass ? s.refinement : s.compensation) + int64_t(head) * head_dim * head_dim;
        for (int i = 0; i < head_dim; ++i) {
            const ChannelLevels c(s.coefficients, s.bits, head * head_dim + i, s.paths);
            for (int j = lane; j < (pass ? head_dim : i); j += kWarp) work.weight[j] = share[i * head_dim + j];
            const float exact = element(s, token, head, head_dim, i);
            __syncwarp();
            auto product = [&](int j) { return __fmul_rn(work.weight[j], work.error[j * kBlockTokens + lane]); };
            float target = exact;
            if (pass) {
                float later = 0.0f;
#pragma unroll 8
                for (int j = i + 1; j < head_dim; ++j) later = __fadd_rn(later, product(j));
                target = __fadd_rn(exact, later);
            }
#pragma unroll 8
            for (int j = 0; j < i; ++j) target = __fadd_rn(target, product(j));
            const Coded found = code_coordinate(c, s.paths, target, token_weight, work.distance);
            work.error[i * kBlockTokens + lane] = __fsub_rn(exact, found.level);
            work.code[i % kWarp * HeadWork::kRow + lane] = uint8_t(found.code);
            __syncwarp();
            if (pass < s.refinements || (i % kWarp < kWarp - 1 && i + 1 < head_dim)) continue;
            pack_coordinates(s, work, head, head_dim, i / kWarp * kWarp, i, codes, place);
            __syncwarp();
        }
    }
}
