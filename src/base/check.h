#pragma once
#include <source_location>
#include <sstream>

#include "fsattn/error.h"

namespace fsattn::detail {

template <class... Parts>
[[noreturn]] void fail(ErrorCode code, std::source_location where, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  if (code == ErrorCode::kCuda || code == ErrorCode::kInternal) {
    text << " (" << where.file_name() << ":" << where.line() << ")";
  }
  throw Error(code, text.str());
}

}  // namespace fsattn::detail

// The caller's mistake; api/ and plan/ only. `kind` is an ErrorCode enumerator. The message names
// the argument, the rule and the value found.
#define FSATTN_CHECK(condition, kind, ...)                                               \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      ::fsattn::detail::fail(::fsattn::ErrorCode::kind, std::source_location::current(), \
                             __VA_ARGS__);                                               \
    }                                                                                    \
  } while (0)

// Our mistake: a rule that an earlier step guarantees. Never for input that a caller controls.
#define FSATTN_ASSERT(condition)                                                              \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      ::fsattn::detail::fail(::fsattn::ErrorCode::kInternal, std::source_location::current(), \
                             "assert: ", #condition);                                         \
    }                                                                                         \
  } while (0)
