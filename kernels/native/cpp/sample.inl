// Passes of mixing and sampling over a row of logits, for every path. Part of kernels.inl.
//
// Doubles are computed in plain loops without contraction, in one order, so a result has the same bits on every path.

// ---- doubles --------------------------------------------------------------------------------------------------------
//
// exp and log are those of fdlibm (error below 1 ulp), without branches, so that loops over 16 become vectors.

constexpr double kLeastExponent = -708.0;  // below it exp is taken to be 0

INLINE double exp_one(double x) {
    const double shift = 6755399441055744.0;  // 1.5 · 2^52: adding it leaves the nearest whole number in the low bits
    const double shifted = x * 1.44269504088896338700 + shift;
    const double whole = shifted - shift;
    const double high = x - whole * 6.93147180369123816490e-01, low = whole * 1.90821492927058770002e-10;
    const double r = high - low, t = r * r;
    const double c = r - t * (1.66666666666666019037e-01 +
                              t * (-2.77777777770155933842e-03 +
                                   t * (6.61375632143793436117e-05 +
                                        t * (-1.65339022054652515390e-06 + t * 4.13813679705723846039e-08))));
    const double y = 1.0 - ((low - (r * c) / (2.0 - c)) - high);
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits << 52) + 0x3FF0000000000000u;
    double power;
    memcpy(&power, &bits, 8);
    return x < kLeastExponent ? 0.0 : y * power;
}

// log(x); x must be positive and not denormal.
INLINE double log_one(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    const uint64_t above = bits + (0x3FF0000000000000u - 0x3FE6A09E00000000u);  // mantissas from sqrt(1/2) to sqrt(2)
    const uint64_t exponent = above >> 52;
    const uint64_t mantissa = (above & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E00000000u;
    double m, biased;
    memcpy(&m, &mantissa, 8);
    const uint64_t whole = exponent | 0x4330000000000000u;  // 2^52 + exponent
    memcpy(&biased, &whole, 8);
    const double k = biased - (4503599627370496.0 + 1023.0);
    const double f = m - 1.0, s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    const double poly = z * (6.666666666666735130e-01 +
                             z * (3.999999999940941908e-01 +
                                  z * (2.857142874366239149e-01 +
                                       z * (2.222219843214978396e-01 +
                                            z * (1.818357216161805012e-01 +
                                                 z * (1.531383769920937332e-01 + z * 1.479819860511658591e-01))))));
    return k * 6.93147180369123816490e-01 - ((half - (s * (half + poly) + k * 1.90821492927058770002e-10)) - f);
}

bool largest_double(const double* x, int64_t size, double* result) {
    double best[16];
    int64_t nan[16] = {};
    for (int j = 0; j < 16; j++) best[j] = -__builtin_inf();
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        for (int j = 0; j < 16; j++) {
            const double value = x[i + j];
            best[j] = value > best[j] ? value : best[j];
            nan[j] |= value != value;
        }
    for (int j = 0; i < size; i++, j++) {
        best[j] = x[i] > best[j] ? x[i] : best[j];
        nan[j] |= x[i] != x[i];
    }
    *result = best[0];
    int64_t any = 0;
    for (int j = 0; j < 16; j++) {
        *result = best[j] > *result ? best[j] : *result;
        any |= nan[j];
    }
    return !any;
}

void narrow(const double* x, int64_t size, double pivot, float* out) {
    for (int64_t i = 0; i < size; i++) out[i] = float(x[i] - pivot);
}

void mix_logits(const MixTerm* terms, int64_t count, int64_t size, double* out) {
    const float* row = terms[0].row;
    const double first = terms[0].coefficient;
    for (int64_t i = 0; i < size; i++) out[i] = first * double(row[i]);
    for (int64_t t = 1; t < count; t++) {
        const float* next = terms[t].row;
        const double coefficient = terms[t].coefficient;
        for (int64_t i = 0; i < size; i++) out[i] += coefficient * double(next[i]);
    }
}

// A mixed logit whose probability is 0 or too small for exp_one and log_one.
double mix_small(const MixTerm* terms, int64_t count, int64_t i) {
    double total = 0.0;
    for (int64_t t = 0; t < count; t++)
        total += terms[t].coefficient * __builtin_exp(double(terms[t].row[i]) - terms[t].largest - terms[t].log_sum);
    return __builtin_log(total);
}

INLINE double sum_lanes(double* sums) {
    for (int n = 8; n; n /= 2)
        for (int j = 0; j < n; j++) sums[j] += sums[j + n];
    return sums[0];
}

// Σ exp((x - top) · scale). The exponentials are stored in `out` unless it is null.
template <class T>
INLINE double exp_row(const T* x, int64_t size, double top, double scale, double* out) {
    double sums[16] = {}, exps[16];
    int64_t at = 0;
    for (; at + 16 <= size; at += 16) {
        for (int j = 0; j < 16; j++) exps[j] = exp_one((double(x[at + j]) - top) * scale);
        for (int j = 0; j < 16; j++) sums[j] += exps[j];
        if (out) memcpy(out + at, exps, sizeof exps);
    }
    for (int j = 0; at + j < size; j++) {
        const double one = exp_one((double(x[at + j]) - top) * scale);
        sums[j] += one;
        if (out) out[at + j] = one;
    }
    return sum_lanes(sums);
}

double exp_sum(const RowView& row, double top, double scale) {
    return row.exact ? exp_row(row.exact, row.size, top, scale, nullptr)
                     : exp_row(row.x, row.size, top, scale, nullptr);
}

void mix_probs(MixTerm* terms, int64_t count, int64_t size, double* exps, double* out) {
    for (int64_t t = 0; t < count; t++) {
        const double sum = exp_row(terms[t].row, size, terms[t].largest, 1.0, exps);
        const double factor = terms[t].coefficient / sum;
        terms[t].log_sum = __builtin_log(sum);
        if (t == 0)
            for (int64_t i = 0; i < size; i++) out[i] = factor * exps[i];
        else
            for (int64_t i = 0; i < size; i++) out[i] += factor * exps[i];
    }
    for (int64_t i = 0; i < size; i++) exps[i] = log_one(out[i]);
    for (int64_t i = 0; i < size; i++) out[i] = out[i] > 1e-290 ? exps[i] : mix_small(terms, count, i);
}

// ---- floats ---------------------------------------------------------------------------------------------------------

INLINE F load_row(const float* x, int64_t size, int64_t at) {
    if (at + kLanes <= size) return load(x + at);
    float lanes[16];
    for (int j = 0; j < 16; j++) lanes[j] = at + j < size ? x[at + j] : -__builtin_inff();
    return load(lanes);
}

bool block_maxima(const float* x, int64_t size, float* maxima, float* largest) {
    uint32_t nan = 0;
    float best = -__builtin_inff();
    int64_t block = 0;
    for (int64_t at = 0; at < size; at += kSampleBlock, block++) {
        F top = bcast(-__builtin_inff());
        for (int64_t i = at; i < at + kSampleBlock && i < size; i += kLanes) {
            const F value = load_row(x, size, i);
            nan |= is_nan(value);
            top = vmax(top, value);
        }
        maxima[block] = reduce_max(top);
        best = maxima[block] > best ? maxima[block] : best;
    }
    *largest = best;
    return !nan;
}

int64_t collect(const RowView& row, float distance, int32_t* ids) {
    const F pivot = bcast(row.pivot), least = bcast(distance);
    int64_t count = 0, block = 0;
    for (int64_t at = 0; at < row.size; at += kSampleBlock, block++) {
        if (!(row.maxima[block] - row.pivot >= distance)) continue;
        for (int64_t i = at; i < at + kSampleBlock && i < row.size; i += kLanes) {
            uint32_t mask = at_least(sub(load_row(row.x, row.size, i), pivot), least);
            for (; mask; mask &= mask - 1) {
                const int64_t id = i + __builtin_ctz(mask);
                if (id < row.size) ids[count++] = int32_t(id);
            }
        }
    }
    return count;
}

// ---- the draw -------------------------------------------------------------------------------------------------------

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;

struct Half {  // the even or the odd lanes of 16 counters
    I c0, c1, c2, c3;
};

INLINE Half philox_start(I ids, uint32_t position, uint32_t k0, uint32_t k1) {
    const I product = mul_even(ids, bcast_int(int32_t(kMul0))), none = bcast_int(0);
    return {bcast_int(int32_t(position ^ k0)), none, exclusive(upper(product), bcast_int(int32_t(k1)), none), product};
}

INLINE Half philox_round(Half h, I k0, I k1) {
    const I p0 = mul_even(h.c0, bcast_int(int32_t(kMul0))), p1 = mul_even(h.c2, bcast_int(int32_t(kMul1)));
    return {exclusive(upper(p1), h.c1, k0), p1, exclusive(upper(p0), h.c3, k1), p0};
}

// First words of Philox4x32-10 at counters (first + i, position, 0, 0), see kernels/oracle/reference.py.
INLINE I philox(int32_t first, uint32_t position, uint64_t seed) {
    const I ids = count_from(first);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    Half even = philox_start(ids, position, k0, k1), odd = philox_start(upper(ids), position, k0, k1);
    for (int round = 1; round < 9; round++) {
        k0 += kStep0;
        k1 += kStep1;
        const I a = bcast_int(int32_t(k0)), b = bcast_int(int32_t(k1));
        even = philox_round(even, a, b);
        odd = philox_round(odd, a, b);
    }
    const I last = bcast_int(int32_t(k0 + kStep0)), multiplier = bcast_int(int32_t(kMul1));
    return join(exclusive(upper(mul_even(even.c2, multiplier)), even.c1, last),
                exclusive(upper(mul_even(odd.c2, multiplier)), odd.c1, last));
}

constexpr double kLargestGumbel = 16.64;  // -log(-log(1 - 2^-24)) = 16.6355…

struct Winner {
    const DrawArgs& args;
    int64_t id = -1;
    double score = 0.0;
    float least = 0.0f;  // tokens whose distance (x - pivot) / temperature is below it cannot win
    float gain = 0.0f;   // log2 of the chance that a token at distance 0 wins

    // Compares the exact score of a token with the best one so far. `word`: the first word of its draw.
    void consider(int64_t candidate, uint32_t word) {
        const double tempered = args.row.value(candidate) / args.temperature;
        if (!(tempered >= args.cut && tempered > -__builtin_inf())) return;
        const double u = (double(word >> 9) + 0.5) * 0x1p-23;
        const double other = tempered + -__builtin_log(-__builtin_log(u));
        if (id >= 0 && !(other > score || (other == score && candidate < id))) return;
        id = candidate;
        score = other;
        // The filters leave a margin for the rounding of floats (relative, for distances) and of the scores.
        const double ahead = score - args.top, rounding = __builtin_fabs(args.top) * 1e-15;
        double limit = ahead - kLargestGumbel;
        limit = args.cut - args.top > limit ? args.cut - args.top : limit;
        limit -= 1e-5 + 1e-6 * __builtin_fabs(limit) + rounding;
        least = limit > -1e30 ? float(limit) : -1e30f;
        gain = float((0.01 + rounding - ahead) * 1.4426950408889634);
    }
};

// argmax of value / temperature + noise over the tokens that are not below the cut; of equal ones the lowest id. A
// token at distance d from the best score wins only if -log u < e^d, hence only if 1 - u < e^d. This is checked in
// floats, with a margin, before the exact score is computed.
int64_t draw(const DrawArgs& args) {
    const RowView& row = args.row;
    Winner winner{args};
    uint32_t words[16];
    const I guess = philox(int32_t(args.first), args.position, args.seed);
    memcpy(words, &guess, sizeof words);
    winner.consider(args.first, words[0]);
    const double inverse = 1.0 / args.temperature;
    const float scale = inverse < 1e30 ? float(inverse) : 1e30f;  // a smaller scale only lets more tokens pass
    const F pivot = bcast(row.pivot), scales = bcast(scale);
    int64_t block = 0;
    for (int64_t at = 0; at < row.size; at += kSampleBlock, block++) {
        if (!((row.maxima[block] - row.pivot) * scale >= winner.least)) continue;
        for (int64_t i = at; i < at + kSampleBlock && i < row.size; i += kLanes) {
            const F distance = mul(sub(load_row(row.x, row.size, i), pivot), scales);
            uint32_t mask = at_least(distance, bcast(winner.least));
            if (!mask) continue;
            const I drawn = philox(int32_t(i), args.position, args.seed);
            const F n = to_float(shift_right_9_unsigned(drawn));
            const F rest = mul(sub(bcast(8388607.5f), n), bcast(0x1p-23f));  // 1 - u
            mask &= at_least(exp2_vec(fma(distance, bcast(kLog2e), bcast(winner.gain))), rest);
            if (!mask) continue;
            memcpy(words, &drawn, sizeof words);
            for (; mask; mask &= mask - 1) winner.consider(i + __builtin_ctz(mask), words[__builtin_ctz(mask)]);
        }
    }
    return winner.id;
}
