// Attention of one token to exact keys and values: sinks, then the tail.
#pragma once

#include "attention.h"

namespace kvq {

// Largest number of query heads at a time. With more there are not enough registers, and each number needs separate
// code.
constexpr int kMostGroup = 4;
// Number of tokens at a time.
constexpr int kExactTokens = 32;

constexpr int whole_vectors(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Whether the first and the second coordinates of the pairs are runs, so that pairs can be rotated by vectors.
inline bool in_halves(const KvqTurns& turns) {
    for (int p = 0; p < turns.pairs; p++)
        if (turns.pair[2 * p] != p || turns.pair[2 * p + 1] != turns.pairs + p) return false;
    return turns.pairs % kLanes == 0;
}

// Rotate a key by the cosines and sines [2, P] of its position.
inline void turn_key(const KvqTurns& turns, bool halves, const float* by, float* key) {
    const int pairs = turns.pairs;
    if (halves) {
        for (int p = 0; p < pairs; p += kLanes) {
            const F x = load<F>(key + p), y = load<F>(key + pairs + p);
            const F c = load<F>(by + p), s = load<F>(by + pairs + p);
            store(key + p, fused_minus(x, c, y * s));
            store(key + pairs + p, fused(x, s, y * c));
        }
        return;
    }
    for (int p = 0; p < pairs; p++) {
        float &x = key[turns.pair[2 * p]], &y = key[turns.pair[2 * p + 1]];
        const float first = x, second = y;
        x = first * by[p] - second * by[pairs + p];
        y = first * by[pairs + p] + second * by[p];
    }
}

// Up to kExactTokens tokens of sinks or tail.
struct ExactRun {
    const uint16_t* key;    // [count, key size]
    const uint16_t* value;  // [count, value size]
    const float* turn;      // [count, 2, P]
    const uint8_t* seen;    // [count]
    int count;
};

// Add a run of exact tokens to the sums of a head; `query` [group, whole_vectors(key size)] is scaled to log2.
inline void attend_run(const KvqTurns& turns, bool halves, const ExactRun& run, int group, int key_size, int value_size,
                       bool bfloat, float cap, const float* query, float* number, float* out, float* highest,
                       float* total) {
    const int stride = whole_vectors(key_size);
    float score[kMostGroup][kExactTokens];
    for (int i = key_size; i < stride; i++) number[i] = 0;
    for (int t = 0; t < run.count; t++) {
        if (run.seen[t] == 0) {
            for (int g = 0; g < group; g++) score[g][t] = kHidden;
            continue;
        }
        halves_to_floats(run.key + static_cast<int64_t>(t) * key_size, key_size, bfloat, number);
        turn_key(turns, halves, run.turn + static_cast<int64_t>(t) * 2 * turns.pairs, number);
        for (int g = 0; g < group; g++) {
            F sum = {};
            for (int i = 0; i < stride; i += kLanes)
                sum = fused(load<F>(number + i), load<F>(query + g * stride + i), sum);
            score[g][t] = sum_of(sum);
            if (cap > 0) score[g][t] = cap * tanh_of(all(score[g][t] / cap))[0];
        }
    }
    for (int g = 0; g < group; g++) {
        float high = highest[g];
        for (int t = 0; t < run.count; t++) high = score[g][t] > high ? score[g][t] : high;
        const float by = highest[g] <= kHidden ? 0.0f : std::exp2(highest[g] - high);
        highest[g] = high;
        total[g] *= by;
        for (int i = 0; i < value_size; i++) out[g * value_size + i] *= by;
        for (int t = run.count; t < whole_vectors(run.count); t++) score[g][t] = kHidden;
        for (int t = 0; t < run.count; t += kLanes) {
            const F x = load<F>(score[g] + t);
            store(score[g] + t, (F)((I)exp2_of(x - high) & (x > all(0.5f * kHidden))));
        }
        for (int t = 0; t < run.count; t++) total[g] += score[g][t];
    }
    for (int t = 0; t < run.count; t++) {
        if (run.seen[t] == 0) continue;
        halves_to_floats(run.value + static_cast<int64_t>(t) * value_size, value_size, bfloat, number);
        for (int g = 0; g < group; g++) {
            const float weight = score[g][t];
            float* to = out + g * value_size;
            int i = 0;
            for (; i + kLanes <= value_size; i += kLanes)
                store(to + i, fused(load<F>(number + i), all(weight), load<F>(to + i)));
            for (; i < value_size; i++) to[i] += number[i] * weight;
        }
    }
}

}  // namespace kvq
