// Compiled with the kernels' flags, which it reports.
namespace vlmops::emulator {
#if defined(VLMOPS_EMULATOR_CHECKED)
extern const bool kChecked = true;
#else
extern const bool kChecked = false;
#endif
}  // namespace vlmops::emulator
