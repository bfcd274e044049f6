#include "targets.h"
#if MOTET_X86 && MOTET_HAS_AVXVNNI
MOTET_TARGET("avx2,avxvnni,fma,f16c")
#define MOTET_ISA isa_avxvnni
#define MOTET_ISA_NAME "avxvnni"
#define MOTET_AVXVNNI
#include "vec_avx2.h"
#include "kernels.inl"
#else
#include "isa.h"
namespace motet {
const Isa* isa_avxvnni() { return nullptr; }
}  // namespace motet
#endif
