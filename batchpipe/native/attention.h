/* What the attention driver (attention.c) asks of the arithmetic for one element type (attention_elements.c).
 *
 * A "row" is one query head of one query token; at most ROWS of them share one pass over a block's keys and values.
 * Weights and scores are [rows][BLOCK_LIMIT] floats, queries [rows][HEAD_LIMIT] elements, zero behind head_dim, and
 * sums [rows][HEAD_LIMIT] floats in whatever order of numbers `accumulate` and `finish` agree on.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { ROWS = 4, BLOCK_LIMIT = 256, HEAD_LIMIT = 256, CACHE_LINE = 64 };

/* Memory that is read next: the keys, or values, of the block after this one. It is fetched a piece a key while this block
 * is worked on, all of it by the last key, however few keys this block has; nothing where `bytes` is 0.
 */
struct ahead {
    const char *start;
    int64_t bytes, bytes_per_key;
};

struct elements {
    size_t bytes; /* of one element */
    /* scores = queries x keys, for `count` keys of head_dim. */
    void (*score)(int rows, int64_t head_dim, const void *queries, const void *keys, int64_t count,
                  struct ahead ahead, float *scores);
    /* sums += weights x values. Reads no value behind `count`. */
    void (*accumulate)(int rows, int64_t head_dim, const float *weights, const void *values, int64_t count,
                       struct ahead ahead, float *sums);
    /* One row of output = sums x factor. */
    void (*finish)(int64_t head_dim, const float *sums, float factor, void *output);
};

extern const struct elements float32_elements, bfloat16_elements;

/* Into the second-level cache: it keeps more reads under way than the first, and holds several blocks. */
static inline void fetch(struct ahead ahead, int64_t first_key, int64_t num_keys) {
    int64_t end = (first_key + num_keys) * ahead.bytes_per_key;
    if (end > ahead.bytes) end = ahead.bytes;
    for (int64_t line = first_key * ahead.bytes_per_key; line < end; line += CACHE_LINE)
        __builtin_prefetch(ahead.start + line, 0, 2);
}

static inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
static inline int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }
