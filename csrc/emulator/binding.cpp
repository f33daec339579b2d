// The Python modules vlmops_emulator_fast and _checked: for tests, not part of the wheel. Pointers
// are plain integers (tensor.data_ptr()), so that it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_kernels.h"
#include "emulator/cases.h"
#include "emulator/control.h"
#include "emulator/shadow.h"
#include "emulator/state.h"

namespace py = pybind11;
using namespace vlmops::emulator;

static std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const Case* c = first_case; c; c = c->next) names.emplace_back(c->name);
  return names;
}

static void run_case(const std::string& name, const std::vector<uintptr_t>& buffers,
                     const std::vector<int64_t>& sizes) {
  Arguments arguments = {};
  if (buffers.size() > 8 || sizes.size() > 8) throw std::invalid_argument("at most 8 of each");
  for (size_t i = 0; i < buffers.size(); ++i) {
    arguments.buffers[i] = reinterpret_cast<void*>(buffers[i]);
  }
  for (size_t i = 0; i < sizes.size(); ++i) arguments.sizes[i] = sizes[i];
  for (const Case* c = first_case; c; c = c->next) {
    if (name != c->name) continue;
    const int status = c->launch(arguments);
    if (status != 0) throw std::runtime_error(last_error());
    return;
  }
  throw std::invalid_argument("no case is called " + name);
}

static void define(py::module_& m) {
  m.doc() = "Runs vlmops' CUDA kernels on the CPU (csrc/emulator).";
  m.attr("checked") = kChecked;
  m.def("cases", &case_names, "Names of the emulator's own test kernels.");
  m.def("run_case", &run_case, py::arg("name"), py::arg("buffers"), py::arg("sizes"),
        py::call_guard<py::gil_scoped_release>(),
        "Launches a test kernel on data pointers and sizes. Raises RuntimeError with what went "
        "wrong.");
  m.def(
      "register_buffer",
      [](uintptr_t p, size_t bytes, const std::string& name, bool read_only) {
        register_buffer(reinterpret_cast<const void*>(p), bytes, name, read_only);
      },
      py::arg("pointer"), py::arg("bytes"), py::arg("name"), py::arg("read_only") = false,
      "Global memory that kernels may touch. With none registered only shared memory is checked.");
  m.def("clear_buffers", &clear_buffers);
  m.def("set_device", &set_device, py::arg("architecture"), py::arg("multiprocessors") = 8,
        "The device that launchers see: 80, 86, 89, 90, 100, 120.");
  m.def("set_host_threads", &set_host_threads, py::arg("n"), "0: as many as the machine has.");
  m.def("last_error", [] { return std::string(last_error()); });
  m.def(
      "cuda_kernels", [] { return reinterpret_cast<uintptr_t>(vlmops_cuda_kernels()); },
      "Address of the table of launchers, the one that libvlmops takes.");
}

// Two names, since Python knows modules by name: either can be loaded beside the other.
PYBIND11_MODULE(vlmops_emulator_fast, m) { define(m); }
PYBIND11_MODULE(vlmops_emulator_checked, m) { define(m); }
