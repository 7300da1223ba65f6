// Attention of one token to the packed pages of a key-value head, for its query heads: scores, softmax and weighted
// sums of values, for a page of 256 tokens at a time, with levels directly from the packed words.
#pragma once

#include <cmath>

#include "levels.h"

namespace kvq {

constexpr float kHidden = -1e30f;  // below every score, and finite

// Two coordinates of a head that are read together: a RoPE pair, or any two.
struct Couple {
    int32_t first, second;
    int32_t pair;  // number of the RoPE pair
    int32_t kind;  // that serves both
};

// The columns of one key-value head, prepared once for all pages that a thread reads.
struct Head {
    const KvqCodes* codes;
    Column* column;    // [size]
    Column* factor;    // [size] of constants, where tokens of keys have scales: what is added for a token's zero point
    Column* sum;       // [size] of constants: what is added for every token
    Couple* couple;    // in an order that keeps like kinds together
    int couples;
    int32_t* single;   // coordinates read by themselves
    int singles;
    float* residual_factor;  // [size], of outliers' residuals, or null for 1
};

// Workspace of a thread for `group` query heads.
struct Room {
    Head key, value;
    float* score;        // [group, 256]
    float* weight;       // [group, 256], probabilities times scales of tokens
    float* extra[2];     // [group, 256] each, of keys whose tokens have scales
    float* token;        // [2, 256], scales and zero points of a page's tokens
    float* query;        // [key size, group], ready for packed keys
    float* sum;          // [value size, group, kLanes]
    float* outlier_sum;  // [value size, group]
};

// Parameters that are the same for all pages.
struct View {
    const KvqAttention* call;
    const int32_t* partner;  // [key size]: the other coordinate of its RoPE pair, -1 for none
    const int32_t* pair_of;  // [key size]
    int sequence, head;
};

template <int G>
struct Scores {
    float highest[G], total[G];
    F mass[G];       // of the weights of values, by lane
    F zero_mass[G];  // of probabilities times zero points of tokens
};

// Add the scores of a pair's channels. `turn` has the block's cosines and sines, [2, 8].
template <int G, class Kind>
KVQ_INLINE void add_pair(Kind, const Column& a, const Column& b, const int32_t* row, const float* query_a,
                         const float* query_b, const float* turn, const float* within, float* score) {
    Reader<Kind::kKind, Kind::kTrellis> first(a), second(b);
    for (int group = 0; group < kGroups; group++) {
        first.open(row, group);
        second.open(row, group);
        const F cosine = spread(turn + group * kUnits), sine = spread(turn + kPageBlocks + group * kUnits);
        F turned_a[G], turned_b[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            const F x = all(query_a[g]), y = all(query_b[g]);
            turned_a[g] = fused(y, sine, x * cosine);
            turned_b[g] = fused_minus(y, cosine, x * sine);
        }
        float* to = score + group * kVectors * kLanes;
        auto add_half = [&](auto half) KVQ_ALWAYS_INLINE {
            constexpr int kHalf = decltype(half)::kKind;
            F x[4], y[4];
            first.template half<kHalf>(x);
            second.template half<kHalf>(y);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) {
                const int vector = 4 * kHalf + n;
                const F c = repeated(within + 8 * vector), s = repeated(within + 8 * vector + 4);
                const F u = fused_minus(x[n], c, y[n] * s), v = fused(x[n], s, y[n] * c);
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    float* at = to + g * kPageTokens + vector * kLanes;
                    store(at, fused(v, turned_b[g], fused(u, turned_a[g], load<F>(at))));
                }
            }
        };
        add_half(OfKind<0, false>());
        add_half(OfKind<1, false>());
    }
}

// The same for a coordinate without RoPE.
template <int G, class Kind>
KVQ_INLINE void add_single(Kind, const Column& column, const int32_t* row, const float* query, float* score) {
    Reader<Kind::kKind, Kind::kTrellis> reader(column);
    for (int group = 0; group < kGroups; group++) {
        reader.open(row, group);
        float* to = score + group * kVectors * kLanes;
        auto add_half = [&](auto half) KVQ_ALWAYS_INLINE {
            constexpr int kHalf = decltype(half)::kKind;
            F x[4];
            reader.template half<kHalf>(x);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    float* at = to + g * kPageTokens + (4 * kHalf + n) * kLanes;
                    store(at, fused(x[n], all(query[g]), load<F>(at)));
                }
        };
        add_half(OfKind<0, false>());
        add_half(OfKind<1, false>());
    }
}

// Weighted sums of two channels' values.
template <int G, class Kind>
KVQ_INLINE void mix_two(Kind, const Column& a, const Column& b, const int32_t* row, const float* weight, float* sum_a,
                        float* sum_b) {
    Reader<Kind::kKind, Kind::kTrellis> first(a), second(b);
    F total_a[G], total_b[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
        total_a[g] = load<F>(sum_a + g * kLanes);
        total_b[g] = load<F>(sum_b + g * kLanes);
    }
    for (int group = 0; group < kGroups; group++) {
        first.open(row, group);
        second.open(row, group);
        const float* from = weight + group * kVectors * kLanes;
        auto mix_half = [&](auto half) KVQ_ALWAYS_INLINE {
            constexpr int kHalf = decltype(half)::kKind;
            F x[4], y[4];
            first.template half<kHalf>(x);
            second.template half<kHalf>(y);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    const F w = load<F>(from + g * kPageTokens + (4 * kHalf + n) * kLanes);
                    total_a[g] = fused(w, x[n], total_a[g]);
                    total_b[g] = fused(w, y[n], total_b[g]);
                }
        };
        mix_half(OfKind<0, false>());
        mix_half(OfKind<1, false>());
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
        store(sum_a + g * kLanes, total_a[g]);
        store(sum_b + g * kLanes, total_b[g]);
    }
}

// Entries of a list of outliers, clamped to the page's buffers for any starts.
struct List {
    int64_t first, stop;
};
inline List list_of(const KvqPage& page, int64_t number) {
    int64_t first, stop;
    if (page.start_bytes == 2) {
        const int16_t* start = static_cast<const int16_t*>(page.start);
        first = start[number];
        stop = start[number + 1];
    } else {
        const int32_t* start = static_cast<const int32_t*>(page.start);
        first = start[number];
        stop = start[number + 1];
    }
    return {first < 0 ? 0 : first, stop < page.entries ? stop : page.entries};
}

// Call work(block, token, coordinate, residual) for the head's outliers in a page.
template <class Work>
KVQ_INLINE void for_outliers(const KvqCodes& codes, const KvqPage& page, int sequence, int head, Work work) {
    if (page.entries == 0 || page.start_bytes == 0) return;
    for (int block = 0; block < kPageBlocks; block++) {
        const int64_t number = (static_cast<int64_t>(block) * page.batch + sequence) * codes.heads;
        const List list = list_of(page, number + head);
        for (int64_t entry = list.first; entry < list.stop; entry++) {
            const int token = page.index[entry] >> 11, coordinate = page.index[entry] & 2047;
            if (coordinate < codes.size)
                work(block, token, coordinate, half_to_float(page.residual[entry], codes.bfloat != 0));
        }
    }
}

// Scores of all tokens of a page without outliers, from columns of any kind.
template <int G>
void add_columns(const View& view, const Head& head, const Column* column, bool constant, const int32_t* row,
                 const int32_t* next_row, const float* turn, const float* query, float* score) {
    const KvqTurns& turns = view.call->turns;
    const bool trellis = head.codes->trellis != 0;
    for (int n = 0; n < head.couples; n++) {
        const Couple& couple = head.couple[n];
        const Column &a = column[couple.first], &b = column[couple.second];
        fetch(next_row + a.offset, 4 * kPageBlocks * a.width);
        fetch(next_row + b.offset, 4 * kPageBlocks * b.width);
        with_kind(constant ? static_cast<int32_t>(kConstant) : couple.kind, trellis, [&](auto kind) KVQ_ALWAYS_INLINE {
            add_pair<G>(kind, a, b, row, query + couple.first * G, query + couple.second * G, turn + 16 * couple.pair,
                        turns.within + 64 * couple.pair, score);
        });
    }
    for (int n = 0; n < head.singles; n++) {
        const Column& only = column[head.single[n]];
        fetch(next_row + only.offset, 4 * kPageBlocks * only.width);
        with_kind(constant ? static_cast<int32_t>(kConstant) : only.kind, trellis, [&](auto kind) KVQ_ALWAYS_INLINE {
            add_single<G>(kind, only, row, query + head.single[n] * G, score);
        });
    }
}

// Scales and zero points of a page's tokens, in the order in which levels are read.
inline void read_token_scales(const uint16_t* token, bool bfloat, float* to) {
    float number[2 * kBlockTokens];
    for (int block = 0; block < kPageBlocks; block++) {
        halves_to_floats(token + 2 * kBlockTokens * block, 2 * kBlockTokens, bfloat, number);
        for (int t = 0; t < kBlockTokens; t++) {
            to[token_place(block, t)] = number[2 * t];
            to[kPageTokens + token_place(block, t)] = number[2 * t + 1];
        }
    }
}

// Outliers of keys: each adds its rotated residual times the query.
template <int G>
void add_key_outliers(const View& view, const Room& room, const KvqPage& page, const float* turn) {
    const Head& head = room.key;
    const KvqTurns& turns = view.call->turns;
    auto add = [&](int block, int token, int coordinate, float residual) {
        if (head.residual_factor != nullptr) residual *= head.residual_factor[coordinate];
        float* at = room.score + token_place(block, token);
        const float* own = room.query + coordinate * G;
        const int other = view.partner[coordinate];
        if (other < 0) {
            for (int g = 0; g < G; g++) at[g * kPageTokens] += residual * own[g];
            return;
        }
        const int pair = view.pair_of[coordinate];
        const float* within = turns.within + 64 * pair + 8 * vector_of(token) + quad_lane_of(token);
        const float c = turn[16 * pair + block], s = turn[16 * pair + kPageBlocks + block];
        const float cosine = c * within[0] - s * within[4], sine = s * within[0] + c * within[4];
        const float along = residual * cosine;
        const float across = turns.pair[2 * pair] == coordinate ? residual * sine : -residual * sine;
        const float* paired = room.query + other * G;
        for (int g = 0; g < G; g++) at[g * kPageTokens] += along * own[g] + across * paired[g];
    };
    for_outliers(*head.codes, page, view.sequence, view.head, add);
}

// Scores of all tokens of a page.
template <int G>
void score_page(const View& view, const Room& room, const KvqPage& page, const int32_t* next_row, const float* turn) {
    const Head& head = room.key;
    const int32_t* row = page.codes + static_cast<int64_t>(view.sequence) * head.codes->row_words;
    std::memset(room.score, 0, sizeof(float) * G * kPageTokens);
    add_columns<G>(view, head, head.column, false, row, next_row, turn, room.query, room.score);
    if (head.codes->token_scales != 0) {
        // A key is s[t] * (factor * level) + z[t] * factor + sum, by coordinate.
        std::memset(room.extra[0], 0, sizeof(float) * G * kPageTokens);
        std::memset(room.extra[1], 0, sizeof(float) * G * kPageTokens);
        add_columns<G>(view, head, head.factor, true, row, next_row, turn, room.query, room.extra[0]);
        if (head.codes->scale != nullptr)
            add_columns<G>(view, head, head.sum, true, row, next_row, turn, room.query, room.extra[1]);
        read_token_scales(page.token + static_cast<int64_t>(view.sequence) * 2 * kPageTokens, head.codes->bfloat != 0,
                          room.token);
        for (int g = 0; g < G; g++)
            for (int n = 0; n < kPageTokens; n += kLanes) {
                float* at = room.score + g * kPageTokens + n;
                const F zero = load<F>(room.extra[0] + g * kPageTokens + n);
                const F always = load<F>(room.extra[1] + g * kPageTokens + n);
                const F low = fused(zero, load<F>(room.token + kPageTokens + n), always);
                store(at, fused(load<F>(at), load<F>(room.token + n), low));
            }
    }
    add_key_outliers<G>(view, room, page, turn);
}

// The attended tokens of a page, one word per block; false if there are none.
inline bool seen_of(const View& view, int number, uint32_t (&seen)[kPageBlocks]) {
    const KvqAttention& call = *view.call;
    const uint32_t* bits =
        call.seen + (static_cast<int64_t>(view.sequence) * call.table_pages + number) * kPageBlocks;
    uint32_t any = 0;
    for (int block = 0; block < kPageBlocks; block++) {
        const int64_t hidden = call.first_token - (static_cast<int64_t>(number) * kPageBlocks + block) * kBlockTokens;
        seen[block] = hidden >= kBlockTokens ? 0 : hidden > 0 ? bits[block] & ~0u << hidden : bits[block];
        any |= seen[block];
    }
    return any != 0;
}

template <int G>
void hide(const uint32_t (&seen)[kPageBlocks], float* score) {
    for (int block = 0; block < kPageBlocks; block++) {
        if (seen[block] == ~0u) continue;
        for (int t = 0; t < kBlockTokens; t++)
            if ((seen[block] >> t & 1) == 0)
                for (int g = 0; g < G; g++) score[g * kPageTokens + token_place(block, t)] = kHidden;
    }
}

// Rescale sums to a higher maximum score.
template <int G>
void shrink_sums(const Head& value, const Room& room, int g, float by) {
    for (int i = 0; i < value.codes->size; i++) {
        float* at = room.sum + (static_cast<int64_t>(i) * G + g) * kLanes;
        store(at, load<F>(at) * by);
        room.outlier_sum[i * G + g] *= by;
    }
}

// Scores to probabilities, relative to the highest score so far, and to weights of values.
template <int G>
void weigh_page(const View& view, const Room& room, const KvqPage& page, Scores<G>& scores) {
    const bool scaled = room.value.codes->token_scales != 0;
    if (scaled)
        read_token_scales(page.token + static_cast<int64_t>(view.sequence) * 2 * kPageTokens,
                          room.value.codes->bfloat != 0, room.token);
    for (int g = 0; g < G; g++) {
        float* score = room.score + g * kPageTokens;
        F high = load<F>(score);
        for (int n = kLanes; n < kPageTokens; n += kLanes) high = greater(high, load<F>(score + n));
        const float highest = greatest_of(high);
        if (highest > scores.highest[g]) {
            const float by = scores.highest[g] <= kHidden ? 0.0f : std::exp2(scores.highest[g] - highest);
            scores.total[g] *= by;
            scores.mass[g] *= by;
            scores.zero_mass[g] *= by;
            shrink_sums<G>(room.value, room, g, by);
            scores.highest[g] = highest;
        }
        const F top = all(scores.highest[g]);
        F sum = {};
        for (int n = 0; n < kPageTokens; n += kLanes) {
            const F x = load<F>(score + n);
            const F p = (F)((I)exp2_of(x - top) & (x > all(0.5f * kHidden)));
            sum += p;
            store(score + n, p);
            if (scaled) {
                const F w = p * load<F>(room.token + n);
                scores.zero_mass[g] = fused(p, load<F>(room.token + kPageTokens + n), scores.zero_mass[g]);
                scores.mass[g] += w;
                store(room.weight + g * kPageTokens + n, w);
            }
        }
        scores.total[g] += sum_of(sum);
        if (!scaled) scores.mass[g] += sum;
    }
}

// Weighted sums of a page's values.
template <int G>
void mix_page(const View& view, const Room& room, const KvqPage& page, const int32_t* next_row) {
    const Head& head = room.value;
    const int32_t* row = page.codes + static_cast<int64_t>(view.sequence) * head.codes->row_words;
    const float* weight = head.codes->token_scales != 0 ? room.weight : room.score;
    for (int n = 0; n < head.couples; n++) {
        const Couple& couple = head.couple[n];
        if (couple.kind == kConstant) continue;  // follows from the weights alone
        const Column &a = head.column[couple.first], &b = head.column[couple.second];
        fetch(next_row + a.offset, 4 * kPageBlocks * a.width);
        fetch(next_row + b.offset, 4 * kPageBlocks * b.width);
        with_kind(couple.kind, head.codes->trellis != 0, [&](auto kind) KVQ_ALWAYS_INLINE {
            mix_two<G>(kind, a, b, row, weight, room.sum + static_cast<int64_t>(couple.first) * G * kLanes,
                       room.sum + static_cast<int64_t>(couple.second) * G * kLanes);
        });
    }
    auto add = [&](int block, int token, int coordinate, float residual) {
        const float* at = room.score + token_place(block, token);
        float* sum = room.outlier_sum + coordinate * G;
        for (int g = 0; g < G; g++) sum[g] += residual * at[g * kPageTokens];
    };
    for_outliers(*head.codes, page, view.sequence, view.head, add);
}

// Scores are in units of log2, and so is the cap.
template <int G>
void cap_scores(float cap, float* score) {
    const float inverse = 1.0f / cap;
    for (int n = 0; n < G * kPageTokens; n += kLanes) store(score + n, cap * tanh_of(load<F>(score + n) * inverse));
}

// Attend to the pages `from` to `to` - 1. Results are sums of values [G, value size], not yet divided by the totals,
// and the highest score (log2) and the total of each query head.
template <int G>
void attend_pages(const View& view, const Room& room, int from, int to, float cap, float* out, float* highest,
                  float* total) {
    const KvqAttention& call = *view.call;
    const Head &key = room.key, &value = room.value;
    const int size = value.codes->size;
    std::memset(room.sum, 0, sizeof(float) * static_cast<size_t>(size) * G * kLanes);
    std::memset(room.outlier_sum, 0, sizeof(float) * static_cast<size_t>(size) * G);
    Scores<G> scores;
    for (int g = 0; g < G; g++) {
        scores.highest[g] = kHidden;
        scores.total[g] = 0;
        scores.mass[g] = scores.zero_mass[g] = F{};
    }
    const int64_t key_row = static_cast<int64_t>(view.sequence) * key.codes->row_words;
    const int64_t value_row = static_cast<int64_t>(view.sequence) * value.codes->row_words;
    for (int n = from; n < to; n++) {
        uint32_t seen[kPageBlocks];
        const int number = call.first_page + n, next = n + 1 < to ? n + 1 : n;
        if (!seen_of(view, number, seen)) continue;
        const float* turn = call.turns.block + (static_cast<int64_t>(view.sequence) * call.table_pages + number) *
                                                   call.turns.pairs * 16;
        score_page<G>(view, room, call.key_page[n], call.key_page[next].codes + key_row, turn);
        if (cap > 0) cap_scores<G>(cap, room.score);
        hide<G>(seen, room.score);
        weigh_page<G>(view, room, call.value_page[n], scores);
        mix_page<G>(view, room, call.value_page[n], call.value_page[next].codes + value_row);
    }
    for (int g = 0; g < G; g++) {
        const float mass = sum_of(scores.mass[g]), zero_mass = sum_of(scores.zero_mass[g]);
        for (int i = 0; i < size; i++) {
            const Column& column = value.column[i];
            const float* mixed = room.sum + (static_cast<int64_t>(i) * G + g) * kLanes;
            float sum = column.kind == kConstant ? column.table[0] * mass : sum_of(load<F>(mixed));
            const float factor = value.residual_factor != nullptr ? value.residual_factor[i] : 1.0f;
            sum += factor * (room.outlier_sum[i * G + g] + zero_mass);
            if (value.codes->token_scales != 0 && value.codes->scale != nullptr)
                sum += value.codes->zero_point[view.head * size + i] * scores.total[g];
            out[g * size + i] = sum;
        }
        highest[g] = scores.highest[g];
        total[g] = scores.total[g];
    }
}

}  // namespace kvq
