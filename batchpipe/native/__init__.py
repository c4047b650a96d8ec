"""CPU kernels in C, compiled for this machine at first use and called through ctypes."""
