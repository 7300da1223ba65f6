// Appends new tokens to the exact tail in one pass: keys are un-rotated, and everything is rounded to the storage type.
// Results equal torch's bit for bit.
#include "halves.h"
#include "kvq_native.h"

namespace kvq {
namespace {

constexpr int kMostJoined = 2048;  // coordinates of a head

// Undo RoPE: x[a] cos[a] - x[b] sin[a] and x[b] cos[b] + x[a] sin[b], every operation rounded.
void unrotate(const KvqJoin& call, const float* from, const float* cosine, const float* sine, float* to) {
    std::memcpy(to, from, sizeof(float) * call.size[0]);
    for (int p = 0; p < call.pairs; p++) {
        const int a = call.pair[2 * p], b = call.pair[2 * p + 1];
        to[a] = from[a] * cosine[a] + -from[b] * sine[a];
        to[b] = from[b] * cosine[b] + from[a] * sine[b];
    }
}

bool is_sound(const KvqJoin& call) {
    if (call.batch < 1 || call.heads < 1 || call.held < 0 || call.tokens < 0) return false;
    for (int side = 0; side < 2; side++) {
        if (call.size[side] < 1 || call.size[side] > kMostJoined || call.out[side] == nullptr) return false;
        if ((call.held > 0 && call.tail[side] == nullptr) || (call.tokens > 0 && call.x[side] == nullptr)) return false;
    }
    if (call.pairs < 0 || 2 * call.pairs > call.size[0]) return false;
    if (call.pairs == 0 || call.tokens == 0) return true;
    if (call.pair == nullptr || call.cosine == nullptr || call.sine == nullptr) return false;
    for (int n = 0; n < 2 * call.pairs; n++)
        if (call.pair[n] < 0 || call.pair[n] >= call.size[0] || call.pair[n] >= call.width) return false;
    return true;
}

}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_join(const KvqJoin* of) {
    using namespace kvq;
    if (of == nullptr || !is_sound(*of)) return KVQ_BAD_ARGUMENT;
    const KvqJoin& call = *of;
    const bool bfloat = call.bfloat != 0;
    float turned[kMostJoined];
    bool finite = true;
    for (int side = 0; side < 2; side++) {
        const int64_t size = call.size[side];
        uint16_t* to = call.out[side];
        for (int64_t sequence = 0; sequence < call.batch; sequence++)
            for (int64_t head = 0; head < call.heads; head++) {
                const uint16_t* held = call.tail[side] + sequence * call.tail_stride[side][0] +
                                       head * call.tail_stride[side][1];
                if (call.held > 0) std::memcpy(to, held, sizeof(uint16_t) * call.held * size);
                to += call.held * size;
                const float* x = call.x[side] + sequence * call.stride[side][0] + head * call.stride[side][1];
                for (int64_t t = 0; t < call.tokens; t++, to += size) {
                    const float* row = x + t * call.stride[side][2];
                    if (side == 0 && call.pairs > 0) {
                        const int64_t angle = sequence * call.angle_stride + t * call.width;
                        unrotate(call, row, call.cosine + angle, call.sine + angle, turned);
                        row = turned;
                    }
                    finite &= floats_to_halves(row, static_cast<int>(size), bfloat, to);
                }
            }
    }
    return finite ? KVQ_OK : KVQ_NOT_A_NUMBER;
}
