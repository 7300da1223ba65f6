// Keys or values of whole blocks as ordinary 16-bit or 32-bit tensors, for attention over many queries at once:
// decoded, outliers added, keys turned to their positions.
#include "channel_levels.cuh"

constexpr int kThreads = 128;

struct DequantizeParams {
    const PagePointers *pages;      // of the whole tensor
    const float *levels;            // of every channel, or null: they are computed
    const float *scale;             // [C] of the channels, or null
    const float *zero_point;        // [C]
    const float *coefficients;      // [C, 6] of computed levels, which have no scale and no zero point
    const uint8_t *bits;            // [C]
    const int *word_offset;         // [C], sum of the widths before
    const uint2 *angles;            // [H, D / 2] turns per token and at position 0, or null: no rotary embedding
    const uint32_t *pairs;          // [D / 2] coordinates, first | second << 16
    const int *positions;           // [B, 32 * blocks]
    void *out;                      // [B, H, 32 * blocks, D]
    float rope_scaling;             // on pairs that turn with the position
    int heads, head_dim, words;
    int first_block;
    int token, channel_normalized, storage_bfloat, paths;
    int type;                       // of out: 0 float16, 1 bfloat16, 2 float32
};

KVQ_DEVICE float stored(const DequantizeParams &p, uint16_t bits) { return float16_to_float(p.storage_bfloat, bits); }

// Grid: blocks, heads, sequences; 128 threads; 4 * 32 * D bytes of shared memory.
KVQ_KERNEL void __launch_bounds__(kThreads, 1) dequantize_blocks(const __grid_constant__ DequantizeParams p) {
    KVQ_SHARED;
    float *tile = reinterpret_cast<float *>(kvq_shared);
    const int head = blockIdx.y, row = blockIdx.z, block = p.first_block + blockIdx.x, place = block % kPageBlocks;
    const PagePointers &page = p.pages[block / kPageBlocks];
    const uint32_t *codes = page.codes + int64_t(row) * p.words;
    const uint16_t *params = page.token_params + (int64_t(row) * kPageTokens + place * kBlockTokens) * 2;

    for (int i = threadIdx.x; i < p.head_dim; i += kThreads) {
        const int channel = head * p.head_dim + i, bits = p.bits[channel];
        const uint32_t *unit = codes + kPageBlocks * p.word_offset[channel] + place * bits;
        uint32_t words[8], low[4], high[4];
        for (int w = 0; w < 8; ++w) words[w] = w < bits ? unit[w] : 0u;
        unpack_unit(words, bits, low, high);
        if (p.paths) trellis_index(low, high);
        float *column = tile + i;
        if (p.coefficients) {
            const ChannelLevels levels(p.coefficients, p.bits, channel, p.paths);
#pragma unroll
            for (int t = 0; t < kBlockTokens; ++t) column[t * p.head_dim] = levels.level(code_of(low, high, t));
            continue;
        }
#pragma unroll
        for (int t = 0; t < kBlockTokens; ++t) {
            const float scale = p.token ? stored(p, params[2 * t]) : p.scale[channel];
            const float zero_point = p.token ? stored(p, params[2 * t + 1]) : p.zero_point[channel];
            column[t * p.head_dim] = __fadd_rn(zero_point, __fmul_rn(scale, p.levels[code_of(low, high, t)]));
        }
    }
    __syncthreads();
    if (page.outlier_start) {
        const int list = (place * int(gridDim.z) + row) * p.heads + head, end = list_start(page, list + 1);
        for (int i = list_start(page, list) + int(threadIdx.x); i < end; i += kThreads) {
            const int index = page.outlier_index[i];
            tile[(index >> kCoordinateBits) * p.head_dim + (index & ((1 << kCoordinateBits) - 1))] +=
                stored(p, page.outlier_residual[i]);
        }
        __syncthreads();
    }
    const int tokens = gridDim.x * kBlockTokens;
    for (int i = threadIdx.x; i < kBlockTokens * p.head_dim / 2; i += kThreads) {
        const int t = i / (p.head_dim / 2), pair = i % (p.head_dim / 2);
        const int coordinate[2] = {int(p.pairs[pair] & 0xffffu), int(p.pairs[pair] >> 16)};
        float x[2];
        for (int j = 0; j < 2; ++j) {
            x[j] = tile[t * p.head_dim + coordinate[j]];
            const int channel = head * p.head_dim + coordinate[j];
            if (p.channel_normalized) x[j] = __fadd_rn(p.zero_point[channel], __fmul_rn(p.scale[channel], x[j]));
        }
        const int token = blockIdx.x * kBlockTokens + t;
        if (p.angles) {
            const uint2 angle = p.angles[head * (p.head_dim / 2) + pair];
            const float scaling = angle.x ? p.rope_scaling : 1.0f;
            float sine, cosine;
            exact_sincos(uint32_t(p.positions[int64_t(row) * tokens + token]) * angle.x + angle.y, &sine, &cosine);
            const float turned = (x[0] * cosine - x[1] * sine) * scaling;
            x[1] = (x[0] * sine + x[1] * cosine) * scaling;
            x[0] = turned;
        }
        const int64_t start = ((int64_t(row) * p.heads + head) * tokens + token) * p.head_dim;
        for (int j = 0; j < 2; ++j) {
            if (p.type == 2)
                static_cast<float *>(p.out)[start + coordinate[j]] = x[j];
            else
                static_cast<uint16_t *>(p.out)[start + coordinate[j]] =
                    p.type ? BFloat::from_float(x[j]) : Half::from_float(x[j]);
        }
    }
}
