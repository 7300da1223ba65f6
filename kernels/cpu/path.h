// The path of least weighted squared error through a block of 32 tokens, one block in each lane: Viterbi's algorithm,
// two tokens at a time, as kvq_calib/codec/paths.py defines it. Every operation is rounded; ties go to the predecessor,
// and in the end to the state, of the lower number.
#pragma once

#include "search.h"

namespace kvq {

constexpr int kBlock = 32;
// Vectors from one coordinate to the next: one more than there are tokens. With a power of two, all coordinates would
// use the same few lines of the processor's cache.
constexpr int kPlane = kBlock + 1;

// Inputs that are the same for all channels of a head.
template <int L>
struct Tokens {
    const Floats<L>* weight;  // [32] or null
    const Ints<L>* present;   // [32], all bits set where there is a token; null where all are there
    const Floats<L>* gain;    // [32] of noise shaping; null for none
};

// Codes and levels of a channel's block.
template <int L>
struct Coded {
    Ints<L> code[kBlock];
    Floats<L> seen[kBlock];  // the levels
    Ints<L> not_a_number;    // of lanes where something was none; bits are only ever set
};

// Over two tokens there is one way from each state, u[t] + 2 u[t - 1], to each other: the subsets of both tokens.
struct Way {
    int first, second;
};
constexpr Way way(int before, int after) {
    const int last = before & 1, long_ago = before >> 1, now = after & 1, between = after >> 1;
    return {2 * (between ^ long_ago) + last, 2 * (now ^ last) + between};
}

// Costs of the states after two more tokens, and the best way into each: two bits for each state.
template <int L>
KVQ_INLINE Ints<L> advance(Floats<L> (&cost)[4], const Floats<L> (&distance)[2][4]) {
    Floats<L> next[4];
    Ints<L> best = {};
#pragma GCC unroll 4
    for (int after = 0; after < 4; after++) {
        Floats<L> ways[4];
#pragma GCC unroll 4
        for (int before = 0; before < 4; before++) {
            const Way taken = way(before, after);
            ways[before] = (distance[0][taken.first] + distance[1][taken.second]) + cost[before];
        }
        const Ints<L> odd = ways[1] < ways[0], odd_high = ways[3] < ways[2];
        const Floats<L> low = odd ? ways[1] : ways[0], high = odd_high ? ways[3] : ways[2];
        const Ints<L> is_high = high < low;
        next[after] = is_high ? high : low;
        const Ints<L> lowest = is_high ? odd_high : odd;
        best |= ((lowest & 1) | (is_high & 2)) << (2 * after);
    }
    for (int state = 0; state < 4; state++) cost[state] = next[state];
    return best;
}

// The state of least cost.
template <int L>
KVQ_INLINE Ints<L> cheapest(const Floats<L> (&cost)[4]) {
    Ints<L> state = {};
    Floats<L> least = cost[0];
    for (int other = 1; other < 4; other++) {
        const Ints<L> lower = cost[other] < least;
        least = lower ? cost[other] : least;
        state = lower ? Ints<L>{} + other : state;
    }
    return state;
}

template <int L, int N>
void best_path(const Channel& channel, const Floats<L>* u, Tokens<L> tokens, Coded<L>& coded) {
    const typename Search<L, N>::Type search(channel);
    Floats<L> nearest[kBlock][4];
    Ints<L> places[kBlock], best[kBlock / 2];
    Floats<L> cost[4] = {Floats<L>{}, splat<L>(kInfinity), splat<L>(kInfinity), splat<L>(kInfinity)};
    for (int pair = 0; pair < kBlock / 2; pair++) {
        Floats<L> distance[2][4];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int t = 2 * pair + half;
            search.template find<0, 1>(u[t], nearest[t], places[t]);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                const Floats<L> error = u[t] - nearest[t][s];
                distance[half][s] = error * error;
            }
            if (tokens.weight != nullptr)
                for (int s = 0; s < 4; s++) distance[half][s] *= tokens.weight[t];
            if (tokens.present != nullptr)
                for (int s = 0; s < 4; s++)
                    distance[half][s] = (Floats<L>)((Ints<L>)distance[half][s] & tokens.present[t]);
        }
        best[pair] = advance<L>(cost, distance);
    }
    const Floats<L> all = (cost[0] + cost[1]) + (cost[2] + cost[3]);
    coded.not_a_number |= all != all;

    Ints<L> state = cheapest<L>(cost);
    for (int pair = kBlock / 2 - 1; pair >= 0; pair--) {
        const Ints<L> before = pair > 0 ? field<L, 2>(best[pair], state) : Ints<L>{};
        const Ints<L> now = state & 1, between = state >> 1, last = before & 1, long_ago = before >> 1;
        const Ints<L> subset[2] = {((between ^ long_ago) << 1) + last, ((now ^ last) << 1) + between};
        const Ints<L> free[2] = {between, now};
        for (int half = 0; half < 2; half++) {
            const int t = 2 * pair + half;
            coded.code[t] = (field<L, 8>(places[t], subset[half]) << 1) | free[half];
            coded.seen[t] = pick<L>(nearest[t], subset[half]);
        }
        state = before;
    }
}

// work(OfSize<N>()) for subsets of N levels; false for a channel of one level.
template <int size>
struct OfSize {
    static constexpr int kSize = size;
};
template <class Work>
KVQ_INLINE bool with_subsets(int32_t count, Work work) {
    switch (count) {
        case 4: work(OfSize<1>()); return true;
        case 8: work(OfSize<2>()); return true;
        case 16: work(OfSize<4>()); return true;
        case 32: work(OfSize<8>()); return true;
        case 64: work(OfSize<16>()); return true;
        case 128: work(OfSize<32>()); return true;
        case 256: work(OfSize<64>()); return true;
        default: return false;
    }
}

// Codes of the nearest levels, without a trellis.
template <int L>
void nearest_levels(const Channel& channel, const Floats<L>* u, Coded<L>& coded) {
    for (int t = 0; t < kBlock; t++) {
        Floats<L> near = splat<L>(channel.level[0]);
        Ints<L> place = {};
        for (int k = 0; k + 1 < channel.count; k++) {
            const Ints<L> above = u[t] > splat<L>(channel.boundary[k]);
            near = above ? splat<L>(channel.level[k + 1]) : near;
            place -= above;
        }
        coded.code[t] = place;
        coded.seen[t] = near;
        coded.not_a_number |= u[t] != u[t];
    }
}


}  // namespace kvq
