// KEEPSET_CHECK ends the process on a broken invariant of our own. Input is never checked with it.
#ifndef KEEPSET_BASE_CHECK_H_
#define KEEPSET_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define KEEPSET_CHECK(condition)                                                         \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

#endif  // KEEPSET_BASE_CHECK_H_
