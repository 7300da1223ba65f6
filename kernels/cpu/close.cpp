// Codes and packs one block of many layers' keys and values: what decoding does every 32 tokens, in one call. The work
// is divided among threads, each of which calls the functions for it.
#include <atomic>
#include <cstdlib>

#include "halves.h"
#include "kvq_native.h"
#include "page.h"
#include "pool.h"
#include "prepare.h"

namespace kvq {
namespace {

constexpr int kMostBlocks = 1 << 20;
constexpr int kMostSequences = 1 << 26;
// Sequences whose blocks are coded at a time, so that memory does not grow with their number.
constexpr int64_t kTogether = 16;

struct Call {
    KvqBlock* blocks;
    int32_t count, batch, place;
    int64_t pieces;
    std::atomic<int64_t> next;
    std::atomic<int32_t> status;
};

int heads_of(const KvqBlock& block) { return block.trellis != nullptr ? block.trellis->heads : block.scalar->heads; }
int size_of(const KvqBlock& block) { return block.trellis != nullptr ? block.trellis->head_dim : block.scalar->size; }

// Pieces of work: heads of the trellis codec, whose heads are independent; else sequences.
int64_t pieces_of(const KvqBlock& block, int32_t batch) {
    return block.trellis != nullptr ? block.trellis->heads : batch;
}

// The sum of the widths of the channels before `stop`.
int64_t words_before(const KvqBlock& block, int64_t stop) {
    int64_t words = 0;
    for (int64_t c = 0; c < stop; c++) words += block.width[c];
    return words;
}

// Memory that a thread uses again for each piece.
class Memory {
   public:
    Memory() = default;
    ~Memory() { std::free(memory_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // At least so many bytes, whose contents are undefined; null if there are none.
    void* reach(size_t bytes) {
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = std::malloc(bytes);
            bytes_ = memory_ != nullptr ? bytes : 0;
        }
        return memory_;
    }

   private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// The codec of one head, as one that has no others.
KvqTrellis codec_of_head(const KvqTrellis& codec, int64_t head) {
    KvqTrellis own = codec;
    const int64_t size = codec.head_dim, matrix = head * size * size;
    own.heads = 1;
    own.level_count += head * size;
    own.levels += head * size * codec.level_stride;
    if (own.shares != nullptr) own.shares += matrix;
    if (own.refinement_shares != nullptr) own.refinement_shares += matrix;
    if (own.size_edges != nullptr) own.size_edges += head * (codec.size_classes - 1);
    if (own.class_weight != nullptr) own.class_weight += head * codec.size_classes;
    if (own.feedback != nullptr) own.feedback += head;
    if (own.cosine != nullptr) own.cosine += head * codec.pairs;
    if (own.sine != nullptr) own.sine += head * codec.pairs;
    return own;
}

int32_t close_head(const Call& call, const KvqBlock& block, int64_t head, Memory& memory) {
    const KvqTrellis codec = codec_of_head(*block.trellis, head);
    const int64_t size = codec.head_dim, channels = block.trellis->heads * size, numbers = kBlockTokens * size;
    const int64_t together = call.batch < kTogether ? call.batch : kTogether;
    float* x = static_cast<float*>(memory.reach(together * numbers * (sizeof(float) + 1)));
    if (x == nullptr) return KVQ_NO_MEMORY;
    uint8_t* codes = reinterpret_cast<uint8_t*>(x + together * numbers);
    const int64_t row_words = kPageBlocks * words_before(block, channels);
    const int64_t own_words = kPageBlocks * words_before(block, head * size);
    const int64_t stride[3] = {numbers, size, 0};
    for (int64_t first = 0; first < call.batch; first += together) {
        const int64_t there = call.batch - first < together ? call.batch - first : together;
        for (int64_t n = 0; n < there; n++)
            halves_to_floats(block.x + (first + n) * block.stride[0] + head * block.stride[1],
                             static_cast<int>(numbers), block.bfloat != 0, x + n * numbers);
        int32_t status = kvq_encode_trellis(&codec, x, stride, nullptr, there, kBlockTokens, 1, codes, nullptr);
        for (int64_t n = 0; n < there && status == KVQ_OK; n++)
            status = kvq_pack(block.width + head * size, size, codes + n * numbers, 1, 1, call.place,
                              block.page + (first + n) * row_words + own_words);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

int32_t close_sequence(const Call& call, const KvqBlock& block, int64_t sequence, Memory& memory) {
    const KvqScalar& codec = *block.scalar;
    const int64_t size = codec.size, channels = codec.heads * size, numbers = kBlockTokens * channels;
    // Floats; residuals and tokens' scales; codes and which are outliers.
    const size_t bytes = numbers * (sizeof(float) + sizeof(uint16_t) + 2) + 2 * kBlockTokens * sizeof(uint16_t);
    float* x = static_cast<float*>(memory.reach(bytes));
    if (x == nullptr) return KVQ_NO_MEMORY;
    uint16_t* residual = reinterpret_cast<uint16_t*>(x + numbers);
    uint16_t* token = residual + numbers;
    uint8_t* codes = reinterpret_cast<uint8_t*>(token + 2 * kBlockTokens);
    uint8_t* outlier = codes + numbers;
    for (int64_t head = 0; head < codec.heads; head++)
        halves_to_floats(block.x + sequence * block.stride[0] + head * block.stride[1],
                         static_cast<int>(kBlockTokens * size), block.bfloat != 0, x + head * kBlockTokens * size);
    const int64_t stride[3] = {numbers, size, kBlockTokens * size};
    int32_t status = kvq_encode_scalar(&codec, x, stride, 1, kBlockTokens, 1, codes, token, outlier, residual);
    if (status != KVQ_OK) return status;
    const int64_t row_words = kPageBlocks * words_before(block, channels);
    status = kvq_pack(block.width, channels, codes, 1, 1, call.place, block.page + sequence * row_words);
    if (codec.token_scales != 0) {
        uint16_t* to = block.token + 2 * (sequence * kPageTokens + call.place * kBlockTokens);
        for (int t = 0; t < kBlockTokens; t++) {
            to[2 * t] = token[t];
            to[2 * t + 1] = token[kBlockTokens + t];
        }
    }
    if (codec.outlier_cap == 0 || status != KVQ_OK) return status;
    const int64_t room = static_cast<int64_t>(kBlockTokens) * codec.outlier_cap;
    return kvq_list_outliers(outlier, residual, 1, 1, codec.heads, codec.size, block.counts + sequence * codec.heads,
                             room, block.index + sequence * room, block.listed + sequence * room);
}

// The work of each thread: takes pieces until none are left. Their numbers only grow, so blocks are found in order.
void close_pieces(void* of) {
    Call& call = *static_cast<Call*>(of);
    Memory memory;
    int64_t before = 0;
    KvqBlock* block = call.blocks;
    for (int64_t piece = call.next++; piece < call.pieces; piece = call.next++) {
        while (piece - before >= pieces_of(*block, call.batch)) before += pieces_of(*block++, call.batch);
        const int32_t status = block->trellis != nullptr ? close_head(call, *block, piece - before, memory)
                                                         : close_sequence(call, *block, piece - before, memory);
        if (status == KVQ_OK) continue;
        __atomic_store_n(&block->status, status, __ATOMIC_RELAXED);
        // What is no number concerns one block; anything else, the whole call.
        int32_t known = call.status;
        while ((known == KVQ_OK || known == KVQ_NOT_A_NUMBER) && !call.status.compare_exchange_weak(known, status)) {}
    }
}

bool is_sound(const KvqBlock& block) {
    if ((block.trellis == nullptr) == (block.scalar == nullptr)) return false;
    const int heads = heads_of(block), size = size_of(block);
    if (heads < 1 || heads > kMostHeads || size < 1 || size > kMostSize) return false;
    if (block.trellis != nullptr && !kvq::is_sound(*block.trellis)) return false;
    if (block.x == nullptr || block.width == nullptr) return false;
    int64_t words = 0;
    for (int64_t c = 0; c < static_cast<int64_t>(heads) * size; c++) {
        if (block.width[c] > kMostWidth) return false;
        words += block.width[c];
    }
    if (words > 0 && block.page == nullptr) return false;
    if (block.trellis != nullptr) return true;
    if (block.scalar->token_scales != 0 && block.token == nullptr) return false;
    if (block.scalar->outlier_cap < 0 || block.scalar->outlier_cap > heads * size) return false;
    if ((block.scalar->bfloat != 0) != (block.bfloat != 0)) return false;
    if (block.scalar->outlier_cap == 0) return true;
    return block.index != nullptr && block.listed != nullptr && block.counts != nullptr;
}

}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_close_blocks(KvqBlock* blocks, int32_t count, int32_t batch, int32_t place, int32_t threads) {
    using namespace kvq;
    if (count < 0 || count > kMostBlocks || batch < 1 || batch > kMostSequences) return KVQ_BAD_ARGUMENT;
    if (place < 0 || place >= kPageBlocks || (count > 0 && blocks == nullptr)) return KVQ_BAD_ARGUMENT;
    int64_t pieces = 0;
    for (int32_t n = 0; n < count; n++) {
        if (!is_sound(blocks[n])) return KVQ_BAD_ARGUMENT;
        pieces += pieces_of(blocks[n], batch);
    }
    for (int32_t n = 0; n < count; n++) blocks[n].status = KVQ_OK;
    if (pieces == 0) return KVQ_OK;
    Call call = {blocks, count, batch, place, pieces, {0}, {KVQ_OK}};
    run_on_threads(static_cast<int>(threads < pieces ? threads : pieces), close_pieces, &call);
    return call.status;
}
