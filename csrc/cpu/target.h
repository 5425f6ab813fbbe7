// Compile the rest of this file for WORLDENV_TARGET. Included before everything else, so that no inline function of a
// shared header can be emitted with instructions that other CPUs lack.
#pragma once

#if defined(__x86_64__) && defined(WORLDENV_TARGET)
#define WORLDENV_STRING(x) #x
#define WORLDENV_PRAGMA(x) _Pragma(WORLDENV_STRING(x))
#include <immintrin.h>
#if defined(__clang__)
WORLDENV_PRAGMA(clang attribute push(__attribute__((target(WORLDENV_TARGET))), apply_to = function))
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 headers cause it (bug 105593)
WORLDENV_PRAGMA(GCC target(WORLDENV_TARGET))
#endif
#endif
