"""The sigmoid focal loss as two Triton kernels, for CUDA tensors (being written)."""
