/* Links as libtorch.so, so that the real one is a dependency by name and no torch is needed at
   build time. torch's own libraries are loaded RTLD_LOCAL: without this dependency our symbols
   would not resolve. */
void vlmops_libtorch_stub(void) {}
