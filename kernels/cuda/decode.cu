// Attention of one new token per sequence over the packed cache. One pass rotates keys, computes scores and an online
// softmax, sums values, and adds outliers. Thread blocks share the context, and the last one to finish joins the
// results. docs/reference/kernels.md explains the mapping of tokens and channels to lanes.
//
// Compile-time constants:
//   KVQ_HEAD_DIM         multiple of 16
//   KVQ_HEADS            4 or 8: query heads of a key-value head in a thread block, at most
//   KVQ_KEY_BITS, KVQ_VALUE_BITS    1 to 8: all channels have this width, and tables of levels; 0: each channel has
//                        its own width, and levels are computed
//   KVQ_KEY_PATHS, KVQ_VALUE_PATHS  with computed levels: codes follow a trellis
//   KVQ_OUTLIERS         keys or values may have outliers
#include "decode_exact.cuh"
#include "decode_softmax.cuh"

// ---- packed tokens -------------------------------------------------------------------------------------------

// Copies the tables of a head to shared memory.
KVQ_DEVICE void load_tables(const DecodeParams &p, Shared &s, int head) {
    Channel *key_channels = &s.key_channels[0].first;
    for (int i = threadIdx.x; i < kDim; i += kThreads) {
        key_channels[i] = p.key_channels[head * kDim + i];
        if (kValueComputed) s.value_channels[i] = p.value_channels[head * kDim + i];
        if (i < kDim / 2) s.key_angles[i] = p.key_angles[head * (kDim / 2) + i];
        if (!KVQ_OUTLIERS) continue;
        s.key_place[p.key_channels[head * kDim + i].coordinate] = uint16_t(i);
        if (i < kDim / 2) s.pair_scale[i] = p.key_pair_scale[head * (kDim / 2) + i].y;
    }
    if (threadIdx.x < 2) s.region[threadIdx.x] = (threadIdx.x ? p.value_region : p.key_region)[head];
    for (int i = threadIdx.x; i < kDim * kKeyRows; i += kThreads)
        s.key_levels[i] = p.key_levels[head * kDim * kKeyRows + i];
    for (int i = threadIdx.x; i < kDim * kValueRows; i += kThreads)
        s.value_levels[i] = p.value_levels[head * kDim * kValueRows + i];
    if (kKeyComputed && threadIdx.x < kKinds) s.key_kinds[threadIdx.x] = p.key_kinds[head * kKinds + threadIdx.x];
    if (kValueComputed && threadIdx.x < kKinds) s.value_kinds[threadIdx.x] = p.value_kinds[head * kKinds + threadIdx.x];
}

// The start of a head's plain table of levels. Other tables are in shared memory.
KVQ_DEVICE const uint4 *plain_levels(const uint4 *levels, int bits, int head) {
    return bits > 5 ? levels + ((int64_t(head) * kDim << bits) >> 3) : levels;
}

// Read anew where it is needed, which takes no register between pages.
KVQ_DEVICE int first_token(const DecodeParams &p) { return p.state ? __ldcg(&p.state->first_token) : p.first_token; }

KVQ_DEVICE void attend_packed(const DecodeParams &p, Shared &s, int head, int first_head, int heads) {
    const int row = blockIdx.z, group = lane_id() / 4;
    const uint16_t *query = p.query + (int64_t(row) * p.query_heads + first_head) * kDim;
    load_tables(p, s, head);
    __syncthreads();
    prepare_queries(p, s, query, heads, head);
    __syncthreads();

    OnlineSoftmax softmax(p, s);
    float *scores = s.scores[warp_id()];
    float4(*tiles)[kWarp] = s.tiles[warp_id()];
    for (int i = 0; i < kTiles; ++i) tiles[i][lane_id()] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const uint4 *key_levels = plain_levels(p.key_levels, KVQ_KEY_BITS, head);
    const uint4 *value_levels = plain_levels(p.value_levels, KVQ_VALUE_BITS, head);

    const int first_page = p.state ? first_token(p) / kPageTokens : p.first_page;
    const int pages = p.state ? max(p.state->pages - first_page, 0) : p.pages;
    const int begin = first_page + int(int64_t(pages) * blockIdx.x / p.packed_splits);
    const int end = first_page + int(int64_t(pages) * (blockIdx.x + 1) / p.packed_splits);
    for (int page = begin + warp_id(); page < end; page += kWarps) {
        const LaneBlock block(p, row, page, first_token(p));
        if (!__any_sync(kAll, block.keep != 0)) continue;
        prefetch_codes(p, s, true, row, page);
        const SequencePage keys(p, false, row, page);

        Scores score;
        score_page(s, key_levels, opaque(keys.codes), block.base, score);
        if (KVQ_OUTLIERS && keys.lists->outlier_start) {
            for (int i = lane_id(); i < kScores; i += kWarp) scores[i] = 0.0f;
            __syncwarp();
            score_outliers(p, s, *keys.lists, row, head, heads, block.base, scores);
            __syncwarp();
#pragma unroll
            for (int set = 0; set < kSets; ++set)
#pragma unroll
                for (int m = 0; m < 8; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        score[set][m][i] +=
                            scores[score_index(group, OnlineSoftmax::token(set, m, i / 2), lane_head(i % 2))];
            __syncwarp();
        }
        float rescale[2];
        softmax.scale_and_mask(score, block.keep, rescale);
        if (page + kWarps < end && __any_sync(kAll, LaneBlock(p, row, page + kWarps, first_token(p)).keep != 0))
            prefetch_codes(p, s, false, row, page + kWarps);
        const SequencePage values(p, true, row, page);
        softmax.weigh(p, score,
                      opaque(reinterpret_cast<const uint4 *>(values.token_params + group * kBlockTokens * 2)),
                      scores, rescale);
        Weights weights;
        softmax.operands(score, weights);
        mix_page(s, value_levels, opaque(values.codes), weights, rescale, tiles);
        if (KVQ_OUTLIERS && values.lists->outlier_start) {
            __syncwarp();
            mix_outliers(p, s, *values.lists, row, head, heads, scores, softmax.unit(), tiles);
        }
        __syncwarp();
    }

    __syncthreads();  // Shared::out overwrites the queries
    const int thread = thread_anew(), warp = thread / kWarp, lane = thread % kWarp;
    const int row_group = lane / 4, head_column = 2 * (lane % 4);
    const float undo = __uint_as_float(uint32_t(127 + softmax.exponent - kWeightExponent) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int step = kFold ? 2 : 4; step < kWarp; step *= 2) {
            softmax.sum[i] += __shfl_xor_sync(kAll, softmax.sum[i], step);
            softmax.offset[i] += __shfl_xor_sync(kAll, softmax.offset[i], step);
        }
        if (head_column + i >= kHeads) continue;
        if (row_group == 0) {
            s.maximum[warp][head_column + i] = softmax.maximum[i];
            s.sum[warp][head_column + i] = softmax.sum[i];
            s.offset[warp][head_column + i] = softmax.offset[i];
        }
        float *target = s.out + (warp * kHeads + head_column + i) * kDim;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const float4 out = s.tiles[warp][tile][lane];
            target[value_channel(s, 16 * tile + row_group).coordinate] = undo * (i ? out.y : out.x);
            target[value_channel(s, 16 * tile + 8 + row_group).coordinate] = undo * (i ? out.w : out.z);
        }
    }
    write_split(p, s, true);
}

// Grid: splits, key-value heads x subgroups of query heads, sequences. 128 threads, sizeof(Shared) bytes.
KVQ_KERNEL void __launch_bounds__(kThreads, kResidentBlocks) decode_attention(const __grid_constant__ DecodeParams p) {
    KVQ_SHARED;
    Shared &s = *reinterpret_cast<Shared *>(kvq_shared);
    const Share share(p, blockIdx.y);
    if (blockIdx.x < p.packed_splits)
        attend_packed(p, s, share.head, share.first, share.heads);
    else
        attend_exact(p, s, share.head, share.first, share.heads);
    join_splits(p, s);
}
