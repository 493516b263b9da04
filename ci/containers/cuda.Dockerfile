# NVIDIA GPUs: PyTorch's own image (Python 3.12, CUDA 13.0; the host's driver must be 580 or newer).
# Not verified: this image has never been built, and cppo has never run in it. The tag is from
# public Dockerfiles that use it; the lint passes.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# Triton compiles a launcher for each kernel: a C compiler, and Python's headers.
# Versions are the base image's release's own: Ubuntu drops old ones from its archive.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# HOME: whoever runs this may have no entry in /etc/passwd, and pip and the caches need a home.
ENV CPPO_SYSTEM_TORCH=1 HOME=/tmp
USER 1000:1000
WORKDIR /repository
