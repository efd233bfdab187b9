"""Run code on fake tensors of device `cuda`: shapes, dtypes and devices are those of a GPU, without one."""
