// The kernels for matrix tiles with the tiles in plain C++: for tests, and never chosen by itself.
#include "targets.h"
#if MOTET_X86
MOTET_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define MOTET_ISA isa_amx_emulated
#define MOTET_ISA_NAME "amx-emulated"
#define MOTET_TILES
#include "vec_avx512.h"
#include "tile_emulated.h"
#include "kernels.inl"
#else
#include "isa.h"
namespace motet {
const Isa* isa_amx_emulated() { return nullptr; }
}  // namespace motet
#endif
