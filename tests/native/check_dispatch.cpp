// The names of instruction sets, and errors that belong to one thread.
#include "checks.h"

#include <string.h>
#include <string>
#include <thread>

#include "api.h"
#include "dispatch.h"

void check_dispatch() {
  const std::string isa = okv_isa(), here = okv_isas(), built = okv_built();
  EXPECT(okv_abi() == OKV_ABI);
  EXPECT(isa == occam::kernels().name);
  EXPECT(("," + here + ",").find("," + isa + ",") != std::string::npos);
  EXPECT(here.size() >= strlen("portable") && here.substr(here.size() - strlen("portable")) == "portable");
  EXPECT(built.size() >= here.size());

  for (const char *wrong : {"", "avx", "AVX2", "avx512,avx2", "sse2"}) {
    occam::set_error("none");
    EXPECT(okv_select(wrong) == -1);
    EXPECT(strstr(okv_error(), here.c_str()) != nullptr);
    EXPECT(okv_isa() == isa);
  }

  occam::set_error("mine %d", 1);
  std::thread([] {
    EXPECT(strcmp(okv_error(), "mine 1") != 0);
    occam::set_error("%s", std::string(2000, 'x').c_str());
    EXPECT(strlen(okv_error()) < 2000);
  }).join();
  EXPECT(strcmp(okv_error(), "mine 1") == 0);
}
