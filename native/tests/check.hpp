// What the tests claim.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(claim)                                                                                                   \
    do {                                                                                                               \
        if (!(claim)) {                                                                                                \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #claim);                            \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (false)

#define CHECK_THROWS(type, statement)                                                                                  \
    do {                                                                                                               \
        bool thrown = false;                                                                                           \
        try {                                                                                                          \
            statement;                                                                                                 \
        } catch (const type &) {                                                                                       \
            thrown = true;                                                                                             \
        }                                                                                                              \
        CHECK(thrown && "throws " #type);                                                                              \
    } while (false)
