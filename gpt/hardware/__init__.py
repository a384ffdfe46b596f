"""GPUs and their figures, devices, FLOPs and interconnects: below preflight and training."""
