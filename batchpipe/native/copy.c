/* Copies pieces of KV: many in one call, so that the copying thread takes Python's lock only once. */
#include <stdint.h>
#include <string.h>

/* Piece i goes from sources + source_numbers[i] * source_stride to targets + target_numbers[i] * target_stride. */
void batchpipe_copy_pieces(char *targets, const int64_t *target_numbers, int64_t target_stride, const char *sources,
                           const int64_t *source_numbers, int64_t source_stride, int64_t count, int64_t bytes) {
    for (int64_t i = 0; i < count; i++)
        memcpy(targets + target_numbers[i] * target_stride, sources + source_numbers[i] * source_stride, (size_t)bytes);
}
