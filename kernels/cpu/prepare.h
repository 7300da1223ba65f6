// Checks of a caller's description of a quantizer, and the tables that all threads of a call read.
#pragma once

#include <cstddef>

#include "kvq_native.h"
#include "layout.h"

namespace kvq {

constexpr int kMostHeads = 1 << 16;
constexpr int kMostClasses = 1 << 10;

// Whether all counts and pointers fit together, so that no table is read beyond its end.
inline bool is_sound(const KvqTrellis& codec) {
    if (codec.heads < 1 || codec.heads > kMostHeads) return false;
    if (codec.head_dim < 1 || codec.head_dim > kMostSize) return false;
    if (codec.states != 1 && codec.states != 4) return false;
    if (codec.level_count == nullptr || codec.levels == nullptr) return false;
    if (codec.refinement_passes < 0) return false;
    if (codec.refinement_passes > 0 && codec.refinement_shares == nullptr) return false;
    if (codec.refinement_shares != nullptr && codec.shares == nullptr) return false;
    if (codec.feedback != nullptr && (codec.states != 4 || codec.shares != nullptr)) return false;
    if (codec.size_classes < 0 || codec.size_classes > kMostClasses) return false;
    if (codec.size_classes > 0 && (codec.size_edges == nullptr || codec.class_weight == nullptr)) return false;
    if (codec.pairs < 0 || codec.pairs > codec.head_dim / 2) return false;
    if (codec.pairs > 0 && (codec.pair == nullptr || codec.cosine == nullptr || codec.sine == nullptr)) return false;
    for (int n = 0; n < 2 * codec.pairs; n++)
        if (codec.pair[n] < 0 || codec.pair[n] >= codec.head_dim) return false;
    const int least = codec.states == 4 ? 4 : 2;
    for (int c = 0; c < codec.heads * codec.head_dim; c++) {
        const int32_t count = codec.level_count[c];
        if (count < 1 || count > kMostLevels || count > codec.level_stride || (count & (count - 1)) != 0) return false;
        if (count != 1 && count < least) return false;
    }
    return true;
}

// The tables of all channels, in one piece of memory.
class Tables {
   public:
    // `lanes` of the widest group; check channels() before use.
    Tables(const KvqTrellis& codec, int lanes);
    ~Tables();
    Tables(const Tables&) = delete;
    Tables& operator=(const Tables&) = delete;

    // One for each channel; null if out of memory.
    const Channel* channels() const { return channels_; }

   private:
    Channel* channels_ = nullptr;
};

}  // namespace kvq
