#include "targets.h"
#if MOTET_X86
MOTET_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define MOTET_ISA isa_avx512
#define MOTET_ISA_NAME "avx512"
#include "vec_avx512.h"
#include "kernels.inl"
#else
#include "isa.h"
namespace motet {
const Isa* isa_avx512() { return nullptr; }
}  // namespace motet
#endif
