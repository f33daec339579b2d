// Given to g++ before every checked kernel: what it does not instrument gets names of ours.
#pragma once

#include <cstring>

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("vlmops_checked_memcpy");
void* memset(void*, int, size_t) noexcept __asm__("vlmops_checked_memset");
}
