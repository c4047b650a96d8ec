/* `struct elements` for one element type in plain C, left to the compiler to vectorise. Included once per type, with
 * ELEMENT, TO_FLOAT(element), FROM_FLOAT(number) and NAME(function) defined.
 */
static void NAME(score)(int rows, int64_t head_dim, const void *queries, const void *keys, int64_t count,
                        struct ahead ahead, float *scores) {
    for (int64_t j = 0; j < count; j++) {
        const ELEMENT *key = (const ELEMENT *)keys + j * head_dim;
        fetch(ahead, j, 1);
        for (int row = 0; row < rows; row++) {
            const ELEMENT *query = (const ELEMENT *)queries + row * HEAD_LIMIT;
            float score = 0.0f;
#pragma omp simd reduction(+ : score)
            for (int64_t d = 0; d < head_dim; d++) score += TO_FLOAT(query[d]) * TO_FLOAT(key[d]);
            scores[row * BLOCK_LIMIT + j] = score;
        }
    }
}

static void NAME(accumulate)(int rows, int64_t head_dim, const float *weights, const void *values, int64_t count,
                             struct ahead ahead, float *sums) {
    const ELEMENT *value = values;
    for (int64_t j = 0; j < count; j += 4) {
        const ELEMENT *v0 = value + j * head_dim, *v1 = value + at_most(j + 1, count - 1) * head_dim;
        const ELEMENT *v2 = value + at_most(j + 2, count - 1) * head_dim;
        const ELEMENT *v3 = value + at_most(j + 3, count - 1) * head_dim;
        fetch(ahead, j, 4);
        for (int row = 0; row < rows; row++) {
            const float *weight = weights + row * BLOCK_LIMIT + j;
            float *sum = sums + row * HEAD_LIMIT;
            const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
#pragma omp simd
            for (int64_t d = 0; d < head_dim; d++)
                sum[d] += w0 * TO_FLOAT(v0[d]) + w1 * TO_FLOAT(v1[d]) + w2 * TO_FLOAT(v2[d]) + w3 * TO_FLOAT(v3[d]);
        }
    }
}

static void NAME(finish)(int64_t head_dim, const float *sums, float factor, void *output) {
    ELEMENT *element = output;
    for (int64_t d = 0; d < head_dim; d++) element[d] = FROM_FLOAT(sums[d] * factor);
}
