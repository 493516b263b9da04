// A device that is not there: PyTorch's spare device type, on plain memory of the host.
//
// To PyTorch its tensors are not CPU tensors: code that forgets where a tensor lives fails here as
// it would on a card. Every operator copies its arguments to the CPU, computes there, and copies
// the results back (PyTorch's own fallback). The allocator keeps freed blocks until it is asked to
// give them back, and counts, as those of real devices do.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>

#include <array>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
constexpr size_t kMemoryBytes = size_t{8} << 30;  // of each device
thread_local c10::DeviceIndex current_device = 0;

// --- memory ------------------------------------------------------------------------------------

struct Block {
  size_t bytes;
  c10::DeviceIndex device;
};

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::DeviceIndex device = current_device;
    const size_t rounded = (bytes + 511) / 512 * 512;
    auto& stats = stats_[device];
    void* data = nullptr;
    auto& kept = kept_[device];
    if (auto found = kept.find(rounded); found != kept.end()) {
      data = found->second;
      kept.erase(found);
    } else if (rounded > 0) {
      TORCH_CHECK_WITH(
          OutOfMemoryError,
          stats.reserved_bytes[0].current + rounded <= kMemoryBytes,
          "the simulated device is out of memory");
      data = c10::alloc_cpu(rounded);
      stats.reserved_bytes[0].increase(rounded);
    }
    if (data != nullptr) {
      held_[data] = {rounded, device};
      stats.allocated_bytes[0].increase(rounded);
    }
    return {data, data, &Allocator::give_back, c10::Device(kDevice, device)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Allocator::give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool initialized() override { return true; }

  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (c10::DeviceIndex device = 0; device < kDevices; ++device) {
      for (const auto& [bytes, data] : kept_[device]) {
        c10::free_cpu(data);
        stats_[device].reserved_bytes[0].decrease(bytes);
      }
      kept_[device].clear();
    }
  }

  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_[device];
  }

  void resetAccumulatedStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_[device].allocated_bytes[0].reset_accumulated();
    stats_[device].reserved_bytes[0].reset_accumulated();
  }

  void resetPeakStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_[device].allocated_bytes[0].reset_peak();
    stats_[device].reserved_bytes[0].reset_peak();
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {kMemoryBytes - stats_[device].reserved_bytes[0].current, kMemoryBytes};
  }

 private:
  static void give_back(void* data);

  std::mutex mutex_;
  std::array<c10::CachingDeviceAllocator::DeviceStats, kDevices> stats_;
  std::array<std::multimap<size_t, void*>, kDevices> kept_;
  std::unordered_map<void*, Block> held_;
};

Allocator& allocator() {
  static auto* made = new Allocator();  // outlives every tensor
  return *made;
}

void Allocator::give_back(void* data) {
  if (data == nullptr) {
    return;
  }
  auto& self = allocator();
  const std::lock_guard<std::mutex> lock(self.mutex_);
  const Block block = self.held_.at(data);
  self.held_.erase(data);
  self.stats_[block.device].allocated_bytes[0].decrease(block.bytes);
  self.kept_[block.device].emplace(block.bytes, data);
}

const bool allocator_registered = [] {
  c10::SetAllocator(kDevice, &allocator());
  return true;
}();

// --- device ------------------------------------------------------------------------------------

struct Guard final : public c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device device) const override {
    if (device.has_index()) {
      TORCH_CHECK(device.index() < kDevices, "there is no simulated device ", device.index());
      current_device = device.index();
    }
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) {
      current_device = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    const auto index = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, index));
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // Nothing is ever in flight: each operator ends before it returns.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- generators --------------------------------------------------------------------------------

// A generator of the simulated device draws what the CPU's would, from the same seed.
struct GeneratorImpl final : public c10::GeneratorImpl {
  explicit GeneratorImpl(c10::DeviceIndex index)
      : c10::GeneratorImpl({kDevice, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::make_generator<at::CPUGeneratorImpl>()) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new GeneratorImpl(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }

  at::Generator cpu;
};

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    Guard().setDevice({kDevice, device});
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice({kDevice, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    static std::array<at::Generator, kDevices> made{
        at::make_generator<GeneratorImpl>(0), at::make_generator<GeneratorImpl>(1)};
    return made[device < 0 ? current_device : device];
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<GeneratorImpl>(device < 0 ? current_device : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr data = allocator().allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(bytes);
  }
};

// --- operators ---------------------------------------------------------------------------------

at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(
      size,
      &allocator(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype),
      format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      size,
      stride,
      &allocator(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

// The memory of a simulated tensor, seen as a CPU tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kDevice) {
    return tensor;
  }
  return at::from_blob(
      tensor.data_ptr(),
      tensor.sizes(),
      tensor.strides(),
      [keep = tensor.storage()](void*) {},
      tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(
    const at::Tensor& self,
    c10::SymIntArrayRef size,
    std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}


void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (auto& value : *stack) {
    if (value.isGenerator()) {
      TORCH_CHECK(
          value.toGenerator().device().type() == kDevice,
          "expected a generator of the simulated device, found one of ",
          value.toGenerator().device());
      value = static_cast<GeneratorImpl*>(value.toGenerator().unsafeGetGeneratorImpl())->cpu;
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Storage", TORCH_FN((static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_))));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

// Under autocast an operator is found on its own; products run in the lower precision.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  #define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#undef LOWER
}

// --- collectives -------------------------------------------------------------------------------

// Work that was done before it was handed out.
struct Done final : public c10d::Work {
  explicit Done(std::vector<at::Tensor> tensors) {
    std::vector<c10::Device> devices;
    for (const auto& tensor : tensors) {
      if (!tensor.is_cpu()) {
        devices.push_back(tensor.device());
      }
    }
    std::sort(devices.begin(), devices.end(), [](auto a, auto b) { return a.index() < b.index(); });
    devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), devices);
    future_->markCompleted(c10::IValue(std::move(tensors)));
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

using Tensors = std::vector<at::Tensor>;
using Handle = c10::intrusive_ptr<c10d::Work>;

Tensors on_host(const Tensors& tensors) {
  Tensors hosted;
  for (const auto& tensor : tensors) {
    hosted.push_back(on_host(tensor));
  }
  return hosted;
}

std::vector<Tensors> on_host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> hosted;
  for (const auto& tensors : lists) {
    hosted.push_back(on_host(tensors));
  }
  return hosted;
}

// Collectives of the simulated device: those of a CPU backend, on the same memory.
class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> cpu, int rank, int size)
      : c10d::Backend(rank, size), cpu_(std::move(cpu)) {}

  const std::string getBackendName() const override { return "simulated_collectives"; }

  Handle broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto hosted = on_host(tensors);
    cpu_->broadcast(hosted, options)->wait();
    return c10::make_intrusive<Done>(tensors);
  }
  Handle allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto hosted = on_host(tensors);
    cpu_->allreduce(hosted, options)->wait();
    return c10::make_intrusive<Done>(tensors);
  }
  Handle allgather(
      std::vector<Tensors>& gathered,
      Tensors& tensors,
      const c10d::AllgatherOptions& options) override {
    auto to = on_host(gathered);
    auto from = on_host(tensors);
    cpu_->allgather(to, from, options)->wait();
    return c10::make_intrusive<Done>(gathered[0]);
  }
  Handle _reduce_scatter_base(
      at::Tensor& reduced,
      at::Tensor& tensor,
      const c10d::ReduceScatterOptions& options) override {
    auto to = on_host(reduced);
    auto from = on_host(tensor);
    cpu_->_reduce_scatter_base(to, from, options)->wait();
    return c10::make_intrusive<Done>(Tensors{reduced});
  }
  Handle barrier(const c10d::BarrierOptions& options) override {
    cpu_->barrier(options)->wait();
    return c10::make_intrusive<Done>(Tensors{});
  }

 private:
  c10::intrusive_ptr<c10d::Backend> cpu_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def(
      "collectives",
      [](const c10::intrusive_ptr<c10d::Backend>& cpu, int rank, int size) {
        return c10::intrusive_ptr<c10d::Backend>(
            c10::make_intrusive<Collectives>(cpu, rank, size));
      });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int device) { Guard().setDevice({kDevice, static_cast<c10::DeviceIndex>(device)}); });
  m.def("device_count", [] { return static_cast<int>(kDevices); });
}
