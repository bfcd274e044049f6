/* The C interface of the native CPU kernels, which the modules of kernels/native call through ctypes. No exception
   leaves it: a function that fails returns a code, and motet_error() returns the message. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOTET_API __attribute__((visibility("default")))

enum { MOTET_OK = 0, MOTET_INVALID = 1, MOTET_UNSUPPORTED = 2, MOTET_FAILED = 3 };

typedef enum { MOTET_QKV, MOTET_OUT, MOTET_UP, MOTET_DOWN, MOTET_ROUTER, MOTET_HEAD, MOTET_EMBEDDING } MotetLinear;
typedef enum {
    MOTET_ATTENTION_NORM,
    MOTET_ATTENTION_NORM_BIAS,
    MOTET_MLP_NORM,
    MOTET_MLP_NORM_BIAS,
    MOTET_ATTENTION_OUT_NORM,
    MOTET_ATTENTION_OUT_NORM_BIAS,
    MOTET_MLP_OUT_NORM,
    MOTET_MLP_OUT_NORM_BIAS,
    MOTET_Q_NORM,
    MOTET_K_NORM,
    MOTET_FINAL_NORM,
    MOTET_FINAL_NORM_BIAS,
    MOTET_POSITIONS,
    MOTET_COS,
    MOTET_SIN,
    MOTET_WINDOW_COS,
    MOTET_WINDOW_SIN
} MotetVector;
typedef enum { MOTET_NO_ROTARY, MOTET_ROTARY, MOTET_WINDOW_ROTARY } MotetRotary;
typedef enum { MOTET_SWIGLU, MOTET_GEGLU, MOTET_GELU, MOTET_GELU_ERF } MotetActivation;
typedef enum { MOTET_NORM_BEFORE, MOTET_NORM_AROUND, MOTET_NORM_AFTER } MotetNormPlaces;
typedef enum { MOTET_NO_QK_NORM, MOTET_QK_NORM_HEAD, MOTET_QK_NORM_PROJECTION } MotetQkNorm;

typedef struct {
    int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_size, max_positions;
    int32_t layer_norm;        /* 1: layer norm, 0: RMS norm */
    int32_t activation;        /* MotetActivation */
    int32_t norm_places;       /* MotetNormPlaces: of attention and of the MLP */
    int32_t parallel_residual; /* 1: the MLP reads the layer's input, without what attention adds */
    int32_t learned;           /* positions: 1: learned, 0: rotary */
    int32_t rotary_size;       /* channels of a head that rotate, the first ones */
    int32_t qk_norm;           /* MotetQkNorm */
    int32_t tied_head;
    int32_t split_layer; /* first layer of the tails; num_layers if there are none */
    int32_t num_members;
    int32_t
        num_tails; /* sets of the layers from split_layer on; 0 if there is one member, whose layers all are trunk */
    int32_t num_experts;       /* 0: none. A layer with a router has so many MLPs, of expert_size */
    int32_t experts_per_token; /* that a row runs: those whose router logits are the largest */
    int32_t expert_size;
    int32_t normalises_experts; /* 1: the weights of a row's experts sum to 1 */
    int32_t kv_int8;
    int32_t num_blocks, threads;
    float norm_eps;
    float embedding_scale, residual_scale, attention_scale, logit_scale;
    float attention_softcap, logit_softcap; /* 0: none */
    const int32_t* tail_of;                 /* [num_members] each member's tail, if there are tails; copied */
} MotetConfig;

/* A weight [rows, columns] as a bundle stores it. Exactly one of `values` and `dense` is set. */
typedef struct {
    int64_t rows, columns;
    int32_t bits, group_size;
    const uint8_t* values; /* [rows, groups, group_size * bits / 8] */
    const float* scales;   /* [rows, groups] */
    const float* minima;   /* [rows, groups], 4 bits only */
    const float* dense;    /* [rows, columns] */
    const float* bias;     /* [rows] or null */
} MotetTensor;

typedef struct {
    int64_t num_rows, num_seqs, max_blocks;
    const int64_t* token_ids;      /* [num_rows] */
    const int32_t* positions;      /* [num_rows] */
    const int64_t* slot_mapping;   /* [num_rows] */
    const int32_t* cu_seqlens;     /* [num_seqs + 1] */
    const int32_t* context_lens;   /* [num_seqs] */
    const int32_t* block_tables;   /* [num_seqs, max_blocks] */
    const uint8_t* trunk_cached;   /* [num_seqs] 1: the trunk has run over these rows before; only tails run. Or null */
    const int64_t* member_offsets; /* [num_members + 1] into member_seqs; null if there are no tails */
    const int32_t* member_seqs;    /* sequences whose rows the member's tail runs over, ascending */
    int64_t num_freed;
    const int32_t* freed_blocks; /* [num_freed] blocks whose content died since the last batch */
    int64_t num_outputs;
    const int32_t* output_members; /* [num_outputs] ascending */
    const int32_t* output_rows;    /* [num_outputs] ascending for each member */
    int64_t num_embedded;          /* rows whose embeddings are given: their token ids are not looked up */
    const int32_t* embedded_rows;  /* [num_embedded] ascending */
    const float* embedded;         /* [num_embedded, hidden] as they enter the first layer, but for learned positions */
} MotetBatch;

typedef struct MotetModel MotetModel;

MOTET_API const char* motet_error(void);
MOTET_API int motet_isa_count(void);
MOTET_API const char* motet_isa_name(int index); /* best first; only those that this CPU supports */

MOTET_API int motet_create(const MotetConfig*, const char* isa, MotetModel** out);
MOTET_API void motet_destroy(MotetModel*);
/* `expert`: of MOTET_UP and MOTET_DOWN, the number of the expert; -1: the layer has no experts. */
MOTET_API int motet_set_linear(MotetModel*, int which, int layer, int expert, const MotetTensor*);
MOTET_API int motet_share_linear(MotetModel*, int which, int layer, int expert, int source);
/* y += b (a x) for the rows of this member: a [rank, columns], b [rows, rank]. */
MOTET_API int motet_set_adapter(MotetModel*, int which, int layer, int member, int64_t rank, const float* a,
                                int64_t columns, const float* b, int64_t rows);
MOTET_API int motet_set_vector(MotetModel*, int which, int index, const float* values, int64_t count);
/* The tables by which this layer's queries and keys are rotated (MotetRotary). Unless it is set, MOTET_ROTARY. */
MOTET_API int motet_set_rotary(MotetModel*, int layer, int tables);
/* In this layer rows attend to the last `window` positions, their own included. Unless it is set, to all. */
MOTET_API int motet_set_window(MotetModel*, int layer, int window);
MOTET_API int motet_ready(MotetModel*);

/* Hidden states [num_outputs, hidden] of the batch's (row, member) outputs, after the final norm. */
MOTET_API int motet_step(MotetModel*, const MotetBatch*, float* hidden);
/* Logits [rows, motet_logits_stride] of hidden states [rows, hidden]. */
MOTET_API int motet_head(MotetModel*, const float* hidden, int64_t rows, float* logits);
MOTET_API int64_t motet_logits_stride(const MotetModel*);

/* How the token of one sample is chosen. Edits: the logit x of token edit_ids[i] becomes (x > 0 ? x / divisor :
   x * divisor) - penalty + bias, in this order; then the mask. Null lists have count 0. */
typedef struct {
    int64_t first_term, num_terms; /* into the terms of MotetSampling, at least one */
    int32_t probs;                 /* space of the mix: 1: probs, 0: logits */
    int32_t logprobs;              /* how many of the most probable tokens to report; -1: no log-probabilities */
    int32_t member_logprobs;       /* 1: report the chosen token's under each term alone */
    const int64_t* candidates;     /* [num_candidates] their log-probabilities are reported; none without logprobs */
    int64_t num_candidates;
    double* candidate_logprobs;       /* [num_candidates] result, like `logprobs` of MotetSampling */
    int64_t top_k;                    /* 0: off */
    double top_p, min_p, temperature; /* off: 1 and 0; temperature 0: greedy */
    const int64_t* edit_ids;          /* [num_edits] no token twice */
    const double* edit_divisors;      /* [num_edits] above 0 */
    const double* edit_penalties;     /* [num_edits] */
    const double* edit_biases;        /* [num_edits] -infinity forbids the token */
    int64_t num_edits;
    const uint32_t* mask; /* [ceil(vocab_size / 32)] bit id % 32 of word id / 32: allowed; null: all are */
    uint64_t seed;
    uint32_t position;
} MotetSample;

/* A packed batch of samples over rows of logits, and the results. */
typedef struct {
    const float* logits; /* [num_rows, stride] */
    int64_t num_rows, stride, vocab_size;
    int64_t num_terms;
    const int64_t* term_rows;   /* [num_terms] */
    const double* coefficients; /* [num_terms] a term with 0 is ignored */
    int64_t num_samples;
    const MotetSample* samples;
    int64_t top_stride;      /* entries per sample in the two tables; no sample may report more */
    int64_t* token_ids;      /* [num_samples] -1 if there is none */
    int32_t* codes;          /* [num_samples] MotetSampleCode */
    double* logprobs;        /* [num_samples] of the mix before edits, temperature and truncation; NaN: not requested */
    int64_t* top_ids;        /* [num_samples, top_stride] best first, -1 if there are fewer */
    double* top_logprobs;    /* [num_samples, top_stride] */
    double* member_logprobs; /* [num_terms] NaN: not requested */
} MotetSampling;

/* Rows of logits to sample from. The head's input of row r is Σ coefficients[i] · hidden state of output sources[i],
   over i in offsets[r]…offsets[r + 1] - 1; its logits are divided by temperatures[r]. `greedy` [rows]: only the largest
   logit has to be exact. The logits of `written_rows` are copied out, so that the caller can sample from them. */
typedef struct {
    int64_t rows;
    const int64_t* offsets; /* [rows + 1] */
    const int32_t* sources;
    const float* coefficients;
    const float* temperatures; /* [rows] above 0 */
    const uint8_t* greedy;
    int64_t num_written;
    const int64_t* written_rows; /* [num_written] */
    float* written;              /* [num_written, vocab_size] */
} MotetMixes;

typedef enum { MOTET_SAMPLED, MOTET_NOT_FINITE, MOTET_NOTHING_LEFT } MotetSampleCode;

/* Mixes and samples; the tokens are those of kernels/oracle/reference.py. With a model it runs on the model's threads
   and path, and `isa` is ignored; without, on this thread. A bad argument fails the call; bad logits set the code of
   the sample. */
MOTET_API int motet_sample(MotetModel*, const char* isa, const MotetSampling*);
/* A whole step: the batch's outputs, the logits of their mixes, and a token for each sample. The logits and their sizes
   in MotetSampling are ignored: those of the mixes are used. A bad argument fails the call before anything is computed.
 */
MOTET_API int motet_generate(MotetModel*, const MotetBatch*, const MotetMixes*, const MotetSampling*);

/* Seconds of thread 0 since the last call: [linears, attention, head, other]. */
MOTET_API void motet_seconds(MotetModel*, double* out);
MOTET_API double motet_probe_dot(const char* isa, int threads);  /* GMAC/s */
MOTET_API double motet_probe_read(const char* isa, int threads); /* GB/s */

#ifdef __cplusplus
}
#endif
