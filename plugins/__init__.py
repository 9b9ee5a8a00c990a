"""The operator hstu::HstuAttention outside Python: its contract, the TensorRT plugin in C++ and the Triton kernels."""
