// The trellis encoder: heads and groups of blocks are shared out among threads, a block a lane.
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "channel.h"
#include "compensate.h"
#include "kvq_native.h"
#include "layout.h"
#include "pool.h"
#include "prepare.h"

namespace kvq {
namespace {

// One call: what all threads read, and where they write.
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

// What one thread works in, for vectors of L lanes.
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

// Turn the pairs of a head's coordinates.
template <int L>
void turn_pairs(const KvqTrellis& codec, int head, Floats<L>* exact) {
    for (int p = 0; p < codec.pairs; p++) {
        const Floats<L> cosine = splat<L>(codec.cosine[static_cast<int64_t>(head) * codec.pairs + p]);
        const Floats<L> sine = splat<L>(codec.sine[static_cast<int64_t>(head) * codec.pairs + p]);
        Floats<L>* first = exact + codec.pair[2 * p] * kPlane;
        Floats<L>* second = exact + codec.pair[2 * p + 1] * kPlane;
        for (int t = 0; t < kBlock; t++) {
            const Floats<L> x = first[t], y = second[t];
            first[t] = cosine * x - sine * y;
            second[t] = sine * x + cosine * y;
        }
    }
}

// Weights of the tokens of a head by the classes of their sizes, the sums of their squares from coordinate 0 on.
template <int L>
void weigh_by_size(const KvqTrellis& codec, int head, const Floats<L>* exact, Floats<L>* weight) {
    const int edges = codec.size_classes - 1;
    const float* edge = codec.size_edges + static_cast<int64_t>(head) * edges;
    const float* by_class = codec.class_weight + static_cast<int64_t>(head) * codec.size_classes;
    constexpr int kSums = 8;
    for (int begin = 0; begin < kBlock; begin += kSums) {
        Floats<L> size[kSums];
        for (int t = 0; t < kSums; t++) size[t] = exact[begin + t] * exact[begin + t];
        for (int i = 1; i < codec.head_dim; i++) {
            const Floats<L>* of = exact + i * kPlane + begin;
            for (int t = 0; t < kSums; t++) size[t] += of[t] * of[t];
        }
        for (int t = 0; t < kSums; t++) {
            Floats<L> chosen = splat<L>(by_class[0]);
            // What is no number has the last class, as with the reference.
            for (int k = 0; k < edges; k++) chosen = size[t] <= splat<L>(edge[k]) ? chosen : splat<L>(by_class[k + 1]);
            weight[begin + t] = chosen;
        }
    }
}

// Weights that a caller gave; notes those that are none.
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

// What of the rounding error of the token before is added, times the root of the ratio of their weights.
template <int L>
void fill_gains(float feedback, const Floats<L>* weight, Floats<L>* gain) {
    constexpr float kMost = 4.0f;
    gain[0] = Floats<L>{};
    for (int t = 1; t < kBlock; t++) {
        gain[t] = splat<L>(feedback);
        if (weight == nullptr) continue;
        const Floats<L> ratio = weight[t - 1] / weight[t];
        Floats<L> root;
        for (int lane = 0; lane < L; lane++) root[lane] = ratio[lane] <= kMost * kMost ? std::sqrt(ratio[lane]) : kMost;
        gain[t] *= root;
    }
}

// Whether all tokens are there; else which.
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

// Code the coordinate of a head, given what of it is to be coded, and note the error it makes.
template <int L>
void code_coordinate(const Job& job, int channel, int i, const Floats<L>* fed, Tokens<L> tokens, Room<L>& room) {
    const KvqTrellis& codec = *job.codec;
    code_channel<L>(job.channels[channel], codec.states, fed, tokens, job.batch * job.per_sequence == 1, *room.found);
    if (codec.shares != nullptr)
        for (int t = 0; t < kBlock; t++)
            room.error[i * kPlane + t] = room.exact[i * kPlane + t] - room.found->seen[t];
    for (int t = 0; t < kBlock; t++) {
        const typename Lanes<L>::B narrow = __builtin_convertvector(room.found->code[t], typename Lanes<L>::B);
        std::memcpy(room.bytes + (i * kPlane + t) * L, &narrow, L);
    }
}

// All coordinates of a head once.
template <int L>
void code_head(const Job& job, int first_channel, const float* shares, bool again, Tokens<L> tokens, Room<L>& room) {
    const int size = job.codec->head_dim;
    const Group<L> group = {room.exact, room.error};
    for (int first = 0; first < size; first += kTile) {
        const int rows = size - first < kTile ? size - first : kTile;
        if (shares != nullptr) feed_tile<L>(room.fed, group, shares, size, first, rows, again);
        for (int row = 0; row < rows; row++) {
            const int i = first + row;
            Floats<L>* fed = shares != nullptr ? room.fed + row * kBlock : room.exact + i * kPlane;
            if (shares != nullptr) take_up<L>(fed, group, shares + i * size, size, 1, first, i);
            if (job.coded != nullptr) std::memcpy(room.coded + i * kPlane, fed, kBlock * sizeof(Floats<L>));
            code_coordinate<L>(job, first_channel + i, i, fed, tokens, room);
        }
    }
}

template <int L>
bool encode_group(const Job& job, const Blocks& blocks, void* memory) {
    const KvqTrellis& codec = *job.codec;
    const int head = blocks.head, channel = head * blocks.size;
    Room<L> room(memory, codec, job.coded != nullptr);
    gather<L>(blocks, job.x, job.stride, reinterpret_cast<float*>(room.exact));
    turn_pairs<L>(codec, head, room.exact);
    const bool weighs = job.weight != nullptr || codec.size_classes > 0;
    room.found->not_a_number = Ints<L>{};
    if (job.weight != nullptr) {
        gather_weights<L>(job, blocks, room);
    } else if (weighs) {
        weigh_by_size<L>(codec, head, room.exact, room.weight);
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

// Lanes for so many blocks: few blocks are quicker in narrow vectors.
int lanes_for(int64_t blocks) {
    if (kWidest >= 16 && blocks > 8) return 16;
    return kWidest >= 8 && blocks > 4 ? 8 : 4;
}

bool encode_piece(const Job& job, int64_t piece, void* memory) {
    const int head = static_cast<int>(piece / job.groups);
    const int64_t first = piece % job.groups * kWidest, blocks = job.batch * job.per_sequence;
    const int count = static_cast<int>(blocks - first < kWidest ? blocks - first : kWidest);
    const int size = job.codec->head_dim;
    const Blocks own = {first, count, job.per_sequence, job.tokens, head, size, job.codec->heads * size};
    switch (lanes_for(count)) {
#if defined(__AVX512F__)
        case 16: return encode_group<16>(job, own, memory);
#endif
#if defined(__AVX__)
        case 8: return encode_group<8>(job, own, memory);
#endif
        default: return encode_group<4>(job, own, memory);
    }
}

void* aligned_memory(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

// What each thread does: pieces of the work until none is left.
void encode_pieces(void* of) {
    Job& job = *static_cast<Job*>(of);
    const int64_t pieces = job.codec->heads * job.groups;
    const int64_t blocks = job.batch * job.per_sequence;
    const int lanes = lanes_for(blocks);
    const bool coded = job.coded != nullptr;
    const size_t bytes = lanes == 16 ? Room<16>::size(*job.codec, coded)
                         : lanes == 8 ? Room<8>::size(*job.codec, coded)
                                      : Room<4>::size(*job.codec, coded);
    void* memory = aligned_memory(bytes);
    if (memory == nullptr) {
        job.status = KVQ_NO_MEMORY;
        return;
    }
    for (int64_t piece = job.next++; piece < pieces; piece = job.next++)
        if (!encode_piece(job, piece, memory)) job.status = KVQ_NOT_A_NUMBER;
    std::free(memory);
}
}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_encode_trellis(const KvqTrellis* codec, const float* x, const int64_t* stride,
                                      const float* weight, int64_t batch, int64_t tokens, int32_t threads,
                                      uint8_t* codes, float* coded) {
    using namespace kvq;
    if (codec == nullptr || batch < 0 || tokens < 0 || !is_sound(*codec)) return KVQ_BAD_ARGUMENT;
    if (batch == 0 || tokens == 0) return KVQ_OK;
    if (x == nullptr || stride == nullptr || codes == nullptr) return KVQ_BAD_ARGUMENT;
    const int64_t per_sequence = (tokens + kBlock - 1) / kBlock, blocks = batch * per_sequence;
    const Tables tables(*codec, lanes_for(blocks));
    if (tables.channels() == nullptr) return KVQ_NO_MEMORY;
    Job job = {codec,  tables.channels(), x,      {stride[0], stride[1], stride[2]}, weight, codes,
               coded,  batch,             tokens, per_sequence,                      (blocks + kWidest - 1) / kWidest,
               {0},    {KVQ_OK}};
    const int64_t pieces = codec->heads * job.groups;
    run_on_threads(static_cast<int>(threads < pieces ? threads : pieces), encode_pieces, &job);
    return job.status;
}
