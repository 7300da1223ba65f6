// The mix of a page of values.
#pragma once

#include "computed_levels.cuh"
#include "decode_params.cuh"
#include "levels.cuh"

// Weights as matrix operands: [mm] are of tokens token_of(mm % 8, slot) of the first or second 16, of blocks
// 2 (lane % 4) and the next, of head lane / 4.
typedef uint32_t Weights[16][2];

// Sums of a tile of 16 channels: 16 tile + lane / 4 (0, 1) and 8 more (2, 3) of the channel order, for heads
// 2 (lane % 4) and the next. They are kept in shared memory, at two accesses per tile and page, because the number of
// registers limits the warps of a multiprocessor.
struct TileSums {
    float sum[4];

    KVQ_DEVICE TileSums(const float4 &before, const float (&rescale)[2])
        : sum{before.x * rescale[0], before.y * rescale[1], before.z * rescale[0], before.w * rescale[1]} {}
    KVQ_DEVICE float4 all() const { return make_float4(sum[0], sum[1], sum[2], sum[3]); }
};

// Adds pair i of a slice of eight tokens, of channels lane / 4 and 8 more: x are those of the first block,
// 2 (lane % 4), then of the next, as the rows of a matrix product.
KVQ_DEVICE void add_pair(float *sum, const Weights &weights, int slice, int i, const uint32_t (&x)[4]) {
    mma_16x8x16(sum, x[0], x[1], x[2], x[3], weights[4 * slice + i][0], weights[4 * slice + i][1]);
}

// ---- levels from tables --------------------------------------------------------------------------------------

template <int Bits>
KVQ_DEVICE void mix_tables(const Shared &s, const uint4 *levels, const uint32_t *codes, const Weights &weights,
                           const float (&rescale)[2], float4 (*tiles)[kWarp]) {
    typedef TableUnits<Bits, 2> Units;
    const int row = lane_id() / 4, block = 2 * (lane_id() % 4);
    Units next[2];
    auto load = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            next[i].load(codes, value_channel(s, 16 * tile + 8 * i + row), block);
    };
    load(0);
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
        typename Units::Decoded unit[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) unit[i] = next[i].decode(s.value_levels, levels, 16 * tile + 8 * i + row);
        if (tile + 1 < kTiles) load(tile + 1);
        TileSums sums(tiles[tile][lane_id()], rescale);
#pragma unroll
        for (int slice = 0; slice < 4; ++slice) {
            if (Units::kPlain) __syncwarp();  // keeps the compiler from fetching all levels at once
            uint32_t x[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) unit[i % 2].template eight<kNeighbours>(i / 2, slice, x[i]);
#pragma unroll
            for (int i = 0; i < 4; ++i) add_pair(sums.sum, weights, slice, i, {x[0][i], x[1][i], x[2][i], x[3][i]});
        }
        tiles[tile][lane_id()] = sums.all();
    }
}

// ---- levels that are computed --------------------------------------------------------------------------------

// Tiles whose first and second eight channels have these widths, from `tile` to `end`.
template <int First, int Second>
KVQ_DEVICE void mix_kind(const Shared &s, const uint32_t *codes, const Weights &weights, const float (&rescale)[2],
                         float4 (*tiles)[kWarp], int tile, int end) {
    constexpr bool kPaths = KVQ_VALUE_PATHS;
    if (First == 0 && Second == 0) return;  // all of these channels is in c0
    const int row = lane_id() / 4, block = 2 * (lane_id() % 4);
#pragma unroll 1
    for (; tile < end; ++tile) {
        const Channel channel[2] = {s.value_channels[16 * tile + row], s.value_channels[16 * tile + 8 + row]};
        ComputedUnits<First, 2, kPaths> first;
        ComputedUnits<Second, 2, kPaths> second;
        first.load(codes, channel[0], block);
        second.load(codes, channel[1], block);
        TileSums sums(tiles[tile][lane_id()], rescale);
        const ChannelNumbers own[2] = {numbers_of(s.value_levels, 16 * tile + row),
                                       numbers_of(s.value_levels, 16 * tile + 8 + row)};
        const decltype(first.levels(0, 0, own[0])) first_levels[2] = {first.levels(0, channel[0].bits, own[0]),
                                                                      first.levels(1, channel[0].bits, own[0])};
        const decltype(second.levels(0, 0, own[0])) second_levels[2] = {second.levels(0, channel[1].bits, own[1]),
                                                                        second.levels(1, channel[1].bits, own[1])};
#pragma unroll
        for (int slice = 0; slice < 4; ++slice) {
            uint32_t x[4][4];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                first_levels[u].eight(slice, x[2 * u]);
                second_levels[u].eight(slice, x[2 * u + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) add_pair(sums.sum, weights, slice, i, {x[0][i], x[1][i], x[2][i], x[3][i]});
        }
        tiles[tile][lane_id()] = sums.all();
    }
}

// The kinds of tiles in their order in memory, as score_kinds.
template <int Kind>
KVQ_DEVICE void mix_kinds(const Shared &, const uint32_t *, const Weights &, const float (&)[2], float4 (*)[kWarp],
                          int) {}

template <int Kind, int First, int Second, int... More>
KVQ_DEVICE void mix_kinds(const Shared &s, const uint32_t *codes, const Weights &weights, const float (&rescale)[2],
                          float4 (*tiles)[kWarp], int begin) {
    const int end = s.value_kinds[Kind];
    mix_kind<First, Second>(s, codes, weights, rescale, tiles, begin, end);
    mix_kinds<Kind + 1, More...>(s, codes, weights, rescale, tiles, end);
}

// Mixes the values of a page into `tiles`, after scaling what is there.
KVQ_DEVICE void mix_page(const Shared &s, const uint4 *levels, const uint32_t *codes, const Weights &weights,
                         const float (&rescale)[2], float4 (*tiles)[kWarp]) {
    if constexpr (kValueComputed)
        mix_kinds<0, KVQ_VALUE_KINDS>(s, codes, weights, rescale, tiles, 0);
    else
        mix_tables<KVQ_VALUE_BITS>(s, levels, codes, weights, rescale, tiles);
}

// ---- outliers ------------------------------------------------------------------------------------------------

// Adds probability times residual of outlying value elements to `tiles`, at the scale `unit` of the weights.
KVQ_DEVICE void mix_outliers(const DecodeParams &p, const Shared &s, const PagePointers &page, int row, int head,
                             int heads, const float *probabilities, float unit, float4 (*tiles)[kWarp]) {
    const OutlierRange range(p, page, row, head);
    const int block = lane_id() / 4;
    for (int i = range.begin; i < range.end; ++i) {
        const uint32_t index = __ldg(page.outlier_index + i);
        const float residual = unit * float16_to_float(p.storage_bfloat, __ldg(page.outlier_residual + i));
        const int place = index & ((1 << kCoordinateBits) - 1);  // only values with tables have outliers
        const float *probability = probabilities + score_index(block, index >> kCoordinateBits, 0);
        float *row_sums = reinterpret_cast<float *>(&tiles[place / 16][4 * (place % 8)]) + place / 8 % 2 * 2;
        for (int h = 0; h < heads; ++h) atomicAdd(row_sums + h / 2 * 4 + h % 2, probability[h] * residual);
    }
}
