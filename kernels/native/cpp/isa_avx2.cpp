#include "targets.h"
#if MOTET_X86
MOTET_TARGET("avx2,fma,f16c")
#define MOTET_ISA isa_avx2
#define MOTET_ISA_NAME "avx2"
#include "vec_avx2.h"
#include "kernels.inl"
#else
#include "isa.h"
namespace motet {
const Isa* isa_avx2() { return nullptr; }
}  // namespace motet
#endif
