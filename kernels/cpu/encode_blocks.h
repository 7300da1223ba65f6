// Encodes many blocks at a time, one per lane.
#pragma once

#include "channel.h"
#include "encode_parts.h"

namespace kvq {

// Memory for one thread, for vectors of L lanes.
template <int L>
struct Room {
    float* memory;
    Floats<L>*exact, *error, *coded, *weight, *gain, *fed;
    Ints<L>* present;
    Coded<L>* found;
    uint8_t* bytes;

    static size_t size(const KvqTrellis& codec, bool wants_coded) {
        const size_t head = static_cast<size_t>(codec.head_dim) * kPlane;
        return (head * (2 + wants_coded) + kBlock * (kTile + 3)) * sizeof(Floats<L>) + sizeof(Coded<L>) + head * L;
    }

    Room(void* memory_, const KvqTrellis& codec, bool wants_coded) {
        exact = static_cast<Floats<L>*>(memory_);
        const size_t head = static_cast<size_t>(codec.head_dim) * kPlane;
        error = exact + head;
        coded = error + head;
        weight = coded + (wants_coded ? head : 0);
        gain = weight + kBlock;
        fed = gain + kBlock;
        present = reinterpret_cast<Ints<L>*>(fed + kTile * kBlock);
        found = reinterpret_cast<Coded<L>*>(present + kBlock);
        bytes = reinterpret_cast<uint8_t*>(found + 1);
    }
};

// Reads the caller's weights, and records those that are not numbers.
template <int L>
void gather_weights(const Job& job, const Blocks& blocks, Room<L>& room) {
    const int heads = job.codec->heads;
    float* to = reinterpret_cast<float*>(room.weight);
    for (int lane = 0; lane < L; lane++) {
        const float* from = job.weight + blocks.start_of_heads(lane);
        const int length = blocks.length(lane);
        for (int t = 0; t < kBlock; t++) to[t * L + lane] = t < length ? from[static_cast<int64_t>(t) * heads] : 0.0f;
    }
    for (int t = 0; t < kBlock; t++)
        room.found->not_a_number |= ~((room.weight[t] >= splat<L>(0.0f)) & (room.weight[t] < splat<L>(kInfinity)));
}

// The share of the previous token's rounding error that is added.
template <int L>
void fill_gains(float feedback, const Floats<L>* weight, Floats<L>* gain) {
    gain[0] = Floats<L>{};
    for (int t = 1; t < kBlock; t++) {
        gain[t] = splat<L>(feedback);
        if (weight == nullptr) continue;
        Floats<L> root;
        for (int lane = 0; lane < L; lane++) root[lane] = gain_of_weights(weight[t - 1][lane], weight[t][lane]);
        gain[t] *= root;
    }
}

// Whether all tokens are present, and if not, which.
template <int L>
bool fill_present(const Blocks& blocks, Ints<L>* present) {
    Ints<L> length;
    bool whole = true;
    for (int lane = 0; lane < L; lane++) {
        length[lane] = blocks.length(lane);
        whole &= length[lane] == kBlock;
    }
    for (int t = 0; t < kBlock && !whole; t++) present[t] = length > Ints<L>{} + t;
    return whole;
}

// Code one coordinate of a head from its numbers with compensation, and record the error.
template <int L>
void code_coordinate(const Job& job, int channel, int i, const Floats<L>* fed, Tokens<L> tokens, Room<L>& room) {
    const KvqTrellis& codec = *job.codec;
    code_channel<L>(job.channels[channel], codec.states, fed, tokens, *room.found);
    if (codec.shares != nullptr)
        for (int t = 0; t < kBlock; t++)
            room.error[i * kPlane + t] = room.exact[i * kPlane + t] - room.found->seen[t];
    for (int t = 0; t < kBlock; t++) {
        const typename Lanes<L>::B narrow = __builtin_convertvector(room.found->code[t], typename Lanes<L>::B);
        std::memcpy(room.bytes + (i * kPlane + t) * L, &narrow, L);
    }
}

// Codes all coordinates of a head once.
template <int L>
void code_head(const Job& job, int first_channel, const float* shares, bool again, Tokens<L> tokens, Room<L>& room) {
    const Group<L, kBlock> group = {room.exact, room.error};
    auto code = [&](int i, const Floats<L>* fed) {
        if (job.coded != nullptr) std::memcpy(room.coded + i * kPlane, fed, kBlock * sizeof(Floats<L>));
        code_coordinate<L>(job, first_channel + i, i, fed, tokens, room);
    };
    for_coordinates<L, kBlock>(group, shares, job.codec->head_dim, again, room.fed, code);
}

template <int L>
bool encode_group(const Job& job, const Blocks& blocks, void* memory) {
    const KvqTrellis& codec = *job.codec;
    const int head = blocks.head, channel = head * blocks.size;
    Room<L> room(memory, codec, job.coded != nullptr);
    gather<L>(blocks, job.x, job.stride, reinterpret_cast<float*>(room.exact));
    turn_pairs<L, kBlock>(codec, head, room.exact);
    const bool weighs = job.weight != nullptr || codec.size_classes > 0;
    room.found->not_a_number = Ints<L>{};
    if (job.weight != nullptr) {
        gather_weights<L>(job, blocks, room);
    } else if (weighs) {
        weigh_by_size<L, kBlock>(codec, head, room.exact, room.weight);
    }
    const bool whole = fill_present<L>(blocks, room.present);
    const Floats<L>* weight = weighs ? room.weight : nullptr;
    const bool shapes = codec.feedback != nullptr;
    if (shapes) fill_gains<L>(codec.feedback[head], weight, room.gain);
    const Tokens<L> tokens = {weight, whole ? nullptr : room.present, shapes ? room.gain : nullptr};
    const int64_t matrix = static_cast<int64_t>(head) * codec.head_dim * codec.head_dim;
    code_head<L>(job, channel, codec.shares != nullptr ? codec.shares + matrix : nullptr, false, tokens, room);
    for (int pass = 0; pass < codec.refinement_passes; pass++)
        code_head<L>(job, channel, codec.refinement_shares + matrix, true, tokens, room);
    scatter<L>(blocks, room.bytes, job.codes);
    if (job.coded != nullptr) scatter<L>(blocks, reinterpret_cast<const float*>(room.coded), job.coded);
    return !any<L>(room.found->not_a_number);
}

}  // namespace kvq
