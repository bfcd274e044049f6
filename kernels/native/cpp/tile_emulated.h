// The same tiles in plain C++, for tests on a CPU without them. What a CPU would refuse ends the process.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "tile_shapes.h"

namespace {

struct EmulatedTiles {
    motet::TileShapes shapes;
    bool configured = false;
    uint8_t data[8][16][64];
};
thread_local EmulatedTiles emulated;

INLINE void must(bool allowed) {
    if (!allowed) abort();
}
INLINE int rows_of_tile(int t) {
    must(emulated.configured && emulated.shapes.rows[t] > 0);
    return emulated.shapes.rows[t];
}
INLINE int bytes_of_tile(int t) { return emulated.shapes.row_bytes[t]; }

void configure_tiles(const motet::TileShapes* shapes) {
    must(shapes->palette == 1 && shapes->start_row == 0);
    for (int t = 0; t < 8; t++) must(shapes->rows[t] <= 16 && shapes->row_bytes[t] <= 64);
    emulated.shapes = *shapes;
    emulated.configured = true;
    memset(emulated.data, 0, sizeof emulated.data);
}
void release_tiles() { emulated.configured = false; }
template <int T>
void tile_zero() {
    rows_of_tile(T);
    memset(emulated.data[T], 0, sizeof emulated.data[T]);
}
template <int T>
void tile_load(const void* from, int64_t stride) {
    const int rows = rows_of_tile(T);
    memset(emulated.data[T], 0, sizeof emulated.data[T]);
    for (int r = 0; r < rows; r++)
        memcpy(emulated.data[T][r], (const uint8_t*)from + r * stride, size_t(bytes_of_tile(T)));
}
template <int T>
void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < rows_of_tile(T); r++)
        memcpy((uint8_t*)to + r * stride, emulated.data[T][r], size_t(bytes_of_tile(T)));
}
template <class Weight>
void tile_dot(int c, int a, int b) {
    const int rows = rows_of_tile(c), columns = bytes_of_tile(c) / 4, quads = bytes_of_tile(a) / 4;
    must(c != a && c != b && a != b);
    must(rows_of_tile(a) == rows && rows_of_tile(b) == quads && bytes_of_tile(b) == 4 * columns);
    for (int m = 0; m < rows; m++) {
        int32_t sums[16];
        memcpy(sums, emulated.data[c][m], sizeof sums);
        for (int k = 0; k < quads; k++)
            for (int n = 0; n < columns; n++)
                for (int i = 0; i < 4; i++)
                    sums[n] += int32_t(int8_t(emulated.data[a][m][4 * k + i])) * Weight(emulated.data[b][k][4 * n + i]);
        memcpy(emulated.data[c][m], sums, sizeof sums);
    }
}
template <int C, int A, int B>
void tile_dot_signed() {
    tile_dot<int8_t>(C, A, B);
}
template <int C, int A, int B>
void tile_dot_unsigned() {
    tile_dot<uint8_t>(C, A, B);
}

}  // namespace
