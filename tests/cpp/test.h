// The test harness: TEST(name) { CHECK(condition, "text", value, ...); } in files called test_<suite>.cc.
//
// A failed check ends its test, with one line on stderr. `tutelage_tests suite ...` runs those suites, without arguments all.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace test {

struct Entry {
  std::string suite;
  const char* name;
  void (*run)();
};
inline std::vector<Entry>& cases() {
  static std::vector<Entry> all;
  return all;
}

struct Register {
  Register(std::string_view file, const char* name, void (*run)()) {
    file.remove_prefix(file.rfind("test_") + 5);
    file.remove_suffix(3);  // .cc
    cases().push_back({std::string(file), name, run});
  }
};

struct Failure : std::exception {};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  out.precision(17);
  ((out << parts << ' '), ...);
  return out.str();
}

[[noreturn]] inline void fail(const char* file, int line, const char* condition, const std::string& details) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, condition, details.c_str());
  throw Failure();
}

}  // namespace test

#define TEST(name)                                                       \
  static void name();                                                    \
  static const test::Register registered_##name(__FILE__, #name, &name); \
  static void name()

#define CHECK(condition, ...)                                                              \
  do {                                                                                     \
    if (!(condition)) test::fail(__FILE__, __LINE__, #condition, test::text(__VA_ARGS__)); \
  } while (false)

// `expression` throws exactly this type with exactly this message.
#define CHECK_THROWS(type, message, expression)                                               \
  do {                                                                                        \
    std::string thrown = "nothing was thrown";                                                \
    try {                                                                                     \
      expression;                                                                             \
    } catch (const type& error) {                                                             \
      thrown = error.what();                                                                  \
    }                                                                                         \
    CHECK(thrown == std::string(message), "\n  expected:", message, "\n  thrown:  ", thrown); \
  } while (false)
