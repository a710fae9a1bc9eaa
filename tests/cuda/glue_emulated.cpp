// The glue of a family's .cu files on CPU tensors, with its kernels on the emulated machine: the operators of
// torch.ops.mpma_emulated. MPMA_GLUE is the glue; tests/cuda/emulation.py compiles this once for each family.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

#include "cuda/launch.h"

// A CPU tensor stands for one of the device, which has one stream and nothing to guard.
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator

namespace mpma::cuda {
inline AOTITorchError only_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
inline Device current_device() {
  Device device;
  if (const char* bytes = std::getenv("MPMA_EMULATED_SHARED_MEMORY")) device.shared_memory = std::atoi(bytes);
  return device;
}
}  // namespace mpma::cuda

#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream only_stream
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(mpma_emulated, CPU, m, 0)

#include MPMA_GLUE
#if defined(MPMA_GLUE_FLOAT32)  // families of which each element type has a file of its own
#include MPMA_GLUE_BFLOAT16
#include MPMA_GLUE_FLOAT16
#include MPMA_GLUE_FLOAT32
#endif
