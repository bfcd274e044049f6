#include "targets.h"
#if MOTET_ARM64
MOTET_TARGET("arch=armv8.2-a+dotprod")
#define MOTET_ISA isa_neon
#define MOTET_ISA_NAME "neon"
#include "vec_neon.h"
#include "kernels.inl"
#else
#include "isa.h"
namespace motet {
const Isa* isa_neon() { return nullptr; }
}  // namespace motet
#endif
