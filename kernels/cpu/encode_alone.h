// Encodes a single block, as when decoding closes one: its tokens are in the lanes, and alone.h finds the paths.
#pragma once

#include "alone.h"
#include "encode_parts.h"

namespace kvq {

constexpr int kLineVectors = kBlock / kWidest;

// Memory for the thread of a head: [D][32] numbers of each kind.
struct LineRoom {
    using Vector = Floats<kWidest>;
    Vector *exact, *error, *coded, *weight, *fed;
    float* gain;
    Line* line;
    uint8_t* bytes;

    static size_t size(const KvqTrellis& codec, bool wants_coded) {
        const size_t head = static_cast<size_t>(codec.head_dim) * kBlock;
        return sizeof(float) * (head * (2 + wants_coded) + kBlock * (kTile + 2)) + sizeof(Line) + head;
    }

    LineRoom(void* memory, const KvqTrellis& codec, bool wants_coded) {
        const size_t head = static_cast<size_t>(codec.head_dim) * kLineVectors;
        exact = static_cast<Vector*>(memory);
        error = exact + head;
        coded = error + head;
        weight = coded + (wants_coded ? head : 0);
        fed = weight + kLineVectors;
        gain = reinterpret_cast<float*>(fed + kTile * kLineVectors);
        line = reinterpret_cast<Line*>(gain + kBlock);
        bytes = reinterpret_cast<uint8_t*>(line + 1);
    }
};

// Copies the head's numbers to [D][32], with 0 where there is no token.
inline void gather_line(const Job& job, int head, float* to) {
    const int size = job.codec->head_dim;
    std::memset(to, 0, sizeof(float) * size * kBlock);
    for (int t = 0; t < job.tokens; t++) {
        const float* from = job.x + t * job.stride.token + head * job.stride.head;
        for (int i = 0; i < size; i++) to[i * kBlock + t] = from[i];
    }
}

// The inverse, for numbers or codes.
template <class Number>
void scatter_line(const Job& job, int head, const Number* from, Number* to) {
    const int size = job.codec->head_dim, channels = job.codec->heads * size;
    for (int t = 0; t < job.tokens; t++)
        for (int i = 0; i < size; i++) to[static_cast<int64_t>(t) * channels + head * size + i] = from[i * kBlock + t];
}

// Reads the caller's weights; false if one of them is not a number.
inline bool gather_line_weights(const Job& job, int head, float* to) {
    bool sound = true;
    for (int t = 0; t < kBlock; t++) {
        to[t] = t < job.tokens ? job.weight[static_cast<int64_t>(t) * job.codec->heads + head] : 0.0f;
        sound &= to[t] >= 0.0f && to[t] < kInfinity;
    }
    return sound;
}

// Codes all coordinates of a head once.
inline void code_line_head(const Job& job, int head, const float* shares, bool again, const LineTokens& tokens,
                           const LineRoom& room) {
    constexpr int V = kLineVectors;
    const KvqTrellis& codec = *job.codec;
    const int size = codec.head_dim;
    const Group<kWidest, V> group = {room.exact, room.error};
    auto code = [&](int i, const LineRoom::Vector* fed) {
        if (job.coded != nullptr) std::memcpy(room.coded + i * V, fed, kBlock * sizeof(float));
        code_line(job.channels[head * size + i], codec.states, reinterpret_cast<const float*>(fed), tokens, *room.line);
        for (int v = 0; v < V; v++)
            room.error[i * V + v] = room.exact[i * V + v] - load<LineRoom::Vector>(room.line->seen + v * kWidest);
        std::memcpy(room.bytes + i * kBlock, room.line->code, kBlock);
    };
    for_coordinates<kWidest, V>(group, shares, size, again, room.fed, code);
}

inline bool encode_line(const Job& job, int head, void* memory) {
    const KvqTrellis& codec = *job.codec;
    const LineRoom room(memory, codec, job.coded != nullptr);
    gather_line(job, head, reinterpret_cast<float*>(room.exact));
    turn_pairs<kWidest, kLineVectors>(codec, head, room.exact);
    float* weight = reinterpret_cast<float*>(room.weight);
    room.line->not_a_number = false;
    if (job.weight != nullptr) {
        room.line->not_a_number = !gather_line_weights(job, head, weight);
    } else if (codec.size_classes > 0) {
        weigh_by_size<kWidest, kLineVectors>(codec, head, room.exact, room.weight);
    } else {
        weight = nullptr;
    }
    if (codec.feedback != nullptr) {
        room.gain[0] = 0.0f;
        for (int t = 1; t < kBlock; t++)
            room.gain[t] =
                codec.feedback[head] * (weight != nullptr ? gain_of_weights(weight[t - 1], weight[t]) : 1.0f);
    }
    const LineTokens tokens = {weight, codec.feedback != nullptr ? room.gain : nullptr, static_cast<int>(job.tokens)};
    const int64_t matrix = static_cast<int64_t>(head) * codec.head_dim * codec.head_dim;
    code_line_head(job, head, codec.shares != nullptr ? codec.shares + matrix : nullptr, false, tokens, room);
    for (int pass = 0; pass < codec.refinement_passes; pass++)
        code_line_head(job, head, codec.refinement_shares + matrix, true, tokens, room);
    scatter_line(job, head, room.bytes, job.codes);
    if (job.coded != nullptr) scatter_line(job, head, reinterpret_cast<const float*>(room.coded), job.coded);
    return !room.line->not_a_number;
}

}  // namespace kvq
