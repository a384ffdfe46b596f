"""GPUs and their figures, devices and interconnects: below preflight and training."""
