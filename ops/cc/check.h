// What the tests of the cores say: CHECK(condition) stops with the place of
// the first condition that does not hold.

#ifndef QIANMO_OPS_CC_CHECK_H_
#define QIANMO_OPS_CC_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

#endif  // QIANMO_OPS_CC_CHECK_H_
