// The trellis encoder: heads and groups of blocks are divided among threads.
#include <cstdlib>

#include "encode_alone.h"
#include "encode_blocks.h"
#include "pool.h"
#include "prepare.h"

namespace kvq {
namespace {

// Number of lanes for a number of blocks: few blocks are faster in narrow vectors.
int lanes_for(int64_t blocks) {
    if (kWidest >= 16 && blocks > 8) return 16;
    return kWidest >= 8 && blocks > 4 ? 8 : 4;
}

bool encode_piece(const Job& job, int64_t piece, void* memory) {
    if (job.batch * job.per_sequence == 1) return encode_line(job, static_cast<int>(piece), memory);
    const int head = static_cast<int>(piece / job.groups);
    const int64_t first = piece % job.groups * kWidest, blocks = job.batch * job.per_sequence;
    const int count = static_cast<int>(blocks - first < kWidest ? blocks - first : kWidest);
    const int size = job.codec->head_dim;
    const Blocks own = {first, count, job.per_sequence, job.tokens, head, size, job.codec->heads * size};
    switch (lanes_for(count)) {
#if defined(__AVX512F__)
        case 16: return encode_group<16>(job, own, memory);
#endif
#if defined(__AVX__)
        case 8: return encode_group<8>(job, own, memory);
#endif
        default: return encode_group<4>(job, own, memory);
    }
}

void* aligned_memory(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

// The work of each thread: takes pieces until none are left.
void encode_pieces(void* of) {
    Job& job = *static_cast<Job*>(of);
    const int64_t pieces = job.codec->heads * job.groups;
    const int64_t blocks = job.batch * job.per_sequence;
    const int lanes = lanes_for(blocks);
    const bool coded = job.coded != nullptr;
    const size_t bytes = blocks == 1   ? LineRoom::size(*job.codec, coded)
                         : lanes == 16 ? Room<16>::size(*job.codec, coded)
                         : lanes == 8 ? Room<8>::size(*job.codec, coded)
                                      : Room<4>::size(*job.codec, coded);
    void* memory = aligned_memory(bytes);
    if (memory == nullptr) {
        job.status = KVQ_NO_MEMORY;
        return;
    }
    for (int64_t piece = job.next++; piece < pieces; piece = job.next++)
        if (!encode_piece(job, piece, memory)) job.status = KVQ_NOT_A_NUMBER;
    std::free(memory);
}
}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_encode_trellis(const KvqTrellis* codec, const float* x, const int64_t* stride,
                                      const float* weight, int64_t batch, int64_t tokens, int32_t threads,
                                      uint8_t* codes, float* coded) {
    using namespace kvq;
    if (codec == nullptr || batch < 0 || tokens < 0 || !is_sound(*codec)) return KVQ_BAD_ARGUMENT;
    if (batch == 0 || tokens == 0) return KVQ_OK;
    if (x == nullptr || stride == nullptr || codes == nullptr) return KVQ_BAD_ARGUMENT;
    const int64_t per_sequence = (tokens + kBlock - 1) / kBlock, blocks = batch * per_sequence;
    const Tables tables(*codec, lanes_for(blocks));
    if (tables.channels() == nullptr) return KVQ_NO_MEMORY;
    Job job = {codec,  tables.channels(), x,      {stride[0], stride[1], stride[2]}, weight, codes,
               coded,  batch,             tokens, per_sequence,                      (blocks + kWidest - 1) / kWidest,
               {0},    {KVQ_OK}};
    const int64_t pieces = codec->heads * job.groups;
    run_on_threads(static_cast<int>(threads < pieces ? threads : pieces), encode_pieces, &job);
    return job.status;
}
