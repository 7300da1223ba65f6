#include "prepare.h"

#include <cstdlib>

namespace kvq {
namespace {

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

bool asks_for_ranks(const KvqTrellis& codec, int lanes, int32_t count) {
    return codec.states == 4 && count > 1 && searches_ranks(lanes, count / 4);
}

}  // namespace

Tables::Tables(const KvqTrellis& codec, int lanes) {
    const int number = codec.heads * codec.head_dim;
    // Ranks come first, because they are loaded in whole registers.
    size_t ranks = 0, boundaries = 0;
    for (int c = 0; c < number; c++) {
        const int32_t count = codec.level_count[c];
        if (asks_for_ranks(codec, lanes, count)) ranks += kRankTables * rank_entries(count / 4);
        boundaries += count;
    }
    const size_t records = whole_lines(number * sizeof(Channel));
    void* memory = std::aligned_alloc(64, records + whole_lines((ranks + boundaries) * sizeof(float)));
    if (memory == nullptr) return;
    channels_ = static_cast<Channel*>(memory);
    float* rank = reinterpret_cast<float*>(static_cast<char*>(memory) + records);
    float* boundary = rank + ranks;
    for (int c = 0; c < number; c++) {
        const int32_t count = codec.level_count[c];
        Channel& channel = channels_[c];
        channel = {codec.levels + static_cast<size_t>(c) * codec.level_stride, count, boundary, nullptr};
        boundary += count;
        if (count == 1) continue;
        fill_boundaries(channel, codec.states);
        if (asks_for_ranks(codec, lanes, count)) {
            channel.ranks = rank;
            rank += kRankTables * rank_entries(count / 4);
            fill_ranks(channel);
        }
    }
}

Tables::~Tables() { std::free(channels_); }

}  // namespace kvq
