// The C interface of the CPU kernels: raw pointers, no torch, no Python.
// kvq_calib/codec defines what the functions compute. Codes are equal bit for bit, attention is within a stated error.
// Nothing is kept between calls except the threads that wait for work.
#pragma once

#include <cstdint>

// Increased with every change of this interface. A library with another number is not used.
#define KVQ_ABI 6

#if defined(__GNUC__)
#define KVQ_EXPORT __attribute__((visibility("default")))
#else
#error "GCC or Clang is needed: the kernels are written in their vector extensions"
#endif

enum KvqStatus : int32_t {
    KVQ_OK = 0,
    // A number on the way was not finite, so no path is better than another. Outputs must not be used.
    KVQ_NOT_A_NUMBER = 1,
    // Invalid sizes or counts.
    KVQ_BAD_ARGUMENT = 2,
    KVQ_NO_MEMORY = 3,
};

// The trellis codec of one layer's keys or values: C = heads * head_dim channels. Pointers are to contiguous arrays.
struct KvqTrellis {
    int32_t heads;
    int32_t head_dim;
    int32_t states;             // 4, or 1 for the nearest level
    int32_t refinement_passes;  // with refinement_shares
    int32_t level_stride;       // L
    int32_t size_classes;       // of token weights, 0 for none
    int32_t pairs;              // RoPE pairs that are turned, P, 0 for none
    const int32_t* level_count; // [C]: 1 for width 0, else 2 ** width, twice that with four states
    const float* levels;        // [C, L], sorted, finite and below 2 ** 39 in each row
    const float* shares;            // [H, D, D], row = who takes up; null for no error compensation
    const float* refinement_shares; // [H, D, D] or null
    const float* size_edges;        // [H, size_classes - 1], ascending
    const float* class_weight;      // [H, size_classes], finite and not negative
    const float* feedback;          // [H], of magnitude below 1: what of a token's rounding error the next one takes
                                    // up; null for none, and with shares
    const int32_t* pair;            // [P, 2], the coordinates of each, none twice
    const float* cosine;            // [H, P], of the angles
    const float* sine;              // [H, P]
};

// How the packed keys or values of one layer are read: C = heads * size channels.
struct KvqCodes {
    int32_t heads;
    int32_t size;                // of a head
    int32_t trellis;             // 1: the index of a level follows from the codes of a block, else it is the code
    int32_t token_scales;        // 1: tokens have scales and zero points
    int32_t bfloat;              // of these and of residuals: 1 for bfloat16, 0 for float16
    int32_t row_words;           // of a sequence in a page: 8 times the sum of the widths
    int32_t level_count;         // of listed levels, which all channels share; 0 where they are computed
    int32_t unused;
    const uint8_t* width;        // [C], up to 8
    const int32_t* offset;       // [C], the sum of the widths before
    const float* level;          // [level_count], or null
    const float* coefficient;    // [C, 6] of computed levels, see kvq_calib/codec/computed_levels.py, or null
    const float* scale;          // [C] or null; after those of tokens and after residuals, where tokens have any
    const float* zero_point;     // [C], null with scale
};

// Buffers of a page: 8 blocks of 32 tokens of all sequences.
struct KvqPage {
    const int32_t* codes;      // [batch, row_words]
    const uint16_t* token;     // [batch, 256, 2], scale and zero point; null without token_scales
    const uint16_t* index;     // [entries] of outliers: token in block << 11 | coordinate; null where there are none
    const uint16_t* residual;  // [entries]
    const void* start;         // [8 * batch * heads + 1], of the list of each block, sequence and head
    int64_t start_bytes;       // of a start: 2 or 4, or 0 where there are no lists
    int64_t entries;
    int64_t batch;
};

// Exact keys and values, [batch, heads, tokens, size] each, in the storage type; size and tokens are contiguous.
struct KvqExact {
    const uint16_t* key;
    const uint16_t* value;
    int64_t key_stride[2];    // numbers from a sequence and from a head to the next
    int64_t value_stride[2];
    int32_t tokens;
    int32_t unused;
};

// RoPE as readers apply it: P pairs of coordinates.
struct KvqTurns {
    int32_t pairs;
    float scaling;             // factor on turned coordinates
    const int32_t* pair;       // [P, 2], none twice
    const float* own_cosine;   // [heads, P] of the angle by which each pair was turned before it was coded, or null
    const float* own_sine;
    const float* within;       // [P, 64] of kvq_turns_within
    const float* block;        // [batch, table_pages, P, 2, 8]: cosines and sines of the blocks' first positions
    const float* exact;        // [batch, S, 2, P]: cosines and sines of the exact tokens' positions, sinks then tail
};

// Attention of one new token of each sequence.
struct KvqAttention {
    int32_t batch;
    int32_t group;             // query heads of a key-value head
    int32_t pages;             // that are given
    int32_t first_page;        // number of the first of them in the tables of blocks
    int32_t table_pages;       // pages that the tables of blocks have
    int32_t threads;           // to use at most
    int64_t first_token;       // blocks hold 32 tokens each, counted from block 0: those before it are hidden
    float scale;               // of scores
    float softcap;             // scores become softcap * tanh(score / softcap); 0 for no cap
    const float* query;        // [batch, heads * group, key size], turned already
    const KvqPage* key_page;   // [pages]
    const KvqPage* value_page;
    const uint32_t* seen;      // [batch, 8 * table_pages], a bit for each token of a block that is attended
    const uint8_t* exact_seen; // [batch, S], not 0 where a token is attended
    const float* sink_logit;   // [heads * group] that take part without a value, or null
    float* out;                // [batch, heads * group, value size], written
    KvqTurns turns;
    KvqExact sinks;
    KvqExact tail;
};

// Blocks that become ordinary tensors.
struct KvqDequantize {
    int32_t batch;
    int32_t pages;
    int32_t first_block;      // counted from the first page
    int32_t blocks;
    int32_t threads;          // to use at most
    int32_t pairs;            // RoPE pairs that are turned, P, 0 for none
    const KvqPage* page;      // [pages]
    const int32_t* pair;      // [P, 2], none twice
    const float* own_cosine;  // [heads, P] of the angle by which each pair was turned before it was coded, or null
    const float* own_sine;
    const float* cosine;      // [batch, 32 * blocks, P], of the tokens' positions
    const float* sine;
    float* out;               // [batch, heads, 32 * blocks, size], written
    float scaling;            // factor on turned coordinates
    int32_t unused;
};

// New tokens that are put behind an exact tail: keys first, values second.
struct KvqJoin {
    int32_t batch;
    int32_t heads;
    int32_t size[2];        // of a head
    int32_t bfloat;         // of the storage type: 1 for bfloat16, 0 for float16
    int32_t pairs;          // RoPE pairs that are undone, P, 0 for none
    int64_t held;           // tokens of the tail
    int64_t tokens;         // new ones
    const uint16_t* tail[2];   // [batch, heads, held, size], a head's tokens in a row
    int64_t tail_stride[2][2]; // numbers from a sequence and from a head to the next
    const float* x[2];         // [batch, heads, tokens, size], coordinates in a row
    int64_t stride[2][3];      // numbers from a sequence, a head and a token to the next
    const int32_t* pair;       // [P, 2], below width
    const float* cosine;       // [tokens, width] of each sequence, by coordinate, and
    const float* sine;         // its equal: what the keys are multiplied with
    int64_t angle_stride;      // numbers from a sequence to the next
    int64_t width;
    uint16_t* out[2];          // [batch, heads, held + tokens, size], written
};

// The scalar codec of one layer's keys or values: C = heads * size channels.
struct KvqScalar {
    int32_t heads;
    int32_t size;            // of a head
    int32_t level_count;
    int32_t bfloat;          // of the storage type
    int32_t token_scales;    // 1: thresholds are a token's, leaving out per_side elements at each end
    int32_t per_side;
    int32_t outlier_cap;     // most outliers of a token; 0 where there are none
    int32_t unused;
    const float* level;      // [level_count], sorted
    const float* boundary;   // [level_count - 1]
    const float* scale;      // [C]: of channels; with token_scales, what they are normalised by before, or null
    const float* zero_point; // [C]
    const float* inverse;    // [C], 1 / scale as rounded by the reference
};

// A block of one layer's keys or values that is coded and packed.
struct KvqBlock {
    const KvqTrellis* trellis;  // one of the two, and null for the other
    const KvqScalar* scalar;
    const uint8_t* width;       // [C], of each channel in bits
    const uint16_t* x;          // 32 tokens in the storage type: [batch, heads, 32, size], a head's numbers in a row
    int64_t stride[2];          // numbers from a sequence and from a head to the next
    int32_t* page;              // [batch, 8 * sum of widths], written at the block's place
    uint16_t* token;            // [batch, 256, 2], scales and zero points, likewise; null without token_scales
    uint16_t* index;            // [batch, 32 * outlier_cap], lists of each sequence's heads one after another; null
                                // where there are no outliers
    uint16_t* listed;           // likewise, their residuals
    int32_t* counts;            // [batch, heads], entries of each list
    int32_t bfloat;             // of the storage type
    int32_t status;             // written: KVQ_OK, or why the block's output must not be used
};

extern "C" {
// KVQ_ABI of the library.
KVQ_EXPORT int32_t kvq_abi();
// The instruction set it was compiled for.
KVQ_EXPORT const char* kvq_isa();
// Whether this processor has it: 1 or 0. Itself compiled for any processor.
KVQ_EXPORT int32_t kvq_runs_here();

// Code keys or values of `batch` sequences, in blocks of 32 tokens starting with the first.
//
//   x       head_dim numbers in a row for each sequence, head and token
//   stride  numbers from a sequence, a token and a head to the next
//   weight  [batch, tokens, H], finite and not negative, of the tokens' errors; null: by the classes of their sizes,
//           or all alike where there are none
//   threads to use at most; what is computed does not depend on it
//   codes   [batch, tokens, C], written
//   coded   [batch, tokens, C], what was coded in the last pass; may be null
KVQ_EXPORT int32_t kvq_encode_trellis(const KvqTrellis* codec, const float* x, const int64_t* stride,
                                      const float* weight, int64_t batch, int64_t tokens, int32_t threads,
                                      uint8_t* codes, float* coded);

// Find codes and outliers of keys or values of `batch` sequences, each token independently.
//
//   x, stride    as for kvq_encode_trellis
//   codes        [batch, tokens, C], written
//   token        [2, batch, tokens]: scales, then zero points, in the storage type; null without token_scales
//   outlier      [batch, tokens, C], 1 where there is one; null where there are none
//   residual     [batch, tokens, C] in the storage type, 0 elsewhere; null where there are none
KVQ_EXPORT int32_t kvq_encode_scalar(const KvqScalar* codec, const float* x, const int64_t* stride, int64_t batch,
                                     int64_t tokens, int32_t threads, uint8_t* codes, uint16_t* token,
                                     uint8_t* outlier, uint16_t* residual);

// Pack whole blocks of codes [batch, 32 * blocks, channels] into a page [batch, 8 * sum of widths], from block `first`
// on.
KVQ_EXPORT int32_t kvq_pack(const uint8_t* width, int64_t channels, const uint8_t* codes, int64_t batch, int32_t blocks,
                            int32_t first, int32_t* page);

// Lists of outliers of whole blocks, in order of block, sequence and head, sorted by token, then coordinate.
//
//   outlier, residual   [batch, 32 * blocks, heads * size], as kvq_encode_scalar writes them
//   counts              [blocks, batch, heads], written
//   index, listed       [entries], written; null: only count
KVQ_EXPORT int32_t kvq_list_outliers(const uint8_t* outlier, const uint16_t* residual, int64_t batch, int32_t blocks,
                                     int32_t heads, int32_t size, int32_t* counts, int64_t entries, uint16_t* index,
                                     uint16_t* listed);

// Code and pack `count` blocks of as many layers' keys or values, at block `place` of a page of each. Results equal
// those of the functions above, for any number of threads. If a number is not finite, the block's status says so. The
// result is KVQ_NOT_A_NUMBER then, and the other blocks can be used.
KVQ_EXPORT int32_t kvq_close_blocks(KvqBlock* blocks, int32_t count, int32_t batch, int32_t place, int32_t threads);

// The tail with new tokens appended. KVQ_NOT_A_NUMBER if one is not finite in the storage type.
KVQ_EXPORT int32_t kvq_join(const KvqJoin* call);

// Cosines and sines that rotate keys within a block, in the order in which this library reads tokens: [pairs, 64].
//
//   frequency  radians per token of each pair
KVQ_EXPORT int32_t kvq_turns_within(const double* frequency, int32_t pairs, float* within);

// Cosines and sines of blocks' first positions, [P, 2, 8] for each page; `position` [8 * pages].
KVQ_EXPORT int32_t kvq_turns_of_blocks(const double* frequency, int32_t pairs, const int32_t* position, int64_t pages,
                                       float* block);

// Keys or values of blocks.
KVQ_EXPORT int32_t kvq_dequantize(const KvqCodes* codes, const KvqDequantize* call);

// Attention over packed pages, sinks and tail. Results depend on the number of threads only by rounding, and are the
// same for the same number.
KVQ_EXPORT int32_t kvq_attend(const KvqCodes* key, const KvqCodes* value, const KvqAttention* call);

// The same for `count` calls of one layer, such as sequences of different lengths, with `threads` threads sharing the
// work.
KVQ_EXPORT int32_t kvq_attend_each(const KvqCodes* key, const KvqCodes* value, const KvqAttention* calls, int32_t count,
                                   int32_t threads);
}
