// Packs a bundle's tensors into the panels that the kernels read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "model.h"

namespace motet {
namespace {

uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const int exponent = int(bits >> 23 & 255) - 127;
    uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
    if (exponent < -25) return sign;
    int shift = 13, base = exponent + 15;
    if (exponent < -14) {
        shift += -14 - exponent;
        base = 1;
    }
    const uint32_t rounded = (mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
    return uint16_t(sign | ((uint32_t(base - 1) << 10) + rounded));
}

float from_half(uint16_t h) {
    const int exponent = h >> 10 & 31;
    const float value =
        exponent ? std::ldexp(float(1024 + (h & 1023)), exponent - 25) : std::ldexp(float(h & 1023), -24);
    return h & 0x8000 ? -value : value;
}

int nibble(const uint8_t* packed, int64_t index) { return index & 1 ? packed[index / 2] >> 4 : packed[index / 2] & 15; }

struct Affine {  // a group's weights: w = q · scale + minimum
    float scale, minimum;
};

Affine affine_group(const MotetTensor& t, int64_t row, int64_t g) {
    const int64_t place = row * (t.columns / t.group_size) + g;
    return {t.scales[place], t.bits == 4 ? t.minima[place] : 0.0f};
}

// The power of two that divides the largest scale or minimum to just below 2^14.
float common_factor(const MotetTensor& t, int64_t groups) {
    float largest = 0.0f;
    for (int64_t row = 0; row < t.rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const Affine a = affine_group(t, row, g);
            if (!std::isfinite(a.scale) || !std::isfinite(a.minimum))
                throw std::invalid_argument("its scales or minima hold NaN or infinity");
            largest = std::fmax(largest, std::fmax(std::fabs(a.scale), std::fabs(a.minimum)));
        }
    if (!(largest > 0.0f)) return 1.0f;
    return std::ldexp(1.0f, std::ilogb(largest) - 13);
}

void pack_panel(const MotetTensor& t, const PackedLinear& w, int64_t panel, bool pairs, uint8_t* out) {
    uint16_t* scales = (uint16_t*)out;
    uint16_t* minima = scales + int64_t(w.groups) * kPanel;
    uint8_t* values = out + w.values_offset;
    for (int lane = 0; lane < kPanel; lane++) {
        const int64_t row = source_row(t.rows, panel, lane, pairs);
        if (row < 0) continue;  // no such row: its scales stay 0
        if (w.bits == 32) {
            for (int64_t i = 0; i < w.k; i++) ((float*)out)[i * kPanel + lane] = t.dense[row * w.k + i];
            continue;
        }
        for (int g = 0; g < w.groups; g++) {
            const Affine a = affine_group(t, row, g);
            scales[g * kPanel + lane] = to_half(a.scale / w.factor);
            if (w.bits == 4) minima[g * kPanel + lane] = to_half(a.minimum / w.factor);
        }
        const uint8_t* from = t.values + row * t.columns * t.bits / 8;
        if (w.bits == 8) {
            for (int64_t i = 0; i < w.k; i += 4) memcpy(values + i * kPanel + lane * 4, from + i, 4);
        } else {
            for (int64_t i = 0; i < w.k; i += 8)
                for (int j = 0; j < 4; j++)
                    values[i * kPanel / 2 + lane * 4 + j] = uint8_t(nibble(from, i + j) | nibble(from, i + 4 + j) << 4);
        }
    }
}

}  // namespace

int64_t source_row(int64_t rows, int64_t panel, int lane, bool pairs) {
    if (pairs) return panel * kLanes + lane % kLanes + (lane < kLanes ? 0 : rows / 2);
    const int64_t row = panel * kPanel + lane;
    return row < rows ? row : -1;
}

Linear pack(const MotetTensor& tensor, bool pairs, Pool& pool, Arena& memory) {
    Linear result;
    PackedLinear& w = result.packed;
    w.bits = tensor.dense ? 32 : tensor.bits;
    w.n = tensor.rows;
    w.k = tensor.columns;
    w.panels = (w.n + kPanel - 1) / kPanel;
    if (w.bits == 32) {
        w.panel_bytes = w.k * kPanel * int64_t(sizeof(float));
    } else {
        w.group = tensor.group_size;
        w.groups = int(w.k / w.group);
        w.factor = common_factor(tensor, w.groups);
        const int64_t header = int64_t(w.groups) * kPanel * 2 * (w.bits == 4 ? 2 : 1);
        w.values_offset = (header + 63) / 64 * 64;
        w.panel_bytes = w.values_offset + w.k * kPanel * w.bits / 8;
    }
    uint8_t* data = memory.take<uint8_t>(w.panels * w.panel_bytes);
    w.data = data;
    struct Job {
        const MotetTensor& tensor;
        const PackedLinear& packed;
        uint8_t* data;
        bool pairs;
        Pool& pool;
    } job{tensor, w, data, pairs, pool};
    pool.reset(1);
    pool.run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            j.pool.distribute(0, thread, j.packed.panels, [&](int64_t panel) {
                pack_panel(j.tensor, j.packed, panel, j.pairs, j.data + panel * j.packed.panel_bytes);
            });
        },
        &job);
    if (tensor.bias) {
        result.bias.assign(size_t(w.panels * kPanel), 0.0f);
        for (int64_t panel = 0; panel < w.panels; panel++)
            for (int lane = 0; lane < kPanel; lane++) {
                const int64_t row = source_row(w.n, panel, lane, pairs);
                if (row >= 0) result.bias[size_t(panel * kPanel + lane)] = tensor.bias[row];
            }
        w.bias = result.bias.data();
    }
    return result;
}

Adapter pack_adapter(const PackedLinear& w, const float* a, const float* b, int rank, bool pairs) {
    for (int64_t i = 0; i < rank * std::max(w.k, w.n); i++)
        if ((i < rank * w.k && !std::isfinite(a[i])) || (i < rank * w.n && !std::isfinite(b[i])))
            throw std::invalid_argument("a low-rank update holds NaN or infinity");
    Adapter result;
    auto peak_of = [](const float* values, int64_t count, int64_t stride) {
        float peak = 0.0f;
        for (int64_t i = 0; i < count; i++) peak = std::fmax(peak, std::fabs(values[i * stride]));
        return peak > 0.0f ? peak : 1.0f;
    };
    auto rounded = [](float value, float peak) { return int8_t(std::lrint(127.0f * value / peak)); };
    std::vector<float> b_peaks;
    for (int j = 0; j < rank; j++) {
        const float peak = peak_of(a + j * w.k, w.k, 1);
        b_peaks.push_back(peak_of(b + j, w.n, rank));
        result.scales.push_back(peak / 127.0f * (b_peaks.back() / 127.0f));
        for (int64_t i = 0; i < w.k; i++) result.a.push_back(rounded(a[j * w.k + i], peak));
    }
    for (int64_t half = 0; half < 2 * w.panels; half++) {
        int64_t rows[kLanes];
        LowRank::Ranks ranks{rank, 0, int64_t(result.b.size())};
        int end = 0;
        for (int lane = 0; lane < kLanes; lane++) {
            rows[lane] = source_row(w.n, half / 2, int(half % 2) * kLanes + lane, pairs);
            for (int j = 0; rows[lane] >= 0 && j < rank; j++)
                if (b[rows[lane] * rank + j] != 0.0f) {
                    ranks.first = std::min(ranks.first, j);
                    end = std::max(end, j + 1);
                }
        }
        ranks.count = std::max(0, end - ranks.first);
        for (int j = ranks.first; j < end; j++)
            for (int64_t row : rows)
                result.b.push_back(row < 0 ? int8_t(0) : rounded(b[row * rank + j], b_peaks[size_t(j)]));
        result.ranks.push_back(ranks);
    }
    result.view = {rank, result.a.data(), result.b.data(), result.scales.data(), result.ranks.data()};
    return result;
}

void unpack_row(const PackedLinear& w, int64_t row, float* out) {
    const uint8_t* panel = w.data + row / kPanel * w.panel_bytes;
    const int lane = int(row % kPanel);
    if (w.bits == 32) {
        for (int64_t i = 0; i < w.k; i++) out[i] = ((const float*)panel)[i * kPanel + lane];
        return;
    }
    const uint16_t *scales = (const uint16_t*)panel, *minima = scales + int64_t(w.groups) * kPanel;
    const uint8_t* values = panel + w.values_offset + lane * 4;
    for (int g = 0; g < w.groups; g++) {
        const float scale = from_half(scales[g * kPanel + lane]) * w.factor;
        const float minimum = w.bits == 4 ? from_half(minima[g * kPanel + lane]) * w.factor : 0.0f;
        for (int i = g * w.group; i < (g + 1) * w.group; i++) {
            const int value = values[int64_t(w.bits == 4 ? i / 8 : i / 4) * 4 * kPanel + i % 4];
            if (w.bits == 4)
                out[i] = float(i % 8 < 4 ? value & 15 : value >> 4) * scale + minimum;
            else
                out[i] = float(value - 128) * scale;
        }
    }
}

}  // namespace motet
