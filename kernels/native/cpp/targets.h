// Macros that compile a whole file for an instruction set, without flags on the command line. Such a file must not
// instantiate templates of the standard library: the linker could use its copy in the files for other CPUs.
#pragma once
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MOTET_X86 1
#else
#define MOTET_X86 0
#endif
#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define MOTET_ARM64 1
#else
#define MOTET_ARM64 0
#endif
#if MOTET_X86 && defined(__has_include)
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>)
#define MOTET_HAS_AMX 1  // the compiler knows these instructions
#endif
#if __has_include(<avxvnniintrin.h>)
#define MOTET_HAS_AVXVNNI 1
#endif
#endif
#ifndef MOTET_HAS_AVXVNNI
#define MOTET_HAS_AVXVNNI 0
#endif
#ifndef MOTET_HAS_AMX
#define MOTET_HAS_AMX 0
#endif
#define MOTET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MOTET_TARGET(set) MOTET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MOTET_TARGET_END MOTET_PRAGMA(clang attribute pop)
#define MOTET_UNROLL MOTET_PRAGMA(clang loop unroll(full))
#else
#define MOTET_TARGET(set) MOTET_PRAGMA(GCC target(set))
#define MOTET_UNROLL MOTET_PRAGMA(GCC unroll 16)
#endif
