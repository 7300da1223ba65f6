// Checks that the counts and pointers of a call fit together, so that nothing is read beyond its end.
#pragma once

#include "levels.h"

namespace kvq {

constexpr int kMostCodeHeads = 1 << 16;
constexpr int kMostHeadSize = 2048;
constexpr int kMostGiven = 1 << 26;  // sequences, pages, query heads of a head

constexpr bool is_count(int64_t x) { return x >= 0 && x <= kMostGiven; }

inline bool is_sound(const KvqCodes& codes) {
    if (codes.heads < 1 || codes.heads > kMostCodeHeads || codes.size < 1 || codes.size > kMostHeadSize) return false;
    if (codes.width == nullptr || codes.offset == nullptr) return false;
    if (codes.level_count < 0 || (codes.level_count > 0 ? codes.level : codes.coefficient) == nullptr) return false;
    if ((codes.scale == nullptr) != (codes.zero_point == nullptr)) return false;
    const int most = codes.trellis != 0 ? 7 : 8;
    int64_t words = 0;
    for (int c = 0; c < codes.heads * codes.size; c++) {
        const int width = codes.width[c];
        if (width > most || codes.offset[c] != words) return false;
        if (codes.level_count > 0 && level_count(codes, c) > codes.level_count) return false;
        words += width;
    }
    return codes.row_words == 8 * words;
}

inline bool is_sound(const KvqCodes& codes, const KvqPage& page, int32_t batch) {
    if (page.codes == nullptr && codes.row_words > 0) return false;
    if (codes.token_scales != 0 && page.token == nullptr) return false;
    if (page.start_bytes == 0) return true;
    if ((page.start_bytes != 2 && page.start_bytes != 4) || page.start == nullptr) return false;
    if (page.entries < 0 || page.batch != batch) return false;
    return page.entries == 0 || (page.index != nullptr && page.residual != nullptr);
}

inline bool is_sound(const KvqExact& exact) {
    if (!is_count(exact.tokens)) return false;
    return exact.tokens == 0 || (exact.key != nullptr && exact.value != nullptr);
}

inline bool is_sound(const KvqTurns& turns, int size) {
    if (turns.pairs < 0 || turns.pairs > size / 2) return false;
    if (turns.pairs > 0 && (turns.pair == nullptr || turns.within == nullptr)) return false;
    if ((turns.own_cosine == nullptr) != (turns.own_sine == nullptr)) return false;
    for (int n = 0; n < 2 * turns.pairs; n++)
        if (turns.pair[n] < 0 || turns.pair[n] >= size) return false;
    return true;
}

inline bool is_sound(const KvqCodes& key, const KvqCodes& value, const KvqAttention& call) {
    if (!is_sound(key) || !is_sound(value) || key.heads != value.heads || key.bfloat != value.bfloat) return false;
    if (call.batch < 1 || !is_count(call.batch) || call.group < 1 || !is_count(call.group)) return false;
    if (!is_count(call.pages) || !is_count(call.first_page) || !is_count(call.table_pages)) return false;
    if (call.first_page + call.pages > call.table_pages) return false;
    if (call.query == nullptr || call.out == nullptr || !(call.softcap >= 0)) return false;
    if (!is_sound(call.turns, key.size) || !is_sound(call.sinks) || !is_sound(call.tail)) return false;
    const bool turns = call.turns.pairs > 0, exact = call.sinks.tokens + call.tail.tokens > 0;
    if (exact && (call.exact_seen == nullptr || (turns && call.turns.exact == nullptr))) return false;
    if (call.pages == 0) return true;
    if (call.key_page == nullptr || call.value_page == nullptr || call.seen == nullptr) return false;
    if (turns && call.turns.block == nullptr) return false;
    for (int n = 0; n < call.pages; n++)
        if (!is_sound(key, call.key_page[n], call.batch) || !is_sound(value, call.value_page[n], call.batch))
            return false;
    return true;
}

}  // namespace kvq
