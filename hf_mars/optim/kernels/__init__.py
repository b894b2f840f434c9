"""The step of MARS-AdamW and MARS-Lion in few passes over memory: compiled for CPUs, in Triton for GPUs."""
