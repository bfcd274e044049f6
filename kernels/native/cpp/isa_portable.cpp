#include "targets.h"
#undef MOTET_UNROLL
#define MOTET_UNROLL  // arrays of 16 are loops already: unrolled twice they take minutes to compile
#define MOTET_ISA isa_portable
#define MOTET_ISA_NAME "portable"
#include "vec_portable.h"
#include "kernels.inl"
