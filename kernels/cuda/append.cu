// Quantizes whole blocks of new tokens into pages, keys and values in one launch: normalizes, codes and packs them, and
// collects outliers. The arithmetic is that of kvq_calib/codec, operation by operation: each is rounded to float32, and
// none is a fused multiply-add. So codes, token scales and residuals are equal bit for bit. When the host knows the
// number of outliers, `place_outliers` moves them to their final place. With computed levels there are no outliers and
// no thresholds.
#include "append_trellis.cuh"

struct Token {  // thresholds, and the cut if there are too many outliers
    float scale, reciprocal, zero_point;
    uint32_t cut;      // bits of |u|: elements above are kept,
    int last_channel;  // and equal ones up to this channel
};

// Shared memory: Token [32]; outliers per head and token [H, 32], or token weights [H, 32]; masks [32, H, chunks] of 32
// coordinates each.
struct Work {
    Token *token;
    int *count;
    float *token_weight;
    uint32_t *mask;
    int chunks;

    KVQ_DEVICE Work(void *memory, int heads, int head_dim) {
        token = static_cast<Token *>(memory);
        count = reinterpret_cast<int *>(token + kBlockTokens);
        token_weight = reinterpret_cast<float *>(count);  // there are no outliers with a trellis
        mask = reinterpret_cast<uint32_t *>(count + heads * (kBlockTokens + 1));
        chunks = (head_dim + kWarp - 1) / kWarp;
    }
};

// Bits of a float as an integer of the same order. -0 and 0 differ, which changes no threshold.
KVQ_DEVICE uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
KVQ_DEVICE float from_ordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The element of a token at place `rank`, with duplicates counted. 0 is the largest, or with `smallest` the smallest.
KVQ_DEVICE float ranked(const AppendSide &s, int64_t token, int heads, int head_dim, int rank, bool smallest) {
    uint32_t previous = kAll;
    int seen = 0;
    while (true) {
        uint32_t best = 0;
        int count = 0;
        for (int c = lane_id(); c < heads * head_dim; c += kWarp) {
            uint32_t key = ordered(element(s, token, c / head_dim, head_dim, c % head_dim));
            if (smallest) key = ~key;
            if (key >= previous) continue;
            if (key > best) best = key, count = 0;
            count += key == best;
        }
        const uint32_t top = __reduce_max_sync(kAll, best);
        seen += int(__reduce_add_sync(kAll, best == top ? count : 0));
        if (seen > rank || top == 0) return from_ordered(smallest ? ~top : top);
        previous = top;
    }
}

// Thresholds from the data: zero point and scale are the middle and half the range of the trimmed token. The first is
// rounded to the storage dtype, the second is rounded up.
KVQ_DEVICE void token_thresholds(const AppendSide &s, int64_t token, int heads, int head_dim, uint16_t *scale,
                                 uint16_t *zero_point) {
    const float high = ranked(s, token, heads, head_dim, s.per_side, false);
    const float low = ranked(s, token, heads, head_dim, s.per_side, true);
    *zero_point = to_storage(s, __fadd_rn(__fmul_rn(__fadd_rn(low, high), 0.5f), 0.0f));
    const float middle = from_storage(s, *zero_point);
    const float exact = __fadd_rn(fmaxf(__fsub_rn(high, middle), __fsub_rn(middle, low)), 0.0f);
    *scale = to_storage(s, exact);
    if (from_storage(s, *scale) < exact) ++*scale;  // the next number in storage: scales are not negative
}

struct Element {
    float distance, normalised;
    bool outlier;  // before the cap
};

KVQ_DEVICE Element examine(const Token &t, float y) {
    Element e;
    e.distance = __fsub_rn(y, t.zero_point);
    e.normalised = __fmul_rn(e.distance, t.reciprocal);
    e.outlier = fabsf(e.distance) > t.scale;
    return e;
}

KVQ_DEVICE Token of_channel(const AppendSide &s, Token t, int channel) {
    if (s.per_token) return t;
    t.scale = s.scale[channel], t.reciprocal = s.reciprocal[channel], t.zero_point = s.zero_point[channel];
    return t;
}

// Keeps the `cap` outliers with the largest |u|; of equal ones, those in lower channels. Finds the bits of the last one
// kept, from the top bit down, and the last channel kept among equal ones.
KVQ_DEVICE void cut_outliers(const AppendSide &s, int64_t token, int heads, int head_dim, Token *t) {
    const int channels = heads * head_dim;
    auto magnitude = [&](int c) {  // bits of |u| plus 1; 0 if not an outlier
        const Element e = examine(of_channel(s, *t, c), element(s, token, c / head_dim, head_dim, c % head_dim));
        return e.outlier ? (__float_as_uint(e.normalised) & 0x7fffffffu) + 1u : 0u;
    };
    auto count_from = [&](uint32_t least) {
        int count = 0;
        for (int c = lane_id(); c < channels; c += kWarp) count += magnitude(c) >= least;
        return int(__reduce_add_sync(kAll, unsigned(count)));
    };
    t->cut = 0;
    t->last_channel = channels;
    if (count_from(1u) <= s.cap) return;
    uint32_t cut = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1)
        if (count_from(cut | bit) >= s.cap) cut |= bit;
    int ties = s.cap - count_from(cut + 1u);
    t->cut = cut - 1u;
    for (int base = 0; base < channels; base += kWarp) {
        const int c = base + lane_id();
        const unsigned equal = __ballot_sync(kAll, c < channels && magnitude(c) == cut);
        if (__popc(equal) < ties) {
            ties -= __popc(equal);
            continue;
        }
        unsigned rest = equal;
        for (int i = 1; i < ties; ++i) rest &= rest - 1u;
        t->last_channel = base + __ffs(int(rest)) - 1;
        return;
    }
}

KVQ_DEVICE bool kept(const Token &t, const Element &e, int channel) {
    const uint32_t magnitude = __float_as_uint(e.normalised) & 0x7fffffffu;
    return e.outlier && (magnitude > t.cut || (magnitude == t.cut && channel <= t.last_channel));
}

// Number of boundaries below u.
KVQ_DEVICE int encode(const float *boundaries, int bits, float u) {
    int code = 0;
    for (int step = 1 << bits >> 1; step; step >>= 1)
        if (boundaries[code + step - 1] < u) code += step;
    return code;
}

// The codes of 32 tokens as nibbles: low bits and high bits.
template <class Code> KVQ_DEVICE void pack_codes(const Code &code, uint32_t *low, uint32_t *high) {
#pragma unroll
    for (int slice = 0; slice < 4; ++slice)
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            const uint32_t found = code(8 * slice + i);
            low[slice] |= (found & 15u) << (4 * i);
            high[slice] |= (found >> 4) << (4 * i);
        }
}

// Codes new block blockIdx.x of sequence blockIdx.y. `number` is its place, counted from the first page.
KVQ_DEVICE void code_block(const AppendParams &p, const AppendSide &s, uint4 *kvq_shared, int number) {
    const Work work(kvq_shared, p.heads, p.head_dim);
    const int block = blockIdx.x, row = blockIdx.y, lane = lane_id();
    const int place = number % kPageBlocks;
    const PagePointers &page = s.pages[number / kPageBlocks];
    const int64_t first = s.stride[0] * row + s.stride[2] * block * kBlockTokens;
    uint32_t *codes = page.codes + int64_t(row) * s.words;
    if (s.compensation) {
        if (warp_id() >= p.head_warps) return;
        const HeadWork own(kvq_shared, warp_id(), p.head_dim);
        for (int head = warp_id(); head < p.heads; head += p.head_warps)
            code_head(s, own, first, head, p.head_dim, codes, place);
        return;
    }

    for (int t = warp_id(); t < kBlockTokens; t += kWarps) {
        Token token;
        token.scale = token.reciprocal = token.zero_point = 0.0f;
        token.cut = 0;
        token.last_channel = p.heads * p.head_dim;
        const int64_t start = first + s.stride[2] * t;
        if (s.per_token) {
            uint16_t scale, zero_point;
            token_thresholds(s, start, p.heads, p.head_dim, &scale, &zero_point);
            token.scale = from_storage(s, scale);
            token.zero_point = from_storage(s, zero_point);
            token.reciprocal = token.scale > 0.0f ? __fdiv_rn(1.0f, token.scale) : 0.0f;
            if (lane < 2)
                page.token_params[(int64_t(row) * kPageTokens + place * kBlockTokens + t) * 2 + lane] =
                    lane ? zero_point : scale;
        }
        if (s.cap) cut_outliers(s, start, p.heads, p.head_dim, &token);
        if (lane == 0) work.token[t] = token;
    }
    if (s.token_weight)
        for (int i = threadIdx.x; i < p.heads * kBlockTokens; i += kThreads)
            work.token_weight[i] =
                token_weight_of(s, first + s.stride[2] * (i % kBlockTokens), i / kBlockTokens, p.head_dim);
    __syncthreads();

    // A warp takes 32 coordinates of a head, and each lane codes the 32 tokens of one.
    for (int task = warp_id(); task < p.heads * work.chunks; task += kWarps) {
        const int head = task / work.chunks, coordinate = task % work.chunks * kWarp + lane;
        const bool inside = coordinate < p.head_dim;
        const int channel = head * p.head_dim + (inside ? coordinate : 0), bits = s.bits[channel];
        auto y = [&](int t) {
            return element(s, first + s.stride[2] * t, head, p.head_dim, inside ? coordinate : 0);
        };
        uint32_t low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        if (s.coefficients) {
            if (!inside || bits == 0) continue;
            const ChannelLevels c(s.coefficients, s.bits, channel, s.paths);
            const float *weight = s.token_weight ? work.token_weight + head * kBlockTokens : nullptr;
            const float feedback = s.feedback ? s.feedback[head] : 0.0f;
            Path path = {0};
            if (s.paths) path = s.feedback ? shaped_path(c, y, feedback, weight) : best_path(c, y, weight);
            float error = 0.0f;
            auto code = [&](int t) {  // for all tokens in order
                if (!s.paths) return uint32_t(c.nearest(y(t)));
                float x = y(t);
                if (s.feedback) x = __fadd_rn(x, __fmul_rn(gain_of(feedback, weight, t), error));
                const int subset = path.subset(t), at = c.nearest(subset, x);
                error = __fsub_rn(x, c.level(kSubsets * at + subset));
                return uint32_t(at) << 1 | (path.free >> t & 1u);
            };
            pack_codes(code, low, high);
        } else {
            auto code = [&](int t) {
                const Token token = of_channel(s, work.token[t], channel);
                const Element e = examine(token, y(t));
                if (s.cap) {
                    const unsigned mask = __ballot_sync(kAll, inside && kept(token, e, channel));
                    if (lane == 0) work.mask[t * p.heads * work.chunks + task] = mask;
                }
                return uint32_t(encode(s.boundaries, bits, e.normalised));
            };
            pack_codes(code, low, high);
        }
        if (inside) store_unit(s, codes, channel, bits, place, low, high);
    }
    if (!s.cap) return;
    __syncthreads();

    // Where the outliers of each token and head begin: after those of earlier heads and tokens.
    for (int head = warp_id(); head < p.heads; head += kWarps) {
        int count = 0;
        for (int i = 0; i < work.chunks; ++i) count += __popc(work.mask[(lane * p.heads + head) * work.chunks + i]);
        int end = count;
        for (int step = 1; step < kWarp; step *= 2) {
            const int before = __shfl_up_sync(kAll, end, step);
            if (lane >= step) end += before;
        }
        work.count[head * (kBlockTokens + 1) + lane] = end - count;
        if (lane == kWarp - 1) {
            work.count[head * (kBlockTokens + 1) + kBlockTokens] = end;
            s.outlier_count[(int64_t(block) * gridDim.y + row) * p.heads + head] = end;
        }
    }
    __syncthreads();
    const int64_t list = (int64_t(block) * gridDim.y + row) * s.capacity;
    for (int task = warp_id(); task < p.heads * work.chunks; task += kWarps) {
        const int head = task / work.chunks, chunk = task % work.chunks, coordinate = chunk * kWarp + lane;
        const int channel = head * p.head_dim + (coordinate < p.head_dim ? coordinate : 0);
        int before = 0;
        for (int h = 0; h < head; ++h) before += work.count[h * (kBlockTokens + 1) + kBlockTokens];
        for (int t = 0; t < kBlockTokens; ++t) {
            const uint32_t *masks = work.mask + (t * p.heads + head) * work.chunks;
            if (!(masks[chunk] >> lane & 1u)) continue;
            int at = before + work.count[head * (kBlockTokens + 1) + t];
            for (int i = 0; i < chunk; ++i) at += __popc(masks[i]);
            at += __popc(masks[chunk] & ((1u << lane) - 1u));
            const Token token = of_channel(s, work.token[t], channel);
            const float y = element(s, first + s.stride[2] * t, head, p.head_dim, coordinate);
            const float level = s.levels[encode(s.boundaries, s.bits[channel], examine(token, y).normalised)];
            const float dense = __fadd_rn(token.zero_point, __fmul_rn(token.scale, level));
            s.outlier_index[list + at] = uint16_t(t << kCoordinateBits | coordinate);
            s.outlier_residual[list + at] = to_storage(s, __fsub_rn(y, dense));
        }
    }
}

// Appends the new token of a sequence to its exact tokens, in the storage dtype.
KVQ_DEVICE void store_token(const AppendParams &p, const AppendSide &s) {
    const int row = blockIdx.y;
    uint16_t *exact = static_cast<uint16_t *>(const_cast<void *>(s.x));
    exact += s.stride[0] * row + s.stride[2] * p.state->place;
    const uint16_t infinite = s.storage_bfloat ? 0x7f80 : 0x7c00;
    for (int i = threadIdx.x; i < p.heads * p.head_dim; i += kThreads) {
        const int head = i / p.head_dim, coordinate = i % p.head_dim;
        const int64_t from = s.token_stride[0] * row + s.token_stride[1] * head + coordinate;
        const uint16_t bits = to_storage(s, load_number(s.token, s.token_type, from));
        if ((bits & infinite) == infinite) p.state->not_finite = 1;
        exact[s.stride[1] * head + coordinate] = bits;
    }
}

// Moves the exact tokens behind a closed block to where the block's tokens were. Threads share no coordinates, and each
// has those that it has in store_token.
KVQ_DEVICE void move_tail(const AppendParams &p, const AppendSide &s) {
    uint16_t *exact = static_cast<uint16_t *>(const_cast<void *>(s.x)) + s.stride[0] * blockIdx.y;
    for (int i = threadIdx.x; i < p.heads * p.head_dim; i += kThreads) {
        uint16_t *own = exact + s.stride[1] * (i / p.head_dim) + i % p.head_dim;
        for (int t = 0; t < p.tail; ++t) own[s.stride[2] * t] = own[s.stride[2] * (t + kBlockTokens)];
    }
}

// Grid: new blocks, sequences, 2 (keys, values). 512 threads. Shared memory: the bytes of Work, or of HeadWork for
// head_warps warps if that is more. With a state, there is one new block or none, and a new token after it.
KVQ_KERNEL void __launch_bounds__(kThreads, 1) append_blocks(const __grid_constant__ AppendParams p) {
    KVQ_SHARED;
    const AppendSide &s = p.side[blockIdx.z];
    if (!p.state) {
        code_block(p, s, kvq_shared, p.first_block + int(blockIdx.x));
        return;
    }
    if (p.state->closes) {
        code_block(p, s, kvq_shared, p.state->blocks - 1);
        __syncthreads();
        move_tail(p, s);
    }
    store_token(p, s);
}

struct PlaceSide {
    const uint16_t *index, *residual;  // work space of append_blocks; null: no outliers
    const int *count;                  // [blocks, B, H]
    const PagePointers *pages;         // which have room for all entries
    int capacity, padding;
};

struct PlaceParams {
    PlaceSide side[2];
    const StepState *state;  // as in AppendParams
    int heads, blocks, first_block, batch;
};

// The sum of `value` over the threads before this one. `all` is the sum over the thread block. `of_warps` has kWarps
// words.
KVQ_DEVICE int sum_before(int value, int *of_warps, int &all) {
    int end = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(kAll, end, step);
        if (lane_id() >= step) end += before;
    }
    if (lane_id() == kWarp - 1) of_warps[warp_id()] = end;
    __syncthreads();
    int before = end - value;
    all = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < warp_id()) before += of_warps[warp];
        all += of_warps[warp];
    }
    __syncthreads();
    return before;
}

// Moves the outliers of the new blocks of one page. `block` is the first of these blocks, and `from` its place in the
// page.
template <typename Start>
KVQ_DEVICE void place_outliers_of(const PlaceParams &p, const PlaceSide &s, const PagePointers &page, int from,
                                  int block, int *of_warps) {
    const int rows = min(kPageBlocks - from, p.blocks - block) * p.batch, lists = rows * p.heads;
    const int *count = s.count + int64_t(block) * p.batch * p.heads;
    Start *start = static_cast<Start *>(const_cast<void *>(page.outlier_start)) + from * p.batch * p.heads;
    int total = from ? int(start[0]) : 0;
    for (int base = 0; base < lists; base += kThreads) {
        const int list = base + int(threadIdx.x);
        int all;
        const int before = sum_before(list < lists ? count[list] : 0, of_warps, all);
        if (list < lists) start[list] = Start(total + before);
        total += all;
    }
    const int end = (kPageBlocks - from) * p.batch * p.heads;
    for (int list = lists + int(threadIdx.x); list <= end; list += kThreads) start[list] = Start(total);
    __syncthreads();
    uint16_t *index = const_cast<uint16_t *>(page.outlier_index);
    uint16_t *residual = const_cast<uint16_t *>(page.outlier_residual);
    for (int row = warp_id(); row < rows; row += kWarps) {
        const int64_t source = (int64_t(block) * p.batch + row) * s.capacity;
        const int first = start[row * p.heads], entries = int(start[(row + 1) * p.heads]) - first;
        for (int i = lane_id(); i < entries; i += kWarp) {
            index[first + i] = s.index[source + i];
            residual[first + i] = s.residual[source + i];
        }
    }
}

// Grid: pages with new blocks, 2 (keys, values). 512 threads, 64 bytes of shared memory. Writes the entries, and where
// the lists of new blocks and of blocks still to come start.
KVQ_KERNEL void __launch_bounds__(kThreads, 1) place_outliers(const __grid_constant__ PlaceParams p) {
    KVQ_SHARED;
    int *of_warps = reinterpret_cast<int *>(kvq_shared);
    const PlaceSide &s = p.side[blockIdx.y];
    if (!s.index || (p.state && !p.state->closes)) return;
    const int first = p.state ? p.state->blocks - 1 : p.first_block;  // new block
    const int number = p.state ? first / kPageBlocks : int(blockIdx.x);
    const int from = max(first - number * kPageBlocks, 0), block = number * kPageBlocks + from - first;
    const PagePointers &page = s.pages[number];
    if (page.start_bytes == 2)
        place_outliers_of<uint16_t>(p, s, page, from, block, of_warps);
    else
        place_outliers_of<int>(p, s, page, from, block, of_warps);
}
