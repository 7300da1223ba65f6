// Conversion between rows of channels, as in tensors, and vectors of blocks: 32 tokens of one channel, one block per
// lane.
#pragma once

#include "path.h"

namespace kvq {

// Largest head size.
constexpr int kMostSize = 2048;

// Blocks of one head, one per lane. Lanes beyond the last block repeat it and are not written back.
struct Blocks {
    int64_t first;  // number of the first one, counted over the sequences of the batch
    int count;      // that are there
    int64_t per_sequence;
    int64_t tokens;  // of a sequence
    int head, size, channels;

    KVQ_INLINE int64_t block(int lane) const { return first + (lane < count ? lane : count - 1); }
    KVQ_INLINE int64_t sequence(int lane) const { return block(lane) / per_sequence; }
    KVQ_INLINE int64_t first_token(int lane) const { return block(lane) % per_sequence * kBlock; }
    // Number of existing tokens in a lane's block.
    KVQ_INLINE int length(int lane) const {
        const int64_t left = tokens - first_token(lane);
        return left < kBlock ? static_cast<int>(left) : kBlock;
    }
    // The head's first channel of a lane's first token in [batch, tokens, channels].
    KVQ_INLINE int64_t start(int lane) const {
        return (sequence(lane) * tokens + first_token(lane)) * channels + head * size;
    }
    // Of the same in [batch, tokens, heads].
    KVQ_INLINE int64_t start_of_heads(int lane) const {
        return (sequence(lane) * tokens + first_token(lane)) * (channels / size) + head;
    }
};

// Transpose sixteen rows of bytes: row n is interleaved with row n + 8, four times.
KVQ_INLINE void transpose(Bytes (&rows)[16]) {
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {
        Bytes next[16];
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {
            const Bytes a = rows[n], b = rows[n + 8];
            next[2 * n] = KVQ_SHUFFLE(Bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * n + 1] = KVQ_SHUFFLE(Bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int n = 0; n < 16; n++) rows[n] = next[n];
    }
}

// Numbers from a sequence, a token and a head to the next.
struct Strides {
    int64_t sequence, token, head;
};

// Copy the head's numbers of every token to `to` [size][kPlane][L]; 0 for missing tokens of a block.
template <int L>
void gather(const Blocks& blocks, const float* x, Strides stride, float* to) {
    static const float nothing[kMostSize] = {};
    const float* start[L];
    int length[L];
    for (int lane = 0; lane < L; lane++) {
        start[lane] = x + blocks.sequence(lane) * stride.sequence + blocks.first_token(lane) * stride.token +
                      blocks.head * stride.head;
        length[lane] = blocks.length(lane);
    }
    for (int t = 0; t < kBlock; t++) {
        const float* from[L];
        for (int lane = 0; lane < L; lane++) from[lane] = t < length[lane] ? start[lane] + t * stride.token : nothing;
        int i = 0;
        for (; i + 4 <= blocks.size; i += 4)
            for (int lane = 0; lane < L; lane += 4) {
                Quad quads[4];
                for (int n = 0; n < 4; n++) quads[n] = load<Quad>(from[lane + n] + i);
                transpose(quads);
                for (int n = 0; n < 4; n++) store(to + ((i + n) * kPlane + t) * L + lane, quads[n]);
            }
        for (; i < blocks.size; i++)
            for (int lane = 0; lane < L; lane++) to[(i * kPlane + t) * L + lane] = from[lane][i];
    }
}

// Start of each lane's rows in [batch, tokens, channels], and number of tokens to write.
template <int L>
struct Rows {
    int64_t start[L];
    int length[L];

    KVQ_INLINE explicit Rows(const Blocks& blocks) {
        for (int lane = 0; lane < L; lane++) {
            start[lane] = blocks.start(lane);
            length[lane] = lane < blocks.count ? blocks.length(lane) : 0;
        }
    }
};

// The inverse, for existing tokens and lanes.
template <int L>
void scatter(const Blocks& blocks, const float* from, float* y) {
    const Rows<L> rows(blocks);
    for (int t = 0; t < kBlock; t++)
        for (int lane = 0; lane < L; lane += 4) {
            float* to[4];
            bool there[4];
            for (int n = 0; n < 4; n++) {
                there[n] = t < rows.length[lane + n];
                to[n] = y + rows.start[lane + n] + static_cast<int64_t>(t) * blocks.channels;
            }
            int i = 0;
            for (; i + 4 <= blocks.size; i += 4) {
                Quad quads[4];
                for (int n = 0; n < 4; n++) quads[n] = load<Quad>(from + ((i + n) * kPlane + t) * L + lane);
                transpose(quads);
                for (int n = 0; n < 4; n++)
                    if (there[n]) store(to[n] + i, quads[n]);
            }
            for (; i < blocks.size; i++)
                for (int n = 0; n < 4; n++)
                    if (there[n]) to[n][i] = from[(i * kPlane + t) * L + lane + n];
        }
}

// Codes, [size][kPlane][L] bytes, to rows of channels.
template <int L>
void scatter(const Blocks& blocks, const uint8_t* from, uint8_t* codes) {
    const Rows<L> rows(blocks);
    for (int t = 0; t < kBlock; t += 16 / L) {  // tokens of all lanes that sixteen bytes hold
        uint8_t* to[16];
        bool there[16];
        for (int n = 0; n < 16; n++) {
            there[n] = t + n / L < rows.length[n % L];
            to[n] = codes + rows.start[n % L] + static_cast<int64_t>(t + n / L) * blocks.channels;
        }
        int i = 0;
        for (; i + 16 <= blocks.size; i += 16) {
            Bytes bytes[16];
            for (int n = 0; n < 16; n++) bytes[n] = load<Bytes>(from + ((i + n) * kPlane + t) * L);
            transpose(bytes);
            for (int n = 0; n < 16; n++)
                if (there[n]) store(to[n] + i, bytes[n]);
        }
        for (; i < blocks.size; i++)
            for (int n = 0; n < 16; n++)
                if (there[n]) to[n][i] = from[(i * kPlane + t) * L + n];
    }
}

}  // namespace kvq
