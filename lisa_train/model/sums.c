/* Sums over the elements of tensors, all that are asked for in one pass over memory.

   Compiled and called by lisa_train/model/compiled.py. Elements are added in fp32 within rows of
   ROW (vectorised: -fassociative-math), rows in double precision, blocks of rows in order: the
   result does not depend on the number of threads. ROW and BLOCK, whole rows, are given there. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { SQUARE, SQUARE_AND_MAGNITUDE, CHANGE, CHANGE_AND_PRODUCT, PRODUCT };
enum { FLOAT32, BFLOAT16 };

typedef struct {
    const void *start;
    int type;
} Tensor;

/* A row in fp32: where it is, or widened into `room`. */
static const float *row(const Tensor *tensor, long begin, long count, float *room) {
    if (tensor->type == FLOAT32)
        return (const float *)tensor->start + begin;
    const uint16_t *narrow = (const uint16_t *)tensor->start + begin;
    for (long i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)narrow[i] << 16;
        memcpy(room + i, &bits, sizeof bits);
    }
    return room;
}

static void add_row(int kind, const float *x, const float *y, const float *z, long count,
                    double *sums) {
    float a = 0, b = 0, c = 0;
    switch (kind) {
    case SQUARE:
        for (long i = 0; i < count; i++)
            a += x[i] * x[i];
        break;
    case SQUARE_AND_MAGNITUDE:
        for (long i = 0; i < count; i++) {
            a += x[i] * x[i];
            b += fabsf(x[i]);
        }
        break;
    case CHANGE: /* x before, y after */
        for (long i = 0; i < count; i++) {
            float moved = y[i] - x[i];
            a += moved * moved;
            b += y[i] * y[i];
        }
        break;
    case CHANGE_AND_PRODUCT: /* z the gradient */
        for (long i = 0; i < count; i++) {
            float moved = y[i] - x[i];
            a += moved * moved;
            b += y[i] * y[i];
            c += moved * z[i];
        }
        break;
    case PRODUCT:
        for (long i = 0; i < count; i++)
            a += x[i] * y[i];
        break;
    }
    sums[0] += a;
    sums[1] += b;
    sums[2] += c;
}

/* Three sums for each of `blocks`: block i is BLOCK elements of piece owners[i], from firsts[i] on.
   A piece has `width` tensors of sizes[piece] elements each, at starts[piece * width + ...]. */
void lisa_block_sums(int kind, int width, long blocks, const int64_t *owners,
                     const int64_t *firsts, const void *const *starts, const int64_t *types,
                     const int64_t *sizes, double *sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        float room[3][ROW];
        const float *found[3] = {0, 0, 0};
        int64_t piece = owners[block];
        long begin = firsts[block], end = begin + BLOCK;
        if (end > sizes[piece])
            end = sizes[piece];
        double *mine = sums + 3 * block;
        mine[0] = mine[1] = mine[2] = 0;
        for (; begin < end; begin += ROW) {
            long count = end - begin < ROW ? end - begin : ROW;
            for (int i = 0; i < width; i++) {
                Tensor tensor = {starts[piece * width + i], (int)types[piece * width + i]};
                found[i] = row(&tensor, begin, count, room[i]);
            }
            add_row(kind, found[0], found[1], found[2], count, mine);
        }
    }
}
