// What tests set and ask from outside of a launch.
#pragma once

namespace vlmops::emulator {

constexpr int kLaunchRefused = 1;  // nothing ran
constexpr int kLaunchFailed = 2;   // stopped by an error

// The device that launchers see: 80, 90, 120, and its number of multiprocessors.
void set_device(int architecture, int multiprocessors);
void set_host_threads(int n);  // 0: as many as the machine has; checked kernels run on one

// What made the last launch fail.
const char* last_error();

}  // namespace vlmops::emulator
