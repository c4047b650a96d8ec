/* The small steps of a layer between its matrix products, in bfloat16: one pass each, arithmetic in float32. */
#include "bfloat16.h"

#include <math.h>

/* output = input / sqrt(mean(input^2) + epsilon) * weight; `rounded_first`: rounded to bfloat16 before the weight, too.
 * input and output [num_rows, width], weight [width].
 */
void batchpipe_rms_norm(const bfloat16 *input, const float *weight, bfloat16 *output, int64_t num_rows, int64_t width,
                        float epsilon, int64_t rounded_first, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads((int)num_threads)
    for (int64_t row = 0; row < num_rows; row++) {
        const bfloat16 *from = input + row * width;
        bfloat16 *to = output + row * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += bfloat16_to_float(from[i]) * bfloat16_to_float(from[i]);
        const float factor = 1.0f / sqrtf(squares / (float)width + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float normed = bfloat16_to_float(from[i]) * factor;
            if (rounded_first) normed = bfloat16_to_float(bfloat16_from_float(normed));
            to[i] = bfloat16_from_float(normed * weight[i]);
        }
    }
}

/* Rotates the number pairs (i, i + rotary_dim / 2) of every head by its token's angles, in place; numbers from rotary_dim
 * on stay. heads [num_tokens, num_heads, head_dim] with `token_stride` numbers from token to token; cosines and sines
 * [num_tokens, rotary_dim].
 */
void batchpipe_rotate(bfloat16 *heads, const bfloat16 *cosines, const bfloat16 *sines, int64_t num_tokens,
                      int64_t num_heads, int64_t head_dim, int64_t rotary_dim, int64_t token_stride,
                      int64_t num_threads) {
    const int64_t half = rotary_dim / 2;
#pragma omp parallel for schedule(static) num_threads((int)num_threads)
    for (int64_t token = 0; token < num_tokens; token++) {
        const bfloat16 *cosine = cosines + token * rotary_dim, *sine = sines + token * rotary_dim;
        for (int64_t head = 0; head < num_heads; head++) {
            bfloat16 *first = heads + token * token_stride + head * head_dim, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                const float a = bfloat16_to_float(first[i]), b = bfloat16_to_float(second[i]);
                first[i] = bfloat16_from_float(a * bfloat16_to_float(cosine[i]) - b * bfloat16_to_float(sine[i]));
                second[i] = bfloat16_from_float(b * bfloat16_to_float(cosine[half + i]) +
                                                a * bfloat16_to_float(sine[half + i]));
            }
        }
    }
}
