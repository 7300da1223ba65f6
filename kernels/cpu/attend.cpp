// Decode attention: threads share heads, groups of query heads and runs of pages. Each piece gives a partial result,
// and these are joined in order.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "exact.h"
#include "pool.h"
#include "sound.h"

namespace kvq {
namespace {

constexpr float kLog2E = 1.44269504f;
// Smallest number of pages of a run, and number of runs for each thread beyond one.
constexpr int kLeastPages = 4;
constexpr int kRunsPerThread = 2;

void* aligned_memory(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

// Memory in pieces aligned to cache lines. Without memory, it only counts.
class Pieces {
   public:
    explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(size_t count) {
        T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

   private:
    char* memory_;
    size_t used_ = 0;
};

struct Job {
    const KvqCodes *key, *value;
    const KvqAttention* call;
    int sets;        // that the query heads of a key-value head are divided into
    int runs;        // that the pages are divided into
    bool halves;     // see in_halves
    int32_t *partner, *pair_of;  // [key size]
    float* partial;  // [pieces][kMostGroup * (value size + 2)]
    size_t partial_stride;
    std::atomic<int64_t> next;
    std::atomic<int32_t> status;
};

int first_of_set(const Job& job, int set) { return static_cast<int64_t>(job.call->group) * set / job.sets; }

void take_head(Pieces& pieces, const KvqCodes& codes, bool keys, Head& head, float*& tables, float*& constants) {
    const size_t size = codes.size;
    head = {};
    head.codes = &codes;
    head.column = pieces.take<Column>(size);
    head.couple = pieces.take<Couple>(size);
    head.single = pieces.take<int32_t>(size);
    tables = pieces.take<float>(size * kTableFloats);
    constants = nullptr;
    if (codes.token_scales != 0 && codes.scale != nullptr) head.residual_factor = pieces.take<float>(size);
    if (codes.token_scales != 0 && keys) {
        head.factor = pieces.take<Column>(size);
        head.sum = pieces.take<Column>(size);
        constants = pieces.take<float>(2 * size);
    }
}

// Workspace of a thread.
struct Workplace {
    Room room;
    float *key_tables, *value_tables, *key_constants, *value_constants;
    float* query;   // [kMostGroup, whole_vectors(key size)], for exact keys
    float* number;  // [size] of either

    size_t lay_out(void* memory, const Job& job, int group) {
        Pieces pieces(memory);
        const size_t keys = job.key->size, values = job.value->size, g = group;
        take_head(pieces, *job.key, true, room.key, key_tables, key_constants);
        take_head(pieces, *job.value, false, room.value, value_tables, value_constants);
        room.score = pieces.take<float>(g * kPageTokens);
        room.weight = pieces.take<float>(g * kPageTokens);
        room.extra[0] = room.extra[1] = nullptr;
        if (job.key->token_scales != 0)
            for (float*& extra : room.extra) extra = pieces.take<float>(g * kPageTokens);
        room.token = pieces.take<float>(2 * kPageTokens);
        room.query = pieces.take<float>(keys * g);
        room.sum = pieces.take<float>(values * g * kLanes);
        room.outlier_sum = pieces.take<float>(values * g);
        query = pieces.take<float>(g * whole_vectors(job.key->size));
        number = pieces.take<float>(whole_vectors(job.key->size > job.value->size ? job.key->size : job.value->size));
        return pieces.used();
    }
};

// Couples in the order of their kinds and widths, so that similar ones follow each other.
void sort_couples(const KvqCodes& codes, int64_t first_channel, Head& head) {
    auto rank = [&](const Couple& couple) {
        return (couple.kind * 16 + codes.width[first_channel + couple.first]) * 16 +
               codes.width[first_channel + couple.second];
    };
    for (int n = 1; n < head.couples; n++) {
        const Couple moved = head.couple[n];
        const int own = rank(moved);
        int at = n;
        for (; at > 0 && rank(head.couple[at - 1]) > own; at--) head.couple[at] = head.couple[at - 1];
        head.couple[at] = moved;
    }
}

void prepare_columns(const KvqCodes& codes, int64_t first_channel, float* tables, Head& head) {
    for (int n = 0; n < head.couples; n++) {
        const Couple& couple = head.couple[n];
        for (int i : {couple.first, couple.second})
            prepare_column(codes, first_channel + i, couple.kind, tables + i * kTableFloats, head.column[i]);
    }
    for (int n = 0; n < head.singles; n++) {
        const int i = head.single[n];
        prepare_column(codes, first_channel + i, kind_of(codes, first_channel + i), tables + i * kTableFloats,
                       head.column[i]);
    }
    if (head.residual_factor != nullptr)
        for (int i = 0; i < codes.size; i++) head.residual_factor[i] = codes.scale[first_channel + i];
}

Couple couple_of(const KvqCodes& codes, int64_t first_channel, int first, int second, int pair) {
    const int32_t a = kind_of(codes, first_channel + first), b = kind_of(codes, first_channel + second);
    return {first, second, pair, a > b ? a : b};
}

void prepare_keys(const Job& job, int head_number, Workplace& place) {
    const KvqCodes& codes = *job.key;
    const KvqTurns& turns = job.call->turns;
    Head& head = place.room.key;
    const int64_t first_channel = static_cast<int64_t>(head_number) * codes.size;
    head.couples = head.singles = 0;
    for (int p = 0; p < turns.pairs; p++)
        head.couple[head.couples++] = couple_of(codes, first_channel, turns.pair[2 * p], turns.pair[2 * p + 1], p);
    for (int i = 0; i < codes.size; i++)
        if (job.partner[i] < 0) head.single[head.singles++] = i;
    sort_couples(codes, first_channel, head);
    prepare_columns(codes, first_channel, place.key_tables, head);
    if (head.factor == nullptr) return;
    for (int i = 0; i < codes.size; i++) {
        float* constant = place.key_constants + 2 * i;
        constant[0] = codes.scale != nullptr ? codes.scale[first_channel + i] : 1.0f;
        constant[1] = codes.scale != nullptr ? codes.zero_point[first_channel + i] : 0.0f;
        head.factor[i] = {kConstant, 0, false, 0, constant, nullptr};
        head.sum[i] = {kConstant, 0, false, 0, constant + 1, nullptr};
    }
}

void prepare_values(const Job& job, int head_number, Workplace& place) {
    const KvqCodes& codes = *job.value;
    Head& head = place.room.value;
    const int64_t first_channel = static_cast<int64_t>(head_number) * codes.size;
    head.couples = head.singles = 0;
    // Neighbours in the order of their widths. The last of an odd number is paired with itself, which changes nothing.
    int32_t* order = head.single;
    int count = 0;
    for (int width = 0; width <= 8; width++)
        for (int i = 0; i < codes.size; i++)
            if (codes.width[first_channel + i] == width) order[count++] = i;
    for (int n = 0; n < codes.size; n += 2)
        head.couple[head.couples++] =
            couple_of(codes, first_channel, order[n], order[n + 1 < codes.size ? n + 1 : n], 0);
    prepare_columns(codes, first_channel, place.value_tables, head);
}

// Queries of a set, scaled to log2: [count, whole_vectors(size)] for exact keys, [size, count] for packed ones.
void prepare_queries(const Job& job, int sequence, int head, int first, int count, Workplace& place) {
    const KvqAttention& call = *job.call;
    const KvqTurns& turns = call.turns;
    const int size = job.key->size, stride = whole_vectors(size);
    const float scale = call.scale * kLog2E;
    for (int g = 0; g < count; g++) {
        const int64_t row = (static_cast<int64_t>(sequence) * job.key->heads + head) * call.group + first + g;
        const float* from = call.query + row * size;
        float* exact = place.query + g * stride;
        for (int i = 0; i < stride; i++) exact[i] = i < size ? from[i] * scale : 0.0f;
        if (turns.scaling != 1.0f)
            for (int n = 0; n < 2 * turns.pairs; n++) exact[turns.pair[n]] *= turns.scaling;
        float* packed = place.room.query + g;
        for (int i = 0; i < size; i++) packed[i * count] = exact[i];
        if (turns.own_cosine == nullptr) continue;
        const float* cosine = turns.own_cosine + static_cast<int64_t>(head) * turns.pairs;
        const float* sine = turns.own_sine + static_cast<int64_t>(head) * turns.pairs;
        for (int p = 0; p < turns.pairs; p++) {
            const int a = turns.pair[2 * p], b = turns.pair[2 * p + 1];
            packed[a * count] = exact[a] * cosine[p] - exact[b] * sine[p];
            packed[b * count] = exact[a] * sine[p] + exact[b] * cosine[p];
        }
    }
}

void attend_packed(int count, const View& view, const Room& room, int from, int to, float cap, float* out,
                   float* highest, float* total) {
    switch (count) {
        case 1: return attend_pages<1>(view, room, from, to, cap, out, highest, total);
        case 2: return attend_pages<2>(view, room, from, to, cap, out, highest, total);
        case 3: return attend_pages<3>(view, room, from, to, cap, out, highest, total);
        default: return attend_pages<4>(view, room, from, to, cap, out, highest, total);
    }
}

void attend_exact(const Job& job, int sequence, int head, int count, float cap, Workplace& place, float* out,
                  float* highest, float* total) {
    const KvqAttention& call = *job.call;
    const int keys = job.key->size, values = job.value->size;
    const int all_tokens = call.sinks.tokens + call.tail.tokens;
    for (int i = 0; i < count * values; i++) out[i] = 0;
    for (int g = 0; g < count; g++) {
        highest[g] = kHidden;
        total[g] = 0;
    }
    int done = 0;
    for (const KvqExact* part : {&call.sinks, &call.tail}) {
        const uint16_t* key = part->key + sequence * part->key_stride[0] + head * part->key_stride[1];
        const uint16_t* value = part->value + sequence * part->value_stride[0] + head * part->value_stride[1];
        for (int t = 0; t < part->tokens; t += kExactTokens) {
            const int left = part->tokens - t;
            const int64_t column = static_cast<int64_t>(sequence) * all_tokens + done + t;
            const ExactRun run = {key + static_cast<int64_t>(t) * keys, value + static_cast<int64_t>(t) * values,
                                  call.turns.exact + column * 2 * call.turns.pairs, call.exact_seen + column,
                                  left < kExactTokens ? left : kExactTokens};
            attend_run(call.turns, job.halves, run, count, keys, values, job.key->bfloat != 0, cap, place.query,
                       place.number, out, highest, total);
        }
        done += part->tokens;
    }
}

// Runs of pages of a head follow each other, so that a thread can reuse prepared columns.
struct Piece {
    int sequence, head, set, run;
};
int runs_of(const Job& job) { return job.runs + (job.call->sinks.tokens + job.call->tail.tokens > 0); }
Piece piece_of(const Job& job, int64_t number) {
    const int runs = runs_of(job);
    const int run = static_cast<int>(number % runs);
    number /= runs;
    const int set = static_cast<int>(number % job.sets);
    number /= job.sets;
    return {static_cast<int>(number / job.key->heads), static_cast<int>(number % job.key->heads), set, run};
}

void attend_pieces(void* of) {
    Job& job = *static_cast<Job*>(of);
    const KvqAttention& call = *job.call;
    const int64_t pieces = static_cast<int64_t>(call.batch) * job.key->heads * job.sets * runs_of(job);
    const int most = (call.group + job.sets - 1) / job.sets;
    Workplace place;
    void* memory = aligned_memory(place.lay_out(nullptr, job, most));
    if (memory == nullptr) {
        job.status = KVQ_NO_MEMORY;
        return;
    }
    place.lay_out(memory, job, most);
    const float cap = call.softcap * kLog2E;
    int ready = -1;
    for (int64_t number = job.next++; number < pieces; number = job.next++) {
        const Piece piece = piece_of(job, number);
        const int first = first_of_set(job, piece.set), count = first_of_set(job, piece.set + 1) - first;
        float* out = job.partial + number * job.partial_stride;
        float *highest = out + static_cast<int64_t>(count) * job.value->size, *total = highest + count;
        prepare_queries(job, piece.sequence, piece.head, first, count, place);
        if (piece.run == job.runs) {
            attend_exact(job, piece.sequence, piece.head, count, cap, place, out, highest, total);
            continue;
        }
        if (ready != piece.head) {
            prepare_keys(job, piece.head, place);
            prepare_values(job, piece.head, place);
            ready = piece.head;
        }
        const View view = {&call, job.partner, job.pair_of, piece.sequence, piece.head};
        const int from = static_cast<int>(static_cast<int64_t>(call.pages) * piece.run / job.runs);
        const int to = static_cast<int>(static_cast<int64_t>(call.pages) * (piece.run + 1) / job.runs);
        attend_packed(count, view, place.room, from, to, cap, out, highest, total);
    }
    std::free(memory);
}

// Join the partial results of a set of query heads.
void join(const Job& job, int64_t first_piece, int count, const float* logit, float* to) {
    const int size = job.value->size, runs = runs_of(job);
    for (int g = 0; g < count; g++) {
        float high = logit != nullptr ? logit[g] * kLog2E : kHidden;
        for (int run = 0; run < runs; run++) {
            const float* highest = job.partial + (first_piece + run) * job.partial_stride + count * size;
            high = highest[g] > high ? highest[g] : high;
        }
        float total = logit != nullptr ? std::exp2(logit[g] * kLog2E - high) : 0.0f;
        float* out = to + g * size;
        for (int i = 0; i < size; i++) out[i] = 0;
        for (int run = 0; run < runs; run++) {
            const float* from = job.partial + (first_piece + run) * job.partial_stride;
            const float highest = from[count * size + g];
            if (highest <= kHidden) continue;
            const float by = std::exp2(highest - high);
            total += by * from[count * size + count + g];
            for (int i = 0; i < size; i++) out[i] += by * from[g * size + i];
        }
        const float inverse = total > 0 ? 1.0f / total : 0.0f;
        for (int i = 0; i < size; i++) out[i] *= inverse;
    }
}

int32_t attend(Job& job) {
    const KvqAttention& call = *job.call;
    const int64_t heads = static_cast<int64_t>(call.batch) * job.key->heads;
    job.sets = (call.group + kMostGroup - 1) / kMostGroup;
    const int threads = call.threads < 1 ? 1 : call.threads;
    // Enough runs that threads end at about the same time. Their number depends only on sizes and the number of
    // threads.
    job.runs = call.pages == 0 ? 0 : 1;
    if (threads > 1 && call.pages > 0) {
        const int64_t wanted = (kRunsPerThread * threads + heads * job.sets - 1) / (heads * job.sets) * 2;
        const int64_t possible = (call.pages + kLeastPages - 1) / kLeastPages;
        job.runs = static_cast<int>(wanted < possible ? wanted : possible);
    }
    job.halves = in_halves(call.turns);
    const int64_t pieces = heads * job.sets * runs_of(job);
    const int most = (call.group + job.sets - 1) / job.sets;
    job.partial_stride = (static_cast<size_t>(most) * (job.value->size + 2) + 15) / 16 * 16;
    const size_t keys = (job.key->size + 15) / 16 * 16;
    void* memory = aligned_memory(sizeof(float) * job.partial_stride * pieces + 2 * sizeof(int32_t) * keys + 64);
    if (memory == nullptr) return KVQ_NO_MEMORY;
    job.partial = static_cast<float*>(memory);
    job.partner = reinterpret_cast<int32_t*>(job.partial + job.partial_stride * pieces);
    job.pair_of = job.partner + keys;
    for (int i = 0; i < job.key->size; i++) job.partner[i] = job.pair_of[i] = -1;
    for (int p = 0; p < call.turns.pairs; p++)
        for (int n = 0; n < 2; n++) {
            job.partner[call.turns.pair[2 * p + n]] = call.turns.pair[2 * p + 1 - n];
            job.pair_of[call.turns.pair[2 * p + n]] = p;
        }
    run_on_threads(static_cast<int>(threads < pieces ? threads : pieces), attend_pieces, &job);
    if (job.status == KVQ_OK)
        for (int64_t head = 0; head < heads; head++)
            for (int set = 0; set < job.sets; set++) {
                const int first = first_of_set(job, set), count = first_of_set(job, set + 1) - first;
                const int64_t row = head * call.group + first;
                const float* logit = call.sink_logit;
                if (logit != nullptr) logit += head % job.key->heads * call.group + first;
                join(job, (head * job.sets + set) * runs_of(job), count, logit, call.out + row * job.value->size);
            }
    std::free(memory);
    return job.status;
}

struct Calls {
    const KvqCodes *key, *value;
    const KvqAttention* call;
    int count;
    std::atomic<int> next;
    std::atomic<int32_t> status;
};

int32_t attend_one(const KvqCodes* key, const KvqCodes* value, KvqAttention call, int threads) {
    call.threads = threads;
    Job job = {key, value, &call, 1, 0, false, nullptr, nullptr, nullptr, 0, {0}, {KVQ_OK}};
    return attend(job);
}

void attend_calls(void* of) {
    Calls& calls = *static_cast<Calls*>(of);
    for (int number = calls.next++; number < calls.count; number = calls.next++) {
        const int32_t status = attend_one(calls.key, calls.value, calls.call[number], 1);
        if (status != KVQ_OK) calls.status = status;
    }
}

}  // namespace
}  // namespace kvq

extern "C" {

int32_t kvq_attend_each(const KvqCodes* key, const KvqCodes* value, const KvqAttention* calls, int32_t count,
                        int32_t threads) {
    using namespace kvq;
    if (key == nullptr || value == nullptr || count < 0 || (count > 0 && calls == nullptr)) return KVQ_BAD_ARGUMENT;
    for (int n = 0; n < count; n++)
        if (!is_sound(*key, *value, calls[n])) return KVQ_BAD_ARGUMENT;
    if (count < threads) {  // each is divided itself
        int32_t status = KVQ_OK;
        for (int n = 0; n < count && status == KVQ_OK; n++) status = attend_one(key, value, calls[n], threads);
        return status;
    }
    Calls all = {key, value, calls, count, {0}, {KVQ_OK}};
    run_on_threads(threads, attend_calls, &all);
    return all.status;
}

int32_t kvq_attend(const KvqCodes* key, const KvqCodes* value, const KvqAttention* call) {
    using namespace kvq;
    if (key == nullptr || value == nullptr || call == nullptr) return KVQ_BAD_ARGUMENT;
    if (!is_sound(*key, *value, *call)) return KVQ_BAD_ARGUMENT;
    Job job = {key, value, call, 1, 0, false, nullptr, nullptr, nullptr, 0, {0}, {KVQ_OK}};
    return attend(job);
}

int32_t kvq_turns_within(const double* frequency, int32_t pairs, float* within) {
    using namespace kvq;
    if (pairs < 0 || (pairs > 0 && (frequency == nullptr || within == nullptr))) return KVQ_BAD_ARGUMENT;
    for (int p = 0; p < pairs; p++)
        for (int vector = 0; vector < kVectors; vector++)
            for (int lane = 0; lane < 4; lane++) {
                const double angle = token_at(vector, lane) * frequency[p];
                float* at = within + 64 * p + 8 * vector + lane;
                at[0] = static_cast<float>(std::cos(angle));
                at[4] = static_cast<float>(std::sin(angle));
            }
    return KVQ_OK;
}

int32_t kvq_turns_of_blocks(const double* frequency, int32_t pairs, const int32_t* position, int64_t pages,
                            float* block) {
    using namespace kvq;
    if (pairs < 0 || pages < 0) return KVQ_BAD_ARGUMENT;
    if (pairs == 0 || pages == 0) return KVQ_OK;
    if (frequency == nullptr || position == nullptr || block == nullptr) return KVQ_BAD_ARGUMENT;
    for (int64_t page = 0; page < pages; page++)
        for (int p = 0; p < pairs; p++)
            for (int b = 0; b < kPageBlocks; b++) {
                const double angle = position[page * kPageBlocks + b] * frequency[p];
                float* at = block + (page * pairs + p) * 16 + b;
                at[0] = static_cast<float>(std::cos(angle));
                at[8] = static_cast<float>(std::sin(angle));
            }
    return KVQ_OK;
}
}
