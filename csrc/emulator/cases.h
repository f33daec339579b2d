// Kernels that only the emulator's tests run, by name: good ones and planted bugs.
#pragma once

#include <cstdint>

namespace vlmops::emulator {

struct Arguments {
  void* buffers[8];
  int64_t sizes[8];
  void* stream;

  template <class T>
  T* buffer(int i) const {
    return static_cast<T*>(buffers[i]);
  }
  int size(int i) const { return static_cast<int>(sizes[i]); }
};

struct Case {
  const char* name;
  int (*launch)(const Arguments&);
  const Case* next;
};

inline const Case* first_case = nullptr;

struct RegisterCase : Case {
  RegisterCase(const char* name, int (*launch)(const Arguments&)) : Case{name, launch, first_case} {
    first_case = this;
  }
};

}  // namespace vlmops::emulator

// VLMOPS_CASE(name) { return launch(..); } with `arguments` in scope.
#define VLMOPS_CASE(name)                                                               \
  static int name##_case(const ::vlmops::emulator::Arguments& arguments);               \
  static const ::vlmops::emulator::RegisterCase name##_registered(#name, &name##_case); \
  static int name##_case(const ::vlmops::emulator::Arguments& arguments)
