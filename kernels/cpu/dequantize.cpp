// Dequantizes packed blocks to ordinary tensors, for many queries at once. Threads share the pages of a head.
#include <atomic>
#include <cstdlib>

#include "attention.h"
#include "pool.h"
#include "sound.h"

namespace kvq {
namespace {

struct Job {
    const KvqCodes* codes;
    const KvqDequantize* call;
    int first_page, pages;
    std::atomic<int64_t> next;
    std::atomic<int32_t> status;
};

// Workspace of a thread.
struct Room {
    float* table;   // [kTableFloats], of the channel at hand
    float* tile;    // [size, 256] levels of a page, in the order in which they are read
    float* token;   // [2, 256] scales and zero points
};

void read_levels(const KvqCodes& codes, int64_t first_channel, const int32_t* row, const Room& room) {
    for (int i = 0; i < codes.size; i++) {
        Column column;
        prepare_column(codes, first_channel + i, kind_of(codes, first_channel + i), room.table, column);
        float* to = room.tile + static_cast<int64_t>(i) * kPageTokens;
        with_kind(column.kind, codes.trellis != 0, [&](auto kind) KVQ_ALWAYS_INLINE {
            using Kind = decltype(kind);
            Reader<Kind::kKind, Kind::kTrellis> reader(column);
            for (int group = 0; group < kGroups; group++) {
                F level[4];
                reader.open(row, group);
                reader.template half<0>(level);
                for (int n = 0; n < 4; n++) store(to + (group * kVectors + n) * kLanes, level[n]);
                reader.template half<1>(level);
                for (int n = 0; n < 4; n++) store(to + (group * kVectors + 4 + n) * kLanes, level[n]);
            }
        });
    }
}

// Scales of tokens, and residuals; both may be applied before the scales of channels.
void correct(const KvqCodes& codes, const KvqPage& page, int sequence, int head, const Room& room) {
    const bool scaled = codes.token_scales != 0, by_channel = scaled && codes.scale != nullptr;
    const int64_t first_channel = static_cast<int64_t>(head) * codes.size;
    if (scaled) {
        read_token_scales(page.token + static_cast<int64_t>(sequence) * 2 * kPageTokens, codes.bfloat != 0, room.token);
        for (int i = 0; i < codes.size; i++) {
            const F factor = all(by_channel ? codes.scale[first_channel + i] : 1.0f);
            const F sum = all(by_channel ? codes.zero_point[first_channel + i] : 0.0f);
            for (int n = 0; n < kPageTokens; n += kLanes) {
                float* at = room.tile + static_cast<int64_t>(i) * kPageTokens + n;
                const F zero = fused(factor, load<F>(room.token + kPageTokens + n), sum);
                store(at, fused(load<F>(at), load<F>(room.token + n), zero));
            }
        }
    }
    for_outliers(codes, page, sequence, head, [&](int block, int token, int coordinate, float residual) {
        if (by_channel) residual *= codes.scale[first_channel + coordinate];
        room.tile[static_cast<int64_t>(coordinate) * kPageTokens + token_place(block, token)] += residual;
    });
}

// Rotate a token's pairs by its position, minus the angle of pair rotation.
void turn_row(const KvqDequantize& call, int head, const float* cosine, const float* sine, float* row) {
    for (int p = 0; p < call.pairs; p++) {
        float c = cosine[p], s = sine[p];
        if (call.own_cosine != nullptr) {
            const int64_t own = static_cast<int64_t>(head) * call.pairs + p;
            const float turned = c * call.own_cosine[own] + s * call.own_sine[own];
            s = s * call.own_cosine[own] - c * call.own_sine[own];
            c = turned;
        }
        float &x = row[call.pair[2 * p]], &y = row[call.pair[2 * p + 1]];
        const float first = x * call.scaling, second = y * call.scaling;
        x = first * c - second * s;
        y = first * s + second * c;
    }
}

void dequantize_page(const Job& job, int sequence, int head, int number, const Room& room) {
    const KvqCodes& codes = *job.codes;
    const KvqDequantize& call = *job.call;
    const KvqPage& page = call.page[number];
    const int64_t first_channel = static_cast<int64_t>(head) * codes.size, size = codes.size;
    read_levels(codes, first_channel, page.codes + static_cast<int64_t>(sequence) * codes.row_words, room);
    correct(codes, page, sequence, head, room);
    const int64_t tokens = static_cast<int64_t>(call.blocks) * kBlockTokens;
    for (int block = 0; block < kPageBlocks; block++) {
        const int64_t place = static_cast<int64_t>(number) * kPageBlocks + block - call.first_block;
        if (place < 0 || place >= call.blocks) continue;
        for (int t = 0; t < kBlockTokens; t++) {
            const int64_t token = place * kBlockTokens + t;
            float* to = call.out + ((static_cast<int64_t>(sequence) * codes.heads + head) * tokens + token) * size;
            const float* from = room.tile + token_place(block, t);
            for (int i = 0; i < size; i++) to[i] = from[static_cast<int64_t>(i) * kPageTokens];
            const int64_t angle = (static_cast<int64_t>(sequence) * tokens + token) * call.pairs;
            if (call.pairs > 0) turn_row(call, head, call.cosine + angle, call.sine + angle, to);
        }
    }
}

void dequantize_pieces(void* of) {
    Job& job = *static_cast<Job*>(of);
    const size_t size = job.codes->size;
    const size_t floats = kTableFloats + size * kPageTokens + 2 * kPageTokens;
    float* memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (memory == nullptr) {
        job.status = KVQ_NO_MEMORY;
        return;
    }
    const Room room = {memory, memory + kTableFloats, memory + kTableFloats + size * kPageTokens};
    const int64_t pieces = static_cast<int64_t>(job.call->batch) * job.codes->heads * job.pages;
    for (int64_t number = job.next++; number < pieces; number = job.next++) {
        const int64_t row = number / job.pages;
        dequantize_page(job, static_cast<int>(row / job.codes->heads), static_cast<int>(row % job.codes->heads),
                        job.first_page + static_cast<int>(number % job.pages), room);
    }
    std::free(memory);
}

bool is_sound(const KvqCodes& codes, const KvqDequantize& call) {
    if (!kvq::is_sound(codes) || call.batch < 1 || !is_count(call.batch) || !is_count(call.pages)) return false;
    if (!is_count(call.first_block) || !is_count(call.blocks)) return false;
    const int64_t last = static_cast<int64_t>(call.first_block) + call.blocks;
    if (last > static_cast<int64_t>(call.pages) * kPageBlocks) return false;
    if (call.blocks > 0 && (call.page == nullptr || call.out == nullptr)) return false;
    if (call.pairs < 0 || 2 * call.pairs > codes.size) return false;
    const bool turns = call.pairs > 0 && call.blocks > 0;
    if (turns && (call.pair == nullptr || call.cosine == nullptr || call.sine == nullptr)) return false;
    if ((call.own_cosine == nullptr) != (call.own_sine == nullptr)) return false;
    for (int n = 0; turns && n < 2 * call.pairs; n++)
        if (call.pair[n] < 0 || call.pair[n] >= codes.size) return false;
    for (int n = 0; n < call.pages; n++)
        if (!kvq::is_sound(codes, call.page[n], call.batch)) return false;
    return true;
}

}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_dequantize(const KvqCodes* codes, const KvqDequantize* call) {
    using namespace kvq;
    if (codes == nullptr || call == nullptr || !is_sound(*codes, *call)) return KVQ_BAD_ARGUMENT;
    if (call->blocks == 0) return KVQ_OK;
    const int first_page = call->first_block / kPageBlocks;
    const int last_page = (call->first_block + call->blocks - 1) / kPageBlocks;
    Job job = {codes, call, first_page, last_page - first_page + 1, {0}, {KVQ_OK}};
    const int64_t pieces = static_cast<int64_t>(call->batch) * codes->heads * job.pages;
    run_on_threads(static_cast<int>(call->threads < pieces ? call->threads : pieces), dequantize_pieces, &job);
    return job.status;
}
