// What a thread asks of the eight matrix tiles, in the form that the instruction LDTILECFG reads.
#pragma once
#include <stdint.h>

namespace motet {

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace motet
