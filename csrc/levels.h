// One source, several instruction sets. Every *_cpu.cpp is compiled once per level with DHNS_LEVEL naming a namespace; which of the
// copies runs is decided when it is called, so that a cached library is safe on every machine of its architecture.
#pragma once

#if defined(__x86_64__)
#define DHNS_X86 1
#define DHNS_DECLARE(...)            \
  namespace dhns::baseline { __VA_ARGS__ } \
  namespace dhns::avx2 { __VA_ARGS__ }     \
  namespace dhns::avx512 { __VA_ARGS__ }

#ifndef DHNS_TOP  // the highest level that was compiled
#define DHNS_TOP 2
#endif

#include <cstdlib>
#include <cstring>

namespace dhns {
// What the environment variable DHNS_FAST_ISA allows, as a place in this list; anything else allows all.
inline int allowed_level() {
  static const int allowed = [] {
    const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
    const char* const asked = std::getenv("DHNS_FAST_ISA");
    for (int i = 0; asked && i < 4; ++i)
      if (!std::strcmp(asked, names[i])) return i;
    return 4;
  }();
  return allowed;
}

inline int level() {
  static const int best = [] {
    const int has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
        ? 2
        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int compiled = has < DHNS_TOP ? has : DHNS_TOP;
    return compiled < allowed_level() ? compiled : allowed_level();
  }();
  return best;
}
}  // namespace dhns

// DHNS_BEST is a pointer to the best copy of a function; DHNS_CALL calls it, for overloaded functions.
#if DHNS_TOP == 2
#define DHNS_BEST(function) \
  (dhns::level() == 2 ? &dhns::avx512::function : dhns::level() == 1 ? &dhns::avx2::function : &dhns::baseline::function)
#define DHNS_CALL(function, ...)                                  \
  (dhns::level() == 2       ? dhns::avx512::function(__VA_ARGS__) \
       : dhns::level() == 1 ? dhns::avx2::function(__VA_ARGS__)   \
                            : dhns::baseline::function(__VA_ARGS__))
#elif DHNS_TOP == 1
#define DHNS_BEST(function) (dhns::level() == 1 ? &dhns::avx2::function : &dhns::baseline::function)
#define DHNS_CALL(function, ...) (dhns::level() == 1 ? dhns::avx2::function(__VA_ARGS__) : dhns::baseline::function(__VA_ARGS__))
#else
#define DHNS_BEST(function) (&dhns::baseline::function)
#define DHNS_CALL(function, ...) dhns::baseline::function(__VA_ARGS__)
#endif

#else  // one level: what the architecture always has (NEON on arm64)
#define DHNS_DECLARE(...) namespace dhns::baseline { __VA_ARGS__ }
#define DHNS_BEST(function) (&dhns::baseline::function)
#define DHNS_CALL(function, ...) dhns::baseline::function(__VA_ARGS__)
#endif
