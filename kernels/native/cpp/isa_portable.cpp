#include "targets.h"
#undef MOTET_TARGET_END  // nothing was pushed
#undef MOTET_UNROLL
#define MOTET_UNROLL  // vectors are loops of 16 here: unrolling further takes minutes to compile
#define MOTET_ISA isa_portable
#define MOTET_ISA_NAME "portable"
#include "vec_portable.h"
#include "kernels.inl"
