// A small test harness without dependencies, so that the tests build on a bare system.
//
//     TEST(name) { EXPECT_EQ(add(2, 2), 4); }
//     FSATTN_TEST_MAIN()
//
// The program runs every test whose name contains one of its arguments (all without arguments),
// prints each failure with its place and both values, and ends with "N passed, N failed".
#pragma once
#include <cmath>
#include <cstdio>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fsattn::test {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

// Failures of the test that runs now.
inline int& num_failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

inline void report(const char* file, int line, const std::string& text) {
  ++num_failures();
  std::cout << "  " << file << ":" << line << ": " << text << "\n";
}

// Enumerators print as numbers; everything else as its own operator<< does.
template <class T>
void print(std::ostream& out, const T& value) {
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else {
    out << value;
  }
}

// Signed and unsigned integers compare by value, so that a size_t can be compared with a literal.
template <class A, class B>
bool is_equal(const A& a, const B& b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, bool> &&
                !std::is_same_v<B, bool>) {
    return std::cmp_equal(a, b);
  } else {
    return a == b;
  }
}

template <class A, class B>
void expect_eq(const char* file, int line, const char* text, const A& a, const B& b) {
  if (is_equal(a, b)) return;
  std::ostringstream message;
  message.precision(17);
  message << text << ": ";
  print(message, a);
  message << " != ";
  print(message, b);
  report(file, line, message.str());
}

// Written so that a NaN fails; equal infinities pass.
inline void expect_near(const char* file, int line, const char* text, double a, double b,
                        double tolerance) {
  if (a == b || std::fabs(a - b) <= tolerance) return;
  std::ostringstream message;
  message.precision(17);
  message << text << ": " << a << " is not within " << tolerance << " of " << b;
  report(file, line, message.str());
}

// The message of what `body` throws must contain `part`.
template <class Exception, class Body>
void expect_throws(const char* file, int line, const char* text, const std::string& part,
                   Body&& body) {
  try {
    body();
  } catch (const Exception& error) {
    const std::string what = error.what();
    if (what.find(part) == std::string::npos) {
      report(file, line, std::string(text) + ": expected \"" + part + "\", got \"" + what + "\"");
    }
    return;
  } catch (const std::exception& error) {
    report(file, line, std::string(text) + ": threw another type: " + error.what());
    return;
  }
  report(file, line, std::string(text) + ": threw nothing, expected \"" + part + "\"");
}

inline bool is_wanted(const std::string& name, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (name.find(argv[i]) != std::string::npos) return true;
  }
  return argc < 2;
}

inline int run_all(int argc, char** argv) {
  int passed = 0;
  int failed = 0;
  for (const Case& test : cases()) {
    if (!is_wanted(test.name, argc, argv)) continue;
    num_failures() = 0;
    try {
      test.body();
    } catch (const std::exception& error) {
      report(test.name, 0, std::string("uncaught exception: ") + error.what());
    }
    ++(num_failures() == 0 ? passed : failed);
    std::cout << (num_failures() == 0 ? "ok    " : "FAIL  ") << test.name << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace fsattn::test

#define TEST(name)                                                                   \
  static void test_##name();                                                         \
  static const ::fsattn::test::Registration registration_##name(#name, test_##name); \
  static void test_##name()

#define FSATTN_TEST_MAIN() \
  int main(int argc, char** argv) { return ::fsattn::test::run_all(argc, argv); }

#define EXPECT_TRUE(condition)                                                            \
  do {                                                                                    \
    if (!(condition)) ::fsattn::test::report(__FILE__, __LINE__, #condition " is false"); \
  } while (0)
#define EXPECT_EQ(a, b) ::fsattn::test::expect_eq(__FILE__, __LINE__, #a " == " #b, (a), (b))
#define EXPECT_NEAR(a, b, tolerance) \
  ::fsattn::test::expect_near(__FILE__, __LINE__, #a " ~ " #b, (a), (b), (tolerance))
// EXPECT_THROWS(statement, Exception, part of the message)
#define EXPECT_THROWS(statement, Exception, part)                                  \
  ::fsattn::test::expect_throws<Exception>(__FILE__, __LINE__, #statement, (part), \
                                           [&] { statement; })
