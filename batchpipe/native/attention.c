/* Causal attention over paged KV for decodes and prefill chunks, with an online softmax (Milakov and Gimelshein,
 * arXiv 1805.02867) that is carried from block to block.
 *
 * A tile is up to TILE_ROWS rows of one sequence that read one KV head: the query heads of its group times the new
 * tokens that fit; for a decode, the group alone. Reading keys and values is what takes the time, so every block is
 * fetched while the one before it is computed, across the end of a tile too.
 */
#include "attention.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { TILE_ROWS = 32, TILES_AT_ONCE = 16, LANES = 16 };

struct attention_step {
    const int32_t *query_starts;    /* [num_sequences + 1] */
    const int32_t *context_lengths; /* [num_sequences] */
    const int32_t *block_tables;    /* [num_sequences], rows of table_width */
    int64_t num_sequences, table_width;
    char *blocks;         /* block 0 of this layer: [2, num_kv_heads, block_tokens, head_dim] */
    int64_t block_stride; /* elements, from one block to the next */
    int64_t num_heads, num_kv_heads, head_dim, block_tokens;
    const char *query, *key, *value; /* strides in elements */
    int64_t query_token_stride, query_head_stride;
    int64_t key_token_stride, key_head_stride;
    int64_t value_token_stride, value_head_stride;
    char *output; /* [num_tokens, num_heads, head_dim] */
    const float *sinks; /* [num_heads] or null */
    int64_t sliding_window; /* none: larger than any sequence */
    float scale;
    float softcap; /* 0: none */
    int64_t num_threads;
};

struct tile {
    int32_t sequence;
    int32_t first_query; /* within the sequence's new tokens */
};

/* One thread's working memory. */
struct scratch {
    _Alignas(64) char queries[TILE_ROWS * HEAD_LIMIT * sizeof(float)];
    _Alignas(64) float sums[TILE_ROWS * HEAD_LIMIT];
    _Alignas(64) float scores[ROWS * BLOCK_LIMIT];
    float maxima[TILE_ROWS], totals[TILE_ROWS];
};

/* e^x for x <= 0 to two units in the last place, 0 where that is too small; compilers vectorise it. */
static inline float exponential(float x) {
    const float limited = x < -87.0f ? -87.0f : x;
    const float n = rintf(limited * 1.44269504f);
    const float r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t bits; float value; } power = {(uint32_t)((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * power.value;
}

/* Turns scores [begin, end) into weights and the others of the `padded` into 0. Returns the factor for what was summed
 * so far. `padded` is a multiple of LANES, so that the vectorised loops have no rest.
 */
static float softmax_block(const struct attention_step *step, float *scores, int begin, int end, int padded,
                           float *maximum, float *total) {
    if (begin >= end) {
        memset(scores, 0, (size_t)padded * sizeof(float));
        return 1.0f;
    }
    if (step->softcap > 0.0f)
        for (int j = begin; j < end; j++) scores[j] = step->softcap * tanhf(scores[j] * step->scale / step->softcap);
    const float scale = step->softcap > 0.0f ? 1.0f : step->scale;
    float highest = *maximum, sum = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int j = 0; j < padded; j++) {
        const float score = j >= begin && j < end ? scores[j] * scale : -INFINITY;
        highest = highest > score ? highest : score;
        scores[j] = score;
    }
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < padded; j++) {
        scores[j] = exponential(scores[j] - highest);
        sum += scores[j];
    }
    const float factor = *maximum == highest ? 1.0f : expf(*maximum - highest);
    *total = *total * factor + sum;
    *maximum = highest;
    return factor;
}

/* A run of keys in one block. */
struct piece {
    const char *keys;
    int64_t count;
};

/* The block that holds token `token` of a sequence: its keys for one KV head; its values lie one half block further. */
static const char *block_keys(const struct attention_step *step, size_t element_bytes, int64_t sequence, int64_t token,
                              int64_t kv_head) {
    int64_t block = step->block_tables[sequence * step->table_width + token / step->block_tokens];
    int64_t rows = kv_head * step->block_tokens;
    return step->blocks + (block * step->block_stride + rows * step->head_dim) * (int64_t)element_bytes;
}

static int64_t first_key(const struct attention_step *step, int64_t position) {
    return at_least(0, position + 1 - step->sliding_window);
}

static int64_t tile_queries(const struct attention_step *step) {
    return at_least(1, TILE_ROWS / (step->num_heads / step->num_kv_heads));
}

/* The keys from `key` to the end of its block, or of those the sequence has before `end_position`. */
static struct piece piece_at(const struct attention_step *step, size_t element_bytes, int64_t sequence, int64_t key,
                             int64_t end_position, int64_t kv_head) {
    const int64_t offset = key % step->block_tokens;
    return (struct piece){
        block_keys(step, element_bytes, sequence, key, kv_head) + offset * step->head_dim * (int64_t)element_bytes,
        at_most(step->block_tokens - offset, end_position - key),
    };
}

/* The first keys that a tile reads. */
static struct piece first_piece(const struct attention_step *step, size_t element_bytes, struct tile tile,
                                int64_t kv_head) {
    const int64_t position = step->context_lengths[tile.sequence] + tile.first_query;
    const int64_t num_new = step->query_starts[tile.sequence + 1] - step->query_starts[tile.sequence];
    const int64_t end = step->context_lengths[tile.sequence] + at_most(tile.first_query + tile_queries(step), num_new);
    return piece_at(step, element_bytes, tile.sequence, first_key(step, position), end, kv_head);
}

static void attend(const struct attention_step *step, const struct elements *elements, struct tile tile,
                   int64_t kv_head, struct piece next_tile, struct scratch *scratch) {
    const int64_t head_dim = step->head_dim, bytes = (int64_t)elements->bytes;
    const int64_t group = step->num_heads / step->num_kv_heads;
    const int64_t half_block_bytes = step->num_kv_heads * step->block_tokens * head_dim * bytes;
    const int64_t sequence_start = step->query_starts[tile.sequence];
    const int64_t num_queries = at_most(
        tile_queries(step), step->query_starts[tile.sequence + 1] - sequence_start - tile.first_query);
    const int64_t num_rows = num_queries * group;
    const int64_t first_position = step->context_lengths[tile.sequence] + tile.first_query;
    const int64_t end_position = first_position + num_queries;
    const int64_t first_token = sequence_start + tile.first_query;

    for (int64_t row = 0; row < num_rows; row++) {
        int64_t head = kv_head * group + row % group;
        char *query = scratch->queries + row * HEAD_LIMIT * bytes;
        memcpy(query,
               step->query + ((first_token + row / group) * step->query_token_stride +
                              head * step->query_head_stride) * bytes,
               (size_t)(head_dim * bytes));
        memset(query + head_dim * bytes, 0, (size_t)((HEAD_LIMIT - head_dim) * bytes));
        memset(scratch->sums + row * HEAD_LIMIT, 0, HEAD_LIMIT * sizeof(float));
        scratch->maxima[row] = step->sinks ? step->sinks[head] : -INFINITY;
        scratch->totals[row] = step->sinks ? 1.0f : 0.0f;
    }

    for (int64_t key = first_key(step, first_position); key < end_position;) {
        const struct piece piece = piece_at(step, elements->bytes, tile.sequence, key, end_position, kv_head);
        const char *keys = piece.keys;
        const int64_t block_end = key + piece.count;
        const struct piece next =
            block_end < end_position
                ? piece_at(step, elements->bytes, tile.sequence, block_end, end_position, kv_head)
                : next_tile;
        struct ahead ahead = {next.keys, next.count * head_dim * bytes, 0};
        for (int64_t row = 0; row < num_rows; row += ROWS) {
            const int rows = (int)at_most(ROWS, num_rows - row);
            const int64_t last_position = first_position + (row + rows - 1) / group;
            const int64_t count = at_most(block_end, last_position + 1) - key;
            if (count <= 0) continue;
            const int padded = (int)((count + LANES - 1) / LANES * LANES);
            float *sums = scratch->sums + row * HEAD_LIMIT;
            ahead.bytes_per_key = (next.count + count - 1) / count * head_dim * bytes;
            elements->score(rows, head_dim, scratch->queries + row * HEAD_LIMIT * bytes, keys, count,
                            ahead, scratch->scores);
            for (int i = 0; i < rows; i++) {
                const int64_t position = first_position + (row + i) / group;
                float factor = softmax_block(step, scratch->scores + i * BLOCK_LIMIT,
                                             (int)at_least(0, first_key(step, position) - key),
                                             (int)at_most(count, position + 1 - key), padded,
                                             &scratch->maxima[row + i], &scratch->totals[row + i]);
                if (factor != 1.0f)
                    for (int64_t d = 0; d < HEAD_LIMIT; d++) sums[i * HEAD_LIMIT + d] *= factor;
            }
            elements->accumulate(rows, head_dim, scratch->scores, keys + half_block_bytes, count,
                                 (struct ahead){ahead.start + half_block_bytes, ahead.bytes, ahead.bytes_per_key},
                                 sums);
            ahead.bytes = 0;
        }
        key = block_end;
    }

    for (int64_t row = 0; row < num_rows; row++) {
        int64_t output_row = (first_token + row / group) * step->num_heads + kv_head * group + row % group;
        elements->finish(head_dim, scratch->sums + row * HEAD_LIMIT, 1.0f / scratch->totals[row],
                         step->output + output_row * head_dim * bytes);
    }
}

/* Copies the new tokens' keys and values of one sequence to its blocks. */
static void write_kv(const struct attention_step *step, int64_t bytes, int64_t sequence) {
    const size_t row_bytes = (size_t)(step->head_dim * bytes);
    const int64_t half_block_bytes = step->num_kv_heads * step->block_tokens * step->head_dim * bytes;
    int64_t position = step->context_lengths[sequence];
    for (int64_t token = step->query_starts[sequence]; token < step->query_starts[sequence + 1]; token++, position++) {
        for (int64_t head = 0; head < step->num_kv_heads; head++) {
            char *row = (char *)block_keys(step, (size_t)bytes, sequence, position, head) +
                        position % step->block_tokens * step->head_dim * bytes;
            int64_t key = token * step->key_token_stride + head * step->key_head_stride;
            int64_t value = token * step->value_token_stride + head * step->value_head_stride;
            memcpy(row, step->key + key * bytes, row_bytes);
            memcpy(row + half_block_bytes, step->value + value * bytes, row_bytes);
        }
    }
}

/* Lists the step's tiles in `tiles`, or only counts them where it is null. */
static int64_t list_tiles(const struct attention_step *step, struct tile *tiles) {
    int64_t count = 0;
    for (int32_t sequence = 0; sequence < step->num_sequences; sequence++) {
        int32_t num_queries = step->query_starts[sequence + 1] - step->query_starts[sequence];
        for (int32_t query = 0; query < num_queries; query += (int32_t)tile_queries(step), count++)
            if (tiles) tiles[count] = (struct tile){sequence, query};
    }
    return count;
}

static int run(const struct attention_step *step, const struct elements *elements) {
    const int64_t num_heads = step->num_kv_heads, num_tiles = list_tiles(step, NULL);
    const int64_t num_items = num_tiles * num_heads;
    struct tile *tiles = malloc((size_t)num_tiles * sizeof(struct tile));
    if (!tiles) return -1;
    list_tiles(step, tiles);
    const int64_t share = num_items / (8 * step->num_threads);
    const int chunk = (int)at_least(1, at_most(TILES_AT_ONCE, share));
#pragma omp parallel num_threads((int)step->num_threads)
    {
        struct scratch scratch;
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < step->num_sequences; sequence++)
            write_kv(step, (int64_t)elements->bytes, sequence);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t item = 0; item < num_items; item++) {
            const int64_t next = at_most(item + 1, num_items - 1);
            attend(step, elements, tiles[item / num_heads], item % num_heads,
                   first_piece(step, elements->bytes, tiles[next / num_heads], next % num_heads), &scratch);
        }
    }
    free(tiles);
    return 0;
}

/* Both return 0, or -1 where memory ran out. */
int batchpipe_attention_float32(const struct attention_step *step) { return run(step, &float32_elements); }
int batchpipe_attention_bfloat16(const struct attention_step *step) { return run(step, &bfloat16_elements); }
