// Paths of a single block, as when decoding closes one. Lanes hold the subsets of levels, or the states. The codes are
// the same as from best_path() and shaped_path().
#pragma once

#include "path.h"

namespace kvq {

// The block of one channel.
struct Line {
    uint8_t code[kBlock];
    float seen[kBlock];  // the levels
    bool not_a_number;   // only ever set
};

// Inputs that are the same for all channels of a head.
struct LineTokens {
    const float* weight;  // [32] or null
    const float* gain;    // [32] of noise shaping; null for none
    int length;           // tokens that are there
};

inline int cheapest_state(Quad cost) {
    int state = 0;
    for (int other = 1; other < 4; other++)
        if (cost[other] < cost[state]) state = other;
    return state;
}

// Weighted squares of a token's errors; 0 if there is no token.
KVQ_INLINE Quad weighted_square(Quad error, const LineTokens& tokens, int t) {
    if (t >= tokens.length) return Quad{};
    const Quad square = error * error;
    return tokens.weight != nullptr ? square * splat<4>(tokens.weight[t]) : square;
}

// Lane s is subset s.
template <int N>
void best_path_alone(const Channel& channel, const float* u, const LineTokens& tokens, Line& line) {
    float level[kBlock][4];
    int32_t place[kBlock][4], best[kBlock / 2][4];
    Quad cost = {0.0f, kInfinity, kInfinity, kInfinity};
    for (int pair = 0; pair < kBlock / 2; pair++) {
        Quad distance[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int t = 2 * pair + half;
            const Quad x = splat<4>(u[t]);
            Quad near = load<Quad>(channel.level);
            Ints<4> at = {};
            for (int k = 0; k + 1 < N; k++) {
                const Ints<4> above = x > load<Quad>(channel.boundary + 4 * k);
                near = above ? load<Quad>(channel.level + 4 * (k + 1)) : near;
                at -= above;
            }
            store(level[t], near);
            store(place[t], at);
            distance[half] = weighted_square(x - near, tokens, t);
        }
        // Lane `after` of each: the two subsets on the way from a state, in the order of way().
        const Quad a = distance[0], b = distance[1];
        const Quad even = KVQ_QUADS(b, b, 0, 2, 1, 3), odd_last = KVQ_QUADS(b, b, 2, 0, 3, 1);
        const Quad ways[4] = {(KVQ_QUADS(a, a, 0, 0, 2, 2) + even) + splat<4>(cost[0]),
                              (KVQ_QUADS(a, a, 1, 1, 3, 3) + odd_last) + splat<4>(cost[1]),
                              (KVQ_QUADS(a, a, 2, 2, 0, 0) + even) + splat<4>(cost[2]),
                              (KVQ_QUADS(a, a, 3, 3, 1, 1) + odd_last) + splat<4>(cost[3])};
        const Ints<4> odd = ways[1] < ways[0], odd_high = ways[3] < ways[2];
        const Quad low = odd ? ways[1] : ways[0], high = odd_high ? ways[3] : ways[2];
        const Ints<4> is_high = high < low, lowest = is_high ? odd_high : odd;
        cost = is_high ? high : low;
        store(best[pair], (lowest & 1) | (is_high & 2));
    }
    const float all = (cost[0] + cost[1]) + (cost[2] + cost[3]);
    line.not_a_number |= all != all;
    int state = cheapest_state(cost);
    for (int pair = kBlock / 2 - 1; pair >= 0; pair--) {
        const int before = pair > 0 ? best[pair][state] : 0;
        const Way taken = way(before, state);
        const int subset[2] = {taken.first, taken.second}, free[2] = {state >> 1, state & 1};
        for (int half = 0; half < 2; half++) {
            const int t = 2 * pair + half;
            line.code[t] = static_cast<uint8_t>(place[t][subset[half]] << 1 | free[half]);
            line.seen[t] = level[t][subset[half]];
        }
        state = before;
    }
}

// Lane s is state s. The subset of its code 0 is s; that of its code 1 is two lanes further.
template <int N>
void shaped_path_alone(const Channel& channel, const float* u, const LineTokens& tokens, Line& line) {
    Quad cost = {0.0f, kInfinity, kInfinity, kInfinity}, error = {};
    float level[kBlock][4];
    int32_t place[kBlock][4];  // bit 8: whether the predecessor is the higher one
    for (int t = 0; t < kBlock; t++) {
        const Quad target = splat<4>(u[t]) + splat<4>(tokens.gain[t]) * error;
        // Lane s of the second belongs to the state two lanes further.
        const Quad turned = KVQ_QUADS(target, target, 2, 3, 0, 1);
        Quad near = load<Quad>(channel.level), near_turned = near;
        Ints<4> at = {}, at_turned = {};
        for (int k = 0; k + 1 < N; k++) {
            const Quad edge = load<Quad>(channel.boundary + 4 * k), next = load<Quad>(channel.level + 4 * (k + 1));
            const Ints<4> above = target > edge, above_turned = turned > edge;
            near = above ? next : near;
            near_turned = above_turned ? next : near_turned;
            at -= above;
            at_turned -= above_turned;
        }
        const Quad made = target - near, made_turned = turned - near_turned;
        const Quad total = cost + weighted_square(made, tokens, t);
        const Quad total_turned = KVQ_QUADS(cost, cost, 2, 3, 0, 1) + weighted_square(made_turned, tokens, t);
        // Into state c + 2 u[t - 1] by code c, from states u[t - 1] and u[t - 1] + 2.
#define KVQ_FROM_LOWER(straight, turned) KVQ_QUADS(straight, turned, 0, 6, 1, 7)
#define KVQ_FROM_HIGHER(straight, turned) KVQ_QUADS(straight, turned, 2, 4, 3, 5)
        const Quad low = KVQ_FROM_LOWER(total, total_turned), high = KVQ_FROM_HIGHER(total, total_turned);
        const Ints<4> is_high = high < low;
        cost = is_high ? high : low;
        error = is_high ? KVQ_FROM_HIGHER(made, made_turned) : KVQ_FROM_LOWER(made, made_turned);
        store(level[t], is_high ? KVQ_FROM_HIGHER(near, near_turned) : KVQ_FROM_LOWER(near, near_turned));
        store(place[t], is_high ? KVQ_FROM_HIGHER(at, at_turned) | 0x100 : KVQ_FROM_LOWER(at, at_turned));
#undef KVQ_FROM_LOWER
#undef KVQ_FROM_HIGHER
    }
    const float all = (cost[0] + cost[1]) + (cost[2] + cost[3]);
    line.not_a_number |= all != all;
    int state = cheapest_state(cost);
    for (int t = kBlock - 1; t >= 0; t--) {
        const int32_t found = place[t][state];
        line.code[t] = static_cast<uint8_t>((found & 0xff) << 1 | (state & 1));
        line.seen[t] = level[t][state];
        state = (state >> 1) + (found >> 8 << 1);
    }
}

// Codes of the nearest levels, without a trellis.
inline void nearest_levels_alone(const Channel& channel, const float* u, Line& line) {
    for (int t = 0; t < kBlock; t++) {
        int place = 0;
        for (int k = 0; k + 1 < channel.count; k++) place += u[t] > channel.boundary[k];
        line.code[t] = static_cast<uint8_t>(place);
        line.seen[t] = channel.level[place];
        line.not_a_number |= u[t] != u[t];
    }
}

// Codes of one channel's elements u[32].
inline void code_line(const Channel& channel, int states, const float* u, const LineTokens& tokens, Line& line) {
    if (channel.count > 1 && states == 1) return nearest_levels_alone(channel, u, line);
    const bool found = with_subsets(channel.count, [&](auto of) {
        constexpr int N = decltype(of)::kSize;
        tokens.gain != nullptr ? shaped_path_alone<N>(channel, u, tokens, line)
                               : best_path_alone<N>(channel, u, tokens, line);
    });
    if (found) return;
    for (int t = 0; t < kBlock; t++) {  // width 0: one level and no choice
        line.code[t] = 0;
        line.seen[t] = channel.level[0];
    }
}

}  // namespace kvq
