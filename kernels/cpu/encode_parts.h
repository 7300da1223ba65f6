// The first steps of coding a head, for both layouts of tokens in vectors.
#pragma once

#include <atomic>
#include <cmath>

#include "compensate.h"
#include "kvq_native.h"
#include "layout.h"
#include "tables.h"

namespace kvq {

// One call: inputs and outputs of all threads.
struct Job {
    const KvqTrellis* codec;
    const Channel* channels;
    const float* x;
    Strides stride;
    const float* weight;
    uint8_t* codes;
    float* coded;
    int64_t batch, tokens, per_sequence, groups;
    std::atomic<int64_t> next;
    std::atomic<int32_t> status;
};

// Rotate the pairs of a head's coordinates.
template <int L, int V>
void turn_pairs(const KvqTrellis& codec, int head, Floats<L>* exact) {
    for (int p = 0; p < codec.pairs; p++) {
        const Floats<L> cosine = splat<L>(codec.cosine[static_cast<int64_t>(head) * codec.pairs + p]);
        const Floats<L> sine = splat<L>(codec.sine[static_cast<int64_t>(head) * codec.pairs + p]);
        Floats<L>* first = exact + codec.pair[2 * p] * Group<L, V>::kStride;
        Floats<L>* second = exact + codec.pair[2 * p + 1] * Group<L, V>::kStride;
        for (int t = 0; t < V; t++) {
            const Floats<L> x = first[t], y = second[t];
            first[t] = cosine * x - sine * y;
            second[t] = sine * x + cosine * y;
        }
    }
}

// Weights of a head's tokens, by the classes of their sizes. A size is the sum of squares, in order of coordinates.
template <int L, int V>
void weigh_by_size(const KvqTrellis& codec, int head, const Floats<L>* exact, Floats<L>* weight) {
    const int edges = codec.size_classes - 1;
    const float* edge = codec.size_edges + static_cast<int64_t>(head) * edges;
    const float* by_class = codec.class_weight + static_cast<int64_t>(head) * codec.size_classes;
    constexpr int kSums = V < 8 ? V : 8;
    for (int begin = 0; begin < V; begin += kSums) {
        Floats<L> size[kSums];
        for (int t = 0; t < kSums; t++) size[t] = exact[begin + t] * exact[begin + t];
        for (int i = 1; i < codec.head_dim; i++) {
            const Floats<L>* of = exact + i * Group<L, V>::kStride + begin;
            for (int t = 0; t < kSums; t++) size[t] += of[t] * of[t];
        }
        for (int t = 0; t < kSums; t++) {
            Floats<L> chosen = splat<L>(by_class[0]);
            // Numbers that are not finite have the last class, as in the reference.
            for (int k = 0; k < edges; k++) chosen = size[t] <= splat<L>(edge[k]) ? chosen : splat<L>(by_class[k + 1]);
            weight[begin + t] = chosen;
        }
    }
}

// The share of the previous rounding error that is added to a token, relative to the head's feedback: the ratio of
// their weights.
inline float gain_of_weights(float before, float own) {
    constexpr float kMost = 4.0f;
    const float ratio = before / own;
    return ratio <= kMost * kMost ? std::sqrt(ratio) : kMost;
}

}  // namespace kvq
