/* The arithmetic of attention.h for float32, and for bfloat16 with or without the processor's own instructions. */
#include "attention.h"
#include "bfloat16.h"

#define ELEMENT float
#define TO_FLOAT(element) (element)
#define FROM_FLOAT(number) (number)
#define NAME(function) float32_##function
#include "attention_portable.h"
#undef ELEMENT
#undef TO_FLOAT
#undef FROM_FLOAT
#undef NAME

const struct elements float32_elements = {sizeof(float), float32_score, float32_accumulate, float32_finish};

#ifndef __AVX512BF16__

#define ELEMENT bfloat16
#define TO_FLOAT bfloat16_to_float
#define FROM_FLOAT bfloat16_from_float
#define NAME(function) bfloat16_##function
#include "attention_portable.h"

#else

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 32 }; /* bfloat16 numbers in a register */

INLINE __m512bh load(const bfloat16 *from, int64_t left) {
    __mmask32 mask = left >= LANES ? 0xffffffffu : (1u << left) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

/* The sums of four registers, in order. */
INLINE __m128 add_across(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

INLINE void score_rows(int rows, int64_t head_dim, const bfloat16 *queries, const bfloat16 *keys, int64_t count,
                       struct ahead ahead, float *scores) {
    for (int64_t j = 0; j < count; j += 4) {
        const bfloat16 *key[4];
        __m512 sums[ROWS][4];
        for (int k = 0; k < 4; k++) key[k] = keys + at_most(j + k, count - 1) * head_dim;
        for (int row = 0; row < rows; row++)
            for (int k = 0; k < 4; k++) sums[row][k] = _mm512_setzero_ps();
        fetch(ahead, j, 4);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            __m512bh loaded[4];
            for (int k = 0; k < 4; k++) loaded[k] = load(key[k] + d, head_dim - d);
            for (int row = 0; row < rows; row++) {
                __m512bh query = (__m512bh)_mm512_loadu_si512(queries + row * HEAD_LIMIT + d);
                for (int k = 0; k < 4; k++) sums[row][k] = _mm512_dpbf16_ps(sums[row][k], loaded[k], query);
            }
        }
        for (int row = 0; row < rows; row++)
            _mm_storeu_ps(scores + row * BLOCK_LIMIT + j,
                          add_across(sums[row][0], sums[row][1], sums[row][2], sums[row][3]));
    }
}

/* Values of two tokens are interleaved, so that one instruction adds both, weighted; the sums of 32 numbers then lie as
 * 0-3 8-11 16-19 24-27, 4-7 12-15 20-23 28-31, which `finish` undoes. `width` registers of numbers go at once.
 */
INLINE void accumulate_columns(int rows, int width, int64_t head_dim, int64_t column, const bfloat16 *weights,
                               const bfloat16 *values, int64_t count, struct ahead ahead, float *sums) {
    __m512 total[ROWS][4];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 2 * width; i++)
            total[row][i] = _mm512_loadu_ps(sums + row * HEAD_LIMIT + column + 16 * i);
    for (int64_t j = 0; j < count; j += 2) {
        const bfloat16 *first = values + j * head_dim + column;
        const bfloat16 *second = values + at_most(j + 1, count - 1) * head_dim + column;
        fetch(ahead, j, 2);
        __m512i pairs[4];
        for (int i = 0; i < width; i++) {
            __m512i a = (__m512i)load(first + i * LANES, head_dim - column - i * LANES);
            __m512i b = (__m512i)load(second + i * LANES, head_dim - column - i * LANES);
            pairs[2 * i] = _mm512_unpacklo_epi16(a, b);
            pairs[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
        }
        for (int row = 0; row < rows; row++) {
            int32_t pair;
            __builtin_memcpy(&pair, weights + row * BLOCK_LIMIT + j, sizeof pair);
            __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            for (int i = 0; i < 2 * width; i++)
                total[row][i] = _mm512_dpbf16_ps(total[row][i], (__m512bh)pairs[i], weight);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 2 * width; i++)
            _mm512_storeu_ps(sums + row * HEAD_LIMIT + column + 16 * i, total[row][i]);
}

INLINE void accumulate_rows(int rows, int64_t head_dim, const float *weights, const bfloat16 *values, int64_t count,
                            struct ahead ahead, float *sums) {
    _Alignas(64) bfloat16 rounded[ROWS * BLOCK_LIMIT];
    for (int row = 0; row < rows; row++)
        for (int64_t j = 0; j < count; j += 16)
            _mm256_storeu_si256((__m256i *)(rounded + row * BLOCK_LIMIT + j),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + row * BLOCK_LIMIT + j)));
    int64_t column = 0;
    for (; column + 2 * LANES <= head_dim; column += 2 * LANES, ahead.bytes = 0)
        accumulate_columns(rows, 2, head_dim, column, rounded, values, count, ahead, sums);
    for (; column < head_dim; column += LANES, ahead.bytes = 0)
        accumulate_columns(rows, 1, head_dim, column, rounded, values, count, ahead, sums);
}

static void bfloat16_finish(int64_t head_dim, const float *sums, float factor, void *output) {
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < head_dim; d += 16) {
        const float *pair = sums + d / LANES * LANES;
        __m512 row = _mm512_permutex2var_ps(_mm512_loadu_ps(pair), d % LANES ? upper : lower,
                                            _mm512_loadu_ps(pair + 16));
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(row, _mm512_set1_ps(factor)));
        _mm256_storeu_si256((__m256i *)((bfloat16 *)output + d), (__m256i)rounded);
    }
}

/* Calls `function` with the number of rows, and the commonest head sizes, known to the compiler. */
#define SPECIALISE(function, rows, head_dim, ...)                              \
    switch (rows * 1024 + head_dim) {                                          \
    case 1 * 1024 + 64: function(1, 64, __VA_ARGS__); break;                   \
    case 2 * 1024 + 64: function(2, 64, __VA_ARGS__); break;                   \
    case 3 * 1024 + 64: function(3, 64, __VA_ARGS__); break;                   \
    case 4 * 1024 + 64: function(4, 64, __VA_ARGS__); break;                   \
    case 1 * 1024 + 128: function(1, 128, __VA_ARGS__); break;                 \
    case 2 * 1024 + 128: function(2, 128, __VA_ARGS__); break;                 \
    case 3 * 1024 + 128: function(3, 128, __VA_ARGS__); break;                 \
    case 4 * 1024 + 128: function(4, 128, __VA_ARGS__); break;                 \
    default:                                                                   \
        switch (rows) {                                                        \
        case 1: function(1, head_dim, __VA_ARGS__); break;                     \
        case 2: function(2, head_dim, __VA_ARGS__); break;                     \
        case 3: function(3, head_dim, __VA_ARGS__); break;                     \
        default: function(4, head_dim, __VA_ARGS__);                           \
        }                                                                      \
    }

static void bfloat16_score(int rows, int64_t head_dim, const void *queries, const void *keys, int64_t count,
                           struct ahead ahead, float *scores) {
    SPECIALISE(score_rows, rows, head_dim, queries, keys, count, ahead, scores)
}

static void bfloat16_accumulate(int rows, int64_t head_dim, const float *weights, const void *values, int64_t count,
                                struct ahead ahead, float *sums) {
    SPECIALISE(accumulate_rows, rows, head_dim, weights, values, count, ahead, sums)
}

#endif

const struct elements bfloat16_elements = {sizeof(bfloat16), bfloat16_score, bfloat16_accumulate, bfloat16_finish};
