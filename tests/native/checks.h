// The checks of the native code, run under sanitizers by `make sanitize`. A new one: a source here with a function,
// its declaration below, its line in main.cpp.
#pragma once
#include <stdio.h>

extern int failures;

// Goes on after a failure, so that one run shows all of them.
#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      ++failures;                                                               \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
    }                                                                           \
  } while (0)

void check_pool();
void check_dispatch();
void check_encode();
void check_attend();
void check_step();
