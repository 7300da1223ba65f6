// The scalar encoder: thresholds, nearest levels and outliers of one token at a time. Every operation is rounded
// separately, in the order of kvq_calib/codec/scalar.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "kvq_native.h"
#include "pool.h"
#include "wide.h"

namespace kvq {
namespace {

constexpr int kMostScalarHeads = 1 << 16;
constexpr int kMostScalarSize = 2048;
constexpr int kMostScalarLevels = 256;
// Number of tokens that a thread takes at a time.
constexpr int64_t kTokensTaken = 16;

struct Job {
    const KvqScalar* codec;
    const float* x;
    int64_t stride[3];
    int64_t batch, tokens;
    uint8_t* codes;
    uint16_t* token;
    uint8_t* outlier;
    uint16_t* residual;
    std::atomic<int64_t> next;
    std::atomic<int32_t> status;
};

// Workspace of a thread: `channels` numbers in each array, rounded up to whole vectors.
struct Room {
    float *y, *u, *sorted;
    int32_t* outside;
};

// The element that is smaller than exactly `left_out` others.
float trimmed(const float* y, int count, int left_out, bool lowest, float* sorted) {
    if (left_out == 0) return lowest ? *std::min_element(y, y + count) : *std::max_element(y, y + count);
    std::copy(y, y + count, sorted);
    if (lowest) {
        std::nth_element(sorted, sorted + left_out, sorted + count);
    } else {
        std::nth_element(sorted, sorted + left_out, sorted + count, [](float a, float b) { return a > b; });
    }
    return sorted[left_out];
}

// A token's scale and zero point in the storage type; false if they are out of its range.
bool token_thresholds(const KvqScalar& codec, int channels, const Room& room, uint16_t& scale, uint16_t& zero_point) {
    const bool bfloat = codec.bfloat != 0;
    const float low = trimmed(room.y, channels, codec.per_side, true, room.sorted);
    const float high = trimmed(room.y, channels, codec.per_side, false, room.sorted);
    zero_point = float_to_half((low + high) * 0.5f + 0.0f, bfloat);  // never a negative zero
    const float middle = half_to_float(zero_point, bfloat);
    const float above = high - middle, below = middle - low, exact = (above > below ? above : below) + 0.0f;
    scale = float_to_half(exact, bfloat);
    if (!is_finite(zero_point, bfloat) || !is_finite(scale, bfloat)) return false;
    if (half_to_float(scale, bfloat) < exact) scale++;  // the next number up
    return is_finite(scale, bfloat);
}

// Codes of u: the number of boundaries below.
void code_row(const KvqScalar& codec, const float* u, int channels, uint8_t* codes) {
    for (int c = 0; c < channels; c += kLanes) {
        const F x = load<F>(u + c);
        I code = {};
        for (int k = 0; k + 1 < codec.level_count; k++) code -= x > all(codec.boundary[k]);
        const int there = channels - c < kLanes ? channels - c : kLanes;
        for (int lane = 0; lane < there; lane++) codes[c + lane] = static_cast<uint8_t>(code[lane]);
    }
}

// Outliers of a token. If there are too many, the largest are kept; ties go to the lower channel.
int find_outliers(const KvqScalar& codec, int channels, const Room& room, float scale, float zero_point) {
    int count = 0;
    for (int c = 0; c < channels; c++) {
        const float limit = codec.token_scales ? scale : codec.scale[c];
        const float middle = codec.token_scales ? zero_point : codec.zero_point[c];
        if (std::fabs(room.y[c] - middle) > limit) room.outside[count++] = c;
    }
    if (count <= codec.outlier_cap) return count;
    std::sort(room.outside, room.outside + count, [&](int32_t a, int32_t b) {
        const float size_a = std::fabs(room.u[a]), size_b = std::fabs(room.u[b]);
        return size_a > size_b || (size_a == size_b && a < b);
    });
    return codec.outlier_cap;
}

bool encode_token(const Job& job, int64_t number, const Room& room) {
    const KvqScalar& codec = *job.codec;
    const int channels = codec.heads * codec.size;
    const float* from = job.x + number / job.tokens * job.stride[0] + number % job.tokens * job.stride[1];
    for (int head = 0; head < codec.heads; head++)
        std::memcpy(room.y + head * codec.size, from + head * job.stride[2], sizeof(float) * codec.size);
    if (codec.token_scales && codec.scale != nullptr)
        for (int c = 0; c < channels; c++) room.y[c] = (room.y[c] - codec.zero_point[c]) * codec.inverse[c];
    for (int c = 0; c < channels; c++)
        if (!(std::fabs(room.y[c]) < __builtin_inff())) return false;
    float scale = 0, zero_point = 0, inverse = 0;
    if (codec.token_scales) {
        uint16_t stored_scale, stored_zero;
        if (!token_thresholds(codec, channels, room, stored_scale, stored_zero)) return false;
        job.token[number] = stored_scale;
        job.token[job.batch * job.tokens + number] = stored_zero;
        scale = half_to_float(stored_scale, codec.bfloat != 0);
        zero_point = half_to_float(stored_zero, codec.bfloat != 0);
        inverse = scale > 0 ? 1.0f / scale : 0.0f;
        for (int c = 0; c < channels; c++) room.u[c] = (room.y[c] - zero_point) * inverse;
    } else {
        for (int c = 0; c < channels; c++) room.u[c] = (room.y[c] - codec.zero_point[c]) * codec.inverse[c];
    }
    bool finite = true;
    for (int c = 0; c < channels; c++) finite &= std::fabs(room.u[c]) < __builtin_inff();
    if (!finite) return false;
    uint8_t* codes = job.codes + number * channels;
    code_row(codec, room.u, channels, codes);
    if (codec.outlier_cap == 0) return true;
    uint8_t* outlier = job.outlier + number * channels;
    uint16_t* residual = job.residual + number * channels;
    std::memset(outlier, 0, channels);
    std::memset(residual, 0, sizeof(uint16_t) * channels);
    const int count = find_outliers(codec, channels, room, scale, zero_point);
    for (int n = 0; n < count; n++) {
        const int c = room.outside[n];
        const float own_scale = codec.token_scales ? scale : codec.scale[c];
        const float own_zero = codec.token_scales ? zero_point : codec.zero_point[c];
        const float dense = own_zero + own_scale * codec.level[codes[c]];
        outlier[c] = 1;
        residual[c] = float_to_half(room.y[c] - dense, codec.bfloat != 0);
    }
    return true;
}

void encode_tokens(void* of) {
    Job& job = *static_cast<Job*>(of);
    const size_t channels = static_cast<size_t>(job.codec->heads) * job.codec->size + kLanes;
    float* memory = static_cast<float*>(std::calloc(4 * channels, sizeof(float)));
    if (memory == nullptr) {
        job.status = KVQ_NO_MEMORY;
        return;
    }
    const Room room = {memory, memory + channels, memory + 2 * channels,
                       reinterpret_cast<int32_t*>(memory + 3 * channels)};
    const int64_t all_tokens = job.batch * job.tokens;
    for (int64_t first = job.next.fetch_add(kTokensTaken); first < all_tokens;
         first = job.next.fetch_add(kTokensTaken))
        for (int64_t number = first; number < first + kTokensTaken && number < all_tokens; number++)
            if (!encode_token(job, number, room)) job.status = KVQ_NOT_A_NUMBER;
    std::free(memory);
}

bool is_sound(const KvqScalar& codec) {
    if (codec.heads < 1 || codec.heads > kMostScalarHeads) return false;
    if (codec.size < 1 || codec.size > kMostScalarSize) return false;
    if (codec.level_count < 2 || codec.level_count > kMostScalarLevels) return false;
    if (codec.level == nullptr || codec.boundary == nullptr) return false;
    const bool thresholds = codec.scale != nullptr && codec.zero_point != nullptr && codec.inverse != nullptr;
    if (!thresholds && (codec.scale != nullptr || !codec.token_scales)) return false;
    return codec.per_side >= 0 && 2 * codec.per_side < codec.heads * codec.size && codec.outlier_cap >= 0;
}

}  // namespace
}  // namespace kvq

extern "C" int32_t kvq_encode_scalar(const KvqScalar* codec, const float* x, const int64_t* stride, int64_t batch,
                                     int64_t tokens, int32_t threads, uint8_t* codes, uint16_t* token,
                                     uint8_t* outlier, uint16_t* residual) {
    using namespace kvq;
    if (codec == nullptr || batch < 0 || tokens < 0 || !is_sound(*codec)) return KVQ_BAD_ARGUMENT;
    if (batch == 0 || tokens == 0) return KVQ_OK;
    if (x == nullptr || stride == nullptr || codes == nullptr) return KVQ_BAD_ARGUMENT;
    if (codec->token_scales && token == nullptr) return KVQ_BAD_ARGUMENT;
    if (codec->outlier_cap > 0 && (outlier == nullptr || residual == nullptr)) return KVQ_BAD_ARGUMENT;
    Job job = {codec, x,       {stride[0], stride[1], stride[2]}, batch, tokens,
               codes, token, outlier,                           residual, {0},   {KVQ_OK}};
    const int64_t pieces = (batch * tokens + kTokensTaken - 1) / kTokensTaken;
    run_on_threads(static_cast<int>(threads < pieces ? threads : pieces), encode_tokens, &job);
    return job.status;
}
