# AMD GPUs: AMD's own PyTorch image (Python 3.11, ROCm 10.0, PyTorch 2.13.0), compilers included.
# Not verified: this image has never been built, and cppo has never run in it. The tag is from
# AMD's installation page; the lint passes.
FROM rocm/pytorch:rocm10.0_ubuntu24.04_py3.11_pytorch_release_2.13.0

# HOME: whoever runs this may have no entry in /etc/passwd, and pip and the caches need a home.
ENV CPPO_SYSTEM_TORCH=1 HOME=/tmp
USER 1000:1000
WORKDIR /repository
