#include <algorithm>

#include "test.h"

int main(int count, char** arguments) {
  const std::vector<std::string> wanted(arguments + 1, arguments + count);
  int passed = 0, failed = 0;
  for (const test::Entry& c : test::cases()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), c.suite) == wanted.end()) continue;
    try {
      c.run();
      ++passed;
      continue;
    } catch (const test::Failure&) {  // already told
    } catch (const std::exception& error) {
      std::fprintf(stderr, "unexpected exception: %s\n", error.what());
    }
    std::fprintf(stderr, "FAILED %s: %s\n", c.suite.c_str(), c.name);
    ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 || passed == 0 ? 1 : 0;
}
