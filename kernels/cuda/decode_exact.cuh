// Attention to exact tokens, what the warps of a thread block found as one partial result, and all of these as one.
#pragma once

#include "decode_params.cuh"

// Combines what the warps of a block found and writes it as one split. Packed values are still to be scaled.
KVQ_DEVICE void write_split(const DecodeParams &p, Shared &s, bool packed) {
    __syncthreads();
    const Share share(p, block_y_anew());
    const float2 *affine = p.value_affine + share.head * kDim;
    const int row = blockIdx.z;
    for (int i = thread_anew(); i < share.heads * kDim; i += kThreads) {
        const int h = i / kDim, coordinate = i % kDim;
        float maximum = kMinusInfinity, sum = 0.0f, offset = 0.0f, mixed = 0.0f;
        for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, s.maximum[w][h]);
        for (int w = 0; w < kWarps; ++w) {
            if (s.sum[w][h] == 0.0f) continue;  // saw nothing; a NaN goes on to the result
            const float weight = power_of_two(s.maximum[w][h] - maximum);
            sum += weight * s.sum[w][h];
            offset += weight * s.offset[w][h];
            mixed += weight * s.out[(w * kHeads + h) * kDim + coordinate];
        }
        const float2 channel = packed ? affine[coordinate] : make_float2(1.0f, 0.0f);
        const int64_t split = (int64_t(row) * p.query_heads + share.first + h) * p.splits + blockIdx.x;
        p.partial[split * kDim + coordinate] = channel.y * sum + channel.x * (offset + mixed);
        if (coordinate == 0) p.partial_sum[split] = make_float2(maximum, sum);
    }
}

// Joins the splits of a query head, a warp for each.
KVQ_DEVICE void join_head(const DecodeParams &p, int64_t head, float own) {
    const float2 *sums = p.partial_sum + head * p.splits;
    float maximum = own, sum = 0.0f;
    for (int i = lane_id(); i < p.splits; i += kWarp) maximum = fmaxf(maximum, __ldcg(sums + i).x);
    for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAll, maximum, step));
    auto weight_of = [&](int i, float2 &found) {
        found = i < p.splits ? __ldcg(sums + i) : make_float2(0.0f, 0.0f);
        return found.y == 0.0f ? 0.0f : power_of_two(found.x - maximum);
    };
    float2 found;
    for (int i = lane_id(); i < p.splits; i += kWarp) {
        const float weight = weight_of(i, found);
        sum += weight * found.y;
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (own > kMinusInfinity) sum += power_of_two(own - maximum);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int base = 0; base < kDim; base += 4 * kWarp) {
        const int coordinate = base + 4 * lane_id();
        const bool inside = coordinate < kDim;
        const float4 *column = reinterpret_cast<const float4 *>(p.partial + head * p.splits * kDim + coordinate);
        float4 mixed = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int first = 0; first < p.splits; first += kWarp) {
            const float own_weight = weight_of(first + lane_id(), found);
            const int count = min(kWarp, p.splits - first);
#pragma unroll 8
            for (int i = 0; i < count; ++i) {
                const float weight = __shfl_sync(kAll, own_weight, i);
                if (!inside || weight == 0.0f) continue;
                const float4 part = __ldcg(column + int64_t(first + i) * (kDim / 4));
                mixed.x += weight * part.x, mixed.y += weight * part.y;
                mixed.z += weight * part.z, mixed.w += weight * part.w;
            }
        }
        if (!inside) continue;
        uint16_t *out = p.out + head * kDim + coordinate;
        const float found[4] = {mixed.x * inverse, mixed.y * inverse, mixed.z * inverse, mixed.w * inverse};
        for (int i = 0; i < 4; ++i)
            out[i] = p.query_bfloat ? BFloat::from_float(found[i]) : Half::from_float(found[i]);
    }
}

// The last thread block of a share of heads to arrive joins what all of them found.
KVQ_DEVICE void join_splits(const DecodeParams &p, Shared &s) {
    __threadfence();
    __syncthreads();
    const int row = blockIdx.z, number = block_y_anew();
    if (thread_anew() == 0) {
        int *arrived = p.arrived + row * int(gridDim.y) + number;
        s.last = atomicAdd(arrived, 1) == p.splits - 1;
        if (s.last) *arrived = 0;
    }
    __syncthreads();
    if (!s.last) return;
    __threadfence();
    const Share share(p, number);
    for (int h = warp_id(); h < share.heads; h += kWarps) {
        const float own = p.sink_logits ? p.sink_logits[share.first + h] * kLog2e : kMinusInfinity;
        join_head(p, int64_t(row) * p.query_heads + share.first + h, own);
    }
}

// Sinks and tail: 16-bit keys and values, a token at a time per warp.
KVQ_DEVICE void attend_exact(const DecodeParams &p, Shared &s, int head, int first_head, int heads) {
    constexpr int kOwn = (kDim + kWarp - 1) / kWarp;
    constexpr int kPairs = (kDim / 2 + kWarp - 1) / kWarp;
    const int row = blockIdx.z, lane = lane_id();
    const int count = p.exact_count[0] + p.exact_count[1];
    const uint16_t *query = p.query + (int64_t(row) * p.query_heads + first_head) * kDim;
    for (int i = threadIdx.x; i < heads * kDim; i += kThreads)
        s.plain_query[i] = p.scaling * float16_to_float(p.query_bfloat, query[i]);
    __syncthreads();
    const int parts = p.splits - p.packed_splits, part = blockIdx.x - p.packed_splits;
    const int begin = int(int64_t(count) * part / parts), end = int(int64_t(count) * (part + 1) / parts);
    float out[kHeads][kOwn], maximum[kHeads], sum[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        maximum[h] = kMinusInfinity, sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) out[h][i] = 0.0f;
    }
    for (int token = begin + warp_id(); token < end; token += kWarps) {
        const int position = __ldg(p.exact_positions + int64_t(row) * count + token);
        if (position == kMasked) continue;
        const int side = token >= p.exact_count[0];
        const int64_t place = p.exact_stride[side][0] * row + p.exact_stride[side][1] * head +
                              int64_t(side ? token - p.exact_count[0] : token) * kDim;
        const uint16_t *key = p.exact_key[side], *value = p.exact_value[side];
        if (p.pool_table) {
            key = p.pool_exact[4 * row + side];
            value = p.pool_exact[4 * row + 2 + side];
        }
        float score[kHeads];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) score[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int pair = i * kWarp + lane;
            if (pair >= kDim / 2) continue;
            const int first = __ldg(p.exact_pairs + pair) & 0xffffu, second = __ldg(p.exact_pairs + pair) >> 16;
            float a = float16_to_float(p.storage_bfloat, key[place + first]);
            float b = float16_to_float(p.storage_bfloat, key[place + second]);
            const uint32_t frequency = __ldg(p.exact_angles + pair);
            if (p.key_rope && frequency) {
                float sine, cosine;
                exact_sincos(uint32_t(position) * frequency, &sine, &cosine);
                const float turned = (a * cosine - b * sine) * p.rope_scaling;
                b = (a * sine + b * cosine) * p.rope_scaling;
                a = turned;
            }
#pragma unroll
            for (int h = 0; h < kHeads; ++h)
                if (h < heads) score[h] += a * s.plain_query[h * kDim + first] + b * s.plain_query[h * kDim + second];
        }
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            if (h >= heads) break;
            for (int step = 16; step; step /= 2) score[h] += __shfl_xor_sync(kAll, score[h], step);
            if (p.softcap != 0.0f) score[h] = p.softcap * soft_limit(score[h] / p.softcap);
            const float x = score[h] * kLog2e, top = fmaxf(maximum[h], x);
            const float rescale = power_of_two(maximum[h] - top), probability = power_of_two(x - top);
            maximum[h] = top;
            sum[h] = sum[h] * rescale + probability;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int coordinate = i * kWarp + lane;
                if (coordinate >= kDim) continue;
                const float x = float16_to_float(p.storage_bfloat, value[place + coordinate]);
                out[h][i] = out[h][i] * rescale + probability * x;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) break;
        if (lane == 0) {
            s.maximum[warp_id()][h] = maximum[h];
            s.sum[warp_id()][h] = sum[h];
            s.offset[warp_id()][h] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (i * kWarp + lane < kDim) s.out[(warp_id() * kHeads + h) * kDim + i * kWarp + lane] = out[h][i];
    }
    write_split(p, s, false);
}
