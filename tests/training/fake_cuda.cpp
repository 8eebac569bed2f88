// Make PyTorch accept the device "cuda" without a GPU. It can then run on tensors without data.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {
struct FakeHooks : CUDAHooksInterface {
  FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  // A PyTorch for CUDA asks this in attention. Older versions lack the method.
  long versionRuntimeCuDNN() const { return 0; }
};
// A PyTorch for CUDA registers its own hooks later, with a lower priority.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, FakeHooks);
}

// Call this after the import of torch, because the last guard wins.
extern "C" void set_guard() {
  using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
