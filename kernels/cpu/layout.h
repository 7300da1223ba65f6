// Between rows of channels, as tensors have them, and vectors of blocks: 32 tokens of one channel, a block a lane.
#pragma once

#include "path.h"

namespace kvq {

// Blocks of one head, a lane each; lanes beyond the last repeat it and are not written back.
struct Blocks {
    int64_t first;       // number of the first one, counted over the sequences of the batch
    int count;           // that are there
    int64_t per_sequence;
    int64_t tokens;      // of a sequence
    int channels;        // of a token
    int channel;         // the head's first
    int size;            // of the head

    // Row of the first token of a lane's block, and how many tokens it has.
    KVQ_INLINE int64_t row(int lane) const {
        const int64_t block = first + (lane < count ? lane : count - 1);
        return block / per_sequence * tokens + block % per_sequence * kBlock;
    }
    KVQ_INLINE int length(int lane) const {
        const int64_t block = first + (lane < count ? lane : count - 1);
        const int64_t left = tokens - block % per_sequence * kBlock;
        return left < kBlock ? static_cast<int>(left) : kBlock;
    }
};

typedef float Quad __attribute__((vector_size(16)));

KVQ_INLINE Quad load_quad(const float* from) {
    Quad quad;
    std::memcpy(&quad, from, sizeof quad);
    return quad;
}
KVQ_INLINE void store_quad(float* to, Quad quad) { std::memcpy(to, &quad, sizeof quad); }

KVQ_INLINE void transpose(Quad (&q)[4]) {
    typedef int32_t Order __attribute__((vector_size(16)));
#if defined(__clang__)
#define KVQ_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define KVQ_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Order{i, j, k, l})
#endif
    const Quad a = KVQ_SHUFFLE(q[0], q[1], 0, 4, 1, 5), b = KVQ_SHUFFLE(q[0], q[1], 2, 6, 3, 7);
    const Quad c = KVQ_SHUFFLE(q[2], q[3], 0, 4, 1, 5), d = KVQ_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    q[0] = KVQ_SHUFFLE(a, c, 0, 1, 4, 5);
    q[1] = KVQ_SHUFFLE(a, c, 2, 3, 6, 7);
    q[2] = KVQ_SHUFFLE(b, d, 0, 1, 4, 5);
    q[3] = KVQ_SHUFFLE(b, d, 2, 3, 6, 7);
#undef KVQ_SHUFFLE
}

// y [rows, channels] to `to` [size][32][L]; 0 where a block has no token.
template <int L>
void gather(const Blocks& blocks, const float* y, float* to) {
    static const float nothing[4] = {};
    for (int four = 0; four < L; four += 4) {
        const float* from[4];
        int length[4];
        for (int n = 0; n < 4; n++) {
            from[n] = y + blocks.row(four + n) * blocks.channels + blocks.channel;
            length[n] = blocks.length(four + n);
        }
        for (int t = 0; t < kBlock; t++) {
            int i = 0;
            for (; i + 4 <= blocks.size; i += 4) {
                Quad quads[4];
                for (int n = 0; n < 4; n++)
                    quads[n] = load_quad(t < length[n] ? from[n] + static_cast<int64_t>(t) * blocks.channels + i : nothing);
                transpose(quads);
                for (int n = 0; n < 4; n++) store_quad(to + ((i + n) * kBlock + t) * L + four, quads[n]);
            }
            for (; i < blocks.size; i++)
                for (int n = 0; n < 4; n++)
                    to[(i * kBlock + t) * L + four + n] =
                        t < length[n] ? from[n][static_cast<int64_t>(t) * blocks.channels + i] : 0.0f;
        }
    }
}

// The inverse, for tokens and lanes that are there.
template <int L>
void scatter(const Blocks& blocks, const float* from, float* y) {
    for (int lane = 0; lane < blocks.count; lane++) {
        float* to = y + blocks.row(lane) * blocks.channels + blocks.channel;
        const int length = blocks.length(lane);
        for (int t = 0; t < length; t++, to += blocks.channels)
            for (int i = 0; i < blocks.size; i++) to[i] = from[(i * kBlock + t) * L + lane];
    }
}

// Codes, [size][32][L] bytes, to rows of channels.
template <int L>
void scatter(const Blocks& blocks, const uint8_t* from, uint8_t* codes) {
    for (int lane = 0; lane < blocks.count; lane++) {
        uint8_t* to = codes + blocks.row(lane) * blocks.channels + blocks.channel;
        const int length = blocks.length(lane);
        for (int t = 0; t < length; t++, to += blocks.channels)
            for (int i = 0; i < blocks.size; i++) to[i] = from[(i * kBlock + t) * L + lane];
    }
}

}  // namespace kvq
