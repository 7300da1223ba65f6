// The levels of a channel, prepared for the search of the nearest level in each of the four subsets level[s], level[s +
// 4], ... of a trellis, or among all levels without a trellis.
#pragma once

#include <cstdint>

namespace kvq {

constexpr int kMostLevels = 256;
constexpr float kInfinity = __builtin_inff();

// Entries of one table of ranks, for subsets of `used` levels: the next power of two from 16 on.
constexpr int rank_entries(int used) {
    int entries = 16;
    while (entries < 4 * (used - 1) + 1) entries *= 2;
    return entries;
}
constexpr int kRankTables = 6;

// Prepared once per call, and read by all threads.
struct Channel {
    const float* level;
    int32_t count;
    // Midpoints of neighbours, [count / 4 - 1, 4] of the subsets or [count - 1] of all levels.
    float* boundary;
    // The boundaries of all subsets in one sorted row, whose places are the ranks; then by rank the nearest level of
    // each subset, and last a byte for its place in each: [kRankTables, rank_entries]. Null where nobody asks.
    float* ranks;
};

inline void fill_boundaries(Channel& channel, int subsets) {
    const int used = channel.count / subsets;
    for (int s = 0; s < subsets; s++)
        for (int k = 0; k + 1 < used; k++) {
            const float sum = channel.level[subsets * k + s] + channel.level[subsets * (k + 1) + s];
            channel.boundary[subsets * k + s] = sum * 0.5f;
        }
}

inline void fill_ranks(Channel& channel) {
    const int used = channel.count / 4, entries = rank_entries(used);
    float* boundary = channel.ranks;
    float* nearest = boundary + entries;
    int32_t* place = reinterpret_cast<int32_t*>(boundary + 5 * entries);
    int at[4] = {0, 0, 0, 0};
    for (int rank = 0; rank < entries; rank++) {
        int least = -1;
        float lowest = kInfinity;
        for (int s = 0; s < 4; s++) {
            nearest[s * entries + rank] = channel.level[4 * at[s] + s];
            if (at[s] + 1 < used && channel.boundary[4 * at[s] + s] < lowest) {
                least = s;
                lowest = channel.boundary[4 * at[s] + s];
            }
        }
        place[rank] = at[0] | at[1] << 8 | at[2] << 16 | at[3] << 24;
        boundary[rank] = lowest;
        if (least >= 0) at[least]++;
    }
}

}  // namespace kvq
