"""The compiled part, one C file. Everything else is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "hf_mars.optim.kernels._cpu",
            ["hf_mars/optim/kernels/_cpu.c"],
            # No -ffast-math: it would change the whole process's handling of tiny numbers, and NaN must stay NaN.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a C compiler the same steps are composed of torch's kernels
        )
    ]
)
