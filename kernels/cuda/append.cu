// Quantizes whole blocks of new tokens into pages: normalise, code, pack, collect outliers; keys and values in one
// launch. The arithmetic is that of kvq_calib/codec, operation by operation: separately rounded float32, no fused
// multiply-add, so codes, token scales and residuals agree bit for bit. Then `place_outliers` moves the outliers to
// where they stay, once the host knows how many there are. Where errors are compensated, or codes follow a trellis
// (kvq_calib/codec/trellis.py), there are no outliers and thresholds are the channels'.
#include "common.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

enum ElementType { kHalf = 0, kBFloat = 1, kFloat = 2 };

// Keys or values of one layer.
struct AppendSide {
    const void *x;               // [B, H, T, D], T = 32 * blocks, elements of `type`; innermost stride 1
    const PagePointers *pages;   // pages of the new blocks; the first may be partly filled
    const float *cosine;         // [H, P] of the angles by which pairs are turned before quantization, or null
    const float *sine;
    const uint32_t *partner;     // [D]: partner | pair << 16, bit 15: the second of its pair; 0xffffffff: none
    const float *scale;          // [C] of the channels, or null
    const float *reciprocal;     // [C], 1 / scale
    const float *zero_point;     // [C]
    const float *levels;         // [C or 1, levels]
    const float *boundaries;     // [C or 1, boundary_count]: between neighbours; with a trellis between l and l + 4
    const uint8_t *bits;         // [C]
    const int *word_offset;      // [C], sum of the widths before
    const float *compensation;   // [H, D, D], shares of the errors of the coordinates before, or null: none
    const float *refinement;     // [H, D, D], shares of the errors of all others in a refinement pass, or null: none
    const float *token_weight;   // [H, 32] of a token by the class of its size, or null: all count alike
    const float *weight_edge;    // [H, 31]
    uint16_t *outlier_index;     // [blocks, B, capacity] work space, or null
    uint16_t *outlier_residual;
    int *outlier_count;          // [blocks, B, H]
    int64_t stride[3];           // elements per sequence, head, token
    int type, words;             // words of a sequence in a page
    int level_count, level_stride;
    int token, channel_normalized;
    int per_side;                // elements trimmed at each end of a token
    int cap;                     // outliers kept per token; 0: none are stored
    int capacity;                // 32 * cap
    int storage_bfloat;
    int trellis, boundary_count;
    int refinements;             // refinement passes: times that coordinates are coded again
};

struct AppendParams {
    AppendSide side[2];
    int batch, heads, head_dim, first_block;  // first_block: place of the first new block in its page
    int head_warps;                           // heads coded side by side where errors are compensated
};

struct Token {  // thresholds and, where outliers are too many, the cut
    float scale, reciprocal, zero_point;
    uint32_t cut;      // bits of |u|: what is above is kept,
    int last_channel;  // and what is equal up to this channel
};

// Shared memory: Token [32], counts [H, 32] of a head's outliers per token, or weights [H, 32] of its tokens, then
// masks [32, H, chunks] of 32 coordinates each.
struct Work {
    Token *token;
    int *count;
    float *token_weight;
    uint32_t *mask;
    int chunks;

    KVQ_DEVICE Work(void *memory, int heads, int head_dim) {
        token = static_cast<Token *>(memory);
        count = reinterpret_cast<int *>(token + kBlockTokens);
        token_weight = reinterpret_cast<float *>(count);  // a trellis has no outliers
        mask = reinterpret_cast<uint32_t *>(count + heads * (kBlockTokens + 1));
        chunks = (head_dim + kWarp - 1) / kWarp;
    }
};

KVQ_DEVICE float load_element(const AppendSide &s, int64_t place) {
    if (s.type == kFloat) return static_cast<const float *>(s.x)[place];
    const uint16_t bits = static_cast<const uint16_t *>(s.x)[place];
    return s.type == kHalf ? Half::to_float(bits) : BFloat::to_float(bits);
}

KVQ_DEVICE float from_storage(const AppendSide &s, uint16_t bits) {
    return s.storage_bfloat ? BFloat::to_float(bits) : Half::to_float(bits);
}

KVQ_DEVICE uint16_t to_storage(const AppendSide &s, float x) {
    return s.storage_bfloat ? BFloat::from_float(x) : Half::from_float(x);
}

// Element (head, coordinate) of a token as it is to be quantized: turned with its partner, normalised by its channel.
KVQ_DEVICE float element(const AppendSide &s, int64_t token, int head, int head_dim, int coordinate) {
    const int64_t row = token + s.stride[1] * head;
    float y = load_element(s, row + coordinate);
    if (s.cosine) {
        const uint32_t pair = s.partner[coordinate];
        if (pair != 0xffffffffu) {
            const float other = load_element(s, row + (pair & 0x7fffu));
            const int pairs = int(s.partner[head_dim]);
            const float c = s.cosine[head * pairs + (pair >> 16)], sn = s.sine[head * pairs + (pair >> 16)];
            y = pair & 0x8000u ? __fadd_rn(__fmul_rn(sn, other), __fmul_rn(c, y))
                               : __fsub_rn(__fmul_rn(c, y), __fmul_rn(sn, other));
        }
    }
    if (s.channel_normalized) {
        const int c = head * head_dim + coordinate;
        y = __fmul_rn(__fsub_rn(y, s.zero_point[c]), s.reciprocal[c]);
    }
    return y;
}

// Order-preserving bits of a float: -0 and 0 are told apart, which changes no threshold.
KVQ_DEVICE uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
KVQ_DEVICE float from_ordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The element of rank `rank` (0: the largest, or the smallest with `smallest`) of a token, duplicates counted.
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

// Thresholds from the data: the middle of what is left after trimming, rounded to storage; the distance, rounded up.
KVQ_DEVICE void token_thresholds(const AppendSide &s, int64_t token, int heads, int head_dim, uint16_t *scale,
                                 uint16_t *zero_point) {
    const float high = ranked(s, token, heads, head_dim, s.per_side, false);
    const float low = ranked(s, token, heads, head_dim, s.per_side, true);
    *zero_point = to_storage(s, __fmul_rn(__fadd_rn(low, high), 0.5f));
    const float middle = from_storage(s, *zero_point);
    const float exact = fmaxf(__fsub_rn(high, middle), __fsub_rn(middle, low));
    *scale = to_storage(s, exact);
    if (from_storage(s, *scale) < exact) ++*scale;  // the next storage number: scales are not negative
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
    if (!s.token) t.scale = s.scale[channel], t.reciprocal = s.reciprocal[channel], t.zero_point = s.zero_point[channel];
    return t;
}

// Keeps the `cap` outliers of largest |u|, ties to the lower channel: finds the bits of the last one kept, from the
// top bit down, and the channel of the last tie.
KVQ_DEVICE void cut_outliers(const AppendSide &s, int64_t token, int heads, int head_dim, Token *t) {
    const int channels = heads * head_dim;
    auto magnitude = [&](int c) {  // bits of |u| plus 1, 0 where there is no outlier
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

// Packs the codes of a channel's block into its unit.
KVQ_DEVICE void store_unit(const AppendSide &s, uint32_t *codes, int channel, int bits, int place, const uint32_t *low,
                           const uint32_t *high) {
    uint32_t words[8];
    pack_unit(low, high, bits, words);
    uint32_t *target = codes + kPageBlocks * s.word_offset[channel] + place * bits;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < bits) target[i] = words[i];
}

// ---- trellis -------------------------------------------------------------------------------------------------

constexpr int kSubsets = 4;
constexpr int kSizeClasses = 32;
constexpr float kInfinity = __builtin_huge_valf();

// Levels and thresholds of one channel. Subset s of a trellis is levels s, s + 4, s + 8, ...
struct ChannelLevels {
    const float *levels, *boundaries;
    int bits;
    float scale, reciprocal, zero_point;

    KVQ_DEVICE ChannelLevels(const AppendSide &s, int channel) {
        levels = s.levels + int64_t(channel) * s.level_stride * s.level_count;
        boundaries = s.boundaries + int64_t(channel) * s.level_stride * s.boundary_count;
        bits = s.bits[channel];
        scale = s.scale[channel], reciprocal = s.reciprocal[channel], zero_point = s.zero_point[channel];
    }

    KVQ_DEVICE float normalised(float y) const { return __fmul_rn(__fsub_rn(y, zero_point), reciprocal); }

    // Place in a subset of the level nearest to u; of width 1 to 7.
    KVQ_DEVICE int nearest(int subset, float u) const {
        int place = 0;
        for (int step = 1 << bits >> 2; step; step >>= 1)
            if (boundaries[kSubsets * (place + step - 1) + subset] < u) place += step;
        return place;
    }

    KVQ_DEVICE float squared_distance(int subset, int place, float u) const {
        const float distance = __fsub_rn(u, levels[kSubsets * place + subset]);
        return __fmul_rn(distance, distance);
    }
};

// What errors of a head's token count in the choice of a path.
KVQ_DEVICE float token_weight_of(const AppendSide &s, int64_t token, int head, int head_dim) {
    float size = 0.0f;
    for (int i = 0; i < head_dim; ++i) {
        const float y = element(s, token, head, head_dim, i);
        size = __fadd_rn(size, __fmul_rn(y, y));
    }
    const float *edge = s.weight_edge + head * (kSizeClasses - 1);
    int place = 0;
    for (int i = 0; i < kSizeClasses - 1; ++i) place += edge[i] < size;
    return s.token_weight[head * kSizeClasses + place];
}

// The lowest bits of the codes of a block, bit t for token t, and the subsets they lead through.
struct Path {
    uint32_t free;

    KVQ_DEVICE int subset(int t) const {
        return int(((free ^ free << 2) >> t & 1u) << 1 | (free << 1 >> t & 1u));
    }
};

// Inputs of the two tokens that lead into state `after`, as bits.
KVQ_DEVICE uint32_t inputs_of(int after) { return uint32_t(after >> 1 | (after & 1) << 1); }

// The path of least squared error of one channel, its 32 elements given by `u`, each weighted by its `token_weight`
// unless that is null. Two tokens lead from any state to any other in one way; a state is the lowest bit of the newest
// code, plus 2 times that of the one before.
template <class Element>
KVQ_DEVICE Path best_path(const ChannelLevels &c, const Element &u, const float *token_weight) {
    float cost[4] = {0.0f, kInfinity, kInfinity, kInfinity};
    uint32_t path[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int t = 0; t < kBlockTokens; t += 2) {
        float distance[2][kSubsets];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float x = u(t + i);
#pragma unroll
            for (int s = 0; s < kSubsets; ++s) {
                distance[i][s] = c.squared_distance(s, c.nearest(s, x), x);
                if (token_weight) distance[i][s] = __fmul_rn(distance[i][s], token_weight[t + i]);
            }
        }
        float next[4];
        uint32_t from[4];
#pragma unroll
        for (int after = 0; after < 4; ++after) {
            const int now = after & 1, between = after >> 1;
#pragma unroll
            for (int before = 0; before < 4; ++before) {  // ties go to the lower one
                const int last = before & 1, long_ago = before >> 1;
                const float pair = __fadd_rn(distance[0][2 * (between ^ long_ago) + last],
                                             distance[1][2 * (now ^ last) + between]);
                const float sum = __fadd_rn(pair, cost[before]);
                if (before == 0 || sum < next[after]) next[after] = sum, from[after] = path[before];
            }
        }
#pragma unroll
        for (int after = 0; after < 4; ++after) {
            cost[after] = next[after];
            path[after] = from[after] | inputs_of(after) << t;
        }
    }
    Path best = {path[0]};
    float least = cost[0];
#pragma unroll
    for (int state = 1; state < 4; ++state)
        if (cost[state] < least) least = cost[state], best.free = path[state];
    return best;
}

// The same for one channel by a warp, from the (weighted) squared distances [32, 4] of its tokens in shared memory: a
// lane follows the state lane % 4.
KVQ_DEVICE Path best_path(const float *distance) {
    const int after = lane_id() % 4, now = after & 1, between = after >> 1;
    const int first[2] = {2 * between, 2 * (between ^ 1)}, second[2] = {2 * now + between, 2 * (now ^ 1) + between};
    float cost = after ? kInfinity : 0.0f;
    uint32_t path = 0;
#pragma unroll 4
    for (int t = 0; t < kBlockTokens; t += 2) {
        const float *d = distance + kSubsets * t;
        float least = 0.0f;
        int from = 0;
#pragma unroll
        for (int before = 0; before < 4; ++before) {
            const float pair =
                __fadd_rn(d[first[before / 2] + before % 2], d[kSubsets + second[before % 2]]);
            const float sum = __fadd_rn(pair, __shfl_sync(kAll, cost, before));
            if (before == 0 || sum < least) least = sum, from = before;
        }
        path = __shfl_sync(kAll, path, from) | inputs_of(after) << t;
        cost = least;
    }
    int best = 0;
    float least = __shfl_sync(kAll, cost, 0);
    for (int state = 1; state < 4; ++state) {
        const float other = __shfl_sync(kAll, cost, state);
        if (other < least) least = other, best = state;
    }
    return Path{__shfl_sync(kAll, path, best)};
}

// ---- error compensation --------------------------------------------------------------------------------------

// Shared memory of one warp that codes a head with error compensation.
struct HeadWork {
    float *error;     // [D, 32] of the coordinates coded
    float *weight;    // [D] of the coordinate at hand
    float *distance;  // [32, 4] of its tokens
    uint8_t *code;    // [32, 36]: codes of 32 coordinates, a row each

    static constexpr int kRow = kBlockTokens + 4;  // against bank conflicts

    static KVQ_DEVICE int words(int head_dim) {
        return head_dim * (kBlockTokens + 1) + kBlockTokens * kSubsets + kWarp * kRow / 4;
    }

    KVQ_DEVICE HeadWork(void *memory, int warp, int head_dim) {
        distance = static_cast<float *>(memory) + warp * words(head_dim);
        error = distance + kBlockTokens * kSubsets;
        weight = error + head_dim * kBlockTokens;
        code = reinterpret_cast<uint8_t *>(weight + head_dim);
    }
};

// Codes a block of one head, coordinate by coordinate: a lane is a token. What is coded is the element plus its share
// of the errors of the coordinates before it, summed in their order; in a refinement pass, before these, its share of
// the errors that those after it were left with.
KVQ_DEVICE void code_head(const AppendSide &s, const HeadWork &work, int64_t first, int head, int head_dim,
                          uint32_t *codes, int place) {
    const int lane = lane_id();
    const int64_t token = first + s.stride[2] * lane;
    const float token_weight = s.token_weight ? token_weight_of(s, token, head, head_dim) : 1.0f;
    for (int pass = 0; pass <= s.refinements; ++pass) {
        const float *share = (pass ? s.refinement : s.compensation) + int64_t(head) * head_dim * head_dim;
        for (int i = 0; i < head_dim; ++i) {
            const ChannelLevels c(s, head * head_dim + i);
            for (int j = lane; j < (pass ? head_dim : i); j += kWarp) work.weight[j] = share[i * head_dim + j];
            const float exact = element(s, token, head, head_dim, i);
            __syncwarp();
            auto product = [&](int j) { return __fmul_rn(work.weight[j], work.error[j * kBlockTokens + lane]); };
            float target = exact;
            if (pass) {
                float later = 0.0f;
#pragma unroll 8
                for (int j = i + 1; j < head_dim; ++j) later = __fadd_rn(later, product(j));
                target = __fadd_rn(exact, later);
            }
#pragma unroll 8
            for (int j = 0; j < i; ++j) target = __fadd_rn(target, product(j));
            const float u = c.normalised(target);
            int code = 0, level = 0;
            if (s.trellis && c.bits) {
                uint32_t places = 0;
#pragma unroll
                for (int subset = 0; subset < kSubsets; ++subset) {
                    const int nearest = c.nearest(subset, u);
                    places |= uint32_t(nearest) << (8 * subset);
                    work.distance[kSubsets * lane + subset] =
                        __fmul_rn(c.squared_distance(subset, nearest, u), token_weight);
                }
                __syncwarp();
                const Path path = best_path(work.distance);
                const int subset = path.subset(lane), at = int(places >> (8 * subset) & 255u);
                code = at << 1 | int(path.free >> lane & 1u);
                level = kSubsets * at + subset;
            } else if (c.bits) {
                code = level = encode(c.boundaries, c.bits, u);
            }
            work.error[i * kBlockTokens + lane] =
                __fsub_rn(exact, __fadd_rn(c.zero_point, __fmul_rn(c.scale, c.levels[level])));
            work.code[i % kWarp * HeadWork::kRow + lane] = uint8_t(code);
            __syncwarp();
            if (pass < s.refinements || (i % kWarp < kWarp - 1 && i + 1 < head_dim)) continue;
            // A lane packs what 32 tokens of one coordinate were coded as.
            const int coordinate = i / kWarp * kWarp + lane;
            if (coordinate <= i) {
                const int channel = head * head_dim + coordinate, bits = s.bits[channel];
                const uint8_t *own = work.code + lane * HeadWork::kRow;
                uint32_t low[4], high[4];
#pragma unroll
                for (int slice = 0; slice < 4; ++slice) {
                    low[slice] = high[slice] = 0;
#pragma unroll
                    for (int t = 0; t < 8; ++t) {
                        low[slice] |= (own[8 * slice + t] & 15u) << (4 * t);
                        high[slice] |= uint32_t(own[8 * slice + t]) >> 4 << (4 * t);
                    }
                }
                store_unit(s, codes, channel, bits, place, low, high);
            }
            __syncwarp();
        }
    }
}

// Grid: new blocks, sequences, 2 (keys, values); 512 threads; Work's bytes of shared memory, or HeadWork's for
// head_warps warps where that is more.
KVQ_KERNEL void __launch_bounds__(kThreads, 1) append_blocks(const __grid_constant__ AppendParams p) {
    KVQ_SHARED;
    const AppendSide &s = p.side[blockIdx.z];
    const Work work(kvq_shared, p.heads, p.head_dim);
    const int block = blockIdx.x, row = blockIdx.y, lane = lane_id();
    const int place = (p.first_block + block) % kPageBlocks;
    const PagePointers &page = s.pages[(p.first_block + block) / kPageBlocks];
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
        if (s.token) {
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

    // A warp takes 32 coordinates of a head, a lane the 32 codes of one.
    for (int task = warp_id(); task < p.heads * work.chunks; task += kWarps) {
        const int head = task / work.chunks, coordinate = task % work.chunks * kWarp + lane;
        const bool inside = coordinate < p.head_dim;
        const int channel = head * p.head_dim + (inside ? coordinate : 0), bits = s.bits[channel];
        const float *boundaries = s.boundaries + int64_t(channel) * s.level_stride * s.boundary_count;
        uint32_t low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        if (s.trellis) {
            if (!inside || bits == 0) continue;
            const ChannelLevels c(s, channel);
            auto u = [&](int t) { return c.normalised(element(s, first + s.stride[2] * t, head, p.head_dim, coordinate)); };
            const Path path = best_path(c, u, s.token_weight ? work.token_weight + head * kBlockTokens : nullptr);
#pragma unroll
            for (int slice = 0; slice < 4; ++slice) {
#pragma unroll 1
                for (int i = 0; i < 8; ++i) {
                    const int t = 8 * slice + i;
                    const uint32_t code = uint32_t(c.nearest(path.subset(t), u(t))) << 1 | (path.free >> t & 1u);
                    low[slice] |= (code & 15u) << (4 * i);
                    high[slice] |= (code >> 4) << (4 * i);
                }
            }
            store_unit(s, codes, channel, bits, place, low, high);
            continue;
        }
#pragma unroll
        for (int slice = 0; slice < 4; ++slice) {
            for (int i = 0; i < 8; ++i) {
                const int t = 8 * slice + i;
                const Token token = of_channel(s, work.token[t], channel);
                const float y =
                    element(s, first + s.stride[2] * t, head, p.head_dim, inside ? coordinate : 0);
                const Element e = examine(token, y);
                const uint32_t code = encode(boundaries, bits, e.normalised);
                low[slice] |= (code & 15u) << (4 * i);
                high[slice] |= (code >> 4) << (4 * i);
                if (s.cap) {
                    const unsigned mask = __ballot_sync(kAll, inside && kept(token, e, channel));
                    if (lane == 0) work.mask[t * p.heads * work.chunks + task] = mask;
                }
            }
        }
        if (inside) store_unit(s, codes, channel, bits, place, low, high);
    }
    if (!s.cap) return;
    __syncthreads();

    // Where each token's outliers of a head begin: after those of the heads before, and of the tokens before.
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
        const float *boundaries = s.boundaries + int64_t(channel) * s.level_stride * s.boundary_count;
        const float *levels = s.levels + int64_t(channel) * s.level_stride * s.level_count;
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
            const float level = levels[encode(boundaries, s.bits[channel], examine(token, y).normalised)];
            const float dense = __fadd_rn(token.zero_point, __fmul_rn(token.scale, level));
            s.outlier_index[list + at] = uint16_t(t << kCoordinateBits | coordinate);
            s.outlier_residual[list + at] = to_storage(s, __fsub_rn(y, dense));
        }
    }
}

struct PlaceParams {
    const uint16_t *index, *residual;       // the work space of append_blocks
    const int *count;                       // [blocks, B, H]
    uint16_t *const *page_index;            // [pages] outlier_index of the pages, as large as needed
    uint16_t *const *page_residual;
    void *const *page_start;                // [pages] outlier_start, [8 B H + 1] of start_bytes each
    int capacity, heads, blocks, first_block, batch, start_bytes;
};

template <typename Start> KVQ_DEVICE void place_outliers_of(const PlaceParams &p) {
    KVQ_SHARED;
    const int batch = p.batch;
    int *offset = reinterpret_cast<int *>(kvq_shared);  // [8 B + 1] entries before each (block, sequence)
    int *counts = offset + kPageBlocks * batch + 1;     // [8 B H]
    const int page = blockIdx.x;
    const int from = page == 0 ? p.first_block : 0;  // places of this page that are new
    const int block = page * kPageBlocks + from - p.first_block;
    const int blocks = min(kPageBlocks - from, p.blocks - block), rows = blocks * batch;
    Start *start = static_cast<Start *>(p.page_start[page]) + from * batch * p.heads;
    for (int i = threadIdx.x; i < rows * p.heads; i += kThreads)
        counts[i] = p.count[int64_t(block) * batch * p.heads + i];
    __syncthreads();
    if (threadIdx.x == 0) {
        int total = from ? int(start[0]) : 0;
        for (int row = 0; row < rows; ++row) {
            offset[row] = total;
            for (int h = 0; h < p.heads; ++h) {
                start[row * p.heads + h] = Start(total);
                total += counts[row * p.heads + h];
            }
        }
        offset[rows] = total;
    }
    __syncthreads();
    const int lists = (kPageBlocks - from) * batch * p.heads;
    for (int i = rows * p.heads + threadIdx.x; i <= lists; i += kThreads) start[i] = Start(offset[rows]);
    for (int row = warp_id(); row < rows; row += kWarps) {
        const int64_t source = (int64_t(block) * batch + row) * p.capacity;
        for (int i = lane_id(); i < offset[row + 1] - offset[row]; i += kWarp) {
            p.page_index[page][offset[row] + i] = p.index[source + i];
            p.page_residual[page][offset[row] + i] = p.residual[source + i];
        }
    }
}

// Grid: pages touched; 512 threads; 4 (8 B (H + 1) + 1) bytes of shared memory. Writes the starts of a page's new
// lists, those of blocks still to come, and the entries.
KVQ_KERNEL void __launch_bounds__(kThreads, 1) place_outliers(const __grid_constant__ PlaceParams p) {
    if (p.start_bytes == 2)
        place_outliers_of<uint16_t>(p);
    else
        place_outliers_of<int>(p);
}
