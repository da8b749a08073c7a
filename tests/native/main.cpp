// Runs every check once for each instruction set of this machine; leaves with 1 if one failed.
#include "checks.h"

#include <string>

#include "api.h"

int failures = 0;

struct Check {
  const char *name;
  void (*run)();
};

const Check checks[] = {
    {"pool", check_pool},
    {"dispatch", check_dispatch},
    {"encode", check_encode},
    {"attend", check_attend},
    {"step", check_step},
};

int main() {
  const std::string names = std::string(okv_isas()) + ",";
  for (size_t begin = 0, end; (end = names.find(',', begin)) != std::string::npos; begin = end + 1) {
    const std::string isa = names.substr(begin, end - begin);
    for (const Check &check : checks) {
      EXPECT(okv_select(isa.c_str()) == 0);
      const int before = failures;
      check.run();
      printf("%-10s %-10s %s\n", isa.c_str(), check.name, failures == before ? "ok" : "FAILED");
    }
  }
  return failures == 0 ? 0 : 1;
}
