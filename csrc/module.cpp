// distpro._C: the door from Python. It takes addresses, shapes, strides, a dtype code and a stream,
// never tensors, so that one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "build_info.h"
#include "plan.h"
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

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native layer of distpro; reached through distpro._native.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("threads", &threads, "OpenMP threads of a parallel region; follows torch.set_num_threads.");

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
        return as_list(distpro::tile_plan(shapes, teacher_of, tile_elements));
      },
      py::arg("shapes"), py::arg("teacher_of"), py::arg("tile_elements"),
      "[(pathway, first_plane, planes)] for [N, C, H, W] shapes, teacher map by teacher map.");

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
