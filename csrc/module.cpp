// distpro._C, the Python binding. It takes addresses, shapes, layouts, a dtype code and a stream,
// never tensors, so that one build works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "pathway_loss.h"
#include "plan.h"
#include "threads.h"
#include "vectors.h"
#ifdef DISTPRO_WITH_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;

namespace {

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = DISTPRO_VERSION;
  info["compiler"] = DISTPRO_COMPILER;
  info["flags"] = DISTPRO_FLAGS;
  info["build_type"] = DISTPRO_BUILD_TYPE;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cuda"] = text_or_none(DISTPRO_CUDA_VERSION);
  info["cuda_archs"] = text_or_none(DISTPRO_CUDA_ARCHS);
  info["cuda_why_not"] = text_or_none(DISTPRO_CUDA_WHY_NOT);
  return info;
}

py::tuple as_tuple(const distpro::Level& l) { return py::make_tuple(l.level, l.weight); }
py::tuple as_tuple(const distpro::Bin& b) { return py::make_tuple(b.start, b.end); }
py::tuple as_tuple(const distpro::Tile& t) {
  return py::make_tuple(t.pathway, t.first_plane, t.planes);
}

template <typename T>
py::list as_list(const std::vector<T>& items) {
  py::list out;
  for (const T& item : items) out.append(as_tuple(item));
  return out;
}

using Addresses = std::vector<std::uintptr_t>;

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void require_size(const char* what, std::size_t expected, std::size_t found) {
  if (expected == found) return;
  throw std::invalid_argument(std::string(what) + ": the plan is for " + std::to_string(expected) +
                              " addresses, got " + std::to_string(found));
}

// Runs the kernel of the device, cuda:: if `stream` is given, else cpu::, with the GIL released.
template <typename OnCpu, typename OnCuda, typename Plan, typename Call>
void dispatch(OnCpu on_cpu, [[maybe_unused]] OnCuda on_cuda, const Plan& plan, const Call& call,
              std::optional<std::uintptr_t> stream) {
  py::gil_scoped_release no_gil;
  if (!stream) return on_cpu(plan, call);
#ifdef DISTPRO_WITH_CUDA
  on_cuda(plan, call, pointer(*stream));
#else
  throw std::invalid_argument("built without CUDA");
#endif
}

#ifdef DISTPRO_WITH_CUDA
#define DISTPRO_ON_DEVICES(name) &distpro::cpu::name, &distpro::cuda::name
#else
#define DISTPRO_ON_DEVICES(name) &distpro::cpu::name, nullptr
#endif

void pathway_loss_forward(const distpro::PathwayPlan& plan, const Addresses& students,
                          const Addresses& teachers, std::uintptr_t weights, std::uintptr_t loss,
                          std::uintptr_t per_pathway, std::uintptr_t means, std::uintptr_t partials,
                          std::optional<std::uintptr_t> stream) {
  require_size("students", plan.pathways.size(), students.size());
  require_size("teachers", plan.pathways.size(), teachers.size());
  const distpro::LossForward call{students.data(),
                                  teachers.data(),
                                  pointer(weights),
                                  pointer(loss),
                                  pointer(per_pathway),
                                  pointer(means),
                                  static_cast<double*>(pointer(partials))};
  dispatch(DISTPRO_ON_DEVICES(pathway_loss_forward), plan, call, stream);
}

void pathway_loss_backward(const distpro::PathwayPlan& plan, const Addresses& students,
                           const Addresses& teachers, const Addresses& gradients,
                           std::uintptr_t weights, std::uintptr_t grad_loss,
                           std::uintptr_t grad_per_pathway, std::uintptr_t means,
                           std::optional<std::uintptr_t> stream) {
  require_size("students", plan.pathways.size(), students.size());
  require_size("teachers", plan.pathways.size(), teachers.size());
  require_size("gradients", plan.pathways.size(), gradients.size());
  const distpro::LossBackward call{students.data(),  teachers.data(),    gradients.data(),
                                   pointer(weights), pointer(grad_loss), pointer(grad_per_pathway),
                                   pointer(means)};
  dispatch(DISTPRO_ON_DEVICES(pathway_loss_backward), plan, call, stream);
}

void pathway_dots(const distpro::VectorPlan& plan, const Addresses& left, const Addresses& right,
                  std::uintptr_t dots, std::uintptr_t partials,
                  std::optional<std::uintptr_t> stream) {
  require_size("left", plan.sizes.size(), left.size());
  require_size("right", plan.sizes.size(), right.size());
  const distpro::Dots call{left.data(), right.data(), pointer(dots),
                           static_cast<double*>(pointer(partials))};
  dispatch(DISTPRO_ON_DEVICES(pathway_dots), plan, call, stream);
}

void perturb(const distpro::VectorPlan& plan, const Addresses& parameters,
             const Addresses& directions, const Addresses& plus, const Addresses& minus,
             double radius, std::uintptr_t epsilon, std::uintptr_t partials,
             std::optional<std::uintptr_t> stream) {
  for (const Addresses* list : {&parameters, &directions, &plus, &minus}) {
    require_size("perturb", plan.sizes.size(), list->size());
  }
  const distpro::Perturb call{parameters.data(),
                              directions.data(),
                              plus.data(),
                              minus.data(),
                              radius,
                              pointer(epsilon),
                              static_cast<double*>(pointer(partials))};
  dispatch(DISTPRO_ON_DEVICES(perturb), plan, call, stream);
}

void bind_operators(py::module_& m) {
  using distpro::PathwayPlan;
  using distpro::VectorPlan;
  py::enum_<distpro::Dtype>(m, "Dtype")
      .value("float32", distpro::Dtype::float32)
      .value("bfloat16", distpro::Dtype::bfloat16)
      .value("float16", distpro::Dtype::float16)
      .value("float64", distpro::Dtype::float64);
  py::enum_<distpro::Distance>(m, "Distance")
      .value("hcl", distpro::Distance::hcl)
      .value("l2", distpro::Distance::l2)
      .value("l1", distpro::Distance::l1);
  py::enum_<distpro::Layout>(m, "Layout")
      .value("planes", distpro::Layout::planes)
      .value("channels_last", distpro::Layout::channels_last);

  py::class_<PathwayPlan>(m, "PathwayPlan", "How pathway_loss walks maps of these shapes.")
      .def(py::init(&distpro::pathway_plan), py::arg("dtype"), py::arg("distance"),
           py::arg("shapes"), py::arg("layouts"), py::arg("teacher_of"), py::arg("tile_elements"),
           py::arg("tile_channels"))
      .def_property_readonly("partials",
                             [](const PathwayPlan& plan) { return plan.tiling.tiles.size(); });
  py::class_<VectorPlan>(m, "VectorPlan", "How dots and perturb walk lists of flat arrays.")
      .def_static("dots", &distpro::dots_plan, py::arg("dtype"), py::arg("sizes"),
                  py::arg("right_of"), py::arg("slot_of"), py::arg("slots"),
                  py::arg("tile_elements"))
      .def_static("perturb", &distpro::perturb_plan, py::arg("dtype"), py::arg("sizes"),
                  py::arg("tile_elements"))
      .def_property_readonly("partials",
                             [](const VectorPlan& plan) { return plan.tiling.tiles.size(); });

  // Addresses of dense memory on one device; `stream` is None for the CPU, a cudaStream_t for CUDA.
  m.def("pathway_loss_forward", &pathway_loss_forward, py::arg("plan"), py::arg("students"),
        py::arg("teachers"), py::arg("weights"), py::arg("loss"), py::arg("per_pathway"),
        py::arg("means"), py::arg("partials"), py::arg("stream"));
  m.def("pathway_loss_backward", &pathway_loss_backward, py::arg("plan"), py::arg("students"),
        py::arg("teachers"), py::arg("gradients"), py::arg("weights"), py::arg("grad_loss"),
        py::arg("grad_per_pathway"), py::arg("means"), py::arg("stream"));
  m.def("pathway_dots", &pathway_dots, py::arg("plan"), py::arg("left"), py::arg("right"),
        py::arg("dots"), py::arg("partials"), py::arg("stream"));
  m.def("perturb", &perturb, py::arg("plan"), py::arg("parameters"), py::arg("directions"),
        py::arg("plus"), py::arg("minus"), py::arg("radius"), py::arg("epsilon"),
        py::arg("partials"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native layer of distpro; reached through distpro._native.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("simd", &distpro::cpu::simd,
        "Instruction set of the CPU kernels; DISTPRO_SIMD=baseline or avx2 asks for a lesser one.");
  m.def("threads", &distpro::threads,
        "OpenMP threads of a parallel region; follows torch.set_num_threads.");

  m.def(
      "hcl_levels", [](std::int64_t height) { return as_list(distpro::hcl_levels(height)); },
      py::arg("height"), "[(level, weight)] of an HCL; level 0 is the full map.");
  m.def(
      "pool_bins",
      [](std::int64_t size, std::int64_t level) {
        return as_list(distpro::pool_bins(size, level));
      },
      py::arg("size"), py::arg("level"), "[(start, end)] of adaptive average pooling on one edge.");
  m.def(
      "tile_plan",
      [](const std::vector<distpro::Shape>& shapes, const std::vector<std::int64_t>& teacher_of,
         std::int64_t tile_elements) {
        const std::vector<distpro::Layout> layouts(shapes.size(), distpro::Layout::planes);
        return as_list(distpro::tile_plan(shapes, layouts, teacher_of, tile_elements, 1).tiles);
      },
      py::arg("shapes"), py::arg("teacher_of"), py::arg("tile_elements"),
      "[(pathway, first_plane, planes)] for [N, C, H, W] shapes, teacher map by teacher map.");

  bind_operators(m);

#ifdef DISTPRO_WITH_CUDA
  m.def(
      "cuda_info",
      [] {
        const distpro::CudaInfo info = distpro::cuda_info();
        return py::dict(py::arg("runtime") = info.runtime, py::arg("driver") = info.driver,
                        py::arg("devices") = info.devices, py::arg("status") = info.status);
      },
      "Versions of the CUDA runtime linked in and of the driver, and the number of devices.");
  m.def(
      "kernel_arch", &distpro::kernel_arch, py::arg("device"),
      "Architecture (90 for sm_90) of the kernels that `device` runs; RuntimeError if none fits.");
#endif
}
