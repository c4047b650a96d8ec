/* bfloat16 is the upper half of a float32. */
#pragma once
#include <stdint.h>

typedef uint16_t bfloat16;

static inline float bfloat16_to_float(bfloat16 element) {
    union { uint32_t bits; float value; } number = {(uint32_t)element << 16};
    return number.value;
}

/* To the nearest, ties to even; what is not a number stays so. */
static inline bfloat16 bfloat16_from_float(float value) {
    union { float value; uint32_t bits; } number = {value};
    uint32_t rounded = (number.bits + 0x7fff + ((number.bits >> 16) & 1)) >> 16;
    return (bfloat16)(value != value ? 0x7fc0 : rounded);
}
