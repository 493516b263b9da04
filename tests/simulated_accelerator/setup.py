from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension("cppo_simulated._device", ["device.cpp"], extra_compile_args=["-O1"])
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
