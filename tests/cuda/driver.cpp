// libcuda.so.1 as far as a launch asks it, without a GPU: it writes down every call as it comes through the C interface.
#include <cstdio>
#include <cstdlib>
#include <cstring>

static FILE *told() {
  static FILE *file = fopen(getenv("OKV_TOLD"), "w");
  setvbuf(file, nullptr, _IONBF, 0);
  return file;
}

static int done(const char *name) {
  const char *fails = getenv("OKV_FAILS");
  return fails && !strcmp(fails, name) ? 701 : 0;  // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
}

static long context;

extern "C" {
int cuDriverGetVersion(int *version) { return *version = 12080, 0; }

int cuCtxGetCurrent(void **to) { return *to = (void *)context, 0; }

int cuDeviceGet(int *device, int ordinal) { return *device = 100 + ordinal, 0; }

int cuDevicePrimaryCtxRetain(void **to, int device) { return *to = (void *)(long)(1000 + device), 0; }

int cuCtxSetCurrent(void *to) {
  context = (long)to;
  return fprintf(told(), "context %ld\n", context), context ? done("cuCtxSetCurrent") : 0;
}

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)11;
  return fprintf(told(), "load %s\n", (const char *)image), done("cuModuleLoadData");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)22;
  return fprintf(told(), "function %ld %s\n", (long)module, name), done("cuModuleGetFunction");
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  return fprintf(told(), "attribute %ld %d %d\n", (long)function, attribute, value), done("cuFuncSetAttribute");
}

int cuStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id, void **graph, const void **nodes,
                              const void **edges, size_t *count) {
  *status = 1, *id = 7;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return fprintf(told(), "capture %ld\n", (long)stream), done("cuStreamGetCaptureInfo");
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  fprintf(told(), "launch %ld %u %u %u %u %u %u %u %ld %ld ", (long)function, x, y, z, bx, by, bz, shared, (long)stream,
          (long)extra);
  for (int i = 0; i < atoi(getenv("OKV_BYTES")); i++) fprintf(told(), "%02x", ((unsigned char *)parameters[0])[i]);
  return fprintf(told(), "\n"), done("cuLaunchKernel");
}

int cuGetProcAddress_v2(const char *name, void **function, int, unsigned long long, int *status) {
  const struct {
    const char *name;
    void *function;
  } known[] = {
      {"cuDriverGetVersion", (void *)cuDriverGetVersion},
      {"cuCtxGetCurrent", (void *)cuCtxGetCurrent},
      {"cuDeviceGet", (void *)cuDeviceGet},
      {"cuDevicePrimaryCtxRetain", (void *)cuDevicePrimaryCtxRetain},
      {"cuCtxSetCurrent", (void *)cuCtxSetCurrent},
      {"cuModuleLoadData", (void *)cuModuleLoadData},
      {"cuModuleGetFunction", (void *)cuModuleGetFunction},
      {"cuFuncSetAttribute", (void *)cuFuncSetAttribute},
      {"cuStreamGetCaptureInfo", (void *)cuStreamGetCaptureInfo_v3},
      {"cuLaunchKernel", (void *)cuLaunchKernel},
  };
  *function = nullptr;
  for (const auto &one : known)
    if (!strcmp(one.name, name)) *function = one.function;
  if (status) *status = !*function;
  return *function ? 0 : 500;
}
}
