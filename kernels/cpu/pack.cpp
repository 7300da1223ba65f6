// Packs codes into words, and outliers into lists. kvq_calib/codec/packing.py defines both.
#include <cstring>

#include "kvq_native.h"
#include "page.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr int kCoordinateBits = 11;

// Eight codes of a slice to nibbles, `bits` of each from `from` on.
uint32_t nibbles(const uint8_t* slice, int from, uint32_t mask) {
    uint64_t bytes;
    std::memcpy(&bytes, slice, 8);
    bytes = bytes >> from & mask * 0x0101010101010101ull;
    bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffull;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffull;
    return static_cast<uint32_t>(bytes | bytes >> 16);
}

// A unit of up to four bits, of codes shifted down by `from`.
void pack_low(const uint8_t* codes, int from, int width, uint32_t* words) {
    uint32_t slice[4];
    for (int s = 0; s < 4; s++) slice[s] = nibbles(codes + 8 * s, from, (1u << width) - 1);
    switch (width) {
        case 4:
            for (int s = 0; s < 4; s++) words[s] = slice[s];
            return;
        case 3:  // the fourth slice goes to the top bits of the others
            for (int p = 0; p < 3; p++) words[p] = slice[p] | (slice[3] >> p & 0x11111111u) << 3;
            return;
        case 2:
            for (int n = 0; n < 2; n++) words[n] = slice[2 * n] | slice[2 * n + 1] << 2;
            return;
        default: words[0] = slice[0] | slice[1] << 1 | slice[2] << 2 | slice[3] << 3;
    }
}

void pack_unit(const uint8_t* codes, int width, uint32_t* words) {
    if (width == 0) return;
    pack_low(codes, 0, width < 4 ? width : 4, words);
    if (width > 4) pack_low(codes, 4, width - 4, words + 4);
}

}  // namespace
}  // namespace kvq

extern "C" {

int32_t kvq_pack(const uint8_t* width, int64_t channels, const uint8_t* codes, int64_t batch, int32_t blocks,
                 int32_t first, int32_t* page) {
    using namespace kvq;
    if (channels < 1 || batch < 0 || blocks < 0 || first < 0 || blocks > kPageBlocks - first) return KVQ_BAD_ARGUMENT;
    if (width == nullptr || codes == nullptr) return KVQ_BAD_ARGUMENT;
    int64_t row_words = 0;
    for (int64_t c = 0; c < channels; c++) {
        if (width[c] > kMostWidth) return KVQ_BAD_ARGUMENT;
        row_words += kPageBlocks * width[c];
    }
    if (row_words > 0 && page == nullptr) return KVQ_BAD_ARGUMENT;
    constexpr int kTogether = 16;  // channels whose codes are brought together at a time
    uint8_t unit[kTogether][kBlockTokens];
    for (int64_t sequence = 0; sequence < batch; sequence++)
        for (int block = 0; block < blocks; block++) {
            const uint8_t* from = codes + (sequence * blocks + block) * kBlockTokens * channels;
            int64_t words = 0;
            for (int64_t start = 0; start < channels; start += kTogether) {
                const int there = channels - start < kTogether ? static_cast<int>(channels - start) : kTogether;
                for (int t = 0; t < kBlockTokens; t++)
                    for (int n = 0; n < there; n++) unit[n][t] = from[t * channels + start + n];
                for (int n = 0; n < there; n++) {
                    const int bits = width[start + n];
                    if (bits == 0) continue;  // a page without words may be null
                    uint32_t packed[kMostWidth];
                    pack_unit(unit[n], bits, packed);
                    int32_t* to = page + sequence * row_words + kPageBlocks * words + (first + block) * bits;
                    std::memcpy(to, packed, sizeof(uint32_t) * bits);
                    words += bits;
                }
            }
        }
    return KVQ_OK;
}

int32_t kvq_list_outliers(const uint8_t* outlier, const uint16_t* residual, int64_t batch, int32_t blocks,
                          int32_t heads, int32_t size, int32_t* counts, int64_t entries, uint16_t* index,
                          uint16_t* listed) {
    using namespace kvq;
    if (batch < 0 || blocks < 0 || heads < 1 || size < 1 || size > 1 << kCoordinateBits) return KVQ_BAD_ARGUMENT;
    if (outlier == nullptr || residual == nullptr || counts == nullptr || entries < 0) return KVQ_BAD_ARGUMENT;
    if (index != nullptr && listed == nullptr) return KVQ_BAD_ARGUMENT;
    const int64_t channels = static_cast<int64_t>(heads) * size;
    int64_t at = 0;
    for (int block = 0; block < blocks; block++)
        for (int64_t sequence = 0; sequence < batch; sequence++)
            for (int head = 0; head < heads; head++) {
                const int64_t start = (sequence * blocks + block) * kBlockTokens * channels + head * size;
                int32_t count = 0;
                for (int t = 0; t < kBlockTokens; t++)
                    for (int i = 0; i < size; i++) {
                        const int64_t place = start + t * channels + i;
                        if (outlier[place] == 0) continue;
                        count++;
                        if (index == nullptr) continue;
                        if (at == entries) return KVQ_BAD_ARGUMENT;
                        index[at] = static_cast<uint16_t>(t << kCoordinateBits | i);
                        listed[at++] = residual[place];
                    }
                *counts++ = count;
            }
    return KVQ_OK;
}
}
